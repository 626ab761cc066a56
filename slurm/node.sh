#!/usr/bin/env bash
# What slurm/train.sh runs in a job: `check` once on every node (can it train?), `rank` once for every process.
#
#   node.sh check|rank DIRECTORY_FOR_LOGS [key=value ...]
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

fail() {
    echo "$(hostname) (node $SLURM_NODEID of the job): $*" >&2
    exit 2
}

# Prints run.dir, run.name and run.device of the run, one a line.
run_settings() {
    python -c 'import sys
from megamor.config import expand_paths, load_config
from megamor.errors import user_errors
with user_errors():
    run = expand_paths(load_config(sys.argv[1], sys.argv[2:])).run
    print(run.dir, run.name, run.device, sep="\n")' "$CONFIG" "$@"
}

# Prints how many GPUs torch can use here; fails if it can't use those that are there.
usable_gpus() {
    python -c 'from megamor.devices import count_gpus
from megamor.errors import user_errors
with user_errors():
    print(count_gpus())'
}

# Writes down which checkpoint the run has saved last.
note_saved() { readlink "$1/checkpoints/latest" >"$2" || true; }

check() {
    local logs=$1 settings directory mark found
    shift
    command -v python >/dev/null || fail "there is no python: see CLUSTER_VENV and CLUSTER_MODULES in slurm/cluster.sh"
    python -c 'import sys, importlib.util as modules
sys.exit(not all(map(modules.find_spec, ("torch", "megamor"))))' ||
        fail "megamor isn't installed in $(command -v python): see README.md"
    # Configuration, data and tokenizer, before any process is started.
    python "$root/pretrain.py" --config "$CONFIG" "$@" --dry-run --nodes "${SLURM_NNODES:-1}" \
        --processes "${PROCESSES:-1}" >/dev/null || fail "the run can't start here: see above"
    settings=$(run_settings "$@") || exit 2
    mapfile -t settings <<<"$settings"
    directory=${settings[0]}
    mark=$directory/.job_$SLURM_JOB_ID
    if [[ $SLURM_NODEID = 0 ]]; then
        { mkdir -p "$directory" && touch "$mark"; } || fail "can't write into run.dir $directory"
    fi
    for ((second = 0; second < ${VISIBILITY_SECONDS:-60}; second++)); do # network file systems need a while
        if [[ -e $mark ]]; then break; fi
        sleep 1
    done
    [[ -e $mark ]] || fail "run.dir $directory isn't the directory that node 0 sees: set run.dir to a shared one"
    if [[ $GPUS -gt 0 && ${settings[2]} != cpu ]]; then
        found=$(usable_gpus) || fail "torch can't use this node's GPUs: see above"
        [[ $found = "$GPUS" ]] || fail "$found GPUs instead of $GPUS"
    fi
    if [[ ${GPU_CHECK:-0} = 1 ]]; then python -m megamor gpu-check || fail "megamor gpu-check: see above"; fi
    if [[ $SLURM_NODEID = 0 && -d $logs ]]; then note_saved "$directory/${settings[1]}" "$logs/saved_before"; fi
}

# Runs one process of the run. Its output goes to a file of its own; rank 0's also to the job's log.
rank() {
    local logs=$1 directory=$1/node_$SLURM_NODEID status=0 settings=()
    shift
    mkdir -p "$directory"
    if [[ $SLURM_PROCID = 0 ]]; then
        mapfile -t settings < <(run_settings "$@")
        rm -f "${settings[0]}/.job_$SLURM_JOB_ID"
    fi
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$((SLURM_NNODES * PROCESSES)) LOCAL_WORLD_SIZE=$PROCESSES
    # Slurm signals every process of a task. Python saves and exits; this shell must outlive it to write down its status,
    # and `tee` to write its last words. A handler that does nothing keeps the shell alive; Python resets it, `tee` ignores
    # the signals altogether.
    trap : USR1 TERM INT
    if [[ $RANK = 0 ]]; then
        python "$root/pretrain.py" --config "$CONFIG" "$@" \
            > >(trap '' USR1 TERM INT && exec tee -a "$directory/rank_$RANK.log") 2>&1 || status=$?
    else
        python "$root/pretrain.py" --config "$CONFIG" "$@" >"$directory/rank_$RANK.log" 2>&1 || status=$?
    fi
    if [[ $RANK = 0 ]]; then note_saved "${settings[0]}/${settings[1]}" "$logs/saved_after"; fi
    # When one rank exits, others may die of it: srun reports the largest status, train.sh wants the cause.
    echo "$status" >"$logs/status_$RANK"
    exit "$status"
}

if [[ -z ${MEGAMOR_NODE:-} ]]; then # once more, in the environment of the settings
    # shellcheck source=slurm/cluster.sh
    source "$root/slurm/cluster.sh"
    export MEGAMOR_NODE=1
    cluster_exec_in_step bash "$root/slurm/node.sh" "$@"
fi
"$@"
