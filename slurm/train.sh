# shellcheck shell=bash
# What the training scripts of this directory have in common: each sources it with its arguments (key=value overrides).
#
# On a login node it submits the script with the settings of slurm/cluster.sh. Within a job it checks the nodes, has
# slurm start one process for each GPU, and asks slurm to requeue the job when the run was stopped before its end.
#
# Variables, all optional:
#   CONFIG             another configuration on the same nodes, such as configs/vanilla_1b.yaml
#   NODES, GPUS, TIME  nodes, GPUS of each, time limit; default: the #SBATCH lines of the script
#   LAUNCHER           deepspeed adds DEEPSPEED_ARGS to the overrides; torchrun (default) adds nothing
#   MARGIN             seconds before the time limit at which the run is asked to save and stop (default 600)
#   MAX_REQUEUES       how often a job may be requeued (default 100)
#   PROCESSES          processes on each node; default: its GPUs, or 1 without any
#   MASTER_ADDR, MASTER_PORT  where the processes meet; default: the job's first node, a port derived from the job's id
#   DEEPSPEED_ARGS     default parallel.backend=deepspeed
#   CHECK              0 submits without checking configuration, data and tokenizer first
#   GPU_CHECK          1 runs `megamor gpu-check` on every node before training

: "${LAUNCHER:=torchrun}" "${NODES:=}" "${GPUS:=}" "${TIME:=}" "${MARGIN:=600}" "${MAX_REQUEUES:=100}"
: "${GPU_CHECK:=0}" "${DEEPSPEED_ARGS:=parallel.backend=deepspeed}" "${CONFIG:?the script that sources slurm/train.sh sets CONFIG}"

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=slurm/cluster.sh
source "$root/slurm/cluster.sh"

requeue_status=75 # of a run that saved and stopped on request, or whose watchdog found it hanging
lost_rank=76      # of a rank that ended because another one had
user_error=2
stop_asked='' step='' step_status=0 repeater='' # state of a job

fail() {
    echo "$*" >&2
    exit 2
}

# Finds on the login node what would end the job at its start, before the queue is waited for. The lines of a sweep are
# checked by their jobs.
check_before_queue() {
    if [[ ${CHECK:-1} = 0 ]]; then return; fi
    if [[ -n $CLUSTER_CONTAINER ]] || ! (cluster_exec python -c 'import torch, megamor') 2>/dev/null; then
        echo "megamor doesn't run on this machine: the job will check configuration and data" >&2
        return
    fi
    local nodes=${NODES:-$(directive nodes)} gpus=${GPUS:-$(directive gpus-per-node)} further
    launcher_overrides
    gpus=${gpus##*:} # may be type:number
    (cluster_exec python "$root/pretrain.py" --config "$CONFIG" --dry-run --nodes "${nodes%%-*}" \
        --processes "${PROCESSES:-$((gpus > 0 ? gpus : 1))}" "$@" "${further[@]}") ||
        fail "not submitted: see above (CHECK=0 submits without this check)"
}

# The value of an #SBATCH line of the script.
directive() { sed -n "s/^#SBATCH --$1=//p" "$root/slurm/$(basename "$0")"; }

# Sets `further`.
launcher_overrides() {
    further=()
    case $LAUNCHER in
    deepspeed) read -r -a further <<<"$DEEPSPEED_ARGS" ;;
    torchrun) ;;
    *) fail "LAUNCHER is $LAUNCHER: give torchrun or deepspeed" ;;
    esac
}

submit() {
    cd "$root" || exit 2
    check_before_queue "$@"
    mkdir -p "$CLUSTER_LOGS"
    cluster_sbatch_options
    local options=("--output=$CLUSTER_LOGS/%x_%j.log" "--signal=B:USR1@$MARGIN")
    if [[ -n ${MEGAMOR_SWEEP:-} ]]; then options=("--output=$CLUSTER_LOGS/%x_%A_%a.log" "${options[@]:1}"); fi
    if [[ -n $NODES ]]; then options+=("--nodes=$NODES"); fi
    if [[ -n $GPUS ]]; then options+=("--gpus-per-node=$GPUS"); fi
    if [[ -n $TIME ]]; then options+=("--time=$TIME"); fi
    export MEGAMOR_ROOT=$root
    sbatch "${cluster_options[@]}" "${options[@]}" "$root/slurm/$(basename "$0")" "$@"
}

