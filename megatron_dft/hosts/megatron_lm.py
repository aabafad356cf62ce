"""Megatron-LM: the flags, and the loss inside `pretrain()`.

`enable` prepares `megatron.training` before a script imports it; the script stays as it is. With a DFT objective,
`pretrain()` gets the hook that binds the loss on the model chunks before DDP wraps them, and a forward_step that
reports the metrics. Without one it is called exactly as the script calls it.
"""

from __future__ import annotations

import functools
import inspect
from argparse import ArgumentParser
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from megatron_dft.config import DFTConfig
from megatron_dft.hosts import compat, sft
from megatron_dft.hosts.hook import install, model_with_loss, with_metrics
from megatron_dft.hosts.iterations import Tally, followed

DATASETS = "train_valid_test_dataset_provider"


def enable(command_line: DFTConfig) -> None:
    """Teach Megatron-LM the --loss-... flags, and run `pretrain()` with the objective that they, or a YAML file, name.

    Args:
        command_line: what the flags say; a `dft:` block in --yaml-cfg takes the place of flags.

    Raises:
        ValueError: if the Megatron that is installed has no `pretrain()`.
    """
    try:
        import megatron.training
        import megatron.training.arguments
    except ModuleNotFoundError as error:
        if not str(error.name).startswith("megatron"):
            raise
        raise ValueError(
            f"expected a Megatron with its own pretrain(), got none ({error}); use a Megatron-LM checkout or "
            "megatron-core >= 0.17, or call install() in your own training loop"
        ) from None
    arguments: Any = megatron.training.arguments
    arguments.add_megatron_arguments = _with_flags(arguments.add_megatron_arguments)
    sft.enable_formats()
    megatron.training.pretrain = with_objective(megatron.training.pretrain, command_line)


def with_objective(pretrain: Callable[..., Any], command_line: DFTConfig) -> Callable[..., Any]:
    """Megatron's `pretrain()`, with the loss installed. Three generations differ in who parses the arguments and how
    the model is given:

        0.17    pretrain(datasets, model_provider, ..., extra_args_provider)   parses them itself
        0.18    pretrain(cfg_container, datasets, model_provider, ...)         the script has parsed them
        0.19    pretrain(cfg_container, datasets, ..., model_provider=None)    the configuration can build the model
    """
    signature = inspect.signature(pretrain)
    compat.check_pretrain(signature)

    @functools.wraps(pretrain)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        settings = _settings(call)
        config = run_config(settings, command_line)
        with _prepared(call, settings, config) if config.enabled else nullcontext():
            result = pretrain(*call.args, **call.kwargs)
        flush_tensorboard()
        return result

    return wrapped


def flush_tensorboard() -> None:
    """Megatron logs the last validation after its own last flush; a process that ends soon after would lose it."""
    from megatron.training import get_tensorboard_writer

    if writer := get_tensorboard_writer():
        writer.flush()


def run_config(args: Any, command_line: DFTConfig) -> DFTConfig:
    """The configuration of a run: the flags, or the `dft:` block of --yaml-cfg, which replaces Megatron's flags."""
    block = getattr(args, "dft", None)
    if block is None:
        return command_line
    if command_line != DFTConfig():
        raise ValueError("--yaml-cfg: expected the objective in one place, got a `dft:` block and --loss-... flags")
    return DFTConfig.from_mapping(vars(block))


def _with_flags(add_megatron_arguments: Callable[[ArgumentParser], ArgumentParser]) -> Callable[..., ArgumentParser]:
    @functools.wraps(add_megatron_arguments)
    def wrapped(parser: ArgumentParser) -> ArgumentParser:
        return DFTConfig.add_arguments(add_megatron_arguments(parser))

    return wrapped


def _settings(call: inspect.BoundArguments) -> Any:
    """Megatron's arguments: as the script has parsed them, or as pretrain() is about to."""
    if "extra_args_provider" not in call.signature.parameters:
        from megatron.training import get_args

        return get_args()
    from megatron.training.arguments import parse_args

    return parse_args(call.arguments.get("extra_args_provider"))


def _prepared(call: inspect.BoundArguments, settings: Any, config: DFTConfig) -> AbstractContextManager[None]:
    """Put the objective into the arguments of pretrain(); within the result, the training loop follows it."""
    compat.check_settings(settings, config)
    tally = Tally(config.detail)
    call.arguments["forward_step_func"] = with_metrics(call.arguments["forward_step_func"], config, tally.add)
    _hook_model(call, functools.partial(_install, config=config))
    if config.channels:
        provider = call.arguments[DATASETS]
        call.arguments[DATASETS] = sft.naming_channels(provider, config.detail.channels)
    _announce(settings, config)
    return followed(config.objective, tally)


def _install(chunks: list, config: DFTConfig) -> list:
    """Put the loss on the model, and say what follows for its output layer."""
    from megatron.training import print_rank_last

    for model in map(model_with_loss, install(chunks, config)):
        if model is not None:
            print_rank_last(f"> megatron_dft: {compat.describe_output_layer(model, config)}")
    return chunks


def _announce(settings: Any, config: DFTConfig) -> None:
    """Say once what is different from now on; it is too early for Megatron's print_rank_0."""
    if settings.rank != 0:
        return
    print(
        f"> megatron_dft: objective {config.objective} replaces the cross entropy; `lm loss` stays the NLL; "
        f"backend {compat.backend(config)}"
    )
    if not getattr(settings, "calculate_per_token_loss", False):
        print(
            "> megatron_dft: the gradient is a mean of the means of micro-batches and ranks, Megatron's default, in "
            "which a token weighs more where few are valid; --calculate-per-token-loss makes it a mean over all tokens"
        )


def _hook_model(call: inspect.BoundArguments, hook: Callable[[list], Any]) -> None:
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
    else:
        raise ValueError(
            "pretrain(): expected a model_provider or a configuration with model.pre_wrap_hooks, got neither; "
            f"{compat.KNOWN_HOSTS}"
        )
