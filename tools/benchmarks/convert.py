"""Compare time and memory of HF -> Megatron -> HF with `cp -r`, on a random checkpoint.

    python tools/benchmarks/convert.py --scratch /large/disk [--json FILE]

Each measurement is a separate process and ends with `sync`. The three kinds take turns: all run
under the same load of the machine. Peak memory is the kernel's figure for the process.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from aropd_mcore.convert.architecture import read_architecture
from aropd_mcore.convert.hf_write import SafetensorsWriter
from aropd_mcore.convert.tensor_bytes import TensorInfo

SHAPES = {
    "qwen3-4b": {  # 8.0 GB in bf16
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_act": "silu",
        "head_dim": 128,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "max_position_embeddings": 40960,
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vocab_size": 151936,
    },
    "tiny": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": 256,
        "intermediate_size": 512,
        "max_position_embeddings": 512,
        "num_attention_heads": 8,
        "num_hidden_layers": 4,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "torch_dtype": "bfloat16",
        "vocab_size": 1000,
    },
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scratch", type=Path, required=True, help="folder on the disk to measure")
    parser.add_argument(
        "--shape", choices=SHAPES, default="qwen3-4b", help="model (default: %(default)s)"
    )
    parser.add_argument(
        "--repeats", type=int, default=3, help="measurements per kind (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, help="file for the figures (default: none)")
    args = parser.parse_args(argv)

    folder = args.scratch / "convert-benchmark"
    shutil.rmtree(folder, ignore_errors=True)
    model = folder / "hf"
    num_bytes, largest = write_random_model(model, SHAPES[args.shape])
    kinds = {
        "cp -r": (["cp", "-r", str(model), str(folder / "copy")], folder / "copy"),
        "import": (_aropd("import", model, folder / "megatron"), folder / "megatron"),
        "export": (_aropd("export", folder / "megatron", folder / "back"), folder / "back"),
    }
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    peaks = dict.fromkeys(kinds, 0)
    for _ in range(args.repeats):
        for kind, (command, target) in kinds.items():
            shutil.rmtree(target, ignore_errors=True)
            warm_up(Path(command[-2]), folder / "warm-up")
            elapsed, peak = measure(command)
            seconds[kind].append(elapsed)
            peaks[kind] = max(peaks[kind], peak)
    verified = subprocess.run(_aropd("verify", model, folder / "back"), stdout=subprocess.DEVNULL)
    shutil.rmtree(folder)

    copy = statistics.median(seconds["cp -r"])
    figures = {
        "checkpoint_gb": num_bytes / 1e9,
        "memory_bound_gb": 1 + 3 * largest / 1e9,
        "bitwise": verified.returncode == 0,
        "kinds": {
            kind: {
                "seconds": times,
                "speed_to_copy": copy / statistics.median(times),
                "peak_gb": peaks[kind] / 1e9,
            }
            for kind, times in seconds.items()
        },
    }
    print(f"{figures['checkpoint_gb']:.2f} GB, bound {figures['memory_bound_gb']:.2f} GB", end="")
    print(f", round trip {'bitwise' if figures['bitwise'] else 'DIFFERS'}")
    for kind, times in seconds.items():
        median = statistics.median(times)
        print(
            f"{kind:8} median {median:6.1f} s (from {min(times):.1f} to {max(times):.1f}), "
            f"{num_bytes / 1e9 / median:.2f} GB/s, {copy / median:.2f} x cp, "
            f"peak {peaks[kind] / 1e9:.2f} GB"
        )
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


def write_random_model(folder: Path, config: dict) -> tuple[int, int]:
    """Write an HF folder of random weights. Return its bytes and those of its largest tensor."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    shapes = read_architecture(folder).hf_shapes
    dtype = getattr(torch, config["torch_dtype"])
    infos = {name: TensorInfo(dtype, shape) for name, shape in shapes.items()}
    noise = torch.randn(2**24 + 1).to(dtype)  # odd length: rows differ
    with SafetensorsWriter(folder, infos) as writer:
        for name, shape in shapes.items():
            count = torch.Size(shape).numel()
            writer.write(name, noise.repeat(count // noise.numel() + 1)[:count].view(shape))
    os.sync()
    sizes = [info.num_bytes for info in infos.values()]
    return sum(sizes), max(sizes)


def warm_up(source: Path, scratch: Path) -> None:
    """Copy the input and remove the copy, to provide its pages and as many free ones.

    On a virtual machine, access to memory that has not been used for a while is several times as
    slow.
    """
    shutil.copytree(source, scratch)
    shutil.rmtree(scratch)


# The peak of a process includes its parent's memory until it executes another program. So the
# measured command gets a small parent.
_PEAK = """
import resource, subprocess, sys
status = subprocess.call(sys.argv[1:], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(status)
"""


def measure(command: list[str]) -> tuple[float, int]:
    """Return the seconds until the command's output is on the disk, and its peak resident bytes."""
    os.sync()
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, *command], stdout=subprocess.PIPE, check=True
    )
    os.sync()
    return time.perf_counter() - start, int(done.stdout) * 1024


def _aropd(command: str, *paths: Path) -> list[str]:
    arguments = ["convert", command, *map(str, paths)]
    return [sys.executable, "-m", "aropd_mcore.cli", *arguments]


if __name__ == "__main__":
    main()
