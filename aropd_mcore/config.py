"""Typed settings of a run, and their validation. A field without a default is required."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    SerializerFunctionWrapHandler,
    TypeAdapter,
    ValidationInfo,
    WrapValidator,
    field_validator,
    model_serializer,
    model_validator,
)

from aropd_mcore.durations import parse_seconds
from aropd_mcore.stages import Stages

Divergence = Literal["kl_target_student", "kl_student_target", "jsd"]
PrivilegedView = Literal["partial", "full"]
View = Literal["student", PrivilegedView]
LossSpan = Literal["both", "thinking", "answer"]
Reduction = Literal["sequence_mean", "sequence_mean_all", "token_mean"]
Recompute = Literal["none", "selective", "full"]
MemorySpace = Literal["device", "host"]
Fp8Format = Literal["hybrid", "e4m3"]
Fp8Recipe = Literal["tensorwise", "delayed", "blockwise", "mxfp8"]
Positive = Annotated[int, Field(gt=0)]
Ratio = Annotated[float, Field(ge=0, le=1)]
Ratios = Annotated[list[Ratio], Field(min_length=1)]


class ConfigError(ValueError):
    """Error in a run's configuration; the message names the key, the value and the remedy."""


def split_task(text: str) -> tuple[str, str | None, str]:
    """Split NAME=FILE or NAME:FORMAT=FILE into name, format (None without a colon) and file."""
    name, _, path = text.partition("=")
    name, colon, format = name.partition(":")
    return name, format if colon else None, path


HUB_SYNTAX = "hf://NAMESPACE/NAME[@REVISION][/SUBSET][/SPLIT]"
_HUB_NAME = re.compile(r"hf:/+([^/@]+/[^/@]+)(?:@([^/]+))?(?:/([^/]+)(?=/))?(?:/([^/]+))?")


class HubName(NamedTuple):
    """Name of a data set of the Hugging Face hub, parsed by `hub_name`."""

    repository: str
    revision: str | None
    """Branch, tag or commit. None: the default branch."""
    subset: str | None
    """Name of a configuration of the data set. None: its default."""
    split: str

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        parts = filter(None, (self.repository + revision, self.subset, self.split))
        return f"hf://{'/'.join(parts)}"


def hub_name(path: Path) -> HubName | None:
    """Parse a path of the form HUB_SYNTAX. The split is `train` unless the path states one.

    Returns:
        None if the path names a local file or folder: it does not begin with `hf:/`.
    Raises:
        ConfigError: the path begins with `hf:/` and has another form.
    """
    text = path.as_posix()  # Path turns hf:// into hf:/
    if not text.startswith("hf:/"):
        return None
    parts = _HUB_NAME.fullmatch(text)
    if parts is None:
        raise ConfigError(f"{source_name(path)}: expected {HUB_SYNTAX}")
    repository, revision, subset, split = parts.groups()
    return HubName(repository, revision, subset, split or "train")


def source_name(path: Path) -> str:
    """Return the text that a path was parsed from, with `hf://` for a data set of the hub."""
    return re.sub("^hf:/+", "hf://", str(path))


def _check_source(value: Any, handler: Any) -> Path:
    path = handler(value)
    hub_name(path)
    return path


Source = Annotated[
    Path, WrapValidator(_check_source), PlainSerializer(source_name, when_used="json")
]
"""File, saved data set or data set of the hub that has records."""


def _by_type(kind: Any, its_type: Any, other_type: Any) -> WrapValidator:
    """Validate values of `kind` as `its_type` and others as `other_type`.

    A plain union reports the errors of all its types.
    """

    ours, others = TypeAdapter(its_type), TypeAdapter(other_type)
    return WrapValidator(
        lambda value, _: (ours if isinstance(value, kind) else others).validate_python(value)
    )


def teacher_task(task: str, view: View) -> str:
    """Return the name of a validation task that the teacher answers under a view."""
    return f"{task}_{'teacher' if view == 'student' else view}"


def teacher_section(name: str) -> str:
    """Return the section of a teacher: `teacher` for the empty name, or `teachers.NAME`."""
    return f"teachers.{name}" if name else "teacher"


class Section(BaseModel):
    """Base class of a configuration's sections; an instance is immutable."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _check_yaml_value(cls, value: Any, info: ValidationInfo) -> Any:
        """Give an empty section its defaults, and keep booleans and numbers apart.

        Pydantic by itself accepts 1, "yes" and "on" as true, and true as 1.
        """
        assert info.field_name is not None
        annotation = cls.model_fields[info.field_name].annotation
        if value is None and isinstance(annotation, type) and issubclass(annotation, Section):
            return {}
        if annotation is bool and not isinstance(value, bool):
            raise ValueError(f"expected true or false, found {value!r}")
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, bool) and _accepts_numbers(annotation):
                raise ValueError(f"expected a number, found {str(item).lower()}")
        return value


def _accepts_numbers(annotation: Any) -> bool:
    parts = get_args(annotation)
    return annotation in (int, float) or any(type(p) is int or _accepts_numbers(p) for p in parts)


class ModelConfig(Section):
    """Model that training starts from."""

    path: Path
    """Folder of the Hugging Face model: config.json, safetensors files and tokenizer. Student and
    teacher both start from it, unless teacher.kind is `model`."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Data type of parameters and activations. `auto`: bf16 on a GPU, fp32 without one."""


