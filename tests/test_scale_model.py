"""The scale model: its formulas, its generated page, and its collectives compared with counted ones."""

import csv
import sys
from dataclasses import replace
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parent.parent / "tools" / "benchmarks"
sys.path.insert(0, str(TOOLS))
try:
    import scale_model as scale
    import scale_report as report
finally:
    sys.path.remove(str(TOOLS))

H100, H200, _ = scale.CLUSTERS
LLAMA_8B, QWEN_32B, LLAMA_70B, LLAMA_405B = scale.MODELS
UNMASKED = scale.Batch(masked=0.0)


def plan(model=LLAMA_8B, cluster=H200, batch=UNMASKED, **sizes):
    return scale.Plan(model, cluster, scale.Layout(**sizes), batch)


def work(variant, live=8192, tp=1, **options):
    return scale.loss_work(variant, LLAMA_8B, 8192, live, tp, **options)


def sent(variant, live=100, tp=8, **options):
    options = {"sequence_parallel": True, "size": 2} | options
    return [(call.collective, call.nbytes) for call in scale.calls(variant, 4096, 8192, live, tp, **options)]


# ---- Formulas ---------------------------------------------------------------------------------------------------


def test_loss_work_counts_output_layer_flop():
    flop = 6 * 8192 * 4096 * 128256
    assert work(scale.STOCK).flop == work(scale.OURS).flop == work(scale.DROPPED).flop == flop
    assert work(scale.CHUNKS).flop == flop * 8 / 6
    assert work(scale.STOCK, live=2048, tp=4).flop == flop / 4
    assert work(scale.DROPPED, live=2048, tp=4).flop == flop / 16


def test_loss_parts_ms_reproduces_h200_times():
    stock, ours = (plan().loss_parts_ms(variant) for variant in (scale.STOCK, scale.OURS))
    assert round(stock[0], 1) == 32.7 and round(ours[1], 2) == 1.47  # 8192 tokens, H = 4096, V = 128256
    assert round(plan(tp=8).loss_parts_ms(scale.OURS)[1], 3) == 0.183
    assert round(plan(replace(LLAMA_8B, vocab=151936)).loss_parts_ms(scale.OURS)[1], 2) == 1.74
    assert round(plan().loss_parts_ms(scale.CHUNKS)[0], 1) == 43.6


def test_predicted_times_match_published_measurements():
    predicted = [52 * 8192 * 131072 / 3.0e9, 51 * 8192 * 131072 / 3.0e9, 22 * 8192 * 131072 / 3.0e9]
    measured = [21.25, 18.23, 7.96]
    for ours, theirs in zip(predicted, measured, strict=True):
        assert f"| {theirs:.2f} | {ours:.2f} (" in report.published_table() and ours == pytest.approx(theirs, rel=0.15)


def test_loss_work_counts_bytes_of_logits_weight_and_hidden_states():
    logits = 8192 * 128256
    live = 2048  # a quarter
    assert work(scale.STOCK, live).logit_bytes == 52 * logits
    assert work(scale.FUSED, live).logit_bytes == 51 * logits
    assert work(scale.OURS, live).logit_bytes == pytest.approx((6 - 4 * 0.75) * logits)
    assert work(scale.DROPPED, live).logit_bytes == 6 * logits / 4
    weight, hidden = 4096 * 128256, 8192 * 4096
    assert work(scale.OURS, live).other_bytes == 12 * weight
    assert work(scale.DROPPED, live).other_bytes == 12 * weight + 2 * hidden + 8 * hidden / 4
    assert work(scale.DROPPED).other_bytes == 12 * weight  # nothing is masked, so no rows are gathered
    chunks = 16  # 128256 / 8192, rounded up
    assert work(scale.CHUNKS, live).other_bytes == 14 * weight + 2 * hidden + (8 + 10 * chunks) * hidden / 4


def test_calls_lists_collectives_in_order():
    all_of_it, part = 2 * 8192 * 4096, 2 * 8192 * 4096 / 8
    three = [("all_reduce", 4 * 8192)] * 3
    assert sent(scale.STOCK) == [("all_gather", part), *three, ("all_gather", part), ("reduce_scatter", all_of_it)]
    assert sent(scale.FUSED)[1:3] == [("all_reduce", 4 * 8192), ("all_reduce", 8 * 8192)]
    assert sent(scale.OURS)[1] == ("all_gather", 12 * 8192)
    few = [("all_gather", 12 * 100), ("all_reduce", 2 * 100 * 4096)]
    assert sent(scale.DROPPED) == sent(scale.CHUNKS) == [("all_gather", part), *few]
    assert sent(scale.DROPPED, sequence_parallel=False) == few
    assert sent(scale.STOCK, sequence_parallel=False, size=4) == [*three, ("all_reduce", 2 * all_of_it)]
    assert sent(scale.STOCK, tp=1) == []
    assert [sent(scale.way_of(f"ours: {x}"))[1][1] for x in ("nll", "deft", "entropy")] == [1200, 1600, 1600]
    assert sent(scale.way_of("ours, full metrics"))[1] == ("all_gather", 2000)  # entropy and collision


