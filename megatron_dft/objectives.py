"""The family: token-level SFT objectives whose gradient is gate x (softmax - onehot).

For a token with target probability p, l = -log p, every loss L here has

    dL/dlogits = w (softmax - onehot(y)),        w = -dL/dlog p  >= 0, every statistic in w detached.

So an objective is a pure function on vectors of length [tokens]: statistics in, (loss, gate w) out. It knows no
kernels and no ranks, and work the size of the vocabulary never depends on it. Two shapes cover nearly all:

    Reweighted   L = sg(w) l                 a detached weight on the cross entropy: dft, mix, focal, chord, entropy
    Power        L = (1 - p^a) / a, w = p^a  Box-Cox between nll (a -> 0) and prob (a = 1): tsallis, deft, cayley

A `Scheduled` objective starts as nll and blends into another one while training goes on: "dft:start=1000,ramp=500".

Values are in nats and defined everywhere: at p = 0 (a target logit of -inf) a weight of 0 makes a loss of 0, and a
NaN in the statistics stays a NaN of its own token. Label smoothing is not part of the family.

Sources: DFT arXiv:2508.05629; DEFT arXiv:2602.11424; BLL, "Beyond Log-Likelihood" (arXiv:2510.00526); CHORD
arXiv:2508.11408; LUFFY arXiv:2504.14945; focal loss arXiv:1708.02002.
"""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from megatron_dft.stats import COLLISION, ENTROPY, TokenStats

CPU = torch.device("cpu")
FP32 = torch.finfo(torch.float32)  # the kernels compute in it; a parameter beyond its range would be 0 or inf there
SCHEDULE = {"start": int, "ramp": int}  # parameters of every objective


