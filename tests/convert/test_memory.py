"""Conversion of a model needs a fraction of its size in memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPO
from tests.convert.big_models import write_llama

pytestmark = pytest.mark.rest

BEYOND_IMPORTS = 240 * 2**20
"""Limit in bytes: ten of the largest tensors, and less than a fifth of the model."""

# RLIMIT_AS is the only limit of Linux that counts all allocations and mappings: RLIMIT_DATA allows
# mappings of whole files for reading, and RLIMIT_RSS has no effect. The libraries' mappings take
# gigabytes, so the limit is set relative to the address space after all libraries are loaded.
SCRIPT = """
import json, resource, sys
from pathlib import Path
from safetensors.torch import load_file
from aropd_mcore.cli import main
from aropd_mcore.convert import import_export, inspect, verify

folder, allowed = Path(sys.argv[1]), int(sys.argv[2])
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
            ("export", mcore, back, "--max-shard-size", "500MB"),
            ("verify", hf, mcore),
            ("verify", hf, back),
            ("inspect", mcore),
        )
    ]
try:
    load_file(folder / "large" / "model.safetensors")
    whole = "loaded"
except Exception as error:
    whole = type(error).__name__ + ": " + str(error)
print(json.dumps([done, whole]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits on mappings exist on Linux only")
def test_a_model_of_five_times_the_memory_is_converted(tmp_path: Path):
    write_llama(tmp_path / "small", hidden_size=64, intermediate_size=96, num_hidden_layers=2)
    sizes = {"hidden_size": 2048, "intermediate_size": 5120, "num_hidden_layers": 13}
    assert write_llama(tmp_path / "large", **sizes) > 5 * BEYOND_IMPORTS
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), str(BEYOND_IMPORTS)],
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
    assert done == [0, 0, 0, 0, 0], run.stderr
    assert "memory" in whole, "the limit has no effect: the whole file could be loaded"
