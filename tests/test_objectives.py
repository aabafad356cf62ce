"""Objectives on token statistics: losses, gates, invariants, specifications and schedules."""

import math
from dataclasses import dataclass

import pytest
import torch
from formulas import FORMULAS, REFERENCE_FORMULAS, example, loss_and_gradient, token, top_k_entropy
from kernel_cases import at_iteration

from megatron_dft import OBJECTIVES, Objective, TokenStats, parse_objective, token_loss, vocab_parallel_dft_loss
from megatron_dft.ops.objectives import WITHOUT_REFERENCE, Power, Reweighted, Scheduled, Tsallis
from megatron_dft.ops.stats import ShardStats, token_stats

TOLERANCE = {"rtol": 0.0, "atol": 1e-12}
INF, NAN = math.inf, math.nan


def stats_of(logits, target):
    """TokenStats, computed without the library."""
    t = token(logits, target)
    zeroed = (x.masked_fill(~t.valid, 0.0) for x in (t.H, t.C, top_k_entropy(t, 4)))
    return TokenStats((-t.l).masked_fill(~t.valid, 0.0), t.valid, None, *zeroed, vocab_size=logits.shape[-1])


def stats_at(*p):
    """TokenStats of these target probabilities in a vocabulary of 8. The other entries share the rest equally."""
    p = torch.tensor(p, dtype=torch.float64)
    rest = (1 - p) / 7
    entropy = -torch.special.xlogy(p, p) - 7 * torch.special.xlogy(rest, rest)
    collision = p.square() + 7 * rest.square()
    four = torch.stack([torch.maximum(p, rest), rest, rest, rest])
    four = four / four.sum(0)
    top = -torch.special.xlogy(four, four).sum(0)
    return TokenStats(p.log(), torch.ones_like(p, dtype=torch.bool), None, entropy, collision, top, vocab_size=8)


def gradient(specification, logits, target, upstream):
    leaf = logits.clone().requires_grad_()
    vocab_parallel_dft_loss(leaf, target, objective=specification).backward(upstream)
    return leaf.grad


def test_every_objective_has_formula():
    assert {name.partition(":")[0] for name in FORMULAS} == set(WITHOUT_REFERENCE)
    assert {name.partition(":")[0] for name in FORMULAS | REFERENCE_FORMULAS} == set(OBJECTIVES)
    assert {str(cls()) for cls in OBJECTIVES.values()} <= set(FORMULAS | REFERENCE_FORMULAS)


@pytest.mark.parametrize("specification", FORMULAS)
def test_objective_loss_and_gate_match_formula(specification):
    logits, target, upstream = example()
    loss, gate = (x.masked_fill(target == -100, 0.0) for x in parse_objective(specification)(stats_of(logits, target)))
    error = torch.softmax(logits, -1) - torch.nn.functional.one_hot(target.clamp(min=0), logits.shape[-1])
    true_loss, true_gradient = loss_and_gradient(specification, logits, target, upstream)
    torch.testing.assert_close(loss, true_loss, **TOLERANCE)
    torch.testing.assert_close((upstream * gate)[:, None] * error, true_gradient, **TOLERANCE)


@pytest.mark.parametrize("specification", FORMULAS)
def test_gate_is_derivative_or_detached_weight(specification):
    objective = parse_objective(specification)
    stats = stats_at(0.001, 0.15, 1 / math.e, 0.5, 0.99)
    if objective.name == "cayley":  # its exponent is detached as well, so it is a Box-Cox per token
        exponents = objective.exponent(stats)
        for i, a in enumerate(exponents.tolist()):
            both = zip(objective(stats), Tsallis(q=a)(stats), strict=True)
            assert all(torch.equal(ours[i], other[i]) for ours, other in both)
        assert len(set(exponents.tolist())) == 5
        return
    leaf = stats.logprob.requires_grad_()
    loss, gate = objective(stats)
    if isinstance(objective, Reweighted):
        torch.testing.assert_close(loss, gate * stats.nll, **TOLERANCE)
    if isinstance(objective, Power) or objective.name in ("nll", "threshold", "luffy", "trsft"):
        (derivative,) = torch.autograd.grad(loss.sum(), leaf)
        torch.testing.assert_close(gate, -derivative, **TOLERANCE)


@pytest.mark.parametrize("specification", FORMULAS)
def test_gate_and_loss_are_nonnegative(specification):
    grid = torch.logspace(-300, 0, 1001, dtype=torch.float64).tolist()
    loss, gate = parse_objective(specification)(stats_at(0.0, *grid, 1 - 1e-16))
    assert (gate >= 0).all()
    assert (loss >= 0).all()


