"""Token-level SFT objectives whose gradient is gate x (softmax - onehot).

For a token with target probability p and cross entropy l = -log p, every loss L here has

    dL/dlogits = w (softmax - onehot(y)),        w = -dL/dlog p, with every statistic in w detached.

w >= 0, except for `asft`.

An objective is a stateless function of per-token statistics [tokens] that returns (loss, gate w). It is independent of
kernels and ranks. Two forms cover nearly all objectives:

    Reweighted   L = sg(w) l                 cross entropy with a detached weight: dft, mix, focal, chord, entropy, eaft
    Power        L = (1 - p^a) / a, w = p^a  Box-Cox from nll (a -> 0) to prob (a = 1): tsallis, deft, cayley

asft, iw and psft depend on r = p / p_ref, with the probability p_ref of the target under a reference model
(reference.py).

A `Scheduled` objective starts as nll and is blended into another one during training: "dft:start=1000,ramp=500".

Values are in nats and defined everywhere: at p = 0 (a target logit of -inf) a weight of 0 gives a loss of 0. A NaN in
the statistics stays with its token. Label smoothing is not supported: a smoothed target has no single probability.

Sources: DFT arXiv:2508.05629; DEFT arXiv:2602.11424; BLL, "Beyond Log-Likelihood", arXiv:2510.00526; CHORD
arXiv:2508.11408; LUFFY arXiv:2504.14945; focal loss arXiv:1708.02002; EAFT arXiv:2601.02151; TrSFT arXiv:2512.17636;
TALR arXiv:2509.20758; ASFT arXiv:2509.23753; iw-SFT arXiv:2507.12856; PSFT arXiv:2508.17784.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from megatron_dft.ops.stats import COLLISION, ENTROPY, MEDIAN, REFERENCE, TokenStats, top_k_need
from megatron_dft.utils import nearest

FP32 = torch.finfo(torch.float32)  # kernels compute in fp32, where a parameter beyond its range is 0 or inf
SCHEDULE = {"start": int, "ramp": int}  # parameters of every objective


@dataclass(frozen=True)
class Objective:
    """A token-level objective: `objective(stats)` returns (loss, gate), both [...]."""

    name: ClassVar[str]
    formula: ClassVar[tuple[str, str]] = ("", "")  # loss and gate, for tables
    needs: ClassVar[frozenset[str]] = frozenset()  # statistics beyond the target's log-probability
    by_value: ClassVar[bool] = False  # whether objectives with equal fields are equal; False for classes of the user
    per_token: ClassVar[bool] = False  # whether loss and gate of a token depend on that token alone; likewise

    def __call__(self, stats: TokenStats) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def __init_subclass__(cls) -> None:
        of_this_module = cls.__module__ == __name__
        if "by_value" not in vars(cls):
            cls.by_value = of_this_module
        if "per_token" not in vars(cls):
            cls.per_token = of_this_module

    def __new__(cls, *args: Any, **kwargs: Any) -> Objective:
        self = super().__new__(cls)
        object.__setattr__(self, "serial", next(_SERIALS))
        return self

    def __getstate__(self) -> dict[str, Any]:
        """State for copies and pickles, without the serial number: each copy gets its own."""
        return {name: value for name, value in vars(self).items() if name != "serial"}

    # Methods, because Dynamo of torch 2.6 to 2.11 does not accept a frozen dataclass as an argument.
    @torch.compiler.assume_constant_result
    def graph_name(self) -> str:
        """The name of this objective in compiled graphs; see `of_graph_name`. Equal `by_value` objectives share it."""
        for name, known in _OF_GRAPHS.items():
            if known is self or (self.by_value and known == self):
                return name
        name = f"{self} #{len(_OF_GRAPHS)}"
        _OF_GRAPHS[name] = self
        return name

    @torch.compiler.assume_constant_result
    def graph_value(self, field: str) -> str:
        """A parameter, as a constant of a compiled graph."""
        return str(getattr(self, field))

    def __str__(self) -> str:
        """The specification, as `parse_objective` reads it."""
        parameters = ",".join(f"{key}={getattr(self, name)}" for key, name in self.parameters().items())
        return f"{self.name}:{parameters}" if parameters else self.name

    @classmethod
    def parameters(cls) -> dict[str, str]:
        """Field by key of a specification. They differ for keywords of Python: `lambda` is `lambda_`."""
        return {f.name.rstrip("_"): f.name for f in fields(cls)}  # type: ignore[arg-type]

    def clipped(self, stats: TokenStats) -> Tensor | None:
        """Tokens [...] whose ratio r is outside the limits of the objective; None: it has no limits."""
        return None

    def _require(self, condition: bool, expected: str) -> None:
        if not condition:
            raise ValueError(f"objective {self.name!r}: expected {expected}, got {str(self)!r}")


_SERIALS = itertools.count()
_OF_GRAPHS: dict[str, Objective] = {}  # objectives in the compiled graphs of this process, by graph_name


def of_graph_name(name: str) -> Objective:
    """The objective with a `graph_name` or a specification."""
    return _OF_GRAPHS.get(name) or parse_objective(name)


class Reweighted(Objective):
    """L = sg(w) l. The gate is the weight w."""

    def weight(self, stats: TokenStats) -> Tensor:
        raise NotImplementedError

    def __call__(self, stats: TokenStats) -> tuple[Tensor, Tensor]:
        gate = self.weight(stats)
        return torch.where(gate == 0.0, 0.0, gate * stats.nll), gate  # 0 * inf is 0 here


class Power(Objective):
    """L = (1 - p^a) / a, gate p^a. Tends to l for a -> 0."""

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
    formula = ("l", "1")

    def weight(self, stats: TokenStats) -> Tensor:
        return torch.ones_like(stats.logprob)


@dataclass(frozen=True)
class DFT(Reweighted):
    """Dynamic Fine-Tuning: L = sg(p) l, gate p. arXiv:2508.05629. The value has its maximum, 1/e, at p = 1/e."""

    name = "dft"
    formula = ("sg(p) l", "p")

    def weight(self, stats: TokenStats) -> Tensor:
        return stats.prob


@dataclass(frozen=True)
class Prob(Power):
    """L = 1 - p, gate p: the gradient of dft, with a value that decreases monotonically in p. BLL, `p`."""

    name = "prob"
    formula = ("1 - p", "p")

    def exponent(self, stats: TokenStats) -> float:
        return 1.0


@dataclass(frozen=True)
class Tsallis(Power):
    """L = (1 - p^q) / q, gate p^q; q = 0 is nll, q = 1 is prob. BLL's general family; DEFT with a fixed exponent."""

    name = "tsallis"
    formula = ("(1 - p^q) / q", "p^q")
    q: float = 0.5

    def __post_init__(self) -> None:
        self._require(0.0 <= self.q <= FP32.max, "0 <= q <= 3e38")

    def exponent(self, stats: TokenStats) -> float:
        return self.q


