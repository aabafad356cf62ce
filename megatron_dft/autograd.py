"""The loss as one autograd function: it joins a backend, the one collective, and an objective.

    forward     shard statistics -> all-gather of [3..5, tokens] over the tensor-parallel group -> merge -> objective
    backward    (upstream x gate) x (softmax - onehot), from the logits and three numbers per token; no collective

Per token the forward sends 3 values (one more each for entropy and collision, when the objective needs them) and
saves 3: the maximum, the log of the sum relative to it (together they would lose digits when logits are large) and
the gate. The gate is never differentiated, so dL/dlogits = gate x (softmax - onehot) exactly, for every objective.

A backend is a module with `shard_stats`, `merge` and `shard_gradient`: reference.py, triton_kernels.py. For
comparison, Megatron's unfused cross entropy makes three all-reduces, overwrites fp32 logits in forward and saves a
softmax of the size of the logits. Left out here: the output layer itself (linear.py), and how a host calls this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_dft import reference
from megatron_dft.objectives import Objective
from megatron_dft.stats import TokenStats, VocabShard

VALUES = ("objective", "nll")
BACKENDS = ("auto", "torch", "triton")


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
    statistics: frozenset[str] = frozenset()  # for a report, beyond what the objective needs

    def __post_init__(self) -> None:
        if self.true_vocab_size is not None and self.true_vocab_size < 1:
            raise ValueError(f"true_vocab_size: expected at least 1, got {self.true_vocab_size}")
        if self.value not in VALUES:
            raise ValueError(f"value: expected one of {', '.join(VALUES)}, got {self.value!r}")
        if self.backend not in BACKENDS:
            raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {self.backend!r}")

    @property
    def needs(self) -> frozenset[str]:
        """Which statistics the one pass yields beyond the log-probability."""
        return self.objective.needs | self.statistics

    def kernels(self, device: torch.device, dtype: torch.dtype) -> ModuleType:
        """The backend for such logits. Raises ValueError where it cannot run; then no other one takes its place."""
        automatic = "triton" if device.type == "cuda" and dtype != torch.float64 else "torch"
        if (automatic if self.backend == "auto" else self.backend) == "torch":
            return reference
        try:
            from megatron_dft import triton_kernels  # `import megatron_dft` needs torch alone
        except ImportError as error:
            raise ValueError(
                "backend 'triton': expected the triton package, which CUDA builds of PyTorch bring along, got "
                f"{error}; install it, or use backend='torch'"
            ) from error
        triton_kernels.check(device, dtype)
        return triton_kernels

    def shard(self, width: int) -> VocabShard:
        """This rank's columns, after checking the vocabulary size against the width of its logits."""
        ranks, rank = (1, 0) if self.tp_group is None else (self.tp_group.size(), self.tp_group.rank())
        size = width * ranks if self.true_vocab_size is None else self.true_vocab_size
        if size > width * ranks:
            raise ValueError(
                f"true_vocab_size: expected at most {width * ranks} ({ranks} shards of {width} columns), got {size}"
            )
        return VocabShard(rank * width, min(max(size - rank * width, 0), width), size)


def loss_and_stats(logits: Tensor, target: Tensor, options: LossOptions) -> tuple[Tensor, TokenStats]:
    """`vocab_parallel_dft_loss` together with the statistics that its one pass yields anyway."""
    owners = [x for x in (logits, logits._base) if x is not None and x.is_leaf and x.requires_grad]
    if options.inplace_backward and owners:
        raise ValueError(
            "inplace_backward: expected logits computed by another operation, got a leaf or a view of one, whose "
            "values the gradient would overwrite; pass inplace_backward=False"
        )
    loss, *stats = _VocabParallelLoss.apply(logits, target, options)
    return loss, unpack_stats(stats, options.shard(logits.shape[-1]).vocab_size)


class _VocabParallelLoss(torch.autograd.Function):
    """Joins kernels and objectives; the loss is differentiable, the statistics are not."""

    @staticmethod
    def forward(ctx, logits: Tensor, target: Tensor, options: LossOptions):
        loss, saved, stats = loss_forward(logits, target, options)
        ctx.save_for_backward(logits, target, saved)
        ctx.options = options
        return loss, *pack_stats(ctx, stats)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor, *_):
        logits, target, saved = ctx.saved_tensors
        return loss_backward(logits, target, saved, upstream, ctx.options, ctx.options.inplace_backward), None, None


