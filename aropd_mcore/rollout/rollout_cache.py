"""Responses of the steps since the last checkpoint, kept on disk for a resumed run.

    rollouts/step_0000012.rank_0003.json    checksum and responses of one data-parallel rank

A resumed run trains the steps since its checkpoint on the same responses. In the first of these
steps its weights are the weights that sampled the responses. In later steps its weights repeat
those of the interrupted run up to rounding, and bit for bit on a CPU in the same layout.
"""

import json
import os
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from aropd_mcore.mcore.runtime import Runtime
from aropd_mcore.types import Rollout


class RolloutCache:
    """Responses by step and seed, independent of the layout that sampled them."""

    def __init__(self, folder: Path, run_hash: str, runtime: Runtime):
        """
        Args:
            folder: created by the first write.
            run_hash: hash of the configuration; responses of another configuration are ignored.
        Collectives: a broadcast; every rank must call it.
        """
        self._folder = folder
        self._run_hash = run_hash
        self._runtime = runtime
        steps = [sorted({_step_number(path) for path in folder.glob("step_*.json")})]
        dist.broadcast_object_list(steps, src=0)
        self.steps = set(steps[0])
        """Steps of an earlier attempt that were not read yet; the same on every rank."""

    def read(
        self,
        step: int,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        versions: range,
    ) -> list[Rollout] | None:
        """Read this rank's responses of a step.

        Args:
            versions: versions of the weights that may have sampled the responses.
        Returns:
            None unless the responses of every rank are there and belong to this run.
        Collectives: an all-reduce and a barrier over the job, on the CPU, if `steps` has the step.
        """
        if step not in self.steps:
            return None
        self.steps.remove(step)
        rollouts = self._read(step, prompts, seeds, versions)
        is_complete = torch.tensor(int(rollouts is not None))
        dist.all_reduce(is_complete, dist.ReduceOp.MIN)
        if is_complete:
            return rollouts
        if self._runtime.rank == 0:
            self._remove(lambda other: other == step)
        dist.barrier()  # before a rank writes the same files again
        return None

    def write(
        self,
        step: int,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        rollouts: Sequence[Rollout],
    ) -> None:
        """Write this data-parallel rank's responses, on the first rank of its replica.

        A failed write is only reported: a resumed run then samples the responses again.
        """
        runtime = self._runtime
        if runtime.tp_rank or runtime.pp_rank or runtime.cp_rank:
            return
        records = [
            [seed, _hash(prompt), r.response_ids, r.logprobs, r.finished, r.weight_version]
            for prompt, seed, r in zip(prompts, seeds, rollouts, strict=True)
        ]
        text = json.dumps({"run": self._run_hash, "rollouts": records})
        path = self._folder / f"step_{step:07d}.rank_{runtime.dp_rank:04d}.json"
        temporary = path.with_suffix(".partial")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with temporary.open("w") as file:
                file.write(f"{zlib.crc32(text.encode()):08x}\n{text}\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError as error:
            print(f"aropd: rank {runtime.rank} cannot keep rollouts: {error}", file=sys.stderr)

    def forget(self, *, before: int) -> None:
        """Remove the responses of steps before `before`, which a checkpoint includes."""
        self.steps = {step for step in self.steps if step >= before}
        if self._runtime.rank == 0:
            self._remove(lambda step: step < before)

    def _read(
        self,
        step: int,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        versions: range,
    ) -> list[Rollout] | None:
        records: dict[int, list[Any]] = {}
        for path in self._folder.glob(f"step_{step:07d}.*.json"):
            try:
                checksum, _, text = path.read_text().partition("\n")
                text = text.removesuffix("\n")
                if int(checksum, 16) != zlib.crc32(text.encode()):
                    return None
            except (OSError, ValueError):
                return None
            content = json.loads(text)
            if content["run"] == self._run_hash:
                records |= {record[0]: record[1:] for record in content["rollouts"]}
        rollouts = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            prompt_hash, ids, logprobs, finished, version = records.get(seed, [None] * 5)
            if prompt_hash != _hash(prompt) or version not in versions:
                return None
            rollouts.append(Rollout(tuple(ids), tuple(logprobs), finished, version))
        return rollouts

    def _remove(self, is_removed: Callable[[int], bool]) -> None:
        for path in self._folder.glob("step_*"):
            if is_removed(_step_number(path)):
                path.unlink(missing_ok=True)


def _step_number(path: Path) -> int:
    return int(path.name.removeprefix("step_").partition(".")[0])


def _hash(prompt: Sequence[int]) -> int:
    return zlib.crc32(json.dumps(list(prompt)).encode())
