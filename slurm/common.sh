# shellcheck shell=bash
# What the job scripts of this folder share; they read it in, it does nothing by itself.
#
# An attempt is one start of a job: the first, and one after each time that Slurm took it back into
# the queue. Knobs, environment variables all (sbatch hands them to the job):
#
#   AROPD_HOME        the repository (default: the folder that sbatch was called in)
#   VENV              virtual environment that has `aropd` (default: what PATH has)
#   CONTAINER_IMAGE   pyxis/enroot image that has `aropd`, in place of VENV: a .sqsh file or
#                     registry#image:tag (default: no container)
#   CONTAINER_MOUNTS  more mounts, /from:/to[,/from:/to] (default: only AROPD_HOME, LOG_DIR and the
#                     working directory, under their own names)
#   LAUNCHER          srun: a task a rank; torchrun: a task a node, whose torchrun starts the ranks
#                     (default: srun)
#   RANKS_PER_NODE    (default: the GPUs that the job has on a node, or 1)
#   CPUS_PER_RANK     (default: a rank's share of the node's CPUs that the job has)
#   MASTER_ADDR       where the ranks meet (default: the name of the first node that trains)
#   MASTER_PORT       (default: one that follows from the job's number)
#   LOG_DIR           an attempt's logs go to LOG_DIR/JOB/attempt-N (default: logs, where sbatch was
#                     called)
#   MAX_RESTARTS      crashes and hangs in a row after which the job is given up (default: 3);
#                     attempts that saved and stopped are not counted
set -uo pipefail

# ---------------------------------------------------------------- words to the job's own log

say() { echo "aropd-slurm: $(date '+%F %T') $*"; }

fail() { # what cannot go on, and could not after a restart either: the exit code of bad input
    say "error: $*" >&2
    exit 2
}

need_file() { # NAME PATH
    [[ -n $2 ]] || fail "$1: none is given; see the head of this script"
    [[ -f $2 ]] || fail "$1: there is no file $2 (relative to $PWD on $(hostname))"
}

# ---------------------------------------------------------------- the attempt

start_attempt() { # Sets what every step of the job needs.
    export AROPD_HOME="${AROPD_HOME:-$SLURM_SUBMIT_DIR}"
    export ATTEMPT="${SLURM_RESTART_COUNT:-0}"
    LOG_DIR="${LOG_DIR:-$SLURM_SUBMIT_DIR/logs}"
    JOB_LOGS="$LOG_DIR/$SLURM_JOB_ID"
    export ATTEMPT_DIR="$JOB_LOGS/attempt-$ATTEMPT"
    mkdir -p "$ATTEMPT_DIR" || fail "LOG_DIR: cannot write to $LOG_DIR"

    export LAUNCHER="${LAUNCHER:-srun}"
    [[ $LAUNCHER == srun || $LAUNCHER == torchrun ]] ||
        fail "LAUNCHER: expected srun or torchrun, found $LAUNCHER"
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

    # Slurm says when the job began and ends from 23.02 on; a run saves before that, in time.
    export_time SLURM_JOB_START_TIME %S
    export_time SLURM_JOB_END_TIME %e
    say "job $SLURM_JOB_ID, attempt $ATTEMPT, on $SLURM_JOB_NODELIST; logs: $ATTEMPT_DIR"
}

export_time() { # NAME FORMAT-OF-SQUEUE: in seconds since 1970, unless Slurm has set it
    local time
    [[ -z ${!1:-} ]] || return 0
    time=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format="$2")
    # NONE and the like, of a job without a limit, are no dates.
    time=$(date --date="$time" +%s 2>/dev/null) && export "$1=$time"
}

set_environment() { # What NCCL, PyTorch and Megatron read. A value that is set already stays.
    # Megatron queues communication and the product that it overlaps with in a set order, which
    # holds only where the GPU has one hardware queue. Read when CUDA starts: too late in Python.
    export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
    # Responses differ in length from step to step, and blocks of a fixed size leave holes that
    # nothing fits into; segments that grow do not.
    export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
    # srun leaves it unset, and then each rank starts as many threads as the node has cores.
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$CPUS_PER_RANK}"
    # NCCL is silent by default; this names the node and the network device that fail.
    export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
    # When a collective times out, every rank writes its last ones: who waits where for whom. By default
    # some versions of PyTorch keep none, and they go to /tmp of the node.
    export TORCH_NCCL_DUMP_ON_TIMEOUT="${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}"
    export TORCH_FR_BUFFER_SIZE="${TORCH_FR_BUFFER_SIZE:-2000}"
    export TORCH_FR_DUMP_TEMP_FILE="$ATTEMPT_DIR/nccl-trace-"
    # Not set: NCCL_SOCKET_IFNAME and NCCL_IB_HCA. NCCL finds the network; where it takes the wrong
    # one (NCCL_DEBUG=INFO shows which), they are the site's to choose.
    # Not set: TORCH_NCCL_ASYNC_ERROR_HANDLING. A failed collective ends its process by default.
}

first_exit() { # CODE NAME: remember how the first one that failed ended; the others do not count
    # noclobber: only the first one creates the file.
    (set -o noclobber && echo "$1 $2 $(hostname)" >"$ATTEMPT_DIR/first-exit") 2>/dev/null
}