def test_dft_prob_and_tsallis_1_have_equal_gradients():
    case = example()
    for other in ("prob", "tsallis:q=1"):
        torch.testing.assert_close(gradient("dft", *case), gradient(other, *case), rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("q", [0.0, 1e-15, 1e-300])
def test_tsallis_approaches_nll_for_small_q(q):
    case = example()
    torch.testing.assert_close(gradient(f"tsallis:q={q}", *case), gradient("nll", *case), **TOLERANCE)
    stats = stats_at(1e-6, 0.3, 1.0)
    torch.testing.assert_close(Tsallis(q)(stats)[0], stats.nll, **TOLERANCE)


@pytest.mark.parametrize(
    "specification",
    ["tsallis:q=1e-45", "tsallis:q=1e-60", "tsallis:q=3e38", "focal:gamma=3e38", "luffy:gamma=1e-9", "luffy:gamma=1e9"],
)
def test_extreme_parameters_are_finite_in_fp32(specification):
    stats = TokenStats(torch.tensor([-math.inf, -100.0, -1.0, 0.0]), torch.ones(4, dtype=torch.bool))
    loss, gate = parse_objective(specification)(stats)
    assert gate.isfinite().all() and loss[1:].isfinite().all() and not loss.isnan().any()


def test_tsallis_accepts_integer_q():
    assert Tsallis(q=0)(stats_at(0.3))[0].item() == pytest.approx(-math.log(0.3))


def test_deft_gradient_matches_detached_weight():
    logits, target, upstream = example()
    leaf = logits.clone().requires_grad_()
    t = token(leaf, target)
    ((t.p**t.C).detach() * t.l)[t.valid].mul(upstream[t.valid]).sum().backward()
    torch.testing.assert_close(gradient("deft", logits, target, upstream), leaf.grad, **TOLERANCE)


def test_eaft_gate_is_1_above_ln_20():
    loss = vocab_parallel_dft_loss(torch.zeros(1, 48), torch.tensor([0]), objective="eaft:alpha=2")
    assert loss.item() == pytest.approx(math.log(48))


def test_dft_loss_peaks_at_one_over_e():
    grid = torch.linspace(0.001, 1.0, 1000, dtype=torch.float64)
    loss, _ = OBJECTIVES["dft"]()(stats_at(*grid.tolist(), 1 / math.e))
    assert loss.argmax().item() == 1000
    assert loss[-1].item() == pytest.approx(1 / math.e, abs=1e-15)


@pytest.mark.parametrize("p", [0.01, 0.1, 0.3])  # below 1/e, where p (1 + log p) is negative
def test_dft_gradient_raises_low_probability_targets(p):
    logits = torch.tensor([[math.log(p), math.log(1 - p)]], dtype=torch.float64)
    target, one = torch.tensor([0]), torch.ones(1, dtype=torch.float64)
    pushed = gradient("dft", logits, target, one)[0, 0].item()
    assert pushed == pytest.approx(-p * (1 - p), abs=1e-15)
    nll = torch.tensor([-math.log(p)], dtype=torch.float64, requires_grad=True)
    token_loss(nll, "dft").backward(one)
    assert nll.grad.item() == pytest.approx(p, abs=1e-15)

    leaf = logits.clone().requires_grad_()  # the gradient without detach
    t = token(leaf, target)
    (t.p * t.l).sum().backward()
    assert leaf.grad[0, 0].item() == pytest.approx(-p * (1 + math.log(p)) * (1 - p)) and leaf.grad[0, 0] > 0


@pytest.mark.parametrize(
    ("specification", "at_0", "at_1"),  # (loss, gate) at p = 0 and at p = 1; H and C as in stats_at
    [
        ("nll", (INF, 1), (0, 1)),
        ("dft", (0, 0), (0, 1)),
        ("prob", (1, 0), (0, 1)),
        ("tsallis:q=0.5", (2, 0), (0, 1)),
        ("tsallis:q=0", (INF, 1), (0, 1)),
        ("threshold", (0, 0), (0, 1)),
        ("threshold:lo=0,hi=0.2", (INF, 1), (0, 0)),
        ("threshold:lo=0,base=prob", (1, 0), (0, 1)),
        ("cayley:floor=0", (1000, 0), (0, 1)),
        ("cayley:floor=1", (2, 0), (0, 1)),  # mean p = 1/2, without the NaN
        ("deft", (7, 0), (0, 1)),
        ("entropy:form=ratio", (INF, math.log(7) / math.log(8)), (0, 0)),
        ("entropy:form=complement", (INF, 1 - math.log(7) / math.log(8)), (0, 1)),
        ("entropy:form=exponential", (INF, 1 / 7), (0, 1)),
        ("mix", (INF, 0.5), (0, 1)),
        ("mix:alpha=1", (0, 0), (0, 1)),
        ("focal", (INF, 1), (0, 0)),
        ("chord", (0, 0), (0, 0)),
        ("luffy", (1, 0), (0.1 / 1.1, 0.1 / 1.21)),
        ("eaft", (INF, math.log(7) / math.log(20)), (0, 0)),
        ("eaft:alpha=2,k=4", (INF, 1), (0, 0)),
        ("eaft:alpha=0", (INF, 1), (0, 1)),
        ("trsft", (1 + math.log(10), 0), (0, 1)),
        ("talr", (0, 0), (0, 1)),
    ],
)
def test_loss_and_gate_at_p_0_p_1_and_nan(specification, at_0, at_1):
    loss, gate = parse_objective(specification)(stats_at(0.0, 1.0, NAN))
    expected = torch.tensor([at_0, at_1], dtype=torch.float64)
    torch.testing.assert_close(torch.stack([loss, gate], -1)[:2], expected, rtol=1e-12, atol=1e-12)
    assert loss[2].isnan()


def test_rounding_keeps_probability_at_most_one():
    """A sum of 1 - 1e-7 or an NLL of -1e-7, by rounding, must not give p > 1, H < 0 or C > 1."""
    one, zero = torch.ones(1), torch.zeros(1)
    stats = token_stats(ShardStats(zero, -1e-7 * one, zero, zero, one), one.bool(), 8)
    assert (stats.prob, stats.nll, stats.entropy, stats.collision) == (1.0, 0.0, 0.0, 1.0)
    assert token_loss(-1e-7 * one, "chord").item() == 0.0
    nll = (-1e-7 * one).requires_grad_()
    token_loss(nll, "dft").backward()
    assert nll.grad.item() == 1.0


@pytest.mark.parametrize("specification", [*FORMULAS, *REFERENCE_FORMULAS])
def test_specification_round_trips(specification):
    objective = parse_objective(specification)
    assert str(objective) == specification
    assert parse_objective(str(objective)) == objective and parse_objective(objective) is objective


def test_schedule_specification_round_trips():
    schedule = parse_objective("tsallis:ramp=5,q=0.25")
    assert str(schedule) == "tsallis:q=0.25,start=0,ramp=5"
    assert parse_objective(str(schedule)) == schedule == Scheduled(Tsallis(0.25), 0, 5)


def test_omitted_parameters_keep_defaults():
    assert str(parse_objective("threshold:base=prob")) == "threshold:lo=0.1,hi=1.0,base=prob"


@pytest.mark.parametrize(
    ("specification", "message"),
    [
        ("dtf", "unknown objective 'dtf': expected one of nll, dft, .*; did you mean 'dft'"),
        ("DFT", "unknown objective 'DFT': expected one of nll, dft, .*; did you mean 'dft'"),
        ("", "unknown objective ''"),
        ("DFT", "unknown objective 'DFT'"),
        ("focal:gama=1", "'focal': expected gamma=, start=, ramp=, got 'gama=1' in .*; did you mean 'gamma'"),
        ("dft:q=1", "'dft': expected start=, ramp=, got 'q=1'"),
        ("tsallis:0.5", "'tsallis': expected q=, start=, ramp=, got '0.5'"),
        ("tsallis:q=half", "'tsallis': expected a number for q=, got 'half'"),
        ("tsallis:q=", "'tsallis': expected a number for q=, got ''"),
        ("tsallis:q=1,q=2", "'tsallis': q= is given twice in 'tsallis:q=1,q=2'; give it once"),
        ("tsallis:q=-1", "'tsallis': expected 0 <= q <= 3e38, got 'tsallis:q=-1.0'"),
        ("tsallis:q=inf", "expected 0 <= q <= 3e38"),
        ("tsallis:q=nan", "expected 0 <= q <= 3e38"),
        ("threshold:lo=0.5,hi=0.1", "'threshold': expected 0 <= lo <= hi <= 1, got"),
        ("threshold:hi=1.5", "expected 0 <= lo <= hi <= 1"),
        ("threshold:lo=-0.1", "expected 0 <= lo <= hi <= 1"),
        ("threshold:base=dft", "'threshold': expected base=nll or base=prob, got"),
        ("cayley:floor=1.1", "'cayley': expected 0 <= floor <= 1, got"),
        ("entropy:form=log", "'entropy': expected form=ratio, complement or exponential, got"),
        ("mix:alpha=1.1", "'mix': expected 0 <= alpha <= 1, got"),
        ("focal:gamma=-1", "'focal': expected 0 <= gamma <= 3e38, got"),
        ("luffy:gamma=0", "'luffy': expected 1e-9 <= gamma <= 1e9, got"),
        ("eaft:k=1", "'eaft': expected k=0, or 2 <= k <= 1024, got"),
        ("eaft:alpha=-1", "'eaft': expected 0 <= alpha <= 3e38, got"),
        ("asft:lambda=-1", "'asft': expected 0 <= lambda <= 1e9, got"),
        ("asft:clamp=2", "'asft': expected clamp=0 or clamp=1, got"),
        ("asft:lambda_=1", "'asft': expected lambda=, clamp=, start=, ramp=, got 'lambda_=1'"),
        ("iw:lo=2", "'iw': expected 0 <= lo <= hi <= 1e9, got"),
        ("psft:eps=-1", "'psft': expected 0 <= eps <= 1e9, got"),
        ("trsft:alpha=0", "'trsft': expected 1e-38 <= alpha <= 1, got"),
        ("dft:start=-1", "'dft': expected start >= 0 and ramp >= 0, got 'dft:start=-1,ramp=0'"),
        ("dft:ramp=-1", "'dft': expected start >= 0 and ramp >= 0"),
        ("dft:start=1.5", "'dft': expected an integer for start=, got '1.5'"),
    ],
)
def test_parse_objective_rejects_invalid_specifications(specification, message):
    with pytest.raises(ValueError, match=message):
        parse_objective(specification)
    with pytest.raises(ValueError, match=message):
        vocab_parallel_dft_loss(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64), objective=specification)