@dataclass(frozen=True)
class Threshold(Objective):
    """The base objective, nll or prob, for tokens with lo <= p <= hi; loss and gate 0 for all others.

    BLL, OnlyTopP / OnlyBottomP (base=prob) and OnlyTopLogP / OnlyBottomLogP (base=nll); ProFiT is lo=0.1.
    """

    name = "threshold"
    formula = ("base if lo <= p <= hi, else 0", "gate of base, else 0")
    lo: float = 0.1
    hi: float = 1.0
    base: str = "nll"

    def __post_init__(self) -> None:
        self._require(0.0 <= self.lo <= self.hi <= 1.0, "0 <= lo <= hi <= 1")
        self._require(self.base in ("nll", "prob"), "base=nll or base=prob")

    def __call__(self, stats: TokenStats) -> tuple[Tensor, Tensor]:
        loss, gate = OBJECTIVES[self.base]()(stats)
        outside = (stats.prob < self.lo) | (stats.prob > self.hi)  # False for NaN, which stays visible
        return loss.masked_fill(outside, 0.0), gate.masked_fill(outside, 0.0)


@dataclass(frozen=True)
class Cayley(Power):
    """L = (1 - p^a) / a with a = clamp(f + (1-f) p/(2-p), 1e-3, 1) detached, f = floor * mean p; gate p^a.

    DEFT repository, Cayley transform. As there, the mean is over the valid tokens of this rank's micro-batch. It is the
    same on all tensor-parallel ranks, and differs between context-parallel and between data-parallel ranks.
    """

    name = "cayley"
    formula = ("(1 - p^a) / a, a from p and its mean, detached", "p^a")
    per_token = False
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

    Close to prob for confident predictions (C near 1), to nll for diffuse ones (C near 0).
    """

    name = "deft"
    formula = ("(1 - p^C) / C, C detached", "p^C")
    needs = frozenset({COLLISION})

    def exponent(self, stats: TokenStats) -> Tensor:
        assert stats.collision is not None
        # C is 0 for ignored tokens, and at least 1/V for others.
        return stats.collision.clamp(min=torch.finfo(stats.collision.dtype).tiny)


@dataclass(frozen=True)
class Entropy(Reweighted):
    """L = sg(g(H)) l, gate g(H), with the entropy H of the prediction.

    No paper defines a formula for entropy weighting. The forms here:
    form=ratio g = H / ln V emphasizes uncertain predictions; form=complement g = 1 - H / ln V confident ones;
    form=exponential g = e^-H is the inverse perplexity of the prediction.
    """

    name = "entropy"
    formula = ("sg(g(H)) l", "g(H)")
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
    formula = ("sg(alpha p + 1 - alpha) l", "alpha p + 1 - alpha")
    alpha: float = 0.5

    def __post_init__(self) -> None:
        self._require(0.0 <= self.alpha <= 1.0, "0 <= alpha <= 1")

    def weight(self, stats: TokenStats) -> Tensor:
        return self.alpha * stats.prob + (1.0 - self.alpha)


@dataclass(frozen=True)
class Focal(Reweighted):
    """L = sg((1-p)^gamma) l: emphasizes improbable targets, unlike dft. arXiv:1708.02002, with a detached factor."""

    name = "focal"
    formula = ("sg((1-p)^gamma) l", "(1-p)^gamma")
    gamma: float = 2.0

    def __post_init__(self) -> None:
        self._require(0.0 <= self.gamma <= FP32.max, "0 <= gamma <= 3e38")

    def weight(self, stats: TokenStats) -> Tensor:
        return (-torch.expm1(stats.logprob)) ** self.gamma


@dataclass(frozen=True)
class Chord(Reweighted):
    """L = sg(p (1-p)) l: peaks at p = 0.5 and vanishes for p -> 0 and p -> 1. CHORD's phi, arXiv:2508.11408."""

    name = "chord"
    formula = ("sg(p (1-p)) l", "p (1-p)")

    def weight(self, stats: TokenStats) -> Tensor:
        return stats.prob * -torch.expm1(stats.logprob)


