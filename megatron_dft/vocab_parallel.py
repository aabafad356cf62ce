"""The loss: one pass over this rank's logits, one all-gather, and a gradient that is gate x (softmax - onehot).

    forward     shard statistics -> all-gather of [3..5, tokens] over the tensor-parallel group -> merge -> objective
    backward    (upstream x gate) x (softmax - onehot), from the logits and three numbers per token; no collective

Per token the forward sends 3 values (one more each for entropy and collision, when the objective needs them) and
saves 3: the maximum, the log of the sum relative to it (together they would lose digits when logits are large) and
the gate. The gate is never differentiated, so dL/dlogits = gate x (softmax - onehot) exactly, for every objective.

For comparison, Megatron's unfused cross entropy makes three all-reduces, overwrites fp32 logits in forward and saves
a softmax of the size of the logits. Left out here: the output layer itself, and how a host calls this.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_dft import reference
from megatron_dft.objectives import NLL, Objective, parse_objective
from megatron_dft.stats import COLLISION, ENTROPY, ShardStats, TokenStats, VocabShard, merge_shards, token_stats

VALUES = ("objective", "nll")
BACKENDS: dict[str, ModuleType] = {"torch": reference}


@dataclass(frozen=True)
class LossOptions:
    """The options of `vocab_parallel_dft_loss`, checked once; a host builds them when it installs the loss."""

    objective: Objective
    tp_group: ProcessGroup | None = None
    ignore_index: int = -100
    value: str = "objective"
    true_vocab_size: int | None = None
    backend: str = "auto"
    inplace_backward: bool = False

    def __post_init__(self) -> None:
        if self.true_vocab_size is not None and self.true_vocab_size < 1:
            raise ValueError(f"true_vocab_size: expected at least 1, got {self.true_vocab_size}")
        if self.value not in VALUES:
            raise ValueError(f"value: expected one of {', '.join(VALUES)}, got {self.value!r}")
        if self.backend != "auto" and self.backend not in BACKENDS:
            known = ", ".join(["auto", *BACKENDS])
            raise ValueError(f"backend: expected one of {known}, got {self.backend!r}; this version has no other")

    def kernels(self) -> ModuleType:
        return BACKENDS["torch" if self.backend == "auto" else self.backend]

    def shard(self, logits: Tensor) -> VocabShard:
        """This rank's columns, after checking the vocabulary size against the width of the logits."""
        width = logits.shape[-1]
        ranks, rank = (1, 0) if self.tp_group is None else (self.tp_group.size(), self.tp_group.rank())
        size = width * ranks if self.true_vocab_size is None else self.true_vocab_size
        if size > width * ranks:
            raise ValueError(
                f"true_vocab_size: expected at most {width * ranks} ({ranks} shards of {width} columns), got {size}"
            )
        return VocabShard(rank * width, min(max(size - rank * width, 0), width), size)


def vocab_parallel_dft_loss(
    vocab_parallel_logits: Tensor,  # [..., V/tp]
    target: Tensor,  # [...]
    *,
    objective: str | Objective = "dft",
    tp_group: ProcessGroup | None = None,
    ignore_index: int = -100,
    value: str = "objective",
    true_vocab_size: int | None = None,
    backend: str = "auto",
    inplace_backward: bool = False,
) -> Tensor:  # [...]
    """Loss of each token under an objective of the family, exact for a vocabulary split over `tp_group`.

    Args:
        vocab_parallel_logits: this rank's equal share of the vocabulary, bf16, fp16, fp32 or fp64, with any leading
            shape. Forward never writes to it.
        target: int64 ids in the whole vocabulary. `ignore_index` contributes no loss and no gradient; any other id
            outside the vocabulary makes the loss and the gradient of its token NaN.
        objective: "dft", "tsallis:q=0.5", ... or an `Objective`; see `OBJECTIVES`.
        tp_group: the ranks that share the vocabulary; None: all of it is here.
        value: "objective" returns the objective's loss. "nll" returns the cross entropy while backward still sends
            the objective's gradient, so that what a host reports keeps its meaning.
        true_vocab_size: leave the columns from here on (padding) out of the softmax. None: use every column.
        backend: "torch", or "auto" for the best one here. A backend that is named never falls back to another.
        inplace_backward: write the gradient over the logits, which saves a buffer of their size. The logits must not
            be a leaf; whoever uses them again in a later backward gets autograd's version error.

    Returns:
        The loss in nats, fp32 (fp64 for fp64 logits), in the shape of `target`.

    Raises:
        ValueError: for a shape, dtype, objective or option that does not fit, saying what was expected.
    """
    options = LossOptions(
        parse_objective(objective), tp_group, ignore_index, value, true_vocab_size, backend, inplace_backward
    )
    return loss_and_stats(vocab_parallel_logits, target, options)[0]


