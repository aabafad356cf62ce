"""Backend "triton": the kernel interface of the loss as CUDA kernels.

    shard_stats      one program per row: one read of the shard, one exponential per logit
    merge            one thread per token: sums of all ranks -> statistics, loss and gate of the objective; a second
                     kernel for `cayley`, whose gate contains the mean probability
    shard_gradient   one program per tile of a row: one read and one write, in place if requested

Memory traffic per bf16 logit: 2 bytes in forward, 4 in backward. This is the minimum when logits are materialized and
the upstream gradient is known only in backward. Rows that are ignored, or whose gradient is 0, are not read; writing
their zeros costs 2 bytes. Arithmetic is fp32, and every result is rounded once. There are no atomics, no autotuning, no
data-dependent launches and no host-device sync: results are bitwise reproducible, and everything can be captured in a
CUDA graph.

Tiling: a row is cut at 16-byte boundaries into vectors of VEC logits. A tile has LANES vectors; each thread loads
UNROLL vectors of a tile before it uses the first. Each lane keeps its own running maximum and sums, so the loop needs
no barrier; this costs one more exponential per vector, to rescale. A vector is loaded as a whole or not at all, so
loads are 16 bytes wide for every width and row stride. The few logits before the first and after the last boundary, the
edge, are masked one by one. Tiles have the shape [LANES, VEC], because then every Triton version keeps a vector within
one thread. Row offsets are int64: there may be more than 2^31 logits.

Not supported: fp64. Objectives without an entry in `FORMS` run as PyTorch operations after `merge`: `talr`,
`eaft:k=20`, and those of users. The k largest logits of `eaft:k=20` come from torch.topk, which reads the logits again.
With TRITON_INTERPRET=1, set before triton is imported, the kernels run on CPU tensors, slowly, for tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_dft.ops.objectives import (
    ASFT,
    DEFT,
    DFT,
    EAFT,
    FP32,
    IW,
    NLL,
    PSFT,
    Blended,
    Cayley,
    Chord,
    Entropy,
    Focal,
    Luffy,
    Mix,
    Objective,
    Prob,
    Threshold,
    TrSFT,
    Tsallis,
    loss_and_gate,
)
from megatron_dft.ops.stats import (
    COLLISION,
    ENTROPY,
    LOG_RATIO_LIMIT,
    TokenStats,
    VocabShard,
    row_names,
    top_k,
    top_k_entropy,
)

NAME = "triton"
LOG2_E = tl.constexpr(1.4426950408889634)
RATIO_LIMIT = tl.constexpr(LOG_RATIO_LIMIT)
LOG_20_INVERSE = tl.constexpr(1.0 / math.log(20.0))
INF = tl.constexpr(float("inf"))
UNDERFLOW = tl.constexpr(-1e4)  # e^-1e4 is 0, and 0 * -1e4 is 0 where 0 * -inf is NaN
UNROLL = 4  # vectors per thread
TOKENS = 128  # tokens per program of `merge`

PYTORCH = "", 0.0, 0.0  # no branch: PyTorch operations after `merge`
# The branch of `_objective` for each objective, and its two parameters.
FORMS: dict[type[Objective], Callable[[Any], tuple[str, float, float]]] = {
    NLL: lambda o: ("mix", 0.0, 1.0),
    DFT: lambda o: ("mix", 1.0, 0.0),
    Mix: lambda o: ("mix", o.alpha, 1.0 - o.alpha),
    Prob: lambda o: ("power", 1.0, 0.0),
    Tsallis: lambda o: ("power", o.q, 0.0) if o.q >= FP32.tiny else ("mix", 0.0, 1.0),
    DEFT: lambda o: ("collision power", 0.0, 0.0),
    Threshold: lambda o: (f"{o.base} between", o.lo, o.hi),
    Entropy: lambda o: {
        "ratio": ("entropy", 1.0, 0.0),
        "complement": ("entropy", -1.0, 1.0),
        "exponential": ("exponential entropy", 0.0, 0.0),
    }[o.form],
    Focal: lambda o: ("focal", o.gamma, 0.0),
    Chord: lambda o: ("chord", 0.0, 0.0),
    Luffy: lambda o: ("luffy", o.gamma, 0.0),
    EAFT: lambda o: ("eaft", o.alpha, 0.0) if o.k == 0 else PYTORCH,
    TrSFT: lambda o: ("trsft", o.alpha, math.log(1.0 / o.alpha)),
    Cayley: lambda o: ("cayley", o.floor, 0.0),
    ASFT: lambda o: ("asft", o.lambda_, 0.0 if o.clamp else -math.inf),
    IW: lambda o: ("iw", o.lo, o.hi),
    PSFT: lambda o: ("psft", 1.0 + o.eps, 0.0),
}


def check(device: torch.device, dtype: torch.dtype) -> None:
    """Raises ValueError for a device or dtype that these kernels do not support."""
    if dtype == torch.float64:
        raise ValueError("backend 'triton': expected bf16, fp16 or fp32 logits, got fp64; use backend='torch'")
    if device.type != "cuda" and isinstance(stats_kernel, triton.runtime.JITFunction):
        raise ValueError(
            f"backend 'triton': expected logits on a CUDA device, got {device.type}; use backend='torch' or 'auto'"
        )


def shard_stats(
    logits: Tensor,  # [N, V/tp], contiguous along the vocabulary
    target: Tensor,  # [N] int64, ids of the whole vocabulary
    ignore_index: int,
    shard: VocabShard,
    needs: frozenset[str],
) -> Tensor:  # [K, N], rows as in `stats.row_names`
    """Sums over this shard, relative to the shard's own maximum; 0 at ignored rows."""
    out = torch.empty(len(row_names(needs)), len(logits), dtype=torch.float32, device=logits.device)
    if len(logits):
        lanes, vector, warps = _shape(logits)
        with torch.cuda.device_of(logits):
            stats_kernel[(len(logits),)](
                X=logits,
                TARGET=target,
                OUT=out,
                row_stride=logits.stride(0),
                columns=shard.columns,
                start=shard.start,
                vocab_size=shard.vocab_size,
                ignore_index=ignore_index,
                n=len(logits),
                ENTROPY=ENTROPY in needs,
                COLLISION=COLLISION in needs,
                LANES=lanes,
                VEC=vector,
                num_warps=warps,
            )
    if k := top_k(needs):
        largest = logits[:, : shard.columns].topk(min(k, shard.columns), 1).values.t().float()
        out[-k:].fill_(-torch.inf)[: len(largest)] = largest - out[0].masked_fill(out[0].isneginf(), 0.0)
    return out


