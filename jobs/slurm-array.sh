#!/bin/bash
# Train one run file with several seeds, one job and one run folder each:
#     sbatch jobs/slurm-array.sh RUN.toml [more arguments of dtrain train]
#     sbatch --array=0-9%2 jobs/slurm-array.sh RUN.toml        # ten seeds, two jobs at a time
# Afterwards: dtrain compare runs/RUN-seed=0 runs/RUN-seed=1
#SBATCH --job-name=dtrain
#SBATCH --array=0-3
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=1
#SBATCH --time=01:00:00
#SBATCH --signal=USR1@180
#SBATCH --requeue
#SBATCH --output=%x-%A_%a.log
#SBATCH --open-mode=append
set -euo pipefail

: "${1:?which run file? sbatch jobs/slurm-array.sh RUN.toml}"
run=$1
shift

# module load GCC OpenMPI Python
DTRAIN=${DTRAIN:-$SLURM_SUBMIT_DIR/.venv/bin/dtrain}

export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SLURM_CPUS_PER_TASK}
export PMIX_MCA_psec=${PMIX_MCA_psec:-native}

# The key that the tasks set, and the folder of this task; for other values than whole numbers:
#     rates=(0.1 0.03 0.01); value=${rates[$SLURM_ARRAY_TASK_ID]}
key=seed value=$SLURM_ARRAY_TASK_ID
out=runs/$(basename "$run" .toml)-$key=$value

code=0
srun --mpi="${DTRAIN_PMI:-pmix}" --kill-on-bad-exit=1 \
    "$DTRAIN" train "$run" --out "$out" --set "$key=$value" "$@" || code=$?

# 75: the run has saved. A task of an array is requeued by its own number.
if [[ $code -eq 75 && ${SLURM_RESTART_COUNT:-0} -lt ${RESTARTS:-100} ]]; then
    scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" && exit 0
fi
exit "$code"
