"""linear_dft_loss, in chunks of the vocabulary or of tokens, matches the loss of the full logits."""

import importlib.util
import itertools
import math
import os

import pytest
import torch
import torch.distributed as dist
from formulas import FORMULAS, example, loss_and_gradient
from ranks import Collectives, run_ranks
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_dft import linear_dft_loss, parse_objective, vocab_parallel_dft_loss
from megatron_dft.ops.compaction import loss_valid_tokens
from megatron_dft.ops.linear_fused import Split
from megatron_dft.ops.objectives import Objective

pytestmark = pytest.mark.usefixtures("uninitialized_memory_is_nan")

INTERPRETER = importlib.util.find_spec("triton") is not None and "TRITON_INTERPRET" in os.environ
SEQUENCE, BATCH, HIDDEN, VOCAB = 8, 3, 8, 48
TOLERANCE = {"rtol": 0.0, "atol": 1e-12}
SIZES = [None, 35, 10]  # 35 empties the last of 4 shards, 10 all but the first
# Chunks of one column or token, of an odd size, larger than the shard; masked tokens removed or not; sequence parallel
# or not. With token_chunk the upstream gradient is given in forward.
VARIANTS = {
    "columns": {"vocab_chunk": 1, "compact_masked_tokens": False},
    "odd": {"vocab_chunk": 5, "sequence_parallel": True},
    "odd, kept": {"vocab_chunk": 5, "keep_chunks": 2},
    "odd, all kept": {"vocab_chunk": 7, "keep_chunks": 100, "compact_masked_tokens": False},
    "one": {"vocab_chunk": 1000, "sequence_parallel": True, "compact_masked_tokens": False},
    "single tokens": {"token_chunk": 1},
    "tokens": {"token_chunk": 5, "sequence_parallel": True},
    "tokens, masked too": {"token_chunk": 7, "compact_masked_tokens": False},
    "all tokens": {"token_chunk": 1000, "sequence_parallel": True, "compact_masked_tokens": False},
}
PER_TOKEN = [name for name in FORMULAS if parse_objective(name).per_token]


def make_case(true_vocab_size=None):
    """hidden [s, b, H], weight [V, H], target and upstream [s, b]; probabilities from tiny to nearly 1."""
    _, target, upstream = example(SEQUENCE, BATCH, vocab=VOCAB)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(SEQUENCE, BATCH, HIDDEN, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator, dtype=torch.float64)
    if true_vocab_size:
        target = torch.where(target >= true_vocab_size, target % true_vocab_size, target)
    likely = target.clamp(min=0)
    hidden += (
        weight[likely] * torch.linspace(-0.5, 1.5, target.numel(), dtype=torch.float64).view(target.shape)[..., None]
    )
    return hidden, weight, target, upstream


def truth(specification, hidden, weight, target, upstream, true_vocab_size=None):
    """Loss and the gradients of hidden and weight from the full logits, in fp64."""
    loss, gradient = loss_and_gradient(specification, hidden @ weight.t(), target, upstream, true_vocab_size)
    return loss, gradient @ weight, gradient.flatten(0, 1).t() @ hidden.flatten(0, 1)


def result(hidden, weight, target, upstream, **options):
    """Loss and gradients of `linear_dft_loss`, and the collectives of forward and backward."""
    hidden, weight = (x.clone().requires_grad_() for x in (hidden, weight))
    if "token_chunk" in options:
        options["upstream"] = upstream
    with Collectives() as forward:
        loss = linear_dft_loss(hidden, weight, target, **options)
    with Collectives() as backward:
        gradients = torch.autograd.grad(loss, (hidden, weight), upstream)
    return (loss.detach(), *gradients), forward.seen, backward.seen


