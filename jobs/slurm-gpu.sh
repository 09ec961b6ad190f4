#!/bin/bash
# Train one run file on GPU nodes under Slurm, one rank per GPU; saves, requeues and resumes:
#     sbatch jobs/slurm-gpu.sh RUN.toml [more arguments of dtrain train]
#     sbatch --nodes=8 --time=08:00:00 jobs/slurm-gpu.sh RUN.toml
# Edit GPUs and CPUs per node, and add what your site requires: --account, --partition.
#SBATCH --job-name=dtrain
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gres=gpu:4
#SBATCH --cpus-per-task=12
#SBATCH --time=01:00:00
#SBATCH --signal=USR1@180
#SBATCH --requeue
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
set -euo pipefail

: "${1:?which run file? sbatch jobs/slurm-gpu.sh RUN.toml}"

# module load GCC CUDA OpenMPI Python
DTRAIN=${DTRAIN:-$SLURM_SUBMIT_DIR/.venv/bin/dtrain}

# srun does not inherit --cpus-per-task. Each rank sees all GPUs of its node and takes its own.
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SLURM_CPUS_PER_TASK}
export PMIX_MCA_psec=${PMIX_MCA_psec:-native}

code=0
srun --mpi="${DTRAIN_PMI:-pmix}" --kill-on-bad-exit=1 --cpu-bind=cores \
    "$DTRAIN" train "$@" || code=$?

# 75: the run has saved. RESTARTS bounds the starts.
if [[ $code -eq 75 && ${SLURM_RESTART_COUNT:-0} -lt ${RESTARTS:-100} ]]; then
    scontrol requeue "$SLURM_JOB_ID" && exit 0
fi
exit "$code"
