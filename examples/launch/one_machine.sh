#!/usr/bin/env bash
# Train on the GPUs of this machine, with any Megatron script, parallel layout and objective:
#
#     examples/launch/one_machine.sh pretrain_gpt.py ... --tensor-model-parallel-size 8 --loss-type dft \
#         --save DIR --load DIR --save-interval 500
#
# All arguments are passed to the training script. First, a preflight (megatron_dft.doctor) checks the configuration on
# the same ranks. Then training starts. If a rank fails, torchrun stops all ranks and restarts them in the same layout
# from the last checkpoint; the iterations since the last save are lost. This requires --save and --load with the same
# folder, and --save-interval. Without these flags, every restart begins at iteration 0.
#
#     GPUS       number of ranks (default: GPUs visible to torch, or 1; with --device cpu, the number of CPU ranks)
#     RESTARTS   maximum number of restarts (default 3)
#     PREFLIGHT  0 skips the preflight
#     PYTHON     Python interpreter (default: python)
set -euo pipefail

python=${PYTHON:-python}
gpus=${GPUS:-$("$python" -c 'import torch; print(torch.cuda.device_count() or 1)')}
torchrun=("$python" -m torch.distributed.run --standalone --nproc-per-node "$gpus")
# A new store for each restart. Otherwise restarted ranks connect to the addresses of the previous ranks and hang.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1} # Megatron's tensor parallelism requires 1

if [[ ${PREFLIGHT:-1} != 0 ]]; then
    "${torchrun[@]}" -m megatron_dft.doctor "$@"
fi
exec "${torchrun[@]}" --max-restarts "${RESTARTS:-3}" -m megatron_dft.launch "$@"
