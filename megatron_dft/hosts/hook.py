"""The two places where a Megatron host meets the loss.

    model        LanguageModule.compute_language_model_loss(labels, logits) -> per-token loss, bound on the instances
                 (`install`). Every Megatron model, version and native cross-entropy fusion goes through it. Forward
                 returns the NLL, backward the objective's gradient: `lm loss`, perplexity and NaN checks keep their
                 meaning. A loss that starts at the hidden states is the `output_processor` of GPTModel.forward; a
                 model without one (HybridModel) has its output layer bypassed for one call.
    loss_func    what forward_step returns beside the output (`with_metrics`). Its report gains the metrics, and every
                 token goes to the user's `callback`.

The statistics of a micro-batch stay in the `LossHead` of its model until forward_step returns, where `with_metrics`
takes them. Under interleaved schedules several micro-batches are in flight; each loss_func holds its own.

Nothing is patched on a class or a module, so other models in the process (a reference model, an RL policy) keep the
stock cross entropy. How each host calls this is in `megatron_lm`, `bridge` and `nemo`.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_dft.channels import SHIFT
from megatron_dft.config import DFTConfig, load_function
from megatron_dft.hosts import compat
from megatron_dft.hosts.loss_head import IGNORE_INDEX, LossHead, MicroBatch, head_of
from megatron_dft.metrics import VALID_TOKENS, MetricAccumulator, TokenBatch, is_total, token_metrics
from megatron_dft.vocab_parallel import vocab_parallel_dft_loss

LABELS = ("labels", "lm_labels")  # of GPT, hybrid and multimodal models; of BERT and T5


@dataclass(frozen=True)
class Binding:
    """The loss on one model: `remove` takes it off again."""

    model: torch.nn.Module  # below DDP, Float16Module, LLaVA
    output_layer: str  # what happens to it, and why
    head: LossHead
    _undo: list[Callable[[], None]] = field(default_factory=list, repr=False)

    def remove(self) -> None:
        """Give the model its own loss back."""
        self.head.reset()
        while self._undo:
            self._undo.pop()()


@dataclass(frozen=True)
class Installation:
    """What `install` did."""

    chunks: Sequence[torch.nn.Module]  # as they were given
    bindings: tuple[Binding, ...]  # one for each chunk that computes a loss; none on other pipeline stages

    def remove(self) -> None:
        """Give every model its own loss back."""
        for binding in self.bindings:
            binding.remove()


def install(model_chunks: Sequence[torch.nn.Module], config: DFTConfig) -> Installation:
    """Bind the loss on every model chunk that computes one.

    Args:
        model_chunks: this rank's part of a Megatron model, one module per virtual pipeline stage, wrapped or not
            (DDP, Float16Module, LLaVA around its language model). Chunks without an output layer are left alone.
        config: with loss_type "ce" nothing is changed.

    Returns:
        The handle: what was bound, what happens to each output layer and why, and `remove()`.

    Raises:
        ValueError: for a model whose loss cannot be replaced, or a configuration that would give wrong numbers; and
            during training, in the first forward pass whose loss does not come from here.
    """
    bindings: list[Binding] = []
    if config.enabled:
        for chunk in model_chunks:
            model = compat.model_with_loss(chunk)
            if model is not None:
                compat.check_model(model, config)
                bindings.append(_bind(model, config))
    return Installation(model_chunks, tuple(bindings))


def with_metrics(
    forward_step: Callable[..., Any],
    config: DFTConfig,
    *,
    micro_batches: Callable[[], int] | None = None,
    validation: MetricAccumulator | None = None,
) -> Callable[..., Any]:
    """The same forward_step; the loss_func it returns reports the metrics of the objective as well.

    Every metric is a pair [sum, count], which Megatron adds up over micro-batches and over data- and context-parallel
    ranks, and divides.

    Args:
        micro_batches: called during training, returns the number of micro-batches of an iteration on all data- and
            context-parallel ranks together. Each total (`valid tokens`, tokens by channel) is reported with its inverse
            as the count. None: totals are not reported.
        validation: receives the pairs of each micro-batch in evaluation, for hosts that do not average validation over
            tokens.

    Raises:
        ValueError: for a callback that cannot be found. In a training step: if the loss of the model was not bound by
            install(), or the loss mask does not fit it; the values of the mask are checked in the first micro-batch.
    """
    if not config.enabled:
        return forward_step
    report = _Report(config, micro_batches, validation)

    @functools.wraps(forward_step)
    def wrapped(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        # (data_iterator, model), and in Bridge (state, data_iterator, model).
        head = head_of(next((x for x in (*args, *kwargs.values()) if isinstance(x, torch.nn.Module)), None))
        if head is not None:
            head.start()
        output, loss_func = forward_step(*args, **kwargs)
        if head is None:
            take: Callable[[], MicroBatch | None] = lambda: None  # noqa: E731
        elif head.inputs is not None:  # of a schedule plan, whose forward pass runs just before its loss_func
            take = head.take
        else:
            micro_batch = head.take()
            take = lambda: micro_batch  # noqa: E731
        return output, None if loss_func is None else report.of(loss_func, head, take)

    return wrapped


def vocab_parallel_cross_entropy(
    vocab_parallel_logits: Tensor,  # [s, b, V/tp]
    target: Tensor,  # [s, b]
    label_smoothing: float = 0.0,
    tp_group: ProcessGroup | None = None,
) -> Tensor:  # [s, b]
    """The DFT loss with the signature of Megatron's `tensor_parallel.vocab_parallel_cross_entropy`.

    For code that calls that function itself; a whole model is better served by `install`, and another objective by
    `vocab_parallel_dft_loss`. As there, the group defaults to Megatron's tensor-parallel group, the result is fp32
    nats per token, and padding columns are part of the softmax; unlike there, target -100 is ignored.

    Raises:
        ValueError: for label smoothing, which has no place in the family.
    """
    compat.refuse_label_smoothing(label_smoothing)
    if tp_group is None:
        from megatron.core import parallel_state

        tp_group = parallel_state.get_tensor_model_parallel_group()
    return vocab_parallel_dft_loss(vocab_parallel_logits, target, tp_group=tp_group)


def _bind(model: Any, config: DFTConfig) -> Binding:
    """Put the loss where the model computes its own, and before the output layer where that is part of the loss."""
    head, signature = LossHead(model, config), inspect.signature(model.forward)
    binding = Binding(model, compat.describe_output_layer(model, config), head)
    model.compute_language_model_loss = head.compute_language_model_loss
    binding._undo.append(lambda: delattr(model, compat.LOSS))
    labels_name = next((name for name in LABELS if name in signature.parameters), None)
    if labels_name is not None:
        before = functools.partial(_before_forward, head=head, signature=signature, labels_name=labels_name)
        after = functools.partial(_after_forward, head=head)
        binding._undo.append(model.register_forward_pre_hook(before, with_kwargs=True).remove)
        binding._undo.append(model.register_forward_hook(after).remove)
    if hasattr(model, "build_schedule_plan"):  # in place of forward, under --overlap-moe-expert-parallel-comm
        model.build_schedule_plan = functools.partial(_build_schedule_plan, model.build_schedule_plan, head)
        binding._undo.append(lambda: delattr(model, "build_schedule_plan"))
    return binding


def _before_forward(
    module: Any, args: tuple, kwargs: dict[str, Any], *, head: LossHead, signature: inspect.Signature, labels_name: str
) -> tuple[tuple, dict[str, Any]]:
    """Note labels and loss mask, take channels off the labels, and reach the hidden states where they are needed."""
    call = signature.bind_partial(*args, **kwargs)
    head.reset()
    labels = call.arguments.get(labels_name)
    if labels is None:
        return args, kwargs
    loss_mask = call.arguments.get("loss_mask")
    if loss_mask is None and compat.has_mtp(module.config) and "loss_mask" in signature.parameters:
        # Without a mask Megatron trains the heads of multi-token prediction on ignored labels, too.
        loss_mask = (labels != IGNORE_INDEX).to(torch.float32)
        call.arguments["loss_mask"] = loss_mask
    call.arguments[labels_name] = head.receive(labels, loss_mask).labels
    if head.from_hidden:
        compat.check_forward(module, call.arguments)
        if compat.OUTPUT_PROCESSOR in signature.parameters:  # Megatron's own way to do this
            call.arguments[compat.OUTPUT_PROCESSOR] = functools.partial(_process_output, head)
        else:
            head.bypass()
    return call.args, call.kwargs


def _process_output(
    head: LossHead,
    *,
    hidden_states: Tensor,
    output_weight: Tensor | None,
    labels: Tensor,
    scale_logits: Any,
    **others: Any,
) -> Tensor:
    """The model's output, from its hidden states; scaled ones have scaled logits."""
    return head.of_hidden(labels, scale_logits(hidden_states), output_weight)


