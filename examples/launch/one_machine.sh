#!/usr/bin/env bash
# Train on the GPUs of this machine, with any of Megatron's scripts, layouts and objectives:
#
#     examples/launch/one_machine.sh pretrain_gpt.py ... --tensor-model-parallel-size 8 --loss-type dft \
#         --save DIR --load DIR --save-interval 500
#
# All arguments are the run's own. First a preflight, through the same torchrun: will it start, and compute what you
# think? Then the training. When a rank dies, torchrun ends the others and starts all of them again, in this same
# layout, from the last checkpoint. That takes --save and --load with the same folder, and --save-interval; lost are the
# iterations since the last save. Without them every restart begins at iteration 0.
#
#     GPUS       ranks to start (default: the GPUs that torch sees, else 1; with --device cpu, the CPU ranks)
#     RESTARTS   how often to start again before giving up (default 3)
#     PREFLIGHT  0 leaves the preflight out
#     PYTHON     the interpreter of the environment to run in (default: python)
set -euo pipefail

python=${PYTHON:-python}
gpus=${GPUS:-$("$python" -c 'import torch; print(torch.cuda.device_count() or 1)')}
torchrun=("$python" -m torch.distributed.run --standalone --nproc-per-node "$gpus")
# A store for each start: else ranks that start again look for each other where those before them were, and wait.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1} # Megatron's tensor parallelism asks for 1

if [[ ${PREFLIGHT:-1} != 0 ]]; then
    "${torchrun[@]}" -m megatron_dft.doctor "$@"
fi
exec "${torchrun[@]}" --max-restarts "${RESTARTS:-3}" -m megatron_dft.launch "$@"
