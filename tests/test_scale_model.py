"""The scale model: formulas, generated page, predictions against measured times and memory, counted collectives."""

import csv
import statistics
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


def test_loss_parts_ms_matches_hand_count():
    cluster = replace(H200, flop_per_s=790e12, memory_bytes_per_s=4.3e12)
    one = plan(cluster=cluster)  # 8192 tokens, H = 4096, V = 128256
    assert round(one.loss_parts_ms(scale.STOCK)[0], 1) == round(one.loss_parts_ms(scale.IN_FORWARD)[0], 1) == 32.7
    assert round(one.loss_parts_ms(scale.OURS)[1], 2) == 1.47
    assert round(plan(cluster=cluster, tp=8).loss_parts_ms(scale.OURS)[1], 3) == 0.183
    assert round(plan(replace(LLAMA_8B, vocab=151936), cluster).loss_parts_ms(scale.OURS)[1], 2) == 1.74
    assert round(one.loss_parts_ms(scale.CHUNKS)[0], 1) == 43.6


def test_predicted_times_match_published_measurements():
    predicted = [moved * 8192 * 131072 / 3.01e9 for moved in (52, 51, 22)]
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


def test_gradient_in_forward_reads_weight_once_more_per_chunk():
    weight, hidden = 4096 * 128256, 8192 * 4096
    for live, chunks in ((8192, 4), (2048, 1), (3000, 2), (1, 1), (0, 1)):
        rows = live / 8192
        gathered = (2 + 8 * rows) * hidden if live < 8192 else 0
        got = work(scale.IN_FORWARD, live)
        assert got.other_bytes == pytest.approx(12 * weight * chunks + 4 * rows * hidden + gathered)
        assert got.flop == pytest.approx(6 * live * weight) and got.logit_bytes == 6 * live * 128256
    assert work(scale.IN_FORWARD, gradient_bytes=4).other_bytes == pytest.approx(8 * weight * 4 + 4 * hidden)


def test_gradient_in_forward_gathers_statistics_per_chunk():
    gather, *statistics, summed = sent(scale.IN_FORWARD, live=3000)
    assert statistics == [("all_gather", 12 * 1500)] * 2
    assert summed == ("all_reduce", 2 * 3000 * 4096) and gather == sent(scale.DROPPED)[0]
    assert sent(scale.IN_FORWARD, live=100) == sent(scale.DROPPED, live=100)
    last = work(scale.IN_FORWARD, 3000, tp=8).calls[-1]
    assert last.beside == pytest.approx(2 * 1500 * 4096 * 128256 / 8)  # the weight gradient of the last chunk


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
    assert [sent(scale.variant_of(f"ours: {x}"))[1][1] for x in ("nll", "deft", "entropy")] == [1200, 1600, 1600]
    assert sent(scale.variant_of("ours, full metrics"))[1] == ("all_gather", 2000)  # entropy and collision


def test_call_ms_matches_ring_model_and_overlap():
    gather, scatter = scale.Call("all_gather", 100.0), scale.Call("reduce_scatter", 800.0)
    assert gather.sent(8) == scatter.sent(8) == 700.0 and scale.Call("all_reduce", 800.0).sent(8) == 1400.0
    call = scale.Call("reduce_scatter", 8e8)
    assert call.ms(H100, 8) == pytest.approx(0.020 + 7e8 / 400e9 * 1e3)
    assert call.ms(H100, 16) == pytest.approx(0.040 + 7.5e8 / 45e9 * 1e3)
    assert replace(call, beside=H100.flop_per_s / 1e3).ms(H100, 8) == pytest.approx(call.ms(H100, 8) - 1.0)
    assert replace(call, beside=H100.flop_per_s).ms(H100, 8) == 0.0


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
    assert many.loss_gb(scale.STOCK) == pytest.approx(6 * logits + gathered)
    assert many.loss_gb(scale.FUSED) == pytest.approx(10 * logits + gathered)
    assert many.loss_gb(scale.OURS) == pytest.approx(2 * logits + 2 * gathered)  # hidden states and their gradient
    assert many.loss_gb(scale.DROPPED) == pytest.approx(2 * logits / 4 + gathered * 1.5)
    assert many.loss_gb(scale.IN_FORWARD) == many.loss_gb(scale.DROPPED)  # 2048 tokens are one chunk
    assert plan(tp=8).loss_gb(scale.IN_FORWARD) == pytest.approx(2 * logits / 4 + 2 * gathered)
    chunk = 2048 * (2 * 8192 + 8 * 4096 + 2 * 4096) / 1e9
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
    for variant in (scale.OURS, scale.DROPPED, scale.CHUNKS, scale.IN_FORWARD):
        assert more.loss_ms(variant) < some.loss_ms(variant) < some.loss_ms(scale.STOCK)
    assert some.loss_ms(scale.DROPPED) < some.loss_ms(scale.IN_FORWARD) < some.loss_ms(scale.CHUNKS)
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
        scale.variant_of("theirs")


