"""The loss of one Megatron model: from logits, or from hidden states where the output layer is part of it.

    of_logits   labels [b, s], logits [s, b, V/tp] -> NLL [b, s]
    of_hidden   labels [b, s], hidden [s, b, h]    -> NLL [b, s]       masked tokens skip the output layer (compaction),
                                                                       or logits are never stored (linear_fused)

Labels become targets in one place: transposed, and ignored where the loss mask that the model was given is 0. So the
loss, its gradient and its statistics are those of valid tokens alone, and the two ways agree.

The output layer stays Megatron's own module. For compaction it is called, on fewer rows. When logits are not stored,
its weight is used by linear.py, from within a call of the module, because hooks on it may have to bring the weight
first (DDP's overlapped gathering of parameters). `main_grad` is filled as the layer would fill it.

The statistics of a micro-batch travel to its report on the loss itself (`statistics_of`, `token_batch`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from megatron_dft.autograd import loss_and_stats
from megatron_dft.compaction import compacted, gather_sequence, whole
from megatron_dft.config import DFTConfig
from megatron_dft.hosts import compat
from megatron_dft.linear import Split, WeightGradient, linear_loss_and_stats
from megatron_dft.metrics import TokenBatch
from megatron_dft.stats import TokenStats

IGNORE_INDEX = -100
_STATS = "megatron_dft_stats"  # on the loss: statistics, and the tokens they belong to
_LOSS_MASK = "megatron_dft_loss_mask"  # on the labels that were given to the model
_CHANNEL = "megatron_dft_channel"


class LossHead:
    """Labels, and logits or hidden states, to the loss of a model that `compat` has passed."""

    def __init__(self, model: Any, config: DFTConfig) -> None:
        self.model = model
        self.options = config.options(compat.tp_group(model))
        self.compact = compat.compacts(model, config)
        self.split = config.split() if config.linear_fused else None
        self._handed_on: list[Tensor | None] = []  # the weight, when hidden states come instead of logits

    @property
    def from_hidden(self) -> bool:
        """Whether the output layer is part of the loss."""
        return self.compact or self.split is not None

    def __call__(self, labels: Tensor, logits: Tensor) -> Tensor:
        """labels [b, s], logits [s, b, V/tp], or what the output layer has handed on -> NLL [b, s]."""
        if self._handed_on:
            return self.of_hidden(labels, logits, self._handed_on.pop())
        if self.split is not None and not compat.has_mtp(self.model.config):
            raise ValueError(
                "--loss-linear-fused: expected hidden states, got logits that were computed already; call the model, "
                "model(...), not model.forward(...), which passes by its hooks"
            )
        compat.check_width(self.model, logits)
        return _with_statistics(*loss_and_stats(logits, self._target(labels), self.options), None, labels)

    def take_over(self) -> None:
        """Let the output layer, once, hand its input on; the loss, which comes next, does its work."""
        layer = self.model.output_layer

        def forward(hidden: Tensor, weight: Tensor | None = None, **others: Any) -> tuple[Tensor, None]:
            del layer.forward
            self._handed_on.append(weight)
            return hidden, None

        layer.forward = forward

    def give_back(self) -> None:
        """Undo `take_over`, if a forward pass has failed in between."""
        self._handed_on.clear()
        vars(self.model.output_layer).pop("forward", None)

    def of_hidden(self, labels: Tensor, hidden: Tensor, weight: Tensor | None) -> Tensor:
        """labels [b, s], hidden [s, b, h], or [s/tp, b, h] under sequence parallelism -> NLL [b, s].

        `weight` is what the host gives to its output layer: None, or that of tied embeddings.
        """
        layer = self.model.output_layer
        if layer.sequence_parallel:
            hidden = gather_sequence(hidden, self.options.tp_group)

        def of_rows(rows: Tensor, target: Tensor) -> tuple[Tensor, TokenStats]:
            if self.split is None:
                return self._stored(layer, rows, weight, target)
            return self._chunked(layer, rows, weight, target, self.split)

        target = self._target(labels)
        compute = compacted if self.compact else whole
        loss, stats, rows = compute(of_rows, hidden.flatten(0, 1), target.view(-1), self.options.ignore_index)
        return _with_statistics(loss.view(target.shape), stats, rows, labels)

    def _target(self, labels: Tensor) -> Tensor:
        """[b, s] -> [s, b], ignored where the loss mask is 0."""
        mask: Tensor | None = getattr(labels, _LOSS_MASK, None)
        if mask is not None:
            labels = labels.masked_fill(mask.reshape(labels.shape) == 0.0, self.options.ignore_index)
        return labels.transpose(0, 1).contiguous()

    def _stored(self, layer: Any, rows: Tensor, weight: Tensor | None, target: Tensor) -> tuple[Tensor, TokenStats]:
        with _without_sequence_parallelism(layer):
            logits, _ = layer(rows, weight=weight)
        compat.check_width(self.model, logits)
        return loss_and_stats(logits, target, self.options)

    def _chunked(
        self, layer: Any, rows: Tensor, weight: Tensor | None, target: Tensor, split: Split
    ) -> tuple[Tensor, TokenStats]:
        into = MainGrad if layer.gradient_accumulation_fusion else WeightGradient

        def forward(rows: Tensor, weight: Tensor | None) -> tuple[Tensor, TokenStats]:
            weight = layer.weight if weight is None else weight
            return linear_loss_and_stats(rows, weight, target, self.options, split, into)

        with _standing_in(layer, forward):
            return layer(rows, weight)


class MainGrad(WeightGradient):
    """Megatron's gradient accumulation fusion: added to `weight.main_grad`, which DDP reduces."""

    def __init__(self, weight: Any) -> None:
        from megatron.core.tensor_parallel import layers

        kernels: Any = layers.fused_weight_gradient_mlp_cuda
        fp32 = weight.main_grad.dtype == torch.float32
        self.weight = weight
        self.accumulate = kernels.wgrad_gemm_accum_fp32 if fp32 else kernels.wgrad_gemm_accum_fp16

    def add(self, columns: slice, gradient: Tensor, hidden: Tensor) -> None:
        self.accumulate(hidden, gradient, self.weight.main_grad[columns])

    def result(self) -> Tensor | None:
        """None, or what makes autograd run DDP's hook on the weight: a tensor that the hook knows not to add."""
        if not hasattr(self.weight, "grad_added_to_main_grad"):
            return None
        self.weight.grad_added_to_main_grad = True
        # Tied embeddings add their own gradient to it.
        make = torch.zeros_like if getattr(self.weight, "zero_out_wgrad", False) else torch.empty_like
        return make(self.weight)


