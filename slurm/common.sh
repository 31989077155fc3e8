# shellcheck shell=bash
# Functions that the job scripts of this folder share. Sourcing this file starts nothing.
#
# An attempt is one start of a job: the first start, and one after each requeue. Settings are
# environment variables, which sbatch passes to the job:
#
#   AROPD_HOME        the repository (default: the folder in which sbatch was called)
#   VENV              virtual environment with `aropd` (default: `aropd` is on PATH)
#   CONTAINER_IMAGE   pyxis/enroot image with `aropd`, in place of VENV: a .sqsh file or
#                     registry#image:tag (default: no container)
#   CONTAINER_MOUNTS  further mounts, /from:/to[,/from:/to] (default: only AROPD_HOME, LOG_DIR and the
#                     working directory, under the same paths)
#   LAUNCHER          srun: one task per rank; torchrun: one task per node, whose torchrun starts the
#                     ranks (default: srun)
#   RANKS_PER_NODE    number of ranks per node (default: the job's GPUs per node, or 1)
#   CPUS_PER_RANK     number of CPUs per rank (default: the job's CPUs per node / RANKS_PER_NODE)
#   MASTER_ADDR       host of the ranks' rendezvous (default: the first node that trains)
#   MASTER_PORT       port of the ranks' rendezvous (default: derived from the job's number)
#   LOG_DIR           folder of logs; an attempt's are in LOG_DIR/JOB/attempt-N (default: logs, in the
#                     folder in which sbatch was called)
#   MAX_RESTARTS      number of restarts after consecutive crashes and hangs (default: 3); attempts
#                     that saved and stopped do not count
set -uo pipefail

# ---------------------------------------------------------------- messages in the job's log

say() { echo "aropd-slurm: $(date '+%F %T') $*"; }

fail() { # MESSAGE: end the job with the exit code of invalid input, after which it is not restarted
    say "error: $*" >&2
    exit 2
}

need_file() { # NAME PATH
    [[ -n $2 ]] || fail "$1: expected a path, found none; see the head of this script"
    [[ -f $2 ]] || fail "$1: there is no file $2 (relative to $PWD on $(hostname)); correct the path"
}

# ---------------------------------------------------------------- the attempt

start_attempt() { # Set the variables that every step of the job needs.
    export AROPD_HOME="${AROPD_HOME:-$SLURM_SUBMIT_DIR}"
    export ATTEMPT="${SLURM_RESTART_COUNT:-0}"
    LOG_DIR="${LOG_DIR:-$SLURM_SUBMIT_DIR/logs}"
    JOB_LOGS="$LOG_DIR/$SLURM_JOB_ID"
    export ATTEMPT_DIR="$JOB_LOGS/attempt-$ATTEMPT"
    mkdir -p "$ATTEMPT_DIR" || fail "LOG_DIR: cannot write to $LOG_DIR; set another folder"

    export LAUNCHER="${LAUNCHER:-srun}"
    [[ $LAUNCHER == srun || $LAUNCHER == torchrun ]] ||
        fail "LAUNCHER: found $LAUNCHER, expected srun or torchrun"
    export RANKS_PER_NODE="${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}"
    ((RANKS_PER_NODE > 0)) || RANKS_PER_NODE=1 # SLURM_GPUS_ON_NODE is 0
    MAX_RESTARTS="${MAX_RESTARTS:-3}"

    CONTAINER=()
    if [[ -n ${CONTAINER_IMAGE:-} ]]; then
        local mounts="$AROPD_HOME:$AROPD_HOME,$LOG_DIR:$LOG_DIR,$PWD:$PWD"
        CONTAINER=(
            "--container-image=$CONTAINER_IMAGE"
            "--container-mounts=$mounts${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}"
            "--container-workdir=$PWD"
        )
    else
        [[ -z ${VENV:-} ]] || export PATH="$VENV/bin:$PATH"
        command -v aropd >/dev/null ||
            fail "aropd is not on PATH; set VENV to its virtual environment or CONTAINER_IMAGE"
    fi

    # Slurm sets the job's start and end time from version 23.02 on. A run saves before the end.
    export_time SLURM_JOB_START_TIME %S
    export_time SLURM_JOB_END_TIME %e
    say "job $SLURM_JOB_ID, attempt $ATTEMPT, on $SLURM_JOB_NODELIST; logs: $ATTEMPT_DIR"
}