class AdapterConfig(Section):
    """LoRA adapter (arXiv:2106.09685): small matrices are trained in place of the model's weights,
    which stay as they are. Without this section, all weights are trained."""

    rank: Positive = 16
    """Rank r of the adapter: a linear layer with weight W becomes W + (alpha / r) B A, where A has
    r rows and B has r columns."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """Numerator of the scale alpha / rank."""
    targets: Annotated[list[str], Field(min_length=1)] | None = None
    """Adapted linear layers by the last parts of their names in the Hugging Face model, such as
    [q_proj, v_proj]. Experts' layers are named like those of an MLP. null: all linear layers of
    attention, MLPs and experts."""
    path: Path | None = None
    """PEFT folder of an adapter that training starts from. Its rank, alpha and targets must be
    those of this section. null: a new adapter, which does not change the model at first."""


class PrecisionConfig(Section):
    """FP8 matrix products through Transformer Engine, on GPUs only. Weights stay in bf16, with main
    weights and gradients in fp32. The embedding, norms, attention scores and output head stay in
    bf16. The loss and log-probs are always computed in fp32."""

    fp8: Fp8Format | None = None
    """Format of the student's matrix products, in training and in native rollouts. `hybrid`: e4m3
    in the forward pass and e5m2 for gradients. `e4m3`: e4m3 for both. null: bf16."""
    teacher_fp8: Fp8Format | Literal["as_student"] | None = "as_student"
    """Format of the teacher's matrix products. `as_student`: the value of precision.fp8. null:
    bf16."""
    fp8_recipe: Fp8Recipe = "tensorwise"
    """Rule by which a tensor is scaled into the range of FP8. `tensorwise`: by its own largest
    value. `delayed`: by its largest value in the previous step. `blockwise`: in blocks of 128
    values (Hopper or newer). `mxfp8`: in blocks of 32 values (Blackwell or newer)."""
    bf16_first_layers: Annotated[int, Field(ge=0)] = 0
    """Number of layers at the start of the model whose products stay in bf16. It must be 0 with
    recipe `delayed`."""
    bf16_last_layers: Annotated[int, Field(ge=0)] = 0
    """Number of layers at the end of the model whose products stay in bf16. It must be 0 with
    recipe `delayed`."""

    @property
    def for_teacher(self) -> "PrecisionConfig":
        """The teacher's settings, in the form of a student's: fp8 is the teacher's format."""
        fp8 = self.fp8 if self.teacher_fp8 == "as_student" else self.teacher_fp8
        return self.model_copy(update={"fp8": fp8, "teacher_fp8": "as_student"})

    @property
    def has_fp8(self) -> bool:
        return self.fp8 is not None or self.for_teacher.fp8 is not None

    @property
    def size_multiple(self) -> int:
        """Required divisor of every dimension of a matrix product, including its tokens."""
        if not self.has_fp8:
            return 1
        return 32 if self.fp8_recipe == "mxfp8" else 16

    @model_validator(mode="after")
    def _check_bf16_layers(self) -> "PrecisionConfig":
        bf16_layers = self.bf16_first_layers + self.bf16_last_layers
        if bf16_layers and self.fp8_recipe == "delayed":
            raise ValueError(
                f"bf16_first_layers {self.bf16_first_layers} and bf16_last_layers "
                f"{self.bf16_last_layers}: expected 0 and 0 with fp8_recipe delayed, which "
                "collects its statistics over all layers; choose another recipe"
            )
        return self


class ModelLayoutConfig(Section):
    """Layout of a model that reads whole sequences."""

    tensor: Positive = 1
    """Tensor-parallel size (TP): number of ranks that each layer's weight matrices are split
    over."""
    pipeline: Positive = 1
    """Pipeline-parallel size (PP): number of stages that the layers are split into."""
    virtual_pipeline: Positive = 1
    """Number of model chunks on each pipeline stage (VPP), interleaved over the layers. More chunks
    give a smaller pipeline bubble and more communication between stages."""
    layers_in_first_stage: Positive | None = None
    """Number of layers on the first pipeline stage, over all its chunks. The other stages share the
    remaining layers evenly. null: as many as on the other stages."""
    layers_in_last_stage: Positive | None = None
    """Number of layers on the last pipeline stage, which also computes the loss. As
    parallel.layers_in_first_stage."""
    pipeline_layout: str | None = None
    """Layers of every pipeline stage, as Megatron's `pipeline_model_parallel_layout`: E is the
    embedding, t a layer, L the loss, and | ends a stage. `x*n` and `(...)*n` repeat. Example for 14
    layers on 4 stages: `Et*3|(t*4|)*2t*3L`. With parallel.virtual_pipeline the parts are chunks:
    chunk 0 of every stage, then chunk 1 of every stage, and so on. null: an even split, or that of
    parallel.layers_in_first_stage and parallel.layers_in_last_stage."""
    expert: Positive = 1
    """Expert-parallel size (EP): number of ranks that the experts of each layer are split over. The
    ranks belong to one pipeline stage: tensor-parallel ranks first, then data-parallel ones."""
    expert_tensor: Positive = 1
    """Expert tensor-parallel size (ETP): number of consecutive ranks that the matrices of each
    expert are split over. Use it for experts that are too large for one rank. Otherwise
    parallel.expert moves less data."""
    sequence: bool = False
    """Sequence parallelism (SP): tensor-parallel ranks split the tokens in the parts of a layer
    whose weights are not split. It saves activation memory. Mixture-of-experts models with
    parallel.tensor > 1 require it."""

    @model_validator(mode="after")
    def _check_split_sizes(self) -> Self:
        if self.sequence and self.tensor == 1:
            raise ValueError(
                "sequence is true and tensor is 1: expected tensor > 1, since sequence splits "
                "tokens over tensor-parallel ranks; set sequence to false or raise tensor"
            )
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            raise ValueError(
                f"virtual_pipeline {self.virtual_pipeline} and pipeline 1: expected pipeline > 1, "
                "since virtual_pipeline interleaves over stages; set virtual_pipeline to 1 or "
                "raise pipeline"
            )
        _ = self.stages
        return self

    @property
    def stages(self) -> Stages:
        """The split of layers into stages.

        Raises:
            ValueError: the settings contradict each other.
        """
        return Stages.of(self)


class ParallelConfig(ModelLayoutConfig):
    """Layout of the ranks. The data-parallel size is the number of processes divided by
    tensor x pipeline x context."""

    context: Positive = 1
    """Context-parallel size (CP): number of ranks that the positions of each sequence are split
    over."""
    overlap_grad_reduce: bool = False
    """Overlap of gradient reduction with the backward pass: gradients are summed over data-parallel
    ranks bucket by bucket while the backward pass runs."""


