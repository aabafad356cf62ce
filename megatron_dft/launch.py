"""Run an unmodified Megatron-LM training script with another loss.

    torchrun --nproc-per-node 8 -m megatron_dft.launch SCRIPT ARGUMENTS --loss-type dft [--device cuda|cpu|auto]

SCRIPT is pretrain_gpt.py of a Megatron-LM checkout, or another script that calls megatron.training.pretrain();
ARGUMENTS are its own. Without --loss-type it runs as if it had been started alone. --device cpu runs it on CPU ranks
over gloo (slow: to try things out, and for tests); --device auto does so where no GPU is found.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from collections.abc import Callable

from megatron_dft.config import DFTConfig
from megatron_dft.hosts import cpu


def main(words: list[str]) -> None:
    """Take out our own options, prepare the host, and run the script as __main__."""
    if not words or words[0] in ("-h", "--help"):
        print(__doc__)
        return
    run(words, "megatron_dft.launch", _enable)


def run(words: list[str], program: str, enable: Callable[[DFTConfig], None]) -> None:
    """Run the script that comes first in `words`, on a host that `enable` has prepared for the configuration."""
    script, words = words[0], words[1:]
    if not os.path.isfile(script):
        sys.exit(f"{program}: expected the path of a Python script, got {script!r}; the script comes first")
    sys.path.insert(0, os.path.dirname(os.path.abspath(script)))  # a checkout's own Megatron goes before a wheel's
    on_cpu, words = device_of(words)
    try:
        config = config_of(words)
        if on_cpu:
            words = cpu.complete_arguments(words)
            cpu.enable()
        enable(config)
    except ValueError as error:
        sys.exit(f"{program}: {error}")
    sys.argv = [script, *words]
    runpy.run_path(script, run_name="__main__")


def _enable(config: DFTConfig) -> None:
    from megatron_dft.hosts import megatron_lm

    megatron_lm.enable(config)


def device_of(words: list[str]) -> tuple[bool, list[str]]:
    """Whether to run on the CPU, and the arguments without --device, which the script does not know."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--device", choices=cpu.DEVICES, default="cuda")
    known, rest = parser.parse_known_args(words)
    return cpu.is_meant_by(known.device), rest


def config_of(words: list[str]) -> DFTConfig:
    """Our flags. They stay in the arguments: the host parses and records them too."""
    parser = DFTConfig.add_arguments(argparse.ArgumentParser(allow_abbrev=False, add_help=False))
    return DFTConfig.from_args(parser.parse_known_args(words)[0])


if __name__ == "__main__":
    main(sys.argv[1:])
