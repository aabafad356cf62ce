"""Tests on a GPU: host-device syncs, CUDA graphs, memory, determinism, more than 2^31 logits (`make gpu`)."""

import warnings

import pytest
import torch
from formulas import example
from kernel_cases import at_iteration, begin, fp32_rounding
from ranks import run_ranks

from megatron_dft import linear_dft_loss, parse_objective, vocab_parallel_dft_loss

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

EXACT = {"rtol": 0.0, "atol": 0.0, "equal_nan": True}
MIB = 1 << 20
SPECIFICATIONS = ["dft", "nll", "deft", "entropy", "threshold", "luffy", "cayley", "eaft", "eaft:k=20", "trsft", "talr"]


def make_case(tokens, vocab, dtype=torch.bfloat16, seed=0):
    """Logits [N, V], likely targets with every third token masked, upstream gradients."""
    generator = torch.Generator("cuda").manual_seed(seed)
    logits = torch.empty(tokens, vocab, device="cuda", dtype=dtype).normal_(generator=generator)
    target = torch.randint(vocab, (tokens,), device="cuda", generator=generator)
    logits[torch.arange(tokens, device="cuda"), target] += 8.0
    upstream = torch.randn(tokens, device="cuda", generator=generator)
    target[::3] = -100
    return logits, target, upstream


def run(source, target, upstream, **options):
    logits = source.detach().requires_grad_() * 1
    loss = vocab_parallel_dft_loss(logits, target, inplace_backward=True, **options)
    return loss.detach(), torch.autograd.grad(loss, logits, upstream)[0]


@pytest.mark.parametrize("specification", SPECIFICATIONS)
@pytest.mark.parametrize(("tokens", "vocab"), [(256, 128256), (100, 151936), (512, 16032), (300, 50257)])
def test_triton_matches_fp64_torch_backend(tokens, vocab, specification):
    logits, target, upstream = make_case(tokens, vocab)
    loss, gradient = run(logits, target, upstream, objective=specification)
    truth = run(logits.double(), target, upstream.double(), objective=specification, backend="torch")
    torch.testing.assert_close(loss.double(), truth[0], rtol=1e-5, atol=1e-5)
    half = 2**-8 * 1.02  # half a unit of bf16, and fp32 rounding
    torch.testing.assert_close(gradient.double(), truth[1], rtol=half, atol=1e-7)


def test_gradient_is_rounded_once():
    logits, target, upstream = (x.cuda() for x in example(40, vocab=1009))
    logits = logits.bfloat16()
    target = target.clamp(min=0)
    _, gradient = run(logits, target, upstream.float())
    truth = run(logits.double(), target, upstream, backend="torch")[1]
    unit = torch.ldexp(torch.full_like(truth, 2.0**-7), truth.frexp().exponent - 1)
    slack = fp32_rounding(logits.double(), target, upstream)[1]
    assert ((gradient.double() - truth).abs() <= 0.5 * unit.clamp(min=2.0**-133) + slack).all()


@pytest.mark.parametrize("specification", SPECIFICATIONS)
def test_loss_is_bitwise_deterministic(specification):
    case = make_case(2048, 50304)
    first = run(*case, objective=specification)
    for _ in range(3):
        torch.testing.assert_close(run(*case, objective=specification), first, **EXACT)


