"""Reference implementation: each objective from its formula, on the whole vocabulary, with plain autograd.

No gates, shards or log-sum algebra: softmax, sums of it, and .detach() where the formula has sg().
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor


@dataclass(frozen=True)
class Token:
    """The per-token quantities of the formulas."""

    l: Tensor  # noqa: E741  [...] -log p
    p: Tensor  # [...] probability of the target
    softmax: Tensor  # [..., V]
    valid: Tensor  # [...]
    q: Tensor | None = None  # [...] probability of the target under the reference model

    @property
    def H(self) -> Tensor:
        return -torch.special.xlogy(self.softmax, self.softmax).sum(-1)

    @property
    def r(self) -> Tensor:
        assert self.q is not None
        return self.p / self.q

    @property
    def C(self) -> Tensor:
        return self.softmax.square().sum(-1)


def top_k_entropy(t: Token, k: int) -> Tensor:
    q = t.softmax.topk(k, -1).values
    q = q / q.sum(-1, keepdim=True)
    return -torch.special.xlogy(q, q).sum(-1)


def sg(x: Tensor) -> Tensor:
    """Stop-gradient."""
    return x.detach()


def box_cox(t: Token, a: Tensor | float) -> Tensor:
    return (1 - t.p**a) / a


def cayley_exponent(t: Token, floor: float) -> Tensor:
    f = floor * t.p[t.valid].mean()
    return (f + (1 - f) * t.p / (2 - t.p)).clamp(1e-3, 1)


# Every objective with its defaults, and each parameter at a second value. Keys are `str(objective)`.
FORMULAS: dict[str, Callable[[Token], Tensor]] = {
    "nll": lambda t: t.l,
    "dft": lambda t: sg(t.p) * t.l,
    "prob": lambda t: 1 - t.p,
    "tsallis:q=0.5": lambda t: box_cox(t, 0.5),
    "tsallis:q=0.0": lambda t: t.l,
    "tsallis:q=2.0": lambda t: box_cox(t, 2),
    "threshold:lo=0.1,hi=1.0,base=nll": lambda t: t.l * sg(t.p >= 0.1),
    "threshold:lo=0.01,hi=0.2,base=prob": lambda t: (1 - t.p) * sg((t.p >= 0.01) & (t.p <= 0.2)),
    "cayley:floor=0.5": lambda t: box_cox(t, sg(cayley_exponent(t, 0.5))),
    "cayley:floor=0.0": lambda t: box_cox(t, sg(cayley_exponent(t, 0.0))),
    "deft": lambda t: box_cox(t, sg(t.C)),
    "entropy:form=ratio": lambda t: sg(t.H / math.log(t.softmax.shape[-1])) * t.l,
    "entropy:form=complement": lambda t: sg(1 - t.H / math.log(t.softmax.shape[-1])) * t.l,
    "entropy:form=exponential": lambda t: sg(torch.exp(-t.H)) * t.l,
    "mix:alpha=0.5": lambda t: sg(0.5 * t.p + 0.5) * t.l,
    "mix:alpha=0.1": lambda t: sg(0.1 * t.p + 0.9) * t.l,
    "focal:gamma=2.0": lambda t: sg((1 - t.p) ** 2) * t.l,
    "focal:gamma=0.5": lambda t: sg((1 - t.p) ** 0.5) * t.l,
    "chord": lambda t: sg(t.p * (1 - t.p)) * t.l,
    "luffy:gamma=0.1": lambda t: 1 - t.p / (t.p + 0.1),
    "luffy:gamma=1.0": lambda t: 1 - t.p / (t.p + 1.0),
    "eaft:alpha=1.0,k=0": lambda t: sg((t.H / math.log(20)).clamp(max=1)) * t.l,
    "eaft:alpha=0.5,k=0": lambda t: sg((t.H / math.log(20)).clamp(max=1) ** 0.5) * t.l,
    "eaft:alpha=1.0,k=4": lambda t: sg(top_k_entropy(t, 4) / math.log(4)) * t.l,
    "trsft:alpha=0.1": lambda t: torch.where(t.p > 0.1, t.l, 1 - t.p / 0.1 - math.log(0.1)),
    "trsft:alpha=0.7": lambda t: torch.where(t.p > 0.7, t.l, 1 - t.p / 0.7 - math.log(0.7)),
    "talr": lambda t: sg(t.p ** (1 / t.l[t.valid].sort().values[(t.valid.sum() - 1) // 2])) * t.l,
}


# Objectives with a reference. Their targets come from `referenced`.
REFERENCE_FORMULAS: dict[str, Callable[[Token], Tensor]] = {
    "asft:lambda=0.03,clamp=0": lambda t: sg(t.p) * t.l + 0.03 * (1 / t.r - 1 + torch.log(t.r)),
    "asft:lambda=0.5,clamp=0": lambda t: sg(t.p) * t.l + 0.5 * (1 / t.r - 1 + torch.log(t.r)),
    "iw:lo=0.2,hi=1.8": lambda t: sg(t.r.clamp(0.2, 1.8)) * t.l,
    "iw:lo=0.0,hi=3.0": lambda t: sg(t.r.clamp(0, 3)) * t.l,
    "psft:eps=0.28": lambda t: sg(torch.where(t.r <= 1.28, t.r, 0)) * t.l,
    "psft:eps=1.0": lambda t: sg(torch.where(t.r <= 2, t.r, 0)) * t.l,
}


def referenced(logits: Tensor, target: Tensor, seed: int = 0) -> Tensor:
    """Targets with the NLL of a reference model whose logits are near the given ones."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(target.shape, generator=generator, dtype=torch.float64)
    nll = (token(logits.double(), target).l + noise).abs().numpy().astype(numpy.float16)
    bits = torch.from_numpy(nll.view(numpy.int16).astype(numpy.int64))
    return torch.where(target < 0, target, target + bits * 2**48)


