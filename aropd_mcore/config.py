"""Every setting of a run, typed; all validation. A field without a default must be chosen."""

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from aropd_mcore.durations import seconds_of

Divergence = Literal["kl_target_student", "kl_student_target", "jsd"]
PrivilegedView = Literal["partial", "full"]
Reduction = Literal["sequence_mean", "sequence_mean_all", "token_mean"]
Recompute = Literal["none", "selective", "full"]
Place = Literal["device", "host"]
Fp8Format = Literal["hybrid", "e4m3"]
Fp8Recipe = Literal["tensorwise", "delayed", "blockwise", "mxfp8"]
Positive = Annotated[int, Field(gt=0)]
Ratio = Annotated[float, Field(ge=0, le=1)]


class ConfigError(ValueError):
    """A run's configuration cannot be used; the message names the key, the value and the remedy."""


class Section(BaseModel):
    """Base class of a configuration's sections."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _as_yaml_means_it(cls, value: Any, info: ValidationInfo) -> Any:
        """An empty section has its defaults, a boolean is no number, and only `true` and `false`
        are booleans: pydantic also takes 1, "yes" and "on" for true."""
        assert info.field_name is not None
        annotation = cls.model_fields[info.field_name].annotation
        if value is None and isinstance(annotation, type) and issubclass(annotation, Section):
            return {}
        if annotation is bool and not isinstance(value, bool):
            raise ValueError(f"expected true or false, found {value!r}")
        if isinstance(value, bool) and _takes_numbers(annotation):  # pydantic takes true for 1
            raise ValueError(f"expected a number, found {str(value).lower()}")
        return value


def _takes_numbers(annotation: Any) -> bool:
    parts = get_args(annotation)
    return annotation in (int, float) or any(type(p) is int or _takes_numbers(p) for p in parts)


class ModelConfig(Section):
    path: Path
    """HF folder: config.json, safetensors and tokenizer. The student's and the teacher's start."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Parameters and activations; `auto` is bf16 on a GPU and fp32 without one."""


class PrecisionConfig(Section):
    """FP8 through Transformer Engine, on GPUs. Weights stay in bf16 with fp32 main weights and
    gradients; embedding, norms, attention scores and the output head stay in bf16; the loss and
    log-probs are always computed in fp32."""

    fp8: Fp8Format | None = None
    """Format of the student's matrix products, in training and in native rollouts: `hybrid` is e4m3
    forward and e5m2 for gradients; `e4m3` is e4m3 for both. null: bf16."""
    teacher_fp8: Fp8Format | Literal["as_student"] | None = "as_student"
    """Format of the teacher's products."""
    fp8_recipe: Fp8Recipe = "tensorwise"
    """How a tensor is scaled into fp8's range: by its own largest value (`tensorwise`), by the
    largest one of the step before (`delayed`), in blocks of 128 (`blockwise`, from Hopper on), or
    in blocks of 32 (`mxfp8`, from Blackwell on)."""
    bf16_first_layers: Annotated[int, Field(ge=0)] = 0
    """Layers at the start of the model whose products stay in bf16. Not with `delayed`."""
    bf16_last_layers: Annotated[int, Field(ge=0)] = 0
    """The same at its end."""

    @property
    def of_teacher(self) -> "PrecisionConfig":
        """The settings under which the teacher is the student."""
        fp8 = self.fp8 if self.teacher_fp8 == "as_student" else self.teacher_fp8
        return self.model_copy(update={"fp8": fp8, "teacher_fp8": "as_student"})

    @property
    def has_fp8(self) -> bool:
        return self.fp8 is not None or self.of_teacher.fp8 is not None

    @property
    def size_multiple(self) -> int:
        """What the sizes of a product, its number of tokens among them, must be multiples of."""
        if not self.has_fp8:
            return 1
        return 32 if self.fp8_recipe == "mxfp8" else 16

    @model_validator(mode="after")
    def _layers_by_themselves(self) -> "PrecisionConfig":
        bf16_layers = self.bf16_first_layers + self.bf16_last_layers
        if bf16_layers and self.fp8_recipe == "delayed":
            raise ValueError(
                "bf16_first_layers and bf16_last_layers need a recipe that scales layer by layer; "
                "fp8_recipe delayed collects its statistics over all layers"
            )
        return self