export_time() { # NAME FORMAT-OF-SQUEUE: export a time in seconds since 1970, unless Slurm set it
    local time
    [[ -z ${!1:-} ]] || return 0
    time=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format="$2")
    # A job without a limit has NONE or similar, which is not a date.
    time=$(date --date="$time" +%s 2>/dev/null) && export "$1=$time"
}

# Set variables of NCCL and PyTorch. Values that are set already remain. Each rank sets
# CUDA_DEVICE_MAX_CONNECTIONS and the allocator's settings itself (aropd_mcore/environment.py).
set_environment() {
    # srun leaves it unset. Each rank would then start one thread per core of the node.
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$CPUS_PER_RANK}"
    # NCCL is silent by default. With WARN it names the node and network device that fail.
    export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
    # When a collective times out, every rank writes its last collectives. By default some versions of
    # PyTorch record none, and the files go to /tmp of the node.
    export TORCH_NCCL_DUMP_ON_TIMEOUT="${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}"
    export TORCH_FR_BUFFER_SIZE="${TORCH_FR_BUFFER_SIZE:-2000}"
    export TORCH_FR_DUMP_TEMP_FILE="$ATTEMPT_DIR/nccl-trace-"
    # Not set: NCCL_SOCKET_IFNAME and NCCL_IB_HCA. NCCL detects the network. If it chooses the wrong
    # one (NCCL_DEBUG=INFO prints it), set them for the site.
    # Not set: GLOO_SOCKET_IFNAME. gloo binds to the address of the node's host name. If that is
    # 127.0.1.1 or a slow network, set the variable for the site (docs/slurm.md).
    # Not set: TORCH_NCCL_ASYNC_ERROR_HANDLING. By default a failed collective ends its process.
}

first_exit() { # CODE NAME: record the exit code of the first process that failed
    # noclobber: only the first process creates the file.
    (set -o noclobber && echo "$1 $2 $(hostname)" >"$ATTEMPT_DIR/first-exit") 2>/dev/null
}

# ---------------------------------------------------------------- one step of ranks

step_of_ranks() { # NODES COMMAND...: set STEP to the srun that runs COMMAND for every rank on NODES
    local list="$1" nodes
    shift
    nodes=$(wc --words <<<"${list//,/ }")
    CPUS_PER_RANK="${CPUS_PER_RANK:-$((SLURM_CPUS_ON_NODE / RANKS_PER_NODE))}"
    ((CPUS_PER_RANK > 0)) || CPUS_PER_RANK=1
    set_environment
    export MASTER_ADDR="${MASTER_ADDR:-${list%%,*}}"
    # The port differs between jobs that share a node, and is below the system's ephemeral ports.
    export MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}"
    export WORLD_SIZE=$((nodes * RANKS_PER_NODE))

    local tasks=$RANKS_PER_NODE cpus=$CPUS_PER_RANK
    local -a task=(bash "$AROPD_HOME/slurm/rank.sh")
    if [[ $LAUNCHER == torchrun ]]; then
        # torchrun forwards a signal to its ranks, and gives them this time to save before it kills them.
        export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-900}"
        task=(
            "${task[@]}" --node
            torchrun --nnodes="$nodes" --nproc-per-node="$RANKS_PER_NODE"
            --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT"
            "--signals-to-handle=SIGUSR1,SIGTERM,SIGINT,SIGHUP,SIGQUIT"
            --no-python "${task[@]}"
        )
        tasks=1 cpus=$((CPUS_PER_RANK * RANKS_PER_NODE))
    fi
    # shellcheck disable=SC2034 # the scripts run it
    STEP=(
        srun --nodes="$nodes" --nodelist="$list" --ntasks-per-node="$tasks"
        --cpus-per-task="$cpus"
        # A rank that fails ends the others, which would wait for it.
        --kill-on-bad-exit=1
        "--output=$ATTEMPT_DIR/rank-%t.log" --open-mode=append
        "${CONTAINER[@]}" "${task[@]}" "$@"
    )
    say "${nodes} nodes x $RANKS_PER_NODE ranks ($LAUNCHER): $*"
    say "follow rank 0: tail -f '$ATTEMPT_DIR/rank-0.log'"
}

