#!/usr/bin/env bash
# rank.sh [--node] COMMAND...
#
# One rank of a step (with --node: the torchrun of a node): tells the command who it is, hands signals
# on to it, and writes how it ended if it is the first to fail. Slurm's jobs run it, in the container
# where there is one.
#
# With process tracking by cgroup a signal from Slurm reaches this script alone; with others, every
# process below it as well. So the command may be told twice.
set -uo pipefail
# shellcheck source=slurm/common.sh
source "$AROPD_HOME/slurm/common.sh"

if [[ ${1:-} == --node ]]; then
    shift
    export PET_NODE_RANK=$SLURM_NODEID # torchrun's --node-rank
    run_to_end "$@"
    exit
fi
if [[ $LAUNCHER == srun ]]; then # torchrun has set them otherwise
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=$RANKS_PER_NODE
fi
run_to_end "$@"
code=$?
((code == 0)) || first_exit "$code" "rank-$SLURM_PROCID"
exit "$code"
