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
from typing import Any

from megatron_dft.config import DFTConfig
from megatron_dft.hosts import compat
from megatron_dft.hosts.hook import install, with_metrics


def enable(command_line: DFTConfig) -> None:
    """Teach Megatron-LM the --loss-... flags, and run `pretrain()` with the objective that they, or a YAML file, name.

    Args:
        command_line: what the flags say; a `dft:` block in --yaml-cfg takes the place of flags.
    """
    import megatron.training
    import megatron.training.arguments

    arguments: Any = megatron.training.arguments
    arguments.add_megatron_arguments = _with_flags(arguments.add_megatron_arguments)
    megatron.training.pretrain = with_objective(megatron.training.pretrain, command_line)


def with_objective(pretrain: Callable[..., Any], command_line: DFTConfig) -> Callable[..., Any]:
    """Megatron's `pretrain()`, with the loss installed."""
    signature = inspect.signature(pretrain)
    if "cfg_container" not in signature.parameters:
        raise ValueError(
            f"pretrain(): expected one that takes a cfg_container, got pretrain{signature}; "
            "use Megatron-LM or megatron-core >= 0.19"
        )

    @functools.wraps(pretrain)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        from megatron.training import get_args, print_rank_0

        call = signature.bind(*args, **kwargs)
        config = run_config(get_args(), command_line)
        if config.enabled:
            compat.check_settings(get_args(), config)
            call.arguments["forward_step_func"] = with_metrics(call.arguments["forward_step_func"], config)
            _hook_model(call, functools.partial(install, config=config))
            print_rank_0(
                f"> megatron_dft: objective {config.objective} replaces the cross entropy; `lm loss` stays the NLL"
            )
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
            "use Megatron-LM or megatron-core >= 0.19"
        )
