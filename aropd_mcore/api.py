"""The Python API: the work of the `aropd` commands, with Python values in and out.

Each function runs in this process if the job has one process. With several (`num_processes`, or as
many GPUs as there are) it starts them and waits. Under torchrun every rank calls the function, this
process is one rank of the job, and every rank gets the result or the error. Keyword options are
those of the command, with underscores: `max_response_tokens=64` is `--max-response-tokens 64`.
"""

import atexit
import json
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from aropd_mcore import cli
from aropd_mcore.cli.ranks import leave_job
from aropd_mcore.config import Config
from aropd_mcore.config_file import dump_config
from aropd_mcore.convert.manifest import newest
from aropd_mcore.data.prepare import write_atomically
from aropd_mcore.local_launch import SAVED

T = TypeVar("T")

_CODES = {
    1: "a process of the job died",
    2: "a process met an error",
    3: "it cannot continue, and has saved what it could",
    4: "the job hung",
    SAVED: "it was stopped early, with everything saved; the same call resumes",
}


class CommandFailed(RuntimeError):
    """A job did not run to its end; its output has the reason."""

    def __init__(self, command: str, code: int):
        super().__init__(
            f"aropd {command}: exit code {code}: {_CODES.get(code, 'see its output')}. The job's "
            "output has the reason."
        )
        self.code = code


@dataclass(frozen=True)
class RunResult:
    """A run that has trained all its steps."""

    output_dir: Path
    history: list[dict[str, Any]]
    """Metrics of every step, those before a resume included."""
    checkpoint: Path
    """The newest checkpoint: a folder under output_dir/checkpoints."""

    @property
    def metrics(self) -> dict[str, Any]:
        """Metrics of the last step."""
        return self.history[-1]

    def export_hf(self, folder: str | Path, **options: Any) -> Path:
        """Write the weights as an HF folder, as `aropd convert export` does; return the folder.

        For a run that trains an adapter, this is a PEFT folder, unless merged=True is given.
        """
        _run("convert", ["export", str(self.output_dir), str(folder)], options)
        return Path(folder)


@dataclass(frozen=True)
class Response:
    """One sampled response."""

    text: str
    response_ids: list[int]
    finish_reason: str
    """`stop`: the response ended by itself. `length`: it was cut at max_response_tokens."""
    fields: dict[str, Any]
    """The whole output line of `aropd generate`, with the fields of the prompt."""


@dataclass(frozen=True)
class EvalSummary:
    """Accuracies of one model."""

    mean_accuracy: float
    tasks: dict[str, dict[str, Any]]
    """Task -> accuracy, its 95 % interval, lengths and counts, as in summary.json."""


def train(config: Config, *, num_processes: int | None = None) -> RunResult:
    """Train a run, or resume it from the newest checkpoint in config.output_dir.

    Args:
        config: of `load_config`, or built in Python.
        num_processes: processes to start. None: one per GPU; without GPUs those of one model
            replica. Under torchrun it has no effect.
    Raises:
        ValueError, OSError: the run cannot start, for a reason that the message states.
        CommandFailed: the run ended early, or a process that was started failed.
    """
    if threading.current_thread() is not threading.main_thread():
        raise ValueError(
            "train was called in a thread other than the main thread; expected the main thread, "
            "since the run handles the signals that stop it"
        )
    with tempfile.TemporaryDirectory(prefix="aropd-") as folder:
        path = Path(folder) / "run.yaml"
        path.write_text(dump_config(config))
        _run("train", [str(path)], {"nproc_per_node": num_processes})
    history = _read(lambda: _json_lines(config.output_dir / "metrics.jsonl"))
    checkpoint = newest(config.output_dir / "checkpoints")
    assert checkpoint is not None
    return RunResult(config.output_dir, history, checkpoint)


