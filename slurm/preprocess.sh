#!/usr/bin/env bash
# Preprocesses a large corpus on a cluster: an array of jobs, each for a part of the files, and a job that merges them.
#
#   SHARDS=30 CPUS=16 TIME=12:00:00 slurm/preprocess.sh --input 'pile/train/*.jsonl.zst' --tokenizer data/tokenizer.json \
#       --output-prefix data/pile_train --append-eod
#
# The arguments are those of tools/preprocess.py, but for --workers and --shard. Variables:
#   SHARDS  parts of about equal size (default 30, the number of The Pile's training files)
#   CPUS    cores of a job (default 16)
#   MEM     memory of a job, and TIME its time limit; default: what the cluster gives
#   TASKS   run these parts alone, such as 3,7-9, after a failure; the others must be there already
# Settings of the cluster are in slurm/cluster.sh. A job that is requeued resumes where it stopped. The merge waits for all
# parts, and is cancelled if one fails. The shards stay; remove them once the merged data set is there.
set -euo pipefail

root=${MEGAMOR_ROOT:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
# shellcheck source=slurm/cluster.sh
source "$root/slurm/cluster.sh"
: "${SHARDS:=30}" "${CPUS:=16}" "${MEM:=}" "${TIME:=}" "${TASKS:=0-$((SHARDS - 1))}"

submit() {
    if [[ $# -eq 0 || " $* " == *" --workers"* || " $* " == *" --shard"* ]]; then
        echo "usage: SHARDS=30 CPUS=16 $0 OPTIONS OF tools/preprocess.py, but for --workers and --shard" >&2
        exit 2
    fi
    local prefix
    prefix=$(output_prefix "$@")
    mkdir -p "$CLUSTER_LOGS"
    cluster_sbatch_options
    local options=("${cluster_options[@]}" --parsable --nodes=1 --ntasks=1 --requeue --open-mode=append)
    if [[ -n $MEM ]]; then options+=("--mem=$MEM"); fi
    if [[ -n $TIME ]]; then options+=("--time=$TIME"); fi
    export MEGAMOR_ROOT=$root SHARDS
    local array merge
    array=$(sbatch "${options[@]}" --job-name=preprocess --array="$TASKS" --cpus-per-task="$CPUS" \
        --output="$CLUSTER_LOGS/preprocess_%A_%a.log" "$root/slurm/preprocess.sh" part "$@")
    merge=$(sbatch "${options[@]}" --job-name=merge --dependency="afterok:${array%%;*}" --kill-on-invalid-dep=yes \
        --cpus-per-task=1 --output="$CLUSTER_LOGS/merge_%j.log" "$root/slurm/preprocess.sh" merge "$prefix")
    echo "array job ${array%%;*}, parts $TASKS of $SHARDS; merge job ${merge%%;*} writes $prefix; output in $CLUSTER_LOGS"
}

# The value of --output-prefix.
output_prefix() {
    while [[ $# -gt 0 ]]; do
        case $1 in
        --output-prefix=*) echo "${1#*=}" && return ;;
        --output-prefix) echo "${2:?--output-prefix needs a value}" && return ;;
        esac
        shift
    done
    echo "--output-prefix is missing" >&2
    return 2
}

# Not SLURM_ARRAY_TASK_COUNT: that is smaller when only some parts are run again.
part() {
    cluster_exec python "$root/tools/preprocess.py" "$@" --workers "${SLURM_CPUS_PER_TASK:-$CPUS}" \
        --shard "$SLURM_ARRAY_TASK_ID/$SHARDS"
}

# With --split there is a data set for each share, otherwise just one.
merge() {
    local name found=0
    for name in "$1" "$1"_train "$1"_val "$1"_test; do
        if compgen -G "${name}_shard_*_of_$(printf %05d "$SHARDS").idx" >/dev/null; then
            (cluster_exec python -m megamor merge-data --output-prefix "$name")
            found=1
        fi
    done
    if [[ $found = 0 ]]; then
        echo "there is no shard of $1 in $SHARDS parts" >&2
        return 2
    fi
}

case ${1:-} in
part | merge) "$@" ;;
*) submit "$@" ;;
esac
