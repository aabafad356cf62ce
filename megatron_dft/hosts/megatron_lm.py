"""Megatron-LM: the flags, and the loss inside `pretrain()`.

`enable` prepares `megatron.training` before a script imports it; the script stays as it is. `pretrain()` then gets the
hook that binds the loss on the model chunks before DDP wraps them, and a forward_step that reports the metrics. What
`enable` returns knows whether that happened (`Run.check`). Without an objective nothing is prepared.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_dft.config import DFTConfig
from megatron_dft.hosts import compat, sft
from megatron_dft.hosts.hook import Installation, install, with_metrics
from megatron_dft.hosts.iterations import Progress, micro_batches
from megatron_dft.hosts.loss_head import LossHead
from megatron_dft.hosts.patches import TRAINING, Patches
from megatron_dft.metrics import MetricAccumulator

DATASETS = "train_valid_test_dataset_provider"
PRETRAIN = f"{TRAINING}:pretrain"


NEVER_CALLED = (
    "the script ended without a call of Megatron's pretrain(); with a training loop of your own call "
    "megatron_dft.install() in it, and start it without this launcher"
)


class Run:
    """One script with an objective: what is replaced for it, and whether its last pretrain() trained with it."""

    def __init__(self, config: DFTConfig) -> None:
        self.config = config
        self.patches = Patches()
        self.failure = NEVER_CALLED  # why the objective is not trained with; empty after a pretrain() that did
        self.installations: list[Installation] = []  # of the pretrain() that runs

    def heads(self) -> Iterator[LossHead]:
        """The losses on this rank."""
        for installation in self.installations:
            yield from (binding.head for binding in installation.bindings)

    def check_step(self) -> None:
        """After a training step. Raises ValueError if it trained on another loss."""
        for head in self.heads():
            head.check_trained()

    def check_masks(self) -> None:
        """Raises ValueError if a loss mask counted a token without a loss. One host-device sync."""
        for head in self.heads():
            head.check_counted()

    def begin(self) -> None:
        """Before a pretrain()."""
        self.failure = "pretrain() ended with an error that the script has caught"

    def end(self, progress: Progress) -> None:
        """After it. Raises ValueError if it did not train with the objective."""
        if not self.installations:
            raise ValueError(
                f"--loss-type {self.config.loss_type}: pretrain() built no model through model_provider or "
                "model.pre_wrap_hooks, so the objective was not applied; build the model through one of them"
            )
        self.check_masks()
        progress.check_channels()
        self.failure = ""

    def check(self) -> None:
        """When the script has ended. Raises ValueError, with the reason, if it did not train with the objective."""
        if self.failure:
            raise ValueError(f"--loss-type {self.config.loss_type}: the objective was not applied: {self.failure}")


def enable(
    config: DFTConfig,
    *,
    prepare: Callable[[inspect.BoundArguments], None] = lambda call: None,
    finish: Callable[[], None] = lambda: None,
) -> Run:
    """Teach Megatron-LM the --loss-... flags, and run `pretrain()` with the objective.

    Args:
        config: with an objective.
        prepare: may change the arguments of pretrain() further.
        finish: called when pretrain() has returned.

    Raises:
        ValueError: if the Megatron that is installed has no `pretrain()`, or one that is not known.
    """
    try:
        from megatron.training import training
    except ModuleNotFoundError as error:
        if not str(error.name).startswith("megatron"):
            raise
        raise ValueError(
            f"expected a Megatron with its own pretrain(), got none ({error}); use a Megatron-LM checkout or "
            "megatron-core >= 0.17, or call install() in your own training loop"
        ) from None
    signature = inspect.signature(training.pretrain)
    compat.check_pretrain(signature)
    run = Run(config)
    add_flags(run.patches)
    _use_compiled_helpers(run.patches)

    def with_objective(pretrain: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            run.begin()
            call = signature.bind(*args, **kwargs)
            settings = _settings(call)
            compat.check_settings(settings, config)
            sft.check_settings(settings)
            call.arguments[DATASETS] = sft.dataset_provider(call.arguments[DATASETS], settings, config.detail.channels)
            prepare(call)
            with Patches() as patches, contextlib.ExitStack() as undo:
                undo.callback(run.installations.clear)
                progress = _prepare(call, settings, run, undo)
                progress.follow(patches)
                try:
                    result = pretrain(*call.args, **call.kwargs)
                except SystemExit as error:  # as after --exit-interval
                    if error.code in (None, 0):
                        run.end(progress)
                    raise
                run.end(progress)
            flush_tensorboard()
            finish()
            return result

        return wrapped

    run.patches.wrap(PRETRAIN, with_objective)
    return run


def _use_compiled_helpers(patches: Patches) -> None:
    """Disable compile_helpers() for a wheel: helpers_cpp is already compiled, and there is no Makefile."""
    import megatron.core.datasets.utils as utils

    compiled = importlib.util.find_spec("megatron.core.datasets.helpers_cpp")
    if compiled and not Path(utils.__file__).with_name("Makefile").exists():
        patches.put("megatron.core.datasets.utils:compile_helpers", lambda: None)


def add_flags(patches: Patches) -> None:
    """Teach Megatron's parser the --loss-... flags."""
    patches.wrap("megatron.training.arguments:add_megatron_arguments", _with_flags)


