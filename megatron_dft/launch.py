"""Run an unmodified Megatron-LM training script with another training objective.

    torchrun --nproc-per-node 8 -m megatron_dft.launch [--device cuda|cpu|auto] SCRIPT ARGUMENTS --loss-type dft

SCRIPT is pretrain_gpt.py of a Megatron-LM checkout, or another script that calls Megatron's pretrain(). ARGUMENTS are
those of the script. If the script ends and the objective was not applied, the exit code is 1 and the reason is printed.
Without --loss-type and with --device cuda nothing is patched; the only check refuses token files.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from collections.abc import Callable
from typing import Any, Protocol

from megatron_dft.config import DFTConfig
from megatron_dft.hosts import sft
from megatron_dft.testing import cpu
from megatron_dft.utils import HelpFormatter, Parser, nearest


class Run(Protocol):
    """A script that was prepared to train with an objective."""

    def check(self) -> None:
        """Raises ValueError if the objective was not applied."""


def main(argv: list[str]) -> None:
    """Parse the flags, patch Megatron, and run the script as __main__."""
    if argv[:1] in (["-h"], ["--help"]):
        parser().print_help()
        return
    run(argv, "megatron_dft.launch", _enable)


def parser() -> argparse.ArgumentParser:
    """The parser of `--help`: --device, SCRIPT and the flags of the objective."""
    parser = argparse.ArgumentParser(
        "torchrun ... -m megatron_dft.launch",
        description=__doc__,
        formatter_class=HelpFormatter,
        usage="%(prog)s [--device DEVICE] SCRIPT ARGUMENTS [--loss-type OBJECTIVE] [--dft-...]",
    )
    parser.add_argument("--device", choices=cpu.DEVICES, default="cuda", help=cpu.DEVICE_HELP)
    parser.add_argument("script", metavar="SCRIPT", help="a script that calls Megatron's pretrain()")
    parser.add_argument("arguments", metavar="ARGUMENTS", nargs="*", help="arguments of the script")
    return DFTConfig.add_arguments(parser)


def run(argv: list[str], program: str, enable: Callable[[DFTConfig], Run]) -> None:
    """Run the script that is first in `argv`, after `enable` has patched Megatron for the configuration."""
    try:
        on_cpu, argv = device_of(argv)
        script, *arguments = argv or [""]
        check_script(script)
        set_single_rank()
        sys.path.insert(0, os.path.dirname(os.path.abspath(script)))  # a checkout's Megatron precedes a wheel's
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


def check_script(script: str) -> None:
    """Raises ValueError if there is no such file."""
    if not os.path.isfile(script):
        found = f"no script at {script!r}" if script else "no script"
        raise ValueError(f"{found}; pass the path of the training script before its arguments")


def set_single_rank() -> None:
    """Set the variables of torchrun for one rank, if the process was started without a launcher."""
    if not any(name in os.environ for name in ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")):
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # any free port


def _enable(config: DFTConfig) -> Run:
    from megatron_dft.hosts import megatron_lm

    return megatron_lm.enable(config)


def _refuse_token_files(arguments: list[str]) -> None:
    """Raises ValueError for a token file, which Megatron would read as JSON."""
    for path in (argument.partition("=")[2] or argument for argument in arguments):
        if sft.is_token_file(path):
            raise ValueError(f"{path}: a token file requires --loss-type; --loss-type nll is the plain cross entropy")


def device_of(argv: list[str]) -> tuple[bool, list[str]]:
    """Whether to run on CPU ranks, and argv without our --device."""
    parser = Parser()
    parser.add_argument("--device", default="cuda")
    known, rest = parser.parse_known_args(argv)
    if known.device not in cpu.DEVICES:
        if argv[0].partition("=")[0] == "--device":
            raise ValueError(f"--device: expected one of {', '.join(cpu.DEVICES)}, got {known.device!r}")
        return False, argv  # a flag of the script
    return cpu.requested_by(known.device), rest


def config_of(arguments: list[str]) -> tuple[DFTConfig, list[str]]:
    """The configuration, from our flags or the `dft:` block of --yaml-cfg, and the arguments of the script.

    With an objective our flags stay in the arguments, because Megatron parses and records them. Without one they are
    removed.

    Raises:
        ValueError: for an invalid setting, or an objective in both places.
    """
    parser = DFTConfig.add_arguments(Parser())
    known, rest = parser.parse_known_args(arguments)
    flags = [flag for action in parser._actions for flag in action.option_strings]
    for argument in rest:
        flag = argument.partition("=")[0].replace("_", "-")
        if "--loss-type".startswith(flag) and flag.startswith("--loss-t"):
            raise ValueError(f"{argument}: unknown flag; write --loss-type OBJECTIVE, before any `--`")
        if flag.startswith(("--dft-", "--no-dft-")):
            raise ValueError(f"{argument}: unknown flag{nearest(flag, flags)}")
    config, block = DFTConfig.from_args(known), _yaml_block(arguments)
    if block is not None:
        if rest != arguments:
            raise ValueError(
                "--yaml-cfg has a `dft:` block and argv has --loss-type or --dft-... flags; remove one of the two"
            )
        config = DFTConfig.from_mapping(block)
    return config, arguments if config.enabled else rest


def _yaml_block(arguments: list[str]) -> Any:
    """The `dft:` block of Megatron's --yaml-cfg, or None."""
    parser = Parser()
    parser.add_argument("--yaml-cfg")
    path = parser.parse_known_args(arguments)[0].yaml_cfg
    if path is None or not os.path.isfile(path):
        return None
    import yaml  # a dependency of this flag of Megatron

    with open(path) as file:
        try:
            settings = yaml.safe_load(file)
        except yaml.YAMLError:
            return None  # Megatron reports the error
    if not isinstance(settings, dict):
        return None
    block = settings.get("dft")
    misplaced = [key for key, value in settings.items() if key == "loss_type" or _has_loss_type(value)]
    if block is None and misplaced:
        raise ValueError(f"--yaml-cfg {path}: loss_type is set at {misplaced[0]!r}; move it to a block `dft:`")
    if "dft" in settings and not (block and isinstance(block, dict)):
        raise ValueError(f"--yaml-cfg {path}: expected KEY: VALUE in the block `dft:`, got {block!r}")
    return block


def _has_loss_type(value: Any) -> bool:
    return isinstance(value, dict) and "loss_type" in value


if __name__ == "__main__":
    main(sys.argv[1:])
