"""The command megatron-dft: train, bridge, plugin, data, reference, clean, advise, doctor.

Each command is the main() of a module, which torchrun starts with `-m`: see `COMMANDS`.
"""

from __future__ import annotations

import argparse
import importlib
import sys

from megatron_dft.version import __version__

COMMANDS = {
    "train": ("megatron_dft.launch", "run a Megatron-LM script with another training objective"),
    "bridge": ("megatron_dft.launch_bridge", "fine-tune a Megatron-Bridge recipe with another training objective"),
    "plugin": ("megatron_dft.plugins", "print the path of the plugin for ms-swift"),
    "data": ("megatron_dft.data", "tokenize and pack chat data"),
    "reference": ("megatron_dft.advisor.reference", "add the log-probabilities of a reference model to a token file"),
    "clean": ("megatron_dft.data.clean", "remove from the loss the tokens that a better model does not predict better"),
    "advise": ("megatron_dft.advisor", "recommend an objective for a data set"),
    "doctor": ("megatron_dft.doctor", "check a run before it starts"),
}


def main(argv: list[str] | None = None) -> None:
    """Run a command. The arguments after its name are those of the module."""
    parser = argparse.ArgumentParser(
        "megatron-dft",
        description="Dynamic Fine-Tuning for NVIDIA Megatron.",
        epilog="megatron-dft COMMAND --help shows the arguments of a command. For several ranks: "
        "torchrun ... -m MODULE, or torchrun ... --no-python megatron-dft COMMAND.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"megatron_dft {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module, description) in COMMANDS.items():
        commands.add_parser(name, help=f"{description}  ({module})", add_help=False)
    argv = sys.argv[1:] if argv is None else argv
    command = parser.parse_args(argv[:1]).command
    module = COMMANDS[command][0]
    if hasattr(importlib.import_module(module), "__path__"):
        module += ".__main__"
    importlib.import_module(module).main(argv[1:])
