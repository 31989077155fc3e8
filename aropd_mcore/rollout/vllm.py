"""The vLLM engine: servers sample, in processes of their own; the weights go to them."""

import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from aropd_mcore.config import ConfigError, SamplingConfig
from aropd_mcore.convert.folders import copy_companions, new_folder
from aropd_mcore.convert.hf_write import write_safetensors
from aropd_mcore.convert.tensor_bytes import TensorInfo
from aropd_mcore.mcore.logprobs import sequence_logprobs
from aropd_mcore.mcore.model import StageModel
from aropd_mcore.mcore.runtime import Runtime
from aropd_mcore.mcore.weights import gather_hf
from aropd_mcore.rollout.engine import RolloutFailed, check_prompts, never
from aropd_mcore.rollout.on_first import in_background, on_first_rank
from aropd_mcore.rollout.vllm_api import KEY_VARIABLE
from aropd_mcore.rollout.vllm_nccl import send_weights
from aropd_mcore.rollout.vllm_process import Serving, new_key, start_server
from aropd_mcore.rollout.vllm_servers import Servers, Weights
from aropd_mcore.rollout.vllm_side.aropd_digests import noted
from aropd_mcore.rollout.vllm_spread import Server
from aropd_mcore.types import Rollout

_TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Nats, where the config names none: several times what rounding leaves of a mean over tokens."""

_STOP_SECONDS = 1.0
"""How often it is asked whether to stop."""


class VllmEngine:
    """RolloutEngine over vLLM servers, which the run starts or finds at their URLs.

    The job's first rank alone talks to the servers, for all model replicas: so it knows every
    server's load, and what goes wrong goes wrong once. Every rank of the job must call `sync` and
    `generate`, each replica with prompts of its own.

    After each update the weights are gathered tensor by tensor, so that no rank ever holds the
    model whole, written as an HF folder that the servers load, or sent to them; and proved: trainer
    and servers score the same tokens. A response is only taken when the server says that these
    weights made it.
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
            model: this rank's shard, without DDP around it. Its weights are read by `sync`.
            eos_token_ids: any of them ends a response.
            probe_ids: a sequence of the run's kind, two tokens or more, for the proof of each sync.
            should_stop: asked on the first rank while responses are waited for. True: none are
                returned.
        Raises:
            ConfigError: rollout.vllm.sync is nccl, and there is no GPU.
        """
        self.model = model
        self.runtime = runtime
        self.weight_version = 0
        self.on_response: Callable[[int, int], None] = lambda num_done, num_all: None
        """Called on the first rank with how many responses there are, of how many."""
        self._serving = serving
        self._should_stop = should_stop
        vllm = serving.rollout.vllm
        self._folder = (vllm.weights_dir or serving.folder) / "vllm-weights"
        self._probe_ids = probe_ids
        self._trouble: RolloutFailed | None = None
        self.has_begun = False
        """Whether there are responses that `finish` has not fetched."""
        self._begun: Future[list[Rollout]] | None = None
        """On the first rank: those of all replicas."""
        self._share = slice(0)
        """This replica's among them."""
        self._servers: Servers | None = None
        if vllm.sync == "nccl" and runtime.device.type != "cuda":
            raise ConfigError(
                "rollout.vllm.sync: found nccl, which sends weights from GPU to GPU, and this run "
                "is on the CPU; expected disk"
            )
        if runtime.rank == 0:
            self._servers = self._make_servers(eos_token_ids)

    def sync(self, weight_version: int) -> None:
        """As RolloutEngine.sync. The first call starts the servers that are the run's own, and
        waits until all are up. What is being sampled with the weights before is waited for.

        Collectives: mcore.weights.gather_hf's, those of mcore.logprobs.sequence_logprobs, and
            broadcasts over the job.
        """
        if self.has_begun:
            on_first_rank(self._wait)
        self.weight_version = weight_version
        try:
            self._sync()
            self._trouble = None
        except RolloutFailed as failed:
            self._trouble = failed
        except (OSError, ValueError) as error:
            self._trouble = RolloutFailed(
                f"the weights of step {weight_version} could not be handed on: {error}"
            )

    def generate(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: SamplingConfig
    ) -> list[Rollout]:
        """As RolloutEngine.generate.

        Collectives: those of `begin` and of `finish`.
        """
        self.begin(prompts, seeds, sampling)
        return self.finish()

    def begin(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: SamplingConfig
    ) -> None:
        """Have the servers sample, and do not wait for it; arguments as RolloutEngine.generate.

        What goes wrong is raised by `finish`.

        Collectives: an all-gather over dp_group; every rank of the job must call it.
        """
        # All data-parallel ranks' calls, each known to every rank.
        calls = self.runtime.concatenate_over_data([(prompts, seeds)])
        start = sum(len(prompts) for prompts, _ in calls[: self.runtime.dp_rank])
        self._share = slice(start, start + len(prompts))
        self.has_begun = self._trouble is None
        if self.has_begun and self.runtime.rank == 0:
            self._begun = in_background(partial(self._generate, calls, sampling))

    def finish(self) -> list[Rollout]:
        """What `begin` has asked for, as RolloutEngine.generate gives it.

        Collectives: broadcasts over the job: all ranks must call.
        """
        if not self.has_begun:
            assert self._trouble is not None, "begin comes first"
            raise self._trouble
        self.has_begun = False
        return on_first_rank(self._wait_for_result)[self._share]

    def close(self) -> None:
        """End the servers that the run has started."""
        if self._servers:
            self._servers.close()

    def _wait(self) -> None:
        assert self._begun is not None, "on the first rank alone"
        wait([self._begun])

    def _wait_for_result(self) -> list[Rollout]:
        assert self._begun is not None, "on the first rank alone"
        while not wait([self._begun], _STOP_SECONDS).done:
            if self._should_stop():
                return []
        return self._begun.result()

    def _generate(
        self,
        calls: Sequence[tuple[Sequence[Sequence[int]], Sequence[int]]],
        sampling: SamplingConfig,
    ) -> list[Rollout]:
        for prompts, seeds in calls:
            check_prompts(
                prompts,
                seeds,
                sampling,
                vocab_size=self.model.vocab_size,
                max_sequence_length=self.model.max_sequence_length,
            )
        return self._first.generate(
            [prompt for prompts, _ in calls for prompt in prompts],
            [seed for _, seeds in calls for seed in seeds],
            sampling,
            lambda num_done, num_all: self.on_response(num_done, num_all),
        )

    def _sync(self) -> None:
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
            on_first_rank(lambda: self._first.prepare())
            # Labels are made on every rank; it is the first one's that counts.
            gather_hf(self.model, self.runtime, partial(self._send, weights.label, digests))
        else:
            gather_hf(self.model, self.runtime, partial(self._write, folder, digests))
        on_first_rank(lambda: self._first.sync(weights))
        if self.runtime.rank == 0:
            for old in self._folder.glob("step-*"):
                if old != weights.folder:
                    shutil.rmtree(old, ignore_errors=True)  # or the next time

    def _send(
        self, label: str, digests: dict[str, str] | None, tensors: Iterator[tuple[str, Tensor]]
    ) -> None:
        """On the first rank: the tensors to every server that is up."""
        send_weights(
            tensors if digests is None else noted(tensors, digests),
            self.model.architecture.hf_shapes,
            self.model.config.params_dtype,
            self._first,
            self.runtime.device,
            label=label,
            timeout=self._serving.rollout.vllm.request_timeout,
            digests=digests,
        )

    def _write(
        self, folder: Path, digests: dict[str, str] | None, tensors: Iterator[tuple[str, Tensor]]
    ) -> None:
        """On the first rank: the tensors as an HF folder, which appears when it is whole."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)  # of the run before, from the same step
        dtype = self.model.config.params_dtype
        shapes = self.model.architecture.hf_shapes
        infos = {name: TensorInfo(dtype, shape) for name, shape in shapes.items()}
        with new_folder(folder) as partial_folder:
            given = tensors if digests is None else noted(tensors, digests)
            write_safetensors(partial_folder, infos, given)
            copy_companions(self._serving.model, partial_folder, dtype)

    @property
    def _first(self) -> Servers:
        assert self._servers is not None, "on the first rank alone"
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