def merge(
    shards: Tensor,  # [R, K, N] from all ranks
    target: Tensor,  # [...] int64, N tokens
    ignore_index: int,
    vocab_size: int,
    objective: Objective,
    needs: frozenset[str],
    return_nll: bool,
    reference: Tensor | None = None,  # [...]
    batch_group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor, TokenStats]:
    """Loss [...], saved for backward [3, ...] (maximum, log-sum, gate), merged statistics [...]."""
    shape, n = target.shape, target.numel()
    result = torch.empty(shape, dtype=torch.float32, device=target.device)
    rows = 5 + (ENTROPY in needs) + (COLLISION in needs)
    columns = torch.empty(rows, *shape, dtype=torch.float32, device=target.device)
    flags = torch.empty(2, *shape, dtype=torch.bool, device=target.device)
    base, blend = (objective.base, objective.blend) if isinstance(objective, Blended) else (objective, None)
    form, first, second = FORMS.get(type(base), lambda o: PYTORCH)(base)
    programs = triton.cdiv(n, TOKENS)
    sums = torch.empty(programs, 2, dtype=torch.float32, device=target.device) if form == "cayley" else None
    if n:
        with torch.cuda.device_of(target):
            merge_kernel[(programs,)](
                SHARDS=shards,
                TARGET=target,
                RESULT=result,
                COLUMNS=columns,
                FLAGS=flags,
                BLEND=blend,
                REFERENCE=reference.contiguous() if form and reference is not None else None,
                SUMS=sums,
                n=n,
                ranks=len(shards),
                ignore_index=ignore_index,
                log_vocab_size=math.log(max(vocab_size, 2)),
                first=first,
                second=second,
                FORM=form,
                NLL=return_nll,
                BLENDED=blend is not None,
                ENTROPY=ENTROPY in needs,
                COLLISION=COLLISION in needs,
                K=shards.shape[1],
                TOKENS=TOKENS,
                num_warps=TOKENS // 32,
            )
            if form == "cayley":
                cayley_kernel[(programs,)](
                    COLUMNS=columns,
                    FLAGS=flags,
                    RESULT=result,
                    BLEND=blend,
                    SUMS=sums,
                    n=n,
                    programs=programs,
                    floor=first,
                    NLL=return_nll,
                    BLENDED=blend is not None,
                    TOKENS=TOKENS,
                    num_warps=TOKENS // 32,
                )
    saved, (logprob, loss), extra = columns[:3], columns[3:5], list(columns[5:])
    stats = TokenStats(
        logprob=logprob,
        valid=flags[0],
        top1=flags[1],
        entropy=extra.pop(0) if ENTROPY in needs else None,
        collision=extra.pop(0) if COLLISION in needs else None,
        top_k_entropy=_top_k_entropy(shards, top_k(needs), flags[0]) if top_k(needs) else None,
        vocab_size=vocab_size,
        reference=reference,
        batch_group=batch_group,
        loss=loss,
        gate=saved[2],
    )
    if not form:
        for place, computed in zip((loss, saved[2]), loss_and_gate(objective, stats), strict=True):
            place.copy_(computed)
        result.copy_(-logprob if return_nll else loss)
    return result, saved, stats


