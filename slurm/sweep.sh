#!/usr/bin/env bash
# Submits one run for each line of a file, as an array of jobs; each is preempted, queued again and resumed by itself.
#
#   slurm/sweep.sh FILE SCRIPT [key=value ...]       for example: slurm/sweep.sh lr.txt slurm/mor_135m.sh
#   AT_ONCE=4 slurm/sweep.sh FILE SCRIPT             at most so many at a time (default 8)
#
# A line is a list of overrides, such as `optim.lr=1e-3 run.seed=1`; empty lines and lines that begin with # are left
# out. A run is named after the configuration, the file and the line's number, unless its line has a run.name.
set -euo pipefail
if [[ $# -lt 2 || ! -f $1 || ! -x $2 ]]; then
    echo "usage: $0 FILE SCRIPT [key=value ...]" >&2
    exit 2
fi
file=$1 script=$2
shift 2
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=slurm/cluster.sh
source "$root/slurm/cluster.sh"

# A copy: jobs that are queued again must find the lines that they began with.
logs=$(cd "$root" && realpath -m "$CLUSTER_LOGS")
mkdir -p "$logs/sweeps"
copies=$(mktemp -d "$logs/sweeps/XXXXXX")
MEGAMOR_SWEEP=$copies/$(basename "$file")
grep -vE '^[[:space:]]*(#|$)' "$file" >"$MEGAMOR_SWEEP" || { echo "$file has no line to run" >&2 && exit 2; }
CLUSTER_SBATCH_OPTIONS+=" --array=1-$(wc -l <"$MEGAMOR_SWEEP")%${AT_ONCE:-8}"
export MEGAMOR_SWEEP CLUSTER_SBATCH_OPTIONS
exec "$script" "$@"
