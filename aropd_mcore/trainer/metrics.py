"""Metrics of a step, and the log that writes them.

Names and definitions are those of METHOD section 7. The name of a KL states its direction.
"""

import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aropd_mcore.config import Config
from aropd_mcore.data.answer_match import is_premature
from aropd_mcore.mcore.runtime import Runtime
from aropd_mcore.numerics.group_metrics import group_metrics
from aropd_mcore.numerics.position_metrics import token_metrics
from aropd_mcore.trainer.jsonl import JsonlFile, read_until
from aropd_mcore.trainer.step import StepResult

Metrics = dict[str, Any]
_QUANTILES = (0.1, 0.5, 0.9)


def rollout_metrics(result: StepResult, tokenizer: Any, runtime: Runtime) -> Metrics:
    """Compute lengths, truncation, early answers and cut prompts of the global batch.

    Lengths and truncation are also reported by span (data.spans) if a response has a thought.

    `premature_answer_rate`: share of rollouts whose first half states the gold answer as a separate
    word.
    `num_cut_tokens`: number of tokens cut from prompts that exceed views.max_prompt_tokens.

    Collectives: one all-gather over the data-parallel ranks.
    """
    local = torch.tensor(
        [
            [
                len(rollout.response_ids),
                thinking.end,
                rollout.finished,
                is_premature(tokenizer, rollout.response_ids, views.row.answer),
                views.num_cut_tokens,
            ]
            for views, rollout, thinking in zip(
                result.views, result.rollouts, result.thinking, strict=True
            )
        ],
        dtype=torch.float64,
    )
    length, thinking, finished, premature, num_cut = runtime.gather_over_data(local).unbind(1)
    metrics = {
        **_length_metrics("response", length),
        "truncation_rate": 1.0 - float(finished.mean()),
        "premature_answer_rate": float(premature.mean()),
        "num_response_tokens": int(length.sum()),
        "num_cut_tokens": int(num_cut.sum()),
    }
    if thinking.any():
        is_cut = finished == 0
        in_thinking = is_cut & (thinking == length)
        metrics |= _length_metrics("thinking", thinking)
        metrics |= _length_metrics("answer", length - thinking)
        metrics["truncation_rate/thinking"] = float(in_thinking.double().mean())
        metrics["truncation_rate/answer"] = float((is_cut & ~in_thinking).double().mean())
    return metrics


def _length_metrics(part: str, length: Tensor) -> Metrics:
    quantiles = torch.quantile(length, torch.tensor(_QUANTILES, dtype=length.dtype)).tolist()
    return {f"{part}_length_mean": float(length.mean())} | {
        f"{part}_length_p{int(100 * q)}": value
        for q, value in zip(_QUANTILES, quantiles, strict=True)
    }


def step_metrics(step: int, result: StepResult, tokenizer: Any, runtime: Runtime) -> Metrics:
    """Compute the metrics of a step's tokens, rollouts and update.

    Collectives: up to three all-gathers over the data-parallel ranks. Every rank must call it.
    """
    metrics = {
        "step": step,
        **token_metrics(result.sums),
        **group_metrics(result.sums),
        **rollout_metrics(result, tokenizer, runtime),
        "lr": result.update.lr,
        "grad_norm": result.update.grad_norm,
        "step_skipped": int(not result.update.applied),
        **result.verdict.metrics,
    }
    counts = [
        result.num_tokens,
        result.num_padding_tokens,
        len(result.rollouts),
        result.num_without_loss,
    ]
    num_tokens, num_padding, num_rollouts, num_without_loss = (
        runtime.gather_over_data(torch.tensor([counts])).sum(0).tolist()
    )
    metrics["padding_fraction"] = num_padding / num_tokens
    metrics["no_loss_tokens_rate"] = num_without_loss / num_rollouts
    if any(
        rollout.logprobs for rollout in result.rollouts
    ):  # sampled responses, not reference responses
        versions = torch.tensor([[r.weight_version] for r in result.rollouts], dtype=torch.float64)
        metrics["rollout_staleness"] = step - float(runtime.gather_over_data(versions).mean())
        metrics["rollout_tokens_per_second"] = (
            metrics["num_response_tokens"] / result.seconds["rollout"]
        )
    return metrics


