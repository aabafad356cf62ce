"""The loss on 1, 2 and 4 tensor-parallel ranks matches the full vocabulary; collectives are counted."""

import os
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from formulas import FORMULAS, example, loss_and_gradient, token
from ranks import Collectives, megatron_cross_entropy, needs_megatron, run_ranks

from megatron_dft import parse_objective, vocab_parallel_dft_loss, vocab_stats
from megatron_dft.ops.stats import COLLISION, ENTROPY, lower_median, row_names

pytestmark = pytest.mark.usefixtures("uninitialized_memory_is_nan")

TOLERANCE = {"rtol": 0.0, "atol": 1e-12}
EXACT = {"rtol": 0.0, "atol": 0.0, "equal_nan": True}
VOCAB = 48  # 48, 24 and 12 columns per rank
SIZES = [None, 35, 20]  # 35 empties the last of 4 shards; 20 empties the last of 2, and two of 4


def make_case(true_vocab_size):
    """[s, b] tokens with maxima in every shard, a shard of -inf, and NaN in the padding."""
    logits, target, upstream = example(6, 4, vocab=VOCAB)
    if true_vocab_size:
        target = torch.where(target >= true_vocab_size, target % true_vocab_size, target)
        logits[..., true_vocab_size:] = torch.nan
    target[2, 3] = 13
    logits[2, 3, :12] = -torch.inf
    return logits, target, upstream


def share(x, group=None):
    return x.chunk(dist.get_world_size(group), -1)[dist.get_rank(group)].clone()


def loss_gradient_and_collectives(loss_function, logits, target, upstream, group=None):
    leaf = share(logits, group).requires_grad_()
    with Collectives() as forward:
        loss = loss_function(leaf * 1, target)
    with Collectives() as backward:
        loss.backward(upstream.to(loss.dtype))
    return loss.detach(), leaf.grad, forward.seen, backward.seen


def on_one_rank():
    """Results of all tests below, from one launch."""
    group = dist.group.WORLD
    results = {}
    for size in SIZES:
        for name in FORMULAS:
            loss = partial(vocab_parallel_dft_loss, objective=name, tp_group=group, true_vocab_size=size)
            results[name, size] = [loss_gradient_and_collectives(loss, *make_case(size)) for _ in range(2)]
    logits, target, upstream = make_case(None)
    with Collectives() as seen:
        results["stats"] = vocab_stats(share(logits), target, tp_group=group)
    results["stats collectives"] = seen.seen

    inplace = partial(vocab_parallel_dft_loss, tp_group=group, return_nll=True, inplace_backward=True)
    results["host"] = loss_gradient_and_collectives(inplace, logits.bfloat16(), target, upstream)
    results["none"] = loss_gradient_and_collectives(inplace, logits[:0], target[:0], upstream[:0])[:2]
    target[1, 1], target[1, 2], target[3] = VOCAB, -1, -100
    logits[0, 1, VOCAB - 1] = torch.nan
    results["broken"] = loss_gradient_and_collectives(inplace, logits, target, upstream)[:2]
    batch = batch_of(dist.get_rank())
    loss = partial(vocab_parallel_dft_loss, objective="talr", batch_group=group)
    leaf = batch[0].requires_grad_()
    value = loss(leaf, batch[1])
    value.backward(batch[2])
    results["batch"] = value.detach(), leaf.grad
    results["medians"] = [lower_median(x, counted, group) for x, counted in medians_of(dist.get_rank())]
    for pair in ([0, 2], [1, 3]) if dist.get_world_size() == 4 else ():  # TP = 2 beside DP = 2
        group = dist.new_group(pair)
        if dist.get_rank() in pair:
            loss = partial(vocab_parallel_dft_loss, objective="deft", tp_group=group)
            results["pair"] = loss_gradient_and_collectives(loss, *example(seed=pair[0], vocab=VOCAB), group)[:2]
    return results


def batch_of(rank):
    return example((6, 9, 1, 3)[rank], vocab=VOCAB, seed=rank)  # the only token of rank 2 is ignored


def medians_of(rank):
    generator = torch.Generator().manual_seed(rank)
    sizes = ((rank, torch.float32), (7, torch.float64), (rank % 2, torch.float64), (2, torch.float32))
    values = [torch.rand(size, generator=generator, dtype=dtype) for size, dtype in sizes]
    return [(x, x < 0.8 if len(x) > 2 else x < 1.0) for x in values]


@pytest.fixture(scope="module", params=[1, 2, 4])
def ranks(request):
    return run_ranks(request.param, on_one_rank)


