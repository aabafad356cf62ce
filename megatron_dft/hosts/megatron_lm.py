"""Megatron-LM: the --dft-... flags, and the objective inside `pretrain()`.

`enable` patches `megatron.training` before a script imports it; the script does not change. `pretrain()` then binds the
objective on the model chunks before DDP wraps them, and runs a forward_step that reports metrics. `Run.check`, after
the script, raises if that did not happen.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_dft.config import DFTConfig
from megatron_dft.hosts import compat, sft
from megatron_dft.hosts.binding import Installation, install, with_metrics
from megatron_dft.hosts.iterations import Progress, micro_batches
from megatron_dft.hosts.patches import TRAINING, Patches
from megatron_dft.metrics import MetricAccumulator

DATASETS = "train_valid_test_dataset_provider"
PRETRAIN = f"{TRAINING}:pretrain"

NEVER_CALLED = (
    "the script did not call Megatron's pretrain(); in a training loop of your own call megatron_dft.install(), and "
    "start the script without this launcher"
)


class Run:
    """A script that trains with an objective: its patches, and whether its last pretrain() applied the objective."""

    def __init__(self, config: DFTConfig) -> None:
        self.config = config
        self.patches = Patches()
        self.failure = NEVER_CALLED  # why the objective was not applied; empty if it was
        self.installations: list[Installation] = []  # of the current pretrain()

    def begin_iteration(self, iteration: int) -> None:
        """Set the iteration of a scheduled objective."""
        for installation in self.installations:
            installation.begin(iteration)

    def check_step(self) -> None:
        """Check that the training step used the objective. Raises ValueError if not."""
        for installation in self.installations:
            installation.check_step()

    def check_tokens(self) -> None:
        """Raises ValueError for a counted token without a loss, or without a reference."""
        for installation in self.installations:
            installation.check_tokens()

    def begin(self) -> None:
        """Reset the result before a call of pretrain(): not applied yet."""
        self.failure = "pretrain() ended with an error that the script caught"

    def end(self, progress: Progress) -> None:
        """Check that a finished pretrain() applied the objective. Raises ValueError if not."""
        if not self.installations:
            raise ValueError(
                f"--loss-type {self.config.loss_type}: pretrain() built no model through model_provider or "
                "model.pre_wrap_hooks, so the objective was not applied; build the model through one of them"
            )
        self.check_tokens()
        progress.check_channels()
        self.failure = ""

    def check(self) -> None:
        """Check that the script applied the objective. Raises ValueError with the reason if not."""
        if self.failure:
            raise ValueError(f"--loss-type {self.config.loss_type}: the objective was not applied: {self.failure}")


def enable(
    config: DFTConfig,
    *,
    prepare: Callable[[inspect.BoundArguments], None] = lambda call: None,
    finish: Callable[[], None] = lambda: None,
) -> Run:
    """Patch Megatron-LM: `pretrain()` trains with the objective, and its parser has our flags.

    Args:
        config: the settings, with an objective.
        prepare: changes the arguments of pretrain().
        finish: is called after pretrain().

    Raises:
        ValueError: if the installed Megatron has no `pretrain()`, or an unknown one.
    """
    try:
        from megatron.training import training
    except ModuleNotFoundError as error:
        if not str(error.name).startswith("megatron"):
            raise
        raise ValueError(
            f"no Megatron with pretrain() is installed ({error}); use a Megatron-LM checkout or megatron-core >= 0.17, "
            "or call install() in your own training loop"
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
            call.arguments[DATASETS] = sft.dataset_provider(call.arguments[DATASETS], settings, config)
            prepare(call)
            with Patches() as patches, contextlib.ExitStack() as undo:
                undo.callback(run.installations.clear)
                progress = _prepare(call, settings, run, undo)
                progress.follow(patches)
                try:
                    result = pretrain(*call.args, **call.kwargs)
                except SystemExit as error:  # --exit-interval
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
    """Disable compile_helpers() for a wheel, which has helpers_cpp compiled and no Makefile."""
    import megatron.core.datasets.utils as utils

    compiled = importlib.util.find_spec("megatron.core.datasets.helpers_cpp")
    if compiled and not Path(utils.__file__).with_name("Makefile").exists():
        patches.put("megatron.core.datasets.utils:compile_helpers", lambda: None)


def add_flags(patches: Patches) -> None:
    """Add our flags to Megatron's parser."""
    patches.wrap("megatron.training.arguments:add_megatron_arguments", _with_flags)


def flush_tensorboard() -> None:
    """Flush TensorBoard: Megatron logs the last validation after its last flush, and a process exit would lose it."""
    from megatron.training import get_tensorboard_writer

    if writer := get_tensorboard_writer():
        writer.flush()


def _with_flags(add_megatron_arguments: Callable[[ArgumentParser], ArgumentParser]) -> Callable[..., ArgumentParser]:
    def wrapped(parser: ArgumentParser) -> ArgumentParser:
        return DFTConfig.add_arguments(add_megatron_arguments(parser))

    return wrapped


def _settings(call: inspect.BoundArguments) -> Any:
    """Megatron's parsed arguments. The signature of pretrain() depends on the version:

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
    """Put the objective into the arguments of pretrain(). Returns the hooks of its training loop."""
    config = run.config
    validation = MetricAccumulator()
    totals = None if getattr(settings, "hybrid_context_parallel", False) else micro_batches
    call.arguments["forward_step_func"] = with_metrics(
        call.arguments["forward_step_func"], config, micro_batches=totals, validation=validation
    )
    _hook_model(call, functools.partial(_install, run=run), undo)
    _announce(settings, config)
    return Progress(
        config.metric_spec,
        validation,
        begin=run.begin_iteration,
        check_step=run.check_step,
        check_tokens=run.check_tokens,
    )


def _install(chunks: list, run: Run) -> list:
    """Bind the objective on the model, and log how its output layer is computed."""
    from megatron.training import print_rank_last

    run.installations.append(install(chunks, run.config))
    for binding in run.installations[-1].bindings:
        print_rank_last(f"> megatron_dft: {binding.output_layer}")
    return chunks


def _announce(settings: Any, config: DFTConfig) -> None:
    """Log what changes, on rank 0; Megatron's print_rank_0 does not work yet."""
    if settings.rank != 0:
        return
    lines = [
        f"objective {config.objective} replaces the cross entropy; `lm loss` stays the NLL; "
        f"backend {compat.backend(config)}"
    ]
    if not getattr(settings, "calculate_per_token_loss", False):
        lines.append(
            "the gradient is a mean of means over micro-batches and ranks (Megatron's default): a token weighs more in "
            "a micro-batch with few valid tokens; --calculate-per-token-loss makes it the mean over all tokens"
        )
    if getattr(settings, "hybrid_context_parallel", False):
        lines.append("dft/valid_tokens is not reported under --hybrid-context-parallel")
    for line in (*lines, *compat.upstream_faults(settings)):
        print(f"> megatron_dft: {line}")


def _hook_model(call: inspect.BoundArguments, hook: Callable[[list], Any], undo: contextlib.ExitStack) -> None:
    """Call `hook` with the model chunks before they are wrapped, by model_provider or the model configuration."""
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