def token(logits: Tensor, target: Tensor, ignore_index: int = -100) -> Token:
    """The quantities of each token, differentiable with respect to the logits [..., V]."""
    valid, q = target != ignore_index, None
    if (target >= 2**48).any():
        bits = (target.clamp(min=0) // 2**48).numpy().astype(numpy.int16)
        q = torch.exp(-torch.from_numpy(bits.view(numpy.float16).astype(numpy.float64)))
        target = torch.where(target < 0, target, target % 2**48)
    logprobs = torch.log_softmax(logits, -1)
    l = -logprobs.gather(-1, target.masked_fill(~valid, 0)[..., None])[..., 0]  # noqa: E741
    return Token(l, torch.exp(-l), logprobs.exp(), valid, q)


def example(*shape: int, vocab: int = 11, seed: int = 0, spread: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [*shape, V], targets and upstream gradients [*shape] in fp64. The default is 24 tokens.

    Target probabilities range from about 1e-8 to nearly 1. Every fifth token is ignored. Upstream gradients differ.
    """
    shape = shape or (24,)
    tokens = math.prod(shape)
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(tokens, vocab, generator=generator, dtype=torch.float64)
    target = torch.randint(vocab, (tokens,), generator=generator)
    logits[range(tokens), target] += torch.linspace(-8.0, 12.0, tokens, dtype=torch.float64)
    target[::5] = -100
    upstream = torch.randn(tokens, generator=generator, dtype=torch.float64)
    return logits.view(*shape, vocab), target.view(shape), upstream.view(shape)


def loss_and_gradient(
    specification: str,
    logits: Tensor,  # [..., V]
    target: Tensor,  # [...]
    upstream: Tensor,  # [...]
    true_vocab_size: int | None = None,
) -> tuple[Tensor, Tensor]:  # [...] and [..., V]
    """Per-token loss [...] and gradient [..., V] of (upstream x loss).sum(), in fp64."""
    leaf = logits.detach().double().requires_grad_()
    t = token(leaf[..., :true_vocab_size], target)
    loss = torch.where(t.valid, (FORMULAS | REFERENCE_FORMULAS)[specification](t), 0.0)
    (gradient,) = torch.autograd.grad(loss, leaf, upstream.double())
    return loss.detach(), gradient
