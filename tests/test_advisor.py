"""python -m megatron_dft.advisor: dataset statistics and advice of a base model, in several layouts of Megatron."""

import json
import subprocess
import sys

import pytest

from megatron_dft.advisor import __main__ as advise

pytest.importorskip("matplotlib")

LINES = 12


def run(chat, checkpoint, name, *argv, ranks=1):
    """Run the advisor; returns advice.json, the printed output and the output folder."""
    out = chat.folder / name
    command = [sys.executable, "-m", "megatron_dft.advisor"]
    if ranks > 1:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command += ["-m", "megatron_dft.advisor"]
    command += ["examples/pretrain_gpt.py", "--device", "cpu", *chat.sft.split(), *checkpoint.split(), *argv]
    command += ["--loss-type", "dft", "--dft-channels", "addition,subtraction", "--global-batch-size", "4"]
    command += ["--advise-batches", str(LINES // 4), "--advise-out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((out / "advice.json").read_text()), done.stdout, out


@pytest.fixture(scope="module")
def one_rank(chat, checkpoint):
    """The results on one rank."""
    return run(chat, checkpoint, "one")


@pytest.mark.slow
@pytest.mark.host
def test_advise_matches_metrics_of_first_training_step(chat, checkpoint, one_rank):
    result, shown, out = one_rank
    shortened = "--lr 1e-9 --train-iters 1"
    for loss_type in ("dft", "deft"):
        curves = chat.curves(f"{chat.sft} {checkpoint} --loss-type {loss_type} {shortened} --global-batch-size {LINES}")
        assert result["mean_p"] == pytest.approx(curves["dft/prob"][0], rel=1e-5)
        assert result["nll"] == pytest.approx(curves["lm loss"][0], rel=1e-5)
        assert result["objectives"][loss_type]["gate_mass"] == pytest.approx(curves["dft/gate"][0], rel=1e-5)
        assert result["objectives"][loss_type]["loss"] == pytest.approx(curves["dft/loss"][0], rel=1e-5)
    expected = {"other": "shopping", "addition": "addition", "subtraction": "subtraction"}
    for name, topic in expected.items():
        assert result["channels"][name]["tokens"] == chat.tokens_of(topic, LINES)
    assert f"--loss-type {result['advice']['objective']}" in shown and (out / "advice.txt").read_text() in shown
    assert (out / "advice.png").stat().st_size > 20_000
    assert not list(chat.folder.glob("one/*.pt"))


@pytest.mark.slow
@pytest.mark.host
def test_advise_under_tp_and_pp_matches_one_rank(chat, checkpoint, one_rank):
    layout = ("--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2")
    many, _, _ = run(chat, checkpoint, "many", *layout, ranks=4)
    result, _, _ = one_rank
    assert many["tokens"] == result["tokens"]
    assert many["histogram"] == pytest.approx(result["histogram"])
    for name, found in result["objectives"].items():
        for what, value in found.items():
            assert many["objectives"][name][what] == pytest.approx(value, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], "expected --model FOLDER --data FILE, or SCRIPT"),
        (["nowhere.py"], "no script at 'nowhere.py'"),
        (["--advise-batches", "3"], "expected --model FOLDER --data FILE, or SCRIPT"),
        (["tests"], "tests: a folder, not a script; write --model tests --data FILE"),
        (["x.py", "--advise-objectives", "dtf"], "unknown objective 'dtf': .*did you mean 'dft'"),
        (["x.py", "--advise-batches", "0"], "--advise-batches: expected 1 or more, got 0"),
        (["x.py", "--full-validation"], "--full-validation conflicts with --advise-batches"),
    ],
)
def test_advise_rejects_invalid_arguments(argv, expected, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit, match=f"megatron_dft.advisor: {expected}"):
        advise.main(argv)


def test_advise_reports_missing_matplotlib_before_reading_script(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"advice\.png requires matplotlib, which is missing; pip install"):
        advise.main(["x.py"])


def test_advise_help_prints_usage(capsys):
    advise.main(["--help"])
    assert "--advise-batches N" in capsys.readouterr().out