class ParallelConfig(Section):
    tensor: Positive = 1
    """Tensor-parallel size (TP)."""
    pipeline: Positive = 1
    """Pipeline-parallel size (PP). Data parallelism takes the processes that are left."""
    virtual_pipeline: Positive = 1
    """Model chunks on each pipeline stage (VPP), interleaved over the layers: a smaller bubble for
    more communication between stages."""
    context: Positive = 1
    """Context-parallel size (CP): ranks that share out the positions of each sequence."""
    expert: Positive = 1
    """Expert-parallel size (EP): ranks of a stage, tensor ranks first and then replicas, that share
    out the experts of each layer."""
    expert_tensor: Positive = 1
    """Expert tensor-parallel size (ETP): ranks in a row that share out the matrices of each expert.
    For experts that are too large for one rank; else expert moves less data."""
    sequence: bool = False
    """Sequence parallelism (SP): tensor ranks share out the tokens where they do not share out
    weights. Saves activations; experts with parallel.tensor > 1 need it."""
    overlap_grad_reduce: bool = False
    """Sum gradients over data-parallel ranks bucket by bucket while the backward goes on."""

    @model_validator(mode="after")
    def _something_to_split_over(self) -> "ParallelConfig":
        if self.sequence and self.tensor == 1:
            raise ValueError("sequence splits tokens over tensor ranks, and tensor is 1")
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            raise ValueError(
                f"virtual_pipeline {self.virtual_pipeline} interleaves over pipeline stages, and "
                "pipeline is 1"
            )
        return self


class DataConfig(Section):
    train: list[Path] = Field(min_length=1)
    """JSONL or Parquet files of rows with `question`, `reasoning`, `answer`."""
    on_bad_row: Literal["error", "skip"] = "error"
    """Stop at a broken row with its file and line, or skip it and count it."""
    shuffle: bool = True
    """Order rows by a permutation of (seed, epoch); otherwise by file and line."""


class ViewsConfig(Section):
    system_prompt: str | None = (
        "Solve the problem. Think step by step between <reasoning> and </reasoning>, then give "
        "only the final answer between <answer> and </answer>."
    )
    """System turn of all three views; a row's own `system` replaces it. null: no system turn."""
    student_template: str = "{question}"
    """User turn of the student view. Fields: {question}."""
    teacher_template: str = (
        "{question}\n\nHere is a worked example of a response to this problem:\n\n{trace}\n\n"
        "Now solve the problem yourself, in your own words, in the format asked for."
    )
    """User turn of the partial and full views. Fields: {question}, {trace}."""
    trace_template: str = "<reasoning>\n{reasoning}\n</reasoning>\n<answer>\n{answer}\n</answer>"
    """How reasoning and answer are written, in the teacher's views and as the response of `sft`.
    Fields: {reasoning}, {answer}."""
    partial_view: Literal["prefix_with_answer", "prefix_without_answer", "answer_only"] = (
        "prefix_with_answer"
    )
    """What the partial view shows of the oracle trace."""
    partial_ratio: Ratio = 0.5
    """Share of the reasoning's characters in the partial view; the cut moves on to a word's end."""
    partial_cut: Literal["word_end", "reference"] = "word_end"
    """How that share is cut. `word_end`: the share is rounded down, and a word is a run without
    white space. `reference`: as in the authors' release, rounded up; a word is a run of letters,
    digits, underscores and backslashes; a reasoning of one or two words stays whole."""
    max_prompt_tokens: Positive = 1024
    """Limit for each view's prompt."""
    on_long_prompt: Literal["cut", "cut_chat", "drop"] = "cut"
    """`cut`: cut the question on its left until the prompt fits. `cut_chat`: as in the authors'
    release, keep the last max_prompt_tokens tokens of the rendered chat, of each view by itself:
    the system prompt goes first. `drop`: drop the row. All are counted."""


class SamplingConfig(Section):
    max_response_tokens: Positive = 1024
    """A response ends at EOS or here."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the smallest set of tokens that holds this much probability."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Sample from the k likeliest tokens; 0 is all of them."""


ImportanceLevel = Literal["sequence", "token"]


