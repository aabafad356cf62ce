"""Causal attention on the CPU with context parallelism and packed documents.

    partition       positions of the tokens of a context-parallel rank
    attention       softmax(scale q k^T) v for this rank's queries: all-gather k and v, mask, one SDPA call

Context parallelism with n ranks splits a sequence into 2n chunks. Rank r has chunks r and 2n-1-r (zig-zag), which
balances causal work. Packed documents are concatenated in one sequence; `cu_seqlens` are their cumulative lengths. Each
document is split separately, so every length must be divisible by 2n. A token attends to itself and to earlier tokens
of its own document.

Cost: every rank holds all keys and values and a mask [tokens / n, tokens]. One all-gather of k and v in forward, one
all-reduce of their gradients in backward. Intended for correctness on small models, not for long sequences. Not
supported: sliding windows, attention bias, sinks, and non-causal masks.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup


def partition(
    cu_seqlens: Tensor,  # [documents + 1]
    total_tokens: int,
    cp_size: int,
    cp_rank: int,
) -> Tensor:  # [total_tokens / cp_size] int64
    """Positions in the whole sequence of the tokens of rank `cp_rank`, in their order on that rank.

    Signature and result of Transformer Engine's `thd_get_partitioned_indices`. A sequence that is not packed is one
    document: `cu_seqlens = [0, total_tokens]`. Empty documents are allowed; Megatron pads `cu_seqlens` with them.

    Raises:
        ValueError: if the documents do not fill the sequence or cannot be split into 2 * cp_size equal chunks.
    """
    bounds = torch.unique_consecutive(cu_seqlens.long())
    if bounds[0] != 0 or bounds[-1] != total_tokens:
        raise ValueError(
            f"cu_seqlens: expected cumulative lengths from 0 to {total_tokens}, got {bounds[0]} to {bounds[-1]}; "
            "pad the last document"
        )
    lengths = bounds.diff()
    chunks = 2 * cp_size if cp_size > 1 else 1
    if (lengths % chunks).any():
        uneven = lengths[lengths % chunks != 0][0]
        raise ValueError(
            f"cu_seqlens: expected documents of a multiple of {chunks} tokens with context parallel size {cp_size}, "
            f"got one of {uneven}; pad each document"
        )
    position = torch.arange(total_tokens, device=cu_seqlens.device)
    document = torch.bucketize(position, bounds[1:], right=True)
    chunk = (position - bounds[document]) // (lengths[document] // chunks)
    return position[torch.minimum(chunk, chunks - 1 - chunk) == cp_rank]


def attention(
    query: Tensor,  # [s, b, heads, d], or packed [s, heads, d]
    key: Tensor,  # [s, b, groups, d], or packed [s, groups, d]
    value: Tensor,  # [s, b, groups, dv], or packed [s, groups, dv]
    *,
    cu_seqlens: Tensor | None = None,  # [documents + 1], of the whole sequence
    cp_group: ProcessGroup | None = None,
    softmax_scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:  # [s, b, heads * dv], or packed [s, heads * dv]
    """Causal attention of this rank's queries to the whole sequence; differentiable.

    Args:
        query: each group of `key` serves heads / groups consecutive heads.
        cu_seqlens: cumulative lengths of packed documents; None: each sequence is one document.
        cp_group: the ranks that share the sequence, zig-zag as in `partition`; None: no context parallelism.
        softmax_scale: None: 1 / sqrt(d).
        dropout: probability of dropping an attention weight.
    """
    if query.dim() == 3:
        out = attention(
            *(x.unsqueeze(1) for x in (query, key, value)),
            cu_seqlens=cu_seqlens,
            cp_group=cp_group,
            softmax_scale=softmax_scale,
            dropout=dropout,
        )
        return out.squeeze(1)
    ranks, rank = (1, 0) if cp_group is None else (cp_group.size(), cp_group.rank())
    total = query.shape[0] * ranks
    if cu_seqlens is None:
        cu_seqlens = torch.tensor([0, total])
    if ranks > 1:
        key, value = _AllGather.apply(key, cp_group), _AllGather.apply(value, cp_group)
    positions = [partition(cu_seqlens, total, ranks, r) for r in range(ranks)]
    visible = _visible(positions[rank], torch.cat(positions), cu_seqlens)
    query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [b, heads, s, d]
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=visible, dropout_p=dropout, scale=softmax_scale, enable_gqa=True
    )
    return out.permute(2, 0, 1, 3).flatten(2)


def _visible(query_position: Tensor, key_position: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Mask [queries, keys], bool: keys of the same document that are not later than the query."""
    ends = cu_seqlens[1:].long()
    query_document, key_document = (torch.bucketize(x, ends, right=True) for x in (query_position, key_position))
    return (query_document[:, None] == key_document) & (query_position[:, None] >= key_position)


class _AllGather(torch.autograd.Function):
    """[s, ...] of each rank -> [ranks * s, ...] in rank order; backward all-reduces the gradient."""

    @staticmethod
    def forward(ctx, local: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(local, memory_format=torch.contiguous_format) for _ in range(group.size())]
        dist.all_gather(parts, local.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, None]:
        upstream = upstream.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(upstream, group=ctx.group)
        return upstream.chunk(ctx.group.size())[ctx.group.rank()].contiguous(), None