def on_one_rank():
    ranks, rank = dist.get_world_size(), dist.get_rank()

    def share(specification, size, **variant):
        hidden, weight, *tokens = make_case(size)
        part = hidden.chunk(ranks)[rank] if variant.get("sequence_parallel") else hidden
        options = {"objective": specification, "true_vocab_size": size, "tp_group": dist.group.WORLD, **variant}
        return result(part, weight.chunk(ranks)[rank], *tokens, **options)

    facts = {
        (name, None, variant): share(name, None, **VARIANTS[variant])
        for name, variant in itertools.product(FORMULAS, VARIANTS)
        if "token_chunk" not in VARIANTS[variant] or name in PER_TOKEN
    }
    facts |= {
        ("deft", size, variant): share("deft", size, **VARIANTS[variant])
        for size, variant in itertools.product(SIZES, VARIANTS)
    }
    hidden, weight, target, upstream = make_case()
    weight = weight.chunk(ranks)[rank]
    for variant, options in VARIANTS.items():
        part = hidden.chunk(ranks)[rank] if options.get("sequence_parallel") else hidden
        ignored = torch.full_like(target, -100)
        facts["nothing", variant] = result(part, weight, ignored, upstream, tp_group=dist.group.WORLD, **options)
    return facts


@pytest.fixture(scope="module", params=[1, 2, 4])
def ranks(request):
    return run_ranks(request.param, on_one_rank)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("specification", "size"), [(name, None) for name in FORMULAS] + [("deft", size) for size in SIZES[1:]]
)
def test_linear_dft_loss_matches_full_logits(ranks, specification, size, variant):
    if "token_chunk" in VARIANTS[variant] and specification not in PER_TOKEN:
        pytest.skip("depends on all tokens")
    loss, hidden_gradient, weight_gradient = truth(specification, *make_case(size), size)
    ours = [rank[specification, size, variant][0] for rank in ranks]
    for rank, (our_loss, gradient, _) in enumerate(ours):
        torch.testing.assert_close(our_loss, loss, **TOLERANCE)
        split = VARIANTS[variant].get("sequence_parallel")
        expected = hidden_gradient.chunk(len(ranks))[rank] if split else hidden_gradient
        torch.testing.assert_close(gradient, expected, **TOLERANCE)
    torch.testing.assert_close(torch.cat([gradient for *_, gradient in ours]), weight_gradient, **TOLERANCE)


