#!/usr/bin/env bash
# What slurm/train.sh runs on every node of a job: `check` looks whether it can train, `launch` starts its processes.
#
#   node.sh check|launch DIRECTORY_FOR_LOGS [key=value ...]
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

fail() {
    echo "$(hostname) (node $SLURM_NODEID of the job): $*" >&2
    exit 2
}

# run.dir of the run; also the first to read the configuration.
run_dir() {
    python -c 'import sys
from megamor.config import load_config
from megamor.errors import user_errors
print(user_errors(load_config)(sys.argv[1], sys.argv[2:]).run.dir)' "$CONFIG" "$@"
}

check() {
    shift
    local directory mark found
    command -v python >/dev/null || fail "there is no python: see CLUSTER_VENV and CLUSTER_MODULES in slurm/cluster.sh"
    python -c 'import sys, importlib.util as modules
sys.exit(not all(map(modules.find_spec, ("torch", "megamor"))))' ||
        fail "megamor isn't installed in $(command -v python): see README.md"
    directory=$(run_dir "$@") || exit 2
    mark=$directory/.job_$SLURM_JOB_ID
    if [[ $SLURM_NODEID = 0 ]]; then
        { mkdir -p "$directory" && touch "$mark"; } || fail "can't write into run.dir $directory"
    fi
    for ((second = 0; second < ${VISIBILITY_SECONDS:-60}; second++)); do # network file systems need a while
        if [[ -e $mark ]]; then break; fi
        sleep 1
    done
    [[ -e $mark ]] || fail "run.dir $directory isn't the directory that node 0 sees: set run.dir to a shared one"
    if [[ $GPUS -gt 0 ]]; then
        found=$(nvidia-smi --list-gpus | grep -c ^GPU || true)
        [[ $found = "$GPUS" ]] || fail "$found GPUs instead of $GPUS"
    fi
}

launch() {
    local logs=$1/node_$SLURM_NODEID
    shift
    mkdir -p "$logs"
    if [[ $SLURM_NODEID = 0 ]]; then rm -f "$(run_dir "$@")/.job_$SLURM_JOB_ID"; fi
    exec python -m megamor launch --launcher "$LAUNCHER" --processes "$PROCESSES" --nodes "$SLURM_NNODES" \
        --node-rank "$SLURM_NODEID" --address "$MASTER_ADDR" --port "$MASTER_PORT" --logs "$logs" \
        "$root/pretrain.py" --config "$CONFIG" "$@"
}

if [[ -z ${MEGAMOR_NODE:-} ]]; then # once more, in the environment of the settings
    # shellcheck source=slurm/cluster.sh
    source "$root/slurm/cluster.sh"
    export MEGAMOR_NODE=1
    cluster_exec_in_step bash "$root/slurm/node.sh" "$@"
fi
"$@"