nodes_of_job() { # print the job's nodes, one per line
    scontrol show hostnames "$SLURM_JOB_NODELIST"
}

# ---------------------------------------------------------------- signals

INTERRUPTED='' # not empty: a signal to stop has arrived
CHILD=''

pass_on() { # forward a signal as USR1, which srun forwards to its tasks; with TERM srun would kill them
    INTERRUPTED=1
    [[ -z $CHILD ]] || kill -USR1 "$CHILD" 2>/dev/null
}

# COMMAND...: run it to its end and return its exit code. USR1 and TERM reach it as USR1. If a command
# ends in the instant of a signal, bash loses its exit code and returns 255.
run_to_end() {
    trap pass_on USR1 TERM
    "$@" &
    CHILD=$!
    [[ -z $INTERRUPTED ]] || kill -USR1 "$CHILD" 2>/dev/null # the signal came before the child
    # A trapped signal ends `wait`, but not the child.
    wait "$CHILD"
    while kill -0 "$CHILD" 2>/dev/null; do wait "$CHILD"; done
    local code=0
    wait "$CHILD" || code=$?
    CHILD=''
    return "$code"
}

# ---------------------------------------------------------------- after the step

finish() { # CODE of the step: end the job, or requeue it
    local code=$1 name=rank-0 host='?'
    # The code of srun is the highest of all ranks, including those that srun killed. The cause is in
    # the code of the rank that failed first.
    [[ ! -s $ATTEMPT_DIR/first-exit ]] || read -r code name host <"$ATTEMPT_DIR/first-exit"
    case $code in
        0)
            say "complete"
            exit 0
            ;;
        2 | 3)
            show_end "$name"
            say "$name ($host) ended with $code, which a restart cannot fix: correct the cause above and submit again"
            exit "$code"
            ;;
        75) say "saved and stopped early" ;;
        4) count_failure "$code" "$name ($host) hung" "$name" ;;
        *)
            if [[ -n $INTERRUPTED && $name == rank-* ]]; then
                say "stopped by a signal before a checkpoint could be saved (exit code $code)"
            else
                count_failure "$code" "$name ($host) ended with $code" "$name"
            fi
            ;;
    esac
    requeue "$code"
}

show_end() { # NAME: print the end of a log of this attempt
    local log="$ATTEMPT_DIR/$1.log"
    [[ ! -s $log ]] || { say "the end of $log:" && tail --lines=30 "$log"; }
}

count_failure() { # CODE MESSAGE NAME-OF-LOG: count a failure, and end the job after too many in a row
    local failures=0 attempt
    show_end "$3"
    touch "$ATTEMPT_DIR/failed"
    for ((attempt = ATTEMPT; attempt >= 0; attempt--)); do
        [[ -e $JOB_LOGS/attempt-$attempt/failed ]] || break
        ((failures += 1))
    done
    say "$2: failure $failures in a row, and MAX_RESTARTS is $MAX_RESTARTS"
    if ((failures > MAX_RESTARTS)); then
        say "given up after $failures failures in a row: fix the cause above and submit again to resume"
        exit "$1"
    fi
}

requeue() { # CODE: requeue the job; if Slurm does not, end it with CODE
    local state
    state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)
    if [[ $state != RUNNING ]]; then
        # The job was cancelled, preempted or timed out. Slurm decides whether it is requeued.
        say "not requeued: Slurm is ending the job ($state)"
        exit "$1"
    fi
    say "requeueing the job"
    if ! scontrol requeue "$SLURM_JOB_ID"; then
        say "Slurm did not requeue the job: submit it again to resume, unless a chained job follows"
        exit "$1"
    fi
    sleep 60 # Slurm ends this script
    exit "$1"
}
