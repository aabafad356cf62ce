"""tools/studies/real_model.py on a tiny model: every kind of run, resuming, verdicts, the check of the advisor."""

import json
import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from ranks import ROOT
from tiny_chat_model import write_tiny_llama

TOOLS = ROOT / "tools" / "studies"
sys.path.insert(0, str(TOOLS))
try:
    import dynamics_report
    import real_model as tool
    import real_model_report as report
finally:
    sys.path.remove(str(TOOLS))

SCHEDULE = "dft:start=1,ramp=1"
TINY = tool.Settings(
    seeds={"problems pretrained": 2, "problems trained": 1, "gsm8k pretrained": 1},
    swept_seeds=1,
    swept_tasks=("problems",),
    noise=(0.0, 0.5),
    objectives=("nll", "dft", SCHEDULE),
    rates=(1e-2, 2e-2),
    swept=("nll", "dft"),
    steps=2,
    batch=2,
    trained_examples=16,
    held_out=3,
    samples=2,
)
GSM8K = {"question": "{} apples and 2 more?", "answer": "{} + 2 = <<{}+2={}>>{} apples\n#### 1,00{}"}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A finished study."""
    out = tmp_path_factory.mktemp("real")
    write_tiny_llama(out / "model")
    for name in ("train", "test"):
        lines = [json.dumps({k: v.replace("{}", str(i)) for k, v in GSM8K.items()}) for i in range(24)]
        (out / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tool, "REPLY_TOKENS", {"problems": 3, "gsm8k": 3})
        patch.setattr(tool, "KNOWN_TOKENS", 3)
        study = tool.Study(TINY, out, out / "model", out, torch.device("cpu"), threads=1)
        yield study, tool.run_all(study, 1)


@pytest.mark.slow
def test_study_has_every_run_and_resumes(study, monkeypatch):
    study, results = study
    places = {("problems", "pretrained"): 2, ("problems", "trained"): 1, ("gsm8k", "pretrained"): 1}
    expected = {
        (*place, noise, name, rate, seed)
        for place, seeds in places.items()
        for noise in TINY.noise
        for name in TINY.objectives
        for rate in TINY.rates
        for seed in range(seeds if rate == TINY.rates[0] else 1)
        if rate == TINY.rates[0] or (name in TINY.swept and place[0] in TINY.swept_tasks)
    }
    found = [tuple(run[key] for key in tool.Run._fields) for run in results["runs"]]
    assert len(found) == len(expected) and set(found) == expected
    for run in results["runs"]:
        assert len(run["curve"]) == TINY.steps and len(run["greedy"]) == len(run["sampled"]) == TINY.held_out
        assert sum(run["histogram"]) == pytest.approx(1.0) and 0.0 < run["p"] < 1.0 and run["known"] > 0.0

    monkeypatch.setattr(tool, "finish", None)  # a run that is started again would fail
    assert tool.run_all(study, 1) == results


@pytest.mark.slow
def test_objectives_of_a_seed_have_the_same_first_batch_and_different_updates(study):
    _, results = study
    for setting in report.settings_of(results):
        for runs in zip(*(report.runs_at(results, setting, name) for name in TINY.objectives), strict=True):
            first, second = ([run["curve"][i]["nll"] for run in runs] for i in (0, 1))
            assert first[0] == first[1] == first[2]
            assert second[0] == second[2] != second[1]  # the schedule begins as nll
    same = report.runs_at(results, report.Setting("problems", "pretrained", 0.0), "nll")
    assert same[0]["curve"] != same[1]["curve"]  # another seed: other data


@pytest.mark.slow
def test_other_settings_in_the_same_folder_are_refused(study):
    study, _ = study
    other = tool.Study(replace(TINY, steps=3), study.out, study.model, study.gsm8k, torch.device("cpu"), threads=1)
    with pytest.raises(SystemExit, match="made with other settings; choose another --out"):
        tool.run_all(other, 1)


@pytest.mark.slow
def test_noise_swaps_replies_of_the_training_set_only(study):
    study, _ = study
    clean, noisy = (study.training_set("problems", noise, 0) for noise in (0.0, 0.5))
    assert sum(a != b for a, b in zip(clean, noisy, strict=True)) == len(clean) / 2
    start = study.training_set("problems", 0.0, None)
    assert not {tuple(e.ids) for e in start} & {tuple(e.ids) for e in clean}


@pytest.mark.slow
def test_page_has_a_table_per_setting_and_every_figure(study, tmp_path):
    _, results = study
    facts = {"device": "a CPU", "date": "today", "commit": "c", "torch": "2", "megatron_dft": "0", "model": "tiny"}
    results = dynamics_report.round_all({"facts": {**facts, "processes": 1, "threads": 1}, **results})
    places = dynamics_report.Places(tmp_path / "results.json", tmp_path / "page.md", tmp_path)
    report.write_page(results, places)
    text = places.page.read_text()
    for setting in report.settings_of(results):
        assert f"### {setting}\n" in text
    for name in report.FIGURES:
        assert f"]({'.'}/{name})" in text and (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert text.count("| facts, ") == 6 and "Hits: " in text


def test_gsm8k_is_read_without_calculator_marks(tmp_path):
    line = {"question": "q", "answer": "16 - 3 = <<16-3=13>>13 eggs\n13 * 100 = $<<13*100=1300>>1300\n#### 1,300"}
    (tmp_path / "x.jsonl").write_text(json.dumps(line) + "\n")
    (problem,) = tool.read_gsm8k(tmp_path / "x.jsonl")
    assert problem.reply == "16 - 3 = 13 eggs\n13 * 100 = $1300\nThe answer is 1300." and problem.answer == "1300"


def synthetic(sampled, start="pretrained"):
    """Results of one setting with wrong replies: exact match of 40 problems for each objective."""
    settings = {"seeds": {f"problems {start}": 1}, "noise": [0.4], "rates": [1.0], "swept_seeds": 1}
    settings["objectives"] = list(sampled)
    place = {"task": "problems", "start": start, "noise": 0.4, "rate": 1.0, "seed": 0}
    runs = [
        {**place, "objective": name, "sampled": [float(i < 40 * share) for i in range(40)]}
        for name, share in sampled.items()
    ]
    return {"settings": settings, "runs": runs}


@pytest.mark.parametrize(
    ("claim", "start", "sampled", "expected"),
    [
        (0, "pretrained", {"nll": 0.6, "dft": 0.2, SCHEDULE: 0.7}, "reproduced"),
        (0, "pretrained", {"nll": 0.2, "dft": 0.6, SCHEDULE: 0.7}, "not reproduced"),
        (0, "pretrained", {"nll": 0.625, "dft": 0.6, SCHEDULE: 0.7}, "not reproduced"),
        (0, "trained", {"nll": 0.6, "dft": 0.2, SCHEDULE: 0.7}, "not tested"),
        (1, "trained", {"nll": 0.2, "dft": 0.6, SCHEDULE: 0.7}, "reproduced"),
        (1, "trained", {"nll": 0.6, "dft": 0.2, SCHEDULE: 0.7}, "not reproduced"),
        (2, "pretrained", {"nll": 0.3, "dft": 0.1, SCHEDULE: 0.7}, "reproduced"),
        (2, "pretrained", {"nll": 0.7, "dft": 0.1, SCHEDULE: 0.3}, "not reproduced"),
    ],
)
def test_verdict_requires_a_significant_difference(claim, start, sampled, expected):
    judge = list(report.CLAIMS.values())[claim]
    assert report.verdict(judge(synthetic(sampled, start))) == expected


def test_winners_are_the_best_and_everything_not_significantly_below():
    values = {"nll": [1.0] * 20 + [0.0] * 20, "dft": [1.0] * 19 + [0.0] * 21, "deft": [0.0] * 40}
    assert report.best_and_ties(values) == ("nll", ["nll", "dft"])


def test_outcome_of_advice():
    case = report.Case("x", "dft", {"sampled": ["dft"], "greedy": ["nll"]}, ["nll", "dft"], 0)
    assert (report.outcome(case, "sampled"), report.outcome(case, "greedy")) == ("hit", "miss")
    assert report.outcome(case._replace(advice="deft"), "sampled") == "not tested"


@pytest.mark.skipif(not report.DOCS.numbers.exists(), reason="no committed study")
def test_docs_page_matches_committed_numbers(tmp_path):
    results, dynamics = (json.loads(p.numbers.read_text()) for p in (report.DOCS, dynamics_report.DOCS))
    assert report.page(results, dynamics, report.DOCS) == report.DOCS.page.read_text()