@pytest.mark.parametrize("specification", [*SPECIFICATIONS, "dft:start=1,ramp=4"])
def test_loss_has_no_host_device_sync(specification):
    objective = at_iteration(specification, 2, "cuda")
    case = make_case(64, 1024)
    run(*case, objective=objective, return_nll=True)  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(*case, objective=objective, return_nll=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("specification", [*SPECIFICATIONS, "dft:start=1,ramp=4"])
def test_cuda_graph_follows_inputs_and_schedule(specification):
    objective = at_iteration(specification, 2, "cuda")
    source, target, upstream = make_case(96, 2000)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run(source, target, upstream, objective=objective)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(source, target, upstream, objective=objective)
    for seed in (1, 2):
        for static, fresh in zip((source, target, upstream), make_case(96, 2000, seed=seed), strict=True):
            static.copy_(fresh)
        begin(objective, 2 + seed)
        graph.replay()
        torch.testing.assert_close(captured, run(source, target, upstream, objective=objective), **EXACT)


@pytest.mark.parametrize(("specification", "inplace"), [("dft", True), ("deft", True), ("dft", False)])
def test_loss_extra_memory_is_below_1_mib(specification, inplace):
    source, target, upstream = make_case(4096, 32768)
    for measured in (False, True):
        logits = source.requires_grad_() * 1
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = vocab_parallel_dft_loss(logits, target, objective=specification, inplace_backward=inplace)
        gradient = torch.autograd.grad(loss, logits, upstream)[0]
        extra = torch.cuda.max_memory_allocated() - before - (0 if inplace else gradient.nbytes)
        assert not measured or extra < MIB
        del logits, loss, gradient


def test_loss_supports_more_than_2_to_31_logits():
    source, target, upstream = make_case(17000, 128256)
    assert source.numel() > 1 << 31
    last = run(source[-4:].clone(), target[-4:], upstream[-4:])
    loss = vocab_parallel_dft_loss(source.requires_grad_(), target)
    (gradient,) = torch.autograd.grad(loss, source, upstream)
    torch.testing.assert_close((loss[-4:].detach(), gradient[-4:]), last, **EXACT)
    assert not gradient[::3].any()


def test_inductor_compiled_loss_is_bitwise_equal_to_eager():
    case = make_case(64, 1000)

    def function(logits, target):
        return vocab_parallel_dft_loss(logits, target, objective="deft")

    compiled = torch.compile(function, fullgraph=True)
    results = []
    for call in (function, compiled):
        leaf = case[0].clone().requires_grad_()
        loss = call(leaf, case[1])
        results.append((loss.detach(), torch.autograd.grad(loss, leaf, case[2])[0]))
    torch.testing.assert_close(results[1], results[0], **EXACT)


def layer(tokens, width, vocab, dtype=torch.bfloat16):
    """Hidden states and weight of an output layer, both leaves, with about normal logits and likely targets."""
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.empty(tokens, width, device="cuda", dtype=dtype).normal_(generator=generator)
    weight = torch.empty(vocab, width, device="cuda", dtype=dtype).normal_(0.0, width**-0.5, generator=generator)
    target = torch.randint(vocab, (tokens,), device="cuda", generator=generator)
    hidden += 8.0 * weight[target]
    upstream = torch.randn(tokens, device="cuda", generator=generator)
    target[::3] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), target, upstream


TOKENS = {"token_chunk": 64}


def run_layer(hidden, weight, target, upstream, **options):
    if "token_chunk" in options:
        options["upstream"] = upstream
    loss = linear_dft_loss(hidden, weight, target, **options)
    return loss.detach(), *torch.autograd.grad(loss, (hidden, weight), upstream)


@pytest.mark.parametrize("specification", SPECIFICATIONS)
@pytest.mark.parametrize(
    "options", [{}, {"vocab_chunk": 5000, "keep_chunks": 1}, {"compact_masked_tokens": False}, TOKENS], ids=str
)
def test_linear_dft_loss_error_is_at_most_twice_that_of_full_logits(specification, options):
    if options == TOKENS and not parse_objective(specification).per_token:
        pytest.skip("depends on all tokens")
    hidden, weight, target, upstream = layer(300, 512, 32000)
    ours = run_layer(hidden, weight, target, upstream, objective=specification, **options)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    truth = run_layer(*exact, target, upstream.double(), objective=specification)
    loss = vocab_parallel_dft_loss(hidden @ weight.t(), target, objective=specification, inplace_backward=True)
    plain = (loss.detach(), *torch.autograd.grad(loss, (hidden, weight), upstream))
    for our, same_dtype, right in zip(ours, plain, truth, strict=True):
        error, theirs = ((x.double() - right).norm() for x in (our, same_dtype))
        assert error <= 2 * theirs


@pytest.mark.skipif(not hasattr(torch.ops.aten.addmm, "dtype_out"), reason="needs torch 2.8")
def test_products_of_chunks_are_added_in_fp32():
    """The error of many chunks is that of one: the sum alone is rounded to bf16."""
    hidden, weight, target, upstream = layer(1024, 512, 32000)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    truth = run_layer(*exact, target, upstream.double())[1:]

    def errors(**chunk):
        ours = run_layer(hidden, weight, target, upstream, **chunk)[1:]
        return [(x.double() - right).norm() for x, right in zip(ours, truth, strict=True)]

    one = errors(vocab_chunk=32000)
    assert errors(vocab_chunk=2000)[0] <= 1.05 * one[0]
    assert errors(**TOKENS)[1] <= 1.05 * one[1]


@pytest.mark.parametrize("options", [{}, TOKENS], ids=str)
def test_linear_dft_loss_is_bitwise_deterministic(options):
    case = layer(1000, 512, 32000)
    first = run_layer(*case, objective="deft", **options)
    for _ in range(3):
        torch.testing.assert_close(run_layer(*case, objective="deft", **options), first, **EXACT)


