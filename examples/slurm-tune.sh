#!/usr/bin/env bash
# Slurm: gemma2 on several machines of 8 GPUs each. Submit it again, or let it be requeued, and the run goes on.
#
#   sbatch examples/slurm-tune.sh mine.yaml
#   sbatch --nodes=4 examples/slurm-tune.sh mine.yaml --set parallel.tensor=2
#
# `output` in the settings must lie on a disk that all machines see. For `pretrain` or `distill` change the verb below.
#SBATCH --job-name=gemma2-tune
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@600
set -euo pipefail

# One torchrun on each machine, which starts a process for each GPU. Ten minutes before the time is up Slurm sends SIGTERM;
# torchrun passes it on, the step is finished, and the time that it waits for the checkpoint is nine minutes.
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" \
    --nproc-per-node "$SLURM_GPUS_ON_NODE" \
    --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$head:29500" \
    --shutdown-timeout 540 \
    -m gemma2 tune "$@"