@dataclass(frozen=True)
class Luffy(Objective):
    """L = 1 - p/(p+gamma), gate gamma p / (p+gamma)^2: policy shaping, largest gate at p = gamma. arXiv:2504.14945."""

    name = "luffy"
    formula = ("1 - p/(p+gamma)", "gamma p / (p+gamma)^2")
    gamma: float = 0.1

    def __post_init__(self) -> None:
        self._require(1e-9 <= self.gamma <= 1e9, "1e-9 <= gamma <= 1e9")  # its square fits into fp32

    def __call__(self, stats: TokenStats) -> tuple[Tensor, Tensor]:
        shifted = stats.prob + self.gamma
        return self.gamma / shifted, self.gamma * stats.prob / shifted.square()


@dataclass(frozen=True)
class EAFT(Reweighted):
    """L = sg(u^alpha) l, gate u^alpha, with the uncertainty u = min(1, H / ln 20) of the prediction. arXiv:2601.02151.

    The gate is small where the entropy is low, for correct targets too.

    k=0: H is the entropy of the whole vocabulary. The paper reports a correlation of 0.999 with the top-k form.
    k=20: u = H_k / ln k with the entropy H_k of the k most probable entries, renormalized: the paper's form, exact over
    tensor-parallel ranks. It sends k more values per token and reads the logits once more.
    """

    name = "eaft"
    formula = ("sg(u^alpha) l, u = min(1, H / ln 20), or H_k / ln k", "u^alpha")
    alpha: float = 1.0
    k: int = 0

    def __post_init__(self) -> None:
        self._require(0.0 <= self.alpha <= FP32.max, "0 <= alpha <= 3e38")
        self._require(self.k == 0 or 2 <= self.k <= 1024, "k=0, or 2 <= k <= 1024")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({top_k_need(self.k) if self.k else ENTROPY})

    def weight(self, stats: TokenStats) -> Tensor:
        entropy = stats.top_k_entropy if self.k else stats.entropy
        assert entropy is not None
        return (entropy / math.log(self.k or 20)).clamp(max=1.0) ** self.alpha