def test_linear_dft_loss_all_gathers_stats_and_all_reduces_once(ranks):
    """One all-gather for all chunks of the vocabulary, one for each chunk of tokens."""
    if len(ranks) == 1:
        assert all(seen == [] for fact in ranks[0].values() for seen in fact[1:])
        return
    valid = int((make_case()[2] != -100).sum())
    for rank, (variant, options) in itertools.product(ranks, VARIANTS.items()):
        tokens = valid if options.get("compact_masked_tokens", True) else SEQUENCE * BATCH
        summed = [("allreduce_", (tokens, HIDDEN))]
        gathered = []
        if options.get("sequence_parallel"):
            gathered.append(("_allgather_base_", (SEQUENCE // len(ranks), BATCH, HIDDEN)))
        _, forward, backward = rank["deft", None, variant]
        if "token_chunk" in options:
            rows = Split(token_chunk=options["token_chunk"]).rows(tokens)
            gathered += [("_allgather_base_", (4, chunk.stop - chunk.start)) for chunk in rows]
            assert (forward, backward) == (gathered + summed, [])
        else:
            chunks = len(Split(options["vocab_chunk"]).columns(VOCAB // len(ranks)))
            gathered.append(("_allgather_base_", (4 * chunks, tokens)))
            assert (forward, backward) == (gathered, summed)


@pytest.mark.parametrize("variant", VARIANTS)
def test_batch_without_targets_has_zero_loss_and_gradient(ranks, variant):
    for rank in ranks:
        numbers, forward, backward = rank["nothing", variant]
        assert all(x.isfinite().all() and not x.any() for x in numbers)
        if len(ranks) > 1 and VARIANTS[variant].get("compact_masked_tokens", True):
            # Every rank joins the collective.
            assert (forward + backward)[-1] == ("allreduce_", (1, HIDDEN))


@pytest.mark.parametrize("ignore_index", [-100, 7])
def test_ignored_tokens_skip_output_layer(ignore_index):
    hidden, _, target, _ = make_case()
    hidden, target = hidden.flatten(0, 1), target.flatten().masked_fill(target.flatten() == -100, ignore_index)
    passed = []

    def loss_and_stats(hidden, target):
        passed.append((hidden, target))
        return target.double(), None

    loss, _, rows = loss_valid_tokens(loss_and_stats, hidden, target, ignore_index=ignore_index)
    valid = target != ignore_index
    assert torch.equal(rows, valid.nonzero()[:, 0]) and 0 < len(rows) < len(target)
    assert torch.equal(passed[0][0], hidden[valid]) and torch.equal(passed[0][1], target[valid])
    assert torch.equal(loss, target.double().masked_fill(~valid, 0.0))


@pytest.mark.parametrize("compact", [True, False])
def test_ignore_index_may_be_token_id(compact):
    hidden, weight, target, upstream = make_case()
    options = {"ignore_index": 7, "vocab_chunk": 5, "compact_masked_tokens": compact}
    ours, _, _ = result(hidden, weight, target.masked_fill(target == -100, 7), upstream, **options)
    expected = truth("dft", hidden, weight, target.masked_fill(target == 7, -100), upstream)
    assert (target == 7).any()
    torch.testing.assert_close(ours, expected, **TOLERANCE)


@pytest.mark.parametrize("options", [{}, {"token_chunk": 5}])
def test_linear_dft_loss_accepts_zero_tokens(options):
    hidden, weight, target, upstream = make_case()
    (loss, *gradients), _, _ = result(hidden[:0], weight, target[:0], upstream[:0], **options)
    assert loss.shape == (0, BATCH) and gradients[0].shape == (0, BATCH, HIDDEN) and not gradients[1].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("chunk", [{"vocab_chunk": n} for n in (3, 16, 100)] + [{"token_chunk": n} for n in (1, 5, 99)])
def test_linear_dft_loss_error_is_at_most_twice_that_of_full_logits(dtype, chunk):
    hidden, weight, target, upstream = make_case()
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    exact = truth("dft", hidden.double(), weight.double(), target, upstream)
    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    loss = vocab_parallel_dft_loss(leaves[0] @ leaves[1].t(), target)
    plain = (loss.detach(), *torch.autograd.grad(loss, leaves, upstream.float()))
    ours, _, _ = result(hidden, weight, target, upstream.float(), **chunk)
    for our, same_dtype, right in zip(ours, plain, exact, strict=True):
        error, theirs = ((x.double() - right).norm() for x in (our, same_dtype))
        assert our.dtype == same_dtype.dtype and error <= 2 * theirs


def test_hidden_gradient_is_accumulated_over_chunks_in_fp32():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=generator).bfloat16() for n in (32, 2048))
    target, upstream = torch.randint(2048, (32,), generator=generator), torch.ones(32)
    expected = truth("nll", hidden.double()[None], weight.double(), target[None], upstream.double()[None])[1][0]
    (_, gradient, _), _, _ = result(hidden, weight, target, upstream, objective="nll", vocab_chunk=16)
    plain = linear_dft_loss(hidden.requires_grad_(), weight, target, objective="nll", vocab_chunk=2048)
    (of_one_chunk,) = torch.autograd.grad(plain, hidden, upstream)
    error, one_chunk_error = ((x.double() - expected).norm() for x in (gradient, of_one_chunk))
    assert error <= 1.2 * one_chunk_error


@pytest.mark.parametrize("frozen", [0, 1])
def test_frozen_input_gets_no_gradient_and_no_matmul(frozen):
    hidden, weight, target, upstream = make_case()
    expected = truth("dft", hidden, weight, target, upstream)
    leaves = [hidden.requires_grad_(frozen != 0), weight.requires_grad_(frozen != 1)]
    loss = linear_dft_loss(*leaves, target, vocab_chunk=16)
    with Operators() as seen:
        loss.backward(upstream)
    torch.testing.assert_close(leaves[1 - frozen].grad, expected[2 - frozen], **TOLERANCE)
    assert leaves[frozen].grad is None
    assert seen.products == 3 * 2  # recomputed logits and one gradient, for each chunk


@pytest.mark.parametrize(("frozen", "products"), [(None, 3), (0, 2), (1, 2)])
def test_gradient_in_forward_needs_three_products_per_chunk(frozen, products):
    hidden, weight, target, upstream = make_case()
    expected = truth("dft", hidden, weight, target, upstream)
    leaves = [hidden.requires_grad_(frozen != 0), weight.requires_grad_(frozen != 1)]
    with Operators() as seen:
        loss = linear_dft_loss(*leaves, target, token_chunk=8, compact_masked_tokens=False, upstream=upstream)
    assert seen.products == 3 * products
    with Operators() as seen:
        loss.backward(upstream)
    assert seen.products == 0
    for leaf, gradient, i in zip(leaves, expected[1:], range(2), strict=True):
        assert leaf.grad is None if i == frozen else torch.allclose(leaf.grad, gradient, **TOLERANCE)


def test_gradient_in_forward_is_skipped_without_grad():
    hidden, weight, target, _ = make_case()
    options = {"token_chunk": 8, "upstream": 1.0, "compact_masked_tokens": False}
    with Operators() as seen, torch.no_grad():
        linear_dft_loss(hidden.requires_grad_(), weight.requires_grad_(), target, **options)
    assert seen.products == 1  # logits, in one chunk of the vocabulary
    with Operators() as seen:
        linear_dft_loss(hidden.detach(), weight.detach(), target, **options)
    assert seen.products == 3


@pytest.mark.parametrize("upstream", [1.0, torch.tensor(1.0), torch.ones(SEQUENCE, BATCH)])
@pytest.mark.parametrize("compact", [True, False])
def test_gradient_in_forward_matches_sum(upstream, compact):
    hidden, weight, target, _ = make_case()
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    expected = torch.autograd.grad(linear_dft_loss(*leaves, target).sum(), leaves)
    loss = linear_dft_loss(*leaves, target, upstream=upstream, token_chunk=4, compact_masked_tokens=compact)
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), leaves), expected, **TOLERANCE)