@dataclass(frozen=True)
class Objective:
    """One member of the family: call it on `TokenStats` to get (loss, gate), both [...]."""

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()  # statistics beyond the target's log-probability
    by_value: ClassVar[bool] = False  # whether its fields, numbers and strings, say all: not of a class of the user's

    def __call__(self, stats: TokenStats) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def begin(self, iteration: int) -> None:
        """Told by a host before each training iteration 1, 2, ...; only a `Scheduled` objective listens."""

    def __init_subclass__(cls) -> None:
        if "by_value" not in vars(cls):
            cls.by_value = cls.__module__ == __name__

    def __new__(cls, *args: Any, **kwargs: Any) -> Objective:
        self = super().__new__(cls)
        object.__setattr__(self, "serial", next(_SERIALS))
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Without the serial number: a copy gets its own."""
        return {name: value for name, value in vars(self).items() if name != "serial"}

    # Methods, because Dynamo of torch 2.6 to 2.11 does not accept a frozen dataclass as an argument.
    @torch.compiler.assume_constant_result
    def graph_name(self) -> str:
        """The string by which a compiled graph, which holds no objects, finds this objective; see `of_graph_name`.

        Equal objectives share a name if they are `by_value`.
        """
        for name, known in _OF_GRAPHS.items():
            if known is self or (self.by_value and known == self):
                return name
        name = f"{self} #{len(_OF_GRAPHS)}"
        _OF_GRAPHS[name] = self
        return name

    @torch.compiler.assume_constant_result
    def graph_value(self, field: str) -> str:
        """A parameter as a constant of a compiled graph."""
        return str(getattr(self, field))

    def __str__(self) -> str:
        """The specification that `parse_objective` reads back."""
        parameters = ",".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self))
        return f"{self.name}:{parameters}" if parameters else self.name

    def _require(self, condition: bool, expected: str) -> None:
        if not condition:
            raise ValueError(f"objective {self.name!r}: expected {expected}, got {str(self)!r}")


_SERIALS = itertools.count()
_OF_GRAPHS: dict[str, Objective] = {}  # objectives in the compiled graphs of this process, by graph_name


def of_graph_name(name: str) -> Objective:
    """The objective of a `graph_name`, or of a specification."""
    return _OF_GRAPHS.get(name) or parse_objective(name)


class Reweighted(Objective):
    """L = sg(w) l with a detached weight w, which is the gate."""

    def weight(self, stats: TokenStats) -> Tensor:
        raise NotImplementedError

    def __call__(self, stats: TokenStats) -> tuple[Tensor, Tensor]:
        gate = self.weight(stats)
        return torch.where(gate == 0.0, 0.0, gate * stats.nll), gate  # 0 * inf is 0 here


class Power(Objective):
    """L = (1 - p^a) / a, which tends to l for a -> 0; gate p^a."""

    def exponent(self, stats: TokenStats) -> float | Tensor:
        raise NotImplementedError

    def __call__(self, stats: TokenStats) -> tuple[Tensor, Tensor]:
        a = self.exponent(stats)
        if not isinstance(a, Tensor) and a < FP32.tiny:
            return stats.nll, torch.ones_like(stats.nll)
        # expm1 keeps the digits of 1 - p^a when p is near 1 or a is small.
        return -torch.expm1(a * stats.logprob) / a, torch.exp(a * stats.logprob)


@dataclass(frozen=True)
class NLL(Reweighted):
    """Cross entropy: L = l, gate 1."""

    name = "nll"

    def weight(self, stats: TokenStats) -> Tensor:
        return torch.ones_like(stats.logprob)


@dataclass(frozen=True)
class DFT(Reweighted):
    """Dynamic Fine-Tuning: L = sg(p) l, gate p. arXiv:2508.05629. The value peaks at 1/e for p = 1/e."""

    name = "dft"

    def weight(self, stats: TokenStats) -> Tensor:
        return stats.prob


@dataclass(frozen=True)
class Prob(Power):
    """L = 1 - p, gate p: the gradient of dft, with a value that never rises while p rises. BLL, `p`."""

    name = "prob"

    def exponent(self, stats: TokenStats) -> float:
        return 1.0


@dataclass(frozen=True)
class Tsallis(Power):
    """L = (1 - p^q) / q, gate p^q; q = 0 is nll, q = 1 is prob. BLL, general family; DEFT, where q is fixed."""

    name = "tsallis"
    q: float = 0.5

    def __post_init__(self) -> None:
        self._require(0.0 <= self.q <= FP32.max, "0 <= q <= 3e38")

    def exponent(self, stats: TokenStats) -> float:
        return self.q


@dataclass(frozen=True)
class Threshold(Objective):
    """The base objective (nll or prob) on tokens with lo <= p <= hi, nothing on the others.

    BLL, OnlyTopP / OnlyBottomP (base=prob) and OnlyTopLogP / OnlyBottomLogP (base=nll); ProFiT is lo=0.1.
    """

    name = "threshold"
    lo: float = 0.1
    hi: float = 1.0
    base: str = "nll"

    def __post_init__(self) -> None:
        self._require(0.0 <= self.lo <= self.hi <= 1.0, "0 <= lo <= hi <= 1")
        self._require(self.base in ("nll", "prob"), "base=nll or base=prob")

    def __call__(self, stats: TokenStats) -> tuple[Tensor, Tensor]:
        loss, gate = OBJECTIVES[self.base]()(stats)
        outside = (stats.prob < self.lo) | (stats.prob > self.hi)  # false for NaN, which must stay visible
        return loss.masked_fill(outside, 0.0), gate.masked_fill(outside, 0.0)


@dataclass(frozen=True)
class Cayley(Power):
    """L = (1 - p^a) / a with a = clamp(f + (1-f) p/(2-p), 1e-3, 1) detached, f = floor * mean p; gate p^a.

    DEFT repository, Cayley transform. The mean runs over the valid tokens of this rank's micro-batch, as it does
    there: it is the same on all tensor-parallel ranks, and differs between context- and data-parallel ones.
    """

    name = "cayley"
    floor: float = 0.5

    def __post_init__(self) -> None:
        self._require(0.0 <= self.floor <= 1.0, "0 <= floor <= 1")

    def exponent(self, stats: TokenStats) -> Tensor:
        p = stats.prob
        counted = stats.valid & p.isfinite()
        f = self.floor * p.masked_fill(~counted, 0.0).sum() / counted.sum().clamp(min=1)
        return (f + (1.0 - f) * p / (2.0 - p)).clamp(1e-3, 1.0)


@dataclass(frozen=True)
class DEFT(Power):
    """L = (1 - p^C) / C with the collision probability C detached; gate p^C. arXiv:2602.11424.

    Confident predictions (C near 1) are trained like prob, diffuse ones (C near 0) like nll.
    """

    name = "deft"
    needs = frozenset({COLLISION})

    def exponent(self, stats: TokenStats) -> Tensor:
        assert stats.collision is not None
        # Ignored tokens carry C = 0; a vocabulary of V tokens has C >= 1/V.
        return stats.collision.clamp(min=torch.finfo(stats.collision.dtype).tiny)


@dataclass(frozen=True)
class Entropy(Reweighted):
    """L = sg(g(H)) l, gate g(H), from the entropy H of the prediction.

    The strategy is named upstream without a formula, so the choice is explicit:
    form=ratio g = H / ln V (uncertain tokens count); form=complement g = 1 - H / ln V (confident ones count);
    form=exponential g = e^-H, the inverse of the effective number of choices.
    """

    name = "entropy"
    needs = frozenset({ENTROPY})
    form: str = "ratio"

    def __post_init__(self) -> None:
        self._require(self.form in ("ratio", "complement", "exponential"), "form=ratio, complement or exponential")

    def weight(self, stats: TokenStats) -> Tensor:
        assert stats.entropy is not None and stats.vocab_size is not None
        if self.form == "exponential":
            return torch.exp(-stats.entropy)
        ratio = (stats.entropy / math.log(max(stats.vocab_size, 2))).clamp(max=1.0)
        return ratio if self.form == "ratio" else 1.0 - ratio


@dataclass(frozen=True)
class Mix(Reweighted):
    """L = sg(alpha p + 1 - alpha) l: alpha = 0 is nll, alpha = 1 is dft."""

    name = "mix"
    alpha: float = 0.5

    def __post_init__(self) -> None:
        self._require(0.0 <= self.alpha <= 1.0, "0 <= alpha <= 1")

    def weight(self, stats: TokenStats) -> Tensor:
        return self.alpha * stats.prob + (1.0 - self.alpha)


@dataclass(frozen=True)
class Focal(Reweighted):
    """L = sg((1-p)^gamma) l: dft's opposite, rare targets count. arXiv:1708.02002 with the factor detached."""

    name = "focal"
    gamma: float = 2.0

    def __post_init__(self) -> None:
        self._require(0.0 <= self.gamma <= FP32.max, "0 <= gamma <= 3e38")

    def weight(self, stats: TokenStats) -> Tensor:
        return (-torch.expm1(stats.logprob)) ** self.gamma