@dataclass(frozen=True)
class TrSFT(Objective):
    """Trust-region SFT: L = l for p > alpha, (1 - p/alpha) + ln(1/alpha) below; gate min(1, p/alpha).

    The SFT part of TRAPO, arXiv:2512.17636: nll for p > alpha, prob / alpha below. The value is continuous.
    """

    name = "trsft"
    formula = ("l if p > alpha, else 1 - p/alpha + ln(1/alpha)", "min(1, p/alpha)")
    alpha: float = 0.1

    def __post_init__(self) -> None:
        self._require(FP32.tiny <= self.alpha <= 1.0, "1e-38 <= alpha <= 1")

    def __call__(self, stats: TokenStats) -> tuple[Tensor, Tensor]:
        relative = stats.prob / self.alpha
        below = (1.0 - relative) + math.log(1.0 / self.alpha)
        return torch.where(relative > 1.0, stats.nll, below), relative.clamp(max=1.0)


@dataclass(frozen=True)
class TALR(Reweighted):
    """Token-adaptive loss reweighting: L = sg(p^(1/tau)) l, gate p^(1/tau). arXiv:2509.20758.

    tau is the lower median of the NLL over the valid tokens of a micro-batch, on all data- and context-parallel ranks.
    At least half of the tokens have a gate of at least 1/e. The gates are not normalized.
    """

    name = "talr"
    formula = ("sg(p^(1/tau)) l, tau: median of l", "p^(1/tau)")
    needs = frozenset({MEDIAN})
    per_token = False

    def weight(self, stats: TokenStats) -> Tensor:
        return torch.exp(stats.logprob / stats.median_nll.clamp(min=FP32.tiny))


@dataclass(frozen=True)
class ASFT(Objective):
    """Anchored SFT: L = sg(p) l + lambda (1/r - 1 + ln r), gate p + lambda (1/r - 1). After arXiv:2509.23753.

    The second term is the k3 term of KL(model || reference), on the target alone. The published code takes
    KL(reference || model) over the whole vocabulary. That needs the reference model in memory, and the gradient of that
    divergence is not gate x error. The gate is negative where p < lambda and r > 1 / (1 - p/lambda), down to -lambda.
    clamp=1 replaces negative gates by 0. The gate grows as lambda / r for small r; ln r is clamped to [-20, 20].
    """

    name = "asft"
    formula = ("sg(p) l + lambda (1/r - 1 + ln r)", "p + lambda (1/r - 1)")
    needs = frozenset({REFERENCE})
    lambda_: float = 0.03
    clamp: int = 0

    def __post_init__(self) -> None:
        self._require(0.0 <= self.lambda_ <= 1e9, "0 <= lambda <= 1e9")
        self._require(self.clamp in (0, 1), "clamp=0 or clamp=1")

    def __call__(self, stats: TokenStats) -> tuple[Tensor, Tensor]:
        dft = torch.where(stats.prob == 0.0, 0.0, stats.prob * stats.nll)
        gate = stats.prob + self.lambda_ * torch.expm1(-stats.log_ratio)
        return dft + self.lambda_ * stats.kl, gate.clamp(min=0.0) if self.clamp else gate


