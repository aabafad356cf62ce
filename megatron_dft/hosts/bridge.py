"""Megatron-Bridge: its `finetune()` with another loss.

    settings        `prepare` sets what the objective requires and reports each change
    model           `install` runs as a hook of Bridge on the finished model chunks, after adapters and DDP. It is
                    registered last, because overrides empty a recipe's lists of hooks
    forward_step    `DFTStep` wraps Bridge's forward_step: it ignores masked targets and reports the metrics
    loop            `Progress` is a Bridge callback: it sets the iteration of a scheduled objective

Bridge stores its configuration in every checkpoint. The configuration contains nothing of megatron_dft: hooks are not
stored, and forward_step and callbacks are arguments. A checkpoint therefore loads where megatron_dft is not installed.
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
from megatron_dft.hosts.binding import Installation, install, with_metrics
from megatron_dft.hosts.iterations import TOKENS_PER_SECOND, ChannelMeans, means_over_tokens, micro_batches
from megatron_dft.hosts.loss_head import ignore_masked
from megatron_dft.metrics import VALID_TOKENS, MetricAccumulator, MetricSpec


def finetune(
    cfg: Any, config: DFTConfig, forward_step: Callable[..., Any] | None = None, callbacks: Any = None
) -> None:
    """Run Bridge's `finetune()` with another loss. With loss_type "ce" it runs unchanged.

    Args:
        cfg: a ConfigContainer with every override applied. Settings that the objective requires are changed in place
            and printed.
        forward_step: None: Bridge's `gpt_step.forward_step`. Otherwise one of its VLM steps, or a function with their
            signature.
        callbacks: as for Bridge: a list of Callback, or a CallbackManager.

    Raises:
        ValueError: for a recipe that is incompatible with the objective, or if Bridge never applied the objective.
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
        _print_rank_0(line)
    installations: list[Installation] = []
    _hook_model(cfg.model, functools.partial(_install, config=config, installations=installations))
    validation = MetricAccumulator()
    manager = normalize_callbacks(callbacks or [])
    Progress(config.metric_spec, validation, installations).register(manager)
    host_finetune(cfg, DFTStep(step, config, validation), callbacks=manager)
    if not installations:
        raise ValueError(
            f"dft.loss_type={config.loss_type}: the objective was not applied: Bridge did not run the hooks of "
            "cfg.model; use a recipe with a language model of Megatron-Bridge"
        )


def show(cfg: Any, config: DFTConfig, forward_step: Callable[..., Any] | None = None) -> None:
    """Print the final configuration of `finetune` with the same arguments, as Bridge completes and checks it."""
    from megatron.bridge.training.config import runtime_config_update

    for line in prepare(cfg, config) if config.enabled else ():
        _print_rank_0(line)
    check_data(cfg, config)
    runtime_config_update(cfg)
    cfg.print_yaml()
    _print_rank_0(f"{config}, {getattr(forward_step, '__module__', 'gpt_step')}")


def check_data(cfg: Any, config: DFTConfig) -> None:
    """Check token files against the run (`bridge_data.py`). Other data sets are not checked."""
    if hasattr(cfg.dataset, "check_token_files"):
        cfg.dataset.check_token_files(cfg, config)


def prepare(cfg: Any, config: DFTConfig) -> list[str]:
    """Set what the objective requires. Returns one line per changed setting.

    Raises:
        ValueError: for settings that are incompatible with the objective.
    """
    if hasattr(cfg.model, "teacher"):
        raise ValueError(
            f"--recipe: {type(cfg.model).__name__} distils a teacher, which dft.loss_type does not support; use "
            "another recipe, or remove dft.loss_type"
        )
    if getattr(cfg.dist, "use_decentralized_pg", False):
        raise ValueError("dist.use_decentralized_pg=true is not supported; set it to false")
    lines = list(_set_required(cfg, config))
    for section in (cfg.model, cfg.ddp, cfg.dist):  # compat reads attributes by name
        compat.check_settings(section, config)
    return lines


def _set_required(cfg: Any, config: DFTConfig) -> Iterator[str]:
    """Set what a reduction and context parallelism require of loss, DDP and packing; yield a line per change."""

    def put(section: str, owner: Any, name: str, value: Any, reason: str) -> Iterator[str]:
        before = getattr(owner, name)
        if before != value:
            setattr(owner, name, value)
            yield f"{section}.{name}: {before} -> {value}, {reason}"

    model, data = cfg.model, cfg.dataset
    sizes = {model.context_parallel_size, getattr(cfg.dist, "eval_context_parallel_size", None) or 1}
    if config.by_conversation:
        reason = f"because dft.reduction={config.reduction} divides the gradient by one number for the whole batch"
        yield from put("model", model, "calculate_per_token_loss", True, reason)
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
        reason = "because each packed sequence is split over ranks"
        yield from put("dataset.offline_packing_specs", packing, "pad_seq_to_mult", multiple, reason)