def vocab_stats(
    vocab_parallel_logits: Tensor,  # [..., V/tp]
    target: Tensor,  # [...]
    *,
    tp_group: ProcessGroup | None = None,
    ignore_index: int = -100,
    true_vocab_size: int | None = None,
    backend: str = "auto",
) -> TokenStats:  # of [...]
    """Log-probability, correctness, entropy and collision probability of each token, detached.

    Arguments and errors as in `vocab_parallel_dft_loss`. One pass over the logits and one all-gather.
    """
    options = LossOptions(NLL(), tp_group, ignore_index, "objective", true_vocab_size, backend)
    _check(vocab_parallel_logits, target, options)
    return _merged_stats(vocab_parallel_logits.detach(), target, options, frozenset({ENTROPY, COLLISION}))[1]


def token_loss(
    nll: Tensor,  # [...]
    objective: str | Objective = "dft",
    *,
    valid: Tensor | None = None,  # [...] bool
) -> Tensor:  # [...]
    """The objective as a function of a cross entropy that someone else computed; nats in, nats out.

    For every objective of the target's probability alone; its gate is the derivative with respect to `nll`. The loss
    is fp32 (fp64 for fp64), and 0 for tokens that are not `valid`. Raises ValueError for objectives that need more
    than the NLL.
    """
    chosen = parse_objective(objective)
    if chosen.needs:
        raise ValueError(
            f"token_loss: expected an objective of the NLL alone, got {str(chosen)!r}, which needs "
            f"{', '.join(sorted(chosen.needs))}; call vocab_parallel_dft_loss with the logits"
        )
    return _TokenLoss.apply(nll, chosen, torch.ones_like(nll, dtype=torch.bool) if valid is None else valid)


def loss_and_stats(logits: Tensor, target: Tensor, options: LossOptions) -> tuple[Tensor, TokenStats]:
    """`vocab_parallel_dft_loss` together with the statistics that its one pass yields anyway."""
    _check(logits, target, options)
    loss, logprob, valid, correct, entropy, collision = _VocabParallelLoss.apply(logits, target, options)
    vocab_size = options.shard(logits).vocab_size
    return loss, TokenStats(logprob, valid, correct, entropy, collision, vocab_size)


class _VocabParallelLoss(torch.autograd.Function):
    """Joins kernels and objectives; the loss is differentiable, the statistics are not."""

    @staticmethod
    def forward(ctx, logits: Tensor, target: Tensor, options: LossOptions):
        merged, stats = _merged_stats(logits, target, options, options.objective.needs)
        loss, gate = _loss_and_gate(options.objective, stats)
        ctx.save_for_backward(logits, target, merged.maximum, merged.log_sum, gate)
        ctx.options = options
        extras = (stats.logprob, stats.valid, stats.correct, stats.entropy, stats.collision)
        ctx.mark_non_differentiable(*(x for x in extras if x is not None))
        return (stats.nll if options.value == "nll" else loss), *extras

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor, *_):
        logits, target, maximum, log_sum, gate = ctx.saved_tensors
        coefficient = _coefficient(upstream, gate)
        rows = logits.reshape(-1, logits.shape[-1])
        out = rows if ctx.options.inplace_backward else torch.empty_like(rows)
        ctx.options.kernels().shard_gradient(
            rows,
            target.reshape(-1),
            maximum.reshape(-1),
            log_sum.reshape(-1),
            coefficient.reshape(-1),
            ctx.options.shard(logits),
            out,
        )
        return out.view(logits.shape), None, None


