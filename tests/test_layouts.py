"""Every parallel layout, through Megatron's own pretrain(), matches the same run on one rank.

All runs start from one checkpoint, because pipeline stages are initialized differently. They train in fp32 on data with
fully masked samples, micro-batches and ranks. Everything logged must agree: losses, gradient norms, dft metrics, token
counts, evaluation.
"""

import importlib.util
import itertools
import math
import os
import re

import pytest
from demo import read_curves
from host_flags import CP2, DP, EP2, MODEL, MODELS, PER_TOKEN, PP2, RECOMPUTE, SP, TP2, VPP, training
from host_runs import HAS_HYBRID, ROOT, agree

pytest.importorskip("megatron.training")
pytest.importorskip("tensorboard")
pytestmark = [pytest.mark.host, pytest.mark.slow]

STEPS, BATCH = 3, 8


@pytest.fixture(scope="module")
def flags(host):
    """flags(model): the common flags of all runs of a model, which start from its checkpoint."""

    def of(model, batch=BATCH):
        path, common = host.folder / model, common_flags(model)
        host.curves(f"{common} {PER_TOKEN} {training(40, 1e-2, 16)} --micro-batch-size 8 --save {path}")
        return f"{common} {training(STEPS, 1e-3, batch)} --load {path} --finetune "

    return of


def common_flags(model):
    """Model flags. The pattern of a hybrid model defines its number of layers."""
    return (MODEL.replace("--num-layers 4 ", "") if "hybrid" in model else MODEL) + MODELS[model]


LAYOUTS = {  # model, flags, ranks
    "TP": ("dense", TP2, 2),
    "TP with SP": ("dense", TP2 + SP, 2),
    "PP": ("dense", PP2, 2),
    "interleaved PP": ("dense", PP2 + VPP, 2),
    "CP": ("dense", CP2, 2),
    "DP": ("dense", DP, 2),
    "TP x PP": ("dense", TP2 + PP2, 4),
    "TP x CP": ("dense", TP2 + CP2, 4),
    "CP x PP": ("dense", CP2 + PP2, 4),
    "CP x DP": ("dense", CP2 + DP, 4),
    "TP with SP x interleaved PP x DP": ("dense", TP2 + SP + PP2 + VPP + DP, 8),
    "full recomputation, TP": ("dense", RECOMPUTE + TP2, 2),
    "selective recomputation, PP": ("dense", "--recompute-granularity selective " + PP2, 2),
    "tied, TP": ("tied", TP2, 2),
    "tied, PP": ("tied", PP2, 2),
    "EP": ("moe", EP2 + DP, 2),
    "EP x TP with SP": ("moe", EP2 + TP2 + SP + DP, 4),
    "MTP, TP": ("mtp", TP2, 2),
    "MTP, PP": ("mtp", PP2, 2),
}


if HAS_HYBRID:
    LAYOUTS |= {
        "hybrid, TP": ("hybrid", TP2, 2),
        "hybrid, TP with SP": ("hybrid", TP2 + SP, 2),
        "hybrid, PP": ("hybrid", PP2, 2),
        "hybrid, CP": ("hybrid", CP2, 2),
        "hybrid, DP": ("hybrid", DP, 2),
        "hybrid, TP with SP x PP x CP": ("hybrid", TP2 + SP + PP2 + CP2, 8),
        "hybrid, accumulation": ("hybrid", "--micro-batch-size 4 ", 1),
        "hybrid, tied, TP": ("hybrid-tied", TP2, 2),
        "hybrid, tied, PP": ("hybrid-tied", PP2, 2),
        "hybrid, MTP, TP": ("hybrid-mtp", TP2, 2),
        "hybrid, MTP, PP": ("hybrid-mtp", PP2, 2),
    }


SMOKE = ("TP with SP", "PP")