def test_call_ms_matches_ring_model_and_overlap():
    gather, scatter = scale.Call("all_gather", 100.0), scale.Call("reduce_scatter", 800.0)
    assert gather.sent(8) == scatter.sent(8) == 700.0 and scale.Call("all_reduce", 800.0).sent(8) == 1400.0
    call = scale.Call("reduce_scatter", 8e8)
    assert call.ms(H100, 8) == pytest.approx(0.020 + 7e8 / 400e9 * 1e3)
    assert call.ms(H100, 16) == pytest.approx(0.040 + 7.5e8 / 45e9 * 1e3)
    assert replace(call, beside=790e9).ms(H100, 8) == pytest.approx(call.ms(H100, 8) - 1.0)
    assert replace(call, beside=790e12).ms(H100, 8) == 0.0


def test_layer_ms_matches_hand_count():
    tiny = scale.Model("", hidden=2, ffn=3, layers=1, q=4, k=1, vocab=1)
    cluster = scale.Cluster("", 1e3, 1e3, 1.0, 1.0)  # one FLOP and one byte a ms
    batch = scale.Batch(seq_length=10)
    flop = 10 * (6 * 2 * (2 * 4 + 2 * 1 + 3 * 3) + 7 * 4 * 10)
    moved = 10 * (52 * 2 + 22 * 3 + 8 * 5)
    assert plan(tiny, cluster, batch).layer_ms() == flop + moved
    assert tiny.layer_weights == 2 * 4 * 2 + 2 * 1 * 2 + 3 * 2 * 3


@pytest.mark.parametrize(
    ("model", "billions"),
    list(zip(scale.MODELS, (8.0, 32.8, 70.6, 405.8), strict=True)),
    ids=lambda x: getattr(x, "name", ""),
)
def test_models_have_published_parameter_count(model, billions):
    total = model.layer_weights * model.layers + 2 * model.vocab * model.hidden
    assert round(total / 1e9, 1) == billions


def test_step_ms_is_bound_by_slowest_pipeline_stage():
    large = plan(LLAMA_405B, H100, UNMASKED, tp=8, pp=16, dp=64)  # 8 micro-batches
    stage = large.layer_ms() * 126 / 16
    slowest = stage + 5.0
    assert large.step_ms(5.0) == pytest.approx(15 * stage + slowest + 7 * slowest)
    loss = large.loss_ms(scale.STOCK)
    assert large.share(scale.STOCK) == pytest.approx(8 * loss / (23 * stage + 8 * loss))


def test_loss_gb_and_rank_gb_match_hand_count():
    gathered = 2 * 8192 * 4096 / 1e9
    logits = 8192 * 128256 / 8 / 1e9
    many = plan(tp=8, batch=scale.Batch(masked=0.75))
    assert many.loss_gb(scale.STOCK) == pytest.approx(8 * logits + gathered)
    assert many.loss_gb(scale.FUSED) == pytest.approx(12 * logits + gathered)
    assert many.loss_gb(scale.OURS) == pytest.approx(2 * logits + gathered)
    assert many.loss_gb(scale.DROPPED) == pytest.approx(2 * logits / 4 + gathered * 1.25)
    chunk = 2048 * (2 * 8192 + 4 * 4096 + 2 * 4096) / 1e9
    assert many.loss_gb(scale.CHUNKS) == pytest.approx(chunk + gathered)
    weights = LLAMA_8B.layer_weights * 32 + 2 * 128256 * 4096
    activations = 4 * 8192 * (4096 + 4096 + 1024 + 14336) * 32
    one = plan(dp=6)
    expected = weights * (6 + 12 / 6) / 1e9 + activations / 1e9 + one.loss_gb(scale.STOCK)
    assert one.rank_gb(scale.STOCK) == pytest.approx(expected)


# ---- Trends -----------------------------------------------------------------------------------------------------


