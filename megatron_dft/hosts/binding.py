"""The objective on a Megatron model (`install`) and its metrics in the report of forward_step (`with_metrics`).

    model        `install` binds LanguageModule.compute_language_model_loss(labels, logits) -> per-token loss on the
                 model instances. All Megatron language models call it, except with the fused linear cross entropy
                 of the dev branch, which is refused. Forward returns the NLL, backward sends the gradient of the
                 objective, so `lm loss`, perplexity and NaN checks keep their meaning. A loss from hidden states uses
                 the `output_processor` argument of GPTModel.forward. For a model without it (HybridModel) the output
                 layer is bypassed for one call.
    loss_func    `with_metrics` wraps the loss_func that forward_step returns. Its report gets the metrics, and the
                 user's `callback` gets the tokens.

The statistics of a micro-batch stay in the `LossHead` of its model until forward_step returns; then `with_metrics`
takes them. Interleaved schedules have several micro-batches in flight, and each loss_func holds its own.

No class and no module is patched. Other models in the process (a reference model, an RL policy) keep their cross
entropy. The other hosts call these functions.
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

from megatron_dft.config import DFTConfig
from megatron_dft.hosts import compat
from megatron_dft.hosts.loss_head import LossHead, MicroBatch, Schedule, head_of
from megatron_dft.labels import CHANNEL, IDS, IGNORE_INDEX, REFERENCE, WEIGHT
from megatron_dft.metrics import (
    VALID_TOKENS,
    MetricAccumulator,
    TokenBatch,
    in_validation,
    is_total,
    token_metrics,
)
from megatron_dft.ops.vocab_parallel import vocab_parallel_dft_loss
from megatron_dft.utils import load_function

LABELS = ("labels", "lm_labels")  # of GPT, hybrid and multimodal models; of BERT and T5


@dataclass(frozen=True)
class Binding:
    """The objective on one model."""

    model: torch.nn.Module  # inside DDP, Float16Module, LLaVA
    output_layer: str  # for the log: compact, linear-fused or plain, and why
    head: LossHead
    _undo: list[Callable[[], None]] = field(default_factory=list, repr=False)

    def remove(self) -> None:
        """Restore the model's own loss."""
        self.head.reset()
        while self._undo:
            self._undo.pop()()


@dataclass(frozen=True)
class Installation:
    """The handle that `install` returns."""

    chunks: Sequence[torch.nn.Module]  # the argument of `install`
    bindings: tuple[Binding, ...]  # one per chunk that computes a loss; none on other pipeline stages
    schedule: Schedule

    def begin(self, iteration: int) -> None:
        """Set the iteration, 1, 2, ..., of a scheduled objective. Call it before each iteration; no host-device sync.

        The hosts do so. Other objectives do not need it.
        """
        self.schedule.begin(iteration)
        for binding in self.bindings:
            binding.head.unused = 0

    def check_step(self) -> None:
        """Check, after backward, that the step trained on the objective. No host-device sync.

        Raises:
            ValueError: if no gradient reached the loss, or `token_chunk` computed gradients that backward did not use.
        """
        for binding in self.bindings:
            binding.head.check_trained()

    def check_tokens(self) -> None:
        """Check the tokens since `install`, for example before a checkpoint. A host-device sync per kind of error.

        Raises:
            ValueError: for a token without a loss that the mask of a loss_func with metrics counts, a label without
                reference or weight, and an upstream gradient that `token_chunk` did not expect.
        """
        for binding in self.bindings:
            binding.head.check_tokens()

    def remove(self) -> None:
        """Restore the loss of every model."""
        for binding in self.bindings:
            binding.remove()


def install(model_chunks: Sequence[torch.nn.Module], config: DFTConfig) -> Installation:
    """Bind the objective on every model chunk that computes a loss.

    Args:
        model_chunks: this rank's part of a Megatron model, one module per virtual pipeline stage, wrapped or not
            (DDP, Float16Module, LLaVA around its language model). Chunks without an output layer stay as they are.
        config: the settings. With loss_type "ce" nothing changes.

    Returns:
        The handle, with the bindings and `remove()`.

    Raises:
        ValueError: for a model whose loss cannot be replaced, or incompatible settings. In training, the first forward
            pass raises if another function computes the loss.
    """
    if not isinstance(config, DFTConfig):
        raise ValueError(
            f"install: expected a DFTConfig, got {type(config).__name__}; write DFTConfig(loss_type='dft')"
        )
    if isinstance(model_chunks, torch.nn.Module) and not isinstance(model_chunks, torch.nn.ModuleList):
        raise ValueError(f"install: expected a list of model chunks, got {type(model_chunks).__name__}; pass [model]")
    schedule = Schedule(config.objective if config.enabled else None)
    bindings: list[Binding] = []
    if config.enabled:
        for chunk in model_chunks:
            model = compat.model_with_loss(chunk)
            if model is not None:
                compat.check_model(model, config)
                bindings.append(_bind(model, config, schedule))
    return Installation(model_chunks, tuple(bindings), schedule)


