"""`aropd convert` and its subcommands. tools/ has scripts that run import and export."""

import argparse
import json
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aropd_mcore.cli.sampling_arguments import LAYOUT_HELP
from aropd_mcore.stages import Stages

if TYPE_CHECKING:
    from aropd_mcore.convert.inspect import Summary
    from aropd_mcore.convert.verify import Report

_DTYPES = ("float32", "bfloat16", "float16")
_MAX_ROWS = 20

_CHECKPOINT_HELP = (
    "an HF folder, a Megatron torch_dist checkpoint, one iteration of a Megatron checkpoint, or a "
    "run's output_dir"
)
_STREAMS = """
    Tensors are read, transformed and written two at a time. This needs no GPU and no process group.
    Memory is about 1 GB in addition to the largest tensors, for any size of model. The output gets
    its name only when it is complete and on disk. The next call removes the temporary files of an
    interrupted one.
"""
_DESCRIPTION = "Convert, compare and inspect checkpoints. This needs no GPU and no Megatron."
_EXAMPLES = """\
examples:
  %(prog)s import Qwen2.5-7B-Instruct checkpoints/qwen
  %(prog)s export runs/mine hf-folder
  %(prog)s COMMAND --help    all options of a command
"""
_EXIT = """
    exit status:
      0  success
      1  the checkpoints differ (verify)
      2  error, stated in one line on stderr
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Register import, export, verify and inspect."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = _DESCRIPTION, _EXAMPLES
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, add, summary in (
        ("import", add_import, "convert an HF folder to a Megatron checkpoint"),
        ("export", add_export, "convert a Megatron or training checkpoint to an HF folder"),
        ("verify", add_verify, "compare two checkpoints of either kind, tensor by tensor"),
        ("inspect", add_inspect, "describe a checkpoint of either kind"),
    ):
        add(subparsers.add_parser(name, help=summary))


def add_import(parser: argparse.ArgumentParser) -> None:
    _describe(
        parser,
        "Write an HF folder as a Megatron-Core torch_dist checkpoint, bit for bit.",
        """
        MCORE_DIR/iter_0000000/ is the checkpoint, including the arguments that Megatron-LM reads.
        MCORE_DIR/latest_checkpointed_iteration.txt names it. MCORE_DIR/hf/ keeps config, tokenizer
        and chat template for the export. The checkpoint loads in every layout.
        """
        + _STREAMS,
        """
        examples:
          %(prog)s Qwen2.5-7B-Instruct checkpoints/qwen
          %(prog)s Qwen3-30B-A3B checkpoints/moe --tensor 4 --expert 8
        """,
    )
    parser.add_argument("hf_dir", type=Path, metavar="HF_DIR", help="HF folder to read")
    parser.add_argument("mcore_dir", type=Path, metavar="MCORE_DIR", help="folder to write")
    layout = parser.add_argument_group(
        "layout in which the checkpoint will be loaded",
        "The model is checked against the layout before the conversion starts.",
    )
    layout.add_argument(
        "--tensor",
        type=_size,
        metavar="N",
        help="number of tensor-parallel ranks. Tensors are stored in as many pieces, of which each "
        "rank reads only its own. (default: the largest of 8, 4, 2, 1 that divides the model)",
    )
    for name, description in (
        ("pipeline", "pipeline stages"),
        ("virtual-pipeline", "model chunks per stage"),
        ("expert", "expert-parallel ranks"),
        ("expert-tensor", "tensor-parallel ranks of each expert"),
    ):
        layout.add_argument(
            f"--{name}",
            type=_size,
            default=1,
            metavar="N",
            help=f"number of {description} (default: 1)",
        )
    for end in ("first", "last"):
        layout.add_argument(
            f"--layers-in-{end}-stage",
            type=_size,
            metavar="N",
            help=f"number of layers on the {end} stage (default: an even split)",
        )
    layout.add_argument("--pipeline-layout", metavar="LAYOUT", help=LAYOUT_HELP)
    _add_allow_pickle(parser)
    _add_overwrite(parser)
    parser.set_defaults(run=_import)


def add_export(parser: argparse.ArgumentParser) -> None:
    _describe(
        parser,
        "Write a Megatron checkpoint's weights as an HF folder that transformers and vLLM load.",
        """
        The checkpoint may come from an import or from a training run, in any layout. Optimizer
        state is ignored. Names and order of the tensors are those of the model's original folder.
        Of a run that trains a LoRA adapter, the adapter is written as a PEFT folder, unless
        --merged is given.
        """
        + _STREAMS,
        """
        examples:
          %(prog)s runs/mine hf-folder
          %(prog)s runs/mine hf-folder --which best
          %(prog)s runs/mine/checkpoints/iter_0000200 hf-folder --weights teacher --dtype bfloat16
          %(prog)s runs/lora adapter-folder
          %(prog)s runs/lora hf-folder --merged
          %(prog)s Llama-3.1-8B hf-folder --adapter adapter-folder
        """,
    )
    parser.add_argument(
        "mcore_dir",
        type=Path,
        metavar="MCORE_DIR",
        help="a Megatron checkpoint, one iteration of it, or a run's output_dir (for its newest "
        "checkpoint); with --adapter, an HF folder",
    )
    parser.add_argument("hf_dir", type=Path, metavar="HF_DIR", help="folder to write")
    parser.add_argument(
        "--merged",
        action="store_true",
        help="of a run that trains a LoRA adapter, write the whole model with the adapter merged "
        "(default: the adapter only)",
    )
    parser.add_argument(
        "--adapter",
        type=Path,
        metavar="DIR",
        help="PEFT folder to merge into the HF folder (default: none)",
    )
    parser.add_argument(
        "--which",
        choices=("newest", "best"),
        default="newest",
        help="checkpoint of a run's output_dir to export. The best one is that of "
        "checkpoint.keep_best. (default: newest)",
    )
    _add_weights(parser)
    parser.add_argument(
        "--dtype",
        choices=_DTYPES,
        help="dtype of all tensors (default: each keeps its own; a teacher that is a moving "
        "average may be float32)",
    )
    parser.add_argument(
        "--max-shard-size",
        type=_bytes,
        default="5GB",
        metavar="SIZE",
        help="largest size of a safetensors file, such as 2GB (default: 5GB)",
    )
    _add_hf(parser)
    _add_overwrite(parser)
    parser.set_defaults(run=_export)


def add_verify(parser: argparse.ArgumentParser) -> None:
    _describe(
        parser,
        "Compare two checkpoints of either kind: the architecture that config.json describes, and "
        "every tensor, bit for bit.",
        """
        Properties in config.json that differ are listed with both values. Tensors that differ are
        listed with their largest absolute and relative error. Any of these differences gives exit
        status 1, also a difference of dtype only. Other files that differ, such as a chat template,
        are listed as notes and do not change the exit status.
        """,
        """
        examples:
          %(prog)s Qwen2.5-7B-Instruct checkpoints/qwen
          %(prog)s Qwen2.5-7B-Instruct back --logits --json report.json
        """,
    )
    for name in ("a", "b"):
        parser.add_argument(name, type=Path, metavar=name.upper(), help=_CHECKPOINT_HELP)
    _add_weights(parser)
    parser.add_argument(
        "--logits",
        action="store_true",
        help="also compare logits and greedy tokens for a random prompt, in fp32 with "
        "transformers; needs memory for one whole model (default: off)",
    )
    _add_json(parser)
    _add_hf(parser)
    _add_allow_pickle(parser)
    parser.set_defaults(run=_verify)


def add_inspect(parser: argparse.ArgumentParser) -> None:
    _describe(
        parser,
        "Describe a checkpoint of either kind. Only headers are read.",
        "Prints family, number of parameters, dtypes, layout and step, and whether the checkpoint "
        "contains a teacher and optimizer state.",
        """
        examples:
          %(prog)s runs/mine
          %(prog)s Qwen2.5-7B-Instruct --shapes
        """,
    )
    parser.add_argument("path", type=Path, metavar="DIR", help=_CHECKPOINT_HELP)
    parser.add_argument("--shapes", action="store_true", help="list every tensor (default: off)")
    _add_json(parser)
    _add_hf(parser)
    _add_allow_pickle(parser)
    parser.set_defaults(run=_inspect)


def _import(args: argparse.Namespace) -> None:
    from aropd_mcore.convert.architecture import check_layout
    from aropd_mcore.convert.import_export import import_hf
    from aropd_mcore.convert.source import HFSource, open_source

    source = open_source(args.hf_dir, allow_pickle=args.allow_pickle)
    if not isinstance(source, HFSource):
        raise ValueError(f"{args.hf_dir}: found a Megatron checkpoint, expected an HF folder")
    check_layout(
        source.architecture,
        tensor=args.tensor or 1,
        stages=Stages(
            args.pipeline,
            args.virtual_pipeline,
            args.layers_in_first_stage,
            args.layers_in_last_stage,
            args.pipeline_layout,
        ),
        expert=args.expert,
        expert_tensor=args.expert_tensor,
    )
    import_hf(source, args.mcore_dir, tensor_parallel=args.tensor, overwrite=args.overwrite)
    for name in source.left_aside:
        print(f"ignored, as in transformers: {name}")
    if source.untrained:
        print(f"kept for exports, not trained: {untrained_text(list(source.untrained))}")
    if quantization := source.config.quantization:
        method = "fp8" if isinstance(quantization, tuple) else quantization
        print(f"dequantized from {method} to bf16; exports write bf16")
    print(f"{args.hf_dir} -> {args.mcore_dir}")


def _export(args: argparse.Namespace) -> None:
    import torch

    from aropd_mcore.convert.adapter import AdaptedSource, write_peft
    from aropd_mcore.convert.import_export import export_hf
    from aropd_mcore.convert.source import HFSource, best_checkpoint, open_source

    path = best_checkpoint(args.mcore_dir) if args.which == "best" else args.mcore_dir
    source = open_source(path, role=args.weights, hf=args.hf, adapter=args.adapter)
    if isinstance(source, HFSource):
        raise ValueError(f"{args.mcore_dir}: found an HF folder, expected a Megatron checkpoint")
    is_adapter = isinstance(source, AdaptedSource) and source.iteration is not None
    if args.merged and not is_adapter:
        raise ValueError(
            f"--merged: found {args.mcore_dir} without an adapter of its own, expected a run that "
            "trains an adapter; remove --merged"
        )
    if isinstance(source, AdaptedSource) and is_adapter and not args.merged:
        write_peft(
            args.hf_dir,
            source.architecture,
            source.adapter,
            base_model=source.base.path,
            dtype=getattr(torch, args.dtype) if args.dtype else None,
            overwrite=args.overwrite,
        )
        print(f"{source.iteration} ({args.weights}) -> {args.hf_dir} (PEFT)")
        return
    export_hf(
        source,
        args.hf_dir,
        dtype=getattr(torch, args.dtype) if args.dtype else None,
        max_shard_bytes=args.max_shard_size,
        overwrite=args.overwrite,
    )
    print(f"{source.iteration or source.path} ({args.weights}) -> {args.hf_dir}")


def _verify(args: argparse.Namespace) -> int:
    from aropd_mcore.convert.source import open_source
    from aropd_mcore.convert.verify import verify

    a, b = (
        open_source(path, role=role, hf=args.hf, allow_pickle=args.allow_pickle)
        for path, role in _paths_with_weights(args)
    )
    report = verify(a, b, logits=args.logits)
    _write_json(args.json, report.as_json())
    _print_report(report)
    return 0 if report.same else 1


def _paths_with_weights(args: argparse.Namespace) -> list[tuple[Path, Any]]:
    """Return both paths, each with the weights to read. An HF folder has one model only, which
    counts as the student, whatever `--weights` is."""
    is_hf = [(path / "config.json").exists() for path in (args.a, args.b)]
    return [
        (path, "student" if hf else args.weights)
        for path, hf in zip((args.a, args.b), is_hf, strict=True)
    ]


def _print_report(report: "Report") -> None:
    for name, (a, b) in report.facts.items():
        print(f"{name} differs: {a} in {report.a}, {b} in {report.b}")
    different = [tensor for tensor in report.tensors if not tensor.equal]
    rows = [("tensor", "shape", "dtypes", "max abs error", "max relative error")]
    for t in different[:_MAX_ROWS]:
        dtypes = " / ".join(dict.fromkeys(t.dtypes))
        errors = (t.max_abs_error, t.max_rel_error)
        absolute, relative = ("no number" if e is None else f"{e:.3g}" for e in errors)
        rows.append((t.name, str(list(t.shape)), dtypes, absolute, relative))
    if different:
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            print("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())
    if len(different) > _MAX_ROWS:
        print(f"and {len(different) - _MAX_ROWS} more")
    for path, names in ((report.a, report.only_a), (report.b, report.only_b)):
        for name in names[:_MAX_ROWS]:
            print(f"only in {path}: {name}")
    print(f"{len(report.tensors) - len(different)} of {len(report.tensors)} tensors are equal")
    if report.same_greedy_tokens is not None:
        print(
            f"logits: largest difference {report.max_logit_error}; greedy tokens "
            f"{'equal' if report.same_greedy_tokens else 'DIFFER'}"
        )
    for note in report.notes:
        print(f"note: {note}")
    print("the same" if report.same else "DIFFERENT")


def _inspect(args: argparse.Namespace) -> None:
    from aropd_mcore.convert.inspect import inspect

    summary = inspect(args.path, hf=args.hf, allow_pickle=args.allow_pickle)
    _write_json(args.json, summary.as_json())
    for label, value in _lines(summary):
        print(f"{label:12}{value}")
    if args.shapes:
        for name, shape in summary.shapes.items():
            print(f"{name} {list(shape)}")


def _lines(summary: "Summary") -> list[tuple[str, str]]:
    layout = " x ".join(f"{name} {size}" for name, size in (summary.layout or {}).items())
    dtypes = ", ".join(f"{name} {count:,}" for name, count in summary.dtypes.items())
    lines = [
        ("checkpoint", f"{summary.path} ({summary.kind})"),
        ("family", summary.family + (", tied embeddings" if summary.tied_embeddings else "")),
        ("parameters", f"{summary.parameters:,}"),
        ("dtypes", f"{dtypes} ({summary.num_bytes / 1e9:.2f} GB)"),
        ("tensors", str(len(summary.shapes))),
    ]
    if summary.kind != "HF":
        lines += [
            ("step", "unknown" if summary.step is None else str(summary.step)),
            ("layout", layout or "unknown"),
            ("teacher", "yes" if summary.has_teacher else "no"),
            ("optimizer", "yes" if summary.has_optimizer else "no"),
        ]
    if summary.left_aside:
        lines.append(("ignored", ", ".join(summary.left_aside)))
    if summary.untrained:
        lines.append(("not trained", untrained_text(summary.untrained)))
    return lines


def untrained_text(names: list[str]) -> str:
    """Describe tensors that conversions only keep."""
    layers = sorted({name.split(".")[2] for name in names})
    return f"{len(names)} tensors that predict further tokens (model.layers.{', '.join(layers)})"


def _describe(parser: argparse.ArgumentParser, first: str, text: str, examples: str) -> None:
    paragraphs = [textwrap.fill(" ".join(p.split()), 88) for p in (first, text)]
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = "\n\n".join(paragraphs)
    parser.epilog = textwrap.dedent(examples).strip() + "\n\n" + textwrap.dedent(_EXIT).strip()


def _add_weights(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--weights",
        choices=("student", "teacher"),
        default="student",
        help="weights to read of a training checkpoint (default: %(default)s)",
    )


def _add_hf(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--hf",
        type=Path,
        metavar="DIR",
        help="folder of config.json and tokenizer (default: hf/ next to the checkpoint)",
    )


def _add_allow_pickle(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="also read pytorch_model.bin, with torch's weights-only loader (default: off)",
    )


def _add_overwrite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace an existing checkpoint when the new one is complete (default: off)",
    )


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the result as JSON (default: no file)"
    )


def _write_json(path: Path | None, value: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")


def _size(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a positive whole number")
    return int(text)


def _bytes(text: str) -> int:
    units = {"GB": 10**9, "MB": 10**6, "KB": 10**3}
    number = text[:-2]
    if text[-2:] not in units or not number.isdecimal() or int(number) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a size such as 5GB or 500MB")
    return int(number) * units[text[-2:]]