def test_masked_tokens_reduce_loss_ms_except_for_megatron():
    some, more = (plan(tp=8, batch=scale.Batch(masked=share)) for share in (0.3, 0.6))
    assert some.loss_ms(scale.STOCK) == more.loss_ms(scale.STOCK)
    for variant in (scale.OURS, scale.DROPPED, scale.CHUNKS):
        assert more.loss_ms(variant) < some.loss_ms(variant) < some.loss_ms(scale.STOCK)
    assert some.loss_ms(scale.DROPPED) < some.loss_ms(scale.CHUNKS)  # chunks trade time for memory
    bare = plan(LLAMA_405B, tp=8)
    assert bare.loss_ms(scale.CHUNKS) > bare.loss_ms(scale.STOCK) > bare.loss_ms(scale.OURS)


def test_loss_share_grows_with_pp_and_not_with_dp():
    shares = [plan(LLAMA_405B, tp=8, pp=pp).share(scale.STOCK) for pp in (1, 2, 4, 8, 16)]
    assert shares == sorted(shares) and shares[-1] > 10 * shares[0]
    alone = [plan(dp=dp).share(scale.STOCK) for dp in (1, 64, 4096)]
    assert alone == pytest.approx(alone[:1] * 3)


def test_smallest_returns_first_layout_that_fits():
    found = scale.smallest(scale.STOCK, LLAMA_405B, H100, 2048, scale.Batch())
    assert (found.layout.tp, found.layout.pp, found.layout.dp) == (8, 16, 16)  # the layout of Meta
    assert found.rank_gb(scale.STOCK) <= 72 < replace(found, layout=scale.Layout(8, 8, 1, 32)).rank_gb(scale.STOCK)
    assert scale.smallest(scale.STOCK, LLAMA_405B, H100, 8, scale.Batch()) is None
    long = scale.Batch(seq_length=65536)
    assert scale.smallest(scale.STOCK, LLAMA_8B, H100, 64, long, cp=8).layout == scale.Layout(2, 1, 8, 4)
    assert plan(batch=long, cp=8).tokens == 8192 and plan(dp=4096).batch.micro_batches(scale.Layout(dp=4096)) == 1


def test_scale_report_flags_override_model_values(capsys):
    report.main(["--gpus", "8", "--memory-gb", "1e6", "--vocab", "64128", "--masked", "0"])
    half = replace(LLAMA_8B, vocab=64128)
    expected = plan(half, replace(H100, memory_gb=1e6), dp=8).loss_ms(scale.STOCK)
    assert f"| Llama 3 8B | 1 | {expected:.1f} ms" in capsys.readouterr().out


def test_scale_report_rejects_model_that_fits_no_layout(capsys):
    with pytest.raises(SystemExit):
        report.main(["--model", "Llama 3 405B", "--gpus", "8", "16"])
    assert "expected enough for Llama 3 405B with 90% of 80 GB a GPU, got [8, 16]; give more" in capsys.readouterr().err


def test_scale_model_rejects_unknown_implementation():
    with pytest.raises(ValueError, match=r"expected one of Megatron, .* or \"ours: NAME\", got 'theirs'"):
        scale.way_of("theirs")


# ---- Comparison with measured steps -----------------------------------------------------------------------------

SIZES = {"hidden": 64, "layers": 2, "heads": 4, "vocab": 1024, "seq_length": 64, "micro_batch": 1, "global_batch": 8}
FACTS = {"device": "some CPU", "date": "2026-01-01", "commit": "abc", "torch": "2.13.0", "dtype": "float32"}
COSTS = [2e-8, 3e-9, 6e-9, 5e-8, 0.1, 1e-6]  # ms per unit of `quantities`


