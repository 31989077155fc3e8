"""The vLLM engine: server processes sample, and get new weights after each update."""

import math
import os
import secrets
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from aropd_mcore.config import ConfigError
from aropd_mcore.convert.adapter import adapter_shapes
from aropd_mcore.mcore.adapter_files import write_adapter_files
from aropd_mcore.mcore.logprobs import sequence_logprobs
from aropd_mcore.mcore.model import StageModel
from aropd_mcore.mcore.rank0 import in_background, run_on_rank0
from aropd_mcore.mcore.runtime import Runtime
from aropd_mcore.mcore.weight_files import write_weight_files
from aropd_mcore.rollout.engine import (
    Pending,
    Progress,
    PromptBatch,
    RolloutFailed,
    ignore,
    never,
)
from aropd_mcore.rollout.vllm_command import KEY_VARIABLE
from aropd_mcore.rollout.vllm_nccl import WeightTransfer
from aropd_mcore.rollout.vllm_process import Serving, new_key, start_server
from aropd_mcore.rollout.vllm_servers import Servers, Weights
from aropd_mcore.rollout.vllm_side.aropd_worker import digest
from aropd_mcore.rollout.vllm_spread import Server
from aropd_mcore.types import Rollout

_TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Default probe_tolerance by dtype, in nats: several times the effect of rounding on the mean."""
_FP8_TOLERANCE = 0.3
"""The same if the trainer computes in FP8 and the server does not. Assumed, not measured."""
_EXPERTS_FACTOR = 2
"""Factor for models with experts: a rounded router score can choose another expert."""
MEMORY = Path("/dev/shm")
"""Folder whose files are in the machine's memory."""
_SLACK_BYTES = 64 * 2**20
"""Reserve in this folder for small files besides the tensors."""

_STOP_SECONDS = 1.0
"""Interval at which rank 0 calls `should_stop` while it waits for responses."""


