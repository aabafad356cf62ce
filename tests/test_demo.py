"""examples/demo.py with fewer steps: its output files, and a repeated run."""

import json
import sys

import pytest

pytest.importorskip("megatron.training")
pytest.importorskip("matplotlib")

import demo

STEPS = 12


@pytest.mark.slow
@pytest.mark.host
def test_demo_writes_summary_and_repeats_exactly(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["demo.py", "--out", str(tmp_path)])
    for name, value in {"BASE_STEPS": 24, "TUNE_STEPS": STEPS, "EVAL_STEPS": STEPS, "PARITY_STEPS": 2}.items():
        monkeypatch.setattr(demo, name, value)
    monkeypatch.setattr(demo, "TRAINING", demo.TRAINING.replace("--eval-iters 11", "--eval-iters 1"))

    runs = []  # arguments and curves of each run
    train = demo.Demo.train

    def recorded(self, name, **settings):
        runs.append((self, name, settings, train(self, name, **settings)))
        return runs[-1][-1]

    monkeypatch.setattr(demo.Demo, "train", recorded)
    demo.main()
    first = json.loads((tmp_path / "summary.json").read_text())
    for name, run in first["objectives"].items():
        assert run["steps"] == len(run["train_lm_loss"]) == STEPS
        assert 0.0 < run["valid_prob"] < 1.0 and 0.0 < run["valid_accuracy"] < 1.0 and run["valid_lm_loss"] > 0.0
        assert ("train_dft_loss" in run) == (name == "dft")
    nll, dft = (first["objectives"][name] for name in ("nll", "dft"))
    assert nll["train_lm_loss"][0] == dft["train_lm_loss"][0]  # from the same checkpoint
    assert nll["valid_lm_loss"] != dft["valid_lm_loss"]
    assert all(value < 1e-4 for key, value in first["tp_parity"].items() if key != "steps")
    assert {"torch", "megatron-core"} <= set(first["versions"])
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    assert "fine-tuned, dft" in capsys.readouterr().out
    again, name, settings, curves = runs[-1]
    repeated = train(again, name, **settings)  # in the folder of the first run
    assert all(repeated[tag] == curves[tag] for tag in ("lm loss", "dft/loss", "grad-norm"))