class WeightedSource(Section):
    """Source of training rows with a weight."""

    path: Source
    """Source of the rows."""
    weight: Annotated[float, Field(gt=0, le=1000)]
    """Number of times that an epoch draws each row on average. The order of an epoch is in
    memory."""


def _plain_source(source: Path | WeightedSource) -> Any:
    return source_name(source) if isinstance(source, Path) else source.model_dump(mode="json")


TrainingSource = Annotated[
    Path | WeightedSource,
    _by_type(dict | WeightedSource, WeightedSource, Source),
    # Pydantic would serialize all members of the union as the first one.
    PlainSerializer(_plain_source, when_used="json"),
]


class DataConfig(Section):
    """Training rows."""

    train: list[TrainingSource] = Field(min_length=1)
    """Sources of rows with `question`, `reasoning` and `answer`: JSONL files (also .gz and .zst),
    Parquet files, folders of `Dataset.save_to_disk`, and data sets of the Hugging Face hub
    (`hf://NAMESPACE/NAME[@REVISION][/SUBSET][/SPLIT]`). An entry may be {path: SOURCE, weight: W}.
    Then each epoch draws W times the number of the source's rows from it, rounded. Without a
    weight, each epoch has each row once."""
    on_bad_row: Literal["error", "skip"] = "error"
    """Action on an invalid row. `error`: stop and report its file and line. `skip`: leave it out
    and count it."""
    shuffle: bool = True
    """Order of the rows. true: a permutation drawn from (seed, epoch). false: as in the
    sources."""

    @property
    def paths(self) -> list[Path]:
        """Sources of `train` without their weights."""
        return [source if isinstance(source, Path) else source.path for source in self.train]