@pytest.mark.parametrize("frozen", [None, 0, 1])
def test_unexpected_upstream_makes_gradients_nan(frozen):
    hidden, weight, target, upstream = make_case()
    hidden.requires_grad_(frozen != 0)
    weight.requires_grad_(frozen != 1)
    leaves = [x for x in (hidden, weight) if x.requires_grad]
    token = tuple((target != -100).nonzero()[-1])
    for change in (1e-5, math.nan, -2.0 * upstream[token]):
        other = upstream.clone()
        other[token] += change
        loss = linear_dft_loss(hidden, weight, target, upstream=upstream, token_chunk=4)
        assert all(x.norm().isnan() for x in torch.autograd.grad(loss, leaves, other))
    other = torch.where(target == -100, 7.0, upstream)  # masked tokens receive anything
    loss = linear_dft_loss(hidden, weight, target, upstream=upstream, token_chunk=4, compact_masked_tokens=False)
    assert all(x.isfinite().all() for x in torch.autograd.grad(loss, leaves, other))


def test_gradient_in_forward_raises_in_second_backward():
    hidden, weight, target, _ = make_case()
    loss = linear_dft_loss(hidden.requires_grad_(), weight, target, upstream=1.0).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="forward computed the gradients for one backward, and this is the second"):
        loss.backward()


def test_token_chunks_are_equal_and_as_few_as_possible():
    for tokens, sizes in {0: [0], 1: [1], 5: [5], 6: [3, 3], 10: [5, 5], 11: [4, 4, 3], 16: [4] * 4}.items():
        chunks = Split(token_chunk=5).rows(tokens)
        assert [chunk.stop - chunk.start for chunk in chunks] == sizes
        assert [chunk.start for chunk in chunks] == [0, *(chunk.stop for chunk in chunks[:-1])]


