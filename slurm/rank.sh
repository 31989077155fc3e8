#!/usr/bin/env bash
# rank.sh [--node] COMMAND...
#
# Run COMMAND as one rank of a step (with --node: as the torchrun of a node). Sets the variables of its
# rank, forwards signals to it, and records its exit code if it is the first rank to fail. srun starts
# this script, in the container if there is one.
#
# With process tracking by cgroup, a signal from Slurm reaches only this script. With other tracking it
# also reaches every process below. So the command may receive a signal twice.
set -uo pipefail
# shellcheck source=slurm/common.sh
source "$AROPD_HOME/slurm/common.sh"

if [[ ${1:-} == --node ]]; then
    shift
    export PET_NODE_RANK=$SLURM_NODEID # torchrun's --node-rank
    run_to_end "$@"
    exit
fi
if [[ $LAUNCHER == srun ]]; then # torchrun sets these itself
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=$RANKS_PER_NODE
fi
run_to_end "$@"
code=$?
((code == 0)) || first_exit "$code" "rank-$SLURM_PROCID"
exit "$code"
