# shellcheck shell=bash
# The settings of your cluster: the one file to edit before using the scripts of this directory. A setting that is
# empty is not passed on at all. Variables of the same names in the environment win over what is written here.

: "${CLUSTER_PARTITION:=}"      # sbatch --partition
: "${CLUSTER_ACCOUNT:=}"        # sbatch --account
: "${CLUSTER_QOS:=}"            # sbatch --qos
: "${CLUSTER_CONSTRAINT:=}"     # sbatch --constraint
: "${CLUSTER_SBATCH_OPTIONS:=}" # further options of sbatch, separated by spaces
: "${CLUSTER_MODULES:=}"        # environment modules to load, separated by spaces
: "${CLUSTER_VENV:=.venv}"      # virtual environment, relative to the repository; in a container: within it, or empty
: "${CLUSTER_CONTAINER:=}"      # image: a .sif file is run with apptainer, anything else with srun --container-image
: "${CLUSTER_MOUNTS:=}"         # directories for the container to see, as its option --bind or --container-mounts wants
: "${CLUSTER_LOGS:=logs}"       # directory of the jobs' output

# Sets the array `cluster_options`: what sbatch is to be told of the settings above.
cluster_sbatch_options() {
    cluster_options=()
    if [[ -n $CLUSTER_PARTITION ]]; then cluster_options+=("--partition=$CLUSTER_PARTITION"); fi
    if [[ -n $CLUSTER_ACCOUNT ]]; then cluster_options+=("--account=$CLUSTER_ACCOUNT"); fi
    if [[ -n $CLUSTER_QOS ]]; then cluster_options+=("--qos=$CLUSTER_QOS"); fi
    if [[ -n $CLUSTER_CONSTRAINT ]]; then cluster_options+=("--constraint=$CLUSTER_CONSTRAINT"); fi
    local further
    read -r -a further <<<"$CLUSTER_SBATCH_OPTIONS"
    cluster_options+=("${further[@]}")
}

# Runs a command in the environment of the settings above, in place of the shell, so that signals reach it.
cluster_exec() {
    local modules
    read -r -a modules <<<"$CLUSTER_MODULES"
    if [[ ${#modules[@]} -gt 0 ]]; then module load "${modules[@]}"; fi
    if [[ -n $CLUSTER_VENV ]]; then PATH="$(realpath -m "$CLUSTER_VENV")/bin:$PATH"; fi
    case $CLUSTER_CONTAINER in
    "") exec "$@" ;;
    *.sif) exec apptainer exec --env "PATH=$PATH" ${CLUSTER_MOUNTS:+--bind "$CLUSTER_MOUNTS"} "$CLUSTER_CONTAINER" "$@" ;;
    *) exec srun --container-image="$CLUSTER_CONTAINER" ${CLUSTER_MOUNTS:+--container-mounts="$CLUSTER_MOUNTS"} "$@" ;;
    esac
}

# Sets the array `step_options`: what an srun of several nodes is to be told, where slurm starts the container.
cluster_step_options() {
    step_options=()
    case $CLUSTER_CONTAINER in
    "" | *.sif) ;;
    *) step_options+=("--container-image=$CLUSTER_CONTAINER" ${CLUSTER_MOUNTS:+--container-mounts="$CLUSTER_MOUNTS"}) ;;
    esac
}

# `cluster_exec` within such an srun.
cluster_exec_in_step() {
    case $CLUSTER_CONTAINER in
    *.sif) ;;
    *) CLUSTER_CONTAINER="" ;;
    esac
    cluster_exec "$@"
}