@dataclass(frozen=True)
class Chord(Reweighted):
    """L = sg(p (1-p)) l: neither what is known nor what is hopeless. CHORD's phi, arXiv:2508.11408."""

    name = "chord"

    def weight(self, stats: TokenStats) -> Tensor:
        return stats.prob * -torch.expm1(stats.logprob)


@dataclass(frozen=True)
class Luffy(Objective):
    """L = 1 - p/(p+gamma), gate gamma p / (p+gamma)^2: policy shaping with its peak at p = gamma. arXiv:2504.14945."""

    name = "luffy"
    gamma: float = 0.1

    def __post_init__(self) -> None:
        self._require(1e-9 <= self.gamma <= 1e9, "1e-9 <= gamma <= 1e9")  # its square is in fp32's range

    def __call__(self, stats: TokenStats) -> tuple[Tensor, Tensor]:
        shifted = stats.prob + self.gamma
        return self.gamma / shifted, self.gamma * stats.prob / shifted.square()


@dataclass(frozen=True)
class Scheduled(Objective):
    """nll for `start` iterations, then over `ramp` more a linear blend into `then`, which stays.

        L = (1-b) l + b L_then,   w = (1-b) + b w_then,   b = (iteration - start) / ramp within [0, 1]

    With dft it is mix with a growing alpha. b is a tensor on the device, not a Python number, so that a captured graph
    sees it move; it depends on the iteration alone, so it is the same on all ranks and after a restart.
    """

    then: Objective
    start: int = 0
    ramp: int = 0
    by_value: ClassVar[bool] = False  # it has the state of its run
    _blend: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._require(self.start >= 0 and self.ramp >= 0, "start >= 0 and ramp >= 0")

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.then.name

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return self.then.needs

    def begin(self, iteration: int) -> None:
        blend = min(max((iteration - self.start) / max(self.ramp, 1), 0.0), 1.0)
        self._blend.setdefault(CPU, torch.zeros((), dtype=torch.float64))
        for copy in self._blend.values():
            copy.fill_(blend)

    def blend(self, device: torch.device) -> Tensor:
        """b as a tensor without dimensions. Raises ValueError before the first iteration was begun."""
        if CPU not in self._blend:
            raise ValueError(
                f"objective {str(self)!r}: expected begin(iteration) before the first loss, which Megatron's "
                "pretrain() does through our hook; call it in your own training loop, or drop start= and ramp="
            )
        if device not in self._blend:
            self._blend[device] = self._blend[CPU].to(device)
        return self._blend[device]

    def __call__(self, stats: TokenStats) -> tuple[Tensor, Tensor]:
        blend = self.blend(stats.logprob.device)
        loss, gate = self.then(stats)
        return _share(1.0 - blend, stats.nll) + _share(blend, loss), (1.0 - blend) + _share(blend, gate)

    def __str__(self) -> str:
        separator = "," if ":" in str(self.then) else ":"
        return f"{self.then}{separator}start={self.start},ramp={self.ramp}"