class ViewsConfig(Section):
    """Prompts of the three views: the student's, and the teacher's partial and full view."""

    system_prompt: str | None = (
        "Solve the problem. Think step by step between <reasoning> and </reasoning>, then give "
        "only the final answer between <answer> and </answer>."
    )
    """System turn of all three views. A row's own `system` replaces it. null: no system turn."""
    student_template: str = "{question}"
    """User turn of the student view. Field: {question}."""
    teacher_template: str = (
        "{question}\n\nHere is a worked example of a response to this problem:\n\n{trace}\n\n"
        "Now solve the problem yourself, in your own words, in the format asked for."
    )
    """User turn of the partial and full views. Fields: {question}, {trace}."""
    trace_template: str = "<reasoning>\n{reasoning}\n</reasoning>\n<answer>\n{answer}\n</answer>"
    """Text of the oracle trace, in the teacher's views and as the response that `sft` trains on.
    Fields: {reasoning}, {answer}."""
    partial_view: Literal["prefix_with_answer", "prefix_without_answer", "answer_only"] = (
        "prefix_with_answer"
    )
    """Part of the oracle trace that the partial view shows: the start of the reasoning with or
    without the answer, or the answer only."""
    partial_ratio: Annotated[Ratio | Ratios, _by_type(list, Ratios, Ratio)] = 0.5
    """Share of the reasoning that the partial view shows. A list: each rollout of a training step
    draws one of its ratios at random, all with the same probability. Validation and `aropd
    diagnose` then use the median, for an even number of ratios the lower one."""
    partial_cut: Literal["words", "sentences", "lines", "tokens", "reference"] = "words"
    """Rule for cutting the reasoning at partial_ratio. `words`: at the end of a word, a run without
    white space. `sentences`: at the end of a sentence or paragraph. `lines`: at the end of a line.
    `tokens`: at the end of a token. `reference`: the rule of the authors' release. The first three
    count characters, rounded down, and move the cut forward. `tokens` counts tokens, rounded down.
    `reference` rounds characters up. There a word is a run of letters, digits, underscores and
    backslashes, and a reasoning of one or two words is shown whole."""
    chat_template_kwargs: dict[str, bool | int | float | str] = {}
    """Arguments of the model's chat template, such as enable_thinking or reasoning_effort. The
    template must read each of them. They apply to all three views."""
    teacher_chat_template_kwargs: dict[str, bool | int | float | str] = {}
    """Arguments for the partial and the full view, in addition to chat_template_kwargs and with
    precedence over them."""
    max_prompt_tokens: Positive = 1024
    """Largest number of tokens in each view's prompt."""
    on_long_prompt: Literal["cut", "cut_chat", "drop"] = "cut"
    """Action on a prompt that is longer than max_prompt_tokens. `cut`: cut the question on its left
    until the prompt fits. `cut_chat`: keep the last max_prompt_tokens tokens of each view's
    rendered chat, as the authors' release does. The system prompt is lost first. `drop`: drop the
    row. Shortened and dropped rows are counted."""

    @property
    def partial_ratios(self) -> tuple[float, ...]:
        """Ratios that a training step may draw, in the order of partial_ratio."""
        ratios = self.partial_ratio
        return tuple(ratios) if isinstance(ratios, list) else (ratios,)

    @property
    def median_ratio(self) -> float:
        """The ratio where none is drawn. The lower median of an even number."""
        return sorted(self.partial_ratios)[(len(self.partial_ratios) - 1) // 2]


class SamplingConfig(Section):
    """Sampling of responses."""

    max_response_tokens: Positive = 1024
    """Largest number of tokens in a response. A response ends at EOS or at this length."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """Sampling temperature. 0: greedy decoding."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Probability mass of nucleus sampling: tokens come from the smallest set that holds it. 1: all
    tokens."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Number of most likely tokens that are sampled from. 0: all tokens."""


ImportanceLevel = Literal["sequence", "token"]


class VllmConfig(Section):
    """vLLM servers of rollout.engine `vllm`."""

    urls: list[Annotated[str, Field(pattern=r"^https?://")]] = []
    """Addresses of running servers that `aropd serve` started, such as http://node7:8000. Their API
    key is read from $VLLM_API_KEY. Empty: the run starts its own servers."""
    servers: Positive = 1
    """Number of servers that the run starts on the first rank's machine. They end with the run."""
    python: Path | None = None
    """Python interpreter with vLLM installed, which may be in a separate environment. null: the
    interpreter of the run."""
    devices: list[str] = []
    """CUDA_VISIBLE_DEVICES of each started server, such as "6,7". `aropd train` starts its
    processes on the machine's other GPUs. Empty: the run's own value."""
    host: str = "127.0.0.1"
    """Address that started servers listen on. They require an API key at every address."""
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Port of the first started server. The next servers take the following ports. 0: any free
    port."""
    arguments: list[str] = []
    """Further vLLM arguments for started servers, such as --tensor-parallel-size=2."""
    placement: Literal["separate", "colocated"] = "separate"
    """Location of started servers. `separate`: on the GPUs in devices, which training does not use.
    `colocated`: on the GPUs of training, on one machine. The servers release their memory while the
    model trains. While they sample, model and optimizer stay on the GPUs, and the gradients have no
    memory."""
    sync: Literal["disk", "nccl"] | None = None
    """Path of the weights to the servers after each step. `disk`: through files in weights_dir,
    which all ranks write together. `nccl`: from GPU to GPU; a restarted server rejoins at the next
    step. null: `nccl` on GPUs if the servers have GPUs of their own (urls or devices), else `disk`.
    With the section adapter, only the adapter is written, as a PEFT folder, and `nccl` is refused.
    """
    weights_dir: Path | None = None
    """Folder that every rank and every server can access under this path. The run writes to its
    subfolder vllm-weights. null: a folder in /dev/shm if the run starts the servers, all ranks are
    on their machine, and there is room for two versions of the weights, else output_dir."""
    seeded: bool = True
    """Whether each response has a seed of its own. With seeds, a resumed or repeated run samples
    the same responses. On GPUs, vLLM then draws row by row instead of in its fused sampler. false:
    the server's generator, so responses depend on the batches in which they were decoded."""
    probe_tolerance: Annotated[float, Field(gt=0)] | None = None
    """Largest allowed difference between a server's and the trainer's log-probs after a sync, in
    nats, averaged over the tokens of a probe. null: 1e-3 in fp32, 0.1 in bf16, 0.3 with
    precision.fp8, and twice as much for models with experts."""
    checksums: bool = False
    """Comparison of every tensor's SHA-256 after each sync: between the tensor that training
    gathers and the one that each process of each server receives for loading."""
    request_timeout: Annotated[float, Field(gt=0)] = 600.0
    """Timeout in seconds for a response, and for loading weights into a server."""
    start_timeout: Annotated[float, Field(gt=0)] = 900.0
    """Timeout in seconds for the start or restart of a server."""
    retries: Annotated[int, Field(ge=0)] = 3
    """Number of retries of a failed response, per server. A server that fails more than this many
    times in a row is left out until the next step."""

    @model_validator(mode="after")
    def _check_devices(self) -> "VllmConfig":
        if self.devices and len(self.devices) != self.servers:
            raise ValueError(
                f"devices has {len(self.devices)} entries: expected one per server, and servers is "
                f"{self.servers}; change one of them"
            )
        if self.urls and self.devices:
            raise ValueError(
                "devices applies only to servers that the run starts; it cannot be combined with "
                "urls: remove one of them"
            )
        return self

    @model_validator(mode="after")
    def _check_placement(self) -> "VllmConfig":
        if self.placement == "separate":
            return self
        if self.urls:
            raise ValueError(
                "placement colocated with urls: expected servers that the run starts on its GPUs; "
                "remove urls, or set placement to separate"
            )
        if self.sync == "nccl":
            raise ValueError(
                "placement colocated with sync nccl: expected sync disk, since NCCL does not "
                "connect two processes on one GPU; remove sync"
            )
        return self

    def sync_on(self, device: str) -> Literal["disk", "nccl"]:
        """Return the path of the weights for training on `cuda` or `cpu`."""
        has_own_gpus = bool(self.urls or self.devices) and self.placement == "separate"
        return self.sync or ("nccl" if device == "cuda" and has_own_gpus else "disk")


class RolloutConfig(SamplingConfig):
    """Sampling of the responses of a training step."""

    engine: Literal["native", "vllm"] = "native"
    """Engine that samples: `native` is the student's own forward with a KV cache, in every layout;
    `vllm` is one or more vLLM servers."""
    rollouts_per_prompt: Positive = 1
    """Number of responses sampled for each row."""
    batch_size: Positive = 32
    """Largest number of sequences that one model replica (with vLLM, one server) decodes at once.
    When a sequence ends, a waiting prompt takes its place."""
    kv_cache_tokens: Positive | None = None
    """Capacity of each replica's KV cache in tokens, with engine native. If it is too small for
    batch_size sequences of maximum length, fewer are decoded at once. null: room for batch_size
    sequences. The memory stays allocated while the model trains."""
    cuda_graphs: bool = False
    """Whether engine native decodes by CUDA graphs, which launch all kernels of a token at once.
    They are used on GPUs without tensor and pipeline parallelism, experts and FP8. They have not
    run on a GPU yet, so they are off by default."""
    importance: ImportanceLevel | Literal["auto", "off"] = "auto"
    """Truncated importance sampling: correction for an engine whose log-probs differ from the
    trainer's. `sequence`: a response's loss is multiplied by the mean of its tokens' ratios.
    `token`: each token's loss is multiplied by its own ratio. `auto`: `sequence` with vLLM, and off
    where the training model samples, since ratios are then 1 up to rounding."""
    importance_cap: Annotated[float, Field(gt=0)] = 2.0
    """Upper bound of a token's importance ratio; larger ratios are clipped to it."""
    async_steps: Annotated[int, Field(ge=0)] = 0
    """Number of steps that sampling runs ahead of training, with engine vllm only. 1: a step's
    responses are sampled while the previous step trains, with weights that are one update older. A
    larger number makes responses older and steps no faster, since an update of the servers' weights
    waits for all responses that older weights have begun. A resumed run samples its first step with
    the current weights."""

    vllm: VllmConfig = VllmConfig()

    @model_validator(mode="after")
    def _check_async_steps(self) -> "RolloutConfig":
        if self.async_steps and self.model_samples:
            raise ValueError(
                f"async_steps {self.async_steps} and engine {self.engine}: expected engine vllm, "
                "since the training model cannot sample while it trains; set async_steps to 0 or "
                "engine to vllm"
            )
        if self.async_steps and self.is_colocated:
            raise ValueError(
                f"async_steps {self.async_steps} and vllm.placement colocated: expected "
                "async_steps 0, since colocated servers sleep while the model trains"
            )
        return self

    @property
    def model_samples(self) -> bool:
        """Whether the training model itself samples."""
        return self.engine != "vllm"

    @property
    def is_colocated(self) -> bool:
        """Whether vLLM servers run on the GPUs of training."""
        return self.engine == "vllm" and self.vllm.placement == "colocated"

    @property
    def importance_level(self) -> ImportanceLevel | None:
        """Level of the importance weights; None if they are off."""
        if self.importance == "auto":
            return None if self.model_samples else "sequence"
        return None if self.importance == "off" else self.importance


class ObjectiveConfig(Section):
    """Loss (METHOD section 3)."""

    name: Literal["aropd", "sft"] = "aropd"
    """Objective. `aropd`: anchored residual on-policy distillation. `sft`: next-token cross-entropy
    on the oracle trace. Partial OPD is `aropd` with residual_scale 0. Full OPD is `aropd` with
    residual_scale 1 and residual_clip null."""
    residual_scale: Annotated[float, Field(ge=0)] = 0.8
    """Factor lambda of the residual that is added to the anchor."""
    residual_clip: Annotated[float, Field(gt=0)] | None = 5.0
    """Bound c of the residual in nats: the residual is clipped to [-c, c]. null: no clip."""
    divergence: Divergence = "kl_target_student"
    """Divergence between target and student. `kl_target_student`: KL(target || student).
    `kl_student_target`: KL(student || target). `jsd`: Jensen-Shannon divergence with jsd_weight."""
    jsd_weight: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Weight beta of `jsd`: the mixture is (1 - beta) student + beta target."""
    reduction: Reduction = "sequence_mean"
    """Mean over the global batch. `sequence_mean`: mean over a response's loss tokens, then over
    the responses that have loss tokens. `sequence_mean_all`: the same, but responses without loss
    tokens enter the second mean as 0. `token_mean`: mean over all loss tokens."""
    skip_response_tokens: Annotated[int, Field(ge=0)] = 3
    """Number of tokens at the start of loss_span that the loss leaves out in each response."""
    loss_span: LossSpan = "both"
    """Part of each response that the loss reads. `thinking`: the first thought, such as
    `<think> ... </think>` or `<reasoning> ... </reasoning>`, with its closing tag. Skipped tokens
    count from the end of its opening tag. `answer`: all tokens after the first thought. A response
    without a thought is one answer. `both`: the whole response."""
    temper_logits: bool = False
    """Division of the logits of student, partial view and full view by rollout.temperature before
    the loss of `aropd`, as in the authors' release. The metrics from the same pass then describe
    the tempered distributions. Importance ratios are not tempered. No effect at temperature 1."""
    sft_prompt_loss: bool = False
    """Loss on the prompt in `sft`, as in the authors' release: every token of prompt and response
    counts, except the prompt's first. skip_response_tokens is then ignored, and positions count
    from the prompt's second token."""
    router_aux_loss_coeff: Annotated[float, Field(ge=0)] = 0.0
    """Coefficient of the routers' load-balancing loss in the student view, for mixture-of-experts
    models (METHOD section 3, Routers). 0: no such loss."""
    router_z_loss_coeff: Annotated[float, Field(ge=0)] = 0.0
    """Coefficient of the z-loss, which keeps the routers' logits small, in the student view (METHOD
    section 3, Routers). 0: no such loss."""
    chunk_tokens: Positive | Literal["auto"] = "auto"
    """Number of tokens whose logits exist at once in the fused loss. Logits are fp32 for every
    model.dtype. `auto`: as many as fit, with their gradient, into 1.5 GiB on a GPU and 128 MiB on a
    CPU."""
    metrics: bool = True
    """Report of entropies, divergences between the views and similar metrics, from the pass that
    computes the loss. They need both teacher views. Without them, Full and Partial OPD read only
    the view that is their target. This halves the teacher's work and saves one matrix product in
    the loss."""
    topk_overlap: bool = True
    """Report of the metric `topk_overlap`, which costs more than all other metrics together. It
    requires metrics."""
    hindsight_gap: float = 2.0
    """Threshold tau in nats of the metric hindsight_token_rate. A sampled token counts if its
    log f - log p exceeds tau and its probability in the partial view is below hindsight_floor."""
    hindsight_floor: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Threshold epsilon of the metric hindsight_token_rate: the probability in the partial view
    below which a token can count (see hindsight_gap)."""

    @model_validator(mode="after")
    def _check_loss_span(self) -> "ObjectiveConfig":
        if self.has_prompt_loss and self.loss_span != "both":
            raise ValueError(
                f"sft_prompt_loss true and loss_span {self.loss_span}: expected loss_span both, "
                "since the prompt is in neither span; change one of them"
            )
        return self

    @property
    def has_prompt_loss(self) -> bool:
        return self.name == "sft" and self.sft_prompt_loss

    @property
    def has_router_losses(self) -> bool:
        return self.router_aux_loss_coeff > 0 or self.router_z_loss_coeff > 0

    @property
    def views(self) -> tuple[PrivilegedView, ...]:
        """Teacher views that the objective reads: they are rendered, scored and projected."""
        if self.name == "sft":
            return ()
        only_view = target_view(self.residual_scale, self.residual_clip)
        return ("partial", "full") if self.metrics or only_view is None else (only_view,)


def target_view(residual_scale: float, residual_clip: float | None) -> PrivilegedView | None:
    """Return the view whose distribution is the target, or None if the target needs both views.

    Source: METHOD section 3, its identities: lambda = 0 gives p, lambda = 1 without clip gives f.
    """
    if residual_scale == 0:
        return "partial"
    return "full" if residual_scale == 1 and residual_clip is None else None


class TeacherConfig(Section):
    """Teacher: the model that scores the student's responses under the privileged views (METHOD
    section 4)."""

    kind: Literal["ema", "frozen", "live", "model"] = "ema"
    """Source of the teacher's weights. `ema`: moving average of the student's. `frozen`: the
    weights that were loaded; with an adapter, those of the base model. `live`: the student itself.
    `model`: another model, at teacher.path, whose weights do not change."""
    path: Path | None = None
    """Checkpoint of a teacher of kind `model`: a Hugging Face folder, a Megatron checkpoint, or the
    output_dir of a run, whose student is read. Its size and family may differ from the student's,
    its vocabulary may not. Checkpoints do not contain its weights."""
    parallel: ModelLayoutConfig | None = None
    """Layout of a teacher of kind `model` on the ranks of the run, with the settings of section
    `parallel` except context and overlap_grad_reduce. Settings that are left out have the defaults
    of section `parallel`, not its values. The data-parallel size is the number of processes divided
    by tensor x pipeline. null: the layout of section `parallel`."""
    views: Literal["privileged", "none"] = "privileged"
    """Prompts under which the teacher scores. `privileged`: the partial and the full view. `none`:
    the student's own prompt. `none` requires kind `model` and objective.residual_scale 0, and is
    on-policy distillation without privileged information."""
    ema_rate: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Rate alpha of `ema`: teacher <- (1 - alpha) teacher + alpha student, after every step."""
    fp32_master: bool = True
    """Moving average in fp32 of the optimizer's fp32 weights, if the model is in bf16. Each
    data-parallel rank keeps its part, and the ranks gather the teacher's bf16 weights after every
    step. false: average of the bf16 weights in bf16, where most updates are rounded away."""
    weights: MemorySpace = "device"
    """Location of the teacher's weights and fp32 average while the teacher is not scoring. `host`:
    pinned memory. The weights are then copied to the device for scoring, and only the output head,
    which the loss needs, stays there."""
    hidden_states: MemorySpace = "device"
    """Location of the views' final hidden states until the loss reads them. `host`: pinned memory,
    from which one microbatch at a time is copied to the device."""

    @model_validator(mode="after")
    def _check_model(self) -> "TeacherConfig":
        if self.kind == "model" and self.path is None:
            raise ValueError(
                "kind model and path null: expected the folder of the teacher's checkpoint; set "
                "path, or choose another kind"
            )
        if self.kind != "model" and self.path is not None:
            raise ValueError(
                f"path {self.path} and kind {self.kind}: expected path null, since the weights of "
                "this teacher are the student's; set kind to model or remove path"
            )
        if self.kind != "model" and self.parallel is not None:
            raise ValueError(
                f"parallel is set and kind is {self.kind}: expected parallel null, since this "
                "teacher has the student's layout; remove parallel or set kind to model"
            )
        if self.kind != "model" and self.views == "none":
            raise ValueError(
                f"views none and kind {self.kind}: expected views privileged, since a copy of the "
                "student with the student's prompt has nothing to teach; set views to privileged "
                "or kind to model"
            )
        return self

    @model_validator(mode="after")
    def _check_location(self) -> "TeacherConfig":
        if self.kind == "live" and self.weights == "host":
            raise ValueError(
                "weights host and kind live: expected weights device, since a live teacher is the "
                "student itself; set weights to device or choose another kind"
            )
        return self