# ---- Comparison with one measured GPU ---------------------------------------------------------------------------

LOGITS = report.of_logits(report.read(scale.H100_LOGITS))
HEADS = report.timed_heads(report.read(scale.H100_HEADS))
TRIALS = report.read(report.H100_CHUNKS)


def errors(pairs):
    return [predicted / measured - 1 for _, measured, predicted in pairs]


def test_h100_rates_come_from_measured_rows():
    times = {
        row["hidden"]: float(row["total_ms"])
        for row in HEADS
        if (row["implementation"], row["masked"]) == ("ours: materialized logits", "0.0")
    }
    assert sorted(times) == ["2048", "4096"]
    copy = 1e9 * float(LOGITS[0]["copy_gb_per_s"])
    moved = 128256 * (2 * 6 * 8192 + 8 * (2048 + 4096))  # both losses, both weights with a bf16 main_grad
    rate = 6 * 8192 * 128256 * (2048 + 4096) / (sum(times.values()) / 1e3 - moved / copy)
    assert H100.flop_per_s == float(f"{rate:.3g}") and H100.memory_bytes_per_s == float(f"{copy:.3g}")
    assert H200.memory_bytes_per_s == pytest.approx(copy * 4.8 / 3.35, rel=2e-3) and H200.flop_per_s == H100.flop_per_s
    assert scale.CLUSTERS[2].flop_per_s == pytest.approx(rate * 2250 / 989, rel=2e-3)


def test_slower_rows_give_lower_rate():
    slower = [row | {"total_ms": str(2 * float(row["total_ms"]))} for row in HEADS]
    assert scale.sustained_rates(LOGITS, slower)[0] < 0.5 * scale.sustained_rates(LOGITS, HEADS)[0]


def test_valid_tokens_match_masks_of_benchmark():
    row = {"tokens": "8192", "masked": "0.7"}
    assert scale.valid_tokens(row) == 19 * 128  # 45 of every 64 tokens are masked
    assert scale.valid_tokens(row | {"masked": "0.0"}) == 8192


@pytest.mark.parametrize(
    ("names", "vocabularies", "largest"),
    [
        (("ours: dft", "ours: dft, out of place"), (128256, 151936), 0.05),
        (("ours: dft", "ours: dft, out of place"), (16032, 18992), 0.15),
        (("Liger vocab-parallel", "flash-attn", "flash-attn, in place"), (128256, 151936), 0.08),
        (("Transformer Engine", "Transformer Engine, overwriting"), (128256, 151936), 0.16),
        (("Megatron unfused", "Megatron fused"), (16032, 18992, 128256, 151936), 0.24),
    ],
)
def test_predicted_loss_of_given_logits_matches_h100(names, vocabularies, largest):
    rows = [row for row in LOGITS if row["implementation"] in names and int(row["vocab"]) in vocabularies]
    assert len(rows) == 3 * len(names) * len(vocabularies)
    assert max(map(abs, errors(report.logits_times(rows)))) < largest


def test_counted_bytes_are_a_lower_bound():
    assert len(report.logits_times(LOGITS)) == 12 * 20  # 22 implementations, two without a formula
    assert max(errors(report.logits_times(LOGITS))) < 0.02


@pytest.mark.parametrize(("name", "largest"), [("ours", 0.15), ("Megatron", 0.08)])
def test_predicted_output_layer_and_loss_match_h100(name, largest):
    found = errors([pair for pair in report.predicted_heads(HEADS) if pair[0].startswith(name)])
    assert len(found) == {"ours": 14, "Megatron": 4}[name]
    assert max(map(abs, found)) < largest and statistics.median(map(abs, found)) < 0.05