def pack_stats(ctx, stats: TokenStats) -> tuple[Tensor | None, ...]:
    """As outputs of an autograd function that nothing is differentiated through."""
    ctx.set_materialize_grads(False)  # no zeros for them
    packed = (stats.logprob, stats.valid, stats.correct, stats.entropy, stats.collision, stats.loss, stats.gate)
    ctx.mark_non_differentiable(*(x for x in packed if x is not None))
    return packed


def unpack_stats(packed: Sequence[Tensor | None], vocab_size: int) -> TokenStats:
    """What `pack_stats` has packed."""
    logprob, valid, correct, entropy, collision, loss, gate = packed
    assert logprob is not None and valid is not None
    return TokenStats(logprob, valid, correct, entropy, collision, vocab_size, loss, gate)


def loss_forward(logits: Tensor, target: Tensor, options: LossOptions) -> tuple[Tensor, Tensor, TokenStats]:
    """The loss [...], what backward needs [3, ...], and the statistics of the whole vocabulary [...]."""
    check(logits, target)
    kernels, shard = options.kernels(logits.device, logits.dtype), options.shard(logits.shape[-1])
    target = target.contiguous()
    part = kernels.shard_stats(_rows(logits), target.view(-1), options.ignore_index, shard, options.needs)
    return gather_and_merge(kernels, part[None], target, shard.vocab_size, options)


def gather_and_merge(
    kernels: ModuleType,
    parts: Tensor,  # [C, K, N] sums of this rank's chunks of the vocabulary
    target: Tensor,  # [...]
    vocab_size: int,
    options: LossOptions,
) -> tuple[Tensor, Tensor, TokenStats]:
    """From the parts of the vocabulary on this rank to the loss over all of it; see a backend's `merge`."""
    if torch.is_anomaly_enabled():
        _refuse_unknown_ids(target, options.ignore_index, vocab_size)
    shards = _all_gather(parts, options.tp_group)
    how = options.objective, options.needs, options.value
    return kernels.merge(shards, target, options.ignore_index, vocab_size, *how)


def loss_backward(
    logits: Tensor, target: Tensor, saved: Tensor, upstream: Tensor, options: LossOptions, inplace: bool
) -> Tensor:
    """The gradient of the logits, over them if `inplace`."""
    kernels, rows = options.kernels(logits.device, logits.dtype), _rows(logits)
    out = rows if inplace else torch.empty_like(rows)
    shard = options.shard(logits.shape[-1])
    target = target.contiguous().view(-1)
    kernels.shard_gradient(rows, target, saved.view(3, -1), upstream.reshape(-1), shard, out)
    return out.view(logits.shape)


def _rows(logits: Tensor) -> Tensor:
    """[..., V/tp] -> [N, V/tp] with the words of a row next to each other; a copy only where memory demands it."""
    rows = logits.reshape(-1, logits.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _all_gather(parts: Tensor, group: ProcessGroup | None) -> Tensor:
    """[C, K, N] of each rank -> [R*C, K, N] in rank order, on every rank."""
    if group is None or group.size() == 1:
        return parts
    rows = parts.flatten(0, 1)
    gathered = rows.new_empty(group.size() * len(rows), rows.shape[1])
    torch.distributed.all_gather_into_tensor(gathered, rows, group=group)
    return gathered.view(group.size() * len(parts), *parts.shape[1:])


def check(rows: Tensor, target: Tensor, name: str = "logits") -> None:
    """Refuse what would give a wrong number, without asking the device."""
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
        raise ValueError(f"target: expected the device of the {name}, {rows.device}, got {target.device}")


def _refuse_unknown_ids(target: Tensor, ignore_index: int, vocab_size: int) -> None:
    """What would be a NaN is an error for those who look for the cause of one; waits for the device."""
    unknown = (target != ignore_index) & ((target < 0) | (target >= vocab_size))
    if unknown.any():
        where = tuple(unknown.nonzero()[0].tolist())
        raise ValueError(
            f"target: expected ids from 0 to {vocab_size - 1}, or {ignore_index} to ignore a token, got "
            f"{target[where].item()} at {where}; compare the tokenizer of the data with the vocabulary of the model"
        )
