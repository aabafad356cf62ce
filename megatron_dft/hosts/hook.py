"""The two places where a Megatron host meets the loss.

    model        LanguageModule.compute_language_model_loss(labels, logits) -> per-token loss, bound on the instances
                 (`install`). Every Megatron model, version and cross-entropy fusion goes through it. It returns the
                 NLL and sends back the objective's gradient: `lm loss`, perplexity and NaN checks keep their meaning.
                 A loss that starts at the hidden states is the `output_processor` of GPTModel.forward; where there
                 is none, the output layer hands its input on to the loss.
    loss_func    what forward_step returns beside the output (`with_metrics`). Its report gains the metrics; what is
                 reported in detail goes to a `tally`, and every token to the user's `callback`.

The statistics of a micro-batch travel from the first to the second on the output tensor itself, because under
interleaved schedules several micro-batches are in flight and "the last one" is the wrong one.

Nothing is patched on a class or a module, so other models in the process (a reference model, an RL policy) keep the
stock cross entropy. Left out: how a host is reached; see `megatron_lm`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_dft.channels import split_channels
from megatron_dft.config import DFTConfig, load_function
from megatron_dft.hosts import compat
from megatron_dft.hosts.loss_head import LossHead, are_marked, mark_labels, statistics_of, token_batch
from megatron_dft.metrics import TokenBatch, token_metrics
from megatron_dft.vocab_parallel import vocab_parallel_dft_loss

AddToTally = Callable[[Tensor, Tensor], None]  # number of tokens, `Detail.sums`


def install(model_chunks: Sequence[torch.nn.Module], config: DFTConfig) -> Sequence[torch.nn.Module]:
    """Bind the loss on every model chunk that computes one, and return the chunks.

    Args:
        model_chunks: this rank's part of a Megatron model, one module per virtual pipeline stage, wrapped or not
            (DDP, Float16Module, LLaVA around its language model). Chunks without an output layer are left alone.
        config: with loss_type "ce" nothing is changed.

    Raises:
        ValueError: for a model whose loss cannot be replaced, or a configuration that would give wrong numbers.
    """
    if config.enabled:
        for chunk in model_chunks:
            model = model_with_loss(chunk)
            if model is not None:
                compat.check_model(model, config)
                _bind(model, config)
    return model_chunks


def with_metrics(
    forward_step: Callable[..., Any],
    config: DFTConfig,
    tally: AddToTally | None = None,
) -> Callable[..., Any]:
    """The same forward_step; the loss_func it returns reports the metrics of the objective as well.

    Args:
        tally: gets, of each micro-batch, Megatron's num_tokens and the `Detail.sums` that the configuration asks for.

    Raises:
        ValueError: for a callback that cannot be found, or details that nobody adds up.
    """
    if not config.enabled:
        return forward_step
    if tally is None and config.detail.names:
        raise ValueError(
            "metrics, channels: expected a tally that adds them up, got none; make a Tally(config.detail), pass its "
            "add, and log its report() after each iteration"
        )
    callback = load_function(config.callback, "--loss-callback") if config.callback else None

    @functools.wraps(forward_step)
    def wrapped(data_iterator: Any, model: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        output, loss_func = forward_step(data_iterator, model, *args, **kwargs)
        return output, None if loss_func is None else _reporting(loss_func, config, tally, callback)

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


def model_with_loss(chunk: torch.nn.Module) -> Any | None:
    """The module that computes the loss, below DDP, Float16Module or LLaVA; None where this stage has none."""
    module: Any = chunk
    while not hasattr(module, "compute_language_model_loss"):
        if hasattr(module, "language_model"):
            module = module.language_model
            if module is None:
                return None
        elif hasattr(module, "module"):
            module = module.module
        else:
            raise ValueError(
                f"install: expected a Megatron language model (GPTModel, HybridModel, LLaVAModel, ...) with "
                f"compute_language_model_loss, got {type(chunk).__name__}"
            )
    return module if getattr(module, "post_process", False) else None


def _bind(model: Any, config: DFTConfig) -> None:
    """Put the loss where the model computes its own, and before the output layer where that is part of the loss."""
    head, host_loss = LossHead(model, config), model.compute_language_model_loss
    separate_mtp = compat.has_mtp(model.config) and config.mtp == "nll"

    def compute_language_model_loss(self: Any, labels: Tensor, logits: Tensor) -> Tensor:
        """labels [b, s], logits [s, b, V/tp] -> NLL [b, s]."""
        return host_loss(labels, logits) if separate_mtp and not are_marked(labels) else head(labels, logits)

    def process_output(
        *, hidden_states: Tensor, output_weight: Tensor | None, labels: Tensor, scale_logits: Any, **others: Any
    ) -> Tensor:
        """The model's output, from its hidden states; scaled ones have scaled logits."""
        return head.of_hidden(labels, scale_logits(hidden_states), output_weight)

    def before_forward(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        given = signature.bind_partial(*args, **kwargs).arguments
        if head.from_hidden:
            head.give_back()
        if given.get("labels") is not None:
            labels, channel = split_channels(given["labels"])
            mark_labels(labels, given.get("loss_mask"), channel)
            if "labels" in kwargs:
                kwargs = kwargs | {"labels": labels}
            else:
                args = tuple(labels if x is given["labels"] else x for x in args)
            if head.from_hidden:
                compat.check_forward(model, given)
                if compat.OUTPUT_PROCESSOR in signature.parameters:  # Megatron's own way to do this
                    return args, kwargs | {compat.OUTPUT_PROCESSOR: process_output}
                head.take_over()
        return args, kwargs

    model.compute_language_model_loss = MethodType(compute_language_model_loss, model)
    signature = inspect.signature(model.forward)
    if "labels" in signature.parameters:
        model.register_forward_pre_hook(before_forward, with_kwargs=True)


def _reporting(
    loss_func: Callable[..., Any],
    config: DFTConfig,
    tally: AddToTally | None,
    callback: Callable[[TokenBatch], None] | None,
) -> Callable[..., Any]:
    @functools.wraps(loss_func)
    def wrapped(output: Tensor | tuple[Tensor, Tensor], **kwargs: Any) -> Any:
        if kwargs.get("non_loss_data"):
            return loss_func(output, **kwargs)
        # LLaVA's output is its loss and, images having grown the text, a mask of the same length.
        losses, loss_mask = output if isinstance(output, tuple) else (output, compat.loss_mask_of(loss_func))
        same_tokens = loss_mask.numel() == losses.numel()
        statistics = statistics_of(losses, loss_mask.view(losses.shape)) if same_tokens else None
        if statistics is None:
            raise ValueError(
                f"the report needs the model's own per-token loss: expected the output of a model on which install() "
                f"was called, [b, s] as the loss mask {tuple(loss_mask.shape)}, got {tuple(losses.shape)}; "
                "return the model's output from forward_step unchanged"
            )
        if callback is not None:
            callback(token_batch(losses, loss_mask, torch.is_grad_enabled()))
        # A masked token is worth nothing, even where its NLL is inf or NaN.
        losses = losses.masked_fill(loss_mask.view(losses.shape) == 0.0, 0.0)
        loss, num_tokens, report = loss_func((losses, loss_mask) if isinstance(output, tuple) else losses, **kwargs)
        stats, weights, channel = statistics
        if tally is not None:
            tally(num_tokens, config.detail.sums(stats, weights, channel))
        return loss, num_tokens, {**report, **token_metrics(stats, config.objective, weights)}

    return wrapped