def test_predicted_memory_matches_h100():
    assert max(map(abs, errors(report.heads_memory(HEADS)))) < 0.03
    assert max(map(abs, errors(report.logits_memory(LOGITS)))) < 0.001
    assert max(map(abs, errors(report.trial_memory(report.of_vocabulary(TRIALS))))) < 0.001


def test_predicted_chunks_match_h100():
    shipped = report.of_vocabulary(TRIALS)
    prototype = [row for row in TRIALS if row["chunk_of"] == "tokens"]
    assert {row["code"] for row in shipped} == {"shipped"} and {row["code"] for row in prototype} == {"prototype"}
    assert max(map(abs, errors(report.trial_times(shipped)))) < 0.13
    assert max(map(abs, errors(report.trial_times(prototype)))) < 0.19
    fp32 = [row for row in prototype if row["weight_gradient"] == "main_grad, float32"]
    for chunk, largest in ((2048, 0.13), (4096, 0.07), (8192, 0.01)):
        rows = [row for row in fp32 if int(row["chunk"]) == chunk]
        assert len(rows) == 2 and max(map(abs, errors(report.trial_times(rows)))) < largest
    buffers = [(int(row["buffer_mib"]), int(row["chunk"]) * 128256 * 2 / 2**20) for row in prototype]
    assert all(measured == pytest.approx(counted, abs=1) for measured, counted in buffers)


def test_scale_page_shows_every_measured_row():
    page = report.PAGE.read_text()
    shown = [row for row in LOGITS if row["implementation"] in scale.GIVEN_LOGITS]
    assert len(shown) == 12 * 9 and len(HEADS) == 20 and len(TRIALS) == 26
    cells = [(row, report.logits_ms) for row in shown] + [(row, report.head_ms) for row in HEADS]
    for row, predict in [*cells, *((row, report.trial_ms) for row in TRIALS)]:
        assert report.against_measured(report.total_ms(row), predict(row)) in page
    assert "A prototype was measured, not the shipped code" in page
    assert "none of these GPU numbers" not in page and "No run on several GPUs was measured" in page


def test_comparison_reports_wrong_predictions():
    slow = HEADS[-1] | {"total_ms": str(4 * report.head_ms(HEADS[-1])), "extra_mib": "1e5"}
    text = report.heads_text([*HEADS[:-1], slow], LOGITS)
    name = "Megatron: output layer, unfused, H = 2048, 70% masked"
    assert f"a largest error of -75% ({name})" in text and f"a largest error of -94% ({name})" in text


def test_errors_of_reports_median_and_signed_maximum():
    text = report.errors_of([("a", 100.0, 110.0), ("b", 100.0, 70.0), ("c", 100.0, 100.4)], "times")
    assert text == "3 predicted times have a median error of 10% and a largest error of -30% (b)."
    assert report.against_measured(1234.0, 1230.0) == "1234 → 1230 (0%)"


def test_reasons_for_errors_are_true():
    for name in ("Transformer Engine", "Transformer Engine, overwriting", "Liger vocab-parallel", "flash-attn"):
        rows = [row for row in LOGITS if row["implementation"] == name]
        for masked in ("0.0", "0.5", "0.8"):
            worst = min(
                (row for row in rows if row["masked"] == masked), key=lambda r: report.logits_ms(r) / report.total_ms(r)
            )
            assert worst["vocab"] == "18992"
    forward = {
        name: [float(row["forward_ms"]) for row in LOGITS if row["implementation"] == f"Megatron {name}"]
        for name in ("fused", "unfused")
    }
    assert forward["fused"] == pytest.approx(forward["unfused"], rel=0.002)
    chunked = [row for row in HEADS if scale.HEADS[row["implementation"]].vocab_chunk]
    assert report.mean_error(chunked) < -0.02
    worst = max(HEADS, key=lambda row: float(row["spread_ms"]) / float(row["total_ms"]))
    assert report.head_name(worst) == "ours: masked tokens removed, linear-fused, H = 2048, 70% masked"
    fits = {report.fits_smaller([report.plans(LLAMA_70B)], variant) for variant in (scale.DROPPED, scale.CHUNKS)}
    assert fits == {"Llama 3 70B, 8 x 1 instead of 8 x 2 on 256 GPUs"}


# ---- Comparison with measured layouts ---------------------------------------------------------------------------

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