@dataclass(frozen=True)
class IW(Reweighted):
    """Importance-weighted SFT, per token: L = sg(clamp(r, lo, hi)) l, gate clamp(r, lo, hi). arXiv:2507.12856."""

    name = "iw"
    formula = ("sg(clamp(r, lo, hi)) l", "clamp(r, lo, hi)")
    needs = frozenset({REFERENCE})
    lo: float = 0.2
    hi: float = 1.8

    def __post_init__(self) -> None:
        self._require(0.0 <= self.lo <= self.hi <= 1e9, "0 <= lo <= hi <= 1e9")

    def weight(self, stats: TokenStats) -> Tensor:
        return stats.ratio.clamp(self.lo, self.hi)

    def clipped(self, stats: TokenStats) -> Tensor | None:
        return (stats.ratio < self.lo) | (stats.ratio > self.hi)


@dataclass(frozen=True)
class PSFT(Reweighted):
    """Proximal SFT: L = sg(w) l, gate w = r where r <= 1 + eps, else 0. arXiv:2508.17784, against the reference.

    The paper clips against the policy before the last update. Here the reference stays the same during training. A
    token stops training once its probability is above 1 + eps times that of the reference. Targets with
    p_ref > 1 / (1 + eps) are never clipped.
    """

    name = "psft"
    formula = ("sg(w) l, w = r if r <= 1 + eps, else 0", "w")
    needs = frozenset({REFERENCE})
    eps: float = 0.28

    def __post_init__(self) -> None:
        self._require(0.0 <= self.eps <= 1e9, "0 <= eps <= 1e9")

    def weight(self, stats: TokenStats) -> Tensor:
        return stats.ratio.masked_fill(stats.ratio > 1.0 + self.eps, 0.0)  # NaN stays NaN

    def clipped(self, stats: TokenStats) -> Tensor | None:
        return stats.ratio > 1.0 + self.eps


@dataclass(frozen=True)
class Scheduled(Objective):
    """nll for `start` iterations, then a linear blend into `base` over `ramp` iterations, then `base`.

        L = (1-b) l + b L_base,   w = (1-b) + b w_base,   b = clamp((iteration - start) / max(ramp, 1), 0, 1)

    For dft this is mix with a growing alpha. b depends on the iteration alone, so it is the same on all ranks and after
    a restart. A training loop keeps b in a tensor on the device and fills it before each iteration:

        schedule = parse_objective("dft:start=1000,ramp=500")
        blend = torch.zeros((), device=device)
        objective = schedule.with_blend(blend)
        for iteration in range(1, iterations + 1):
            blend.fill_(schedule.blend_at(iteration))
    """

    base: Objective
    start: int = 0
    ramp: int = 0

    def __post_init__(self) -> None:
        self._require(self.start >= 0 and self.ramp >= 0, "start >= 0 and ramp >= 0")

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.base.name

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return self.base.needs

    @property
    def per_token(self) -> bool:  # type: ignore[override]
        return self.base.per_token

    def blend_at(self, iteration: int) -> float:
        """b of a training iteration 1, 2, ..."""
        return min(max((iteration - self.start) / max(self.ramp, 1), 0.0), 1.0)

    def clipped(self, stats: TokenStats) -> Tensor | None:
        return self.base.clipped(stats)

    def with_blend(self, blend: Tensor) -> Blended:
        """The objective whose b is in `blend`, a tensor without dimensions on the device of the logits."""
        return Blended(self, blend)

    def __call__(self, stats: TokenStats) -> tuple[Tensor, Tensor]:
        raise ValueError(
            f"objective {str(self)!r} is scheduled and has no blend; pass objective.with_blend(tensor), and fill the "
            "tensor with objective.blend_at(iteration) before each iteration, or omit start= and ramp="
        )

    def __str__(self) -> str:
        separator = "," if ":" in str(self.base) else ":"
        return f"{self.base}{separator}start={self.start},ramp={self.ramp}"


