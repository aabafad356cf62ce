"""examples/demo.py with a tiny model: every part, its files, and its verdicts."""

import json
import sys

import pytest

pytest.importorskip("megatron.training")
pytest.importorskip("transformers")
pytest.importorskip("pyarrow")
pytest.importorskip("matplotlib")

import demo
import smollm2
from tiny_chat_model import write_tiny_llama

STEPS = 3


@pytest.mark.slow
@pytest.mark.host
@pytest.mark.timeout(900)
def test_demo_runs_every_part_and_writes_its_files(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["demo.py", "--out", str(tmp_path)])
    monkeypatch.setattr(smollm2, "write_folder", write_tiny_llama)
    changes = {"STEPS": STEPS, "BATCH": 2, "HELD_OUT": 4, "SAMPLES": 1, "SEQ_LENGTH": 512, "REPLY_TOKENS": 4}
    training = demo.TRAINING.replace("--seq-length 768", "--seq-length 512").replace(
        "--train-iters 30", "--train-iters 3"
    )
    for name, value in {**changes, "TRAINING": training}.items():
        monkeypatch.setattr(demo, name, value)
    demo.main()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["advised"] == "nll"  # the tiny model knows nothing
    assert set(summary["models"]) == {"the model as it comes", "fine-tuned, nll"}
    for row in summary["models"].values():
        assert len(row["greedy"]) == len(row["sampled"]) == len(row["replies"]) == 4 and row["nll"] > 0.0
    assert len(summary["curves"]["nll"]["lm loss"]) == STEPS
    assert all(value < 1e-4 for value in summary["tp_parity"].values()) and len(summary["tp_parity"]) == 3
    assert len(summary["seconds"]) == 7
    assert (tmp_path / "comparison.png").stat().st_size > 10_000
    assert (tmp_path / "hf" / "nll" / "config.json").is_file()
    shown = capsys.readouterr().out
    assert (tmp_path / "summary.txt").read_text() in shown and "7. Evaluation" in shown and " s in all" in shown


def results(**sampled):
    """Exact match of 40 problems of each model, after the start."""
    names = {"start": 0.0, **sampled}
    return {
        name: {"nll": 1.0 - share, "greedy": [0.0] * 40, "sampled": [float(i < 40 * share) for i in range(40)]}
        for name, share in names.items()
    }


def test_verdicts_name_a_winner_only_beyond_two_standard_errors():
    lines = demo.verdicts(results(nll=0.3, dft=0.8))
    assert lines[0].startswith("greedy exact match: no winner")
    assert lines[1].startswith("exact match of sampled replies: dft leads nll (+0.50")
    assert lines[2] == "NLL of the correct replies: lowest with dft"
    assert "nll leads dft" in demo.verdicts(results(nll=0.8, dft=0.3))[1]
    assert "no winner between" in demo.verdicts(results(nll=0.5, dft=0.55))[1]


def test_largest_difference_is_relative_and_of_the_common_steps():
    assert demo.largest_difference([2.0, 3.0], [2.0, 4.0, 9.0]) == 0.25
