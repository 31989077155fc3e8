"""Hooks of mkdocs.yml."""

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

_OUTSIDE_LINK = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+[^)#\s]+)\)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Replace links to files outside docs/ by their text and path.

    Such a link works in a checkout and in a repository browser. The site does not have these files.

    Raises:
        PluginError: A link names a file that does not exist.
    """
    folder = Path(page.file.abs_src_path).parent
    root = Path(config.config_file_path).parent.resolve()

    def replace(link: re.Match[str]) -> str:
        target = (folder / link[2]).resolve()
        if not target.exists():
            raise PluginError(f"{page.file.src_uri}: link to {link[2]}: no such file or folder")
        path = str(target.relative_to(root))
        return f"`{path}`" if link[1].strip("`") == path else f"{link[1]} (`{path}`)"

    return _OUTSIDE_LINK.sub(replace, markdown)
