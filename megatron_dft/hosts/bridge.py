"""Megatron-Bridge: the loss inside its `finetune()`.

    settings        what the objective needs of a recipe, set and told (`prepare`)
    model           `install`, as a hook that Bridge runs on the finished model chunks, adapters and DDP included. It is
                    registered last, because overrides empty a recipe's lists of hooks
    forward_step    `DFTStep`, a functor around Bridge's own: masked targets are ignored, the report gains the metrics
    loop            `Progress`, a Bridge callback: a scheduled objective begins each iteration

Bridge stores its configuration in every checkpoint and builds it anew on loading. Nothing of ours is in there: hooks
are not stored, forward_step and callbacks are arguments. So a checkpoint loads where megatron_dft is not installed.
"""

from __future__ import annotations

import functools
import inspect
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from megatron_dft.config import DFTConfig
from megatron_dft.hosts import compat
from megatron_dft.hosts.hook import Installation, install, with_metrics
from megatron_dft.hosts.iterations import TOKENS_PER_SECOND, Means, means_over_tokens, micro_batches
from megatron_dft.hosts.loss_head import LossHead, ignore_masked
from megatron_dft.metrics import VALID_TOKENS, Detail, MetricAccumulator
from megatron_dft.objectives import Objective


def finetune(
    cfg: Any, config: DFTConfig, forward_step: Callable[..., Any] | None = None, callbacks: Any = None
) -> None:
    """Bridge's `finetune()` with another loss; without an objective (loss_type "ce") it is called as it is.

    Args:
        cfg: a ConfigContainer, every override applied. It is changed where the objective needs that, which is printed.
        forward_step: Bridge's `gpt_step.forward_step` if None; its VLM steps, or one of your own in their form.
        callbacks: as for Bridge: a list of Callback, or a CallbackManager.

    Raises:
        ValueError: for a recipe with which the objective cannot be computed.
    """
    from megatron.bridge.training.callbacks import normalize_callbacks
    from megatron.bridge.training.finetune import finetune as host_finetune
    from megatron.bridge.training.gpt_step import forward_step as gpt_forward_step

    step = forward_step or gpt_forward_step
    lines = [*prepare(cfg, config), *announcement(cfg, config)] if config.enabled else []
    check_data(cfg, config)
    if not config.enabled:
        return host_finetune(cfg, step, callbacks=callbacks)
    for line in lines:
        _print_first(line)
    installations: list[Installation] = []
    _hook_model(cfg.model, functools.partial(_install, config=config, installations=installations))
    validation = MetricAccumulator()
    manager = normalize_callbacks(callbacks or [])
    Progress(config.objective, config.detail, validation, installations).register(manager)
    host_finetune(cfg, DFTStep(step, config, validation), callbacks=manager)
    if not installations:
        raise ValueError(
            f"dft.loss_type={config.loss_type}: the objective was never applied, because Bridge built its model "
            "without the hooks of its configuration"
        )


def show(cfg: Any, config: DFTConfig, forward_step: Callable[..., Any] | None = None) -> None:
    """Print what `finetune` of the same arguments would run with, as Bridge has completed and checked it."""
    from megatron.bridge.training.config import runtime_config_update

    for line in prepare(cfg, config) if config.enabled else ():
        _print_first(line)
    check_data(cfg, config)
    runtime_config_update(cfg)
    cfg.print_yaml()
    _print_first(f"{config}, {getattr(forward_step, '__module__', 'gpt_step')}")


def check_data(cfg: Any, config: DFTConfig) -> None:
    """Check token files against the run (`bridge_data.py`). Other data sets are not checked."""
    if hasattr(cfg.dataset, "check_token_files"):
        cfg.dataset.check_token_files(cfg, config.detail.channels)


def prepare(cfg: Any, config: DFTConfig) -> list[str]:
    """Refuse what the objective cannot work with, and set what it needs. Returns what was set, a line each."""
    if hasattr(cfg.model, "teacher"):
        raise ValueError(
            f"--recipe: expected a model with a language-modelling loss, got {type(cfg.model).__name__}, which distils "
            "a teacher; drop one of the two"
        )
    if getattr(cfg.dist, "use_decentralized_pg", False):
        raise ValueError("dist.use_decentralized_pg: expected Megatron's global process groups, got true; leave it out")
    lines = list(_aligned(cfg))
    for section in (cfg.model, cfg.ddp, cfg.dist):  # the checks know settings by name; Bridge has sorted them
        compat.check_settings(section, config)
    return lines


def _aligned(cfg: Any) -> Iterator[str]:
    """What context parallelism asks of the loss, of DDP and of packing, whatever the recipe says."""

    def put(section: str, owner: Any, name: str, value: Any, reason: str) -> Iterator[str]:
        before = getattr(owner, name)
        if before != value:
            setattr(owner, name, value)
            yield f"{section}.{name}: {before} -> {value}, {reason}"

    model, data = cfg.model, cfg.dataset
    sizes = {model.context_parallel_size, getattr(cfg.dist, "eval_context_parallel_size", None) or 1}
    if max(sizes) > 1:
        reason = "because under context parallelism ranks hold different numbers of valid tokens"
        yield from put("model", model, "calculate_per_token_loss", True, reason)
    if model.calculate_per_token_loss:
        reason = "because the loss is divided by the tokens of all ranks"
        yield from put("ddp", cfg.ddp, "average_in_collective", False, reason)
    packing = getattr(data, "offline_packing_specs", None)
    if packing is not None and not hasattr(data, "check_token_files"):  # token files are padded already
        sequence_ranks = model.tensor_model_parallel_size if model.sequence_parallel else 1
        multiple = math.lcm(*(size * sequence_ranks * (2 if size > 1 else 1) for size in sizes))
        multiple = math.lcm(packing.pad_seq_to_mult or 1, multiple)
        reason = "so that each packed sequence can be cut for its ranks"
        yield from put("dataset.offline_packing_specs", packing, "pad_seq_to_mult", multiple, reason)


