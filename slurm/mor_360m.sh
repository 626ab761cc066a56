#!/usr/bin/env bash
# Pretrains Mixture-of-Recursions on the 360M base, 3 recursions (the published recipe): configs/mor_360m.yaml.
#
#   slurm/mor_360m.sh [key=value ...]                   with the settings of slurm/cluster.sh
#   NODES=2 GPUS=4 LAUNCHER=deepspeed slurm/mor_360m.sh   variables: see slurm/train.sh
#   sbatch [options] slurm/mor_360m.sh [key=value ...]  with slurm's own settings, without cluster.sh and its checks
#
# The job saves and stops before its time limit or when it is preempted, is queued again, and resumes. docs/slurm.md
#SBATCH --job-name=mor_360m
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=48:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x_%j.log
set -euo pipefail
: "${CONFIG:=configs/mor_360m.yaml}"
for scripts in "$(dirname "$(realpath "$0")")" "${MEGAMOR_ROOT:-${SLURM_SUBMIT_DIR:-.}}"{/slurm,}; do # slurm runs a copy
    if [[ -e $scripts/train.sh ]]; then break; fi
done
if [[ ! -e $scripts/train.sh ]]; then
    echo "there is no train.sh in $scripts: submit from the root of the repository or set MEGAMOR_ROOT to it" >&2
    exit 2
fi
# shellcheck source=slurm/train.sh
source "$scripts/train.sh"