@pytest.mark.parametrize(
    ("start", "ramp", "blends"),
    [
        (0, 0, [1.0] * 6),
        (2, 0, [0.0, 0.0, 1.0, 1.0, 1.0, 1.0]),
        (2, 1, [0.0, 0.0, 1.0, 1.0, 1.0, 1.0]),
        (0, 4, [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]),
        (1, 4, [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]),
    ],
)
@pytest.mark.parametrize("base", ["dft", "tsallis:q=0.5", "deft"])
def test_schedule_blends_from_nll_to_objective(base, start, ramp, blends):
    case = example()
    specification = f"{base}{',' if ':' in base else ':'}start={start},ramp={ramp}"
    for iteration, blend in enumerate(blends, start=1):
        objective = at_iteration(specification, iteration)
        mean = (1 - blend) * gradient("nll", *case) + blend * gradient(base, *case)
        torch.testing.assert_close(gradient(objective, *case), mean, **TOLERANCE)
        stats = stats_at(0.001, 0.3, 0.99)
        mean = (1 - blend) * stats.nll + blend * parse_objective(base)(stats)[0]
        torch.testing.assert_close(objective(stats)[0], mean, **TOLERANCE)
        if base == "dft":
            torch.testing.assert_close(objective(stats), parse_objective(f"mix:alpha={blend}")(stats), **TOLERANCE)


@pytest.mark.parametrize("iteration", [1, 9])
def test_schedule_ends_are_bitwise_equal_to_objectives(iteration):
    objective = at_iteration("dft:start=4,ramp=4", iteration)
    stats = stats_at(0.0, 0.3, 1.0, NAN)
    for ours, theirs in zip(objective(stats), parse_objective("nll" if iteration == 1 else "dft")(stats), strict=True):
        assert torch.equal(ours.nan_to_num(-1.0), theirs.nan_to_num(-1.0))


def test_schedule_without_blend_raises():
    logits, target = torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64)
    message = r"'dft:start=2,ramp=0' is scheduled and has no blend; pass objective.with_blend\(tensor\)"
    with pytest.raises(ValueError, match=message):
        vocab_parallel_dft_loss(logits, target, objective="dft:start=2")


def test_custom_objective_is_applied():
    @dataclass(frozen=True)
    class Half(Objective):
        name = "half"

        def __call__(self, stats):
            return 0.5 * stats.nll, torch.full_like(stats.nll, 0.5)

    case = example()
    torch.testing.assert_close(gradient(Half(), *case), 0.5 * gradient("nll", *case), **TOLERANCE)