class VllmConfig(Section):
    urls: list[Annotated[str, Field(pattern=r"^https?://")]] = []
    """Servers that somebody else started (`aropd serve`), such as http://node7:8000; the key that
    they ask for is read from $VLLM_API_KEY. Empty: the run starts servers of its own."""
    servers: Positive = 1
    """Servers that the run starts on the first rank's machine; they end with it."""
    python: Path | None = None
    """Interpreter that has vLLM, which may live in an environment of its own; null: the run's."""
    devices: list[str] = []
    """CUDA_VISIBLE_DEVICES of each started server, such as "6,7"; empty: what the run sees."""
    host: str = "127.0.0.1"
    """Address that started servers listen on. They ask for a key, whatever it is."""
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Of the first started server, the next ones take the following; 0 is any that is free."""
    arguments: list[str] = []
    """More arguments for started servers, such as --tensor-parallel-size=2."""
    sync: Literal["disk", "nccl"] = "disk"
    """How weights reach the servers after each step: through weights_dir; or from GPU to GPU, where
    a server that had to be started again waits for the next step."""
    weights_dir: Path | None = None
    """Folder that every server sees under this path; in it vllm-weights is the run's own. null:
    output_dir."""
    probe_tolerance: Annotated[float, Field(gt=0)] | None = None
    """Nats: how far a server's log-probs may be from the trainer's after a sync, on the average of
    a probe's tokens. null: 1e-3 in fp32, 0.1 in bf16."""
    checksums: bool = False
    """After each sync also compare a SHA-256 of every tensor, as training gathers it and as each
    process of each server is given it to load. Those of urls need it when they are started, too."""
    request_timeout: Annotated[float, Field(gt=0)] = 600.0
    """Seconds for a response, or for a server to load weights."""
    start_timeout: Annotated[float, Field(gt=0)] = 900.0
    """Seconds for a server to come up, or to come back."""
    retries: Annotated[int, Field(ge=0)] = 3
    """Failures of a response that are tried again, and of a server in a row before it is left out
    until the next step."""

    @model_validator(mode="after")
    def _devices_of_each(self) -> "VllmConfig":
        if self.devices and len(self.devices) != self.servers:
            raise ValueError(
                f"devices names {len(self.devices)} servers' devices, and servers is {self.servers}"
            )
        if self.urls and self.devices:
            raise ValueError("devices are of servers that the run starts, and urls names others")
        return self


class RolloutConfig(SamplingConfig):
    engine: Literal["native", "vllm"] = "native"
    """Engine that samples: `native` is the student's own forward with a KV cache, in every layout;
    `vllm` is one or more vLLM servers."""
    rollouts_per_prompt: Positive = 1
    """Responses sampled for each row."""
    batch_size: Positive = 32
    """Sequences decoded together on one model replica at most; where one ends, a waiting prompt
    takes its place. With vLLM, on one server."""
    kv_cache_tokens: Positive | None = None
    """Capacity of each replica's KV cache in tokens, with engine native. If it is too small for
    batch_size sequences of maximum length, fewer are decoded at once. null: room for batch_size
    sequences."""
    importance: ImportanceLevel | Literal["auto", "off"] = "auto"
    """Truncated importance sampling, where the engine's log-probs differ from the trainer's: a
    response's loss times the mean of its tokens' ratios (`sequence`), or each token's times its
    own (`token`). `auto`: off with engine native, where the model itself samples and ratios are 1
    up to rounding; else `sequence`."""
    importance_cap: Annotated[float, Field(gt=0)] = 2.0
    """Largest ratio that counts."""
    async_steps: Annotated[int, Field(ge=0)] = 0
    """Number of steps that sampling runs ahead of training, with engine vllm only. 1: a step's
    responses are sampled while the step before trains, by weights that are one update older. A
    larger number makes responses older, and steps no faster: an update of the servers' weights
    waits for all responses that older weights have begun. A run that is resumed samples its first
    step from the current weights."""

    vllm: VllmConfig = VllmConfig()

    @model_validator(mode="after")
    def _servers_sample_ahead(self) -> "RolloutConfig":
        if self.async_steps and self.model_samples:
            raise ValueError(
                f"async_steps {self.async_steps} samples while the model trains, and with engine "
                f"{self.engine} the model itself samples; set async_steps to 0, or engine to vllm"
            )
        return self

    @property
    def model_samples(self) -> bool:
        """Whether the model that trains is the one that samples."""
        return self.engine != "vllm"

    @property
    def importance_level(self) -> ImportanceLevel | None:
        """None: no ratios are taken."""
        if self.importance == "auto":
            return None if self.model_samples else "sequence"
        return None if self.importance == "off" else self.importance


