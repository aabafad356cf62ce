"""The benchmark of the loss: its rows, its correctness gate, and the README tables that are made from them."""

import csv
import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_dft import linear_dft_loss

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / "tools" / "benchmarks"
SMALL = ["--device", "cpu", "--tokens", "64", "--vocab", "512", "272", "--masked", "0", "0.5", "--repetitions", "2"]
SMALL += ["--hidden", "16", "32", "--hidden-vocab", "300", "--hidden-masked", "0", "0.7"]
OURS = ["ours: dft", "ours: deft", "ours: masked", "ours: linear-fused", "ours: materialized"]


def run(code, *arguments):
    """Run the benchmark in its own process, after `code`."""
    code = f"import sys, baselines\n{code}\nimport benchmark_loss\nsys.exit(benchmark_loss.main(sys.argv[1:]))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TOOLS), str(ROOT), *sys.path])}
    command = [sys.executable, "-c", code, *SMALL, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    pytest.importorskip("megatron.training")  # its losses need a process group
    path = tmp_path_factory.mktemp("benchmark") / "cpu.csv"
    extra = "wrong = lambda x, t, group: baselines.ours('dft')()(x, t, group) * 1.2\n"
    extra += "def missing(): raise ImportError('no such thing')\n"
    extra += "def broken(): raise TypeError('no such type')\n"
    extra += "baselines.IMPLEMENTATIONS |= {'a wrong baseline': lambda: wrong, 'a missing baseline': missing}\n"
    extra += "baselines.IMPLEMENTATIONS |= {'a broken baseline': broken}\n"
    extra += "dft = baselines.ours_from_hidden(True, True)()\n"
    extra += "wrong_head = lambda h, w, t, group: dft(h * 1.1, w, t, group)\n"
    extra += "nll = lambda h, w, t, group: baselines.F.cross_entropy(h @ w.t(), t, reduction='none')\n"
    extra += "def failing(h, w, t, group):\n    assert (t == -100).float().mean() < 0.6, 'few tokens'\n"
    extra += "    return dft(h, w, t, group)\n"
    extra += (
        "heads = {'a wrong head': wrong_head, 'NLL': nll, 'NLL (NLL)': nll, 'DFT (NLL)': dft, 'failing': failing}\n"
    )
    extra += "baselines.HEADS |= {f'baseline {name}': lambda head=head: head for name, head in heads.items()}"
    out = run(extra, "--only", *OURS, "Megatron unfused", "Megatron:", "F.", "baseline", "--out", path)
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
        minimum = 6 - 4 * float(row["masked"])
        moved = float(row["total_ms"]) * 1e-3 * float(row["copy_gb_per_s"]) * 1e9 / (64 * int(row["vocab"]))
        assert float(row["bytes_per_logit"]) == pytest.approx(moved, rel=0.02)
        assert float(row["share_of_floor"]) == pytest.approx(minimum / moved, rel=0.05, abs=2e-3)


@pytest.mark.slow
def test_benchmark_measures_output_layer_with_loss(rows):
    heads = [row for row in rows if row["hidden"]]
    chunks = {f"{prefix}linear-fused" for prefix in ("", "masked tokens removed, ")}
    ours = {"masked tokens removed", "materialized logits", *chunks, *(f"{x}, gradient in forward" for x in chunks)}
    names = {f"ours: {variant}" for variant in ours}
    names |= {"Megatron: output layer, unfused", "F.linear_cross_entropy", "baseline NLL (NLL)"}
    expected = {(name, hidden, masked) for name in names for hidden in ("16", "32") for masked in ("0.0", "0.7")}
    expected |= {("baseline failing", hidden, "0.0") for hidden in ("16", "32")}
    assert {(row["implementation"], row["hidden"], row["masked"]) for row in heads} == expected and len(heads) == 38
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
        "a wrong baseline",
        "a missing baseline",
        "a broken baseline",
        "baseline a wrong head",
        "baseline NLL",
        "baseline DFT (NLL)",
        "baseline failing",
        "F.linear_cross_entropy, chunked",
    }
    assert "relative error of the gradient 2.0e-01" in notes["a wrong baseline"]
    for name in ("a wrong head", "NLL", "DFT (NLL)"):
        assert "wrong: relative error of the gradient" in notes[f"baseline {name}"]
    assert "no such thing" in notes["a missing baseline"]
    assert notes["baseline failing"] == "H = 32, V = 300, 70% masked: failed: AssertionError: few tokens"
    assert notes["a broken baseline"] == "failed to import: TypeError: no such type"
    assert all(float(row["gradient_error"]) < 0.05 for row in rows if not row["note"])


