#!/usr/bin/env bash
# server.sh CONFIG [--preset NAME] [section.key=value ...]
#
# One vLLM server of serve_and_train.sbatch: its share of the node's GPUs, a port of its own. It ends
# with the job; should it end before, that is written down at once, before training misses it.
set -uo pipefail
# shellcheck source=slurm/common.sh
source "$AROPD_HOME/slurm/common.sh"

devices='[]' # without GPUs, or where nobody says which there are: what it sees
if [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then
    IFS=, read -ra gpus <<<"$CUDA_VISIBLE_DEVICES"
    count=$((${#gpus[@]} / SERVERS_PER_NODE))
    if ((count == 0)); then
        first_exit 2 "server-$SLURM_PROCID"
        fail "SERVERS_PER_NODE: $SERVERS_PER_NODE servers cannot share ${#gpus[@]} GPUs"
    fi
    mine=("${gpus[@]:SLURM_LOCALID * count:count}")
    devices="[\"$(IFS=, && echo "${mine[*]}")\"]"
fi
run_to_end aropd serve "$@" "rollout.vllm.urls=[]" rollout.vllm.servers=1 \
    "rollout.vllm.devices=$devices" rollout.vllm.host=0.0.0.0 \
    rollout.vllm.port="$((VLLM_PORT + SLURM_LOCALID))"
code=$?
first_exit $((code ? code : 1)) "server-$SLURM_PROCID"
exit 1
