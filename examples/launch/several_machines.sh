#!/usr/bin/env bash
# Train on several machines: start the same command on each of them, with folders for data and checkpoints they share.
#
#     NODES=4 HEAD=node0 examples/launch/several_machines.sh pretrain_gpt.py ... --pipeline-model-parallel-size 4 \
#         --loss-type dft --save DIR --load DIR --save-interval 500
#
# Preflight, arguments, GPUS, RESTARTS and PYTHON are those of one_machine.sh. When a rank dies, all machines start their
# ranks again from the last checkpoint. When a machine dies, the others wait until it, or another in its place, has been
# given the same command with PREFLIGHT=0, for the running job has no preflight to meet. Lost are the iterations since
# the last save. The death of HEAD ends the job, whose meeting point was there: a scheduler has to start all of it again.
#
#     NODES      the number of machines
#     HEAD       host[:port] where they meet, one of them (port 29400; the preflight meets at the next one)
#     JOB        a name for the run, the same everywhere and another for each run (default: megatron_dft)
#     ADDRESS    how the others reach this machine, if its host name means something else to them, or nothing
#     INTERFACE  the network interface for NCCL and gloo, where there are several
#     WAIT       seconds to wait for the others, at the start and after a death (default 600)
#     PREFLIGHT  0 leaves the preflight out
set -euo pipefail

python=${PYTHON:-python}
gpus=${GPUS:-$("$python" -c 'import torch; print(torch.cuda.device_count() or 1)')}
: "${NODES:?expected the number of machines}" "${HEAD:?expected host[:port] of the machine where all meet}"
host=${HEAD%:*}
port=29400
if [[ $HEAD == *:* ]]; then port=${HEAD##*:}; fi
job=${JOB:-megatron_dft}

# torchrun waits for join_timeout until all are there, but only a minute for the head itself: that is read_timeout.
meeting=join_timeout=${WAIT:-600},read_timeout=${WAIT:-600}
torchrun=("$python" -m torch.distributed.run --nnodes "$NODES" --nproc-per-node "$gpus" --rdzv-backend c10d)
if [[ -n ${ADDRESS:-} ]]; then
    torchrun+=(--local-addr "$ADDRESS")
    if [[ $ADDRESS == "$host" ]]; then meeting+=,is_host=true; else meeting+=,is_host=false; fi
fi
torchrun+=(--rdzv-conf "$meeting")
if [[ -n ${INTERFACE:-} ]]; then
    export GLOO_SOCKET_IFNAME=$INTERFACE NCCL_SOCKET_IFNAME=$INTERFACE
fi
# A store for each start: else ranks that start again look for each other where those before them were, and wait.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1} # Megatron's tensor parallelism asks for 1

if [[ ${PREFLIGHT:-1} != 0 ]]; then
    "${torchrun[@]}" --rdzv-endpoint "$host:$((port + 1))" --rdzv-id "$job-preflight" -m megatron_dft.doctor "$@"
fi
exec "${torchrun[@]}" --rdzv-endpoint "$host:$port" --rdzv-id "$job" --max-restarts "${RESTARTS:-3}" \
    -m megatron_dft.launch "$@"
