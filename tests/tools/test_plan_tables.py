"""The tables of planned memory and time in the documentation."""

import importlib.util

from tests.conftest import REPO


def test_committed_tables_equal_the_plan():
    path = REPO / "tools" / "plan_tables.py"
    spec = importlib.util.spec_from_file_location("plan_tables", path)
    assert spec and spec.loader
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    for page, contents in tool.pages():
        name = page.relative_to(REPO)
        assert page.read_text(encoding="utf-8") == contents, (
            f"{name} is not current: run python tools/plan_tables.py"
        )
