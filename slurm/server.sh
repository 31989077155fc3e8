#!/usr/bin/env bash
# server.sh CONFIG [--preset NAME] [section.key=value ...]
#
# Start one vLLM server of serve_and_train.sbatch, with its share of the node's GPUs and its own port. It
# ends with the job. If it ends earlier, its exit code is recorded at once, before training fails.
set -uo pipefail
# shellcheck source=slurm/common.sh
source "$AROPD_HOME/slurm/common.sh"

devices='[]' # without CUDA_VISIBLE_DEVICES: all devices that the process sees
if [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then
    IFS=, read -ra gpus <<<"$CUDA_VISIBLE_DEVICES"
    count=$((${#gpus[@]} / SERVERS_PER_NODE))
    if ((count == 0)); then
        first_exit 2 "server-$SLURM_PROCID"
        fail "SERVERS_PER_NODE: found $SERVERS_PER_NODE, expected at most the node's ${#gpus[@]} GPUs"
    fi
    server_gpus=("${gpus[@]:SLURM_LOCALID * count:count}")
    devices="[\"$(IFS=, && echo "${server_gpus[*]}")\"]"
fi
run_to_end aropd serve "$@" "rollout.vllm.urls=[]" rollout.vllm.servers=1 \
    "rollout.vllm.devices=$devices" rollout.vllm.host=0.0.0.0 \
    rollout.vllm.port="$((VLLM_PORT + SLURM_LOCALID))"
code=$?
first_exit $((code ? code : 1)) "server-$SLURM_PROCID"
exit 1