def generate(
    model: str | Path,
    prompts: str | Path | Sequence[str | Mapping[str, Any]],
    *,
    out: str | Path | None = None,
    num_processes: int | None = None,
    **options: Any,
) -> list[Response]:
    """Sample responses of any checkpoint.

    Args:
        model: an HF folder, a Megatron checkpoint, or a run's output_dir.
        prompts: a file, or questions, or records as in such a file (`question`, `messages` or
            `prompt_ids`, and other fields).
        out: JSONL file to write; an interrupted call resumes there. Questions and records are
            written beside it, to NAME.prompts.jsonl. None: a temporary one.
        options: of `aropd generate`.
    Returns:
        `samples` responses per prompt, in the order of the prompts.
    Raises:
        ValueError, OSError, CommandFailed: as `train`.
    """
    with _path(out, "generate", "responses.jsonl") as output:
        if not isinstance(prompts, str | Path):
            lines = [{"question": p} if isinstance(p, str) else dict(p) for p in prompts]
            prompts = output.with_suffix(".prompts.jsonl")
            write_atomically(prompts, [json.dumps(line) + "\n" for line in lines])
        words = ["--model", str(model), "--prompts", str(prompts), "--out", str(output)]
        _run("generate", words, {"nproc_per_node": num_processes, **options})
        records = _read(lambda: _json_lines(output))
    return [
        Response(record["text"], record["response_ids"], record["finish_reason"], record)
        for record in records
    ]


def evaluate(
    model: str | Path,
    tasks: Sequence[str],
    *,
    out: str | Path | None = None,
    num_processes: int | None = None,
    **options: Any,
) -> EvalSummary:
    """Measure a checkpoint's accuracy on benchmarks in local files.

    Args:
        model: as `generate`.
        tasks: NAME=FILE or NAME:FORMAT=FILE, as `aropd eval --task` takes them.
        out: folder to write; an interrupted call resumes there. None: a temporary one.
        options: of `aropd eval`.
    Raises:
        ValueError, OSError, CommandFailed: as `train`.
    """
    with _path(out, "evaluate", "eval") as folder:
        words = ["--model", str(model), "--out", str(folder)]
        words += [f"--task={task}" for task in tasks]
        _run("eval", words, {"nproc_per_node": num_processes, **options})
        summary = _read(lambda: json.loads((folder / "summary.json").read_text()))
    return EvalSummary(summary["mean_accuracy"], summary["tasks"])


def diagnose(
    model: str | Path,
    data: str | Path,
    *,
    out: str | Path | None = None,
    num_processes: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Score a checkpoint's responses by the student and under both privileged views.

    Args:
        model: as `generate`.
        data: rows: a file, saved data set or data set of the hub.
        out: folder to write. None: a temporary one.
        options: of `aropd diagnose`.
    Returns:
        The diagnosis, whose parts `evaluation/diagnose/summary.py` describes.
    Raises:
        ValueError, OSError, CommandFailed: as `train`.
    """
    with _path(out, "diagnose", "diagnose") as folder:
        words = ["--model", str(model), "--data", str(data), "--out", str(folder)]
        _run("diagnose", words, {"nproc_per_node": num_processes, **options})
        return _read(lambda: _newest_json(folder))


def _run(command: str, words: Sequence[str], options: Mapping[str, Any]) -> None:
    """Run a command in this process or in processes of its own.

    Raises:
        CommandFailed: its exit code is not 0.
    """
    try:
        code = cli.run([command, *words, *_option_words(options)])
    finally:
        if "RANK" in os.environ:
            # The ranks of a job meet once: a later call joins the same groups.
            atexit.unregister(leave_job)
            atexit.register(leave_job)
        else:
            leave_job()
    if code:
        raise CommandFailed(command, code)


def _option_words(options: Mapping[str, Any]) -> Iterator[str]:
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        if value is True:
            yield option
        elif value is not None and value is not False:
            yield f"{option}={value}"


def _read(read: Callable[[], T]) -> T:
    """Read what the command has written, on rank 0 of a job under torchrun for all ranks."""
    if "RANK" not in os.environ:
        return read()
    from aropd_mcore.mcore.rank0 import run_on_rank0

    return run_on_rank0(read)


def _json_lines(path: Path) -> list[dict[str, Any]]:
    with path.open() as file:
        return [json.loads(line) for line in file]


def _newest_json(folder: Path) -> dict[str, Any]:
    return json.loads(max(folder.glob("*.json"), key=lambda path: path.stat().st_mtime).read_text())


@contextmanager
def _path(out: str | Path | None, function: str, name: str) -> Iterator[Path]:
    """Yield the path that `out` names, or for None `name` in a temporary folder."""
    if out is not None:
        yield Path(out)
    elif "RANK" in os.environ:
        raise ValueError(
            f"{function}: out is not given; under torchrun expected a path on all ranks"
        )
    else:
        with tempfile.TemporaryDirectory(prefix="aropd-") as folder:
            yield Path(folder) / name