class VllmEngine:
    """RolloutEngine on vLLM servers, which the run starts or reaches at given URLs.

    Only rank 0 communicates with the servers, on behalf of all model replicas. So one process knows
    the load of every server, and an error occurs once. Every rank of the job must submit; replicas
    have different prompts.

    Batches are sampled in the background, one after another in the order of `submit`.

    After each update the ranks that hold the weights write them as an HF folder that the servers
    load, or send them over NCCL. No rank holds the whole model. If the run trains an adapter, rank
    0 writes only the adapter, as a PEFT folder. A probe then compares the log-probs of trainer and
    servers. A response is accepted only if the server reports that these weights produced it.

    Servers that share their GPUs with training sleep from the last response of a step until the
    next weights. The trainer's model and optimizer stay on the GPUs; the memory that PyTorch caches
    is freed before the servers wake.
    """

    def __init__(
        self,
        model: StageModel,
        runtime: Runtime,
        serving: Serving,
        *,
        eos_token_ids: Sequence[int],
        probe_ids: Sequence[int],
        should_stop: Callable[[], bool] = never,
    ):
        """
        Args:
            model: this rank's shard, without DDP around it. Its weights are read by
                `update_weights`.
            eos_token_ids: any of them ends a response.
            probe_ids: token ids of a typical sequence, at least two, for the probe of each update.
            should_stop: called on rank 0 while it waits for responses. If it returns True, the
                result is an empty list.
        Raises:
            ConfigError: rollout.vllm.sync is nccl and there is no GPU.
        """
        self.model = model
        self.runtime = runtime
        self.weight_version = 0
        self._serving = serving
        self._should_stop = should_stop
        vllm = serving.rollout.vllm
        self._sync = "adapter" if model.adapters else vllm.sync_on(runtime.device.type)
        self._is_colocated = serving.rollout.is_colocated
        self._probe_ids = probe_ids
        self._trouble: RolloutFailed | None = None
        """Reason why the servers do not have the current weights."""
        self._in_flight: list[_VllmPending] = []
        """Batches that are being sampled and whose results were not taken yet."""
        self._last_future: Future[list[Rollout]] | None = None
        """Future of the last batch that was begun, on rank 0 only."""
        self._servers: Servers | None = None
        if self._sync == "nccl" and runtime.device.type != "cuda":
            raise ConfigError(
                "rollout.vllm.sync: found nccl, which sends weights from GPU to GPU, and this run "
                "is on the CPU; expected disk"
            )
        self._scratch = self._make_scratch()
        self._serving = serving = replace(serving, scratch=self._scratch)
        self._folder = (self._scratch or vllm.weights_dir or serving.folder) / "vllm-weights"
        if runtime.rank == 0:
            self._servers = self._make_servers(eos_token_ids)
        self._transfer = WeightTransfer(model, runtime, self._servers, timeout=vllm.request_timeout)

    def submit(self, batch: PromptBatch) -> Pending:
        """As RolloutEngine.submit; the servers start to sample.

        Collectives: an all-gather of objects over the job. Every rank must call it.
        """
        self._free_unused()
        batches = self.runtime.concatenate_over_data([batch])
        start = sum(len(other.prompts) for other in batches[: self.runtime.dp_rank])
        pending = _VllmPending(self, batches, slice(start, start + len(batch.prompts)))
        pending.begin()
        return pending

    def update_weights(self, version: int) -> None:
        """As RolloutEngine.update_weights. The first call starts the run's servers and waits until
        all are up.

        Collectives: those of write_weight_files, write_adapter_files or WeightTransfer.send, those
            of mcore.logprobs.sequence_logprobs, and broadcasts over the job.
        """
        if self._in_flight:
            run_on_rank0(self._wait_for_all, takes_long=True)
        self.weight_version = version
        try:
            self._hand_over_weights()
            self._trouble = None
        except RolloutFailed as failed:
            self._trouble = failed
        except (OSError, ValueError) as error:
            self._trouble = RolloutFailed(
                f"the weights of step {version} could not be handed to the servers: {error}"
            )

    def close(self) -> None:
        """Stop the servers that the run has started, and remove the weights from memory."""
        if self._servers:
            self._servers.close()
            if self._scratch is not None:
                shutil.rmtree(self._scratch, ignore_errors=True)

    def _wait_for_all(self) -> None:
        assert self._last_future is not None, "on rank 0 only"
        wait([self._last_future])

    def _begin(self, sample: Callable[[], list[Rollout]]) -> Future[list[Rollout]]:
        """Call `sample` in the background after the earlier batches. On rank 0."""
        before = self._last_future

        def sample_in_turn() -> list[Rollout]:
            if before is not None:
                wait([before])
            return sample()

        self._last_future = in_background(sample_in_turn)
        return self._last_future

    def _hand_over_weights(self) -> None:
        version = self.weight_version
        is_sent, computes_digests = self._sync == "nccl", self._serving.rollout.vllm.checksums
        label = f"{version}-{secrets.token_hex(4)}"  # only rank 0's is used
        probe_logprobs = sequence_logprobs(self.model, self.runtime, self._probe_ids).tolist()
        self._free_unused()
        folder = (self._folder / f"step-{version:07d}").absolute()
        if is_sent:
            digests = self._transfer.send(label, digests=computes_digests)
        else:
            digests = self._write(folder, digest if computes_digests else None)
        weights = Weights(
            version,
            label,
            None if is_sent else folder,
            probe_logprobs,
            digests,
            is_adapter=self._sync == "adapter",
        )
        run_on_rank0(lambda: self.servers.sync(weights), takes_long=True)
        if self.runtime.rank == 0:
            for old in self._folder.glob("step-*"):
                if old != weights.folder:
                    shutil.rmtree(old, ignore_errors=True)  # else after the next update

    def _write(
        self, folder: Path, compute_digest: Callable[[Tensor], str] | None
    ) -> Mapping[str, str] | None:
        """Write the weights as an HF folder, or the adapter as a PEFT folder.

        Returns:
            The digests by tensor name, if they are wanted.
        Collectives: those of write_weight_files or write_adapter_files.
        """

        def prepare() -> None:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            shutil.rmtree(folder, ignore_errors=True)  # of an earlier attempt, from the same step

        run_on_rank0(prepare)
        if self._sync == "adapter":
            write_adapter_files(self.model, self.runtime, folder, self._serving.model)
            return None
        digests = write_weight_files(
            self.model, self.runtime, folder, self._serving.model, digest=compute_digest
        )
        return digests if compute_digest else None

    def _free_unused(self) -> None:
        """Give memory that no tensor uses to the servers, if they share this rank's GPU."""
        if self._is_colocated and self.runtime.device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def servers(self) -> Servers:
        """The servers, on rank 0 only."""
        assert self._servers is not None, "on rank 0 only"
        return self._servers

    def _make_servers(self, eos_token_ids: Sequence[int]) -> Servers:
        rollout, vllm = self._serving.rollout, self._serving.rollout.vllm
        if vllm.urls:
            key = os.environ.get(KEY_VARIABLE)
            servers = [Server(url, key) for url in vllm.urls]
        else:
            key = new_key()
            servers = [
                Server(
                    f"server {index}", key, start=partial(start_server, self._serving, key, index)
                )
                for index in range(vllm.servers)
            ]
        return Servers(
            servers,
            vllm,
            batch_size=rollout.batch_size,
            eos_token_ids=eos_token_ids,
            probe_ids=self._probe_ids,
            tolerance=vllm.probe_tolerance
            or default_tolerance(
                self.model.config.params_dtype,
                fp8=bool(self.model.config.fp8),
                experts=self.model.architecture.routing is not None,
            ),
        )

    def _make_scratch(self) -> Path | None:
        """Create a folder in memory for the weights, if every server and rank is on one machine.

        Returns:
            None if the weights are not written there.
        Collectives: an all-gather of objects and a broadcast over the job.
        """
        vllm = self._serving.rollout.vllm
        hosts = set(self.runtime.gather(socket.gethostname()))
        if self._sync == "nccl" or vllm.urls or vllm.weights_dir or len(hosts) > 1:
            return None
        return run_on_rank0(partial(memory_folder, self._weights_bytes()))

    def _weights_bytes(self) -> int:
        """Return the size of the folder that the servers load."""
        architecture, adapters = self.model.architecture, self.model.adapters
        count = architecture.num_parameters
        if adapters:
            count = sum(map(math.prod, adapter_shapes(architecture, adapters.spec).values()))
        return count * self.model.config.params_dtype.itemsize


