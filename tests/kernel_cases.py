"""Test cases for the kernels of every backend: memory layouts, rounding limits, vocabulary shards."""

import math

import torch
import torch.nn.functional as F
from formulas import loss_and_gradient, token, top_k_entropy
from torch.utils.checkpoint import checkpoint

from megatron_dft import vocab_parallel_dft_loss
from megatron_dft.ops.objectives import DFT, Blended, Scheduled, parse_objective
from megatron_dft.ops.stats import COLLISION, ENTROPY, VocabShard, top_k_need

INF, NAN = math.inf, math.nan
EXACT = {"rtol": 0.0, "atol": 0.0, "equal_nan": True}
TOLERANCE = {"rtol": 0.0, "atol": 1e-12}
ALL = frozenset({ENTROPY, COLLISION, top_k_need(3)})
LAYOUTS = {
    "row stride": lambda x: F.pad(x, (0, 5))[..., :-5],
    "token stride": lambda x: torch.stack([x, x], 1)[:, 1],
    "[b, s] transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "columns first": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
    "every second column": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "offset": lambda x: F.pad(x.flatten(), (3, 0))[3:].view(x.shape),
}


def run(logits, target, upstream, layout=lambda x: x, **options):
    """Loss and gradient. As in a model, the logits are the output of an operation, `layout`."""
    leaf = logits.clone().requires_grad_()
    loss = vocab_parallel_dft_loss(layout(leaf * 1), target, **options)
    loss.backward(upstream.to(loss.dtype))
    return loss.detach(), leaf.grad


def assert_same(actual, expected, tolerance=TOLERANCE):
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)


def fp32_rounding(logits, target, upstream):
    """Limits of fp32 rounding errors, for the loss [...] and for the gradient [..., V]: softmax and one-hot terms."""
    t, eps = token(logits.double(), target), torch.finfo(torch.float32).eps
    coefficient = (t.p * upstream * t.valid)[..., None].abs() * (2.0 + t.l[..., None])
    size = t.softmax * (2.0 - t.softmax.log()) + F.one_hot(target.clamp(min=0), logits.shape[-1])
    return 4 * eps * (1.0 + t.l), 2 * eps * coefficient * size


def assert_any_split_merges(kernels, case, width, empty, apart, tolerance):
    """Assert that a backend merges shards of 9 vocabulary entries and 7 padding columns to the formula's results."""
    logits, target, upstream = case
    target = target % 9
    logits += torch.linspace(0.0, apart, 16).to(logits)
    logits[::2] = logits[::2].flip(1)
    shards = [VocabShard(start, min(max(9 - start, 0), width), 9) for start in range(0, 16, width)]
    parts = [logits[:, s.start : s.start + width] for s in shards]
    if empty is not None and width < 16:
        parts[empty].fill_(-INF)
        target = torch.where(target // width == empty, 8, target)
    sums = [kernels.shard_stats(x, target, -100, s, ALL) for x, s in zip(parts, shards, strict=True)]
    loss, saved, stats = kernels.merge(torch.stack(sums), target, -100, 9, DFT(), ALL, return_nll=False)
    t = token(logits[:, :9].double(), target)
    actual = [x.double() for x in (stats.nll, stats.entropy, stats.collision, stats.top_k_entropy, loss)]
    assert_same(actual, (t.l, t.H, t.C, top_k_entropy(t, 3), t.p * t.l), {"rtol": tolerance, "atol": tolerance})

    _, expected = loss_and_gradient("dft", logits, target, upstream, 9)
    gradient = torch.full_like(logits, NAN)
    for x, s in zip(parts, shards, strict=True):
        kernels.shard_gradient(x, target, saved, upstream, s, gradient[:, s.start : s.start + width])
    assert_same((gradient.double(),), (expected,), {"rtol": 0.0, "atol": tolerance})


def assert_saving_changes_nothing(function, logits, upstream, expected):
    """Assert equal results under saved-tensor hooks and under both kinds of activation recomputation."""

    def saved_on_cpu(x):
        with torch.autograd.graph.save_on_cpu():
            return function(x)

    for use in (
        saved_on_cpu,
        lambda x: checkpoint(function, x, use_reentrant=False),
        lambda x: checkpoint(function, x, use_reentrant=True),
    ):
        leaf = logits.clone().requires_grad_()
        loss = use(leaf)
        loss.backward(upstream)
        assert_same((loss.detach().cpu(), leaf.grad.cpu()), expected, EXACT)


def at_iteration(specification, iteration, device="cpu"):
    """An objective. For a schedule, its blend at this iteration is a tensor."""
    objective = parse_objective(specification)
    if not isinstance(objective, Scheduled):
        return objective
    return objective.with_blend(torch.full((), objective.blend_at(iteration), dtype=torch.float64, device=device))


def begin(objective, iteration):
    """Write the blend of another iteration to the tensor of a scheduled objective."""
    if isinstance(objective, Blended):
        objective.blend.fill_(objective.schedule.blend_at(iteration))
