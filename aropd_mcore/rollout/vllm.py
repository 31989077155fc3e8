"""The vLLM engine: server processes sample, and get new weights after each update."""

import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from aropd_mcore.config import ConfigError
from aropd_mcore.convert.folders import copy_companions, new_folder
from aropd_mcore.convert.hf_write import write_safetensors
from aropd_mcore.convert.tensor_bytes import TensorInfo
from aropd_mcore.mcore.logprobs import sequence_logprobs
from aropd_mcore.mcore.model import StageModel
from aropd_mcore.mcore.rank0 import in_background, run_on_rank0
from aropd_mcore.mcore.runtime import Runtime
from aropd_mcore.mcore.weights import gather_hf
from aropd_mcore.rollout.engine import (
    Pending,
    Progress,
    PromptBatch,
    RolloutFailed,
    ignore,
    never,
)
from aropd_mcore.rollout.vllm_api import KEY_VARIABLE
from aropd_mcore.rollout.vllm_nccl import send_weights
from aropd_mcore.rollout.vllm_process import Serving, new_key, start_server
from aropd_mcore.rollout.vllm_servers import Servers, Weights
from aropd_mcore.rollout.vllm_side.aropd_worker import noted
from aropd_mcore.rollout.vllm_spread import Server
from aropd_mcore.types import Rollout

_TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Default probe_tolerance by dtype, in nats: several times the effect of rounding on the mean."""

_STOP_SECONDS = 1.0
"""Interval at which rank 0 calls `should_stop` while it waits for responses."""


class VllmEngine:
    """RolloutEngine on vLLM servers, which the run starts or reaches at given URLs.

    Only rank 0 communicates with the servers, on behalf of all model replicas. So one process knows
    the load of every server, and an error occurs once. Every rank of the job must submit; replicas
    have different prompts.

    Batches are sampled in the background, one after another in the order of `submit`.

    After each update the weights are gathered tensor by tensor, so that no rank holds the whole
    model. They are written as an HF folder that the servers load, or are sent over NCCL. A probe
    then compares the log-probs of trainer and servers. A response is accepted only if the server
    reports that these weights produced it.
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
        self._folder = (vllm.weights_dir or serving.folder) / "vllm-weights"
        self._probe_ids = probe_ids
        self._trouble: RolloutFailed | None = None
        """Reason why the servers do not have the current weights."""
        self._in_flight: list[_VllmPending] = []
        """Batches that are being sampled and whose results were not taken yet."""
        self._last_future: Future[list[Rollout]] | None = None
        """Future of the last batch that was begun, on rank 0 only."""
        self._servers: Servers | None = None
        if vllm.sync == "nccl" and runtime.device.type != "cuda":
            raise ConfigError(
                "rollout.vllm.sync: found nccl, which sends weights from GPU to GPU, and this run "
                "is on the CPU; expected disk"
            )
        if runtime.rank == 0:
            self._servers = self._make_servers(eos_token_ids)

    def submit(self, batch: PromptBatch) -> Pending:
        """As RolloutEngine.submit; the servers start to sample.

        Collectives: an all-gather of objects over the job. Every rank must call it.
        """
        batches = self.runtime.concatenate_over_data([batch])
        start = sum(len(other.prompts) for other in batches[: self.runtime.dp_rank])
        pending = _VllmPending(self, batches, slice(start, start + len(batch.prompts)))
        pending.begin()
        return pending

    def update_weights(self, version: int) -> None:
        """As RolloutEngine.update_weights. The first call starts the run's servers and waits until
        all are up.

        Collectives: those of mcore.weights.gather_hf and mcore.logprobs.sequence_logprobs, and
            broadcasts over the job.
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
        """Stop the servers that the run has started."""
        if self._servers:
            self._servers.close()

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
        digests = {} if self._serving.rollout.vllm.checksums else None
        is_sent = self._serving.rollout.vllm.sync == "nccl"
        folder = (self._folder / f"step-{version:07d}").absolute()
        weights = Weights(
            version=version,
            label=f"{version}-{secrets.token_hex(4)}",
            folder=None if is_sent else folder,
            probe_logprobs=sequence_logprobs(self.model, self.runtime, self._probe_ids).tolist(),
            digests=digests,
        )
        if is_sent:
            run_on_rank0(lambda: self.servers.prepare(), takes_long=True)
            # Every rank makes a label; only rank 0's is used.
            gather_hf(self.model, self.runtime, partial(self._send, weights.label, digests))
        else:
            gather_hf(self.model, self.runtime, partial(self._write, folder, digests))
        run_on_rank0(lambda: self.servers.sync(weights), takes_long=True)
        if self.runtime.rank == 0:
            for old in self._folder.glob("step-*"):
                if old != weights.folder:
                    shutil.rmtree(old, ignore_errors=True)  # else after the next update

    def _send(
        self, label: str, digests: dict[str, str] | None, tensors: Iterator[tuple[str, Tensor]]
    ) -> None:
        """Send the tensors to every server that is up. On rank 0."""
        send_weights(
            tensors if digests is None else noted(tensors, digests),
            self.model.architecture.hf_shapes,
            self.model.config.params_dtype,
            self.servers,
            self.runtime.device,
            label=label,
            timeout=self._serving.rollout.vllm.request_timeout,
            digests=digests,
        )

    def _write(
        self, folder: Path, digests: dict[str, str] | None, tensors: Iterator[tuple[str, Tensor]]
    ) -> None:
        """Write the tensors as an HF folder, which appears when it is complete. On rank 0."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier attempt, from the same step
        dtype = self.model.config.params_dtype
        shapes = self.model.architecture.hf_shapes
        infos = {name: TensorInfo(dtype, shape) for name, shape in shapes.items()}
        with new_folder(folder) as partial_folder:
            given = tensors if digests is None else noted(tensors, digests)
            write_safetensors(partial_folder, infos, given)
            copy_companions(self._serving.model, partial_folder, dtype)

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
            tolerance=vllm.probe_tolerance or _TOLERANCES[self.model.config.params_dtype],
        )


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
        return self._future.result()

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