def full_gradient(ranks, read):
    """Concatenate the gradients of the vocabulary shards."""
    return torch.cat([read(rank) for rank in ranks], -1)


@pytest.mark.parametrize("true_vocab_size", SIZES)
@pytest.mark.parametrize("specification", FORMULAS)
def test_loss_and_gradient_match_full_vocabulary(ranks, specification, true_vocab_size):
    key = specification, true_vocab_size
    loss, gradient = loss_and_gradient(specification, *make_case(true_vocab_size), true_vocab_size)
    torch.testing.assert_close(ranks[0][key][0][0], loss, **TOLERANCE)
    torch.testing.assert_close(full_gradient(ranks, lambda r: r[key][0][1]), gradient, **TOLERANCE)


def test_loss_is_bitwise_equal_on_every_rank_and_deterministic(ranks):
    for key in ((name, size) for name in FORMULAS for size in SIZES):
        for rank in ranks:
            first, second = rank[key]
            assert torch.equal(first[0], ranks[0][key][0][0]), key
            assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1]), key
    for name in ("logprob", "entropy", "collision", "top1"):
        assert all(torch.equal(getattr(r["stats"], name), getattr(ranks[0]["stats"], name)) for r in ranks)


def test_forward_has_one_all_gather_and_backward_no_collective(ranks):
    def expected(rows):
        return [("_allgather_base_", (rows, 24))] if len(ranks) > 1 else []

    for rank in ranks:
        for specification in FORMULAS:
            needs = parse_objective(specification).needs
            rows = 3 + (ENTROPY in needs) + (COLLISION in needs) + (4 if ",k=4" in specification else 0)
            assert len(row_names(needs)) == rows
            assert [rank[specification, None][0][i] for i in (2, 3)] == [expected(rows), []], specification
        assert rank["stats collectives"] == expected(5)
        assert rank["host"][2:] == (expected(3), [])


def test_talr_uses_median_of_all_ranks_of_batch_group(ranks):
    batches = [torch.cat(parts) for parts in zip(*(batch_of(rank) for rank in range(len(ranks))), strict=True)]
    loss, gradient = loss_and_gradient("talr", *batches)
    torch.testing.assert_close(torch.cat([rank["batch"][0] for rank in ranks]), loss, **TOLERANCE)
    torch.testing.assert_close(torch.cat([rank["batch"][1] for rank in ranks]), gradient, **TOLERANCE)


def test_lower_median_is_that_of_all_ranks(ranks):
    for i, parts in enumerate(zip(*(medians_of(rank) for rank in range(len(ranks))), strict=True)):
        values = torch.cat([x[counted] for x, counted in parts])
        expected = values.median() if len(values) else torch.zeros((), dtype=values.dtype)
        assert all(torch.equal(rank["medians"][i], expected) for rank in ranks)


def test_vocab_stats_match_full_vocabulary(ranks):
    logits, target, _ = make_case(None)
    t = token(logits, target)
    stats = ranks[0]["stats"]
    for ours, truth in ((stats.logprob, -t.l), (stats.entropy, t.H), (stats.collision, t.C)):
        torch.testing.assert_close(ours, truth.masked_fill(~t.valid, 0.0), **TOLERANCE)
    assert torch.equal(stats.top1, (logits.argmax(-1) == target) & t.valid)
    assert stats.vocab_size == VOCAB


def test_return_nll_with_inplace_backward_has_dft_gradient_in_bf16(ranks):
    logits, target, upstream = make_case(None)
    loss, _ = loss_and_gradient("nll", logits.bfloat16(), target, upstream)
    _, gradient = loss_and_gradient("dft", logits.bfloat16(), target, upstream)
    torch.testing.assert_close(ranks[0]["host"][0], loss.float(), rtol=1e-5, atol=1e-5)
    ours = full_gradient(ranks, lambda r: r["host"][1])
    torch.testing.assert_close(ours.double(), gradient, rtol=2**-8 * 1.001, atol=1e-6)  # rounded to bf16 once


