"""Conversion of a model needs a fraction of its size in memory."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import REPO
from tests.convert.big_models import write_fp8, write_llama, write_mxfp4

pytestmark = pytest.mark.rest

# RLIMIT_AS is the only limit of Linux that counts all allocations and mappings: RLIMIT_DATA allows
# mappings of whole files for reading, and RLIMIT_RSS has no effect. The libraries' mappings take
# gigabytes, so the limit is set relative to the address space after all libraries are loaded.
SCRIPT = """
import json, resource, sys
from pathlib import Path
from safetensors.torch import load_file
from aropd_mcore.cli import main
from aropd_mcore.convert import import_export, inspect, verify

folder, allowed, commands = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
for name in ("small", "large"):
    hf, mcore, back = (str(folder / f"{name}{kind}") for kind in ("", "-mcore", "-back"))
    if name == "large":  # the small model has loaded the libraries that are loaded late
        status = dict(line.split(":", 1) for line in open("/proc/self/status"))
        limit = int(status["VmSize"].split()[0]) * 1024 + allowed
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    done = [
        main(["convert", *command])
        for command in (
            ("import", hf, mcore),
            ("verify", hf, mcore),
            ("export", mcore, back, "--max-shard-size", "500MB"),
            ("verify", hf, back),
            ("inspect", mcore),
        )[:commands]
    ]
try:
    load_file(folder / "large" / "model.safetensors")
    whole = "loaded"
except Exception as error:
    whole = type(error).__name__ + ": " + str(error)
print(json.dumps([done, whole]))
"""


@dataclass(frozen=True)
class Case:
    write: Callable[..., int]
    """Writes an HF folder and returns the size of its weights in bf16."""
    small: dict[str, int]
    large: dict[str, int]
    allowed: int
    """Bytes of memory beyond the imports: ten of the largest tensors or more, and less than a fifth
    of the large model in bf16."""
    commands: int
    """Number of the script's commands, from the first one on."""


CASES = {
    "bf16": Case(
        write_llama,
        {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2},
        {"hidden_size": 2048, "intermediate_size": 5120, "num_hidden_layers": 13},
        allowed=240 * 2**20,
        commands=5,
    ),
    # Verify compares tensors that are dequantized with tensors that the import has written.
    "fp8": Case(
        write_fp8,
        {"num_hidden_layers": 2},
        {
            "num_hidden_layers": 5,
            "hidden_size": 1024,
            "moe_intermediate_size": 640,
            "n_routed_experts": 32,
        },
        allowed=80 * 2**20,
        commands=2,
    ),
    "mxfp4": Case(
        write_mxfp4,
        {"num_hidden_layers": 2},
        {
            "num_hidden_layers": 4,
            "hidden_size": 1024,
            "intermediate_size": 512,
            "num_local_experts": 36,
        },
        allowed=80 * 2**20,
        commands=2,
    ),
}


@pytest.mark.skipif(sys.platform != "linux", reason="limits on mappings exist on Linux only")
@pytest.mark.parametrize("name", CASES)
def test_a_model_of_five_times_the_memory_is_converted(name: str, tmp_path: Path):
    case = CASES[name]
    case.write(tmp_path / "small", **case.small)
    assert case.write(tmp_path / "large", **case.large) > 5 * case.allowed
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), str(case.allowed), str(case.commands)],
        env=os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    for path in tmp_path.rglob("*"):  # free gigabytes of disk space
        if path.suffix in (".safetensors", ".distcp"):
            path.unlink()
    assert run.returncode == 0, run.stdout + run.stderr
    done, whole = json.loads(run.stdout.splitlines()[-1])
    assert done == [0] * case.commands, run.stderr
    assert "memory" in whole, "the limit has no effect: the whole file could be loaded"