@pytest.mark.slow
def test_benchmark_times_nothing_if_correctness_gate_fails(tmp_path):
    wrong = "right = baselines.ours('dft')()\n"
    wrong += "baselines.IMPLEMENTATIONS['ours: dft'] = lambda: lambda x, t, group: right(x, t, group) * 1.01"
    out = run(wrong, "--only", "ours: dft", "--out", tmp_path / "none.csv")
    assert out.returncode == 1 and "the correctness gate failed" in out.stdout
    assert not (tmp_path / "none.csv").exists()


def tool(name):
    sys.path.insert(0, str(TOOLS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(TOOLS))


def report():
    return tool("report")


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda known: known.trl_from_hidden(compact=False), id="TRL on a CPU"),
        pytest.param(lambda known: known.trl_from_hidden(compact=True), id="TRL on a GPU"),
        pytest.param(lambda known: known.liger_scaled_from_hidden, id="Liger scaled linear, PyTorch"),
        pytest.param(lambda known: known.torch_from_hidden(chunks=False), id="F.linear_cross_entropy"),
    ],
)
def test_head_on_cpu_matches_linear_dft_loss(make):
    try:
        head = make(tool("baselines"))()
    except ImportError as error:
        pytest.skip(str(error))
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=generator, requires_grad=True) for n in (24, 48))
    target = torch.randint(48, (24,), generator=generator)
    target[:7] = target[20] = -100
    upstream = torch.rand(24, generator=generator)
    loss = head(hidden, weight, target, SimpleNamespace(size=lambda: 1))
    ours = linear_dft_loss(hidden, weight, target)
    torch.testing.assert_close(loss, ours, rtol=1e-5, atol=1e-7)
    gradients = [torch.autograd.grad(x, (hidden, weight), upstream) for x in (loss, ours)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_baseline_imports_its_package_in_make(monkeypatch):
    known = tool("baselines")
    for package in ("quack", "liger_kernel", "cut_cross_entropy"):
        for module in [name for name in sys.modules if name.partition(".")[0] == package]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setitem(sys.modules, package, None)  # not installed
    makes = known.IMPLEMENTATIONS | known.HEADS
    names = [name for name in makes if name.startswith(("quack", "Liger", "cut"))]
    assert len(names) == 8 and set(names) <= set(known.NOT_ON_A_CPU)
    for name in names:
        with pytest.raises(ImportError):
            makes[name]()


def test_benchmark_pages_match_results():
    written = report()
    text = ""
    for page, on_gpu in written.PAGES.items():
        text += page.read_text()
        assert written.section(on_gpu) in page.read_text(), "run: python tools/benchmarks/report.py"
    for path in written.RESULTS.glob("*.csv"):
        pictured = path in written.results() and written.of_logits(written.read(path))
        assert path.name in text and (written.figure(path).exists() or not pictured)


@pytest.mark.slow
def test_report_table_lists_times_ratios_and_missing_baselines(rows):
    written = report()
    text = written.part(rows, written.RESULTS / "some.csv")
    assert "| Megatron unfused | " in text
    assert "a missing baseline: not installed (no such thing)" in written.missing(rows)
    assert "baseline failing: H = 32, V = 300, 70% masked: failed" in written.missing(rows)
    assert "| baseline failing |" not in text
    ours = next(
        row for row in rows if (row["implementation"], row["vocab"], row["masked"]) == ("ours: dft", "512", "0.0")
    )
    assert f"| ours: dft | {float(ours['total_ms']):.3g} (1.00x) |" in text
    assert "| H = 32, V = 300 | 0% masked | 70% masked |" in text
    stock, dropped = (
        next(r for r in rows if (r["implementation"], r["hidden"], r["masked"]) == (name, "32", "0.7"))
        for name in ("Megatron: output layer, unfused", "ours: masked tokens removed")
    )
    ratio = float(dropped["total_ms"]) / float(stock["total_ms"])
    assert f" | {float(dropped['total_ms']):.0f} ({ratio:.2f}) |" in text
    gpu = [{**row, "device": "NVIDIA H200"} for row in rows]
    assert "TP = 8, projected" in written.part(gpu, written.RESULTS / "some.csv")


def test_report_tp8_projection_matches_formula():
    row = {"collectives": "3", "sent_bytes_per_token": "12.0", "tokens": "8192", "total_ms": "1.0"}
    assert report().projected(row) == f"{1.0 + 0.060 + 12 * 8192 * 7 / 400e9 * 1e3:.2f}"