def _top_k_entropy(shards: Tensor, k: int, valid: Tensor) -> Tensor:
    return top_k_entropy(shards, k).view(valid.shape).masked_fill(~valid, 0.0)


def shard_gradient(
    logits: Tensor,  # [N, V/tp], contiguous along the vocabulary
    target: Tensor,  # [N] int64, ids of the whole vocabulary
    saved: Tensor,  # [3, N] maximum and log-sum of the whole vocabulary, gate
    upstream: Tensor,  # [N]
    shard: VocabShard,
    out: Tensor,  # [N, V/tp], may be `logits`
) -> None:
    """Write upstream x gate x (softmax - onehot) to `out`; 0 in padding columns and where upstream or gate is 0."""
    n, width = logits.shape
    if n and width:
        lanes, vector, warps = _shape(logits)
        tiles = triton.cdiv(width, lanes * vector)
        with torch.cuda.device_of(logits):
            gradient_kernel[(n * tiles,)](
                X=logits,
                TARGET=target,
                SAVED=saved,
                UPSTREAM=upstream,
                OUT=out,
                row_stride=logits.stride(0),
                out_stride_difference=out.stride(0) - logits.stride(0),
                upstream_stride=upstream.stride(0),
                width=width,
                columns=shard.columns,
                start=shard.start,
                n=n,
                tiles=tiles,
                LANES=lanes,
                VEC=vector,
                num_warps=warps,
            )
    if out.data_ptr() == logits.data_ptr():
        torch.autograd.graph.increment_version(out)


def _shape(logits: Tensor) -> tuple[int, int, int]:
    """LANES, VEC (logits in 16 bytes), warps."""
    warps = 4 if logits.shape[1] <= 32768 else 8
    return 32 * warps * UNROLL, 16 // logits.element_size(), warps