@pytest.mark.parametrize("options", [{}, TOKENS], ids=str)
def test_compact_masked_tokens_has_one_host_device_sync(options):
    case = layer(300, 512, 32000)
    run_layer(*case, **options)  # compiles the kernels
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run_layer(*case, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sum("synchronizing" in str(warning.message) for warning in caught) == 1


@pytest.mark.parametrize("options", [{}, TOKENS], ids=str)
def test_cuda_graph_captures_linear_dft_loss_and_rejects_compaction(options):
    hidden, weight, target, upstream = layer(96, 256, 20000)
    options = {**options, "compact_masked_tokens": False}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run_layer(hidden, weight, target, upstream, **options)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run_layer(hidden, weight, target, upstream, **options)
        with pytest.raises(ValueError, match="compact_masked_tokens: not supported during CUDA graph"):
            run_layer(hidden, weight, target, upstream)
    target.copy_(target.roll(1))
    upstream.neg_()
    graph.replay()
    expected = run_layer(hidden, weight, target, upstream, **options)
    torch.testing.assert_close(captured, expected, **EXACT)


def test_vocab_chunk_extra_memory_is_at_most_one_sixth_of_full_logits():
    hidden, weight, target, upstream = layer(8192, 2048, 128256)
    target.clamp_(min=0)
    extra = {}
    for chunk in (128256, 8192):
        for _ in range(2):  # the first run loads code
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            results = run_layer(hidden, weight, target, upstream, vocab_chunk=chunk)
            extra[chunk] = torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in results)
            del results
    assert extra[128256] >= 2 * 8192 * 128256 and extra[8192] <= 2 * 8192 * 128256 / 6


def on_one_of_two_ranks():
    """Loss and gradient of this rank's shard. Both ranks share one GPU."""
    results = {}
    logits, target, upstream = (x.cuda() for x in example(64, 2, vocab=512))
    shard = logits.float().chunk(2, -1)[torch.distributed.get_rank()].contiguous()
    group = torch.distributed.group.WORLD
    for specification in ("dft", "deft", "entropy", "cayley"):
        options = {"objective": specification, "tp_group": group, "backend": "triton"}
        results[specification] = [x.cpu() for x in run(shard, target, upstream.float(), **options)]
    hidden, weight, target, upstream = layer(300, 512, 32000)
    weight = weight.detach().chunk(2)[torch.distributed.get_rank()].requires_grad_()
    for options in ({"vocab_chunk": 3000}, TOKENS):
        results[str(options)] = [
            x.cpu() for x in run_layer(hidden, weight, target, upstream, tp_group=group, **options)
        ]
    return results


def test_two_tp_ranks_on_one_gpu_match_one_rank():
    """The Triton backend with a process group: gloo, with tensors on the GPU."""
    ranks = run_ranks(2, on_one_of_two_ranks, start="spawn")
    logits, target, upstream = (x.cuda() for x in example(64, 2, vocab=512))
    for specification in ("dft", "deft", "entropy", "cayley"):
        loss, gradient = run(logits.float(), target, upstream.float(), objective=specification, backend="triton")
        assert torch.equal(ranks[0][specification][0], ranks[1][specification][0])
        torch.testing.assert_close(ranks[0][specification][0], loss.cpu(), rtol=2e-6, atol=2e-6)
        ours = torch.cat([rank[specification][1] for rank in ranks], -1)
        torch.testing.assert_close(ours, gradient.cpu(), rtol=1e-5, atol=2e-6)
    case = layer(300, 512, 32000)
    for options in ({"vocab_chunk": 3000}, TOKENS):
        one = [x.cpu() for x in run_layer(*case, **options)]
        both = [rank[str(options)] for rank in ranks]
        found = both[0][0], both[0][1], torch.cat([gradient for *_, gradient in both])
        assert torch.equal(both[0][0], both[1][0]) and torch.equal(both[0][1], both[1][1])
        for ours, theirs in zip(found, one, strict=True):  # bf16 products, summed in another order
            assert (ours - theirs).norm() <= 2.0**-7 * theirs.norm()


@pytest.fixture
def megatron():
    """Megatron on one rank with this GPU."""
    pytest.importorskip("megatron.core")
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    torch.distributed.init_process_group("nccl", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("mtp", [None, 1])
def test_micro_batch_has_no_host_device_sync_after_first(megatron, mtp):
    """Model, loss, full metrics and channels. Compaction is off, because it costs one host-device sync."""
    from tiny_models import micro_batch_with_metrics

    micro_batch = micro_batch_with_metrics("cuda", mtp)  # test_binding.py runs it on a CPU
    first = micro_batch()
    if mtp is None:  # Megatron's multi-token prediction may sync
        torch.cuda.set_sync_debug_mode("error")
    try:
        second = micro_batch()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert {name: x.tolist() for name, x in first.items()} == {name: x.tolist() for name, x in second.items()}
