"""Run an unmodified Megatron-LM training script with another loss.

    torchrun --nproc-per-node 8 -m megatron_dft.launch [--device cuda|cpu|auto] SCRIPT ARGUMENTS --loss-type dft

SCRIPT is pretrain_gpt.py of a Megatron-LM checkout, or another script that calls Megatron's pretrain(); ARGUMENTS are
its own. A script that ends without having trained with the objective ends with exit code 1 and the reason. Without
--loss-type it runs as if it had been started alone: nothing is replaced or checked, except that token files are
refused. --device cpu runs it on CPU ranks over gloo (slow: to try things out, and for tests); --device auto does so
where no GPU is found.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from collections.abc import Callable
from typing import Any, Protocol

from megatron_dft.config import DFTConfig
from megatron_dft.hosts import cpu, sft


class Run(Protocol):
    """What was prepared for a script."""

    def check(self) -> None:
        """Raises ValueError if the objective was never applied."""


def main(argv: list[str]) -> None:
    """Parse our flags, patch Megatron, and run the script as __main__."""
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return
    run(argv, "megatron_dft.launch", _enable)


def run(argv: list[str], program: str, enable: Callable[[DFTConfig], Run]) -> None:
    """Run the script that comes first in `argv`, on a host that `enable` has prepared for the configuration."""
    try:
        on_cpu, argv = device_of(argv)
        script, *arguments = argv or [""]
        if not os.path.isfile(script):
            raise ValueError(f"expected the path of a Python script, got {script!r}; the script comes first")
        sys.path.insert(0, os.path.dirname(os.path.abspath(script)))  # a checkout's own Megatron goes before a wheel's
        config, script_arguments = config_of(arguments)
        if on_cpu:
            script_arguments = cpu.complete_arguments(script_arguments)
            cpu.enable()
        if not config.enabled:
            _refuse_token_files(script_arguments)
        prepared = enable(config) if config.enabled else None
    except ValueError as error:
        sys.exit(f"{program}: {error}")
    sys.argv = [script, *script_arguments]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as error:
        if error.code not in (None, 0) or not {"-h", "--help"}.isdisjoint(script_arguments):
            raise
    try:
        if prepared is not None:
            prepared.check()
    except ValueError as error:
        sys.exit(f"{program}: {error}")


def _enable(config: DFTConfig) -> Run:
    from megatron_dft.hosts import megatron_lm

    return megatron_lm.enable(config)


def _refuse_token_files(arguments: list[str]) -> None:
    """Without an objective Megatron would read them as JSON."""
    for path in (word.partition("=")[2] or word for word in arguments):
        if sft.is_token_file(path):
            raise ValueError(f"{path}: a token file requires --loss-type; nll is the plain cross entropy")


def device_of(argv: list[str]) -> tuple[bool, list[str]]:
    """Whether to run on the CPU, and argv without --device, which the script does not know."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--device", default="cuda")
    known, rest = parser.parse_known_args(argv)
    if known.device not in cpu.DEVICES:
        return False, argv  # a flag of the script
    return cpu.is_meant_by(known.device), rest


def config_of(arguments: list[str]) -> tuple[DFTConfig, list[str]]:
    """The configuration, from our flags or from a `dft:` block in --yaml-cfg, and the arguments of the script.

    With an objective our flags stay in the arguments: the host parses and records them, too. Without one they are
    taken out.

    Raises:
        ValueError: for a setting that is not possible, or an objective in both places.
    """
    parser = DFTConfig.add_arguments(argparse.ArgumentParser(allow_abbrev=False, add_help=False))
    known, rest = parser.parse_known_args(arguments)
    for word in rest:
        flag = word.partition("=")[0].replace("_", "-")
        if "--loss-type".startswith(flag) and flag.startswith("--loss-t"):
            raise ValueError(f"{word}: expected --loss-type, before any `--`")
    config, block = DFTConfig.from_args(known), _yaml_block(arguments)
    if block is not None:
        if rest != arguments:
            raise ValueError("--yaml-cfg: expected the objective in one place, got a `dft:` block and --loss-... flags")
        config = DFTConfig.from_mapping(block)
    return config, arguments if config.enabled else rest


def _yaml_block(arguments: list[str]) -> Any:
    """The `dft:` block of Megatron's --yaml-cfg, None if there is none."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--yaml-cfg")
    path = parser.parse_known_args(arguments)[0].yaml_cfg
    if path is None or not os.path.isfile(path):
        return None
    import yaml  # Megatron itself needs it for this flag

    with open(path) as file:
        try:
            settings = yaml.safe_load(file)
        except yaml.YAMLError:
            return None  # Megatron's own reader names what is wrong
    if not isinstance(settings, dict):
        return None
    block = settings.get("dft")
    astray = [key for key, value in settings.items() if key == "loss_type" or _has_loss_type(value)]
    if block is None and astray:
        raise ValueError(f"--yaml-cfg {path}: expected the objective in a block `dft:`, got it at {astray[0]!r}")
    if "dft" in settings and not (block and isinstance(block, dict)):
        raise ValueError(f"--yaml-cfg {path}: expected KEY: VALUE in the block `dft:`, got {block!r}")
    return block


def _has_loss_type(value: Any) -> bool:
    return isinstance(value, dict) and "loss_type" in value


if __name__ == "__main__":
    main(sys.argv[1:])