class ObjectiveConfig(Section):
    name: Literal["aropd", "sft"] = "aropd"
    """`aropd`: anchored residual on-policy distillation. `sft`: next-token cross-entropy on the
    oracle trace. Partial OPD is aropd with residual_scale 0; Full OPD is residual_scale 1 with
    residual_clip null."""
    residual_scale: Annotated[float, Field(ge=0)] = 0.8
    """Lambda: how much of the bounded residual is added to the anchor."""
    residual_clip: Annotated[float, Field(gt=0)] | None = 5.0
    """c, nats: the residual is clipped to [-c, c]. null: no clip."""
    divergence: Divergence = "kl_target_student"
    """KL(target || student), KL(student || target), or jsd with jsd_weight."""
    jsd_weight: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Beta of `jsd`: the mixture is (1 - beta) student + beta target."""
    reduction: Reduction = "sequence_mean"
    """`sequence_mean`: mean over a response's loss tokens, then over responses that have any.
    `sequence_mean_all`: the same, with responses without loss tokens as 0 in the mean.
    `token_mean`: mean over all loss tokens. All are means over the global batch."""
    skip_response_tokens: Annotated[int, Field(ge=0)] = 3
    """The first tokens of each response that the loss leaves out."""
    temper_logits: bool = False
    """Divide the logits of student, partial view and full view by rollout.temperature before the
    loss of `aropd`, as the authors' release does. The metrics from the same pass are then of the
    tempered distributions. Importance ratios are not. Without effect at temperature 1."""
    sft_prompt_loss: bool = False
    """In `sft`, count every token of prompt and response but the prompt's first, as the authors'
    release does; skip_response_tokens is then not applied. Positions count from the prompt's
    second token."""
    router_aux_loss_coeff: Annotated[float, Field(ge=0)] = 0.0
    """Mixture-of-experts models: times the load-balancing loss of each router in the student view,
    added to what is minimized (METHOD section 3, Routers). 0: none."""
    router_z_loss_coeff: Annotated[float, Field(ge=0)] = 0.0
    """The same of the loss that keeps routers' logits small."""
    chunk_tokens: Positive | Literal["auto"] = "auto"
    """Tokens whose logits exist at the same time in the fused loss. `auto`: what fits into 1 GiB on
    a GPU, 128 MiB on a CPU."""
    metrics: bool = True
    """Report the entropies, the divergences between the views and so on, from the same pass. They
    need both of the teacher's views. Without them Full and Partial OPD read the view that is their
    target alone: half of the teacher's work, and a product less in the loss."""
    topk_overlap: bool = True
    """Among the metrics `topk_overlap`, which costs more than all others together."""
    hindsight_gap: float = 2.0
    """Tau, nats: a sampled token counts as hindsight when log f - log p exceeds this ..."""
    hindsight_floor: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Epsilon: ... and the partial view gives it less than this probability."""

    @property
    def has_prompt_loss(self) -> bool:
        return self.name == "sft" and self.sft_prompt_loss

    @property
    def has_router_losses(self) -> bool:
        return self.router_aux_loss_coeff > 0 or self.router_z_loss_coeff > 0

    @property
    def views(self) -> tuple[PrivilegedView, ...]:
        """The teacher's views that are read: they are rendered, scored and projected."""
        if self.name == "sft":
            return ()
        alone = target_view(self.residual_scale, self.residual_clip)
        return ("partial", "full") if self.metrics or alone is None else (alone,)


def target_view(residual_scale: float, residual_clip: float | None) -> PrivilegedView | None:
    """The view that is the target by itself, whatever the other one says; None: it takes both.

    Source: METHOD section 3, its identities: lambda = 0 gives p, lambda = 1 without clip gives f.
    """
    if residual_scale == 0:
        return "partial"
    return "full" if residual_scale == 1 and residual_clip is None else None


class TeacherConfig(Section):
    kind: Literal["ema", "frozen", "live"] = "ema"
    """`ema` follows the student, `frozen` stays as loaded, `live` is the student itself."""
    ema_rate: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Alpha: teacher <- (1 - alpha) teacher + alpha student, after every step."""
    fp32_master: bool = True
    """Keep the moving average in fp32 when the model is bf16, where steps of alpha would vanish."""
    weights: Place = "device"
    """Where the teacher's weights and its fp32 average are outside of its own phase. `host`: in
    pinned memory; the weights visit the device while the teacher scores, and only the output head,
    which the loss needs, stays."""
    hidden_states: Place = "device"
    """Where both views' final hidden states of a step's loss tokens wait for the loss. `host`: in
    pinned memory, a microbatch's at a time on the device."""

    @model_validator(mode="after")
    def _weights_of_its_own(self) -> "TeacherConfig":
        if self.kind == "live" and self.weights == "host":
            raise ValueError("weights: a live teacher is the student itself, on the device")
        return self