def announcement(cfg: Any, config: DFTConfig) -> Iterator[str]:
    """What is different from now on."""
    yield (
        f"objective {config.objective} replaces the cross entropy; `lm loss` stays the NLL; "
        f"backend {compat.backend(config)}"
    )
    if not cfg.model.calculate_per_token_loss:
        yield (
            "the gradient is a mean of the means of micro-batches and ranks, Megatron's default, in which a token "
            "weighs more where few are valid; model.calculate_per_token_loss=true makes it a mean over all tokens"
        )
    yield from compat.upstream_faults(cfg.model)


class DFTStep:
    """A forward_step of Bridge's, of whichever signature, with ignored targets and the metrics of the objective.

    Bridge's steps do not pass the loss mask to the model. So it is put into the labels, where masked ones become -100,
    on their way from the data iterator. The loss leaves those tokens out before the output layer, and multi-token
    prediction receives the mask that follows from them (Megatron-Bridge issue 6103).
    """

    def __init__(
        self, forward_step: Callable[..., Any], config: DFTConfig, validation: MetricAccumulator | None = None
    ) -> None:
        self.__signature__ = inspect.signature(forward_step)  # Bridge passes its state to steps that have it
        self.step = with_metrics(forward_step, config, micro_batches=micro_batches, validation=validation)

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """What the wrapped step returns: the output, and a loss_func whose report has more keys."""
        call = self.__signature__.bind(*args, **kwargs)
        if call.arguments["data_iterator"] is not None:
            call.arguments["data_iterator"] = _Marked(call.arguments["data_iterator"])
        return self.step(*call.args, **call.kwargs)


class _Marked:
    """Batches with the labels of masked tokens ignored; the batches themselves, which a rerun may ask for, stay."""

    def __init__(self, batches: Iterator[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> _Marked:
        return self

    def __next__(self) -> Any:
        return ignore_masked(next(self.batches))


class Progress:
    """Once per iteration: a scheduled objective begins it, and tokens per second join the losses that Bridge logs."""

    def __init__(
        self,
        objective: Objective,
        detail: Detail,
        validation: MetricAccumulator,
        installations: Sequence[Installation] = (),
    ) -> None:
        self.objective, self.means, self.validation = objective, Means(detail), validation
        self.installations = installations
        self.start = 0.0

    def register(self, manager: Any) -> None:
        """With a CallbackManager of Bridge's."""
        manager.register("on_train_step_start", self.before_step)
        manager.register("on_train_step_end", self.after_step)
        manager.register("on_eval_start", self.before_evaluation)
        manager.register("on_test_start", self.before_evaluation)
        manager.register("on_eval_end", self.after_evaluation)
        manager.register("on_test_end", self.after_evaluation)

    def before_step(self, context: Any) -> None:
        self.objective.begin(context.state.train_state.step + 1)
        self.start = time.perf_counter()

    def after_step(self, context: Any) -> None:
        for head in self._heads():
            head.check_trained()
        losses = context.loss_dict
        if losses:  # on the last pipeline stage
            self.means.fill(losses)
            losses[TOKENS_PER_SECOND] = losses[VALID_TOKENS] / (time.perf_counter() - self.start)

    def before_evaluation(self, context: Any) -> None:
        self.objective.begin(context.state.train_state.step)

    def after_evaluation(self, context: Any) -> None:
        losses = context.total_loss_dict
        if losses:
            means = means_over_tokens(losses, self.validation)
            losses.clear()
            losses.update(means)
        for head in self._heads():
            head.check_counted()

    def _heads(self) -> Iterator[LossHead]:
        for installation in self.installations:
            yield from (binding.head for binding in installation.bindings)


def _hook_model(model: Any, hook: Callable[[list], list]) -> None:
    """Of both kinds of Bridge's model configurations. After wrapping, because adapters come before it."""
    if hasattr(model, "register_post_wrap_hook"):
        model.register_post_wrap_hook(hook)
    elif hasattr(model, "post_wrap_hooks"):
        model.post_wrap_hooks.append(hook)
    else:
        raise ValueError(
            f"--recipe: expected a language model of Megatron-Bridge's, with hooks, got {type(model).__name__}"
        )


def _install(chunks: list, config: DFTConfig, installations: list[Installation]) -> list:
    from megatron.bridge.utils.common_utils import print_rank_last

    installations.append(install(chunks, config))
    for binding in installations[-1].bindings:
        print_rank_last(f"> megatron_dft: {binding.output_layer}")
    return chunks


def _print_first(line: str) -> None:
    """Before there are ranks to ask: on the first of them."""
    from megatron.bridge.utils.common_utils import get_rank_safe

    if get_rank_safe() == 0:
        print(f"> megatron_dft: {line}", flush=True)