# ---------------------------------------------------------------- one step of ranks

step_of_ranks() { # NODES COMMAND...: sets STEP, the srun that runs COMMAND as every rank on NODES
    local list="$1" nodes
    shift
    nodes=$(wc --words <<<"${list//,/ }")
    CPUS_PER_RANK="${CPUS_PER_RANK:-$((SLURM_CPUS_ON_NODE / RANKS_PER_NODE))}"
    ((CPUS_PER_RANK > 0)) || CPUS_PER_RANK=1
    set_environment
    export MASTER_ADDR="${MASTER_ADDR:-${list%%,*}}"
    # Of this job alone, where jobs share a node, and below what the system gives to connections.
    export MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}"
    export WORLD_SIZE=$((nodes * RANKS_PER_NODE))

    local tasks=$RANKS_PER_NODE cpus=$CPUS_PER_RANK
    local -a task=(bash "$AROPD_HOME/slurm/rank.sh")
    if [[ $LAUNCHER == torchrun ]]; then
        # It hands a signal on to its ranks, and gives them time to save before it kills them.
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
        # A rank that fails ends the others, which wait for it.
        --kill-on-bad-exit=1
        "--output=$ATTEMPT_DIR/rank-%t.log" --open-mode=append
        "${CONTAINER[@]}" "${task[@]}" "$@"
    )
    say "${nodes} nodes x $RANKS_PER_NODE ranks ($LAUNCHER): $*"
    say "follow rank 0: tail -f '$ATTEMPT_DIR/rank-0.log'"
}

nodes_of_job() { # the job's nodes, one a line
    scontrol show hostnames "$SLURM_JOB_NODELIST"
}

# ---------------------------------------------------------------- signals

INTERRUPTED='' # not empty: told to stop
CHILD=''

pass_on() { # srun hands USR1 to its tasks; TERM would make it kill them
    INTERRUPTED=1
    [[ -z $CHILD ]] || kill -USR1 "$CHILD" 2>/dev/null
}

# COMMAND...: runs it to its end and returns its exit code; USR1 and TERM reach it as USR1. Of a command
# that ends in the instant of a signal bash loses the code: it is 255 then.
run_to_end() {
    trap pass_on USR1 TERM
    "$@" &
    CHILD=$!
    [[ -z $INTERRUPTED ]] || kill -USR1 "$CHILD" 2>/dev/null # came before there was a child
    # A trapped signal ends `wait`, not what it waits for.
    wait "$CHILD"
    while kill -0 "$CHILD" 2>/dev/null; do wait "$CHILD"; done
    local code=0
    wait "$CHILD" || code=$?
    CHILD=''
    return "$code"
}

# ---------------------------------------------------------------- after the step

finish() { # CODE of the step: end the job, or give it back to the queue
    local code=$1 who=rank-0 host='?'
    # srun's code is the highest of all, and ranks that it killed because one had failed count too.
    # The first that failed knows why.
    [[ ! -s $ATTEMPT_DIR/first-exit ]] || read -r code who host <"$ATTEMPT_DIR/first-exit"
    case $code in
        0)
            say "done"
            exit 0
            ;;
        2 | 3)
            show_end "$who"
            say "$who ($host) ended with $code: a restart would not help, so there is none"
            exit "$code"
            ;;
        75) say "saved and stopped early" ;;
        4) count_failure "$code" "$who ($host) hung" "$who" ;;
        *)
            if [[ -n $INTERRUPTED && $who == rank-* ]]; then
                say "told to stop before it could save (exit code $code)"
            else
                count_failure "$code" "$who ($host) ended with $code" "$who"
            fi
            ;;
    esac
    requeue "$code"
}

show_end() { # NAME of a log of this attempt
    local log="$ATTEMPT_DIR/$1.log"
    [[ ! -s $log ]] || { say "the end of $log:" && tail --lines=30 "$log"; }
}

count_failure() { # CODE WHAT NAME-OF-ITS-LOG: returns where the job may be tried again
    local failures=0 attempt
    show_end "$3"
    touch "$ATTEMPT_DIR/failed"
    for ((attempt = ATTEMPT; attempt >= 0; attempt--)); do
        [[ -e $JOB_LOGS/attempt-$attempt/failed ]] || break
        ((failures += 1))
    done
    say "$2: failure $failures in a row, and MAX_RESTARTS is $MAX_RESTARTS"
    if ((failures > MAX_RESTARTS)); then
        say "given up"
        exit "$1"
    fi
}

requeue() { # CODE that the job ends with where Slurm does not take it back
    local state
    state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)
    if [[ $state != RUNNING ]]; then
        # Cancelled, out of time or pre-empted: whoever did that decides what comes next.
        say "not requeued: Slurm is ending the job ($state)"
        exit "$1"
    fi
    say "back into the queue"
    if ! scontrol requeue "$SLURM_JOB_ID"; then
        say "Slurm did not take it back; the next job of the chain, or the same sbatch again, goes on"
        exit "$1"
    fi
    sleep 60 # Slurm ends this script
    exit "$1"
}