class MetricsLog:
    """Log of metrics on rank 0: JSONL, and TensorBoard and Weights & Biases if configured."""

    def __init__(self, config: Config, *, first_step: int):
        """
        Args:
            config: configuration of the run. Its output_dir must exist.
            first_step: step at which the run starts or resumes. Lines of this and later steps, from
                after the checkpoint, are removed.
        Raises:
            ValueError: metrics.jsonl has an invalid line, or the package of a logger is missing.
        """
        path = config.output_dir / "metrics.jsonl"
        read_until(path, "step", first_step)
        self._file = JsonlFile(path)
        self._tensorboard = _open_tensorboard(config, first_step)
        self._wandb = _open_wandb(config)

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Write the metrics of one step."""
        self._file.write(metrics)
        self.send(metrics, metrics["step"])

    def send(self, metrics: Mapping[str, Any], step: int) -> None:
        """Log metrics to TensorBoard and W&B only."""
        if self._tensorboard:
            for name, value in metrics.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(dict(metrics), step=step)

    def send_samples(self, samples: Sequence[Mapping[str, Any]], step: int, table: str) -> None:
        """Log samples (trainer.samples): a text per sample to TensorBoard, a table to W&B."""
        if self._tensorboard:
            slots: Counter[str] = Counter()
            for sample in samples:
                task = sample["task"]
                self._tensorboard.add_text(
                    f"samples/{task}/{slots[task]}", _sample_text(sample), step
                )
                slots[task] += 1
        if self._wandb and samples:
            import wandb  # pyright: ignore[reportMissingImports] # an extra

            rows: list[Any] = [list(sample.values()) for sample in samples]
            content = wandb.Table(columns=list(samples[0]), data=rows)
            self._wandb.log({table: content}, step=step)

    def sync(self) -> None:
        """Wait until all lines are on the disk. A checkpoint of their steps may then be written.

        Raises:
            OSError: the disk does not accept them.
        """
        self._file.sync()

    def close(self) -> None:
        self._file.close()
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()


def _sample_text(sample: Mapping[str, Any]) -> str:
    """Format a sample as Markdown, with question and response as blocks of code."""

    def block(text: str) -> str:
        return "\n".join("    " + line for line in text.splitlines())

    end = "" if sample["finished"] else ", cut off"
    facts = f"{sample['verdict'] or 'not graded'}, {sample['num_tokens']} tokens{end}"
    if sample["mean_residual"] is not None:
        facts += f", mean residual {sample['mean_residual']:.4f} nats"
    return (
        f"{facts}\n\nQuestion {sample['id']}:\n\n{block(sample['question'])}\n\n"
        f"Response:\n\n{block(sample['response'])}\n\nReference:\n\n{block(sample['answer'])}"
    )


def _open_tensorboard(config: Config, first_step: int) -> Any:
    if not config.logging.tensorboard:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            "logging.tensorboard is on, but tensorboard is not installed: "
            "pip install 'aropd-mcore[tensorboard]'"
        ) from error
    return SummaryWriter(str(config.output_dir / "tensorboard"), purge_step=first_step)


def _open_wandb(config: Config) -> Any:
    if config.logging.wandb == "off":
        return None
    try:
        import wandb  # pyright: ignore[reportMissingImports] # an extra
    except ImportError as error:
        raise ValueError(
            f"logging.wandb is {config.logging.wandb!r}, but wandb is not installed: "
            "pip install 'aropd-mcore[wandb]'"
        ) from error
    return wandb.init(
        project=config.logging.wandb_project,
        name=config.output_dir.name,
        dir=str(config.output_dir),
        mode=config.logging.wandb,
        config=config.model_dump(mode="json"),
        resume="allow",
        id=_wandb_id(config.output_dir / "wandb_id"),
    )


def _wandb_id(path: Path) -> str:
    """Return the id of this folder's W&B run, stored at `path`. The first attempt creates it.

    Later attempts continue the W&B run, even if there is no checkpoint.
    """
    id = path.read_text().strip() if path.exists() else ""
    if not id:  # a kill can leave an empty file
        id = secrets.token_hex(8)
        path.write_text(id + "\n")
    return id
