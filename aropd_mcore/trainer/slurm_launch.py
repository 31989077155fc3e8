"""A run as a Slurm job: the sbatch command of `slurm/`'s scripts, checked before it is sent."""

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from aropd_mcore.config import Config, ConfigError
from aropd_mcore.plan.layout import Layout, plan
from aropd_mcore.trainer.preflight import preflight

HOME = Path(__file__).resolve().parents[2]
"""The repository, where the package was installed from it in place."""


@dataclass(frozen=True)
class Launch:
    """A job that could be submitted."""

    command: list[str]
    environment: dict[str, str]
    """What the scripts read, beside what is in the environment already."""
    script: Path
    layout: Layout

    def __str__(self) -> str:
        """As one would type it."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*variables, shlex.join(self.command)])

    def submit(self) -> int:
        """Hand it to Slurm: sbatch's exit code.

        Raises:
            ValueError: there is no sbatch on this machine.
        """
        try:
            return subprocess.run(self.command, env=os.environ | self.environment).returncode
        except FileNotFoundError as error:
            raise ValueError("sbatch is not on PATH: is this a login node?") from error


def check_inputs(config: Config, environment: Mapping[str, str] = os.environ) -> list[str]:
    """Check here what the job will open there; the job runs in this working directory.

    Optional packages are checked only if the job uses this interpreter. Mounts that rename folders
    hide the job's files from this machine, so nothing is checked then.

    Returns:
        What was found, one sentence each.
    Raises:
        ValueError: The run could not start.
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
    """The job of a run.

    Args:
        config: what `arguments`, the YAML file and its overrides, load as.
        num_nodes: of the job.
        num_vllm_nodes: those among them that serve; the others train. 0: all train.
        gpus_per_node: 0 on nodes without; ranks on a node unless the environment's RANKS_PER_NODE
            says otherwise.
        sbatch_options: such as --partition=gpu; they come last, and so they win.
    Raises:
        ConfigError: num_vllm_nodes leaves no node to train, sbatch_options change the working
            directory, or the package is not in its repository.
        ValueError: the layout does not fit that many ranks.
    """
    if not 0 <= num_vllm_nodes < num_nodes:
        raise ConfigError(
            f"--vllm-nodes {num_vllm_nodes}: expected 0 to {num_nodes - 1} of {num_nodes} nodes"
        )
    for option in sbatch_options:
        if option.startswith(("--chdir", "-D")):
            raise ConfigError(
                f"sbatch option {option}: paths in the config are relative to this working "
                "directory; call `aropd launch` in the other folder instead"
            )
    script = HOME / "slurm" / ("serve_and_train.sbatch" if num_vllm_nodes else "train.sbatch")
    if not script.is_file():
        raise ConfigError(
            f"{script} is absent; the job scripts are in the repository: install the package from "
            "a clone of it, by `pip install -e .`"
        )
    ranks_per_node = int(environment.get("RANKS_PER_NODE") or gpus_per_node or 1)
    layout = plan(config, (num_nodes - num_vllm_nodes) * ranks_per_node)
    variables = {"AROPD_HOME": str(HOME), "RANKS_PER_NODE": str(ranks_per_node)}
    if not environment.get("CONTAINER_IMAGE"):
        variables["VENV"] = _job_venv(environment)
    if num_vllm_nodes:
        variables["VLLM_NODES"] = str(num_vllm_nodes)
    command = [
        "sbatch",
        # Jobs of one name run one after another: those that write to the same folder.
        f"--job-name=aropd-{config.output_dir.name}",
        f"--nodes={num_nodes}",
        f"--gpus-per-node={gpus_per_node}",
        *sbatch_options,
        str(script),
        *arguments,
    ]
    return Launch(command, variables, script, layout)
