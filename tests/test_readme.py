"""README.md: the quickstart runs as written, and the links are valid."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPO
from tests.support.tiny_runs import write_model

README = (REPO / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.mark.rest
def test_quickstart_commands_run_as_written(tmp_path: Path):
    """The commands run in order, with a tiny model under the name of the real one."""
    files = {"json": "rows.jsonl", "yaml": "run.yaml"}
    write_model(tmp_path / "Qwen2.5-0.5B-Instruct", max_position_embeddings=2048)
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(REPO),
        "OMP_NUM_THREADS": "1",
    }
    for language, text in BLOCKS:
        if language in files:
            (tmp_path / files[language]).write_text(text)
            continue
        command = ["bash", "-ec", text] if language == "bash" else [sys.executable, "-c", text]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
    assert [language for language, _ in BLOCKS] == ["json", "yaml", "bash", "python"]
    assert (tmp_path / "first-hf/model.safetensors").exists()


def test_relative_links_point_to_existing_files():
    links = re.findall(r"\]\(([^)#]+)[^)]*\)|(?:srcset|src)=\"([^\"]+)\"", README)
    paths = [link or image for link, image in links if not (link or image).startswith("http")]
    assert len(paths) > 20
    assert [path for path in paths if not (REPO / path).exists()] == []