def mark_labels(labels: Tensor, loss_mask: Tensor | None, channel: Tensor | None = None) -> None:
    """Note on the labels of a model's forward pass the mask and the channels that came with them."""
    if loss_mask is not None and loss_mask.numel() != labels.numel():
        raise ValueError(
            f"loss_mask: expected one weight for each of the labels {tuple(labels.shape)}, got {tuple(loss_mask.shape)}"
        )
    setattr(labels, _LOSS_MASK, loss_mask)
    setattr(labels, _CHANNEL, channel)


def ignore_masked(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch of a host that does not give its loss mask to the model: there, masked labels become ignored ones."""
    labels, loss_mask = batch.get("labels"), batch.get("loss_mask")
    if labels is None or loss_mask is None or labels.shape != loss_mask.shape:
        return dict(batch)
    return {**batch, "labels": labels.masked_fill(loss_mask == 0, IGNORE_INDEX)}


def are_marked(labels: Tensor) -> bool:
    """Whether these are the labels that the model was given, not the shifted ones of multi-token prediction."""
    return hasattr(labels, _LOSS_MASK)


def statistics_of(
    output: Tensor,  # [b, s], what the model returned
    loss_mask: Tensor,  # [b, s]
) -> tuple[TokenStats, Tensor, Tensor | None] | None:  # all of the same tokens, in one order
    """What a report is made of: statistics, the mask's weights, channels. None: this is not a loss of ours."""
    if not hasattr(output, _STATS):
        return None
    stats, rows, channel = getattr(output, _STATS)

    def picked(x: Tensor) -> Tensor:
        x = x.transpose(0, 1).reshape(-1)
        return (x if rows is None else x.index_select(0, rows)).view(stats.valid.shape)

    return stats, picked(loss_mask), None if channel is None else picked(channel)


def token_batch(output: Tensor, loss_mask: Tensor, training: bool) -> TokenBatch:
    """The same for every token of the micro-batch, [b, s]."""
    stats, rows, channel = getattr(output, _STATS)

    def spread(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        x = x.flatten()
        x = x if rows is None else x.new_zeros(output.numel()).index_copy(0, rows, x)
        return x.view(output.shape[::-1]).transpose(0, 1)

    everywhere = TokenStats(**{f.name: spread(getattr(stats, f.name)) for f in fields(TokenStats)})
    return TokenBatch(everywhere, loss_mask.view(output.shape), channel, training)


def _with_statistics(loss: Tensor, stats: TokenStats, rows: Tensor | None, labels: Tensor) -> Tensor:
    """[s, b] -> [b, s]. `rows` count in [s, b] order."""
    loss = loss.transpose(0, 1).contiguous()
    setattr(loss, _STATS, (stats, rows, getattr(labels, _CHANNEL, None)))
    return loss


@contextmanager
def _without_sequence_parallelism(layer: Any) -> Iterator[None]:
    """The output layer as it is built without it: given the whole sequence, it sums its input's gradient over ranks."""
    before = layer.sequence_parallel, layer.allreduce_dgrad
    layer.sequence_parallel, layer.allreduce_dgrad = False, before[0] or before[1]
    try:
        yield
    finally:
        layer.sequence_parallel, layer.allreduce_dgrad = before


@contextmanager
def _standing_in(layer: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """Another forward for the layer; its hooks stay."""
    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward
