"""The loss of one Megatron model, from its logits or from its hidden states.

    compute_language_model_loss   labels [b, s], logits [s, b, V/tp] -> NLL [b, s]    bound on the model by `install`
    of_hidden                     labels [b, s], hidden [s, b, h]    -> NLL [b, s]    masked tokens skip the output
                                                                                      layer (compaction), or logits are
                                                                                      not materialized (linear_fused)

`Inputs` are the arguments of one forward pass, and what its labels carried. `_target` transposes the labels and ignores
those with loss mask 0. Loss, gradient and statistics cover valid tokens only. Labels of multi-token prediction also
reach this loss.

The output layer stays Megatron's own module. For compaction it is called, on fewer rows. Under sequence parallelism
its input is gathered first, so its linear function is called without the layer's own gather. For linear_fused its
weight is used by linear_fused.py. The forward pre-hooks of the layer always run, because they may gather the weight
(DDP's overlapped parameter gather). `main_grad` receives the weight gradient, as from the layer itself; with
`token_chunk` in forward, for the upstream gradient of `_expected_upstream`.

`start` and `take` surround a forward pass. `take` returns the statistics of its tokens as a `MicroBatch`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_dft.config import DFTConfig
from megatron_dft.hosts import compat
from megatron_dft.labels import (
    IGNORE_INDEX,
    pack_reference,
    split_channels,
    split_counts,
    split_reference,
    split_weights,
)
from megatron_dft.metrics import TokenBatch
from megatron_dft.ops.compaction import gather_sequence, loss_all_tokens, loss_valid_tokens
from megatron_dft.ops.linear_fused import Split, WeightGradient, differs, linear_loss_and_stats
from megatron_dft.ops.objectives import Blended, Objective, Scheduled
from megatron_dft.ops.stats import MEDIAN, TokenStats, accumulation_dtype
from megatron_dft.ops.vocab_parallel import LossOptions, loss_and_stats


class Schedule:
    """The objective of an installation, with its blend on the device if it is scheduled."""

    def __init__(self, objective: Objective | None) -> None:
        self._objective = objective
        self._iteration: int | None = None
        self._blended: Blended | None = None

    def __str__(self) -> str:
        return str(self._objective)

    def begin(self, iteration: int) -> None:
        """Set the iteration, 1, 2, ... No host-device sync."""
        self._iteration = iteration
        if isinstance(self._objective, Scheduled) and self._blended is not None:
            self._blended.blend.fill_(self._objective.blend_at(iteration))

    def objective(self, device: torch.device) -> Objective:
        """The objective for logits on this device. Raises ValueError if it is scheduled and no iteration was set."""
        assert self._objective is not None
        if not isinstance(self._objective, Scheduled):
            return self._objective
        if self._blended is None:
            if self._iteration is None:
                raise ValueError(
                    f"--loss-type {self._objective}: no iteration was set; call begin(iteration) on the handle of "
                    "install() before each iteration of your training loop"
                )
            blend = torch.full((), self._objective.blend_at(self._iteration), dtype=torch.float64, device=device)
            self._blended = self._objective.with_blend(blend)
        return self._blended


@dataclass(frozen=True)
class Inputs:
    """Arguments of the forward of a model."""

    labels: Tensor  # [b, s] int64, token ids and -100
    loss_mask: Tensor | None  # as many elements as the labels
    channel: Tensor | None  # [b, s] int64; None: no channels are configured
    reference: Tensor | None = None  # [b, s] log-probability under the reference model; None: not needed
    weight: Tensor | None = None  # [b, s] of each token in the gradient; None: 1
    count: Tensor | None = None  # [] int32, divisor of the gradient; None: the number of tokens


@dataclass(frozen=True)
class MicroBatch:
    """Statistics of one forward pass: of n tokens in [s, b] order, at the positions `rows`; None: of all tokens."""

    stats: TokenStats  # of [n] or [s, b]
    rows: Tensor | None  # [n]
    inputs: Inputs
    objective: Objective
    differentiable: bool = True  # whether a gradient of the loss reaches the model

    @property
    def shape(self) -> torch.Size:
        """[b, s]"""
        return self.inputs.labels.shape

    def pick(self, x: Tensor) -> Tensor:
        """Per-token values in [b, s] order and any shape -> in the shape and order of `stats`."""
        x = x.reshape(self.shape).transpose(0, 1).reshape(-1)
        return (x if self.rows is None else x.index_select(0, self.rows)).view(self.stats.valid.shape)

    @property
    def channel(self) -> Tensor | None:
        """Channel of each token of `stats`."""
        return None if self.inputs.channel is None else self.pick(self.inputs.channel)

    @property
    def weight(self) -> Tensor | None:
        """Weight of each token of `stats` in the gradient."""
        return None if self.inputs.weight is None else self.pick(self.inputs.weight)

    def tokens(self, loss_mask: Tensor, training: bool) -> TokenBatch:
        """All tokens [b, s]: the argument of a callback."""
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
    """The loss of one model that `compat` accepts, from labels and logits or hidden states."""

    def __init__(self, model: Any, config: DFTConfig, schedule: Schedule) -> None:
        self.model, self.schedule = model, schedule
        groups = {"batch_group": compat.batch_group(model)} if MEDIAN in config.objective.needs else {}
        self.options = config.options(compat.tp_group(model), **groups)
        self.compact = compat.compacts(model, config)
        self.split = config.split() if config.linear_fused else None
        self.in_forward = config.token_chunk is not None
        self.verified = False  # whether a first backward received the expected upstream gradient
        self.unused = 0  # gradients that forward computed in this step, and backward has not used
        self.channels = len(config.metric_spec.channels)
        self.of_reference, self.weighted, self.reduction = config.of_reference, config.weighted, config.reduction
        self.by_conversation = config.by_conversation
        self.host_loss = model.compute_language_model_loss
        self.separate_mtp = compat.has_mtp(model.config) and config.mtp == "nll"
        self.inputs: Inputs | None = None  # of the current forward pass, until its loss is computed
        self._bypassed: list[Tensor | None] = []  # the weight, if hidden states arrive instead of logits
        self.computed, self.trained = 0, 0  # losses with a graph, and those that received a gradient
        self.counted: Tensor | None = None  # whether a loss mask counted a token that has no loss
        self.errors: dict[str, Tensor] = {}  # error messages, and whether they apply, on the device
        self._recording = False
        self._micro_batches: list[MicroBatch] = []

    @property
    def from_hidden(self) -> bool:
        """Whether the output layer is part of the loss."""
        return self.compact or self.split is not None

    def start(self) -> None:
        """Record the statistics of the next forward pass."""
        self._recording, self._micro_batches = True, []

    def take(self) -> MicroBatch | None:
        """Return the statistics of the forward pass since `start`, or None, and drop them.

        Raises:
            ValueError: for several forward passes, whose combined loss is not known.
        """
        taken, self._recording, self._micro_batches = self._micro_batches, False, []
        if len(taken) > 1:
            raise ValueError(
                f"forward_step: expected one forward pass with labels, got {len(taken)}, whose metrics cannot be "
                "separated; pass the labels once, or use install() without with_metrics()"
            )
        return taken[0] if taken else None

    def receive(self, labels: Tensor, loss_mask: Tensor | None) -> Inputs:
        """Record the arguments of a forward pass. The returned labels are token ids and -100.

        Raises:
            ValueError: for a loss mask whose size is not that of the labels, or a reduction without `with_metrics`.
        """
        if loss_mask is not None and loss_mask.numel() != labels.numel():
            raise ValueError(
                f"loss_mask: expected one weight for each of the labels {tuple(labels.shape)}, got "
                f"{tuple(loss_mask.shape)}"
            )
        reference = channel = weight = count = None
        if self.by_conversation:
            if not self._recording:
                raise ValueError(
                    "--dft-reduction: the divisor of the gradient is the num_tokens of loss_func; wrap forward_step by "
                    "with_metrics(forward_step, config)"
                )
            labels, count = split_counts(labels)
        if self.of_reference:
            labels, reference = split_reference(labels)
            self._note_missing(
                f"--loss-type {self.schedule}: a label carries no reference log-probability; train on token files of "
                "megatron-dft reference, or return labels of with_reference from your data set",
                reference,
                loss_mask,
            )
        if self.weighted:
            labels, weight = split_weights(labels, self.reduction)
            source = f"with_conversations(..., {self.reduction!r})" if self.by_conversation else "with_weights"
            weight = self._note_missing(
                f"{'--dft-reduction ' + self.reduction if self.by_conversation else '--dft-weights'}: a label carries "
                f"no weight; train on token files of megatron-dft data, return labels of {source} from your data set, "
                "or remove the setting",
                weight,
                loss_mask,
            )
        if self.channels:
            labels, channel = split_channels(labels, self.channels)
        self.inputs = Inputs(labels, loss_mask, channel, reference, weight, count)
        return self.inputs

    def _note_missing(self, message: str, values: Tensor, loss_mask: Tensor | None) -> Tensor:
        """Record, on the device, whether a value [b, s] of a token with a loss is NaN; return 1 for other NaNs."""
        missing = values.isnan()
        if loss_mask is not None:
            excluded = loss_mask.reshape(values.shape) == 0.0
            values, missing = values.masked_fill(missing & excluded, 1.0), missing & ~excluded
        self._note(message, missing.any())
        return values

    def _note(self, message: str, applies: Tensor) -> None:
        """Record an error on the device, for `check_tokens`."""
        self.errors[message] = self.errors.get(message, False) | applies

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """labels [b, s], logits [s, b, V/tp], or hidden states after `bypass` -> NLL [b, s]."""
        if self.separate_mtp:
            if self.inputs is None:
                raise ValueError(
                    "--dft-mtp nll: the labels of the model and of its multi-token prediction cannot be distinguished, "
                    "because the forward hooks of the model did not run; call model(...), not model.forward(...)"
                )
            if labels is not self.inputs.labels:
                return self.host_loss(labels, logits)
        if self._bypassed:
            return self.of_hidden(labels, logits, self._bypassed.pop())
        if self.split is not None and not compat.has_mtp(self.model.config):
            raise ValueError(
                "--dft-linear-fused: expected hidden states, got logits that were computed already; call the model, "
                "model(...), not model.forward(...), which skips its hooks"
            )
        compat.check_width(self.model, logits)
        inputs = self._inputs_of(labels)
        return self._finish(*self._from_logits(logits, self._target(inputs)), None, inputs)

    def bypass(self) -> None:
        """Make the next call of the output layer return its input; the loss then applies the layer."""
        layer = self.model.output_layer

        def forward(hidden: Tensor, weight: Tensor | None = None, **others: Any) -> tuple[Tensor, None]:
            del layer.forward
            self._bypassed.append(weight)
            return hidden, None

        layer.forward = forward

    def reset(self) -> None:
        """Discard labels, loss mask and bypass of the previous forward pass."""
        self.inputs = None
        self._bypassed.clear()
        if hasattr(self.model, "output_layer"):
            vars(self.model.output_layer).pop("forward", None)

    def of_hidden(self, labels: Tensor, hidden: Tensor, weight: Tensor | None) -> Tensor:
        """labels [b, s], hidden [s, b, h], or [s/tp, b, h] under sequence parallelism -> NLL [b, s].

        `weight` is the argument of the output layer: None, or the weight of tied embeddings.
        """
        layer = self.model.output_layer
        if layer.sequence_parallel:
            hidden = gather_sequence(hidden, self.options.tp_group)

        def of_rows(rows: Tensor, target: Tensor, upstream: Tensor | None = None) -> tuple[Tensor, TokenStats]:
            if self.split is None:
                return self._materialized(layer, rows, weight, target)
            return self._chunked(layer, rows, weight, target, upstream, self.split)

        inputs = self._inputs_of(labels)
        target = self._target(inputs)
        upstream = (self._expected_upstream(inputs),) if self.in_forward and torch.is_grad_enabled() else ()
        compute = loss_valid_tokens if self.compact else loss_all_tokens
        loss, stats, rows = compute(
            of_rows,
            hidden.flatten(0, 1),
            *(x.view(-1) for x in (target, *upstream)),
            ignore_index=self.options.ignore_index,
        )
        loss = loss.view(target.shape)
        if upstream and loss.requires_grad:
            valid = target != self.options.ignore_index
            loss.register_hook(lambda gradient: self._use(gradient, *upstream, valid))
        return self._finish(loss, stats, rows, inputs)

    def _expected_upstream(self, inputs: Inputs) -> Tensor:
        """[s, b] gradient of the loss under calculate_per_token_loss: grad_scale_func(1) x loss mask x weight."""
        scale = torch.ones(1, device=inputs.labels.device)
        if self.model.config.grad_scale_func is not None:
            scale = torch.as_tensor(self.model.config.grad_scale_func(scale), dtype=scale.dtype, device=scale.device)
        upstream = scale.view(()).expand(inputs.labels.shape)
        for factor in (inputs.loss_mask, inputs.weight):
            if factor is not None:
                upstream = upstream * factor.reshape(upstream.shape).to(upstream)
        return upstream.transpose(0, 1).contiguous()

    def _use(self, gradient: Tensor, expected: Tensor, valid: Tensor) -> None:
        """Backward uses the gradients that forward computed for the upstream gradient `expected`.

        Raises ValueError for another gradient in the first backward with a token; later `check_tokens` does.
        """
        self.unused -= 1
        self._note(
            "--dft-token-chunk: the loss received another gradient than the one for which forward computed the "
            "gradients, grad_scale_func(1) x loss mask of the model; pass the loss mask to the model (loss_mask=, or "
            "labels of -100) and return the sum over it from loss_func, or omit --dft-token-chunk (token_chunk): "
            "chunks of the vocabulary support every loss_func",
            differs(gradient, expected, valid),
        )
        if not (self.verified or (gradient.is_cuda and torch.cuda.is_current_stream_capturing())):
            self.check_tokens()
            self.verified = bool(valid.any())

    def _inputs_of(self, labels: Tensor) -> Inputs:
        """The arguments of the forward pass, if these are its labels."""
        if self.inputs is not None and labels is self.inputs.labels:
            return self.inputs
        return Inputs(labels, None, None)

    def _target(self, inputs: Inputs) -> Tensor:
        """[b, s] -> [s, b], ignored where the loss mask is 0. Carries the reference."""
        labels, mask = inputs.labels, inputs.loss_mask
        if mask is not None:
            labels = labels.masked_fill(mask.reshape(labels.shape) == 0.0, self.options.ignore_index)
        if inputs.reference is not None:
            labels = pack_reference(labels, -inputs.reference)
        return labels.transpose(0, 1).contiguous()

    def _materialized(
        self, layer: Any, rows: Tensor, weight: Tensor | None, target: Tensor
    ) -> tuple[Tensor, TokenStats]:
        if layer.sequence_parallel:
            logits = _linear(layer, rows, weight, self.options.tp_group)
        else:
            logits, _ = layer(rows, weight=weight)
        compat.check_width(self.model, logits)
        return self._from_logits(logits, target)

    def _from_logits(self, logits: Tensor, target: Tensor) -> tuple[Tensor, TokenStats]:
        return loss_and_stats(logits, target, self._options(logits.device))

    def _options(self, device: torch.device) -> LossOptions:
        return replace(self.options, objective=self.schedule.objective(device))

    def _chunked(
        self,
        layer: Any,
        rows: Tensor,
        weight: Tensor | None,
        target: Tensor,
        upstream: Tensor | None,
        split: Split,
    ) -> tuple[Tensor, TokenStats]:
        rows, weight = _after_pre_hooks(layer, rows, weight)
        weight = layer.weight if weight is None else weight
        into = WeightGradient
        if layer.gradient_accumulation_fusion:
            into = FusedMainGrad
        elif upstream is not None and hasattr(weight, "main_grad"):
            into = MainGrad
        self.unused += upstream is not None and (rows.requires_grad or weight.requires_grad)
        return linear_loss_and_stats(
            hidden=rows,
            weight=weight,
            target=target,
            options=self._options(rows.device),
            split=split,
            upstream=upstream,
            weight_gradient=into,
        )

    def _finish(self, loss: Tensor, stats: TokenStats, rows: Tensor | None, inputs: Inputs) -> Tensor:
        """Record the statistics, count the backward pass, and return the loss [s, b] as [b, s].

        The loss of multi-token prediction is not recorded, counted or weighted.
        """
        if self.inputs is None or inputs is self.inputs:  # not of multi-token prediction, whose loss is computed first
            self.inputs = None
            if self._recording:
                objective = self.schedule.objective(loss.device)
                self._micro_batches.append(MicroBatch(stats, rows, inputs, objective, loss.requires_grad))
            if loss.requires_grad:
                self.computed += 1
                loss.register_hook(self._count_backward)
        loss = loss.transpose(0, 1).contiguous()
        return loss if inputs.weight is None else _Weighted.apply(loss, inputs.weight)

    def _count_backward(self, gradient: Tensor) -> None:
        self.trained += 1

    def note_counted(self, without_loss: Tensor) -> None:
        """Record, on the device, whether a loss mask counted a token that has no loss."""
        any_token = without_loss.any()
        self.counted = any_token if self.counted is None else self.counted | any_token

    def check_tokens(self) -> None:
        """Raises ValueError for errors that were recorded on the device.

        A loss mask counted a token that has no loss. A label has no reference or weight. The loss received another
        gradient than expected. One host-device sync for each of them.
        """
        for message, applies in self.errors.items():
            if applies:
                raise ValueError(message)
        if self.counted is not None and self.counted:
            raise ValueError(
                "loss_func: its loss mask counts tokens that have no loss, because their label is -100 or the "
                "loss_mask of the model excludes them; use the same mask for both, 0 where the label is -100"
            )

    def check_trained(self) -> None:
        """After a training step: raises ValueError if no gradient reached the loss of this model."""
        if self.computed and not self.trained:
            raise ValueError(
                f"{type(self.model).__name__}: its loss was computed in {self.computed} forward passes and received a "
                f"gradient in {self.trained}; the training step uses another loss: compute it from the output of "
                "the model, or omit --loss-type"
            )
        if self.unused:
            raise ValueError(
                f"--dft-token-chunk: backward did not use the gradients of {self.unused} forward passes of this step; "
                "call the model under torch.no_grad() where it does not train, do not recompute it in backward, or "
                "omit --dft-token-chunk"
            )


class _Weighted(torch.autograd.Function):
    """The identity, whose gradient is multiplied by the weight of each token. NaN where the weight is NaN."""

    @staticmethod
    def forward(ctx, loss: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return loss.masked_fill(weight.isnan(), torch.nan)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        (weight,) = ctx.saved_tensors
        return torch.where(upstream == 0.0, 0.0, upstream * weight), None


class MainGrad(WeightGradient):
    """Adds to `weight.main_grad`, which DDP reduces, without gradient accumulation fusion."""

    def __init__(self, weight: Any, summed: bool) -> None:
        if summed and weight.main_grad.dtype != accumulation_dtype(weight):
            raise ValueError(compat.FP32_MAIN_GRAD)
        self.weight, self.total, self.summed = weight, weight.main_grad, True

    def multiply(self, factor: Tensor) -> None:
        self.total[:1].mul_(factor)

    def result(self) -> Tensor | None:
        """Zeros, which DDP's hook adds to main_grad."""
        return torch.zeros_like(self.weight)