@triton.jit
def stats_kernel(
    X,
    TARGET,
    OUT,  # [K, N]
    row_stride,
    columns,
    start,
    vocab_size,
    ignore_index,
    n,
    ENTROPY: tl.constexpr,
    COLLISION: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
):
    """`shard_stats` of one row."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(TARGET + row)
    OUT += row
    if target == ignore_index:
        for k in tl.static_range(3 + ENTROPY + COLLISION):
            tl.store(OUT + k * n, 0.0)
        return

    begin = row * row_stride
    first, vectors = _body(begin, columns, VEC)
    lane = tl.arange(0, LANES)[:, None]
    item = tl.arange(0, VEC)[None, :]
    body = X + first * VEC
    m = tl.full((LANES,), -INF, tl.float32)
    s = tl.zeros((LANES,), tl.float32)
    a = tl.zeros((LANES,), tl.float32)
    q = tl.zeros((LANES,), tl.float32)
    for i in range(0, vectors, LANES):
        vector = i + lane
        x = tl.load(body + vector * VEC + item, vector < vectors, -INF, eviction_policy="evict_first")
        m, s, a, q = _accumulate(x.to(tl.float32), m, s, a, q, ENTROPY, COLLISION)
    column, is_edge = _edge(first * VEC - begin, vectors * VEC, columns, VEC)
    edge = tl.load(X + begin + column, is_edge, -INF).to(tl.float32)

    maximum = tl.maximum(tl.max(m, 0), tl.max(edge, 0))
    shift = _difference(m, maximum)
    scale = tl.exp2(shift * LOG2_E)
    distance, e = _exponential(edge, maximum)
    tl.store(OUT, maximum)
    tl.store(OUT + n, tl.sum(s * scale, 0) + tl.sum(e, 0))
    if ENTROPY:
        tl.store(OUT + 3 * n, tl.sum((a + shift * s) * scale, 0) + tl.sum(distance * e, 0))
    if COLLISION:
        tl.store(OUT + (3 + ENTROPY) * n, tl.sum(q * (scale * scale), 0) + tl.sum(e * e, 0))
    owned = (target >= start) & (target < start + columns)
    logit = tl.load(X + begin + target - start, owned, 0.0).to(tl.float32)
    outside = (target < 0) | (target >= vocab_size)
    tl.store(OUT + 2 * n, tl.where(outside, float("nan"), logit))


@triton.jit
def _accumulate(x, m, s, a, q, ENTROPY: tl.constexpr, COLLISION: tl.constexpr):
    """Add a tile of logits x [LANES, VEC] to the sums s, a, q [LANES], relative to the running maxima m [LANES]."""
    larger = tl.maximum(m, tl.max(x, 1))
    shift = _difference(m, larger)
    scale = tl.exp2(shift * LOG2_E)
    distance, e = _exponential(x, larger[:, None])
    if ENTROPY:
        a = (a + shift * s) * scale + tl.sum(distance * e, 1)
    if COLLISION:
        q = q * (scale * scale) + tl.sum(e * e, 1)
    return larger, s * scale + tl.sum(e, 1), a, q


@triton.jit
def _exponential(x, maximum):
    """x - maximum, clamped to UNDERFLOW, and its exponential."""
    distance = x - tl.where(maximum == -INF, 0.0, maximum)
    return tl.maximum(distance, UNDERFLOW), tl.exp2(distance * LOG2_E)


@triton.jit
def _difference(m, larger):
    """m - larger, and 0 where m is -inf: that lane is empty, its sums are 0."""
    return tl.where(m == -INF, 0.0, m - larger)


@triton.jit
def _body(begin, columns, VEC: tl.constexpr):
    """First 16-byte vector of the row at offset `begin`, and the number of whole vectors in it."""
    first = (begin + VEC - 1) // VEC
    return first, tl.maximum((begin + columns) // VEC - first, 0).to(tl.int32)


@triton.jit
def _edge(head, body, end, VEC: tl.constexpr):
    """Columns outside the whole vectors [head, head + body), and which of the 2 VEC slots hold one."""
    index = tl.arange(0, 2 * VEC)
    column = tl.where(index < head, index, index + body)
    return column, column < end


@triton.jit
def merge_kernel(
    SHARDS,  # [R, K, N]
    TARGET,
    RESULT,  # [N]
    COLUMNS,  # [5.., N] maximum, log-sum, gate, logprob, loss[, entropy][, collision]
    FLAGS,  # [2, N] valid, top-1
    BLEND,  # [], or None
    REFERENCE,  # [N] log-probability under the reference model, or None
    SUMS,  # [programs, 2], or None: sum and number of the probabilities of each program, for `cayley_kernel`
    n,
    ranks,
    ignore_index,
    log_vocab_size,
    first,
    second,
    FORM: tl.constexpr,
    NLL: tl.constexpr,
    BLENDED: tl.constexpr,
    ENTROPY: tl.constexpr,
    COLLISION: tl.constexpr,
    K: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """`merge` of TOKENS tokens."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    real = token < n
    valid = (tl.load(TARGET + token, real, ignore_index) != ignore_index) & real
    COLUMNS += token
    FLAGS += token

    maximum = tl.full((TOKENS,), -INF, tl.float32)
    part = SHARDS + token
    for _ in range(ranks):
        maximum = tl.maximum(maximum, tl.load(part, real, -INF))
        part += K * n
    s = tl.zeros((TOKENS,), tl.float32)
    a = tl.zeros((TOKENS,), tl.float32)
    q = tl.zeros((TOKENS,), tl.float32)
    target_logit = tl.zeros((TOKENS,), tl.float32)
    part = SHARDS + token
    for _ in range(ranks):  # in rank order: the same bits on all ranks
        shift = _difference(tl.load(part, real, -INF), maximum)
        scale = tl.exp(shift)
        part_s = tl.load(part + n, real, 0.0)
        s += part_s * scale
        target_logit += tl.load(part + 2 * n, real, 0.0)
        if ENTROPY:
            a += (tl.load(part + 3 * n, real, 0.0) + shift * part_s) * scale
        if COLLISION:
            q += tl.load(part + (3 + ENTROPY) * n, real, 0.0) * (scale * scale)
        part += K * n

    log_sum = tl.log(s)
    distance = target_logit - maximum
    logprob = distance - log_sum
    logprob = tl.where(logprob > 0.0, 0.0, logprob)  # rounding can give +1e-7; NaN is kept
    logprob = tl.where(valid, logprob, 0.0)
    entropy = log_sum - a / s
    entropy = tl.where(valid, tl.where(entropy < 0.0, 0.0, entropy), 0.0)
    collision = q / (s * s)
    collision = tl.where(valid, tl.where(collision > 1.0, 1.0, collision), 0.0)
    if FORM == "cayley":
        counted = valid & (logprob == logprob)
        tl.store(SUMS + 2 * tl.program_id(0), tl.sum(tl.where(counted, tl.exp(logprob), 0.0), 0))
        tl.store(SUMS + 2 * tl.program_id(0) + 1, tl.sum(counted.to(tl.float32), 0))
    elif FORM != "":
        reference = logprob if REFERENCE is None else tl.load(REFERENCE + token, real, 0.0)
        loss, gate = _objective(
            logprob, entropy / log_vocab_size, entropy, collision, logprob - reference, first, second, FORM
        )
        _write_loss(COLUMNS, RESULT + token, BLEND, logprob, loss, gate, valid, real, n, NLL, BLENDED)
    tl.store(COLUMNS, maximum, real)
    tl.store(COLUMNS + n, log_sum, real)
    tl.store(COLUMNS + 3 * n, logprob, real)
    if ENTROPY:
        tl.store(COLUMNS + 5 * n, entropy, real)
    if COLLISION:
        tl.store(COLUMNS + (5 + ENTROPY) * n, collision, real)
    tl.store(FLAGS, valid, real)
    tl.store(FLAGS + n, valid & (distance >= 0.0), real)