class NamedTeacherConfig(TeacherConfig):
    """One of several teachers, with the settings of section `teacher`."""

    kind: Literal["ema", "frozen", "live", "model"] = "model"
    """Source of the teacher's weights: `model`, as in teacher.kind. The folder of the student's
    model, model.path, gives a frozen teacher."""

    @field_validator("kind")
    @classmethod
    def _check_kind(cls, kind: str) -> str:
        if kind != "model":
            raise ValueError(
                f"{kind}: expected model for one of several teachers; remove kind and set path to "
                "the teacher's folder. The folder in model.path gives the weights that training "
                "starts from"
            )
        return kind


TeacherName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]


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


class ValidationConfig(Section):
    """Accuracy on held-out problems while the run trains. The run's ranks measure it. This does not
    change what the run computes."""

    tasks: list[str] = []
    """Benchmarks that the student answers, as NAME=FILE or NAME:FORMAT=FILE, like the tasks of
    `aropd eval`. Tasks of code are refused."""
    rows: list[Source] = []
    """Sources of held-out rows, as in data.train but without weights. The student answers them as
    the task `rows`. The loss and the KLs of its answers are reported, too."""
    teacher_views: list[View] = []
    """Views under which the teacher answers. `partial`, `full`: `rows`, as the tasks `rows_partial`
    and `rows_full`. `student`: `rows` and every task NAME without privilege, as `rows_teacher` and
    `NAME_teacher`. The native engine samples from the teacher's weights."""
    every_steps: Positive = 50
    """Number of steps between validations. The final weights are always validated."""
    at_start: bool = True
    """Validation of the weights that the run starts from."""
    limit: Positive | None = None
    """Number of problems of each task and of `rows`, from the first on. null: all."""
    samples: Positive = 1
    """Number of responses per problem."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """Sampling temperature. 0: greedy decoding. top_p and top_k are not applied."""
    max_response_tokens: Positive | None = None
    """Largest number of tokens in a response. null: rollout.max_response_tokens."""
    stop_after: Positive | None = None
    """Number of validations in a row without a new highest accuracy after which the run ends, as if
    its last step were done. The accuracy is that of checkpoint.keep_best, or else the mean over the
    student's tasks. null: never."""

    @property
    def is_on(self) -> bool:
        return bool(self.tasks or self.rows)

    @model_validator(mode="after")
    def _check_validation(self) -> "ValidationConfig":
        privileged = [view for view in self.teacher_views if view != "student"]
        if privileged and not self.rows:
            raise ValueError(
                f"teacher_views {', '.join(privileged)} without rows: expected rows, since only "
                "they have the traces that these views show; set rows or remove the views"
            )
        if self.temperature == 0 and self.samples > 1:
            raise ValueError(
                f"samples {self.samples} and temperature 0: greedy samples are all the same; set "
                "samples to 1, or a temperature above 0"
            )
        if self.stop_after and not self.is_on:
            raise ValueError("stop_after without tasks and rows: expected at least one of them")
        return self


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


