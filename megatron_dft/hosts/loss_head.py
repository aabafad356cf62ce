"""The loss of one Megatron model, from its logits or from its hidden states.

    compute_language_model_loss   labels [b, s], logits [s, b, V/tp] -> NLL [b, s]    bound on the model by `install`
    of_hidden                     labels [b, s], hidden [s, b, h]    -> NLL [b, s]    masked tokens skip the output
                                                                                      layer (compaction), or logits are
                                                                                      not materialized (linear_fused)

`Inputs` are what the model's forward was called with: labels, loss mask, channels. Labels become targets in one place:
transposed, and ignored where the loss mask is 0. Loss, gradient and statistics cover valid tokens only, in both paths.
Any other labels passed to the loss are those of multi-token prediction.

The output layer stays Megatron's own module. For compaction it is called, on fewer rows. Under sequence parallelism
its input is gathered first, so its linear function is called without the layer's own gather. For linear_fused its
weight is used by linear.py. The pre-hooks of the layer run in every case, because they may have to bring the weight
first (DDP's overlapped parameter gather). `main_grad` is filled as the layer would fill it.

`start` and `take` surround a forward pass: the statistics of its tokens are the `MicroBatch` that `take` returns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_dft.autograd import loss_and_stats
from megatron_dft.channels import split_channels
from megatron_dft.compaction import compacted, gather_sequence, whole
from megatron_dft.config import DFTConfig
from megatron_dft.hosts import compat
from megatron_dft.linear import Split, WeightGradient, linear_loss_and_stats
from megatron_dft.metrics import TokenBatch
from megatron_dft.stats import TokenStats

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Inputs:
    """What the forward of a model was called with."""

    labels: Tensor  # [b, s] int64, without channels
    loss_mask: Tensor | None  # as many elements as the labels
    channel: Tensor | None  # [b, s] int64; None: no channels are configured


@dataclass(frozen=True)
class MicroBatch:
    """Statistics of one forward pass, of n tokens in [s, b] order; `rows` are their positions, None: all of them."""

    stats: TokenStats  # of [n] or [s, b]
    rows: Tensor | None  # [n]
    inputs: Inputs
    differentiable: bool = True  # whether a gradient of the loss reaches the model

    @property
    def shape(self) -> torch.Size:
        """[b, s]"""
        return self.inputs.labels.shape

    def pick(self, x: Tensor) -> Tensor:
        """A value of each token, in [b, s] order and any shape -> in the shape and order of `stats`."""
        x = x.reshape(self.shape).transpose(0, 1).reshape(-1)
        return (x if self.rows is None else x.index_select(0, self.rows)).view(self.stats.valid.shape)

    def tokens(self, loss_mask: Tensor, training: bool) -> TokenBatch:
        """Every token, [b, s]: what a callback receives."""
        everywhere = TokenStats(**{f.name: self._spread(getattr(self.stats, f.name)) for f in fields(TokenStats)})
        return TokenBatch(everywhere, loss_mask.reshape(self.shape), self.inputs.channel, training)

    def _spread(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        x = x.flatten()
        if self.rows is not None:
            x = x.new_zeros(self.shape.numel()).index_copy(0, self.rows, x)
        return x.view(self.shape[::-1]).transpose(0, 1)


class LossHead:
    """Labels, and logits or hidden states, to the loss of a model that `compat` accepts."""

    def __init__(self, model: Any, config: DFTConfig) -> None:
        self.model = model
        self.options = config.options(compat.tp_group(model))
        self.compact = compat.compacts(model, config)
        self.split = config.split() if config.linear_fused else None
        self.channels = len(config.detail.channels)
        self.host_loss = model.compute_language_model_loss
        self.separate_mtp = compat.has_mtp(model.config) and config.mtp == "nll"
        self.inputs: Inputs | None = None  # of the forward pass that runs; None once its loss is computed
        self._bypassed: list[Tensor | None] = []  # the weight, when hidden states come instead of logits
        self.computed, self.trained = 0, 0  # losses under autograd, and how many of them a gradient has reached
        self.counted: Tensor | None = None  # whether a loss mask counted a token without a loss
        self._recording = False
        self._micro_batches: list[MicroBatch] = []

    @property
    def from_hidden(self) -> bool:
        """Whether the output layer is part of the loss."""
        return self.compact or self.split is not None

    def start(self) -> None:
        """Keep the statistics of the next forward pass."""
        self._recording, self._micro_batches = True, []

    def take(self) -> MicroBatch | None:
        """Return the statistics of the forward pass since `start`, and forget them; None: there was none.

        Raises:
            ValueError: if there were several, because the loss that they make together is not known here.
        """
        taken, self._recording, self._micro_batches = self._micro_batches, False, []
        if len(taken) > 1:
            raise ValueError(
                f"forward_step: expected one forward pass with labels, got {len(taken)}, whose metrics cannot be told "
                "apart; pass the labels once, or train with install() and without with_metrics()"
            )
        return taken[0] if taken else None

    def receive(self, labels: Tensor, loss_mask: Tensor | None) -> Inputs:
        """Remember what a forward pass is called with. Returns it, without channels on the labels.

        Raises:
            ValueError: for a loss mask that has not one element per label.
        """
        if loss_mask is not None and loss_mask.numel() != labels.numel():
            raise ValueError(
                f"loss_mask: expected one weight for each of the labels {tuple(labels.shape)}, got "
                f"{tuple(loss_mask.shape)}"
            )
        channel = None
        if self.channels:
            labels, channel = split_channels(labels, self.channels)
        self.inputs = Inputs(labels, loss_mask, channel)
        return self.inputs

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """labels [b, s], logits [s, b, V/tp] (hidden states after `bypass`) -> NLL [b, s]."""
        if self.separate_mtp:
            if self.inputs is None:
                raise ValueError(
                    "--loss-mtp nll: the labels of the model and of its multi-token prediction cannot be told apart, "
                    "because the forward hooks of the model did not run; call model(...), not model.forward(...)"
                )
            if labels is not self.inputs.labels:
                return self.host_loss(labels, logits)
        if self._bypassed:
            return self.of_hidden(labels, logits, self._bypassed.pop())
        if self.split is not None and not compat.has_mtp(self.model.config):
            raise ValueError(
                "--loss-linear-fused: expected hidden states, got logits that were computed already; call the model, "
                "model(...), not model.forward(...), which skips its hooks"
            )
        compat.check_width(self.model, logits)
        inputs = self._inputs_of(labels)
        return self._finish(*loss_and_stats(logits, self._target(inputs), self.options), None, inputs)

    def bypass(self) -> None:
        """Make the next call of the output layer return its input; the loss then applies the layer."""
        layer = self.model.output_layer

        def forward(hidden: Tensor, weight: Tensor | None = None, **others: Any) -> tuple[Tensor, None]:
            del layer.forward
            self._bypassed.append(weight)
            return hidden, None

        layer.forward = forward

    def reset(self) -> None:
        """Undo `bypass` and `receive`, in case a forward pass failed in between."""
        self.inputs = None
        self._bypassed.clear()
        if hasattr(self.model, "output_layer"):
            vars(self.model.output_layer).pop("forward", None)

    def of_hidden(self, labels: Tensor, hidden: Tensor, weight: Tensor | None) -> Tensor:
        """labels [b, s], hidden [s, b, h], or [s/tp, b, h] under sequence parallelism -> NLL [b, s].

        `weight` is the one that the host passes to its output layer: None, or that of tied embeddings.
        """
        layer = self.model.output_layer
        if layer.sequence_parallel:
            hidden = gather_sequence(hidden, self.options.tp_group)

        def of_rows(rows: Tensor, target: Tensor) -> tuple[Tensor, TokenStats]:
            if self.split is None:
                return self._materialized(layer, rows, weight, target)
            return self._chunked(layer, rows, weight, target, self.split)

        inputs = self._inputs_of(labels)
        target = self._target(inputs)
        compute = compacted if self.compact else whole
        loss, stats, rows = compute(of_rows, hidden.flatten(0, 1), target.view(-1), self.options.ignore_index)
        return self._finish(loss.view(target.shape), stats, rows, inputs)

    def _inputs_of(self, labels: Tensor) -> Inputs:
        """Of the forward pass, if these are its labels."""
        if self.inputs is not None and labels is self.inputs.labels:
            return self.inputs
        return Inputs(labels, None, None)

    def _target(self, inputs: Inputs) -> Tensor:
        """[b, s] -> [s, b], ignored where the loss mask is 0."""
        labels, mask = inputs.labels, inputs.loss_mask
        if mask is not None:
            labels = labels.masked_fill(mask.reshape(labels.shape) == 0.0, self.options.ignore_index)
        return labels.transpose(0, 1).contiguous()

    def _materialized(
        self, layer: Any, rows: Tensor, weight: Tensor | None, target: Tensor
    ) -> tuple[Tensor, TokenStats]:
        if layer.sequence_parallel:
            logits = _linear(layer, rows, weight, self.options.tp_group)
        else:
            logits, _ = layer(rows, weight=weight)
        compat.check_width(self.model, logits)
        return loss_and_stats(logits, target, self.options)

    def _chunked(
        self, layer: Any, rows: Tensor, weight: Tensor | None, target: Tensor, split: Split
    ) -> tuple[Tensor, TokenStats]:
        into = MainGrad if layer.gradient_accumulation_fusion else WeightGradient
        rows, weight = _after_pre_hooks(layer, rows, weight)
        return linear_loss_and_stats(
            rows, layer.weight if weight is None else weight, target, self.options, split, into
        )

    def _finish(self, loss: Tensor, stats: TokenStats, rows: Tensor | None, inputs: Inputs) -> Tensor:
        """[s, b] -> [b, s]."""
        if self.inputs is None or inputs is self.inputs:  # not of multi-token prediction, whose loss comes first
            self.inputs = None
            if self._recording:
                self._micro_batches.append(MicroBatch(stats, rows, inputs, loss.requires_grad))
            if loss.requires_grad:
                self.computed += 1
                loss.register_hook(self._count_backward)
        return loss.transpose(0, 1).contiguous()

    def _count_backward(self, gradient: Tensor) -> None:
        self.trained += 1

    def note_counted(self, without_loss: Tensor) -> None:
        """Remember whether a loss mask counted a token that has no loss; on the device."""
        any_token = without_loss.any()
        self.counted = any_token if self.counted is None else self.counted | any_token

    def check_counted(self) -> None:
        """One host-device sync. Raises ValueError if a loss mask counted a token that has no loss."""
        if self.counted is not None and self.counted:
            raise ValueError(
                "loss_func: its loss mask counts tokens that have no loss, because their label is -100 or the "
                "loss_mask given to the model leaves them out; give both the same mask, 0 where the label is -100"
            )

    def check_trained(self) -> None:
        """After a training step. Raises ValueError if a loss was computed and another one was trained on."""
        if self.computed and not self.trained:
            raise ValueError(
                f"{type(self.model).__name__}: its loss was computed in {self.computed} forward passes, and "
                f"a gradient came back to {self.trained} of them; forward_step trains on another loss: return the "
                "model's output, or leave --loss-type out"
            )


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


def head_of(chunk: torch.nn.Module | None) -> LossHead | None:
    """The loss that `install` bound on a model chunk; None: none is bound, or this stage computes no loss."""
    model = compat.model_with_loss(chunk) if chunk is not None else None
    bound = vars(model).get(compat.LOSS) if model is not None else None
    head = getattr(bound, "__self__", None)
    return head if isinstance(head, LossHead) else None


def ignore_masked(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch of a host that does not pass its loss mask to the model, with masked labels set to -100."""
    labels, loss_mask = batch.get("labels"), batch.get("loss_mask")
    if labels is None or loss_mask is None or labels.shape != loss_mask.shape:
        return dict(batch)
    return {**batch, "labels": labels.masked_fill(loss_mask == 0, IGNORE_INDEX)}


