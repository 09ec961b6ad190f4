#!/bin/bash
# Submit a chain of N jobs, for sites where a job cannot requeue itself (run it on the login node):
#     bash jobs/slurm-chain.sh N RUN.toml [more arguments of dtrain train]
# Each job resumes where the one before ended, however that was. Jobs that come after the end of the
# training find a finished run and end at once. Options of sbatch: SBATCH_TIMELIMIT=08:00:00,
# SBATCH_ACCOUNT, SBATCH_PARTITION, or in JOB_SCRIPT, which defaults to slurm.sh beside this file.
set -euo pipefail

: "${2:?how many jobs, and which run file? bash jobs/slurm-chain.sh 5 RUN.toml}"
jobs=$1
shift
script=${JOB_SCRIPT:-$(dirname "$0")/slurm.sh}

export RESTARTS=0 # no requeue: the next job of the chain goes on
previous=
for ((job = 1; job <= jobs; job++)); do
    previous=$(sbatch --parsable ${previous:+--dependency=afterany:$previous} "$script" "$@")
    previous=${previous%%;*}
    echo "$previous"
done
