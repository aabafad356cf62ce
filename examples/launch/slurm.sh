#!/usr/bin/env bash
#SBATCH --job-name=megatron_dft
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
# Train under SLURM. Submit from the folder of the repository. sbatch options come first and override those above:
#
#     sbatch --nodes 4 --time 24:00:00 examples/launch/slurm.sh pretrain_gpt.py ... --tensor-model-parallel-size 8 \
#         --loss-type dft --save DIR --load DIR --save-interval 500
#
# Each node runs several_machines.sh, which documents the preflight and the variables. Restarts:
#
#     a rank fails            torchrun restarts all ranks, at most RESTARTS times
#     a node fails            SLURM requeues the job (--requeue)
#     the time limit is near  this script requeues the job, two minutes before (--signal)
#     the training fails      no restart, because a wrong flag stays wrong; the job ends as failed
#
# Each restart resumes from the last checkpoint. LAUNCH is the folder of several_machines.sh (default: examples/launch).
set -euo pipefail

launch=${LAUNCH:-examples/launch}
if [[ ! -f $launch/several_machines.sh ]]; then
    echo "expected $launch/several_machines.sh in $PWD: submit from the repository, or set LAUNCH to its folder" >&2
    exit 2
fi
export NODES=$SLURM_JOB_NUM_NODES JOB=$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
export HEAD

# bash runs a trap only after a foreground command ends, but at once during `wait`. srun therefore runs in the
# background, and a second `wait` follows an interrupted one. --cpu-bind=none: the processes of a task may use all CPUs
# of the node.
trap 'scontrol requeue "$SLURM_JOB_ID"' USR1
srun --cpu-bind=none --kill-on-bad-exit=1 bash "$launch/several_machines.sh" "$@" &
wait $! || wait $!