def default_tolerance(dtype: torch.dtype, *, fp8: bool, experts: bool) -> float:
    """Return the default of rollout.vllm.probe_tolerance, in nats.

    Args:
        fp8: whether the trainer's matrix products run in FP8.
    """
    tolerance = _FP8_TOLERANCE if fp8 else _TOLERANCES[dtype]
    return tolerance * (_EXPERTS_FACTOR if experts else 1)


def memory_folder(num_bytes: int, memory: Path = MEMORY) -> Path | None:
    """Create a private folder in the machine's memory for two versions of the weights.

    Args:
        num_bytes: size of the weights.
        memory: folder whose files are in memory.
    Returns:
        None if there is no such folder, or it has too little room, which one line on stderr
        reports.
    """
    if not os.access(memory, os.W_OK):
        return None
    free = shutil.disk_usage(memory).free
    if free < 2 * num_bytes + _SLACK_BYTES:
        print(
            f"{memory} has {free / 1e9:.1f} GB free, and two versions of the weights need "
            f"{2 * num_bytes / 1e9:.1f} GB: the servers' weights are written to output_dir",
            file=sys.stderr,
        )
        return None
    return Path(tempfile.mkdtemp(prefix="aropd-", dir=memory))


class _VllmPending:
    """Pending of a batch that is sampled in the background for all data-parallel ranks."""

    def __init__(self, engine: VllmEngine, batches: Sequence[PromptBatch], share: slice):
        """
        Args:
            batches: one per data-parallel rank.
            share: positions of this rank's responses among those to all batches.
        """
        self._engine = engine
        self._batches = batches
        self._share = share
        self._on_progress = ignore
        self._future: Future[list[Rollout]] | None = None
        """Future of the responses, on rank 0 once sampling has begun."""

    def begin(self) -> bool:
        """Start to sample if the servers have the weights; return whether they have."""
        engine = self._engine
        if engine._trouble is not None:
            return False
        engine._in_flight.append(self)
        if engine.runtime.rank == 0:
            self._future = engine._begin(self._sample)
        return True

    def result(self, *, on_progress: Progress = ignore) -> list[Rollout]:
        """As Pending.result; progress is reported on rank 0 only.

        Collectives: broadcasts over the job; every rank must call it.
        """
        engine = self._engine
        # If the servers lacked the weights at `submit`, they may have later weights by now.
        if self not in engine._in_flight and not self.begin():
            assert engine._trouble is not None
            raise engine._trouble
        engine._in_flight.remove(self)
        self._on_progress = on_progress
        return run_on_rank0(self._wait, takes_long=True)[self._share]

    def _wait(self) -> list[Rollout]:
        assert self._future is not None, "on rank 0 only"
        while not wait([self._future], _STOP_SECONDS).done:
            if self._engine._should_stop():
                return []
        rollouts = self._future.result()
        if self._engine._is_colocated:
            self._engine.servers.sleep()
        return rollouts

    def _sample(self) -> list[Rollout]:
        engine = self._engine
        for batch in self._batches:
            batch.check(
                vocab_size=engine.model.vocab_size,
                max_sequence_length=engine.model.max_sequence_length,
            )
        return engine.servers.generate(
            [prompt for batch in self._batches for prompt in batch.prompts],
            [seed for batch in self._batches for seed in batch.seeds],
            self._batches[0].sampling,
            lambda num_done, num_all: self._on_progress(num_done, num_all),
        )