def measured_rows(valid):
    """Rows of benchmark_layouts.py for a machine with these COSTS."""
    for world, tp, sp, cp in (
        (1, 1, False, 1),
        (2, 2, True, 1),
        (2, 1, False, 2),
        (4, 4, True, 1),
        (4, 2, True, 2),
        (4, 2, False, 1),
    ):
        place = {"world": world, "tp": tp, "pp": 1, "cp": cp, "dp": world // tp // cp, "sp": sp}
        for name in (*(variant.name for variant in report.TIMED), "ours: deft"):
            row = {key: str(value) for key, value in (FACTS | SIZES | place).items()}
            row |= {"implementation": name, "masked": "0.7", "valid": str(valid)}
            yield row | {"loss_stage_ms": str(float(report.quantities(row) @ COSTS))}


def wire_rows(rows):
    for row in rows:
        keys = {key: row[key] for key in (*report.PLACE, "implementation")}
        for collective, calls, nbytes in sorted(report.predicted(row)):
            numbers = {"collective": collective, "calls": calls, "bytes": nbytes}
            yield keys | {"stage": 0, "part": "loss", "group": "tp"} | numbers
            yield keys | {"stage": 0, "part": "rest", "group": "tp"} | numbers | {"calls": 99}


@pytest.fixture
def files(tmp_path):
    """Path and rows of measured times, path and rows of counted collectives."""
    rows = list(measured_rows(report.Task(**SIZES, dtype=report.torch.float32).valid()))
    return tmp_path / "some-layouts.csv", rows, tmp_path / "some-wire.csv", list(wire_rows(rows))


def checked(path, rows, wire_path, wire):
    for name, content in ((path, rows), (wire_path, wire)):
        with open(name, "w", newline="") as file:
            writer = csv.DictWriter(file, list(content[0]))
            writer.writeheader()
            writer.writerows(content)
    return report.check(path)


def test_fitted_costs_predict_every_layout(files):
    text = checked(*files)
    assert "The 16 predicted times have a median error of 0% and a maximum of 0%; the 12 ratios" in text
    assert text.count("0%)°") == 8 and "all as predicted" in text
    assert report.fitted(files[1]) == pytest.approx(COSTS, rel=1e-3)


def test_check_reports_wrong_predictions(files):
    path, rows, wire_path, wire = files
    rows[-5] |= {"loss_stage_ms": str(2 * float(rows[-5]["loss_stage_ms"]))}
    wire[-2] |= {"bytes": wire[-2]["bytes"] + 4}
    text = checked(path, rows, wire_path, wire)
    assert "(-50%)" in text and "a maximum of 50%" in text
    assert "**1 of the predictions are wrong:** world4 tp2 spFalse pp1 cp1 dp2 ours: deft: predicted [(" in text


def test_quantities_account_for_ranks_that_share_cores(files):
    place = {"world": "4", "tp": "1", "sp": "False", "cp": "1", "dp": "4"}
    stock, ours = (files[1][i] | place for i in (0, 1))
    logits = 2 * 64 * 1024  # two micro-batches
    assert list(report.quantities(stock)) == pytest.approx(
        [2 * x for x in (6 * 64 * logits, 52 * logits, 0, 2 * 16 * 64 * 1024, 0, 0)]
    )
    valid = max(sum(rank) for rank in report.live_tokens(ours))
    assert report.quantities(ours)[2] == pytest.approx(2 * (6 * valid + 2 * (2 * 64 - valid)) * 1024)
    assert report.quantities(stock | {"device": "NVIDIA H200"})[0] == 6 * 64 * logits


def test_fitted_costs_are_nonnegative(files):
    rows = files[1]
    rows[1] |= {"loss_stage_ms": "0.01"}  # less than its matmuls take
    assert min(report.fitted(rows)) >= 0.0


def test_fitted_raises_without_times_of_one_or_two_ranks(files):
    with pytest.raises(ValueError, match="expected times of one rank, or of two"):
        report.fitted([row for row in files[1] if row["world"] == "4"])


def test_check_rejects_changed_loss_masks(files):
    path, rows, wire_path, wire = files
    with pytest.raises(ValueError, match=f"valid: expected 17 tokens as in the file, got {rows[0]['valid']}"):
        checked(path, [row | {"valid": "17"} for row in rows], wire_path, wire)


def test_live_tokens_match_megatron_cp_and_dp_split(files):
    row = files[1][-1] | {"cp": "2", "dp": "2", "tp": "1"}
    task = report.Task(**SIZES, dtype=report.torch.float32)
    masks = [task.sample(i)[3].bool() for i in range(8)]
    ends = [report.torch.cat((mask[:16], mask[48:])).sum() for mask in masks]
    middles = [mask[16:48].sum() for mask in masks]
    expected = [[max(1, int(x)) for x in part[dp::2]] for part in (ends, middles) for dp in range(2)]
    assert report.live_tokens(row) == expected


# ---- Committed results ------------------------------------------------------------------------------------------


def test_scale_page_matches_model():
    assert report.PAGE.read_text() == report.page(), "run: python tools/benchmarks/scale_report.py --docs"


@pytest.mark.parametrize("path", sorted(report.RESULTS.glob("*-layouts.csv")), ids=lambda path: path.stem)
def test_predicted_collectives_match_counted(path):
    wire = report.read(path.with_name(path.stem.removesuffix("-layouts") + "-wire.csv"))
    rows = report.read(path)
    assert report.of_loss(wire) and report.disagreements(rows, wire) == []