def test_loss_accepts_zero_tokens(ranks):
    assert [(loss.shape, gradient.shape) for loss, gradient in (r["none"] for r in ranks)] == [
        ((0, 4), (0, 4, VOCAB // len(ranks)))
    ] * len(ranks)


def test_invalid_token_makes_only_its_loss_nan_on_every_rank(ranks):
    broken = torch.zeros(6, 4, dtype=torch.bool)
    broken[1, 1] = broken[1, 2] = broken[0, 1] = True
    for rank in ranks:
        loss, gradient = rank["broken"]
        assert torch.equal(loss.isnan(), broken) and torch.equal(gradient.isnan().all(-1), broken)
        assert torch.equal(gradient.isnan().any(-1), broken) and not gradient[3].any() and not loss[3].any()


@pytest.mark.parametrize("ranks", [4], indirect=True)
def test_tp_group_within_world_matches_its_own_batch(ranks):
    for pair in ([0, 2], [1, 3]):
        loss, gradient = loss_and_gradient("deft", *example(seed=pair[0], vocab=VOCAB))
        torch.testing.assert_close(ranks[pair[1]]["pair"][0], loss, **TOLERANCE)
        torch.testing.assert_close(
            full_gradient([ranks[i] for i in pair], lambda r: r["pair"][1]), gradient, **TOLERANCE
        )


def ours_and_megatrons():
    logits, target, upstream = example(6, 4, vocab=VOCAB)
    case = (logits.float(), target.clamp(min=0), upstream)
    ours = partial(vocab_parallel_dft_loss, objective="nll", tp_group=dist.group.WORLD)
    return [loss_gradient_and_collectives(f, *case)[:2] for f in (ours, megatron_cross_entropy())]


@needs_megatron
def test_nll_matches_megatron_cross_entropy():
    for (loss, gradient), (stock_loss, stock_gradient) in run_ranks(2, ours_and_megatrons):
        torch.testing.assert_close(loss, stock_loss, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(gradient, stock_gradient, rtol=1e-6, atol=1e-6)
        assert gradient.abs().max() > 0.1


def weight_gradients(backend):
    """Weight gradients of Megatron's output layer after two micro-batches: plain, fused and deferred accumulation."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import layers

    # A PyTorch version of the CUDA extension that Megatron calls here.
    layers.fused_weight_gradient_mlp_cuda = SimpleNamespace(
        wgrad_gemm_accum_fp32=lambda rows, gradient, main_grad: main_grad.addmm_(gradient.t(), rows)
    )
    parallel_state.initialize_model_parallel()
    _, target, upstream = example(6, 4, vocab=VOCAB)
    generator = torch.Generator().manual_seed(0)
    batches = torch.randn(2, 6, 4, 8, generator=generator)
    weight = torch.nn.Parameter(torch.randn(VOCAB, 8, generator=generator))
    weight.main_grad = torch.zeros(VOCAB, 8)
    plain, deferred = torch.nn.Parameter(weight.detach().clone()), []
    hidden_gradients = []
    variants = [(False, plain, False, None), (True, weight, True, None), (True, weight, True, deferred)]
    for inplace, leaf, fused, buffer in variants:
        for batch in batches:
            hidden = batch.clone().requires_grad_()
            logits = layers.linear_with_grad_accumulation_and_async_allreduce(
                hidden, leaf, None, fused, False, False, grad_output_buffer=buffer
            )
            loss = vocab_parallel_dft_loss(logits, target, inplace_backward=inplace, backend=backend)
            loss.backward(upstream.float())
            hidden_gradients.append(hidden.grad)
    later = sum(g.flatten(0, 1).t() @ x.flatten(0, 1) for g, x in zip(deferred, batches, strict=True))
    return plain.grad, weight.main_grad, later, hidden_gradients


@needs_megatron
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_gradient_accumulation_fusion_supports_inplace_backward(backend):
    if backend == "triton":
        pytest.importorskip("triton")
    ((plain, fused, deferred, hidden),) = run_ranks(1, weight_gradients, backend)
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(deferred, plain, rtol=1e-5, atol=1e-6)
    for first, second, third in zip(hidden[:2], hidden[2:4], hidden[4:], strict=True):
        torch.testing.assert_close((second, third), (first, first), rtol=1e-5, atol=1e-6)


def fails_on_rank_1(failure):
    if dist.get_rank() == 1:
        if failure == "raises":
            raise KeyError("the reason")
        if failure == "exits":
            os._exit(3)
        time.sleep(1000.0)
    if failure != "hangs":
        time.sleep(20.0)  # in a barrier, this rank would fail as well, maybe first
    dist.barrier()


# A test of run_ranks: it must report every failure.
@pytest.mark.parametrize(
    ("failure", "message"),
    [("raises", "KeyError: 'the reason'"), ("exits", "exit code 3"), ("hangs", "in fails_on_rank_1")],
)
def test_run_ranks_raises_if_one_rank_fails(failure, message):
    with pytest.raises((mp.ProcessRaisedException, mp.ProcessExitedException, TimeoutError), match=message):
        run_ranks(2, fails_on_rank_1, failure, timeout=4.0 if failure == "hangs" else 60.0)
