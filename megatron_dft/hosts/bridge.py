"""Megatron-Bridge: the loss inside its `finetune()`.

    settings        what the objective needs of a recipe, set and told (`prepare`)
    model           `install`, as a hook that Bridge runs on the finished model chunks, adapters and DDP included. It is
                    registered last, because overrides empty a recipe's lists of hooks
    forward_step    `DFTStep`, a functor around Bridge's own: masked targets are ignored, the report gains the metrics
    loop            `Progress`, a Bridge callback: the schedule moves on, valid tokens are counted

Bridge stores its configuration in every checkpoint and builds it anew on loading. Nothing of ours is in there: hooks
are not stored, forward_step and callbacks are arguments. So a checkpoint loads where megatron_dft is not installed.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

from megatron_dft.config import DFTConfig
from megatron_dft.hosts import compat
from megatron_dft.hosts.hook import AddToTally, install, model_with_loss, with_metrics
from megatron_dft.hosts.iterations import Tally
from megatron_dft.hosts.loss_head import ignore_masked
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
    if not config.enabled:
        return host_finetune(cfg, step, callbacks=callbacks)
    for line in (*prepare(cfg, config), *announcement(cfg, config)):
        _print_first(line)
    mark = not compat.has_mtp(cfg.model)
    config = config if mark else _without_compaction(config)
    _hook_model(cfg.model, functools.partial(_install, config=config))
    tally = Tally(config.detail)
    manager = normalize_callbacks(callbacks or [])
    Progress(config.objective, tally, cfg.model.tensor_model_parallel_size).register(manager)
    host_finetune(cfg, DFTStep(step, config, tally.add, mark), callbacks=manager)


def show(cfg: Any, config: DFTConfig, forward_step: Callable[..., Any] | None = None) -> None:
    """Print what `finetune` of the same arguments would run with, as Bridge has completed and checked it."""
    from megatron.bridge.training.config import runtime_config_update

    for line in prepare(cfg, config) if config.enabled else ():
        _print_first(line)
    runtime_config_update(cfg)
    cfg.print_yaml()
    _print_first(f"{config}, {getattr(forward_step, '__module__', 'gpt_step')}")


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
    if packing is not None:
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
    if compat.has_mtp(cfg.model):
        yield "multi-token prediction needs every label, so masked tokens pass through the output layer"


class DFTStep:
    """A forward_step of Bridge's, of whichever signature, with ignored targets and the metrics of the objective.

    Bridge's steps do not give the loss mask to the model. So it is put into the labels, where masked ones become -100,
    on their way from the data iterator; the loss then leaves those tokens out before the output layer.
    """

    def __init__(
        self,
        forward_step: Callable[..., Any],
        config: DFTConfig,
        tally: AddToTally | None = None,
        mark: bool = True,
    ) -> None:
        self.__signature__ = inspect.signature(forward_step)  # Bridge gives its state to those who ask for it
        self.step = with_metrics(forward_step, config, tally)
        self.mark = mark

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """What the wrapped step returns: the output, and a loss_func whose report has more keys."""
        call = self.__signature__.bind(*args, **kwargs)
        if self.mark and call.arguments["data_iterator"] is not None:
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
    """Once per iteration: the objective moves on, and the tally joins the losses that Bridge logs."""

    def __init__(self, objective: Objective, tally: Tally, tp_size: int) -> None:
        self.objective, self.tally, self.tp_size = objective, tally, tp_size
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
        report = self.tally.report(self.tp_size, time.perf_counter() - self.start)
        if context.loss_dict:  # on the last pipeline stage
            context.loss_dict.update(report)

    def before_evaluation(self, context: Any) -> None:
        self.objective.begin(context.state.train_state.step)

    def after_evaluation(self, context: Any) -> None:
        report = self.tally.validation(self.tp_size)
        if context.total_loss_dict:
            context.total_loss_dict.update(report)


def _without_compaction(config: DFTConfig) -> DFTConfig:
    """Beside multi-token prediction labels stay as they are: its heads need them, and no mask reaches the model."""
    if config.compact_masked_tokens:
        raise ValueError(
            "dft.compact_masked_tokens: expected a model that knows which tokens are masked, got Bridge's multi-token "
            "prediction, which hides that from it; leave it out"
        )
    return dataclasses.replace(config, compact_masked_tokens=False)


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


def _install(chunks: list, config: DFTConfig) -> list:
    from megatron.bridge.utils.common_utils import print_rank_last

    for model in map(model_with_loss, install(chunks, config)):
        if model is not None:
            print_rank_last(f"> megatron_dft: {compat.describe_output_layer(model, config)}")
    return chunks


def _print_first(line: str) -> None:
    """Before there are ranks to ask: on the first of them."""
    from megatron.bridge.utils.common_utils import get_rank_safe

    if get_rank_safe() == 0:
        print(f"> megatron_dft: {line}", flush=True)
