"""The benchmark measures what it says, its gate closes, and the README shows what was measured."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / "tools"
SMALL = ["--device", "cpu", "--tokens", "64", "--vocab", "512", "272", "--masked", "0", "0.5", "--repetitions", "2"]
SMALL += ["--hidden", "16", "32", "--hidden-vocab", "300", "--hidden-masked", "0", "0.7"]
OURS = ["ours: dft", "ours: deft", "ours: masked", "ours: in chunks", "ours: all"]


def run(code, *arguments):
    """The benchmark in a process of its own, after `code`."""
    code = f"import sys, rivals\n{code}\nimport benchmark\nsys.exit(benchmark.main(sys.argv[1:]))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TOOLS), str(ROOT), *sys.path])}
    command = [sys.executable, "-c", code, *SMALL, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    pytest.importorskip("megatron.training")  # its losses take a process group
    path = tmp_path_factory.mktemp("benchmark") / "cpu.csv"
    rivals = "wrong = lambda x, t, group: rivals.ours('dft')()(x, t, group) * 1.2\n"
    rivals += "def missing(): raise ImportError('no such thing')\n"
    rivals += "rivals.IMPLEMENTATIONS |= {'a wrong rival': lambda: wrong, 'a missing rival': missing}\n"
    rivals += "wrong_head = lambda h, w, t, group: rivals.ours_from_hidden(True, True)()(h * 1.1, w, t, group)\n"
    rivals += "rivals.HEADS |= {'a wrong head, a rival': lambda: wrong_head}"
    out = run(rivals, "--only", *OURS, "Megatron unfused", "Megatron:", "F.", "rival", "--out", path)
    assert out.returncode == 0, out.stderr
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_benchmark_measures_every_combination_and_records_conditions(rows):
    timed = [row for row in rows if not row["note"] and not row["hidden"]]
    names = ["ours: dft", "ours: dft, out of place", "ours: deft", "Megatron unfused", "F.cross_entropy"]
    expected = {(name, vocab, masked) for name in names for vocab in ("512", "272") for masked in ("0.0", "0.5")}
    assert {(row["implementation"], row["vocab"], row["masked"]) for row in timed} == expected and len(timed) == 20
    for row in timed:
        assert float(row["total_ms"]) > 0.0 and float(row["forward_ms"]) > 0.0 and float(row["spread_ms"]) >= 0.0
        assert all(
            row[key] for key in ("device", "date", "commit", "torch", "megatron-core", "tokens", "copy_gb_per_s")
        )
        floor = 6 - 4 * float(row["masked"])
        moved = float(row["total_ms"]) * 1e-3 * float(row["copy_gb_per_s"]) * 1e9 / (64 * int(row["vocab"]))
        assert float(row["bytes_per_logit"]) == pytest.approx(moved, rel=0.02)
        assert float(row["share_of_floor"]) == pytest.approx(floor / moved, rel=0.05, abs=2e-3)


@pytest.mark.slow
def test_benchmark_measures_output_layer_with_loss(rows):
    heads = [row for row in rows if row["hidden"]]
    ours = {"masked tokens dropped", "masked tokens dropped, in chunks", "in chunks", "all the logits"}
    names = {f"ours: {way}" for way in ours} | {"Megatron: output layer, unfused", "F.linear_cross_entropy"}
    expected = {(name, hidden, masked) for name in names for hidden in ("16", "32") for masked in ("0.0", "0.7")}
    assert {(row["implementation"], row["hidden"], row["masked"]) for row in heads} == expected and len(heads) == 24
    for row in heads:
        assert (row["tokens"], row["dtype"], row["repetitions"], row["vocab"]) == ("64", "float32", "2", "300")
        assert float(row["total_ms"]) > 0.0 and float(row["gradient_error"]) < 1e-4


@pytest.mark.slow
def test_benchmark_counts_collectives_on_eight_ranks(rows):
    sent = {row["implementation"]: (row["collectives"], row["sent_bytes_per_token"]) for row in rows}
    assert sent["ours: dft"] == ("1", "12.0") and sent["ours: deft"] == ("1", "16.0")
    assert sent["Megatron unfused"] == ("3", "12.0")
    assert sent["F.cross_entropy"][0] == ""


@pytest.mark.slow
def test_benchmark_notes_wrong_and_missing_baselines(rows):
    notes = {row["implementation"]: row["note"] for row in rows if row["note"]}
    assert set(notes) == {
        "a wrong rival",
        "a missing rival",
        "a wrong head, a rival",
        "F.linear_cross_entropy, chunked",
    }
    assert "relative error of the gradient 2.0e-01" in notes["a wrong rival"]
    assert "wrong: relative error of the gradient" in notes["a wrong head, a rival"]
    assert "no such thing" in notes["a missing rival"]
    assert all(float(row["gradient_error"]) < 0.05 for row in rows if not row["note"])


@pytest.mark.slow
def test_benchmark_times_nothing_if_correctness_gate_fails(tmp_path):
    wrong = "right = rivals.ours('dft')()\n"
    wrong += "rivals.IMPLEMENTATIONS['ours: dft'] = lambda: lambda x, t, group: right(x, t, group) * 1.01"
    out = run(wrong, "--only", "ours: dft", "--out", tmp_path / "none.csv")
    assert out.returncode == 1 and "the correctness gate is closed" in out.stdout
    assert not (tmp_path / "none.csv").exists()


def report():
    sys.path.insert(0, str(TOOLS))
    try:
        import report
    finally:
        sys.path.remove(str(TOOLS))
    return report


def test_readme_matches_benchmark_results():
    written = report()
    text = (ROOT / "README.md").read_text()
    assert written.section() in text, "run: python tools/report.py"
    for path in written.RESULTS.glob("*.csv"):
        pictured = path in written.results() and written.of_logits(written.read(path))
        assert path.name in text and (path.with_suffix(".png").exists() or not pictured)


@pytest.mark.slow
def test_report_table_lists_times_ratios_and_missing_baselines(rows):
    written = report()
    text = written.part(rows, written.RESULTS / "some.csv")
    assert "| Megatron unfused | " in text
    assert "a missing rival: not installed (no such thing)" in written.missing(rows)
    ours = next(
        row for row in rows if (row["implementation"], row["vocab"], row["masked"]) == ("ours: dft", "512", "0.0")
    )
    assert f"| ours: dft | {float(ours['total_ms']):.3g} (1.00x) |" in text
    assert "| H = 32, V = 300 | 0% masked | 70% masked |" in text
    stock, dropped = (
        next(r for r in rows if (r["implementation"], r["hidden"], r["masked"]) == (name, "32", "0.7"))
        for name in ("Megatron: output layer, unfused", "ours: masked tokens dropped")
    )
    ratio = float(dropped["total_ms"]) / float(stock["total_ms"])
    assert f" | {float(dropped['total_ms']):.0f} ({ratio:.2f}) |" in text
    gpu = [{**row, "device": "NVIDIA H200"} for row in rows]
    assert "TP = 8, projected" in written.part(gpu, written.RESULTS / "some.csv")


def test_report_tp8_projection_matches_formula():
    row = {"collectives": "3", "sent_bytes_per_token": "12.0", "tokens": "8192", "total_ms": "1.0"}
    assert report().projected(row) == f"{1.0 + 0.060 + 12 * 8192 * 7 / 400e9 * 1e3:.2f}"