@pytest.mark.parametrize("name", [pytest.param(x, marks=pytest.mark.smoke if x in SMOKE else ()) for x in LAYOUTS])
def test_parallel_layout_matches_one_rank(host, flags, name):
    model, layout, ranks = LAYOUTS[name]
    common = f"{flags(model)} {PER_TOKEN} --micro-batch-size 1 --loss-type dft "
    agree(host.curves(common + layout, ranks=ranks), host.curves(common))


@pytest.mark.parametrize(
    ("objective", "layout", "ranks", "batch"),
    [
        ("eaft:k=5", TP2 + SP, 2, 1),
        ("eaft:k=5", PP2 + "--dft-linear-fused --dft-vocab-chunk 5 ", 2, 1),
        ("trsft", TP2 + CP2, 4, 1),
        ("talr", TP2 + SP, 2, 1),
        ("talr", CP2, 2, 1),
        ("talr", DP, 2, 2),
    ],
)
def test_objective_matches_one_rank(host, flags, objective, layout, ranks, batch):
    """`batch`: the micro-batch size of one rank. The median of talr covers the micro-batches of all DP ranks."""
    common = f"{flags('dense')} {PER_TOKEN} --loss-type {objective} --micro-batch-size "
    agree(host.curves(f"{common} 1 {layout}", ranks=ranks), host.curves(f"{common} {batch}"))


HAS_PROCESSOR = importlib.util.find_spec("megatron.core.models.hybrid") is not None  # both exist from 0.18 on
PASS = "--no-dft-compact-masked-tokens "
CHUNKS = "--dft-linear-fused --dft-vocab-chunk 5 "
TOKENS = "--dft-linear-fused --dft-token-chunk 5 "
KEPT = "--dft-linear-fused --dft-vocab-chunk 11 --dft-keep-chunks 1 "
needs_hybrid = pytest.mark.skipif(not HAS_HYBRID, reason="this pretrain() does not build a HybridModel")
OVERLAP = DP + "--overlap-grad-reduce --overlap-param-gather "


@pytest.mark.parametrize(
    ("model", "layout", "ranks", "how"),
    [
        ("dense", "", 1, PASS),
        ("dense", "", 1, CHUNKS),
        ("dense", "", 1, TOKENS),
        ("dense", TP2 + SP, 2, TOKENS),
        ("dense", TP2, 2, TOKENS + PASS),
        ("dense", PP2 + VPP, 2, TOKENS),
        ("dense", CP2, 2, TOKENS),
        ("dense", OVERLAP, 2, TOKENS),
        ("tied", PP2, 2, TOKENS),
        ("dense", TP2 + SP, 2, PASS),
        ("dense", TP2 + SP, 2, CHUNKS + PASS),
        ("dense", TP2 + SP, 2, KEPT),
        ("dense", PP2 + VPP, 2, PASS),
        ("dense", PP2 + VPP, 2, CHUNKS),
        ("dense", CP2, 2, PASS),
        ("dense", CP2, 2, CHUNKS),
        ("dense", OVERLAP, 2, CHUNKS),
        ("tied", TP2, 2, PASS),
        ("tied", PP2, 2, CHUNKS),
        ("tied", TP2 + SP, 2, KEPT),
        ("mtp", TP2, 2, PASS),
        pytest.param("mtp", PP2, 2, CHUNKS, marks=pytest.mark.skipif(not HAS_PROCESSOR, reason="rejected before 0.18")),
        pytest.param("mtp", TP2, 2, TOKENS, marks=pytest.mark.skipif(not HAS_PROCESSOR, reason="rejected before 0.18")),
        pytest.param("hybrid", "", 1, PASS, marks=needs_hybrid),
        pytest.param("hybrid", TP2 + SP, 2, TOKENS, marks=needs_hybrid),
        pytest.param("hybrid", TP2 + SP, 2, PASS, marks=needs_hybrid),
        pytest.param("hybrid", TP2 + SP, 2, KEPT, marks=needs_hybrid),
        pytest.param("hybrid", PP2, 2, CHUNKS + PASS, marks=needs_hybrid),
        pytest.param("hybrid", CP2, 2, CHUNKS, marks=needs_hybrid),
        pytest.param("hybrid", OVERLAP, 2, CHUNKS, marks=needs_hybrid),
        pytest.param("hybrid-tied", TP2 + SP, 2, CHUNKS, marks=needs_hybrid),
    ],
)
def test_compaction_and_linear_fused_leave_curves_unchanged(host, flags, model, layout, ranks, how):
    """Masked tokens skip the output layer (the default) or pass it, or it is computed in chunks."""
    common = f"{flags(model)} {PER_TOKEN} --micro-batch-size 1 --loss-type dft {layout}"
    agree(host.curves(common + how, ranks=ranks), host.curves(common, ranks=ranks), 2e-6)


