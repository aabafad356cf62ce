"""token_metrics and MetricSpec: [sum, count] pairs that add up over micro-batches and ranks."""

from dataclasses import replace

import pytest
import torch
from formulas import FORMULAS, example, token

from megatron_dft import parse_objective
from megatron_dft.metrics import MetricSpec, token_metrics
from megatron_dft.ops.stats import COLLISION, ENTROPY
from megatron_dft.ops.vocab_parallel import LossOptions, loss_and_stats

KEYS = ["dft/loss", "dft/prob", "dft/gate", "dft/accuracy"]


def make_case():
    """[b, s] tokens: target -100 at every fifth, mask 0 at every third, and one weight of 0.25."""
    logits, target, _ = example(4, 6)
    mask = (torch.arange(24).view(4, 6) % 3 != 0).float()
    mask[0, 1] = 0.25
    return logits, target, mask


def report(specification, logits, target, mask):
    objective = parse_objective(specification)
    _, stats = loss_and_stats(logits, target, LossOptions(objective=objective))
    return token_metrics(stats, objective, mask)


@pytest.mark.parametrize("specification", FORMULAS)
def test_metric_is_weighted_sum_and_count(specification):
    logits, target, mask = make_case()
    t = token(logits.requires_grad_(), target)
    weight = mask * t.valid
    loss = FORMULAS[specification](t)
    (to_logits,) = torch.autograd.grad(loss.sum(), logits, retain_graph=True)
    (error,) = torch.autograd.grad(t.l.sum(), logits)
    gate = to_logits.norm(dim=-1) / error.norm(dim=-1)
    columns = [loss, t.p, gate, (logits.argmax(-1) == target).double()]
    columns += [t.H] if ENTROPY in parse_objective(specification).needs else []
    metrics = report(specification, logits.detach(), target, mask)
    for pair, column in zip(metrics.values(), columns, strict=True):
        expected = torch.stack([(column.detach() * weight)[weight > 0].sum(), weight.sum()])
        torch.testing.assert_close(pair, expected.to(pair.dtype), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("specification", FORMULAS)
def test_metric_keys_depend_only_on_objective(specification):
    logits, target, mask = make_case()
    keys = KEYS + (["dft/entropy"] if ENTROPY in parse_objective(specification).needs else [])
    assert list(report(specification, logits, target, mask)) == keys
    assert list(report(specification, logits[:0], target[:0], mask[:0])) == keys
    assert list(report(specification, logits, torch.full_like(target, -100), mask)) == keys


@pytest.mark.parametrize("specification", ["dft", "entropy", "deft", "threshold", "luffy"])
def test_metrics_sum_over_micro_batches(specification):
    case = make_case()
    parts = [report(specification, *(x[rows] for x in case)) for rows in (slice(0, 1), slice(1, 4))]
    for key, pair in report(specification, *case).items():
        torch.testing.assert_close(parts[0][key] + parts[1][key], pair)


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("specification", FORMULAS)
def test_masked_token_adds_nothing_to_metrics(specification, broken):
    logits, target, mask = make_case()
    if specification.startswith(("cayley", "talr")):
        target[0, 3] = -100  # their mean p and median NLL are over targets, whatever their mask
    expected = report(specification, logits, target, mask)
    assert mask[0, 3] == 0.0 and target[0, 5] == target[1, 4] == -100
    logits[0, 3] = logits[0, 5] = logits[1, 4] = broken
    actual = report(specification, logits, target, mask)
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


def test_nan_token_makes_loss_prob_and_gate_metrics_nan():
    logits, target, mask = make_case()
    logits[0, 2] = torch.nan
    metrics = report("dft", logits, target, mask)
    assert all(metrics[key][0].isnan() for key in KEYS[:3]) and metrics["dft/accuracy"].isfinite().all()


def test_metrics_are_zero_without_targets():
    logits, target, mask = make_case()
    for none in ((torch.full_like(target, -100), mask), (target, torch.zeros_like(mask))):
        for specification in FORMULAS:
            assert not any(pair.any() for pair in report(specification, logits, *none).values())


def test_metrics_omit_missing_statistics():
    logits, target, mask = make_case()
    objective = parse_objective("dft")
    _, stats = loss_and_stats(logits, target, LossOptions(objective=objective))
    assert list(token_metrics(replace(stats, top1=None), objective, mask)) == KEYS[:3]
    assert list(token_metrics(replace(stats, entropy=stats.nll), objective, mask)) == KEYS  # MetricSpec reports entropy


def test_metrics_accept_bool_mask_and_bf16_logits():
    logits, target, mask = make_case()
    metrics = report("dft", logits.bfloat16(), target, mask.bool())
    assert {pair.dtype for pair in metrics.values()} == {torch.float32}


FULL = MetricSpec(full=True, channels=("other", "maths", "code"))


def make_channels():
    return torch.arange(24).view(4, 6) % 4  # channel 3 has no name


def full_metrics(specification, logits, target, mask, channel=None, of=FULL):
    options = LossOptions(objective=parse_objective(specification), statistics=of.needs)
    _, stats = loss_and_stats(logits, target, options)
    return of.sums(stats, mask, channel)


@pytest.mark.parametrize("specification", FORMULAS)
def test_full_metrics_match_formula(specification):
    logits, target, mask = make_case()
    channel = make_channels()
    t = token(logits.requires_grad_(), target)
    weight = mask * t.valid
    loss = FORMULAS[specification](t)
    (to_logits,) = torch.autograd.grad(loss.sum(), logits, retain_graph=True)
    (error,) = torch.autograd.grad(t.l.sum(), logits)
    sent = to_logits.norm(dim=-1)
    gate, collision = sent / error.norm(dim=-1), logits.softmax(-1).square().sum(-1)
    values = FULL.values(full_metrics(specification, logits.detach(), target, mask, channel))

    def total(x, where=True):
        return (x.detach() * weight)[(weight > 0) & where].sum().item()

    one = torch.ones_like(weight)
    assert values["dft/entropy"] == pytest.approx(total(t.H) / total(one))
    assert values["dft/collision"] == pytest.approx(total(collision) / total(one))
    assert values["dft/effective_tokens"] == pytest.approx(total(gate))
    for i in range(10):
        inside = (t.p >= i / 10) & (t.p < (i + 1) / 10)
        bounds = f"{i / 10}-{(i + 1) / 10}"
        assert values[f"dft/prob/{bounds}"] == pytest.approx(total(one, inside) / total(one))
        assert values[f"dft/gradient/{bounds}"] == pytest.approx(total(sent, inside) / total(sent))
    for name, numbers in {"other": (0, 3), "maths": (1,), "code": (2,)}.items():
        where = sum(channel == n for n in numbers).bool()
        assert values[f"dft/channel/{name}/tokens"] == total(one, where)
        for what, column in {"nll": t.l, "loss": loss, "prob": t.p}.items():
            assert values[f"dft/channel/{name}/{what}"] == pytest.approx(total(column, where) / total(one, where))


def test_histogram_puts_probability_of_one_in_last_bin():
    logits = torch.tensor([[200.0, 0.0], [0.0, 200.0]], dtype=torch.float64)
    values = FULL.values(full_metrics("nll", logits, torch.zeros(2, dtype=torch.int64), torch.ones(2)))
    assert (values["dft/prob/0.9-1.0"], values["dft/prob/0.0-0.1"]) == (0.5, 0.5)
    assert (values["dft/gradient/0.9-1.0"], values["dft/gradient/0.0-0.1"]) == (0.0, 1.0)


def test_full_metrics_sum_over_micro_batches_and_omit_empty_channels():
    case = (*make_case(), make_channels())
    parts = [full_metrics("dft", *(x[rows] for x in case)) for rows in (slice(0, 1), slice(1, 4))]
    torch.testing.assert_close(parts[0] + parts[1], full_metrics("dft", *case))
    nothing = full_metrics("dft", *(x[:0] for x in case))
    assert nothing.shape == parts[0].shape and not nothing.any()
    only_other = FULL.values(full_metrics("dft", *case[:3]))
    assert only_other["dft/channel/other/tokens"] == case[2][case[1] >= 0].sum()
    assert only_other["dft/channel/maths/tokens"] == 0 and "dft/channel/maths/nll" not in only_other


def test_nan_token_affects_only_its_channel():
    logits, target, mask = make_case()
    channel = make_channels()
    expected = full_metrics("dft", logits, target, mask, channel)
    logits[0, 3] = logits[0, 5] = torch.nan
    assert mask[0, 3] == 0.0 and target[0, 5] == -100
    assert torch.equal(full_metrics("dft", logits, target, mask, channel), expected)
    assert channel[0, 2] == 2 and mask[0, 2] == 1.0
    logits[0, 2] = torch.nan
    values = FULL.values(full_metrics("dft", logits, target, mask, channel))
    assert {name for name, value in values.items() if name.startswith("dft/channel") and value != value} == {
        f"dft/channel/code/{what}" for what in ("nll", "loss", "prob")
    }


def test_metric_spec_computes_only_requested_metrics():
    case = make_case()
    assert MetricSpec().names == () and full_metrics("dft", *case, of=MetricSpec()).shape == (0, 2)
    channels = MetricSpec(channels=("other", "maths"))
    assert channels.needs == frozenset() and FULL.needs == {ENTROPY, COLLISION}
    assert all(name.startswith("dft/channel/") for name in channels.names)
    assert full_metrics("dft", *case, of=channels).shape == (8, 2) and len(FULL.names) == 3 + 20 + 12
