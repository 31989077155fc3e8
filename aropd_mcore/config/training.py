"""Sections `optimizer`, `training`, `checkpoint`, `limits` and `guards`."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from aropd_mcore.config.section import Positive, Ratio, Section
from aropd_mcore.durations import parse_seconds

Recompute = Literal["none", "selective", "full"]


class OptimizerConfig(Section):
    """AdamW and its learning-rate schedule."""

    lr: Annotated[float, Field(gt=0)] = 2e-5
    """Peak learning rate."""
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """Learning rate at the end of the schedule."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Decay from lr to min_lr after the warm-up. Steps whose update is skipped do not count."""
    warmup_ratio: Ratio = 0.1
    """Share of the steps over which the learning rate rises. With W warm-up updates, update n
    (counted from 1) has learning rate lr * n / (W + 1), and update W + 1 has lr. No update has
    learning rate 0."""
    beta1: Ratio = 0.9
    """Decay rate of AdamW's first moment."""
    beta2: Ratio = 0.999
    """Decay rate of AdamW's second moment."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Constant that AdamW adds to the denominator."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay. It is not applied to biases and norms."""
    clip_grad: Annotated[float, Field(ge=0)] = 1.0
    """Largest global gradient norm; larger gradients are scaled down to it. 0: no clipping."""

    @model_validator(mode="after")
    def _check_learning_rates(self) -> "OptimizerConfig":
        if self.min_lr > self.lr:
            raise ValueError(
                f"min_lr {self.min_lr:g}: expected at most lr {self.lr:g}, from which the learning "
                "rate decays; lower min_lr"
            )
        return self


class TrainingConfig(Section):
    """Length, batches and memory of training."""

    num_steps: Positive | None = None
    """Number of optimizer updates. Set exactly one of num_steps and num_epochs."""
    num_epochs: Positive | None = None
    """Number of passes over the data. Set exactly one of num_steps and num_epochs."""
    global_batch_size: Positive = 32
    """Number of responses per optimizer update, over all ranks."""
    micro_batch_size: Positive = 1
    """Number of responses per microbatch without packing. With packing it determines the default of
    max_tokens_per_microbatch."""
    packing: bool = True
    """Packing of responses without padding: a microbatch takes as many as fit into
    max_tokens_per_microbatch. Data-parallel ranks are balanced by tokens. false: every microbatch
    has micro_batch_size responses, padded to the longest."""
    max_tokens_per_microbatch: Positive | None = None
    """Largest number of tokens that a packed microbatch has in any of the three views. It must be
    null without packing. null with packing: room for micro_batch_size sequences of full length,
    which takes as much memory as a microbatch without packing."""
    recompute: Recompute = "none"
    """Activations that the backward pass recomputes instead of storing. `none`: none. `selective`:
    those of core attention. `full`: all except the input of each layer."""
    max_skipped_steps: Positive = 5
    """Number of consecutive steps with a skipped update after which the run stops (see guards)."""
    seed: int = 1234
    """Random seed of data order, rollouts and initialization."""

    @model_validator(mode="after")
    def _check_sizes(self) -> "TrainingConfig":
        if (self.num_steps is None) == (self.num_epochs is None):
            given = "neither" if self.num_steps is None else "both"
            raise ValueError(f"found {given} of num_steps and num_epochs: set exactly one of them")
        if not self.packing and self.max_tokens_per_microbatch is not None:
            raise ValueError(
                "packing is false and max_tokens_per_microbatch is "
                f"{self.max_tokens_per_microbatch}: expected null without packing; set packing to "
                "true, or max_tokens_per_microbatch to null"
            )
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"global_batch_size {self.global_batch_size}: expected a multiple of "
                f"micro_batch_size {self.micro_batch_size}; change one of them"
            )
        return self