def flush_tensorboard() -> None:
    """Megatron logs the last validation after its own last flush; a process that ends soon after would lose it."""
    from megatron.training import get_tensorboard_writer

    if writer := get_tensorboard_writer():
        writer.flush()


def _with_flags(add_megatron_arguments: Callable[[ArgumentParser], ArgumentParser]) -> Callable[..., ArgumentParser]:
    def wrapped(parser: ArgumentParser) -> ArgumentParser:
        return DFTConfig.add_arguments(add_megatron_arguments(parser))

    return wrapped


def _settings(call: inspect.BoundArguments) -> Any:
    """Megatron's arguments: as the script has parsed them, or as pretrain() is about to. Three generations of it:

    0.17    pretrain(datasets, model_provider, ..., extra_args_provider)   parses them itself
    0.18    pretrain(cfg_container, datasets, model_provider, ...)         the script has parsed them
    0.19    pretrain(cfg_container, datasets, ..., model_provider=None)    the configuration can build the model
    """
    if "extra_args_provider" not in call.signature.parameters:
        from megatron.training import get_args

        return get_args()
    from megatron.training.arguments import parse_args

    return parse_args(call.arguments.get("extra_args_provider"))


def _prepare(call: inspect.BoundArguments, settings: Any, run: Run, undo: contextlib.ExitStack) -> Progress:
    """Put the objective into the arguments of pretrain(). The result follows its training loop."""
    config = run.config
    validation = MetricAccumulator()
    totals = None if getattr(settings, "hybrid_context_parallel", False) else micro_batches
    call.arguments["forward_step_func"] = with_metrics(
        call.arguments["forward_step_func"], config, micro_batches=totals, validation=validation
    )
    _hook_model(call, functools.partial(_install, run=run), undo)
    _announce(settings, config)
    return Progress(config.objective, config.detail, validation, run.check_step, run.check_masks)


def _install(chunks: list, run: Run) -> list:
    """Put the loss on the model, and log what happens to its output layer."""
    from megatron.training import print_rank_last

    run.installations.append(install(chunks, run.config))
    for binding in run.installations[-1].bindings:
        print_rank_last(f"> megatron_dft: {binding.output_layer}")
    return chunks


def _announce(settings: Any, config: DFTConfig) -> None:
    """Log once what is different from now on; it is too early for Megatron's print_rank_0."""
    if settings.rank != 0:
        return
    lines = [
        f"objective {config.objective} replaces the cross entropy; `lm loss` stays the NLL; "
        f"backend {compat.backend(config)}"
    ]
    if not getattr(settings, "calculate_per_token_loss", False):
        lines.append(
            "the gradient is a mean of the means of micro-batches and ranks, Megatron's default, in which a token "
            "weighs more where few are valid; --calculate-per-token-loss makes it a mean over all tokens"
        )
    if getattr(settings, "hybrid_context_parallel", False):
        lines.append("`valid tokens` is not reported under --hybrid-context-parallel")
    for line in (*lines, *compat.upstream_faults(settings)):
        print(f"> megatron_dft: {line}")


def _hook_model(call: inspect.BoundArguments, hook: Callable[[list], Any], undo: contextlib.ExitStack) -> None:
    """Reach the model chunks before they are wrapped: through the script's provider, or the model's configuration."""
    provider = call.arguments.get("model_provider")
    model_config: Any = getattr(call.arguments.get("cfg_container"), "model", None)
    if provider is not None:

        @functools.wraps(provider)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            model = provider(*args, **kwargs)
            hook([model])
            return model

        call.arguments["model_provider"] = wrapped
    elif hasattr(model_config, "pre_wrap_hooks"):
        model_config.pre_wrap_hooks.append(hook)
        undo.callback(model_config.pre_wrap_hooks.remove, hook)
    else:
        raise ValueError(
            "pretrain(): expected a model_provider or a configuration with model.pre_wrap_hooks, got neither; "
            f"{compat.KNOWN_HOSTS}"
        )
