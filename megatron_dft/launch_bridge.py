"""Fine-tune a Megatron-Bridge recipe with another training objective.

    torchrun --nproc-per-node 8 -m megatron_dft.launch_bridge --recipe llama32_1b_sft_config \\
        --config-file recipe.yaml dft.loss_type=dft train.train_iters=500

The YAML file has Bridge's sections (model, train, dataset, ...), a `dft:` block with the settings of the objective, and
optionally a line `recipe: NAME` instead of --recipe. KEY=VALUE overrides the file; dft.KEY=VALUE sets the objective.
Without an objective the recipe runs as in Bridge. An unknown key is an error. WORLD_SIZE=64 in the environment makes
--dry-run assume 64 ranks.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import logging
import os
import re
import sys
from collections.abc import Mapping
from typing import Any

from megatron_dft.config import DFTConfig
from megatron_dft.testing import cpu
from megatron_dft.utils import HelpFormatter, load_function, nearest

RECIPES = "megatron.bridge.recipes"
STEPS = "megatron.bridge.training"
OVERRIDES = "megatron.bridge.training.utils.omegaconf_utils"
INSTANTIATE = "megatron.bridge.utils.instantiate_utils"
DATASET = "megatron_dft.hosts.bridge_data"  # module of this package that `_target_:` may name


def main(argv: list[str]) -> None:
    """Build the recipe, apply the file and the overrides, and run Bridge's finetune()."""
    if not argv:
        _parser().print_help()
        return
    options = _parser().parse_intermixed_args(argv)
    try:
        recipe, config, sections, overrides = requested(options.recipe, options.config_file, options.overrides)
        if cpu.requested_by(options.device):
            cpu.enable_bridge()
        step = options.step if ":" in options.step else f"{STEPS}.{options.step}:forward_step"
        if importlib.util.find_spec("megatron") is None or importlib.util.find_spec("megatron.bridge") is None:
            raise ValueError("Megatron-Bridge is not installed; see docs/megatron-bridge.md")
        cfg = load_function(recipe if ":" in recipe else f"{RECIPES}:{recipe}", "--recipe")()
        forward_step = load_function(step, "--step")
        override(cfg, sections, overrides)
        from megatron_dft.hosts import bridge

        (bridge.show if options.dry_run else bridge.finetune)(cfg, config, forward_step)
    except ValueError as error:
        sys.exit(f"megatron_dft.launch_bridge: {error}")


def requested(
    recipe: str | None, config_file: str | None, arguments: list[str]
) -> tuple[str, DFTConfig, dict[str, Any], list[str]]:
    """Recipe name, settings of the objective, Bridge's sections of the file, and Bridge's overrides."""
    try:
        from omegaconf import OmegaConf
    except ModuleNotFoundError as error:
        raise ValueError(f"Megatron-Bridge is not installed ({error}); see docs/megatron-bridge.md") from None
    if config_file and not os.path.isfile(config_file):
        raise ValueError(f"--config-file {config_file}: no such file; check the path")
    # Bridge resolves references such as ${model.seq_length} in the complete recipe.
    sections: Any = OmegaConf.to_container(OmegaConf.load(config_file) if config_file else OmegaConf.create())
    block = sections.pop("dft", None) or {} if isinstance(sections, dict) else None
    if not isinstance(block, dict):
        raise ValueError(
            f"{config_file}: expected sections (model:, train:, dft:, ...) of KEY: VALUE, got {sections!r}"
        )
    for argument in arguments:
        if "=" not in argument or argument.startswith("~"):
            raise ValueError(f"{argument}: expected KEY=VALUE; deletions (~KEY) are not supported")
    settings = [argument.removeprefix("dft.") for argument in arguments if argument.startswith("dft.")]
    name = sections.pop("recipe", None)
    if recipe is None and name is None:
        raise ValueError("no recipe given; use --recipe NAME, or a line `recipe: NAME` in --config-file")
    given: Any = OmegaConf.to_container(OmegaConf.merge(block, OmegaConf.from_dotlist(settings)))
    bridge_overrides = [argument for argument in arguments if not argument.startswith("dft.")]
    return recipe or name, DFTConfig.from_mapping(given), sections, bridge_overrides


