#!/usr/bin/env bash
# Train on several machines. Start the same command on each machine; folders of data and checkpoints must be shared.
#
#     NODES=4 HEAD=node0 examples/launch/several_machines.sh pretrain_gpt.py ... --pipeline-model-parallel-size 4 \
#         --loss-type dft --save DIR --load DIR --save-interval 500
#
# Preflight, arguments, GPUS, RESTARTS and PYTHON are those of one_machine.sh. If a rank fails, all machines restart
# their ranks from the last checkpoint. If a machine fails, the others wait until that machine or a replacement starts
# the same command with PREFLIGHT=0, because the running job has finished its preflight. The iterations since the last
# save are lost. If HEAD fails, the job ends, because HEAD hosts the rendezvous; a scheduler must start the job again.
#
#     NODES      number of machines
#     HEAD       host[:port] of the rendezvous, one of the machines (default port 29400; the preflight uses port + 1)
#     JOB        rendezvous ID, equal on all machines and unique per run (default: megatron_dft)
#     ADDRESS    address of this machine for the others, if they cannot resolve its host name
#     INTERFACE  network interface of NCCL and gloo, if there are several
#     WAIT       seconds to wait for the other machines, at the start and after a failure (default 600)
#     PREFLIGHT  0 skips the preflight
set -euo pipefail

python=${PYTHON:-python}
gpus=${GPUS:-$("$python" -c 'import torch; print(torch.cuda.device_count() or 1)')}
: "${NODES:?expected the number of machines}" "${HEAD:?expected host[:port] of the rendezvous}"
host=${HEAD%:*}
port=29400
if [[ $HEAD == *:* ]]; then port=${HEAD##*:}; fi
job=${JOB:-megatron_dft}

# join_timeout: until all machines have joined. read_timeout: until HEAD answers; its default is one minute.
rdzv_conf=join_timeout=${WAIT:-600},read_timeout=${WAIT:-600}
torchrun=("$python" -m torch.distributed.run --nnodes "$NODES" --nproc-per-node "$gpus" --rdzv-backend c10d)
if [[ -n ${ADDRESS:-} ]]; then
    torchrun+=(--local-addr "$ADDRESS")
    if [[ $ADDRESS == "$host" ]]; then rdzv_conf+=,is_host=true; else rdzv_conf+=,is_host=false; fi
fi
torchrun+=(--rdzv-conf "$rdzv_conf")
if [[ -n ${INTERFACE:-} ]]; then
    export GLOO_SOCKET_IFNAME=$INTERFACE NCCL_SOCKET_IFNAME=$INTERFACE
fi
# A new store for each restart. Otherwise restarted ranks connect to the addresses of the previous ranks and hang.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1} # Megatron's tensor parallelism requires 1

if [[ ${PREFLIGHT:-1} != 0 ]]; then
    "${torchrun[@]}" --rdzv-endpoint "$host:$((port + 1))" --rdzv-id "$job-preflight" -m megatron_dft.doctor "$@"
fi
exec "${torchrun[@]}" --rdzv-endpoint "$host:$port" --rdzv-id "$job" --max-restarts "${RESTARTS:-3}" \
    -m megatron_dft.launch "$@"