class Operators(TorchDispatchMode):
    """Record the names of the operators that run."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.__name__)
        return function(*args, **(kwargs or {}))

    def __enter__(self):
        self.names = []
        return super().__enter__()

    @property
    def products(self):
        return sum(name.startswith(("mm", "addmm")) for name in self.names)


@pytest.mark.parametrize(("keep", "products"), [(0, 9 + 3), (1, 9 + 2), (2, 9 + 1), (3, 9), (9, 9)])
def test_keep_chunks_skips_recompute_of_saved_logits(keep, products):
    hidden, weight, target, upstream = make_case()
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    with Operators() as seen:
        linear_dft_loss(*leaves, target, vocab_chunk=16, keep_chunks=keep).backward(upstream)
    assert seen.products == products


def test_keep_chunks_saves_nothing_without_grad():
    hidden, weight, target, _ = make_case()
    with Operators() as seen, torch.no_grad():
        linear_dft_loss(hidden.requires_grad_(), weight, target, vocab_chunk=16, keep_chunks=3)
    kept = sum(name.startswith("mm") and not name.endswith("out") for name in seen.names)
    assert kept == 0


def test_second_backward_is_exact_and_raises_with_keep_chunks():
    hidden, weight, target, upstream = make_case()
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    loss = linear_dft_loss(*leaves, target, vocab_chunk=16)
    first = torch.autograd.grad(loss, leaves, upstream, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, leaves, upstream)))
    loss = linear_dft_loss(*leaves, target, vocab_chunk=16, keep_chunks=1)
    torch.autograd.grad(loss, leaves, upstream, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, leaves, upstream)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_compaction_calls_nonzero_once_with_triton(backend):
    if backend == "triton" and not INTERPRETER:
        pytest.skip("needs Triton's interpreter; test_gpu.py covers GPUs")
    hidden, weight, target, upstream = make_case()
    leaves = [x.float().requires_grad_() for x in (hidden, weight)]
    with Operators() as seen:
        linear_dft_loss(*leaves, target, vocab_chunk=16, backend=backend).backward(upstream.float())
    syncs = [name for name in seen.names if name.split(".")[0] in ("nonzero", "_local_scalar_dense", "is_nonzero")]
    assert syncs.count("nonzero.default") >= 1
    if backend == "triton":  # the torch backend, which is meant for CPUs, calls nonzero as well
        assert syncs == ["nonzero.default"]


@pytest.mark.skipif(not INTERPRETER, reason="needs Triton's interpreter; test_gpu.py covers GPUs")
@pytest.mark.parametrize("chunk", [{"vocab_chunk": 20, "keep_chunks": 1}, {"token_chunk": 5}])
def test_triton_backend_supports_chunks(chunk):
    hidden, weight, target, upstream = make_case()
    expected = truth("deft", hidden.float().double(), weight.float().double(), target, upstream)
    options = {"objective": "deft", "backend": "triton", **chunk}
    ours, _, _ = result(hidden.float(), weight.float(), target, upstream.float(), **options)
    for our, right in zip(ours, expected, strict=True):
        torch.testing.assert_close(our.double(), right, rtol=1e-5, atol=1e-5)


def test_linear_dft_loss_under_torch_compile_matches_formula():
    hidden, weight, target, upstream = make_case()
    leaves = [x.requires_grad_() for x in (hidden, weight)]

    @torch.compile(backend="aot_eager")
    def twice(hidden, weight):
        return linear_dft_loss(2 * hidden, weight, target, vocab_chunk=16) * 1

    expected = truth("dft", 2 * hidden.detach(), weight.detach(), target, upstream)
    loss = twice(*leaves)
    torch.testing.assert_close(loss.detach(), expected[0], **TOLERANCE)
    gradients = torch.autograd.grad(loss, leaves, upstream)
    torch.testing.assert_close(gradients, (2 * expected[1], expected[2]), **TOLERANCE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, w, t: (h, w[:, 1:], t), r"weight: expected \[V/tp, 8\] for hidden"),
        (lambda h, w, t: (h, w[0], t), r"weight: expected \[V/tp, 8\] for hidden"),
        (lambda h, w, t: (h, w.float(), t), "weight: expected a torch.Tensor of torch.float64 .* fp8"),
        (lambda h, w, t: (h, w.to(torch.float8_e4m3fn), t), "of torch.float8_e4m3fn .* for fp8 and fp4 compute"),
        (lambda h, w, t: (h.long(), w, t), "hidden states: expected bf16, fp16, fp32 or fp64, got torch.int64"),
        (lambda h, w, t: (h, w, t.int()), "target: expected int64 token ids"),
        (lambda h, w, t: (h, w, t.t()), r"Megatron's hidden states are \[s, b, ...\], its labels \[b, s\]: transpose"),
    ],
)
def test_linear_dft_loss_rejects_mismatched_input(change, message):
    with pytest.raises(ValueError, match=message):
        linear_dft_loss(*change(*make_case()[:3]))


class Doubled(Objective):
    """An objective of the user."""

    name = "doubled"

    def __call__(self, stats):
        return 2.0 * stats.nll, torch.full_like(stats.nll, 2.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_chunk": 0}, "vocab_chunk: expected at least 1 column, got 0"),
        ({"keep_chunks": -1}, "keep_chunks: expected 0 or more, got -1"),
        ({"true_vocab_size": 49}, "true_vocab_size: expected at most 48"),
        ({"objective": "dtf"}, "unknown objective 'dtf'"),
        ({"backend": "cuda"}, "backend: expected one of auto, torch, triton"),
        ({"token_chunk": 0, "upstream": 1.0}, "token_chunk: expected at least 1 token, got 0"),
        ({"token_chunk": 5}, "token_chunk: requires upstream"),
        ({"vocab_chunk": 5, "upstream": 1.0}, "vocab_chunk, keep_chunks: not used with upstream; pass token_chunk"),
        ({"keep_chunks": 1, "upstream": 1.0}, "vocab_chunk, keep_chunks: not used with upstream; pass token_chunk"),
        ({"upstream": torch.ones(BATCH)}, r"upstream: expected a number or the shape of the target, \(8, 3\), got"),
        ({"objective": "cayley", "upstream": 1.0}, "upstream: objective 'cayley:floor=0.5' depends on all tokens"),
        ({"objective": "talr:start=1", "upstream": 1.0}, "upstream: objective 'talr:start=1,ramp=0' depends on all"),
        ({"objective": Doubled(), "upstream": 1.0}, "upstream: objective 'doubled' depends on all tokens"),
    ],
)
def test_linear_dft_loss_rejects_invalid_options(options, message):
    with pytest.raises(ValueError, match=message):
        linear_dft_loss(*make_case()[:3], **options)


class Declared(Doubled):
    per_token = True


def test_objective_of_the_user_that_is_per_token_gets_its_gradient_in_forward():
    hidden, weight, target, _ = make_case()
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    expected = torch.autograd.grad(linear_dft_loss(*leaves, target, objective=Doubled()).sum(), leaves)
    loss = linear_dft_loss(*leaves, target, objective=Declared(), upstream=1.0, token_chunk=4)
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), leaves), expected, **TOLERANCE)


def test_invalid_target_raises_under_anomaly_detection():
    hidden, weight, target, _ = make_case()
    target[1, 1] = VOCAB
    assert linear_dft_loss(hidden, weight, target).isnan().sum() == 1
    with torch.autograd.detect_anomaly(check_nan=False), pytest.raises(ValueError, match="expected ids from 0 to 47"):
        linear_dft_loss(hidden, weight, target)


@pytest.mark.parametrize("options", [{"vocab_chunk": 5, "keep_chunks": n} for n in (0, 1, 100)] + [{"token_chunk": 5}])
def test_autocast_leaves_linear_dft_loss_unchanged(options):
    """Matmuls keep the dtype of their arguments in forward and backward, with and without saved chunks."""
    hidden, weight, target, upstream = (x.float() if x.is_floating_point() else x for x in make_case())
    expected = result(hidden, weight, target, upstream, **options)[0]
    with torch.autocast("cpu", torch.bfloat16):
        actual = result(hidden, weight, target, upstream, **options)[0]
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