class OptimizerConfig(Section):
    lr: Annotated[float, Field(gt=0)] = 2e-5
    """Peak learning rate of AdamW."""
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """Learning rate at the end of the schedule."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Decay from lr to min_lr after the warm-up. Steps whose update is left out do not count."""
    warmup_ratio: Ratio = 0.1
    """Share of the steps over which the learning rate rises: update n of W warm-up updates, counted
    from 1, has lr n / (W + 1), and the one after them lr. No update has a learning rate of 0."""
    beta1: Ratio = 0.9
    """AdamW."""
    beta2: Ratio = 0.999
    """AdamW."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled; not applied to biases and norms."""
    clip_grad: Annotated[float, Field(ge=0)] = 1.0
    """Largest global gradient norm; 0 is no clipping."""

    @model_validator(mode="after")
    def _decays(self) -> "OptimizerConfig":
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr:g} is above lr {self.lr:g}, where decay starts")
        return self


class TrainingConfig(Section):
    num_steps: Positive | None = None
    """Optimizer updates; one of num_steps and num_epochs must be given."""
    num_epochs: Positive | None = None
    """Passes over the data."""
    global_batch_size: Positive = 32
    """Responses in an optimizer update, over all ranks."""
    micro_batch_size: Positive = 1
    """Responses that go through the pipeline together, padded to the longest of them."""
    packing: bool = False
    """Pack responses one behind another instead, as many as max_tokens_per_microbatch holds, and
    balance them over data-parallel ranks by tokens; micro_batch_size is not used then."""
    max_tokens_per_microbatch: Positive | None = None
    """With packing: the most tokens that a microbatch has in any of the three views."""
    recompute: Recompute = "none"
    """Activations that the backward computes again instead of keeping them: `selective`, those of
    core attention; `full`, all but each layer's input."""
    max_skipped_steps: Positive = 5
    """Stop after this many steps in a row whose update was left out (see guards)."""
    seed: int = 1234
    """Of the data order, the rollouts and the initialization."""

    @model_validator(mode="after")
    def _one_length(self) -> "TrainingConfig":
        if (self.num_steps is None) == (self.num_epochs is None):
            raise ValueError("give exactly one of num_steps and num_epochs")
        if self.packing == (self.max_tokens_per_microbatch is None):
            raise ValueError("max_tokens_per_microbatch belongs to packing; give both or neither")
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is not a multiple of "
                f"micro_batch_size {self.micro_batch_size}"
            )
        return self


class CheckpointConfig(Section):
    save_every_steps: Positive | None = 100
    """Save everything a run needs to go on, this often and at the end. null: at the end alone."""
    save_every_minutes: Annotated[float, Field(gt=0)] | None = None
    """Save also when so many minutes have passed since the last time, by the first rank's clock."""
    keep_last: Positive = 2
    """Older checkpoints are deleted ..."""
    keep_every: Positive | None = None
    """... except those of a multiple of this many steps. null: no exceptions."""
    asynchronous: bool = True
    """Write in the background, by a forked process of each rank: training waits for the values to
    be copied, and a checkpoint exists a few steps later. false: training waits for the writing."""
    on_failure: Literal["stop", "continue"] = "stop"
    """What a run does that cannot save (a full disk, say): stop, or say so, train on and try again
    when the next save is due. The last checkpoint stays either way; the end's has to succeed."""
    save_rollouts: bool = False
    """Keep each step's responses on the disk from when they are sampled until a checkpoint is
    behind them: a run that is started again trains on them and does not sample them again."""
    allow_changes: list[str] = []
    """Settings, such as training.global_batch_size, that may differ from the checkpoint's though a
    run that goes on with another value is not the same run; a refusal names them."""


class LimitsConfig(Section):
    """What a job may take of time, and how long it may be silent."""

    stop_before: str | None = None
    """Save and stop (exit code 75) before the job is this old: 3h55m, 90m, or Slurm's 1-02:30:00.
    The time of the longest step and save so far is counted in. Slurm's own end time,
    $SLURM_JOB_END_TIME, holds in any case."""
    watchdog_minutes: Annotated[float, Field(gt=0)] | None = 30.0
    """A rank that has got nowhere for this long, not by a token or a microbatch, has every rank's
    stacks written to output_dir/stacks, and ends the job (exit code 4). Start and saves may take
    three times as long. null: wait for ever."""
    collective_timeout_minutes: Annotated[float, Field(gt=0)] = 60.0
    """How long ranks wait for each other in a collective. Longer than watchdog_minutes, since it
    ends with an error on the ranks that wait, and the watchdog with the stacks of all."""

    @field_validator("stop_before")
    @classmethod
    def _is_a_time(cls, text: str | None) -> str | None:
        if text is not None:
            seconds_of(text)
        return text

    @property
    def stop_before_seconds(self) -> int | None:
        return None if self.stop_before is None else seconds_of(self.stop_before)