def with_metrics(
    forward_step: Callable[..., Any],
    config: DFTConfig,
    *,
    micro_batches: Callable[[], int] | None = None,
    validation: MetricAccumulator | None = None,
) -> Callable[..., Any]:
    """Wrap a forward_step: the loss_func that it returns also reports the metrics of the objective.

    Every metric is a pair [sum, count]. Megatron adds the pairs over micro-batches and over data- and context-parallel
    ranks, and divides.

    Args:
        micro_batches: returns the number of micro-batches of a training iteration over all data- and context-parallel
            ranks. Its inverse is the count of each total (`dft/valid_tokens`, tokens per channel). None: totals are not
            reported.
        validation: receives the pairs of each micro-batch in evaluation, for hosts whose validation does not average
            over tokens.

    Raises:
        ValueError: for a callback that cannot be imported. In training: if `install` did not bind the loss of the
            model, or the shape of the loss mask is wrong. A token that the mask counts and that has no loss gets a NaN
            loss; it raises in the first micro-batch, later in `Installation.check_tokens`.
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

    A replacement for code that calls Megatron's function. To train a model use `install`; for other objectives use
    `vocab_parallel_dft_loss`. As in Megatron the default group is the tensor-parallel group, the result is fp32 nats
    per token, and padding columns are part of the softmax. Unlike in Megatron, target -100 is ignored.

    Raises:
        ValueError: for label smoothing.
    """
    compat.refuse_label_smoothing(label_smoothing)
    if tp_group is None:
        from megatron.core import parallel_state

        tp_group = parallel_state.get_tensor_model_parallel_group()
    return vocab_parallel_dft_loss(vocab_parallel_logits, target, tp_group=tp_group)


def _bind(model: Any, config: DFTConfig, schedule: Schedule) -> Binding:
    """Replace the loss of a model instance, and hook its forward pass."""
    head, signature = LossHead(model, config, schedule), inspect.signature(model.forward)
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
    """Record labels and loss mask, reduce the labels to token ids, prepare a loss from hidden states."""
    call = signature.bind_partial(*args, **kwargs)
    head.reset()
    labels = call.arguments.get(labels_name)
    if labels is None:
        return args, kwargs
    loss_mask = call.arguments.get("loss_mask")
    masks = "loss_mask" not in signature.parameters or compat.masks_mtp_labels(module)
    if loss_mask is None and compat.has_mtp(module.config) and not masks:
        # Without a mask Megatron trains multi-token-prediction heads on ignored labels.
        loss_mask = (labels != IGNORE_INDEX).to(torch.float32)
        call.arguments["loss_mask"] = loss_mask
    call.arguments[labels_name] = head.receive(labels, loss_mask).labels
    if head.from_hidden:
        compat.check_forward(module, call.arguments)
        if compat.OUTPUT_PROCESSOR in signature.parameters:  # Megatron's official seam
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
    """The model's output from its hidden states. Scaled logits (MuP) come from scaled hidden states."""
    return head.of_hidden(labels, scale_logits(hidden_states), output_weight)


def _after_forward(module: Any, args: tuple, output: Any, *, head: LossHead) -> None:
    """Raises ValueError if the loss of this forward pass was computed elsewhere."""
    if head.inputs is not None:
        head.reset()
        raise ValueError(
            f"{type(module).__name__}: forward with labels never called {compat.LOSS}, so the objective was not "
            "applied; this model is not supported, remove --loss-type"
        )


def _build_schedule_plan(host: Callable[..., Any], head: LossHead, *args: Any, **kwargs: Any) -> Any:
    """Megatron's schedule plan, with labels ignored where the loss mask is 0."""
    call = inspect.signature(host).bind(*args, **kwargs)
    if call.arguments.get("labels") is not None:
        call.arguments["labels"] = head.receive(call.arguments["labels"], call.arguments.get("loss_mask")).labels
    return host(*call.args, **call.kwargs)


