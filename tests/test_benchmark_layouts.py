"""The layout benchmark on two ranks: collectives are counted, a killed run resumes, disagreements are reported."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools" / "benchmarks"))

import benchmark_layouts  # noqa: E402
import report  # noqa: E402
from benchmark_layouts import disagreements, read, usual_layouts  # noqa: E402
from megatron_step import Layout, Task  # noqa: E402

psutil = pytest.importorskip("psutil")
pytest.importorskip("megatron.training")  # with pretrain()
pytestmark = [pytest.mark.host, pytest.mark.slow]

HIDDEN, VOCAB, SEQUENCE, SAMPLES, MICRO_BATCH = 32, 256, 32, 8, 2
SIZES = f"--hidden {HIDDEN} --layers 2 --heads 2 --vocab {VOCAB} --seq-length {SEQUENCE} --rounds 1 --steps 2 "
VARIANTS = list(benchmark_layouts.VARIANTS)
MICRO_BATCHES = SAMPLES // MICRO_BATCH
PLACES = {"2": "tp2", "2sp": "tp2sp", "pp": "pp2", "cp": "cp2", "dp": "dp"}


def begin(out, flags):
    """Start the benchmark on two ranks, in its own process group."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [
        str(ROOT / "tools" / "benchmarks" / "benchmark_layouts.py"),
        *SIZES.split(),
        "--out",
        str(out),
        *flags.split(),
    ]
    with open(out.parent / "log.txt", "a") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The rows of both result files. The run is killed after its first layout and started again."""
    out = tmp_path_factory.mktemp("layouts") / "tiny-layouts.csv"
    flags = f"--layouts {' '.join(PLACES.values())}"
    killed = begin(out, flags)
    deadline = time.monotonic() + 240.0
    while not out.exists() and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    ranks = psutil.Process(killed.pid).children(recursive=True)  # each in a session of its own
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    for rank in ranks:
        with contextlib.suppress(psutil.NoSuchProcess):
            rank.kill()
    log = out.parent / "log.txt"
    before = read(out)
    assert before, log.read_text()[-3000:]
    again = begin(out, flags)
    assert again.wait(timeout=300) == 0, log.read_text()[-3000:]
    assert read(out)[: len(before)] == before
    assert len(before) < len(read(out))
    return read(out), read(out.parent / "tiny-wire.csv")


def test_benchmark_layouts_in_bf16_without_torchrun(tmp_path):
    """One rank, as in `make gpu`."""
    out = tmp_path / "one.csv"
    command = [sys.executable, str(ROOT / "tools" / "benchmarks" / "benchmark_layouts.py"), *SIZES.split()]
    run = subprocess.run([*command, "--dtype", "bf16", "--out", str(out)], capture_output=True, text=True, timeout=250)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert [row["implementation"] for row in read(out)] == list(benchmark_layouts.IMPLEMENTATIONS)


def calls(wire, place, implementation, part="loss"):
    """(group, collective) -> calls, bytes of the last stage."""
    layout = {k: str(v) for k, v in vars(Layout.parse(PLACES[place])).items()}
    wanted = layout | {"implementation": implementation, "part": part}
    found = [row for row in wire if wanted.items() <= row.items()]
    return {(row["group"], row["collective"]): (int(row["calls"]), int(row["bytes"])) for row in found}


def test_benchmark_layouts_has_one_row_per_layout_and_implementation(files):
    rows, _ = files
    found = [(row["tp"], row["sp"], row["pp"], row["cp"], row["dp"], row["implementation"]) for row in rows]
    assert len(found) == len(set(found)) == len(PLACES) * len(benchmark_layouts.IMPLEMENTATIONS)
    for row in rows:
        assert 0 < float(row["loss_stage_ms"]) < float(row["step_ms"])
        assert len(row["peak_mib"].split()) == 2
        assert row["valid"] == str(task().valid())


def test_benchmark_layouts_losses_and_grad_norms_agree(files):
    rows, _ = files
    assert disagreements(rows) == []
    assert len({row["grad_norm"][:6] for row in rows}) > 8  # the objectives differ


@pytest.mark.parametrize("key", ["loss", "grad_norm"])
def test_disagreements_names_implementation_and_quantity(files, key):
    rows = [dict(row) for row in files[0]]
    (last,) = (row for row in rows if row["implementation"] == "ours: trsft" and row["dp"] == "2")
    last[key] = str(float(last[key]) * 1.001)
    (found,) = disagreements(rows)
    assert "ours: trsft" in found and f"expected a {key} of" in found


@pytest.mark.parametrize(("name", "dimension"), [("ours: cayley", "cp"), ("ours: talr", "dp")])
def test_disagreements_allows_other_gradients_where_objective_depends_on_layout(files, name, dimension):
    rows = [dict(row) for row in files[0]]
    for row in (row for row in rows if row["implementation"] == name):
        row["grad_norm"] = str(float(row["grad_norm"]) * (1.1 if row[dimension] == "2" else 1.0))
    assert disagreements(rows) == []
    for row in (row for row in rows if row["implementation"] == name and row["tp"] == "2"):
        row["grad_norm"] = str(float(row["grad_norm"]) * 1.1)
    assert disagreements(rows)


def test_benchmark_layouts_counts_collectives_of_loss(files):
    """Expected bytes, in fp32: n H numbers of hidden states, and 3 or 4 statistics for each of n tokens."""
    _, wire = files
    n = SAMPLES * SEQUENCE
    kept = sum(max(1, m) for m in valid_of_micro_batches())
    grad_of_hidden = (MICRO_BATCHES, 4 * n * HIDDEN)
    assert calls(wire, "2", "Megatron") == {("tp", "all_reduce"): (4 * MICRO_BATCHES, 3 * 4 * n + grad_of_hidden[1])}
    assert calls(wire, "2", "ours") == {
        ("tp", "all_gather"): (MICRO_BATCHES, 3 * 4 * n),
        ("tp", "all_reduce"): grad_of_hidden,
    }
    for variant in VARIANTS[2:4]:
        assert calls(wire, "2", variant) == {
            ("tp", "all_gather"): (MICRO_BATCHES, 3 * 4 * kept),
            ("tp", "all_reduce"): (MICRO_BATCHES, 4 * kept * HIDDEN),
        }
    assert calls(wire, "2", "ours: deft")[("tp", "all_gather")] == (MICRO_BATCHES, 4 * 4 * kept)
    # Sequence parallelism: each rank holds half of the hidden states. Megatron gathers them again in backward.
    assert calls(wire, "2sp", "Megatron") == {
        ("tp", "all_reduce"): (3 * MICRO_BATCHES, 3 * 4 * n),
        ("tp", "all_gather"): (2 * MICRO_BATCHES, 2 * 4 * n * HIDDEN // 2),
        ("tp", "reduce_scatter"): grad_of_hidden,
    }
    for place in ("pp", "cp", "dp"):
        assert not any(calls(wire, place, variant) for variant in VARIANTS)


def test_benchmark_layouts_counts_collectives_outside_loss(files):
    _, wire = files
    of_hidden = SAMPLES * SEQUENCE * HIDDEN * 4
    found = calls(wire, "pp", "Megatron", "rest")
    assert found[("pp", "recv")] == found[("pp", "send")] == (MICRO_BATCHES, of_hidden)
    assert ("dp-cp", "reduce_scatter") in calls(wire, "dp", "Megatron", "rest")
    assert not any(row["part"] == "rest" and row["implementation"] != "Megatron" for row in wire)


def test_report_table_has_every_layout_and_variant(files):
    rows, _ = files
    text = report.layouts_part(rows, report.RESULTS / "some-layouts.csv")
    assert "| layout | Megatron, ms | loss stage | ours | ours, masked tokens removed |" in text
    for name in ("TP 2", "TP, SP 2", "PP 2", "CP 2", "DP 2"):
        assert f"\n| {name} | " in text
    stock, ours = (next(row for row in rows if row["implementation"] == variant) for variant in VARIANTS[:2])
    assert f"| {float(ours['step_ms']) / float(stock['step_ms']):.2f} |" in text


def task():
    import torch

    return Task(HIDDEN, 2, 2, VOCAB, SEQUENCE, MICRO_BATCH, SAMPLES, torch.float32)


def valid_of_micro_batches():
    masks = [int(task().sample(i)[3].sum()) for i in range(SAMPLES)]
    return [sum(masks[i : i + MICRO_BATCH]) for i in range(0, SAMPLES, MICRO_BATCH)]


def test_task_micro_batches_have_distinct_valid_counts_and_one_zero():
    counts = valid_of_micro_batches()
    assert 0 in counts and len(set(counts)) == len(counts)


@pytest.mark.parametrize("text", ["", "tp", "pp2tp2", "tp2 ", "ep2"])
def test_layout_parse_rejects_invalid_text(text):
    with pytest.raises(ValueError, match="layout: expected tp"):
        Layout.parse(text)


@pytest.mark.parametrize("flags", ["--steps 1", "--only nobody"])
def test_benchmark_layouts_rejects_invalid_flags(flags, capsys):
    with pytest.raises(SystemExit):
        benchmark_layouts.arguments(flags.split())
    assert f"{flags.split()[0]}: expected" in capsys.readouterr().err


def test_layout_dp_rejects_indivisible_world_size():
    with pytest.raises(ValueError, match="expected a multiple of 6 ranks, got 8"):
        Layout(tp=3, pp=2).dp(8)


def test_usual_layouts_of_four_ranks():
    names = {(x.tp, x.pp, x.cp) for x in usual_layouts(4, task())}
    pairs = {(2, 1, 1), (1, 2, 1), (1, 1, 2)}
    assert names == pairs | {(1, 1, 1), (2, 2, 1), (2, 1, 2), (1, 2, 2), (1, 1, 4)}  # two heads, two layers