class LoggingConfig(Section):
    """Loggers beside metrics.jsonl."""

    tensorboard: bool = False
    """TensorBoard events, written to output_dir/tensorboard."""
    wandb: Literal["off", "online", "offline"] = "off"
    """Logging to Weights & Biases. `offline`: to local files only."""
    wandb_project: str = "aropd"
    """Name of the Weights & Biases project."""
    samples: Annotated[int, Field(ge=0)] = 0
    """Number of responses per step, the first ones of the batch, that are written to
    output_dir/samples.jsonl and to the loggers above, with their verdicts. Also the number of
    problems of each validation task whose answers are written. 0: off."""
    samples_every_steps: Positive = 1
    """Number of steps between steps whose responses are written. Validations are always written."""


class Config(Section):
    """Configuration of a run. Paths are relative to the working directory."""

    output_dir: Path
    """Folder of metrics, checkpoints and the resolved configuration. A run with an existing folder
    resumes from it."""
    model: ModelConfig
    data: DataConfig
    training: TrainingConfig
    adapter: AdapterConfig | None = None
    """LoRA adapter. null: all weights are trained."""
    precision: PrecisionConfig = PrecisionConfig()
    parallel: ParallelConfig = ParallelConfig()
    views: ViewsConfig = ViewsConfig()
    rollout: RolloutConfig = RolloutConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    teacher: TeacherConfig = TeacherConfig()
    teachers: dict[TeacherName, NamedTeacherConfig] = {}
    """Several teachers by name, instead of section `teacher`: {NAME: {path: FOLDER}}. The key
    `teacher` of each row names the teacher that scores its responses. The other settings of a
    teacher are those of section `teacher`, with kind `model`. All have the same `views`. Empty: one
    teacher, in section `teacher`."""
    optimizer: OptimizerConfig = OptimizerConfig()
    validation: ValidationConfig = ValidationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    limits: LimitsConfig = LimitsConfig()
    guards: GuardsConfig = GuardsConfig()
    logging: LoggingConfig = LoggingConfig()

    @model_validator(mode="after")
    def _check_rollouts_per_prompt(self) -> "Config":
        if self.training.global_batch_size % self.rollout.rollouts_per_prompt:
            raise ValueError(
                f"training.global_batch_size {self.training.global_batch_size}: expected a "
                f"multiple of rollout.rollouts_per_prompt {self.rollout.rollouts_per_prompt}; "
                "change one of them"
            )
        return self

    @model_validator(mode="after")
    def _check_temperature(self) -> "Config":
        objective = self.objective
        is_divided = objective.temper_logits and objective.name == "aropd"
        if is_divided and self.rollout.temperature == 0:
            raise ValueError(
                "objective.temper_logits true and rollout.temperature 0: expected a temperature "
                "above 0, since logits are divided by it; raise rollout.temperature or set "
                "objective.temper_logits to false"
            )
        return self

    @model_validator(mode="after")
    def _check_fp8(self) -> "Config":
        precision = self.precision
        if precision.has_fp8 and self.model.dtype == "fp32":
            raise ValueError(
                "precision: fp8 products with model.dtype fp32: expected model.dtype bf16; change "
                "it, or set precision.fp8 and precision.teacher_fp8 to null"
            )
        if self.teacher.kind == "live" and precision.for_teacher.fp8 != precision.fp8:
            raise ValueError(
                f"precision.teacher_fp8 {precision.teacher_fp8}: expected as_student, since a live "
                "teacher is the student itself; set it to as_student or choose another teacher.kind"
            )
        return self

    @model_validator(mode="after")
    def _check_teachers(self) -> "Config":
        if self.teachers and "teacher" in self.model_fields_set:
            raise ValueError(
                f"teacher and teachers ({', '.join(self.teachers)}): expected one of the two "
                "sections; move the settings of teacher to each entry of teachers, or remove one "
                "section"
            )
        by_views = {teacher.views: name for name, teacher in self.teachers.items()}
        if len(by_views) > 1:
            shown = " and ".join(f"teachers.{name}.views {v}" for v, name in by_views.items())
            raise ValueError(f"{shown}: expected the same views for every teacher; change one")
        if self.teachers and self.validation.teacher_views:
            raise ValueError(
                f"validation.teacher_views with teachers ({', '.join(self.teachers)}): expected "
                "no teacher_views, since only a single teacher answers problems; remove them, and "
                "use `aropd eval` on each teacher's folder"
            )
        return self

    @model_validator(mode="after")
    def _check_teacher_views(self) -> "Config":
        if self.teacher.parallel is not None and self.validation.teacher_views:
            raise ValueError(
                "validation.teacher_views with teacher.parallel: expected no teacher_views, since "
                "a teacher with a layout of its own does not sample; remove them and use "
                "`aropd eval` on the teacher's folder, or remove teacher.parallel"
            )
        return self

    @model_validator(mode="after")
    def _check_adapter(self) -> "Config":
        if self.adapter is None:
            return self
        refused = {
            "precision.fp8 or precision.teacher_fp8 is set": (
                self.precision.has_fp8,
                "null, since adapters have no FP8 products",
            ),
            "rollout.cuda_graphs is true": (
                self.rollout.cuda_graphs,
                "false, since adapters have not been tested in CUDA graphs",
            ),
            "rollout.vllm.sync is nccl": (
                self.rollout.vllm.sync == "nccl",
                "null or disk, since servers load an adapter from a folder",
            ),
            "rollout.vllm.checksums is true": (
                self.rollout.vllm.checksums,
                "false, since only whole weights have checksums",
            ),
            "objective.router_aux_loss_coeff or router_z_loss_coeff is above 0": (
                self.objective.has_router_losses,
                "0, since the routers are not trained",
            ),
            f"teacher.weights is host and teacher.kind is {self.teacher.kind}": (
                not self.teachers
                and self.teacher.weights == "host"
                and self.teacher.kind != "model",
                "teacher.weights device, since this teacher has no model of its own",
            ),
        }
        for setting, (is_set, expected) in refused.items():
            if is_set:
                raise ValueError(
                    f"adapter is set and {setting}: expected {expected}; change the setting or "
                    "remove the section adapter"
                )
        return self

    @model_validator(mode="after")
    def _check_teacher_model(self) -> "Config":
        scale, precision = self.objective.residual_scale, self.precision.for_teacher
        if not self.has_privileged_views and scale != 0:
            raise ValueError(
                f"objective.residual_scale {scale:g} and teacher.views none: expected "
                "residual_scale 0, since both views are the student's prompt and their residual is "
                "zero; set it to 0, or teacher.views to privileged"
            )
        has_statistics = precision.fp8 is not None and precision.fp8_recipe == "delayed"
        if (self.teachers or self.teacher.kind == "model") and has_statistics:
            raise ValueError(
                "precision.fp8_recipe delayed and teacher.kind model: expected another recipe, "
                "since a resumed run needs the statistics of `delayed`, and checkpoints contain "
                "nothing of this teacher; change fp8_recipe, or set precision.teacher_fp8 to null"
            )
        return self

    @model_validator(mode="after")
    def _check_validation(self) -> "Config":
        names = self.validation_tasks
        views = self.validation.teacher_views
        all_names = [*names, *(teacher_task(name, view) for name in names for view in views)]
        if len(set(all_names)) < len(all_names):
            raise ValueError(f"validation: tasks {', '.join(all_names)}: expected different names")
        if self.logging.samples and "train" in names:
            raise ValueError(
                "validation.tasks train=FILE: expected another name, since `train` is the name of "
                "the training steps' responses in samples.jsonl"
            )
        best = self.checkpoint.keep_best
        if best is not None and best not in names:
            raise ValueError(
                f"checkpoint.keep_best {best}: expected a task of validation, found "
                f"{', '.join(names) or 'none'}; add the task, or set keep_best to null"
            )
        if self.validation.teacher_views and self.objective.name == "sft":
            raise ValueError(
                "validation.teacher_views with objective.name sft: sft has no teacher; leave "
                "teacher_views empty"
            )
        return self

    @model_serializer(mode="wrap")
    def _dump(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out the section `teacher` that `teachers` replaces."""
        tree = dump(self)
        if self.teachers:
            tree.pop("teacher", None)
        return tree

    @property
    def named_teachers(self) -> dict[str, TeacherConfig]:
        """The run's teachers by name. The teacher of section `teacher` has the empty name. Empty
        for `sft`."""
        if self.objective.name == "sft":
            return {}
        return {**self.teachers} if self.teachers else {"": self.teacher}

    @property
    def teacher_models(self) -> dict[str, TeacherConfig]:
        """The teachers of kind `model` by name."""
        return {name: t for name, t in self.named_teachers.items() if t.kind == "model"}

    def layout_of(self, teacher: TeacherConfig) -> ParallelConfig:
        """Return a teacher's layout: that of section `parallel`, or its own."""
        if teacher.parallel is None:
            return self.parallel
        settings = teacher.parallel.model_dump()
        return ParallelConfig(**settings, overlap_grad_reduce=self.parallel.overlap_grad_reduce)

    def stages_of(self, teacher: TeacherConfig, num_layers: int) -> Stages:
        """Return the split of a teacher's layers. In the student's layout, it is the student's if
        that fits (Stages.fitted).

        Raises:
            ValueError: the settings do not split this number of layers.
        """
        if teacher.parallel is None:
            return self.parallel.stages.fitted(num_layers)
        return teacher.parallel.stages

    @property
    def row_teachers(self) -> tuple[str, ...]:
        """Names that the key `teacher` of a row may have. Empty: the key is ignored."""
        return tuple(name for name in self.named_teachers if name)

    @property
    def has_privileged_views(self) -> bool:
        """Whether the teachers' views show more than the student's prompt."""
        teachers = self.teachers.values() if self.teachers else [self.teacher]
        return all(teacher.views == "privileged" for teacher in teachers)

    @property
    def scored_views(self) -> tuple[PrivilegedView, ...]:
        """Views of the objective that the teacher scores: one, if they are one prompt."""
        views = self.objective.views
        return views if self.has_privileged_views else views[:1]

    @property
    def validation_tasks(self) -> list[str]:
        """Names of the tasks of `validation` that the student answers."""
        names = [split_task(text)[0] for text in self.validation.tasks]
        return names + ["rows"] * bool(self.validation.rows)

    @property
    def num_logged_samples(self) -> int:
        """Number of responses of a step that are written as samples, at most all of them."""
        return min(self.logging.samples, self.training.global_batch_size)

    @property
    def longest_sequence(self) -> int:
        """Largest number of tokens of a prompt with its response."""
        return self.views.max_prompt_tokens + self.rollout.max_response_tokens

    @property
    def packed_padding(self) -> int:
        """Upper bound of the tokens of padding with one packed sequence.

        Context and tensor ranks split the tokens, and FP8 needs multiples.
        """
        parallel = self.parallel
        return 2 * parallel.context * (parallel.tensor + 1) * self.precision.size_multiple

    @property
    def packed_tokens(self) -> int | None:
        """Largest number of tokens of a packed microbatch in any view. None without packing."""
        if not self.training.packing:
            return None
        full = self.training.micro_batch_size * (self.longest_sequence + self.packed_padding)
        return self.training.max_tokens_per_microbatch or full

    @property
    def prompts_per_step(self) -> int:
        return self.training.global_batch_size // self.rollout.rollouts_per_prompt