class _Report:
    """Wraps loss_func: checks its mask, adds the metrics to its report."""

    def __init__(
        self, config: DFTConfig, micro_batches: Callable[[], int] | None, validation: MetricAccumulator | None
    ) -> None:
        self.config, self.micro_batches, self.validation = config, micro_batches, validation
        self.callback: Callable[[TokenBatch], None] | None = None
        if config.callback:
            self.callback = load_function(config.callback, "--dft-callback")
        self.checked = False

    def of(
        self, loss_func: Callable[..., Any], head: LossHead | None, take: Callable[[], MicroBatch | None]
    ) -> Callable[..., Any]:
        """The wrapped loss_func. `take` returns the statistics of its micro-batch."""

        @functools.wraps(loss_func)
        def wrapped(output: Any, **kwargs: Any) -> Any:
            if kwargs.get("non_loss_data"):
                return loss_func(output, **kwargs)
            micro_batch = take()
            if head is None or micro_batch is None or (torch.is_grad_enabled() and not micro_batch.differentiable):
                raise ValueError(
                    f"--loss-type {self.config.loss_type}: the objective did not compute the loss of this model: "
                    "install() was not called on it, or forward_step called it without labels or without gradients; "
                    "use a model that computes its own loss, or remove --loss-type"
                )
            losses, *others = output if isinstance(output, tuple) else (output,)
            # LLaVA returns its loss and the mask of the text with expanded images.
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
                head.check_tokens()
            if isinstance(losses, Tensor):  # lists and dicts stay as they are
                _check_shape("output", losses, micro_batch.shape)
                # A masked token contributes 0, even if its NLL is inf or NaN.
                losses = losses.masked_fill(mask.reshape(losses.shape) == 0.0, 0.0)
                losses = losses.masked_fill(without_loss.reshape(losses.shape), math.nan)
                output = (losses, *others) if isinstance(output, tuple) else losses
            *values, report = loss_func(output, **kwargs)
            compat.check_loss_values(len(values), head.model.config)
            if first and len(values) > 1 and mask is micro_batch.inputs.loss_mask:
                compat.check_num_tokens(values[1], mask)
            self.checked = self.checked or first
            ours = self._pairs(micro_batch, mask, values[1] if len(values) > 1 else mask.sum())
            if micro_batch.inputs.count is not None:
                values[1] = micro_batch.inputs.count
            if not torch.is_grad_enabled():
                if self.validation is not None:
                    both = {**report, **ours}.items()
                    self.validation.add({name: x for name, x in both if isinstance(x, Tensor) and x.numel() == 2})
                ours = {name: pair for name, pair in ours.items() if not is_total(name)}
            return *values, {**report, **ours}

        return wrapped

    def _pairs(self, micro_batch: MicroBatch, mask: Tensor, num_tokens: Tensor | int) -> dict[str, Tensor]:
        """The metrics of a micro-batch, [sum, count] each."""
        training, stats, spec = torch.is_grad_enabled(), micro_batch.stats, self.config.metric_spec
        if self.callback is not None:
            self.callback(micro_batch.tokens(mask, training))
        mask = micro_batch.pick(mask)
        pairs = token_metrics(stats, micro_batch.objective, mask, micro_batch.weight)
        sums = spec.sums(stats, mask, micro_batch.channel)
        pairs |= zip(spec.names, sums, strict=True)
        if not training:
            return {name: pair for name, pair in pairs.items() if in_validation(name)}
        if self.micro_batches is None:
            return {name: pair for name, pair in pairs.items() if not is_total(name)}
        share = 1.0 / self.micro_batches()
        pairs[VALID_TOKENS] = torch.as_tensor(num_tokens, dtype=torch.float64, device=mask.device).detach().expand(2)
        return {name: _as_total(pair, share) if is_total(name) else pair for name, pair in pairs.items()}

    def _check_labels(self, micro_batch: MicroBatch) -> None:
        """Raises ValueError for labels that carry what is not configured; in the first micro-batch."""
        labels = micro_batch.inputs.labels
        rest = labels[labels > IDS]
        if not rest.numel():
            return
        if (rest >> REFERENCE > 0).any():
            raise ValueError(
                f"--loss-type {self.config.loss_type}: a label carries a reference log-probability, which this "
                "objective does not use; return labels without with_reference"
            )
        if (rest >> WEIGHT > 0).any():
            raise ValueError(
                f"--loss-type {self.config.loss_type}: a label carries a weight; add --dft-weights, or return labels "
                "without with_weights"
            )
        if self.config.channels:
            raise ValueError(
                f"--dft-channels {self.config.channels}: a label has channel {int((rest >> CHANNEL).max())}, which "
                "has no name; name every channel of the data"
            )


def _counted_without_loss(micro_batch: MicroBatch, mask: Tensor) -> Tensor:
    """Tokens [b, s] that the loss mask counts and that have no loss: masked for the model, or labelled -100."""
    labels, given = micro_batch.inputs.labels, micro_batch.inputs.loss_mask
    ignored = labels == IGNORE_INDEX
    if given is not None:
        ignored = ignored | (given.reshape(labels.shape) == 0)
    return (mask.reshape(labels.shape) != 0) & ignored


def _check_shape(what: str, x: Tensor, shape: torch.Size) -> None:
    """Raises ValueError for a tensor that is neither [b, s] nor flat."""
    if x.numel() != shape.numel() or (x.dim() > 1 and [n for n in x.shape if n > 1] != [n for n in shape if n > 1]):
        raise ValueError(
            f"loss_func: the {what} has shape {tuple(x.shape)}, the per-token loss of the model {tuple(shape)}; return "
            "the output of the model unchanged from forward_step"
        )


def _as_total(pair: Tensor, share: float) -> Tensor:
    """[sum, count] -> [sum, share]. Over all micro-batches and ranks the shares add up to 1."""
    return torch.stack([pair[0].double(), torch.full_like(pair[0], share, dtype=torch.float64)])
