"""DatasetStatistics and recommend: sums match the formulas, and the advice follows from them."""

from dataclasses import replace

import pytest
import torch
from formulas import FORMULAS, example, token

from megatron_dft import parse_objective
from megatron_dft.advisor.statistics import DatasetStatistics, recommend
from megatron_dft.metrics import TokenBatch
from megatron_dft.ops.stats import COLLISION, ENTROPY
from megatron_dft.ops.vocab_parallel import LossOptions, loss_and_stats


def make_batch(rows=slice(None)):
    logits, target, _ = example(4, 6)
    mask = (torch.arange(24).view(4, 6) % 3 != 0).float()
    options = LossOptions(objective=parse_objective("nll"), statistics=frozenset({ENTROPY, COLLISION}))
    logits, target, mask = logits[rows], target[rows], mask[rows]
    _, stats = loss_and_stats(logits, target, options)
    channel = (torch.arange(24).view(4, 6) % 2)[rows]
    return logits, target, TokenBatch(stats, mask, channel, training=False)


def statistics_of(names, *batches, channels=("other", "maths")):
    statistics = DatasetStatistics([parse_objective(name) for name in names], channels)
    for batch in batches:
        statistics.add(batch)
    return statistics.result(statistics.totals(torch.device("cpu")))


OF_ONE_TOKEN = [name for name in FORMULAS if not name.startswith(("cayley", "talr")) and ",k=4" not in name]


@pytest.mark.parametrize("name", OF_ONE_TOKEN)
def test_dataset_statistics_of_objective_match_formula(name):
    logits, target, batch = make_batch()
    result = statistics_of(["nll", name], batch)
    t = token(logits.requires_grad_(), target)
    live = (batch.loss_mask > 0) & t.valid
    loss = FORMULAS[name](t)
    (to_logits,) = torch.autograd.grad(loss.sum(), logits, retain_graph=True)
    (error,) = torch.autograd.grad(t.l.sum(), logits)
    sent, whole = to_logits.norm(dim=-1)[live], error.norm(dim=-1)[live]
    found = result["objectives"][str(parse_objective(name))]
    assert found["loss"] == pytest.approx(loss[live].mean().item())
    assert found["gate_mass"] == pytest.approx((sent / whole).mean().item())
    assert found["effective_tokens"] == pytest.approx((sent / whole).sum().item())
    assert found["gradient"] == pytest.approx((sent.sum() / whole.sum()).item())
    low = sent[t.p[live] < 0.1].sum() / sent.sum().clamp(min=1e-300)
    assert found["gradient_by_p"][0] == pytest.approx(low.item())


def test_dataset_statistics_are_counted_by_channel_and_additive():
    logits, target, batch = make_batch()
    result = statistics_of(["nll", "dft"], batch)
    parts = statistics_of(["nll", "dft"], make_batch(slice(0, 1))[2], make_batch(slice(1, 4))[2])
    p = logits.softmax(-1).gather(-1, target.clamp(min=0)[..., None])[..., 0]
    live = (batch.loss_mask > 0) & (target >= 0)
    assert (result["tokens"], result["mean_p"]) == (live.sum(), pytest.approx(p[live].mean().item()))
    for number, name in enumerate(("other", "maths")):
        of_channel = live & (batch.channel == number)
        found = result["channels"][name]
        assert (found["tokens"], found["mean_p"]) == (of_channel.sum(), pytest.approx(p[of_channel].mean().item()))
        assert found["accuracy"] == pytest.approx((logits.argmax(-1) == target)[of_channel].double().mean().item())
        assert sum(found["histogram"]) == pytest.approx(1.0)
        assert found["histogram"][0] == pytest.approx((p[of_channel] < 0.1).double().mean().item())
    assert parts["mean_p"] == pytest.approx(result["mean_p"])
    for name, value in result["objectives"]["dft"].items():
        assert parts["objectives"]["dft"][name] == pytest.approx(value)


