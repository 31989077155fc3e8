#!/usr/bin/env bash
# server.sh CONFIG [section.key=value ...]
#
# One vLLM server of serve_and_train.sbatch: its share of the node's GPUs, a port of its own.
set -euo pipefail

devices='[]' # without GPUs, or where nobody says which there are: what it sees
if [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then
    IFS=, read -ra gpus <<<"$CUDA_VISIBLE_DEVICES"
    count=$((${#gpus[@]} / SERVERS_PER_NODE))
    ((count > 0)) || {
        echo "SERVERS_PER_NODE: $SERVERS_PER_NODE servers cannot share ${#gpus[@]} GPUs" >&2
        exit 2
    }
    mine=("${gpus[@]:SLURM_LOCALID * count:count}")
    devices="[\"$(IFS=, && echo "${mine[*]}")\"]"
fi
exec aropd serve "$@" "rollout.vllm.urls=[]" rollout.vllm.servers=1 \
    "rollout.vllm.devices=$devices" rollout.vllm.host=0.0.0.0 \
    rollout.vllm.port="$((VLLM_PORT + SLURM_LOCALID))"