def _linear(layer: Any, rows: Tensor, weight: Tensor | None, tp_group: ProcessGroup | None) -> Tensor:
    """The output layer under sequence parallelism, applied to rows of the whole sequence -> logits [n, V/tp].

    Megatron's own linear function, called without the layer's gather of the sequence. The gradient of the input is
    summed over the tensor-parallel ranks, as without sequence parallelism.
    """
    from megatron.core.tensor_parallel import layers

    rows, weight = _after_pre_hooks(layer, rows, weight)
    weight = layer.weight if weight is None else weight
    linear: Any = layers.linear_with_grad_accumulation_and_async_allreduce
    if not weight.requires_grad:
        linear = layers.linear_with_frozen_weight
    return linear(
        input=rows,
        weight=weight,
        bias=None if layer.skip_bias_add else layer.bias,
        gradient_accumulation_fusion=layer.gradient_accumulation_fusion,
        allreduce_dgrad=True,
        sequence_parallel=False,
        tp_group=tp_group,
    )


def _after_pre_hooks(layer: Any, rows: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Run the forward pre-hooks of a layer that is not called itself; returns its arguments as they leave them."""
    args: tuple = (rows,)
    kwargs: dict[str, Any] = {"weight": weight}
    for key, hook in list(layer._forward_pre_hooks.items()):
        if key in layer._forward_pre_hooks_with_kwargs:
            result = hook(layer, args, kwargs)
            args, kwargs = (args, kwargs) if result is None else result
        else:
            result = hook(layer, args)
            args = args if result is None else result if isinstance(result, tuple) else (result,)
    return args[0], kwargs.get("weight")