def test_dataset_statistics_without_tokens_have_zero_totals_and_raise():
    statistics = DatasetStatistics([parse_objective("nll"), parse_objective("dft")], ("other", "maths"))
    nothing = statistics.totals(torch.device("cpu"))
    statistics.add(make_batch()[2])
    assert nothing.shape == statistics.totals(torch.device("cpu")).shape and not nothing.any()
    with pytest.raises(ValueError, match="no token of the data is in the loss"):
        statistics.result(nothing)


def test_dataset_statistics_exclude_masked_tokens():
    _, _, batch = make_batch()
    expected = statistics_of(["nll", "dft"], batch)
    broken = batch.stats.logprob.masked_fill(batch.loss_mask == 0, torch.nan)
    assert statistics_of(["nll", "dft"], replace(batch, stats=replace(batch.stats, logprob=broken))) == expected
    no_channels = replace(batch, channel=None)
    assert statistics_of(["nll"], no_channels, channels=())["channels"]["all"]["tokens"] == expected["tokens"]


def numbers(accuracy, mean_p, tokens=10_000):
    every = {"tokens": tokens, "accuracy": accuracy, "mean_p": mean_p, "histogram": [1.0 - mean_p, *[0.0] * 9]}
    nll = {"gate_mass": 1.0, "gradient_by_p": [0.9, *[0.0] * 9]}
    return every, {"nll": nll}


@pytest.mark.parametrize(
    ("accuracy", "mean_p", "expected"),
    [
        *((0.99, 0.97, "dft"), (0.94, 0.7, "dft")),
        *((0.8, 0.7, "dft:start=10,ramp=10"), (0.3, 0.2, "dft:start=10,ramp=10")),
        *((0.0, 0.05, "nll"), (0.95, 0.05, "nll")),
    ],
)
def test_advice_depends_on_top1_accuracy_and_mean_p(accuracy, mean_p, expected):
    every, objectives = numbers(accuracy, mean_p)
    found = recommend(every, {}, objectives, steps=32)
    assert found["objective"] == expected
    parse_objective(expected)
    assert f"top-1 accuracy is {accuracy:.2f}, mean p {mean_p:.2f}" in found["reasons"][0]
    assert "90% of nll's gradient" in found["reasons"][0]
    assert any(reason.startswith("optimized: exact match of sampled replies") for reason in found["reasons"])
    assert not any("thin evidence" in reason or "close to a limit" in reason for reason in found["reasons"])


def test_advice_without_number_of_steps_says_how_to_give_it():
    every, objectives = numbers(0.7, 0.6)
    found = recommend(every, {}, objectives)
    assert found["objective"] == "dft:start=N/3,ramp=N/3"
    assert "repeat with --train-iters STEPS" in found["reasons"][0]


@pytest.mark.parametrize(("accuracy", "mean_p"), [(0.89, 0.8), (0.91, 0.8), (0.4, 0.11), (0.4, 0.09)])
def test_advice_near_a_limit_says_so(accuracy, mean_p):
    every, objectives = numbers(accuracy, mean_p)
    assert any("close to a limit" in reason for reason in recommend(every, {}, objectives)["reasons"])


def test_advice_from_few_tokens_says_so():
    every, objectives = numbers(0.99, 0.9, tokens=1999)
    assert any("thin evidence: 1999 tokens in the loss" in r for r in recommend(every, {}, objectives)["reasons"])


def test_advice_names_channels_that_suit_another_objective():
    every, objectives = numbers(0.95, 0.9)
    channels = {"maths": {"accuracy": 0.97, "mean_p": 0.9}, "law": {"accuracy": 0.1, "mean_p": 0.02}}
    reasons = recommend(every, channels, objectives)["reasons"]
    assert "channel law (top-1 accuracy 0.10, mean p 0.02) differs: for it alone the rules give nll" in reasons
    assert not any("maths" in reason for reason in reasons)
    every, objectives = numbers(0.7, 0.5)
    reasons = recommend(every, {"maths": channels["maths"]}, objectives)["reasons"]
    assert any("channel maths" in reason and "rules give dft" in reason for reason in reasons)