class FusedMainGrad(MainGrad):
    """Megatron's gradient accumulation fusion: its kernels add to `weight.main_grad`."""

    def __init__(self, weight: Any, summed: bool) -> None:
        from megatron.core.tensor_parallel import layers

        super().__init__(weight, summed)
        kernels: Any = layers.fused_weight_gradient_mlp_cuda
        fp32 = self.total.dtype == torch.float32
        self.accumulate = kernels.wgrad_gemm_accum_fp32 if fp32 else kernels.wgrad_gemm_accum_fp16

    def add(self, columns: slice, gradient: Tensor, hidden: Tensor) -> None:
        self.accumulate(hidden, gradient, self.total[columns])

    def result(self) -> Tensor | None:
        """None, or a dummy gradient that makes autograd run DDP's hook; the hook does not add it."""
        if not hasattr(self.weight, "grad_added_to_main_grad"):
            return None
        self.weight.grad_added_to_main_grad = True
        # Tied embeddings add their own gradient to the dummy.
        make = torch.zeros_like if getattr(self.weight, "zero_out_wgrad", False) else torch.empty_like
        return make(self.weight)


def head_of(chunk: torch.nn.Module | None) -> LossHead | None:
    """The loss head that `install` bound on a model chunk; None: not bound, or this stage computes no loss."""
    model = compat.model_with_loss(chunk) if chunk is not None else None
    bound = vars(model).get(compat.LOSS) if model is not None else None
    head = getattr(bound, "__self__", None)
    return head if isinstance(head, LossHead) else None


def ignore_masked(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the batch with masked labels set to -100, for a host that does not pass the loss mask to the model.

    Counts of conversations stay.
    """
    labels, loss_mask = batch.get("labels"), batch.get("loss_mask")
    if labels is None or loss_mask is None or labels.shape != loss_mask.shape:
        return dict(batch)
    masked = (loss_mask == 0) & (labels > IGNORE_INDEX)
    return {**batch, "labels": labels.masked_fill(masked, IGNORE_INDEX)}


def _linear(layer: Any, rows: Tensor, weight: Tensor | None, tp_group: ProcessGroup | None) -> Tensor:
    """The output layer of rows of the gathered sequence, under sequence parallelism -> logits [n, V/tp].

    Calls Megatron's linear function without the layer's own gather. The gradient of the input is summed over the
    tensor-parallel ranks, as without sequence parallelism.
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
    """Run the forward pre-hooks of a layer that is not called. Returns the arguments that they return."""
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
