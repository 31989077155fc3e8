"""Section `rollout`: sampling of responses, natively or by vLLM."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from aropd_mcore.config.section import Positive, Section


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
