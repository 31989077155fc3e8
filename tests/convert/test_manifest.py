"""Computing checksums keeps no memory in a process that saves for weeks."""

import json
import subprocess
import sys

import pytest

from tests.conftest import REPO

# A separate process, since the memory pools of a used process would hide kept memory.
SCRIPT = """
import json, resource, sys
from pathlib import Path
from aropd_mcore.convert.manifest import file_sums

def held():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

before = held()
for _ in range(10):
    file_sums(Path(sys.argv[1]), "abcd")
print(json.dumps(held() - before))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc exists on Linux only")
def test_checksums_keep_no_memory(tmp_path):
    for name in "abcd":
        (tmp_path / name).write_text(name)
    script = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    run = subprocess.run(script, cwd=REPO, check=True, capture_output=True)
    assert json.loads(run.stdout) < 2**20  # slightly more than a thread's stack
