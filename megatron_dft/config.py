"""One typed description of a DFT run. The command-line flags and the YAML block are generated from its fields.

Python          DFTConfig(loss_type="tsallis:q=0.5", mtp="same")
command line    --loss-type tsallis:q=0.5 --loss-mtp same
YAML            dft: {loss_type: "tsallis:q=0.5", mtp: same}
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

from torch.distributed import ProcessGroup

from megatron_dft.autograd import BACKENDS, LossOptions
from megatron_dft.channels import channel_names
from megatron_dft.linear import VOCAB_CHUNK, Split
from megatron_dft.metrics import LEVELS, Detail
from megatron_dft.objectives import OBJECTIVES, Objective, nearest, parse_objective

STOCK = "ce"


def _setting(default: object, kind: type, help: str, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"default": default, "kind": kind, "help": help, "choices": choices})


@dataclass(frozen=True)
class DFTConfig:
    """How the loss of a Megatron run is computed. Raises ValueError for a value that is not possible."""

    loss_type: str = _setting(
        STOCK,
        str,
        f"Token-level training objective: {STOCK} leaves Megatron's own cross entropy untouched; otherwise one of "
        f"{', '.join(OBJECTIVES)}, with parameters as in tsallis:q=0.5 or threshold:lo=0.1,base=prob. "
        "dft:start=1000,ramp=500 is nll for 1000 iterations, then blends into dft over 500.",
    )
    mtp: str = _setting(
        "nll", str, "Loss of multi-token-prediction heads: Megatron's own, or the same.", ("nll", "same")
    )
    true_vocab_size: int | None = _setting(
        None, int, "Leave padding columns, from this id on, out of the softmax. Default: keep them, as Megatron does."
    )
    backend: str = _setting(
        "auto", str, "Implementation: triton, torch, or auto for Triton on GPUs and PyTorch elsewhere.", BACKENDS
    )
    inplace_backward: bool = _setting(
        True, bool, "Write the gradient over the logits, which saves a buffer of their size."
    )
    compact_masked_tokens: bool | None = _setting(
        None,
        bool,
        "Drop masked tokens before the output layer. Default: yes, where the model lets us reach its hidden states and "
        "no CUDA graph captures the loss; the log says so.",
    )
    linear_fused: bool = _setting(
        False, bool, "Compute the output layer in chunks of the vocabulary, together with the loss: less memory."
    )
    vocab_chunk: int | None = _setting(None, int, f"Columns of a chunk under linear_fused. Default: {VOCAB_CHUNK}.")
    keep_chunks: int = _setting(
        0, int, "How many chunks keep their logits under linear_fused, and are not computed again in backward."
    )
    metrics: str = _setting(
        "basic", str, "What is reported: full adds entropy, collision and histograms of probability.", LEVELS
    )
    channels: str | None = _setting(
        None, str, "Report these data sources or domains one by one, as in maths,code; the `channel` of each data line."
    )
    callback: str | None = _setting(
        None, str, "A function, as module:function, that is called with the tokens of each micro-batch (TokenBatch)."
    )

    def __post_init__(self) -> None:
        for f in fields(self):
            _check_setting(f.name, getattr(self, f.name), f.metadata)
        if (self.vocab_chunk is not None or self.keep_chunks) and not self.linear_fused:
            raise ValueError("dft: vocab_chunk, keep_chunks: expected them with linear_fused, got them without")
        given = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
        if given and not self.enabled:
            raise ValueError(
                f"dft: {', '.join(given)}: expected an objective beside it, got none; add --loss-type "
                "(--loss-type nll is the plain cross entropy)"
            )
        if self.enabled:
            self.options()
            self.split()
            channel_names(self.channels)

    @property
    def enabled(self) -> bool:
        """Whether anything is changed at all."""
        return self.loss_type != STOCK

    @cached_property
    def objective(self) -> Objective:
        """One object for the loss and the report of a run, because a scheduled objective has the state of its run."""
        return parse_objective(self.loss_type)

    @cached_property
    def detail(self) -> Detail:
        """What is reported beyond the metrics that every run has."""
        return Detail(self.metrics == "full", channel_names(self.channels))

    def options(self, tp_group: ProcessGroup | None = None) -> LossOptions:
        """For a host: report the NLL, send back the gradient of the objective."""
        return LossOptions(
            objective=self.objective,
            tp_group=tp_group,
            value="nll",
            true_vocab_size=self.true_vocab_size,
            backend=self.backend,
            inplace_backward=self.inplace_backward,
            statistics=self.detail.needs,
        )

    def split(self) -> Split:
        """How the output layer is cut under linear_fused."""
        return Split(VOCAB_CHUNK if self.vocab_chunk is None else self.vocab_chunk, self.keep_chunks)

    @classmethod
    def from_mapping(cls, block: Mapping[str, Any]) -> DFTConfig:
        """From a YAML `dft:` block. Raises ValueError for a key that does not exist, with the nearest one."""
        known = {f.name for f in fields(cls)}
        for key in block:
            if key not in known:
                raise ValueError(f"dft: expected one of {', '.join(sorted(known))}, got {key!r}{nearest(key, known)}")
        return cls(**block)

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        """Add one flag per field; returns the parser, as Megatron's argument providers do."""
        group = parser.add_argument_group("megatron_dft")
        for f in fields(cls):
            kind: dict[str, Any] = {"type": f.metadata["kind"], "choices": f.metadata["choices"]}
            if f.metadata["kind"] is bool:
                kind = {"action": argparse.BooleanOptionalAction}
            group.add_argument(_flag(f.name), dest=_dest(f.name), default=f.default, help=f.metadata["help"], **kind)
        return parser

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> DFTConfig:
        """From parsed flags; fields that the namespace lacks keep their defaults."""
        values: dict[str, Any] = {f.name: getattr(args, _dest(f.name), f.default) for f in fields(cls)}
        return cls(**values)


def load_function(path: str, option: str) -> Callable[..., Any]:
    """What "module:function" names. Raises ValueError if there is none; `option` is where the name was given."""
    module_name, _, function = path.rpartition(":")
    try:
        module = importlib.import_module(module_name)
    except (ModuleNotFoundError, ValueError) as error:
        if isinstance(error, ModuleNotFoundError) and not f"{module_name}.".startswith(f"{error.name}."):
            raise  # something that the module needs
        raise ValueError(
            f"{option}: expected module:function of an installed module, got {path!r} ({error}); check the name, or "
            "install what it belongs to"
        ) from None
    if not callable(getattr(module, function, None)):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ValueError(f"{option}: {module.__name__} has no function {function!r}{nearest(function, known)}")
    return getattr(module, function)


def _flag(name: str) -> str:
    return "--" + _dest(name).replace("_", "-")


def _dest(name: str) -> str:
    return name if name.startswith("loss_") else f"loss_{name}"


def _check_setting(name: str, value: Any, metadata: Mapping[str, Any]) -> None:
    kind, choices = metadata["kind"], metadata["choices"]
    absent = value is None and metadata["default"] is None
    if not absent and type(value) is not kind:
        raise ValueError(f"dft: {name}: expected {kind.__name__}, got {value!r}")
    if choices and value not in choices:
        raise ValueError(f"dft: {name}: expected one of {', '.join(choices)}, got {value!r}")