@triton.jit
def cayley_kernel(
    COLUMNS,  # [5, N]
    FLAGS,  # [2, N]
    RESULT,  # [N]
    BLEND,  # [], or None
    SUMS,  # [programs, 2]
    n,
    programs,
    floor,
    NLL: tl.constexpr,
    BLENDED: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """The objective `cayley` of TOKENS tokens, after `merge_kernel`: its exponent contains the mean probability."""
    lane = tl.arange(0, TOKENS)
    total = tl.zeros((TOKENS,), tl.float32)
    count = tl.zeros((TOKENS,), tl.float32)
    for i in range(0, programs, TOKENS):  # in the same order in all programs
        total += tl.load(SUMS + 2 * (i + lane), i + lane < programs, 0.0)
        count += tl.load(SUMS + 2 * (i + lane) + 1, i + lane < programs, 0.0)
    floor = floor * tl.sum(total, 0) / tl.maximum(tl.sum(count, 0), 1.0)

    token = tl.program_id(0) * TOKENS + lane
    real = token < n
    COLUMNS += token
    logprob = tl.load(COLUMNS + 3 * n, real, 0.0)
    valid = tl.load(FLAGS + token, real, 0) != 0
    prob = tl.exp(logprob)
    a = floor + (1.0 - floor) * prob / (2.0 - prob)
    a = tl.where(a > 1.0, 1.0, tl.where(a < 1e-3, 1e-3, a))
    loss, gate = -_expm1(a * logprob) / a, tl.exp(a * logprob)
    _write_loss(COLUMNS, RESULT + token, BLEND, logprob, loss, gate, valid, real, n, NLL, BLENDED)


@triton.jit
def _write_loss(COLUMNS, RESULT, BLEND, logprob, loss, gate, valid, real, n, NLL: tl.constexpr, BLENDED: tl.constexpr):
    """Blend with nll, and write loss and gate: 0 at invalid tokens, NaN where the log-probability is."""
    if BLENDED:
        blend = tl.load(BLEND).to(tl.float32)
        loss = _share(1.0 - blend, -logprob) + _share(blend, loss)
        gate = (1.0 - blend) + _share(blend, gate)
    loss = tl.where(valid, loss, 0.0)
    gate = tl.where(valid, tl.where(logprob != logprob, logprob, gate), 0.0)
    tl.store(COLUMNS + 2 * n, gate, real)
    tl.store(COLUMNS + 4 * n, loss, real)
    tl.store(RESULT, -logprob if NLL else loss, real)


@triton.jit
def _objective(logprob, uncertainty, entropy, collision, log_ratio, first, second, FORM: tl.constexpr):
    """Loss and gate as in objectives.py; uncertainty is H / ln V, log_ratio ln r."""
    prob = tl.exp(logprob)
    log_ratio = tl.where(log_ratio > RATIO_LIMIT, RATIO_LIMIT, log_ratio)
    if FORM == "power" or FORM == "collision power":
        a = first if FORM == "power" else tl.maximum(collision, 1e-38)
        gate = tl.exp(a * logprob)
        loss = -_expm1(a * logprob) / a
    elif FORM == "nll between" or FORM == "prob between":
        outside = (prob < first) | (prob > second)
        gate = tl.where(outside, 0.0, 1.0 if FORM == "nll between" else prob)
        loss = tl.where(outside, 0.0, -logprob if FORM == "nll between" else -_expm1(logprob))
    elif FORM == "trsft":
        gate = tl.where(prob > first, 1.0, prob / first)
        loss = tl.where(prob > first, -logprob, (1.0 - prob / first) + second)
    elif FORM == "luffy":
        gate = first * prob / ((prob + first) * (prob + first))
        loss = first / (prob + first)
    elif FORM == "asft":
        log_ratio = tl.where(log_ratio < -RATIO_LIMIT, -RATIO_LIMIT, log_ratio)
        excess = _expm1(-log_ratio)
        gate = prob + first * excess
        gate = tl.where(gate < second, second, gate)
        loss = _share(prob, -logprob) + first * (excess + log_ratio)
    else:
        if FORM == "mix":
            gate = first * prob + second
        elif FORM == "focal":
            gate = _pow(-_expm1(logprob), first)
        elif FORM == "chord":
            gate = prob * -_expm1(logprob)
        elif FORM == "entropy":
            gate = first * tl.where(uncertainty > 1.0, 1.0, uncertainty) + second
        elif FORM == "eaft":
            uncertainty = entropy * LOG_20_INVERSE
            gate = _pow(tl.where(uncertainty > 1.0, 1.0, uncertainty), first)
        elif FORM == "iw":
            ratio = tl.exp(log_ratio)
            gate = tl.where(ratio < first, first, tl.where(ratio > second, second, ratio))
        elif FORM == "psft":
            ratio = tl.exp(log_ratio)
            gate = tl.where(ratio > first, 0.0, ratio)
        else:
            tl.static_assert(FORM == "exponential entropy")
            gate = tl.exp(-entropy)
        loss = _share(gate, -logprob)
    return loss, gate


@triton.jit
def _share(part, x):
    """part * x, and 0 where part is 0."""
    return tl.where(part == 0.0, 0.0, part * x)


@triton.jit
def _pow(x, y):
    """x^y for x in [0, 1] and y >= 0; 0^0 is 1."""
    return tl.where(y == 0.0, 1.0, tl.where(x == 0.0, 0.0, tl.exp2(y * tl.log2(x))))


@triton.jit
def _expm1(x):
    """e^x - 1; by its series near 0, where the difference would lose digits."""
    series = 1.0 + x / 9.0
    for i in tl.static_range(7):
        series = 1.0 + x / (8.0 - i) * series
    return tl.where(tl.abs(x) < 0.7, x * series, tl.exp(x) - 1.0)


@triton.jit
def gradient_kernel(
    X,
    TARGET,
    SAVED,  # [3, N]
    UPSTREAM,
    OUT,
    row_stride,
    out_stride_difference,  # OUT's row stride minus X's: a multiple of 16 tells Triton that both are aligned alike
    upstream_stride,
    width,
    columns,
    start,
    n,
    tiles,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
):
    """`shard_gradient` of one tile of a row."""
    program = tl.program_id(0)
    row = (program // tiles).to(tl.int64)
    tile = program % tiles
    upstream = tl.load(UPSTREAM + row * upstream_stride).to(tl.float32)
    gate = tl.load(SAVED + 2 * n + row)
    maximum = tl.load(SAVED + row)
    log_sum = tl.load(SAVED + n + row)
    target = tl.load(TARGET + row) - start

    coefficient = tl.where((upstream == 0.0) | (gate == 0.0), 0.0, upstream * gate)
    begin = row * row_stride
    first, vectors = _body(begin, width, VEC)
    head = (first * VEC - begin).to(tl.int32)
    X += first * VEC
    OUT += first * VEC + row * out_stride_difference
    target = (target - head).to(tl.int32)  # an id far outside the vocabulary may wrap around; its gate is NaN
    end = columns - head
    vector = tile * LANES + tl.arange(0, LANES)[:, None]
    column = vector * VEC + tl.arange(0, VEC)[None, :]
    _write_error(X, OUT, column, vector < vectors, target, end, maximum, log_sum, coefficient)
    if (tile == 0) & (vectors * VEC < width):
        edge, is_edge = _edge(head, vectors * VEC, width, VEC)
        _write_error(X, OUT, edge - head, is_edge, target, end, maximum, log_sum, coefficient)


@triton.jit
def _write_error(X, OUT, column, mask, target, end, maximum, log_sum, coefficient):
    """Write coefficient x (softmax - onehot); no read if the coefficient is 0. Columns count from the first vector."""
    if coefficient == 0.0:
        tl.store(OUT + column, tl.zeros(column.shape, OUT.dtype.element_ty), mask)
    else:
        x = tl.load(X + column, mask, 0.0, eviction_policy="evict_first").to(tl.float32)
        softmax = tl.exp2((x - maximum) * LOG2_E) * (coefficient * tl.exp(-log_sum))
        error = tl.where(column == target, softmax - coefficient, softmax)
        error = tl.where(column < end, error, 0.0)
        tl.store(OUT + column, error.to(OUT.dtype.element_ty), mask)