def override(cfg: Any, sections: Mapping[str, Any], overrides: list[str]) -> None:
    """Apply the file, then KEY=VALUE, with Bridge's own functions.

    A section whose `_target_` is another class than the recipe's replaces that of the recipe. Bridge would merge both.

    Raises:
        ValueError: for an unknown key, an override that Bridge rejects or ignores with a warning, or a `_target_` that
            cannot be instantiated.
    """
    host, classes = importlib.import_module(OVERRIDES), importlib.import_module(INSTANTIATE)
    from omegaconf import OmegaConf

    overrides = [argument.lstrip("+") for argument in overrides]
    targets = _targets(sections, overrides)
    check_keys({**sections, **targets}, cfg)
    for argument in overrides:
        given: Any = None
        path = argument.partition("=")[0].split(".")
        for name in reversed(path):
            given = {name: given}
        check_keys({path[0]: targets.get(path[0], given[path[0]])}, cfg)
    replaced = [name for name, section in targets.items() if section["_target_"] != _class_of(getattr(cfg, name))]
    classes.register_allowed_target_prefix(DATASET)
    warnings = _Warnings(logging.WARNING)
    logging.getLogger(OVERRIDES).addHandler(warnings)
    try:
        tree, kept = host.create_omegaconf_dict_config(cfg)
        for name in replaced:
            tree[name] = {}
        kept = {path: value for path, value in kept.items() if path.split(".")[1] not in replaced}
        # ++ allows keys that the tree lacks: those of mappings, and of sections such as peft that Bridge leaves out.
        tree = host.parse_hydra_overrides(OmegaConf.merge(tree, sections), [f"++{argument}" for argument in overrides])
        settings: Any = OmegaConf.to_container(tree, resolve=True)
        for name in replaced:
            setattr(cfg, name, classes.instantiate(settings.pop(name), mode=classes.InstantiationMode.STRICT))
        host.apply_overrides(cfg, settings, kept)
    except host.OverridesError as error:
        raise ValueError(f"KEY=VALUE: {error}") from None
    except classes.InstantiationException as error:
        raise ValueError(f"{name}: {error}") from None
    finally:
        logging.getLogger(OVERRIDES).removeHandler(warnings)
    if warnings.lines:
        raise ValueError(f"overrides that Bridge ignores: {'; '.join(warnings.lines)}; correct or remove them")


def _targets(sections: Mapping[str, Any], overrides: list[str]) -> dict[str, dict[str, str]]:
    """Sections with a `_target_`, reduced to that key."""
    targets = {
        name: section["_target_"]
        for name, section in sections.items()
        if isinstance(section, Mapping) and "_target_" in section
    }
    for argument in overrides:
        key, _, value = argument.partition("=")
        name, _, rest = key.partition(".")
        if rest == "_target_":
            targets[name] = value
    return {name: {"_target_": target} for name, target in targets.items()}


def _class_of(section: Any) -> str:
    return f"{type(section).__module__}.{type(section).__qualname__}"


def check_keys(given: Mapping[str, Any], settings: Any, path: str = "") -> None:
    """Raises ValueError for keys that a tree of dataclasses lacks, and for mappings in place of plain settings."""
    types = {f.name: str(f.type) for f in dataclasses.fields(settings) if not f.name.startswith("_")}
    for key, value in given.items():
        # Bridge's newer model configurations also expose the fields of the configuration inside.
        if key not in types and (not hasattr(settings, key) or hasattr(type(settings), key)):
            raise ValueError(
                f"{path}{key}: {type(settings).__name__} has no such setting{nearest(key, types) or '; remove it'}"
            )
        if not isinstance(value, Mapping) or "_target_" in value:
            continue
        current = getattr(settings, key)
        if dataclasses.is_dataclass(current):
            check_keys(value, current, f"{path}{key}.")
        elif not isinstance(current, Mapping) and not re.search("dict|Mapping|Any", types.get(key, "Any"), re.I):
            raise ValueError(
                f"{path}{key}: the recipe has {current!r} here, so its keys cannot be set; add `_target_:` with the "
                "class of the section, or use another recipe"
            )


class _Warnings(logging.Handler):
    """Logging handler that collects warnings."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "torchrun ... -m megatron_dft.launch_bridge",
        description=__doc__,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--recipe",
        metavar="NAME",
        help="SFT or PEFT recipe of Megatron-Bridge, or your own as module:function",
    )
    parser.add_argument("--config-file", metavar="FILE", help="YAML file with sections of the recipe and a dft: block")
    parser.add_argument(
        "--step",
        metavar="NAME",
        default="gpt_step",
        help="forward_step: gpt_step, vlm_step, ... of Bridge, or your own as module:function",
    )
    parser.add_argument("--device", default="cuda", choices=cpu.DEVICES, help=cpu.DEVICE_HELP)
    parser.add_argument("--dry-run", action="store_true", help="print the final configuration and stop")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="overrides of Bridge, or dft.KEY=VALUE")
    return parser


if __name__ == "__main__":
    main(sys.argv[1:])
