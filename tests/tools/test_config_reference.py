"""The configuration reference in docs/ and the settings that it is written from."""

import importlib.util
from types import ModuleType

from tests.conftest import REPO


def load_tool() -> ModuleType:
    path = REPO / "tools" / "config_reference.py"
    spec = importlib.util.spec_from_file_location("config_reference", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_committed_page_equals_the_rendered_settings():
    tool = load_tool()
    assert tool.PAGE.read_text(encoding="utf-8") == tool.render(), (
        "docs/configuration-reference.md is not current: run python tools/config_reference.py"
    )


def test_page_states_type_bounds_and_default_of_a_setting():
    page = load_tool().render()
    entry = page.split("### `objective.jsd_weight`\n", 1)[1].split("###", 1)[0]
    assert "Type: number above 0 and below 1. Default: `0.5`." in entry
    assert "### `rollout.vllm.sync`\n\nType: `disk`, `nccl`, `null`. Default: `null`." in page
