"""Command lines of small Megatron runs: models, layouts, training."""

from host_runs import HAS_HYBRID

MODEL = (
    "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32 "
    "--position-embedding-type rope --normalization RMSNorm --disable-bias-linear --attention-dropout 0 "
    "--hidden-dropout 0 --tokenizer-type NullTokenizer --vocab-size 30 --make-vocab-size-divisible-by 16 "  # 32
    "--lr-decay-style constant --clip-grad 1.0 --eval-iters 2 --eval-interval 100 --log-interval 1 "
    "--tensorboard-log-interval 1 --num-workers 0 "
)
UNTIED = "--untie-embeddings-and-output-weights "
MODELS = {
    "dense": UNTIED,
    "tied": "",
    "mtp": UNTIED + "--mtp-num-layers 1 ",
    "moe": UNTIED + "--num-experts 4 --moe-router-topk 2 --moe-router-load-balancing-type none "
    "--moe-token-dispatcher-type allgather ",
}
HYBRID = f"{UNTIED} --spec hybrid_stack stack --hybrid-layer-pattern "  # attention and MLP: Mamba layers need CUDA
if HAS_HYBRID:
    MODELS |= {
        "hybrid": f"{HYBRID} *-*- ",
        "hybrid-tied": f"{HYBRID} *-*- ".replace(UNTIED, ""),
        "hybrid-mtp": f"{HYBRID} *-*-/*- --mtp-num-layers 1 ",
    }
TP2 = "--tensor-model-parallel-size 2 "
PP2 = "--pipeline-model-parallel-size 2 "
CP2 = "--context-parallel-size 2 "
SP = "--sequence-parallel "
DP = "--use-distributed-optimizer "  # data-parallel over the remaining ranks
VPP = "--num-layers-per-virtual-pipeline-stage 1 "
EP2 = "--expert-model-parallel-size 2 "
RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1 "
PER_TOKEN = "--calculate-per-token-loss "


def training(steps, lr, batch):
    return f"--train-iters {steps} --save-interval {steps} --lr {lr} --global-batch-size {batch}"
