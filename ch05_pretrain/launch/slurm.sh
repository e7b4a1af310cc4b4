#!/bin/bash
# A run on several machines under Slurm, from a folder that all of them share (code, tokens and --out):
#
#   sbatch ch05_pretrain/launch/slurm.sh --preset gpt2-124m --data SHARDS --out RUN --fsdp 16
#
# All arguments go to ch05_pretrain.train; the mesh (--dp, --fsdp, --tp, --pp) must multiply to nodes x GPUs.
# Each machine runs one torchrun, which starts a process for each GPU. A process that dies stops all of them, and
# they start again from the last checkpoint, up to three times. Five minutes before the time limit the run saves
# and stops, and the job queues again; the same sbatch command goes on from the checkpoint too.

#SBATCH --job-name=bytes-to-chat
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -u
cd "$SLURM_SUBMIT_DIR" || exit 1
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)  # where the processes find each other
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # each restart finds its processes anew, not those of before
export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK / SLURM_GPUS_ON_NODE))

srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_NNODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" --max-restarts 3 --shutdown-timeout 120 \
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$first:29500" \
    -m ch05_pretrain.train "$@" &
run=$!

stopped=
trap 'stopped=yes; scancel --signal=TERM "$SLURM_JOB_ID"' TERM  # to the processes, which save; srun would kill them
wait $run
code=$?
if [ -n "$stopped" ]; then
    wait $run  # the first wait ended with the signal, this one ends with the run
    code=$?
    [ $code -ne 0 ] && scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