GuardAction = Literal["off", "warn", "skip", "stop"]


class GuardsConfig(Section):
    """Actions on a step that looks wrong, before its update is applied. `warn` prints a warning.
    `skip` leaves the update out, up to training.max_skipped_steps in a row. `stop` saves and ends
    the run (exit code 3). The metrics count each. The update of a step without loss tokens, or
    whose loss tokens all have weight 0, is always left out."""

    non_finite: Literal["skip", "stop"] = "skip"
    """A loss or gradient norm that is not finite."""
    loss_spike: GuardAction = "warn"
    """A loss or gradient norm far above those of the steps before."""
    loss_spike_zscore: Annotated[float, Field(gt=0)] = 6.0
    """How far: in standard deviations of the window, above its mean."""
    length_collapse: GuardAction = "warn"
    """Responses far shorter than those of the steps before, in loss tokens."""
    length_collapse_ratio: Ratio = 0.25
    """How short: less than this share of the window's mean ..."""
    length_collapse_floor: Annotated[float, Field(ge=0)] = 0.0
    """... or, from the first step on, less than this many tokens on the average."""
    truncation: GuardAction = "warn"
    """A growing share of responses cut at rollout.max_response_tokens, over the last 8 steps."""
    truncation_rise: Ratio = 0.2
    """Share above that of the run's first 8 steps which counts as growth ..."""
    truncation_ceiling: Ratio = 0.9
    """... or, from the first step on, any share above this one. 1: no ceiling."""
    window: Annotated[int, Field(ge=2)] = 32
    """Steps that are looked back on; nothing is judged by them before there are so many."""


class LoggingConfig(Section):
    tensorboard: bool = False
    """Also write TensorBoard events under output_dir/tensorboard."""
    wandb: Literal["off", "online", "offline"] = "off"
    """Also log to Weights & Biases."""
    wandb_project: str = "aropd"
    """Project name at Weights & Biases."""


class Config(Section):
    """A run. Paths are relative to the working directory."""

    output_dir: Path
    """Metrics, checkpoints and the resolved config; the same folder again resumes the run."""
    model: ModelConfig
    data: DataConfig
    training: TrainingConfig
    precision: PrecisionConfig = PrecisionConfig()
    parallel: ParallelConfig = ParallelConfig()
    views: ViewsConfig = ViewsConfig()
    rollout: RolloutConfig = RolloutConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    teacher: TeacherConfig = TeacherConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    limits: LimitsConfig = LimitsConfig()
    guards: GuardsConfig = GuardsConfig()
    logging: LoggingConfig = LoggingConfig()

    @model_validator(mode="after")
    def _whole_groups(self) -> "Config":
        if self.training.global_batch_size % self.rollout.rollouts_per_prompt:
            raise ValueError(
                f"training.global_batch_size {self.training.global_batch_size} is not a multiple "
                f"of rollout.rollouts_per_prompt {self.rollout.rollouts_per_prompt}"
            )
        return self

    @model_validator(mode="after")
    def _divides_by_temperature(self) -> "Config":
        objective = self.objective
        is_divided = objective.temper_logits and objective.name == "aropd"
        if is_divided and self.rollout.temperature == 0:
            raise ValueError(
                "objective.temper_logits divides logits by rollout.temperature, which is 0; sample "
                "at a temperature above 0, or set objective.temper_logits to false"
            )
        return self

    @model_validator(mode="after")
    def _fp8_of_bf16(self) -> "Config":
        precision = self.precision
        if precision.has_fp8 and self.model.dtype == "fp32":
            raise ValueError("precision: fp8 products are of bf16 tensors, and model.dtype is fp32")
        if self.teacher.kind == "live" and precision.of_teacher.fp8 != precision.fp8:
            raise ValueError(
                f"precision.teacher_fp8 is {precision.teacher_fp8}: a live teacher is the student "
                f"itself, with precision.fp8 {precision.fp8}"
            )
        return self

    @property
    def prompts_per_step(self) -> int:
        return self.training.global_batch_size // self.rollout.rollouts_per_prompt