@pytest.mark.skipif("TRITON_INTERPRET" not in os.environ, reason="CPU ranks need Triton's interpreter")
def test_triton_training_matches_torch_backend(host, flags):
    common = f"{flags('dense', 4)} {PER_TOKEN} --micro-batch-size 2 --loss-type deft "
    one = host.curves(common)
    agree(host.curves(f"{common} {TP2} {SP} {RECOMPUTE} --dft-backend triton", ranks=2), one)
    agree(host.curves(f"{common} --dft-backend triton {CHUNKS}"), one)


@pytest.mark.parametrize(
    ("model", "layout", "ranks"),
    [
        ("dense", TP2 + PP2, 4),
        ("dense", "--bf16 " + TP2, 2),
        ("mtp", "--dft-mtp same " + CP2, 2),
        ("moe", EP2 + DP, 2),
        pytest.param("hybrid", TP2 + SP, 2, marks=needs_hybrid),
        pytest.param("hybrid-mtp", "", 1, marks=needs_hybrid),
    ],
)
def test_nll_matches_megatron_in_same_layout(host, flags, model, layout, ranks):
    """Compares equal layouts: under CP, Megatron weights each rank's multi-token-prediction loss by its own count."""
    common = f"{flags(model)} {PER_TOKEN} --micro-batch-size 1 "
    ours = host.curves(f"{common} {layout} --loss-type nll", ranks=ranks)
    stock = host.curves(common + layout.replace("--dft-mtp same", ""), ranks=ranks)
    agree({tag: ours[tag] for tag in stock}, stock, 1e-3 if "bf16" in layout else 1e-5)


@needs_hybrid
def test_hybrid_mtp_rejects_compaction_and_linear_fused(host, flags):
    common = f"{flags('hybrid-mtp')} {PER_TOKEN} --micro-batch-size 1 --loss-type dft "
    reason = "HybridModel with multi-token prediction, whose heads share the output layer"
    code, output = host.start(common)
    assert code == 0 and f"masked tokens pass through the output layer, because of {reason}" in output
    for flag in ("--dft-linear-fused", "--dft-compact-masked-tokens"):
        code, output = host.start(f"{common} {flag}")
        assert code != 0 and f"{flag} is not supported with" in output and reason in output


@pytest.mark.parametrize("how", ["", TOKENS])
def test_bf16_under_tp_matches_one_rank(host, flags, how):
    common = f"{flags('dense')} {PER_TOKEN} --micro-batch-size 1 --loss-type dft --bf16 "
    agree(host.curves(common + TP2 + how, ranks=2), host.curves(common), 1e-3)  # a quarter of bf16 precision


@pytest.mark.parametrize("mtp", ["nll", "same"])
def test_mtp_keeps_nll_or_uses_objective(host, flags, mtp):
    common = f"{flags('mtp')} {PER_TOKEN} --micro-batch-size 1 "
    stock, ours = host.curves(common), host.curves(f"{common} --loss-type dft --dft-mtp {mtp}")
    assert ours["mtp_1 loss"][0] == pytest.approx(
        stock["mtp_1 loss"][0], rel=1e-6
    )  # the reported value is always the NLL
    other = host.curves(f"{common} --loss-type dft --dft-mtp {'same' if mtp == 'nll' else 'nll'}")
    assert (ours["grad-norm"][0] < other["grad-norm"][0]) == (mtp == "same")
    agree(host.curves(f"{common} --loss-type dft --dft-mtp {mtp} {PP2}", ranks=2), ours)


