#!/bin/bash
# Train one run file on CPU nodes under Slurm; saves before the time limit, requeues and resumes:
#     sbatch jobs/slurm.sh RUN.toml [more arguments of dtrain train]
# Options of sbatch override the lines below, for example
#     sbatch --nodes=4 --ntasks=16 --time=08:00:00 jobs/slurm.sh jobs/cifar10.toml
# Submit the same command again to resume from the last checkpoint.
# To diagnose a hang: scancel --signal=URG JOB; dtrain flight RUN_FOLDER  (docs/faults.md)
#
# Your site may require further options, here or on the command line: --account, --partition
#SBATCH --job-name=dtrain
#SBATCH --nodes=1
#SBATCH --ntasks=3
#SBATCH --cpus-per-task=1
#SBATCH --time=01:00:00
#SBATCH --signal=USR1@180
#SBATCH --requeue
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
set -euo pipefail

: "${1:?which run file? sbatch jobs/slurm.sh RUN.toml}"

# If dtrain was installed with MPI=site, load the modules of your site here:
#     module load GCC OpenMPI Python

# The dtrain program; the default is that of a clone after `make install`, with sbatch run from it.
# Slurm runs a copy of this script, so a path relative to the script does not work.
DTRAIN=${DTRAIN:-$SLURM_SUBMIT_DIR/.venv/bin/dtrain}

# srun does not inherit --cpus-per-task (Slurm 22.05 and later). Each rank uses that many threads.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SRUN_CPUS_PER_TASK}

# The Open MPI wheel has no munge module; without this line every rank prints a long warning.
export PMIX_MCA_psec=${PMIX_MCA_psec:-native}

# Without --kill-on-bad-exit the other ranks wait for a dead rank forever. Open MPI needs pmix,
# MPICH and Intel MPI need pmi2; `srun --mpi=list` prints the types that this Slurm supports.
code=0
srun --mpi="${DTRAIN_PMI:-pmix}" --kill-on-bad-exit=1 "$DTRAIN" train "$@" || code=$?

# 75: the run has saved. RESTARTS bounds the starts; `dtrain submit` counts those without progress.
if [[ $code -eq 75 && ${SLURM_RESTART_COUNT:-0} -lt ${RESTARTS:-100} ]]; then
    scontrol requeue "$SLURM_JOB_ID" && exit 0
fi
exit "$code"