@dataclass(frozen=True, eq=False)
class Blended(Objective):
    """(1-b) nll + b base, with b in a tensor that its owner fills. A captured CUDA graph reads the current b."""

    schedule: Scheduled
    blend: Tensor  # []
    by_value: ClassVar[bool] = False

    @property
    def base(self) -> Objective:
        """The objective of b = 1."""
        return self.schedule.base

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.schedule.name

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return self.schedule.needs

    @property
    def per_token(self) -> bool:  # type: ignore[override]
        return self.schedule.per_token

    def clipped(self, stats: TokenStats) -> Tensor | None:
        return self.base.clipped(stats)

    def __call__(self, stats: TokenStats) -> tuple[Tensor, Tensor]:
        loss, gate = self.base(stats)
        b = self.blend
        return _share(1.0 - b, stats.nll) + _share(b, loss), (1.0 - b) + _share(b, gate)

    def __str__(self) -> str:
        return str(self.schedule)


def _share(part: Tensor, x: Tensor) -> Tensor:
    """part * x, and 0 where part is 0."""
    return torch.where(part == 0.0, 0.0, part * x)


_OF_STATISTICS = (
    NLL,
    DFT,
    Prob,
    Tsallis,
    Threshold,
    Cayley,
    DEFT,
    Entropy,
    Mix,
    Focal,
    Chord,
    Luffy,
    EAFT,
    TrSFT,
    TALR,
)
_OF_REFERENCE = (ASFT, IW, PSFT)
OBJECTIVES: dict[str, type[Objective]] = {objective.name: objective for objective in (*_OF_STATISTICS, *_OF_REFERENCE)}
WITHOUT_REFERENCE = tuple(objective.name for objective in _OF_STATISTICS)


def loss_and_gate(objective: Objective, stats: TokenStats) -> tuple[Tensor, Tensor]:
    """Loss and gate of an objective, 0 at invalid tokens. A NaN log-probability always gives a NaN gate."""
    loss, gate = objective(stats)
    gate = gate.masked_fill(stats.logprob.isnan(), torch.nan)
    return loss.masked_fill(~stats.valid, 0.0), gate.masked_fill(~stats.valid, 0.0)


def parse_objective(specification: str | Objective) -> Objective:
    """Parse "dft", "threshold:lo=0.1,base=prob" or "dft:start=1000,ramp=500". An `Objective` is returned as is.

    Raises:
        ValueError: for an unknown name or parameter, or a value out of range.
    """
    if isinstance(specification, Objective):
        return specification
    name, _, parameters = str(specification).partition(":")
    if name not in OBJECTIVES:
        raise ValueError(
            f"unknown objective {name!r}: expected one of {', '.join(OBJECTIVES)}{nearest(name, OBJECTIVES)}"
        )
    cls = OBJECTIVES[name]
    kinds: dict[str, Any] = {f.name.rstrip("_"): type(f.default) for f in fields(cls)} | SCHEDULE
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
            kind = "an integer" if kinds[key] is int else "a number"
            raise ValueError(f"objective {name!r}: expected {kind} for {key}=, got {value!r}") from None
    schedule = {key: values.pop(key) for key in SCHEDULE if key in values}
    objective = cls(**{cls.parameters()[key]: value for key, value in values.items()})
    return Scheduled(objective, **schedule) if schedule else objective