# In a job ------------------------------------------------------------------------------------------------------------

train() {
    cd "$root" || fail "there is no $root on this node: the repository must be on a file system that all nodes share"
    collect_overrides "$@"
    GPUS=$(gpus_per_node)
    if [[ -z ${PROCESSES:-} ]]; then PROCESSES=$((GPUS > 0 ? GPUS : 1)); fi
    local nodes=${SLURM_NNODES:?} restarts=${SLURM_RESTART_COUNT:-0}
    MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
    MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
    : "${OMP_NUM_THREADS:=$((${SLURM_CPUS_PER_TASK:-$PROCESSES} / PROCESSES))}"
    if [[ $OMP_NUM_THREADS = 0 ]]; then OMP_NUM_THREADS=1; fi
    rank_logs=$CLUSTER_LOGS/${SLURM_JOB_NAME}_$SLURM_JOB_ID/start_$restarts
    mkdir -p "$rank_logs"
    export GPU_CHECK OMP_NUM_THREADS MASTER_ADDR MASTER_PORT PROCESSES GPUS LAUNCHER CONFIG

    echo "job $SLURM_JOB_ID, start $restarts: $CONFIG ${overrides[*]} with $LAUNCHER on $nodes nodes x $PROCESSES" \
        "processes ($SLURM_JOB_NODELIST); each rank's output in $rank_logs"
    trap stop_run USR1 TERM
    run_step 1 check "$rank_logs" "${overrides[@]}"
    if [[ $step_status = 0 && -z $stop_asked ]]; then
        run_step "$PROCESSES" rank "$rank_logs" "${overrides[@]}"
        step_status=$(telling_status "$step_status")
    elif [[ -n $stop_asked && $step_status -ne $user_error ]]; then
        step_status=$requeue_status
    fi
    if [[ -n $stop_asked ]] && ((step_status >= 128 || step_status == lost_rank)); then step_status=$requeue_status; fi
    conclude "$step_status" "$restarts"
}

# Sets `overrides`: the arguments, those of LAUNCHER, and the line of this task in a sweep.
collect_overrides() {
    local further
    launcher_overrides
    overrides=("$@" "${further[@]}")
    if [[ -z ${MEGAMOR_SWEEP:-} ]]; then return; fi
    local line settings
    line=$(sed -n "${SLURM_ARRAY_TASK_ID:?a sweep is an array of jobs: use slurm/sweep.sh}p" "$MEGAMOR_SWEEP")
    read -r -a settings <<<"$line"
    if [[ $line != *run.name=* ]]; then
        settings+=("run.name=$(basename "$CONFIG" .yaml)_$(basename "$MEGAMOR_SWEEP" .txt)_$SLURM_ARRAY_TASK_ID")
    fi
    overrides+=("${settings[@]}")
}

# What each node is to have: the number asked for, or what slurm gave.
gpus_per_node() {
    if [[ -n ${GPUS:-} ]]; then
        echo "${GPUS##*:}" # may be type:number
    elif [[ -n ${SLURM_GPUS_ON_NODE:-} ]]; then
        echo "$SLURM_GPUS_ON_NODE"
    else
        echo 0
    fi
}

# Runs slurm/node.sh in so many processes on every node and waits for it; sets `step_status`. A process that exits with
# an error ends the others only after a minute: they may be about to exit with a better explanation, or to save.
run_step() {
    local processes=$1 cpus=${SLURM_CPUS_PER_TASK:-0}
    shift
    cluster_step_options
    step_options+=("--ntasks=$((SLURM_NNODES * processes))" "--ntasks-per-node=$processes")
    # srun doesn't take over the job's CPUs per task, and they were asked for one task a node.
    if ((cpus >= processes)); then step_options+=("--cpus-per-task=$((cpus / processes))"); else step_options+=(--overcommit); fi
    # Neighbouring ranks on the cores of one socket, as GPUs are numbered: each near its own.
    if ((GPUS > 0 && cpus >= processes)); then step_options+=(--cpu-bind=cores --distribution=block:block); fi
    srun --wait=60 --kill-on-bad-exit=0 "${step_options[@]}" bash "$root/slurm/node.sh" "$@" &
    step=$!
    step_status=0
    while true; do # a signal ends `wait` early
        wait "$step" && step_status=0 || step_status=$?
        kill -0 "$step" 2>/dev/null || break
    done
}

