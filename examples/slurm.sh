#!/usr/bin/env bash
# GRPO on several machines with SLURM: sbatch examples/slurm.sh [more options of lit-rlhf fit]
#
# Set: nodes, tasks and GPUs a node (one task a GPU), memory, time, and the partition or account of your cluster.
#SBATCH --job-name=lit-rlhf
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%j.out
#SBATCH --open-mode=append
# Ten minutes before the time is up, and when the job is preempted, the run saves after the rollout at hand and asks to
# be queued again; the grace period must be longer than a rollout with its updates. It is sent to the tasks, not to this
# shell (no B:).
#SBATCH --signal=SIGUSR1@600
#SBATCH --requeue
set -euo pipefail

# A submission directory that all nodes see; the run's folder, trainer.default_root_dir, is relative to it.
cd "${SLURM_SUBMIT_DIR:-.}"
# An environment that all nodes see: source /shared/venv/bin/activate

# srun starts a task a GPU; Lightning reads ranks, addresses and the number of nodes from SLURM's variables.
# --kill-on-bad-exit ends the other tasks when one has failed. --ckpt_path last: the first start finds nothing and begins;
# every later one goes on where the one before stopped.
exec srun --kill-on-bad-exit=1 "${PYTHON:-python}" -m lit_rlhf.cli fit --config "${CONFIG:-grpo.yaml}" \
  --trainer.strategy ddp --trainer.num_nodes "$SLURM_NNODES" --trainer.devices "$SLURM_NTASKS_PER_NODE" \
  --ckpt_path last "$@"
