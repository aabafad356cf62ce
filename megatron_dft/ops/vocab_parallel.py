"""The vocabulary-parallel loss: kernel interface, autograd function, public functions.

    forward     statistics of this rank's vocabulary shard
                all-gather of [3..5, tokens] over the tensor-parallel group      the only collective of most objectives
                merge of the shards, loss and gate of the objective
    backward    upstream x gate x (softmax - onehot)                             no collective

Memory: three numbers per token are saved for backward, the maximum, the log of the sum relative to it, and the gate.
The gradient is computed from the logits, which stay alive until then. The gate is detached, so
dL/dlogits = gate x (softmax - onehot) is exact for every objective.

Communication: 3 values per token, one more each for entropy and collision probability if they are needed, k more for
`eaft:k=20`. `talr` has collectives of its own, over `batch_group` (`stats.lower_median`).

Megatron's unfused cross entropy makes three all-reduces, overwrites fp32 logits in forward and saves the softmax.
Not here: the output layer (linear_fused.py), torch.compile (compiled.py), Megatron (hosts/).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_dft.labels import IDS, split_reference
from megatron_dft.ops import torch_backend
from megatron_dft.ops.objectives import NLL, Objective, loss_and_gate, parse_objective
from megatron_dft.ops.stats import COLLISION, ENTROPY, MEDIAN, REFERENCE, TokenStats, VocabShard, accumulation_dtype

BACKENDS = ("auto", "torch", "triton")


# Kernel interface


class Kernels(Protocol):
    """A backend: torch_backend.py or triton_backend.py."""

    NAME: str

    def shard_stats(
        self,
        logits: Tensor,  # [N, V/tp], contiguous along the vocabulary
        target: Tensor,  # [N] int64, ids of the whole vocabulary
        ignore_index: int,
        shard: VocabShard,
        needs: frozenset[str],
    ) -> Tensor:  # [K, N], rows as in `stats.row_names`
        """Sums over this shard, relative to the shard's own maximum; 0 at ignored rows. Reads the logits once."""

    def merge(
        self,
        shards: Tensor,  # [R, K, N], from all ranks
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

    def shard_gradient(
        self,
        logits: Tensor,  # [N, V/tp]
        target: Tensor,  # [N] int64
        saved: Tensor,  # [3, N] maximum and log-sum of the whole vocabulary, gate
        upstream: Tensor,  # [N]
        shard: VocabShard,
        out: Tensor,  # [N, V/tp], may be `logits`
    ) -> None:
        """Write upstream x gate x (softmax - onehot) to `out`; 0 in padding columns and where upstream or gate is 0."""


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """The validated options of `vocab_parallel_dft_loss`."""

    objective: Objective
    tp_group: ProcessGroup | None = None
    ignore_index: int = -100
    return_nll: bool = False
    true_vocab_size: int | None = None
    backend: str = "auto"
    inplace_backward: bool = False
    batch_group: ProcessGroup | None = None  # ranks that share the statistics of a batch
    statistics: frozenset[str] = frozenset()  # for metrics, beyond what the objective needs

    def __post_init__(self) -> None:
        if self.true_vocab_size is not None and self.true_vocab_size < 1:
            raise ValueError(f"true_vocab_size: expected at least 1, got {self.true_vocab_size}")
        if self.backend not in BACKENDS:
            raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {self.backend!r}")

    @property
    def needs(self) -> frozenset[str]:
        """Statistics to compute beyond the log-probability."""
        return self.objective.needs | self.statistics

    def split(self, target: Tensor, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Target without reference, and the reference log-probabilities if the objective needs them.

        A label without a reference becomes an invalid id, so its loss is NaN, also with `return_nll`.
        """
        if REFERENCE not in self.needs:
            return target, None
        check_inputs(logits, target)
        target, reference = split_reference(target, accumulation_dtype(logits))
        return target.masked_fill(reference.isnan() & (target != self.ignore_index), IDS), reference

    def kernels(self, device: torch.device, dtype: torch.dtype) -> Kernels:
        """The backend for logits of this device and dtype.

        Raises:
            ValueError: if the requested backend cannot run there. There is no fallback.
        """
        automatic = "triton" if device.type == "cuda" and dtype != torch.float64 else "torch"
        if (automatic if self.backend == "auto" else self.backend) == "torch":
            return torch_backend
        try:
            from megatron_dft.ops import triton_backend  # `import megatron_dft` needs torch alone
        except ImportError as error:
            raise ValueError(
                f"backend 'triton': cannot import triton ({error}); install it (CUDA builds of PyTorch include it), or "
                "use backend='torch'"
            ) from error
        triton_backend.check(device, dtype)
        return triton_backend

    def shard(self, width: int) -> VocabShard:
        """Vocabulary shard of this rank. Raises ValueError if true_vocab_size exceeds all shards together."""
        ranks, rank = (1, 0) if self.tp_group is None else (self.tp_group.size(), self.tp_group.rank())
        size = width * ranks if self.true_vocab_size is None else self.true_vocab_size
        if size > width * ranks:
            raise ValueError(
                f"true_vocab_size: expected at most {width * ranks} ({ranks} shards of {width} columns), got {size}; "
                "use the vocabulary size of the tokenizer"
            )
        return VocabShard(start=rank * width, columns=min(max(size - rank * width, 0), width), vocab_size=size)


# Autograd function


class _VocabParallelLoss(torch.autograd.Function):
    """logits [..., V/tp] -> loss [...], differentiable, and the statistics, which are not."""

    @staticmethod
    def forward(ctx, logits: Tensor, target: Tensor, reference: Tensor | None, options: LossOptions):
        loss, saved, stats = loss_forward(logits, target, reference, options)
        ctx.save_for_backward(logits, target, saved)
        ctx.options = options
        return loss, *pack_stats(ctx, stats)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor, *_):
        logits, target, saved = ctx.saved_tensors
        gradient = loss_backward(logits, target, saved, upstream, ctx.options, inplace=ctx.options.inplace_backward)
        return gradient, None, None, None


def loss_forward(
    logits: Tensor, target: Tensor, reference: Tensor | None, options: LossOptions
) -> tuple[Tensor, Tensor, TokenStats]:
    """Loss [...], tensor saved for backward [3, ...], statistics of the whole vocabulary [...]."""
    check_inputs(logits, target)
    kernels, shard = options.kernels(logits.device, logits.dtype), options.shard(logits.shape[-1])
    target = target.contiguous()
    sums = kernels.shard_stats(
        logits=_rows(logits),
        target=target.view(-1),
        ignore_index=options.ignore_index,
        shard=shard,
        needs=options.needs,
    )
    return gather_and_merge(kernels, sums[None], target, reference, shard.vocab_size, options)


def gather_and_merge(
    kernels: Kernels,
    sums: Tensor,  # [C, K, N] of this rank's C chunks of the vocabulary
    target: Tensor,  # [...]
    reference: Tensor | None,  # [...]
    vocab_size: int,
    options: LossOptions,
) -> tuple[Tensor, Tensor, TokenStats]:
    """The collective of the loss, then the merge; returns what `loss_forward` returns."""
    if torch.is_anomaly_enabled():
        _check_ids(target, options.ignore_index, vocab_size)
    return kernels.merge(
        shards=_all_gather(sums, options.tp_group),
        target=target,
        ignore_index=options.ignore_index,
        vocab_size=vocab_size,
        objective=options.objective,
        needs=options.needs,
        return_nll=options.return_nll,
        reference=reference,
        batch_group=options.batch_group,
    )


def loss_backward(
    logits: Tensor, target: Tensor, saved: Tensor, upstream: Tensor, options: LossOptions, *, inplace: bool
) -> Tensor:
    """Gradient of the logits [..., V/tp]; written over them if `inplace`."""
    rows = _rows(logits)
    out = rows if inplace else torch.empty_like(rows)
    options.kernels(logits.device, logits.dtype).shard_gradient(
        logits=rows,
        target=target.contiguous().view(-1),
        saved=saved.view(3, -1),
        upstream=upstream.reshape(-1),
        shard=options.shard(logits.shape[-1]),
        out=out,
    )
    return out.view(logits.shape)


STATS = ("logprob", "valid", "top1", "entropy", "collision", "reference", "loss", "gate")


def pack_stats(ctx, stats: TokenStats) -> tuple[Tensor | None, ...]:
    """The tensors of `stats` as non-differentiable outputs of an autograd function."""
    ctx.set_materialize_grads(False)  # no zeros as their gradients
    packed = tuple(getattr(stats, name) for name in STATS)
    ctx.mark_non_differentiable(*(x for x in packed if x is not None))
    return packed


def join_stats(parts: Sequence[TokenStats]) -> TokenStats:
    """Statistics of several chunks of tokens, concatenated."""
    columns = ([getattr(part, name) for part in parts] for name in STATS)
    return unpack_stats([None if x[0] is None else torch.cat(x) for x in columns], parts[0].vocab_size)


def unpack_stats(packed: Sequence[Tensor | None], vocab_size: int | None) -> TokenStats:
    """The inverse of `pack_stats`."""
    tensors: dict[str, Any] = dict(zip(STATS, packed, strict=True))
    return TokenStats(**tensors, vocab_size=vocab_size)


def _all_gather(sums: Tensor, group: ProcessGroup | None) -> Tensor:
    """[C, K, N] of each rank -> [R*C, K, N] in rank order, on every rank."""
    if group is None or group.size() == 1:
        return sums
    rows = sums.flatten(0, 1)
    gathered = rows.new_empty(group.size() * len(rows), rows.shape[1])
    torch.distributed.all_gather_into_tensor(gathered, rows, group=group)
    return gathered.view(group.size() * len(sums), *sums.shape[1:])


def _rows(logits: Tensor) -> Tensor:
    """[..., V/tp] -> [N, V/tp], contiguous along the vocabulary; copied only if its strides require that."""
    rows = logits.reshape(-1, logits.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def check_inputs(rows: Tensor, target: Tensor, name: str = "logits") -> None:
    """Raises ValueError for dtypes, shapes and devices that do not fit. No host-device sync."""
    if rows.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise ValueError(f"{name}: expected bf16, fp16, fp32 or fp64, got {rows.dtype}")
    if target.dtype != torch.int64:
        raise ValueError(f"target: expected int64 token ids, got {target.dtype}; convert them with .long()")
    if target.shape != rows.shape[:-1]:
        raise ValueError(
            f"target: expected shape {tuple(rows.shape[:-1])} for {name} {tuple(rows.shape)}, got "
            f"{tuple(target.shape)}; Megatron's {name} are [s, b, ...], its labels [b, s]: transpose them"
        )
    if target.device != rows.device:
        raise ValueError(f"target: expected the device of the {name}, {rows.device}, got {target.device}; use .to()")


def _check_ids(target: Tensor, ignore_index: int, vocab_size: int) -> None:
    """Raises ValueError for ids outside the vocabulary, whose loss is NaN otherwise. One host-device sync."""
    unknown = (target != ignore_index) & ((target < 0) | (target >= vocab_size))
    if unknown.any():
        where = tuple(unknown.nonzero()[0].tolist())
        raise ValueError(
            f"target: expected ids from 0 to {vocab_size - 1}, or {ignore_index} to ignore a token, got "
            f"{target[where].item()} at {where}; compare the tokenizer of the data with the vocabulary of the model"
        )


# Public functions


def vocab_parallel_dft_loss(
    vocab_parallel_logits: Tensor,  # [..., V/tp]
    target: Tensor,  # [...]
    *,
    objective: str | Objective = "dft",
    tp_group: ProcessGroup | None = None,
    ignore_index: int = -100,
    return_nll: bool = False,
    true_vocab_size: int | None = None,
    backend: str = "auto",
    inplace_backward: bool = False,
    batch_group: ProcessGroup | None = None,
) -> Tensor:  # [...]
    """Per-token loss of an objective, exact for a vocabulary split over `tp_group`.

    Args:
        vocab_parallel_logits: [..., V/tp], this rank's equal shard of the vocabulary, bf16, fp16, fp32 or fp64. Forward
            never writes to it.
        target: [...], int64 ids of the whole vocabulary. `ignore_index` gives a loss and a gradient of 0. Any other id
            outside the vocabulary gives a NaN loss and a NaN gradient for its token, and raises under
            torch.autograd.detect_anomaly(). For an objective with a reference the labels of `with_reference`; a label
            without a reference gives NaN.
        objective: "dft", "tsallis:q=0.5", ... or an `Objective`; see `OBJECTIVES`.
        tp_group: the tensor-parallel ranks; None: this rank has the whole vocabulary.
        return_nll: return the cross entropy instead of the loss. Backward is that of the objective in both cases. Hosts
            use it so that `lm loss` stays the NLL.
        true_vocab_size: exclude the columns from here on (padding) from the softmax. None: use all columns.
        backend: "triton" (CUDA kernels), "torch", or "auto": Triton on CUDA except for fp64 logits, PyTorch elsewhere.
            A requested backend has no fallback.
        inplace_backward: write the gradient over the logits, which saves a buffer of their size. The logits must not
            be a leaf. Autograd raises its version error if they are used again in a later backward. Under torch.compile
            the compiler places the gradient.
        batch_group: the data- and context-parallel ranks whose tokens share the median of `talr`; None: this rank.
            All of them have to call the loss equally often.

    Returns:
        [...], the loss in nats, fp32 (fp64 for fp64 logits).

    Raises:
        ValueError: for an invalid shape, dtype, objective or option.
    """
    if torch.compiler.is_compiling():
        from megatron_dft.ops.compiled import compiled_loss

        return compiled_loss(
            vocab_parallel_logits,
            target,
            objective=objective,
            tp_group=tp_group,
            ignore_index=ignore_index,
            return_nll=return_nll,
            true_vocab_size=true_vocab_size,
            backend=backend,
            batch_group=batch_group,
        )
    options = LossOptions(
        objective=parse_objective(objective),
        tp_group=tp_group,
        ignore_index=ignore_index,
        return_nll=return_nll,
        true_vocab_size=true_vocab_size,
        backend=backend,
        inplace_backward=inplace_backward,
        batch_group=batch_group,
    )
    return loss_and_stats(vocab_parallel_logits, target, options)[0]


def loss_and_stats(logits: Tensor, target: Tensor, options: LossOptions) -> tuple[Tensor, TokenStats]:
    """Per-token loss as in `vocab_parallel_dft_loss`, and the token statistics."""
    owners = [x for x in (logits, logits._base) if x is not None and x.is_leaf and x.requires_grad]
    if options.inplace_backward and owners:
        raise ValueError(
            "inplace_backward: the logits are a leaf or a view of a leaf, and the gradient would overwrite its values; "
            "pass inplace_backward=False"
        )
    loss, *stats = _VocabParallelLoss.apply(logits, *options.split(target, logits), options)
    return loss, unpack_stats(stats, options.shard(logits.shape[-1]).vocab_size)


def vocab_stats(
    vocab_parallel_logits: Tensor,  # [..., V/tp]
    target: Tensor,  # [...]
    *,
    tp_group: ProcessGroup | None = None,
    ignore_index: int = -100,
    true_vocab_size: int | None = None,
    backend: str = "auto",
) -> TokenStats:  # of [...]
    """Log-probability, top-1 hit, entropy and collision probability of each token, detached.

    Arguments and errors as in `vocab_parallel_dft_loss`. One pass over the logits and one all-gather.
    """
    options = LossOptions(
        objective=NLL(),
        tp_group=tp_group,
        ignore_index=ignore_index,
        true_vocab_size=true_vocab_size,
        backend=backend,
        statistics=frozenset({ENTROPY, COLLISION}),
    )
    stats = loss_forward(vocab_parallel_logits.detach(), target, None, options)[2]
    return replace(stats, loss=None, gate=None)


def token_loss(
    nll: Tensor,  # [...]
    objective: str | Objective = "dft",
    *,
    valid: Tensor | None = None,  # [...] bool
) -> Tensor:  # [...]
    """Per-token loss [...] from a cross entropy [...] that was computed elsewhere, in nats.

    Works for every objective of the target's probability alone. `talr` takes the median of the given tokens. The
    derivative with respect to `nll` is the gate. The loss is fp32 (fp64 for fp64), and 0 for tokens that are not
    `valid`.

    Raises:
        ValueError: for an unknown objective, one that needs more than p, or a scheduled one without a blend.
    """
    chosen = parse_objective(objective)
    if chosen.needs - {MEDIAN}:
        raise ValueError(
            f"token_loss: objective {str(chosen)!r} requires {', '.join(sorted(chosen.needs))}, which the NLL does not "
            "contain; call vocab_parallel_dft_loss with the logits, and with labels of with_reference if it needs them"
        )
    return _TokenLoss.apply(nll, chosen, torch.ones_like(nll, dtype=torch.bool) if valid is None else valid)


class _TokenLoss(torch.autograd.Function):
    """loss(nll), with the gate as its derivative."""

    @staticmethod
    def forward(ctx, nll: Tensor, objective: Objective, valid: Tensor) -> Tensor:
        logprob = -nll.to(accumulation_dtype(nll))
        loss, gate = loss_and_gate(objective, TokenStats(logprob=logprob.clamp(max=0.0), valid=valid))
        ctx.save_for_backward(gate)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        (gate,) = ctx.saved_tensors
        return torch_backend.gated(upstream, gate), None, None