def announcement(cfg: Any, config: DFTConfig) -> Iterator[str]:
    """Log lines: the objective, its backend, the weighting of tokens, known faults of Megatron."""
    yield (
        f"objective {config.objective} replaces the cross entropy; `lm loss` stays the NLL; "
        f"backend {compat.backend(config)}"
    )
    if not cfg.model.calculate_per_token_loss:
        yield (
            "the gradient is a mean of means over micro-batches and ranks (Megatron's default): a token weighs more in "
            "a micro-batch with few valid tokens; model.calculate_per_token_loss=true makes it a mean over all tokens"
        )
    yield from compat.upstream_faults(cfg.model)


class DFTStep:
    """A Bridge forward_step that ignores masked targets and reports the metrics of the objective.

    Bridge's steps do not pass the loss mask to the model. The batches from the data iterator therefore carry it in the
    labels: masked labels become -100. Those tokens skip the output layer, and multi-token prediction receives the mask
    of the labels (Megatron-Bridge issue 6103).
    """

    def __init__(
        self, forward_step: Callable[..., Any], config: DFTConfig, validation: MetricAccumulator | None = None
    ) -> None:
        self.__signature__ = inspect.signature(forward_step)  # Bridge passes its state to steps that have it
        self.step = with_metrics(forward_step, config, micro_batches=micro_batches, validation=validation)

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Returns the output of the step, and its loss_func with the metrics in the report."""
        call = self.__signature__.bind(*args, **kwargs)
        if call.arguments["data_iterator"] is not None:
            call.arguments["data_iterator"] = _MaskedBatches(call.arguments["data_iterator"])
        return self.step(*call.args, **call.kwargs)


class _MaskedBatches:
    """Copies of the batches with masked labels set to -100. The rerun state machine needs the originals."""

    def __init__(self, batches: Iterator[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> _MaskedBatches:
        return self

    def __next__(self) -> Any:
        return ignore_masked(next(self.batches))


class Progress:
    """Callbacks of Bridge: set the iteration of a scheduled objective, add tokens per second to the logged losses."""

    def __init__(
        self,
        spec: MetricSpec,
        validation: MetricAccumulator,
        installations: Sequence[Installation] = (),
    ) -> None:
        self.means, self.validation = ChannelMeans(spec), validation
        self.installations = installations
        self.start = 0.0

    def register(self, manager: Any) -> None:
        """Register the callbacks with Bridge's CallbackManager."""
        manager.register("on_train_step_start", self.before_step)
        manager.register("on_train_step_end", self.after_step)
        manager.register("on_eval_start", self.before_evaluation)
        manager.register("on_test_start", self.before_evaluation)
        manager.register("on_eval_end", self.after_evaluation)
        manager.register("on_test_end", self.after_evaluation)

    def before_step(self, context: Any) -> None:
        self._begin(context.state.train_state.step + 1)
        self.start = time.perf_counter()

    def after_step(self, context: Any) -> None:
        for installation in self.installations:
            installation.check_step()
        losses = context.loss_dict
        if losses:  # on the last pipeline stage
            self.means.fill(losses)
            losses[TOKENS_PER_SECOND] = losses[VALID_TOKENS] / (time.perf_counter() - self.start)

    def before_evaluation(self, context: Any) -> None:
        self._begin(context.state.train_state.step)

    def after_evaluation(self, context: Any) -> None:
        losses = context.total_loss_dict
        if losses:
            means = means_over_tokens(losses, self.validation)
            losses.clear()
            losses.update(means)
        for installation in self.installations:
            installation.check_tokens()

    def _begin(self, iteration: int) -> None:
        for installation in self.installations:
            installation.begin(iteration)


def _hook_model(model: Any, hook: Callable[[list], list]) -> None:
    """Register a post-wrap hook on either kind of Bridge's model configurations. Adapters precede wrapping."""
    if hasattr(model, "register_post_wrap_hook"):
        model.register_post_wrap_hook(hook)
    elif hasattr(model, "post_wrap_hooks"):
        model.post_wrap_hooks.append(hook)
    else:
        raise ValueError(
            f"--recipe: expected a Megatron-Bridge language model with post-wrap hooks, got {type(model).__name__}"
        )


def _install(chunks: list, config: DFTConfig, installations: list[Installation]) -> list:
    from megatron.bridge.utils.common_utils import print_rank_last

    installations.append(install(chunks, config))
    for binding in installations[-1].bindings:
        print_rank_last(f"> megatron_dft: {binding.output_layer}")
    return chunks


def _print_rank_0(line: str) -> None:
    """Print on rank 0, before torch.distributed is initialized."""
    from megatron.bridge.utils.common_utils import get_rank_safe

    if get_rank_safe() == 0:
        print(f"> megatron_dft: {line}", flush=True)