def _after_forward(module: Any, args: tuple, output: Any, *, head: LossHead) -> None:
    """Refuse a loss that was computed elsewhere."""
    if head.inputs is not None:
        head.reset()
        raise ValueError(
            f"{type(module).__name__}: expected its loss from {compat.LOSS}, where the objective is, but the forward "
            "pass with labels never called it; this model cannot be trained with another objective"
        )


def _build_schedule_plan(host: Callable[..., Any], head: LossHead, *args: Any, **kwargs: Any) -> Any:
    """The plan of a forward pass whose labels are ignored where the loss mask is 0."""
    call = inspect.signature(host).bind(*args, **kwargs)
    if call.arguments.get("labels") is not None:
        call.arguments["labels"] = head.receive(call.arguments["labels"], call.arguments.get("loss_mask")).labels
    return host(*call.args, **call.kwargs)


class _Report:
    """Wraps loss_func: checks its mask, and adds our metrics to its report."""

    def __init__(
        self, config: DFTConfig, micro_batches: Callable[[], int] | None, validation: MetricAccumulator | None
    ) -> None:
        self.config, self.micro_batches, self.validation = config, micro_batches, validation
        self.callback: Callable[[TokenBatch], None] | None = None
        if config.callback:
            self.callback = load_function(config.callback, "--loss-callback")
        self.checked = False

    def of(
        self, loss_func: Callable[..., Any], head: LossHead | None, take: Callable[[], MicroBatch | None]
    ) -> Callable[..., Any]:
        """The same loss_func, reporting our metrics; `take` returns the statistics of the micro-batch."""

        @functools.wraps(loss_func)
        def wrapped(output: Any, **kwargs: Any) -> Any:
            if kwargs.get("non_loss_data"):
                return loss_func(output, **kwargs)
            micro_batch = take()
            if head is None or micro_batch is None or (torch.is_grad_enabled() and not micro_batch.differentiable):
                raise ValueError(
                    f"--loss-type {self.config.loss_type}: the loss of this model does not come from the objective: "
                    "install() was not called on it, or forward_step did not call it with labels and with gradients; "
                    "train a model that computes its own loss, or leave --loss-type out"
                )
            losses, *others = output if isinstance(output, tuple) else (output,)
            # LLaVA's output is its loss and, images having grown the text, a mask of the same length.
            if others and isinstance(others[0], Tensor) and others[0].numel() == losses.numel():
                mask = others[0]
            else:
                mask = compat.loss_mask_of(loss_func, micro_batch.inputs.loss_mask, micro_batch.shape.numel())
            _check_shape("loss mask", mask, micro_batch.shape)
            without_loss = _counted_without_loss(micro_batch, mask)
            head.note_counted(without_loss)
            first = not (self.checked or (mask.is_cuda and torch.cuda.is_current_stream_capturing()))
            if first:
                self._check_labels(micro_batch)
                head.check_counted()
            if isinstance(losses, Tensor):  # in a list or a dict it is left as it is
                _check_shape("output", losses, micro_batch.shape)
                # A masked token contributes nothing, even where its NLL is inf or NaN.
                losses = losses.masked_fill(mask.reshape(losses.shape) == 0.0, 0.0)
                losses = losses.masked_fill(without_loss.reshape(losses.shape), math.nan)
                output = (losses, *others) if isinstance(output, tuple) else losses
            *values, report = loss_func(output, **kwargs)
            compat.check_loss_values(len(values), head.model.config)
            if first and len(values) > 1 and mask is micro_batch.inputs.loss_mask:
                compat.check_num_tokens(values[1], mask)
            self.checked = self.checked or first
            ours = self._pairs(micro_batch, mask, values[1] if len(values) > 1 else mask.sum())
            if not torch.is_grad_enabled():
                if self.validation is not None:
                    both = {**report, **ours}.items()
                    self.validation.add({name: x for name, x in both if isinstance(x, Tensor) and x.numel() == 2})
                ours = {name: pair for name, pair in ours.items() if not is_total(name)}
            return *values, {**report, **ours}

        return wrapped

    def _pairs(self, micro_batch: MicroBatch, mask: Tensor, num_tokens: Tensor | int) -> dict[str, Tensor]:
        """Our part of the report, [sum, count] each."""
        training, stats, detail = torch.is_grad_enabled(), micro_batch.stats, self.config.detail
        if self.callback is not None:
            self.callback(micro_batch.tokens(mask, training))
        channel = micro_batch.inputs.channel
        weights = micro_batch.pick(mask)
        pairs = token_metrics(stats, self.config.objective, weights)
        sums = detail.sums(stats, weights, None if channel is None else micro_batch.pick(channel))
        pairs |= zip(detail.names, sums, strict=True)
        if not training:
            return {name: pair for name, pair in pairs.items() if detail.in_validation(name)}
        if self.micro_batches is None:
            return {name: pair for name, pair in pairs.items() if not is_total(name)}
        share = 1.0 / self.micro_batches()
        pairs[VALID_TOKENS] = torch.as_tensor(num_tokens, dtype=torch.float64, device=mask.device).detach().expand(2)
        return {name: _as_total(pair, share) if is_total(name) else pair for name, pair in pairs.items()}

    def _check_labels(self, micro_batch: MicroBatch) -> None:
        """Refuse channels that have no name, in the first micro-batch."""
        named, number = self.config.channels, micro_batch.inputs.labels >> SHIFT
        if named and (number > 0).any():
            raise ValueError(
                f"--loss-channels {named}: the labels carry channel number {int(number.max())}, which has no name; "
                "name every channel of the data"
            )