class CheckpointConfig(Section):
    """Checkpoints for resuming a run."""

    save_every_steps: Positive | None = 100
    """Number of steps between checkpoints. One is always saved at the end of training. null: only
    at the end."""
    save_every_minutes: Annotated[float, Field(gt=0)] | None = None
    """Number of minutes after the last checkpoint at which another one is saved, by the first
    rank's clock. null: no limit in time."""
    keep_last: Positive = 2
    """Number of latest checkpoints that are kept. Older ones are deleted, except those of
    keep_every."""
    keep_best: str | None = None
    """Name of a task of `validation`. The checkpoint with its highest accuracy is saved and never
    deleted, and `checkpoints/best` links to it. null: no best checkpoint."""
    keep_every: Positive | None = None
    """Multiple of steps whose checkpoints are never deleted. null: no exceptions."""
    asynchronous: bool = True
    """Writing in the background, by a forked process of each rank. Training waits until the values
    are copied, and the checkpoint is complete a few steps later. false: training waits until the
    checkpoint is written."""
    on_failure: Literal["stop", "continue"] = "stop"
    """Action when a checkpoint cannot be saved, for example because the disk is full. `stop`: end
    the run. `continue`: report it, train on and retry at the next save. Both keep the last
    checkpoint. The final save has to succeed."""
    save_rollouts: bool = False
    """Storage of each step's responses on disk until a checkpoint covers them. A resumed run then
    trains on the stored responses instead of sampling them again."""
    allow_changes: list[str] = []
    """Names of settings, such as training.global_batch_size, that may change on resume although the
    resumed run is then a different experiment. An error lists the names that are needed."""


class LimitsConfig(Section):
    """Time limits of a job, and of its periods without progress."""

    stop_before: str | None = None
    """Age of the job by which it has saved and stopped with exit code 75: 3h55m, 90m, or Slurm's
    1-02:30:00. The run stops early enough for its longest step and save so far. Slurm's end time,
    $SLURM_JOB_END_TIME, always applies. null: no other limit."""
    watchdog_minutes: Annotated[float, Field(gt=0)] | None = 30.0
    """Number of minutes without progress (no token and no microbatch on a rank) after which the
    watchdog writes the stacks of all ranks to output_dir/stacks and ends the job with exit code 4.
    Start-up and saves may take three times as long. null: no limit."""
    collective_timeout_minutes: Annotated[float, Field(gt=0)] = 60.0
    """Timeout of a collective in minutes. Set it above watchdog_minutes: the watchdog reports the
    stacks of all ranks, but this timeout reports an error only on the waiting ranks."""

    @field_validator("stop_before")
    @classmethod
    def _check_time(cls, text: str | None) -> str | None:
        if text is not None:
            parse_seconds(text)
        return text

    @property
    def stop_before_seconds(self) -> int | None:
        return None if self.stop_before is None else parse_seconds(self.stop_before)


GuardAction = Literal["off", "warn", "skip", "stop"]


class GuardsConfig(Section):
    """Actions on a suspicious step, before its update is applied. `off` does nothing. `warn` prints
    a warning. `skip` skips the update, up to training.max_skipped_steps times in a row. `stop`
    saves and ends the run with exit code 3. The metrics count each case. The update of a step
    without loss tokens of positive weight is always skipped."""

    non_finite: Literal["skip", "stop"] = "skip"
    """Action on a loss or gradient norm that is not finite."""
    loss_spike: GuardAction = "warn"
    """Action on a loss or gradient norm far above that of the previous steps."""
    loss_spike_zscore: Annotated[float, Field(gt=0)] = 6.0
    """Threshold of loss_spike: number of standard deviations above the mean of the window."""
    length_collapse: GuardAction = "warn"
    """Action on responses far shorter, in loss tokens, than those of the previous steps."""
    length_collapse_ratio: Ratio = 0.25
    """Threshold of length_collapse: share of the window's mean length."""
    length_collapse_floor: Annotated[float, Field(ge=0)] = 0.0
    """Second threshold of length_collapse: mean number of loss tokens, from the first step on. 0:
    no second threshold."""
    truncation: GuardAction = "warn"
    """Action on a growing share of responses cut at rollout.max_response_tokens in the last 8
    steps."""
    truncation_rise: Ratio = 0.2
    """Threshold of truncation: rise of the share above that of the run's first 8 steps."""
    truncation_ceiling: Ratio = 0.9
    """Second threshold of truncation: share of cut responses, from the first step on. 1: no second
    threshold."""
    window: Annotated[int, Field(ge=2)] = 32
    """Number of previous steps that a step is compared with. No step is compared before there are
    this many."""