# Gradient normalization. The batch has 4 samples with no, one, some and all tokens valid.
NORMALIZATION = {  # rows of the README: grad norm of the first step with and without per-token loss
    "1 rank, micro-batch 4": ("--micro-batch-size 4", 1),
    "1 rank, 2 micro-batches of 2": ("--micro-batch-size 2", 1),
    "1 rank, 4 micro-batches of 1": ("--micro-batch-size 1", 1),
    "DP 2, 1 micro-batch of 2 each": ("--micro-batch-size 2 " + DP, 2),
    "DP 2, 2 micro-batches of 1 each": ("--micro-batch-size 1 " + DP, 2),
    "CP 2, 4 micro-batches of 1": ("--micro-batch-size 1 " + CP2, 2),
}


@pytest.mark.parametrize("layout", NORMALIZATION)
def test_gradient_normalization_matches_docs(host, flags, layout):
    layout_flags, ranks = NORMALIZATION[layout]
    row = re.search(
        rf"^\| {re.escape(layout)} \| (\S+) \| (\S+) \|", (ROOT / "docs/support.md").read_text(), re.MULTILINE
    )
    common = f"{flags('dense', batch=4)} --loss-type dft "
    per_token = host.curves(f"{common} {PER_TOKEN} {layout_flags}", ranks=ranks)
    agree(per_token, host.curves(f"{common} {PER_TOKEN} --micro-batch-size 4"))
    assert per_token["dft/valid_tokens"][0] == 0 + 1 + 13 + 32
    assert f"{per_token['grad-norm'][0]:.4f}" == row[1]
    if "CP" in layout:
        code, output = host.start(common + layout_flags, ranks=ranks)
        assert code != 0 and "with --context-parallel-size 2 requires --calculate-per-token-loss" in output
        assert row[2] == "refused"
    else:
        default = host.curves(common + layout_flags, ranks=ranks)
        assert default["lm loss"][0] == pytest.approx(per_token["lm loss"][0], rel=1e-6)
        assert f"{default['grad-norm'][0]:.4f}" == row[2]


def test_rank_without_valid_tokens_keeps_training(host, flags):
    """Batches of 2: the first rank gets samples with no or some valid tokens, the second with 1 or all."""
    common = f"{flags('dense', batch=2)} --loss-type dft --micro-batch-size 1 "
    for layout_flags in (PER_TOKEN + DP, PER_TOKEN + CP2, DP):
        curves = host.curves(common + layout_flags, ranks=2)
        assert curves["dft/valid_tokens"][0] == 1 and len(curves["lm loss"]) == STEPS
        assert all(math.isfinite(value) for values in curves.values() for value in values)


def test_valid_tokens_are_counted_and_logged(host, flags):
    common = f"{flags('dense')} {PER_TOKEN} --micro-batch-size 1 --loss-type dft "
    run = host.begin(f"{common} {CP2} {DP} --eval-interval 1", ranks=4)
    assert run.wait() == 0
    curves, every = run.curves(), read_curves(run.folder)
    assert curves["dft/valid_tokens"] == host.curves(common)["dft/valid_tokens"]
    assert curves["dft/valid_tokens_total"] == list(itertools.accumulate(curves["dft/valid_tokens"]))
    assert all(value > 0.0 for value in every["dft/valid_tokens_per_second"])
    assert "dft/valid_tokens validation" not in every
    console = run.output()
    assert re.search(r"dft/valid_tokens: .* dft/valid_tokens_per_second: ", console)
    assert "dft/valid_tokens_total" not in console  # the console averages over --log-interval
