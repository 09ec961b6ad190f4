#!/bin/bash
# Trains one run file under Slurm:
#     sbatch jobs/slurm.sh RUN.toml [more arguments of dtrain train]
# Options of sbatch win over the lines below, for example
#     sbatch --nodes=4 --ntasks=16 --time=08:00:00 jobs/slurm.sh jobs/cifar10.toml
# Submitted again with the same --out, a run goes on from its last checkpoint.
# Does it hang?  scancel --signal=USR1 JOB; dtrain flight RUN_FOLDER  (docs/comm.md, docs/faults.md)
#
# Change here, or on the command line, what your site asks for:
#     --account, --partition, --time, --gres (GPUs per node)
#SBATCH --job-name=dtrain
#SBATCH --nodes=1
#SBATCH --ntasks=3
#SBATCH --cpus-per-task=1
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
set -euo pipefail

: "${1:?which run file? sbatch jobs/slurm.sh RUN.toml}"

# Load your site's modules here if dtrain was installed with MPI=site:
#     module load GCC OpenMPI Python

# The environment that holds dtrain; this line serves a clone in which `make install` was run.
# Slurm runs a copy of this script, so the folder is the one in which you typed sbatch.
DTRAIN=${DTRAIN:-$SLURM_SUBMIT_DIR/.venv/bin/dtrain}

# srun does not inherit --cpus-per-task (Slurm 22.05 and later), and each rank computes with that
# many threads.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SRUN_CPUS_PER_TASK}

# The Open MPI wheel has no munge module and would say so, at length, for every rank.
export PMIX_MCA_psec=${PMIX_MCA_psec:-native}

# Without --kill-on-bad-exit the other ranks would wait for a dead one for ever. Open MPI speaks
# pmix; MPICH and Intel MPI need pmi2: `srun --mpi=list` says what this Slurm offers.
exec srun --mpi="${DTRAIN_PMI:-pmix}" --kill-on-bad-exit=1 "$DTRAIN" train "$@"
