"""The settings of a run. Command-line flags and YAML keys are generated from the fields of `DFTConfig`.

Python          DFTConfig(loss_type="tsallis:q=0.5", mtp="same")
command line    --loss-type tsallis:q=0.5 --dft-mtp same
YAML            dft: {loss_type: "tsallis:q=0.5", mtp: same}
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

from torch.distributed import ProcessGroup

from megatron_dft.labels import REDUCTIONS
from megatron_dft.metrics import LEVELS, MetricSpec, channel_names
from megatron_dft.ops.linear_fused import TOKEN_CHUNK, VOCAB_CHUNK, Split
from megatron_dft.ops.objectives import OBJECTIVES, Objective, parse_objective
from megatron_dft.ops.stats import REFERENCE
from megatron_dft.ops.vocab_parallel import BACKENDS, LossOptions
from megatron_dft.utils import nearest

STOCK = "ce"


def _setting(default: object, kind: type, help: str, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"default": default, "kind": kind, "help": help, "choices": choices})


@dataclass(frozen=True)
class DFTConfig:
    """Configuration of the objective, its kernels and its metrics. One flag and one YAML key per field.

    Raises ValueError for an invalid value or an invalid combination.
    """

    loss_type: str = _setting(
        STOCK,
        str,
        f"Training objective: {STOCK} is Megatron's own cross entropy; otherwise one of {', '.join(OBJECTIVES)}, with "
        "parameters as in tsallis:q=0.5 or threshold:lo=0.1,base=prob. dft:start=1000,ramp=500 is nll for 1000 "
        "iterations, then a blend into dft over 500.",
    )
    mtp: str = _setting(
        "nll", str, "Loss of multi-token-prediction heads: Megatron's nll, or same (the objective).", ("nll", "same")
    )
    true_vocab_size: int | None = _setting(
        None, int, "Exclude padding columns, from this id on, from the softmax. Default: include them."
    )
    backend: str = _setting(
        "auto", str, "Implementation: triton, torch, or auto (Triton on GPUs, PyTorch elsewhere).", BACKENDS
    )
    inplace_backward: bool = _setting(
        True, bool, "Write the gradient over the logits, which saves a buffer of their size."
    )
    compact_masked_tokens: bool | None = _setting(
        None,
        bool,
        "Remove masked tokens before the output layer. Default: yes, if the hidden states of the model are accessible "
        "and no CUDA graph captures the loss. The choice is logged.",
    )
    linear_fused: bool = _setting(
        False,
        bool,
        "Fuse output layer and loss in chunks of the vocabulary, or of tokens: the logits are never materialized.",
    )
    vocab_chunk: int | None = _setting(None, int, f"Columns per chunk of linear_fused. Default: {VOCAB_CHUNK}.")
    keep_chunks: int = _setting(
        0, int, "Chunks of linear_fused that keep their logits for backward and are not recomputed."
    )
    token_chunk: int | None = _setting(
        None,
        int,
        f"Tokens per chunk of linear_fused, e.g. {TOKEN_CHUNK}: chunks of tokens instead of the vocabulary, with the "
        "gradient computed in forward. Requires --calculate-per-token-loss.",
    )
    weights: bool = _setting(
        False, bool, "Multiply the gradient of each token by its weight in the data. Metrics stay unweighted."
    )
    reduction: str = _setting(
        "token",
        str,
        "What the gradient is a mean of. token: tokens. sample: conversations, each the mean of its tokens. "
        "square-root: tokens weighted by 1/sqrt(trained tokens of their conversation). Metrics stay means over tokens.",
        REDUCTIONS,
    )
    metrics: str = _setting(
        "basic", str, "Metrics: full adds entropy, collision, and histograms of probability and gradient.", LEVELS
    )
    channels: str | None = _setting(
        None, str, "Comma-separated data sources (`channel` of a data record), e.g. maths,code. Adds metrics for each."
    )
    callback: str | None = _setting(
        None, str, "Function, as module:function, called with the TokenBatch of each micro-batch."
    )

    def __post_init__(self) -> None:
        for f in fields(self):
            _check_setting(f.name, getattr(self, f.name), f.metadata)
        given = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
        if given and not self.enabled:
            raise ValueError(_requires(given, "loss_type") + "; nll is the plain cross entropy")
        by_vocabulary = [name for name in given if name in ("vocab_chunk", "keep_chunks")]
        chunks = by_vocabulary + ["token_chunk"] * (self.token_chunk is not None)
        if chunks and not self.linear_fused:
            raise ValueError(_requires(chunks, "linear_fused"))
        if by_vocabulary and self.token_chunk is not None:
            raise ValueError(
                "token_chunk (--dft-token-chunk) selects chunks of tokens; vocab_chunk and keep_chunks select chunks "
                "of the vocabulary: give one kind"
            )
        if self.enabled:
            self.options()
            self.split()
            channel_names(self.channels)
            if self.token_chunk is not None and not self.objective.per_token:
                raise ValueError(
                    f"token_chunk (--dft-token-chunk) computes the gradient in forward, but {self.objective} depends "
                    "on all tokens of a batch; omit it"
                )
            if self.mtp == "same" and self.of_reference:
                raise ValueError(
                    f"mtp (--dft-mtp same): multi-token prediction has no reference log-probabilities for "
                    f"{self.loss_type}; use --dft-mtp nll"
                )

    @property
    def enabled(self) -> bool:
        """Whether an objective is configured. If not, Megatron is not modified."""
        return self.loss_type != STOCK

    @cached_property
    def objective(self) -> Objective:
        """The parsed `loss_type`."""
        return parse_objective(self.loss_type)

    @property
    def of_reference(self) -> bool:
        """Whether the objective needs reference log-probabilities, which labels carry."""
        return self.enabled and REFERENCE in self.objective.needs

    @property
    def weighted(self) -> bool:
        """Whether labels carry weights."""
        return self.weights or self.by_conversation

    @property
    def by_conversation(self) -> bool:
        """Whether the gradient is another mean than over tokens; labels then carry weights and counts."""
        return self.reduction != REDUCTIONS[0]

    @cached_property
    def metric_spec(self) -> MetricSpec:
        """The configured metrics beyond those of every run."""
        return MetricSpec(self.metrics == "full", channel_names(self.channels))

    def options(self, tp_group: ProcessGroup | None = None, batch_group: ProcessGroup | None = None) -> LossOptions:
        """Options of a host: forward returns the NLL, backward the gradient of the objective."""
        return LossOptions(
            objective=self.objective,
            tp_group=tp_group,
            batch_group=batch_group,
            return_nll=True,
            true_vocab_size=self.true_vocab_size,
            backend=self.backend,
            inplace_backward=self.inplace_backward,
            statistics=self.metric_spec.needs,
        )

    def split(self) -> Split:
        """The chunks of linear_fused."""
        return Split(
            vocab_chunk=VOCAB_CHUNK if self.vocab_chunk is None else self.vocab_chunk,
            keep_chunks=self.keep_chunks,
            token_chunk=TOKEN_CHUNK if self.token_chunk is None else self.token_chunk,
        )

    @classmethod
    def from_mapping(cls, block: Mapping[str, Any]) -> DFTConfig:
        """From a YAML `dft:` block. Raises ValueError for an unknown key, with the nearest known one."""
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
            if not f.metadata["choices"]:
                kind["metavar"] = f.name.upper()
            if f.metadata["kind"] is bool:
                kind = {"action": argparse.BooleanOptionalAction}
            group.add_argument(_flag(f.name), dest=_dest(f.name), default=f.default, help=f.metadata["help"], **kind)
        return parser

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> DFTConfig:
        """From parsed flags. Fields that are not in the namespace keep their defaults."""
        values: dict[str, Any] = {f.name: getattr(args, _dest(f.name), f.default) for f in fields(cls)}
        return cls(**values)


def _requires(names: Sequence[str], required: str) -> str:
    """For example: --dft-token-chunk (token_chunk) requires --dft-linear-fused (linear_fused)."""
    verb = "requires" if len(names) == 1 else "require"
    return f"{', '.join(map(_flag, names))} ({', '.join(names)}) {verb} {_flag(required)} ({required})"


def _flag(name: str) -> str:
    return "--" + _dest(name).replace("_", "-")


def _dest(name: str) -> str:
    return name if name == "loss_type" else f"dft_{name}"


def _check_setting(name: str, value: Any, metadata: Mapping[str, Any]) -> None:
    kind, choices = metadata["kind"], metadata["choices"]
    absent = value is None and metadata["default"] is None
    if not absent and type(value) is not kind:
        raise ValueError(f"dft: {name}: expected {kind.__name__}, got {value!r}")
    if choices and value not in choices:
        raise ValueError(f"dft: {name}: expected one of {', '.join(choices)}, got {value!r}")