def _share(part: Tensor, x: Tensor) -> Tensor:
    """part * x, and 0 of anything is 0."""
    return torch.where(part == 0.0, 0.0, part * x)


OBJECTIVES: dict[str, type[Objective]] = {
    objective.name: objective
    for objective in (NLL, DFT, Prob, Tsallis, Threshold, Cayley, DEFT, Entropy, Mix, Focal, Chord, Luffy)
}


def loss_and_gate(objective: Objective, stats: TokenStats) -> tuple[Tensor, Tensor]:
    """The objective's, 0 where a token is not valid; a NaN loss has a NaN gate, even if the gate is a constant."""
    loss, gate = objective(stats)
    gate = gate.masked_fill(stats.logprob.isnan(), torch.nan)
    return loss.masked_fill(~stats.valid, 0.0), gate.masked_fill(~stats.valid, 0.0)


def parse_objective(specification: str | Objective) -> Objective:
    """Read "dft", "threshold:lo=0.1,base=prob" or "dft:start=1000,ramp=500"; an Objective is returned as it is.

    Raises ValueError for an unknown name or parameter and for a value that is out of range.
    """
    if isinstance(specification, Objective):
        return specification
    name, _, parameters = str(specification).partition(":")
    if name not in OBJECTIVES:
        raise ValueError(
            f"unknown objective {name!r}: expected one of {', '.join(OBJECTIVES)}{nearest(name, OBJECTIVES)}"
        )
    cls = OBJECTIVES[name]
    kinds: dict[str, Any] = {f.name: type(f.default) for f in fields(cls)} | SCHEDULE
    values: dict[str, Any] = {}
    for item in filter(None, parameters.split(",")):
        key, equals, value = item.partition("=")
        if not equals or key not in kinds:
            known = ", ".join(f"{k}=" for k in kinds)
            raise ValueError(
                f"objective {name!r}: expected {known}, got {item!r} in {specification!r}{nearest(key, kinds)}"
            )
        if key in values:
            raise ValueError(f"objective {name!r}: {key}= is given twice in {specification!r}; give it once")
        try:
            values[key] = kinds[key](value)
        except ValueError:
            kind = "a whole number" if kinds[key] is int else "a number"
            raise ValueError(f"objective {name!r}: expected {kind} for {key}=, got {value!r}") from None
    schedule = {key: values.pop(key) for key in SCHEDULE if key in values}
    return Scheduled(cls(**values), **schedule) if schedule else cls(**values)


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of an error message: what the user may have meant."""
    match = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {match[0]!r}?" if match else ""
