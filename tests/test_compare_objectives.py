"""The comparison of objectives: its measurements, its verdicts, and its page of the documentation."""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_dft.ops.objectives import parse_objective
from megatron_dft.ops.vocab_parallel import vocab_parallel_dft_loss, vocab_stats

pytest.importorskip("matplotlib")
ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / "tools" / "studies"
sys.path.insert(0, str(TOOLS))
try:
    import compare_objectives as tool
    import dynamics_report as report
finally:
    sys.path.remove(str(TOOLS))

TASKS = list(itertools.product(report.PRIORS, report.TARGETS))
TINY = tool.Settings(words=8, relations=2, width=8, base_steps=5, steps=4, batch=16, every=2)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The output folder of compare_objectives.py --quick."""
    folder = tmp_path_factory.mktemp("dynamics")
    command = [sys.executable, str(TOOLS / "compare_objectives.py"), "--quick", "--out", str(folder)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "14/14 jobs" in done.stdout and "| 5. deft is between dft and nll | " in done.stdout
    return folder


@pytest.fixture(scope="module")
def results(out):
    return json.loads((out / "results.json").read_text())


@pytest.mark.nightly
def test_report_contains_every_figure(out):
    text = (out / "report.md").read_text()
    assert set(re.findall(r"\]\(figures/(\S+)\)", text)) == set(report.FIGURES)
    for name in report.FIGURES:
        data = (out / "figures" / name).read_bytes()
        assert data.startswith(b"\x89PNG") and 2000 < len(data) < 120_000, name


@pytest.mark.nightly
def test_results_contain_every_combination_and_conditions(results):
    settings = results["settings"]
    every = settings["objectives"] + settings["further"]
    expected = {(*task, o, 1.0, s) for task in TASKS for o in every for s in range(2)}
    expected |= {(*task, o, 3.0, s) for task in TASKS for o in ("nll", "dft") for s in range(2)}
    keys = ("prior", "targets", "objective", "factor", "seed")
    assert {tuple(run[key] for key in keys) for run in results["runs"]} == expected
    assert len(results["runs"]) == len(expected)
    assert all(results["facts"][key] for key in ("device", "date", "commit", "torch", "megatron_dft", "seconds"))


@pytest.mark.nightly
def test_priors_have_mean_p_in_stated_range(results):
    assert len(results["priors"]) == 6
    for row in results["priors"]:
        low, high = {"strong": (0.5, 1.0), "middle": (0.1, 0.5), "weak": (0.0, 0.1)}[row["prior"]]
        assert low < row["p"] < high
        # 40% of the targets are wrong. The base model assigns them a low probability.
        assert row["prior"] == "weak" or 0.5 * row["p"] < row["p of noisy targets"] < 0.8 * row["p"]


@pytest.mark.nightly
def test_objectives_start_from_same_weights_per_seed(results):
    first = {}
    for run in results["runs"]:
        if run["factor"] == 1.0 and run["objective"] in results["settings"]["objectives"]:
            first.setdefault((run["prior"], run["targets"], run["seed"]), []).append(run["first"])
    for starts in first.values():
        for key in ("train nll", "held-out nll", "train p"):
            assert len({start[key] for start in starts}) == 1 and len(starts) == 4
    assert first["strong", "clean", 0][0]["train nll"] != first["strong", "clean", 1][0]["train nll"]


@pytest.mark.nightly
def test_dft_and_prob_runs_are_equal_and_nll_differs(results):
    assert len(results["same"]) == 12
    assert max(max(row["weights"], row["curves"]) for row in results["same"]) <= 1e-6
    for task in TASKS:
        last = {
            name: [run["last"]["train nll"] for run in report.pick(results, *task, name)]
            for name in ("dft", "prob", "nll")
        }
        assert last["dft"] == last["prob"] != last["nll"]


def test_same_returns_weight_and_curve_differences():
    point = {"train nll": 1.0, "train objective": 0.3}
    weights = {"dft": torch.zeros(3), "prob": torch.tensor([0.0, 0.0, -0.5])}
    found = tool.same(weights, {"dft": [point], "prob": [{**point, "train nll": 1.25, "train objective": 0.9}]}, {})
    assert found == {"weights": 0.5, "curves": 0.25}  # values of the objectives may differ


@pytest.mark.nightly
def test_gradient_shares_sum_to_one_and_nll_favors_low_p(results):
    for task in TASKS:
        for name in results["settings"]["objectives"]:
            for run in report.pick(results, *task, name):
                for when in ("before", "after"):
                    assert sum(run[when]["share"]) == pytest.approx(1.0, abs=2e-3)
                    assert len(run[when]["share"]) == 10 and run[when]["variance"] > 0.0
    nll, dft = (report.pick(results, "strong", "noisy", name)[0]["before"]["share"][0] for name in ("nll", "dft"))
    assert nll > 2 * dft


def test_gradient_share_is_binned_by_p():
    p = torch.tensor([0.05, 0.55, 0.55, 1.0], dtype=torch.float64)
    collision = p**2 + (1 - p) ** 2  # with two answers, so the gradient norm of nll is sqrt(2) (1-p)
    stats = tool.TokenStats(p.log(), torch.ones(4, dtype=torch.bool), collision=collision)
    share = tool.gradient_share(parse_objective("nll"), stats)
    assert share == pytest.approx([0.95 / 1.85, 0, 0, 0, 0, 0.9 / 1.85, 0, 0, 0, 0.0])


@pytest.mark.parametrize("name", ["nll", "dft", "prob", "tsallis:q=0.5", "deft", "cayley", "focal", "entropy", "luffy"])
def test_token_gradient_norm_matches_autograd(name):
    generator = torch.Generator().manual_seed(1)
    logits = 3.0 * torch.randn(20, 7, generator=generator, dtype=torch.float64)
    logits[0, 0] = 12.0
    target = torch.randint(7, (20,), generator=generator)
    target[0] = 0  # p near 1
    logits.requires_grad_()
    vocab_parallel_dft_loss(logits, target, objective=name).sum().backward()
    norms = tool.token_gradient(parse_objective(name), vocab_stats(logits, target))
    torch.testing.assert_close(norms, logits.grad.norm(dim=-1), rtol=1e-9, atol=1e-12)


def tiny(prior="middle", targets="noisy"):
    world = tool.make_world(TINY, 0)
    torch.manual_seed(0)
    return tool.Model(TINY.words, TINY.width), tool.make_task(TINY, world, 0, prior, targets)


def test_gradient_variance_matches_definition():
    model, task = tiny()
    rows = torch.arange(len(task.train[0]))
    whole = tool.replace(task, batches=rows.expand(2, -1))
    assert tool.gradient_variance(model, whole, parse_objective("nll"), 2) < 1e-10
    single = tool.replace(task, batches=rows[:, None])
    squares, mean = [], 0.0
    for row in rows:
        loss = torch.nn.functional.cross_entropy(model(task.train[0][row : row + 1]), task.train[1][row : row + 1])
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
        squares.append(gradient.square().sum().item())
        mean = mean + gradient / len(rows)
    signal = mean.square().sum().item()
    expected = (sum(squares) / len(squares) - signal) / signal
    assert tool.gradient_variance(model, single, parse_objective("nll"), len(rows)) == pytest.approx(expected, rel=1e-4)


def test_make_world_satisfies_documented_properties():
    world = tool.make_world(tool.Settings(), 0)
    a, b, c = world.answers
    assert not ((a == b) | (a == c) | (b == c)).any()
    torch.testing.assert_close(world.share.sum(0), torch.ones(1024))
    assert set(world.train.tolist()) | set(world.held_out.tolist()) == set(range(1024))
    assert len(world.train) + len(world.held_out) == 1024 and len(world.held_out) == 205
    assert 0.3 < (world.given[0] != a).float().mean() < 0.45
    same_fact = (world.questions[:, 0] == 3) & (world.questions[:, 1] % 4 == 2)
    assert len(set(a[same_fact].tolist())) == 1 and same_fact.sum() == 8
    clean, noisy = (tool.make_task(tool.Settings(), world, 0, "strong", targets) for targets in report.TARGETS)
    assert torch.equal(clean.batches, noisy.batches) and torch.equal(noisy.held_out[1], a[world.held_out])
    assert torch.equal(clean.train[1], a[world.train]) and not torch.equal(noisy.train[1], a[world.train])


def test_fine_tune_advances_schedule():
    model, task = tiny()
    base = {key: value.clone() for key, value in model.state_dict().items()}
    names = ("nll", "dft", "dft:start=1000", "dft:start=0")
    runs = {name: tool.fine_tune(model, base, task, parse_objective(name), TINY, 1.0) for name in names}
    last = {name: points[-1]["train nll"] for name, points in runs.items()}
    assert last["dft:start=1000"] == last["nll"] != last["dft"] == last["dft:start=0"]
    assert all(len(points) == 3 for points in runs.values())


def test_base_job_raises_without_expected_prior(tmp_path):
    with pytest.raises(RuntimeError, match=r"seed 0: expected a strong prior, a mean p between 0.5 and 1.0, got 0.1"):
        tool.base_job(TINY, 0, tmp_path / "base.pt")


def test_split_objectives_keeps_commas_of_parameters():
    assert tool.split_objectives("nll,threshold:lo=0.1,base=prob,deft,nll") == (
        "nll",
        "threshold:lo=0.1,base=prob",
        "deft",
    )
    with pytest.raises(ValueError, match="did you mean 'dft'"):
        tool.split_objectives("nll,dtf")
    with pytest.raises(SystemExit, match="expected --seeds of 2 or more"):
        tool.main(["--seeds", "1"])


# ---- Verdicts on synthetic results -------------------------------------------------------------------------------


def synthetic(accuracy, nll_rise=1.0, dft_rise=-0.1, apart=0.0):
    """Synthetic results of four seeds. `accuracy` maps (prior, targets, objective) to a mean; the default is 0.5."""
    jitter = (-0.01, 0.0, 0.0, 0.01)
    names = ("nll", "dft", "prob", "deft")
    runs = []
    for (prior, targets), name, factor, seed in itertools.product(TASKS, names, (1.0, 3.0), range(4)):
        mean = accuracy.get((prior, targets, name, factor), accuracy.get((prior, targets, name), 0.5))
        # Seeds differ more than objectives, so the verdicts must compare pairs of the same seed.
        value = mean + seed + jitter[(seed + names.index(name)) % 4]
        run = {"prior": prior, "targets": targets, "objective": name, "factor": factor, "seed": seed}
        first = {"train nll": 2.0, "train objective": 0.2}
        last = {"train nll": 2.0 + nll_rise + jitter[seed], "train objective": 0.2 + dft_rise + jitter[seed]}
        runs.append({**run, "first": first, "last": {"held-out accuracy": value, **last}})
    settings = {"objectives": names, "factors": [1.0, 3.0]}
    return {"settings": settings, "runs": runs, "same": [{"weights": apart, "curves": 0.0}]}


def verdict(claim, results):
    return next(row["verdict"] for row in report.verdicts(results) if row["claim"] == claim)


WINS = {("strong", "noisy", "dft"): 0.6, ("weak", "clean", "nll"): 0.6, ("weak", "noisy", "nll"): 0.6}


def test_verdict_requires_significant_difference():
    assert [verdict(i, synthetic(WINS)) for i in (1, 2)] == ["reproduced"] * 2
    assert [verdict(i, synthetic({})) for i in (1, 2)] == ["not reproduced"] * 2
    assert verdict(1, synthetic({("strong", "noisy", "dft"): 0.4})) == "not reproduced"
    assert verdict(1, synthetic({("strong", "noisy", "dft"): 0.505})) == "not reproduced"  # within the standard error
    assert verdict(2, synthetic({**WINS, ("weak", "noisy", "nll"): 0.5})) == "not reproduced"


def test_verdict_uses_best_learning_rate_of_each_objective():
    assert verdict(1, synthetic({**WINS, ("strong", "noisy", "nll", 3.0): 0.6})) == "not reproduced"
    assert verdict(1, synthetic({**WINS, ("strong", "noisy", "nll", 3.0): 0.55})) == "reproduced"
    assert report.best_factor(synthetic(WINS), "strong", "noisy", "nll") == 1.0  # the smaller of equal ones
    assert report.best_factor(synthetic({("weak", "clean", "nll", 3.0): 0.6}), "weak", "clean", "nll") == 3.0


def test_verdict_detects_equal_runs_and_rising_nll():
    assert verdict(3, synthetic({})) == "reproduced"
    assert verdict(3, synthetic({}, apart=1e-3)) == "not reproduced"
    assert verdict(4, synthetic({})) == "reproduced"
    assert verdict(4, synthetic({}, nll_rise=-0.1)) == "not reproduced"
    assert verdict(4, synthetic({}, nll_rise=0.005)) == "not reproduced"
    assert verdict(4, synthetic({}, dft_rise=0.1)) == "not reproduced"


def test_between_requires_difference_from_both_ends():
    inside = {**WINS, ("strong", "noisy", "deft"): 0.55}
    inside |= {("weak", targets, "deft"): 0.55 for targets in report.TARGETS}
    assert verdict(5, synthetic(inside)) == "reproduced"
    assert verdict(5, synthetic({**inside, ("strong", "noisy", "deft"): 0.7})) == "not reproduced"
    assert verdict(5, synthetic({})) == "not reproduced"  # the ends do not differ
    low, middle, high = ([x + 0.01 * i for i in (0, 1, 0, -1)] for x in (0.3, 0.5, 0.7))
    shifted = [x + 0.01 * i for x, i in zip(high, (3, -2, -1, 1), strict=True)]
    assert report.between(low, middle, high) == report.between(high, middle, low) == "between"
    assert report.between(low, high, middle) == report.between(middle, high, low) == "above both"
    assert report.between(high, low, middle) == "below both"
    assert report.between(low, shifted, high) == "within error of nll or dft"
    assert report.between(high, low, shifted) == "nll and dft do not differ"


def test_verdict_is_not_tested_without_objective():
    results = synthetic(WINS)
    results["settings"]["objectives"] = ("nll", "dft")
    assert [row["verdict"] for row in report.verdicts(results)] == [
        "reproduced",
        "reproduced",
        "not tested",
        "reproduced",
        "not tested",
    ]


# ---- Committed results ------------------------------------------------------------------------------------------


@pytest.mark.nightly
def test_docs_page_and_verdicts_match_results(out, results):
    places = report.Places(out / "results.json", out / "report.md", out / "figures")
    committed = json.loads(report.DOCS.numbers.read_text())
    for numbers, where in ((results, places), (committed, report.DOCS)):
        again = f"run: python tools/studies/compare_objectives.py --docs --from {where.numbers}"
        assert report.round_all(report.verdicts(numbers)) == numbers["verdicts"], again
        assert report.page(numbers, where) == where.page.read_text(), again
        assert all((where.figures / name).exists() for name in report.FIGURES), again
    assert committed["settings"] == report.round_all(tool.asdict(tool.Settings())), "run: compare_objectives.py --docs"


def test_labels_carry_the_nll_of_the_base_model():
    world = tool.make_world(TINY, 0)
    base = tool.pretrain(TINY, world, 0)
    task = tool.make_task(TINY, world, 0, "strong", "noisy")
    for plain, labelled in (
        (task.train, tool.referenced(task, base).train),
        (task.held_out, tool.referenced(task, base).held_out),
    ):
        ids, logprob = tool.split_reference(labelled[1])
        assert torch.equal(ids, plain[1]) and torch.equal(labelled[0], plain[0])
        nll = torch.nn.functional.cross_entropy(base(plain[0]), plain[1], reduction="none").detach()
        torch.testing.assert_close(-logprob, nll, rtol=1e-3, atol=1e-4)
    assert tool.evaluate(base, tool.referenced(task, base), parse_objective("iw"))["train nll"] == pytest.approx(
        tool.evaluate(base, task, parse_objective("nll"))["train nll"]
    )