class _TokenLoss(torch.autograd.Function):
    """loss(nll) with the gate as its derivative."""

    @staticmethod
    def forward(ctx, nll: Tensor, objective: Objective, valid: Tensor) -> Tensor:
        logprob = -nll.to(reference.accumulation_dtype(nll))
        loss, gate = _loss_and_gate(objective, TokenStats(logprob.clamp(max=0.0), valid))
        ctx.save_for_backward(gate)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        (gate,) = ctx.saved_tensors
        return _coefficient(upstream, gate), None, None


def _loss_and_gate(objective: Objective, stats: TokenStats) -> tuple[Tensor, Tensor]:
    """The objective's, 0 where a token is not valid; a NaN loss has a NaN gate, even if the gate is a constant."""
    loss, gate = objective(stats)
    gate = gate.masked_fill(stats.logprob.isnan(), torch.nan)
    return loss.masked_fill(~stats.valid, 0.0), gate.masked_fill(~stats.valid, 0.0)


def _coefficient(upstream: Tensor, gate: Tensor) -> Tensor:
    """Their product, where 0 stays 0 beside an inf or a NaN: masked by the host, or worth nothing to the objective."""
    return (upstream * gate).masked_fill((upstream == 0.0) | (gate == 0.0), 0.0)


def _merged_stats(
    logits: Tensor, target: Tensor, options: LossOptions, needs: frozenset[str]
) -> tuple[ShardStats, TokenStats]:
    """Statistics of the whole vocabulary, in the shape of `target`."""
    shard = options.shard(logits)
    valid = target != options.ignore_index
    packed = options.kernels().shard_stats(
        logits.reshape(-1, logits.shape[-1]), target.reshape(-1), valid.reshape(-1), shard, needs
    )
    gathered = _all_gather(packed, options.tp_group)
    merged = merge_shards(gathered.view(*gathered.shape[:2], *target.shape), needs)
    return merged, token_stats(merged, valid, shard.vocab_size)


def _all_gather(packed: Tensor, group: ProcessGroup | None) -> Tensor:
    """[K, N] of each rank -> [R, K, N] in rank order, on every rank."""
    if group is None or group.size() == 1:
        return packed[None]
    gathered = packed.new_empty(group.size() * packed.shape[0], packed.shape[1])
    torch.distributed.all_gather_into_tensor(gathered, packed, group=group)
    return gathered.view(group.size(), *packed.shape)


def _check(logits: Tensor, target: Tensor, options: LossOptions) -> None:
    """Refuse what would give a wrong number; the device is never asked."""
    if logits.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise ValueError(f"logits: expected bf16, fp16, fp32 or fp64, got {logits.dtype}")
    if target.dtype != torch.int64:
        raise ValueError(f"target: expected int64 token ids, got {target.dtype}; convert them with .long()")
    if target.shape != logits.shape[:-1]:
        raise ValueError(
            f"target: expected shape {tuple(logits.shape[:-1])} for logits {tuple(logits.shape)}, got "
            f"{tuple(target.shape)}; Megatron's logits are [s, b, V/tp], its labels [b, s]: transpose them"
        )
    if target.device != logits.device:
        raise ValueError(f"target: expected the device of the logits, {logits.device}, got {target.device}")
    owners = [x for x in (logits, logits._base) if x is not None and x.is_leaf and x.requires_grad]
    if options.inplace_backward and owners:
        raise ValueError(
            "inplace_backward: expected logits computed by another operation, got a leaf or a view of one, whose "
            "values the gradient would overwrite; pass inplace_backward=False"
        )
