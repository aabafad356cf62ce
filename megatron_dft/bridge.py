"""Fine-tune a Megatron-Bridge recipe with another loss.

    torchrun --nproc-per-node 8 -m megatron_dft.bridge --recipe llama32_1b_sft_config \\
        --config-file recipe.yaml dft.loss_type=dft train.train_iters=500

--recipe NAME        an SFT or PEFT recipe of the installed Megatron-Bridge, or your own function as module:function
--config-file FILE   YAML: Bridge's sections (model, train, dataset, ...), a `dft:` block with the settings of the
                     objective and, so that --recipe can be left out, a line `recipe: NAME`
--step NAME          the forward_step: gpt_step (default), vlm_step, ... of Bridge, or your own as module:function
--device NAME        cuda (default), cpu (CPU ranks over gloo, to try things out), auto: those where no GPU is found
--dry-run            print the final configuration and stop; WORLD_SIZE=64 in the environment stands for 64 ranks
KEY=VALUE            Bridge's overrides and, as dft.KEY=VALUE, settings of the objective; they win over the file

Without an objective the recipe runs as Bridge runs it. A key that does not exist is an error, wherever it stands.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import logging
import os
import re
import sys
from collections.abc import Mapping
from typing import Any

from megatron_dft.config import DFTConfig, load_function
from megatron_dft.hosts import cpu
from megatron_dft.objectives import nearest

RECIPES = "megatron.bridge.recipes"
STEPS = "megatron.bridge.training"
OVERRIDES = "megatron.bridge.training.utils.omegaconf_utils"
INSTANTIATE = "megatron.bridge.utils.instantiate_utils"
DATASET = "megatron_dft.hosts.bridge_data"  # a module of ours whose class `_target_:` may name


def main(words: list[str]) -> None:
    """Build the recipe, put into it what was asked for, and run Bridge's finetune()."""
    if not words or words[0] in ("-h", "--help"):
        print(__doc__)
        return
    options = _parser().parse_intermixed_args(words)
    try:
        recipe, config, sections, overrides = requested(options.recipe, options.config_file, options.overrides)
        if cpu.is_meant_by(options.device):
            cpu.enable_bridge()
        step = options.step if ":" in options.step else f"{STEPS}.{options.step}:forward_step"
        cfg = load_function(recipe if ":" in recipe else f"{RECIPES}:{recipe}", "--recipe")()
        forward_step = load_function(step, "--step")
        override(cfg, sections, overrides)
        from megatron_dft.hosts import bridge

        (bridge.show if options.dry_run else bridge.finetune)(cfg, config, forward_step)
    except ValueError as error:
        sys.exit(f"megatron_dft.bridge: {error}")


def requested(
    recipe: str | None, config_file: str | None, words: list[str]
) -> tuple[str, DFTConfig, dict[str, Any], list[str]]:
    """The name of the recipe, the settings of the objective, and for Bridge: sections of the file and overrides."""
    try:
        from omegaconf import OmegaConf
    except ModuleNotFoundError as error:
        raise ValueError(f"expected Megatron-Bridge, got none of what it needs ({error}); install it") from None
    if config_file and not os.path.isfile(config_file):
        raise ValueError(f"--config-file: expected a YAML file, got {config_file!r}")
    # What refers to other settings, ${model.seq_length}, is resolved by Bridge, in the whole of the recipe.
    sections: Any = OmegaConf.to_container(OmegaConf.load(config_file) if config_file else OmegaConf.create())
    block = sections.pop("dft", None) or {} if isinstance(sections, dict) else None
    if not isinstance(block, dict):
        raise ValueError(
            f"{config_file}: expected sections (model:, train:, dft:, ...) of KEY: VALUE, got {sections!r}"
        )
    for word in words:
        if "=" not in word or word.startswith("~"):
            raise ValueError(f"expected KEY=VALUE, got {word!r}")
    ours = [word.removeprefix("dft.") for word in words if word.startswith("dft.")]
    name = sections.pop("recipe", None)
    if recipe is None and name is None:
        raise ValueError("expected the name of a recipe, got none; use --recipe NAME, or a line `recipe: NAME` in FILE")
    given: Any = OmegaConf.to_container(OmegaConf.merge(block, OmegaConf.from_dotlist(ours)))
    theirs = [word for word in words if not word.startswith("dft.")]
    return recipe or name, DFTConfig.from_mapping(given), sections, theirs


def override(cfg: Any, sections: Mapping[str, Any], overrides: list[str]) -> None:
    """Apply the file, then KEY=VALUE, by Bridge's own means. What it would skip with a warning is an error here.

    A section whose `_target_` is another class than the recipe's replaces that of the recipe. Bridge would merge both.
    """
    host, classes = importlib.import_module(OVERRIDES), importlib.import_module(INSTANTIATE)
    from omegaconf import OmegaConf

    overrides = [word.lstrip("+") for word in overrides]
    targets = _targets(sections, overrides)
    check_keys({**sections, **targets}, cfg)
    for word in overrides:
        given: Any = None
        path = word.partition("=")[0].split(".")
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
        # With ++, keys may be new to the tree: those of mappings, and of sections such as peft that Bridge leaves out.
        tree = host.parse_hydra_overrides(OmegaConf.merge(tree, sections), [f"++{word}" for word in overrides])
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
        raise ValueError("; ".join(warnings.lines))


def _targets(sections: Mapping[str, Any], overrides: list[str]) -> dict[str, dict[str, str]]:
    """Sections that name their class, each with nothing but `_target_`."""
    targets = {
        name: section["_target_"]
        for name, section in sections.items()
        if isinstance(section, Mapping) and "_target_" in section
    }
    for word in overrides:
        key, _, value = word.partition("=")
        name, _, rest = key.partition(".")
        if rest == "_target_":
            targets[name] = value
    return {name: {"_target_": target} for name, target in targets.items()}


def _class_of(section: Any) -> str:
    return f"{type(section).__module__}.{type(section).__qualname__}"


def check_keys(given: Mapping[str, Any], settings: Any, path: str = "") -> None:
    """Refuse keys that a tree of dataclasses does not have, and mappings where it has no section to put them in."""
    types = {f.name: str(f.type) for f in dataclasses.fields(settings) if not f.name.startswith("_")}
    for key, value in given.items():
        # Bridge's newer model configurations answer for the fields of the configuration inside, too.
        if key not in types and (not hasattr(settings, key) or hasattr(type(settings), key)):
            raise ValueError(
                f"{path}{key}: expected a setting of {type(settings).__name__}, got one that it does not have"
                f"{nearest(key, types)}"
            )
        if not isinstance(value, Mapping) or "_target_" in value:
            continue
        current = getattr(settings, key)
        if dataclasses.is_dataclass(current):
            check_keys(value, current, f"{path}{key}.")
        elif not isinstance(current, Mapping) and not re.search("dict|Mapping|Any", types.get(key, "Any"), re.I):
            raise ValueError(
                f"{path}{key}: expected a recipe with that section, or the name of its class as `_target_:` in the "
                f"section, got a section where the recipe has {current!r}"
            )


class _Warnings(logging.Handler):
    """Collects what a logger warns of."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("megatron_dft.bridge", allow_abbrev=False, add_help=False)
    parser.add_argument("--recipe")
    parser.add_argument("--config-file")
    parser.add_argument("--step", default="gpt_step")
    parser.add_argument("--device", default="cuda", choices=cpu.DEVICES)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("overrides", nargs="*")
    return parser


if __name__ == "__main__":
    main(sys.argv[1:])
