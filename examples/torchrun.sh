#!/usr/bin/env bash
# GRPO on several machines with torchrun. Run this same script on every machine, with the same settings:
#
#   NODES=2 GPUS=8 HEAD=node0:29400 bash examples/torchrun.sh [more options of lit-rlhf fit]
#
# NODES  number of machines
# GPUS   processes on each, one a GPU
# HEAD   one of the machines, as all can reach it, and a free port
# JOB    a name that the machines of this run share, another one for each run at a time
# CONFIG one of configs/, or a file of your own
#
# The output folder must be one that all machines see (NFS, Lustre); only the first process writes to it. A run that
# was stopped goes on with the same command.
set -euo pipefail

exec "${PYTHON:-python}" -m torch.distributed.run \
  --nnodes "${NODES:-1}" --nproc-per-node "${GPUS:-1}" --max-restarts 0 \
  --rdzv-backend c10d --rdzv-endpoint "${HEAD:-localhost:29400}" --rdzv-id "${JOB:-lit-rlhf}" \
  -m lit_rlhf.cli fit --config "${CONFIG:-grpo.yaml}" \
  --trainer.strategy ddp --trainer.num_nodes "${NODES:-1}" --trainer.devices "${GPUS:-1}" \
  --ckpt_path last "$@"
