"""Submission of a run as a Slurm job, with the scripts in `slurm/`."""

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from aropd_mcore.config import Config, ConfigError
from aropd_mcore.plan.gpu_share import check_rank_gpus
from aropd_mcore.plan.layout import Layout, plan
from aropd_mcore.trainer.preflight import preflight

HOME = Path(__file__).resolve().parents[2]
"""Root of the repository, if the package is an editable install of it."""


@dataclass(frozen=True)
class Launch:
    """A Slurm job, ready to be submitted."""

    command: list[str]
    environment: dict[str, str]
    """Variables for the job scripts, in addition to the current environment."""
    script: Path
    layout: Layout

    def __str__(self) -> str:
        """Format the job as a shell command."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*variables, shlex.join(self.command)])

    def submit(self) -> int:
        """Submit the job. Returns the exit code of sbatch.

        Raises:
            ValueError: sbatch is not installed on this machine.
        """
        try:
            return subprocess.run(self.command, env=os.environ | self.environment).returncode
        except FileNotFoundError as error:
            raise ValueError(
                "sbatch is not on PATH; call `aropd launch` on a login node"
            ) from error


def check_inputs(config: Config, environment: Mapping[str, str] = os.environ) -> list[str]:
    """Check on this machine what the job will open. The job runs in the current working directory.

    Optional packages are checked only if the job uses this interpreter. If CONTAINER_MOUNTS renames
    folders, nothing is checked, since the job's paths do not exist on this machine.

    Returns:
        Summary and notes, one sentence each.
    Raises:
        ValueError: the run could not start.
    """
    mounts = environment.get("CONTAINER_MOUNTS", "") if environment.get("CONTAINER_IMAGE") else ""
    for mount in filter(None, mounts.split(",")):
        source, _, target = mount.partition(":")
        if target.partition(":")[0] not in ("", source):
            return [f"data and weights are not checked: CONTAINER_MOUNTS renames {source}"]
    is_same = Path(_job_venv(environment)).resolve() == Path(sys.prefix).resolve()
    is_same = is_same and not environment.get("CONTAINER_IMAGE")
    return preflight(config, same_environment=is_same)


def _job_venv(environment: Mapping[str, str]) -> str:
    return environment.get("VENV") or sys.prefix


def build_launch(
    config: Config,
    arguments: Sequence[str],
    *,
    num_nodes: int,
    num_vllm_nodes: int,
    gpus_per_node: int,
    sbatch_options: Sequence[str] = (),
    environment: Mapping[str, str] = os.environ,
) -> Launch:
    """Build the Slurm job of a run.

    Args:
        config: configuration loaded from `arguments`.
        arguments: command line of the run: the YAML file and its overrides.
        num_nodes: number of nodes of the job.
        num_vllm_nodes: number of these nodes that run vLLM servers. The others train.
        gpus_per_node: number of GPUs per node, 0 on nodes without. Also the number of ranks per
            node, unless the environment has RANKS_PER_NODE.
        sbatch_options: options such as --partition=gpu. They come last, so they take precedence.
    Raises:
        ConfigError: num_vllm_nodes leaves no node for training, a rank would use a GPU of
            rollout.vllm.devices, sbatch_options change the working directory, or the package is not
            installed from a clone of its repository.
        ValueError: the layout does not fit the number of ranks.
    """
    if not 0 <= num_vllm_nodes < num_nodes:
        raise ConfigError(
            f"--vllm-nodes {num_vllm_nodes}: expected 0 to {num_nodes - 1} of {num_nodes} nodes"
        )
    for option in sbatch_options:
        if option.startswith(("--chdir", "-D")):
            raise ConfigError(
                f"sbatch option {option}: changes the working directory, to which the paths in the "
                "config are relative; call `aropd launch` in the other folder instead"
            )
    script = HOME / "slurm" / ("serve_and_train.sbatch" if num_vllm_nodes else "train.sbatch")
    if not script.is_file():
        raise ConfigError(
            f"{script} is missing; the job scripts are in the repository: install the package from "
            "a clone, with `pip install -e .`"
        )
    ranks_per_node = int(environment.get("RANKS_PER_NODE") or gpus_per_node or 1)
    if not num_vllm_nodes and gpus_per_node:
        check_rank_gpus(
            config.rollout,
            {rank: str(rank) for rank in range(ranks_per_node)},
            remedy="set RANKS_PER_NODE so that ranks use only the first GPUs, or use --vllm-nodes",
        )
    layout = plan(config, (num_nodes - num_vllm_nodes) * ranks_per_node)
    variables = {"AROPD_HOME": str(HOME), "RANKS_PER_NODE": str(ranks_per_node)}
    if not environment.get("CONTAINER_IMAGE"):
        variables["VENV"] = _job_venv(environment)
    if num_vllm_nodes:
        variables["VLLM_NODES"] = str(num_vllm_nodes)
    command = [
        "sbatch",
        # Jobs of the same name run one after another, so those with the same output_dir do.
        f"--job-name=aropd-{config.output_dir.name}",
        f"--nodes={num_nodes}",
        f"--gpus-per-node={gpus_per_node}",
        *sbatch_options,
        str(script),
        *arguments,
    ]
    return Launch(command, variables, script, layout)