def _counted_without_loss(micro_batch: MicroBatch, mask: Tensor) -> Tensor:
    """Tokens, [b, s], that the loss mask counts although they have no loss: masked for the model, or labelled -100."""
    labels, given = micro_batch.inputs.labels, micro_batch.inputs.loss_mask
    ignored = labels == IGNORE_INDEX
    if given is not None:
        ignored = ignored | (given.reshape(labels.shape) == 0)
    return (mask.reshape(labels.shape) != 0) & ignored


def _check_shape(what: str, x: Tensor, shape: torch.Size) -> None:
    """Refuse a tensor that is neither [b, s] nor flat."""
    if x.numel() != shape.numel() or (x.dim() > 1 and [n for n in x.shape if n > 1] != [n for n in shape if n > 1]):
        raise ValueError(
            f"loss_func: expected the per-token loss {tuple(shape)} that the model returned and its loss mask, in this "
            f"shape or flat, got a {what} of {tuple(x.shape)}; return the model's output from forward_step in full"
        )


def _as_total(pair: Tensor, share: float) -> Tensor:
    """[sum, ...] -> [sum, share]; over all micro-batches and ranks the shares add up to 1."""
    return torch.stack([pair[0].double(), torch.full_like(pair[0], share, dtype=torch.float64)])