# The status that explains the end of the run, as megamor.errors.telling_status says: an error of a rank's own, then 75,
# which others may end with because of it, then srun's. That is the largest of all ranks, often that of a rank that was
# killed because another one had exited.
telling_status() {
    local found own
    found=$(cat "$rank_logs"/status_* 2>/dev/null | sort -nu || true)
    own=$(awk -v lost="$lost_rank" -v requeue="$requeue_status" '$1 > 0 && $1 < 128 && $1 != lost && $1 != requeue' <<<"$found")
    if grep -qx "$user_error" <<<"$own"; then
        echo "$user_error"
    elif [[ -n $own ]]; then
        head -n 1 <<<"$own"
    elif grep -qx "$requeue_status" <<<"$found"; then
        echo "$requeue_status"
    else
        echo "$1"
    fi
}

# Succeeds if this start has saved nothing, nor the starts right before it: so often may a job be requeued that was asked
# to stop. One that stopped by itself must have saved something, or it would hang again and again.
made_no_progress() {
    local idle=$CLUSTER_LOGS/${SLURM_JOB_NAME}_$SLURM_JOB_ID/idle_starts allowed=0 count=0 saved=yes
    if [[ -n $stop_asked ]]; then allowed=2; fi
    if [[ ! -e $rank_logs/saved_after ]]; then
        saved=$stop_asked # killed before it could say
    elif cmp -s "$rank_logs/saved_before" "$rank_logs/saved_after"; then
        saved=''
    fi
    if [[ -n $saved ]]; then rm -f "$idle" && return 1; fi
    if [[ -e $idle ]]; then count=$(<"$idle"); fi
    echo $((count + 1)) >"$idle"
    ((count + 1 > allowed))
}

# Asks the run to save and stop, again and again: a signal that arrives while srun starts the processes is lost.
stop_run() {
    if [[ -n $stop_asked ]]; then return; fi
    stop_asked=yes
    echo "asked to stop: the run saves and exits"
    if [[ -z $step ]]; then return; fi
    while kill -USR1 "$step" 2>/dev/null; do sleep 20; done &
    repeater=$!
}

# Ends the job: done, requeued, or failed.
conclude() {
    local status=$1 restarts=$2
    if [[ -n $repeater ]]; then
        kill "$repeater" 2>/dev/null || true
        wait "$repeater" 2>/dev/null || true # without a word about its end
    fi
    if [[ $status -ne $requeue_status ]]; then
        echo "job $SLURM_JOB_ID ends with status $status"
        exit "$status"
    fi
    if [[ $restarts -ge $MAX_REQUEUES ]]; then
        echo "job $SLURM_JOB_ID was started $((restarts + 1)) times and isn't requeued (MAX_REQUEUES)" >&2
        exit "$status"
    fi
    if made_no_progress; then
        echo "job $SLURM_JOB_ID has saved nothing since its last start and isn't requeued" >&2
        exit "$status"
    fi
    # A job that somebody has cancelled must stay cancelled.
    if [[ $(scontrol --oneliner show job "$SLURM_JOB_ID") != *JobState=RUNNING* ]]; then exit "$status"; fi
    echo "job $SLURM_JOB_ID is requeued after start $restarts"
    trap - USR1 TERM
    scontrol requeue "$SLURM_JOB_ID" || exit "$status"
    sleep 120 # slurm ends this script meanwhile
}

case $0 in
*/slurm_script) train "$@" ;; # slurm runs a copy of the script under this name
*) submit "$@" ;;
esac
