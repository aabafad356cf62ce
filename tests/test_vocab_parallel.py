"""The loss on one rank: dtypes, layouts, options, invalid input, and merging vocabulary shards."""

import math

import pytest
import torch
import torch.nn.functional as F
from formulas import FORMULAS, example, loss_and_gradient, token
from kernel_cases import (
    EXACT,
    LAYOUTS,
    assert_any_split_merges,
    assert_same,
    assert_saving_changes_nothing,
    fp32_rounding,
    run,
)

from megatron_dft import parse_objective, token_loss, vocab_parallel_dft_loss, vocab_stats
from megatron_dft.ops import torch_backend

pytestmark = pytest.mark.usefixtures("uninitialized_memory_is_nan")

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
INF, NAN = math.inf, math.nan


@pytest.mark.parametrize("specification", FORMULAS)
@pytest.mark.parametrize("true_vocab_size", [None, 7])
def test_loss_and_gradient_match_formula(specification, true_vocab_size):
    logits, target, upstream = example(6, 4, vocab=13)
    target = torch.where(target >= 7, target - 7, target)
    if true_vocab_size is None:
        target = target.clamp(min=0)  # no token is ignored: rows are sliced, not gathered
    else:
        logits[..., true_vocab_size:] = torch.tensor([NAN, INF, 1e4, 0, 0, 0])  # padding is never read
    actual = run(logits, target, upstream, objective=specification, true_vocab_size=true_vocab_size)
    assert_same(actual, loss_and_gradient(specification, logits, target, upstream, true_vocab_size))


# One and two entries; around a vector (127 to 129); primes; three chunks of rows (4099 with 300 tokens).
@pytest.mark.parametrize("vocab", [1, 2, 127, 128, 129, 1009, 4099])
@pytest.mark.parametrize("tokens", [1, 2, 300])
def test_loss_supports_any_token_count_and_vocab_size(tokens, vocab):
    case = example(tokens, vocab=vocab)
    case[1][0] = vocab - 1
    assert_same(run(*case), loss_and_gradient("dft", *case))


@pytest.mark.parametrize("chunk", [1, 22, 23, 250])  # elements; a row has 11, so 1, 2, 2 and 22 rows
@pytest.mark.parametrize("ignored", [True, False])
def test_loss_is_independent_of_row_chunk_size(chunk, ignored, monkeypatch):
    logits, target, upstream = example()
    case = (logits, target if ignored else target.clamp(min=0), upstream)
    expected = run(*case, objective="deft")
    monkeypatch.setattr(torch_backend, "CHUNK_ELEMENTS", chunk)
    assert_same(run(*case, objective="deft"), expected, {"rtol": 0.0, "atol": 1e-15})


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("shape", [(), (5,), (0,), (4, 1), (1, 4), (3, 0), (2, 3, 2)])
def test_loss_supports_any_leading_shape(shape, inplace):
    logits, target, upstream = (x[0] for x in example(1, *shape, seed=3))
    target = target.abs() % 11
    loss, gradient = run(logits, target, upstream, inplace_backward=inplace, objective="cayley")
    flat = (logits.view(-1, 11), target.view(-1), upstream.view(-1))
    assert loss.shape == shape and gradient.shape == (*shape, 11)
    if target.numel():
        assert_same((loss.view(-1), gradient.view(-1, 11)), loss_and_gradient("cayley:floor=0.5", *flat))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(6, 4), (6, 1)])  # b = 1 has other strides
def test_loss_supports_any_strides(shape, layout, inplace):
    logits, target, upstream = example(*shape)
    expected = run(logits, target, upstream)
    transposed = target.t().contiguous().t()  # labels are [b, s] in Megatron
    actual = run(logits, transposed, upstream, LAYOUTS[layout], inplace_backward=inplace)
    assert_same(actual, expected, {"rtol": 0.0, "atol": 1e-15})


# Vocabularies: small; prime; large, with long sums and several chunks of rows.
@pytest.mark.parametrize("vocab", [11, 1009, 32003])
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_loss_error_is_at_most_twice_that_of_torch_in_same_dtype(dtype, vocab):
    logits, target, upstream = example(40, vocab=vocab)
    logits = logits.to(dtype)
    upstream = upstream.to(dtype).double()
    truth = loss_and_gradient("dft", logits, target, upstream)

    leaf = logits.clone().requires_grad_()
    ce = F.cross_entropy(leaf, target, reduction="none")
    eager_loss = ce * torch.exp(-ce).detach()
    eager_loss.backward(upstream.to(dtype))

    loss, gradient = run(logits, target, upstream)
    assert (loss.dtype, gradient.dtype) == (torch.float32, dtype)
    slack = fp32_rounding(logits, target, upstream)
    for ours, eager, true, spare in zip((loss, gradient), (eager_loss, leaf.grad), truth, slack, strict=True):
        excess = (ours.double() - true).abs() - 2 * (eager.double() - true).abs() - spare
        assert excess.max() <= 0.0


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradient_is_rounded_once(dtype, inplace):
    """The error is at most half a unit in the last place plus fp32 rounding."""
    logits, target, upstream = example(40, vocab=1009)
    logits = logits.to(dtype)
    target = target.clamp(min=0)
    _, truth = loss_and_gradient("dft", logits, target, upstream)
    _, gradient = run(logits, target, upstream, inplace_backward=inplace)
    info = torch.finfo(dtype)
    unit = torch.ldexp(torch.full_like(truth, info.eps), truth.frexp().exponent - 1)
    unit = unit.clamp(min=info.smallest_normal * info.eps)
    assert ((gradient.double() - truth).abs() <= 0.5 * unit + fp32_rounding(logits, target, upstream)[1]).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shift", [500.0, -500.0, 1e4, -1e4])
@pytest.mark.parametrize("specification", ["dft", "deft", "entropy"])
def test_shifted_logits_give_bitwise_equal_results(shift, dtype, specification):
    logits, target, upstream = example()
    logits = (logits * 64).round().to(dtype) / 64  # the shift is exact
    expected = run(logits, target, upstream, objective=specification)
    assert_same(run(logits + shift, target, upstream, objective=specification), expected, EXACT)


@pytest.mark.parametrize("specification", FORMULAS)
def test_masked_token_has_zero_loss_and_gradient(specification):
    logits, target, upstream = example()
    clean = run(logits, target, upstream, objective=specification)
    logits[0::5] = torch.tensor([NAN, INF, -INF, 1e30, 0.0])[:, None]  # every fifth token is ignored
    upstream[5] = NAN
    broken = run(logits, target, upstream, objective=specification)
    assert_same(broken, clean, EXACT)
    assert not clean[0][::5].any() and not clean[1][::5].any()


@pytest.mark.parametrize("specification", FORMULAS)
@pytest.mark.parametrize("inplace", [False, True])
def test_batch_without_targets_has_zero_loss_and_gradient(specification, inplace):
    logits, target, upstream = example(3, 2)
    logits[0, 0] = NAN
    target[:] = -100
    loss, gradient = run(logits, target, upstream, objective=specification, inplace_backward=inplace)
    assert_same((loss, gradient), (torch.zeros_like(loss), torch.zeros_like(logits)), EXACT)


def test_ignore_index_may_be_token_id():
    logits, target, upstream = example()
    renamed = target.masked_fill(target == 3, 4).masked_fill(target == -100, 3)
    expected = run(logits, renamed.masked_fill(renamed == 3, -100), upstream)
    assert_same(run(logits, renamed, upstream, ignore_index=3), expected, EXACT)


@pytest.mark.parametrize("specification", FORMULAS)
@pytest.mark.parametrize("return_nll", [False, True])
@pytest.mark.parametrize("broken", ["nan", "inf", "inf target", "all -inf", "id -1", "id V", "id far", "id padding"])
def test_invalid_input_makes_only_its_token_nan(broken, specification, return_nll):
    logits, target, upstream = example()
    where, column = 7, int(target[7])
    other = (column + 1) % 10
    options = {"objective": specification, "return_nll": return_nll, "true_vocab_size": 10}
    target[target == 10] = 9
    expected = run(logits, target.index_fill(0, torch.tensor(where), -100), upstream, **options)
    if broken.startswith("id"):
        target[where] = {"id -1": -1, "id V": 11, "id far": 1 << 40, "id padding": 10}[broken]
    elif broken == "all -inf":
        logits[where] = -INF
    else:
        logits[where, column if broken == "inf target" else other] = NAN if broken == "nan" else INF
    loss, gradient = run(logits, target, upstream, **options)
    assert loss[where].isnan() and gradient[where, :10].isnan().all()
    loss[where] = gradient[where] = 0.0
    assert_same((loss, gradient), expected, EXACT)


@pytest.mark.parametrize(("wrong", "tokens"), [(-1, (2, 1)), (11, (0, 3)), (9, (5, 0))])
def test_invalid_target_raises_under_anomaly_detection(wrong, tokens):
    logits, target, _ = example(6, 4)
    target %= 9
    target[1, 1] = -100
    options = {"true_vocab_size": 9}
    with torch.autograd.detect_anomaly(check_nan=False):
        vocab_parallel_dft_loss(logits, target, **options)
        target[tokens] = wrong
        with pytest.raises(ValueError, match=rf"ids from 0 to 8, or -100 to ignore .*got {wrong} at \({tokens[0]}, "):
            vocab_parallel_dft_loss(logits, target, **options)
    assert vocab_parallel_dft_loss(logits, target, **options).isnan().sum() == 1


@pytest.mark.parametrize("specification", FORMULAS)
def test_minus_inf_logits_give_no_nan(specification):
    """A logit of -inf means p = 0. For another entry the formulas hold; for the target there is no NaN."""
    logits, target, upstream = example()
    rows = (target != -100).nonzero()[:, 0]
    logits[rows, (target[rows] + 1) % 11] = -INF
    assert_same(
        run(logits, target, upstream, objective=specification),
        loss_and_gradient(specification, logits, target, upstream),
    )
    logits[7, target[7]] = -INF
    loss, gradient = run(logits, target, upstream, objective=specification)
    assert not loss.isnan().any() and gradient.isfinite().all()


@pytest.mark.parametrize("specification", FORMULAS)
def test_return_nll_keeps_gradient_of_objective(specification):
    case = example()
    loss, gradient = run(*case, objective=specification, return_nll=True)
    assert_same((loss, gradient), (run(*case, objective="nll")[0], run(*case, objective=specification)[1]), EXACT)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("specification", ["dft", "deft", "entropy"])
def test_forward_never_writes_to_logits(dtype, specification):
    logits, target, _ = example()
    logits = logits.to(dtype)
    before, version = logits.clone(), logits._version
    for labels in (target, target.clamp(min=0)):
        vocab_parallel_dft_loss(logits, labels, objective=specification, inplace_backward=True)
        vocab_stats(logits, labels)
    assert torch.equal(logits, before) and logits._version == version


@pytest.mark.parametrize("dtype", DTYPES)
def test_inplace_backward_overwrites_logits_with_gradient(dtype):
    logits, target, upstream = example(8, 3)
    logits = logits.to(dtype).requires_grad_()
    for labels in (target, target.clamp(min=0)):
        _, expected = run(logits.detach(), labels, upstream)
        output = logits * 1
        loss = vocab_parallel_dft_loss(output, labels, inplace_backward=True)
        (gradient,) = torch.autograd.grad(loss, output, upstream.to(loss.dtype))
        assert gradient.data_ptr() == output.data_ptr()
        assert_same((gradient, output.detach()), (expected, expected), EXACT)


def test_inplace_backward_raises_on_reuse_of_overwritten_logits():
    logits, target, _ = example()
    output = logits.requires_grad_() * 1
    other = output.square().sum()
    loss = vocab_parallel_dft_loss(output, target, inplace_backward=True).sum()
    loss.backward(retain_graph=True)
    for again in (loss, other):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            again.backward()


LEAVES = {
    "leaf": lambda x: x.requires_grad_(),
    "view of a leaf": lambda x: x.requires_grad_().view(24, 11),
    "columns of a leaf": lambda x: x.requires_grad_()[:, :9],
    "leaf that is a view": lambda x: x.view(24, 11).requires_grad_(),
}


@pytest.mark.parametrize("leaf", LEAVES)
def test_inplace_backward_rejects_leaf_logits(leaf):
    logits, target, _ = example()
    with pytest.raises(ValueError, match="inplace_backward: the logits are a leaf or a view of a leaf"):
        vocab_parallel_dft_loss(LEAVES[leaf](logits.clone()), target % 9, inplace_backward=True)
    assert not vocab_parallel_dft_loss(logits.detach(), target, inplace_backward=True).requires_grad


def test_second_backward_out_of_place_is_bitwise_equal():
    logits, target, upstream = example()
    leaf = logits.requires_grad_()
    loss = vocab_parallel_dft_loss(leaf, target)
    first, second = (torch.autograd.grad(loss, leaf, upstream, retain_graph=True)[0] for _ in range(2))
    assert_same((first,), (second,), EXACT)


def test_double_backward_raises():
    logits, target, _ = example()
    leaf = logits.requires_grad_()
    nll = torch.ones(3, requires_grad=True)
    for loss, source in ((vocab_parallel_dft_loss(leaf, target), leaf), (token_loss(nll), nll)):
        upstream = torch.ones_like(loss, requires_grad=True)
        (gradient,) = torch.autograd.grad(loss, source, upstream, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()


@pytest.mark.parametrize("return_nll", [False, True])
@pytest.mark.parametrize("shape", [(24,), (6, 4)])
def test_loss_is_contiguous_and_not_view(return_nll, shape):
    logits, target, _ = example(*shape)
    loss = vocab_parallel_dft_loss(logits.requires_grad_(), target, return_nll=return_nll)
    assert loss._base is None and loss.is_contiguous() and not loss.is_leaf
    assert loss.untyped_storage().nbytes() == loss.numel() * loss.element_size()


@pytest.mark.parametrize("inplace", [False, True])
def test_recompute_and_saved_tensor_hooks_leave_results_unchanged(inplace):
    logits, target, upstream = example()

    def function(x):
        return vocab_parallel_dft_loss(x * 1, target, inplace_backward=inplace)

    assert_saving_changes_nothing(function, logits, upstream, run(logits, target, upstream))


# Shards of 4 with padding from 9 on: the third has one entry, the fourth none. 16: a single shard.
@pytest.mark.parametrize("width", [1, 4, 16])
@pytest.mark.parametrize("empty", [None, 0, 1])  # the shard whose logits are all -inf
@pytest.mark.parametrize("apart", [3.0, 900.0])  # of the shards' maxima: all contribute, or e^900 overflows
def test_vocabulary_shards_merge_to_full_vocabulary(width, empty, apart):
    assert_any_split_merges(torch_backend, example(vocab=16), width, empty, apart, 1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_vocab_stats_match_fp64(dtype):
    logits, target, _ = example(6, 4, vocab=129)
    logits = logits.to(dtype)
    stats = vocab_stats(logits.requires_grad_(), target)
    t = token(logits.detach().double(), target)
    tolerance = {"rtol": 0.0, "atol": 1e-12 if dtype == torch.float64 else 8 * torch.finfo(torch.float32).eps}
    for ours, truth in ((stats.logprob, -t.l), (stats.entropy, t.H), (stats.collision, t.C)):
        assert ours.dtype == (dtype if dtype == torch.float64 else torch.float32) and not ours.requires_grad
        torch.testing.assert_close(ours.double(), truth.masked_fill(~t.valid, 0.0), rtol=1e-6, atol=tolerance["atol"])
    assert torch.equal(stats.top1, (logits.argmax(-1) == target) & t.valid)
    assert torch.equal(stats.valid, t.valid) and stats.vocab_size == 129
    assert torch.equal(stats.prob, stats.logprob.exp()) and torch.equal(stats.nll, -stats.logprob)


def test_vocab_stats_counts_tied_target_as_top_1():
    stats = vocab_stats(torch.tensor([[1.0, 1.0, 0.0]] * 3), torch.tensor([0, 1, 2]))
    assert stats.top1.tolist() == [True, True, False]


@pytest.mark.parametrize("specification", [s for s in FORMULAS if not parse_objective(s).needs])
def test_token_loss_of_nll_matches_formula(specification):
    logits, target, upstream = example()
    leaf = logits.clone().requires_grad_()
    nll = token(leaf, target).l
    loss = token_loss(nll, specification, valid=target != -100)
    loss.backward(upstream)
    assert_same((loss.detach(), leaf.grad), loss_and_gradient(specification, logits, target, upstream))


def test_token_loss_of_masked_token_is_zero():
    """NaN tokens: masked by `valid`, masked by an upstream gradient of 0, and not masked."""
    nll = torch.tensor([NAN, NAN, NAN, 0.5], requires_grad=True)
    loss = token_loss(nll, valid=torch.tensor([False, True, True, True]))
    loss.backward(torch.tensor([1.0, 0.0, 1.0, 1.0]))
    assert loss[0] == 0.0 and loss.isnan().tolist() == [False, True, True, False]
    assert nll.grad[:2].tolist() == [0.0, 0.0] and nll.grad.isnan().tolist() == [False, False, True, False]


def test_token_loss_is_rounded_once():
    """The weight is not rounded to bf16: the error is half a unit in the last place plus fp32 rounding."""
    nll = torch.linspace(0.01, 20.0, 500).bfloat16().requires_grad_()
    loss = token_loss(nll)
    loss.sum().backward()
    true = nll.detach().double()
    half = {"rtol": 2**-8 * 1.001, "atol": 0.0}
    torch.testing.assert_close(loss.detach().double(), true * torch.exp(-true), **half)
    torch.testing.assert_close(nll.grad.double(), torch.exp(-true), **half)


@pytest.mark.parametrize("specification", ["deft", "entropy"])
def test_token_loss_rejects_objectives_that_need_vocabulary(specification):
    with pytest.raises(ValueError, match=r"token_loss: .* which the NLL does not contain; call vocab_parallel"):
        token_loss(torch.ones(1), specification)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(2, 3, 8, dtype=torch.int64)}, "logits: expected bf16, fp16, fp32 or fp64, got"),
        ({"target": torch.zeros(2, 3, dtype=torch.int32)}, r"target: expected int64 token ids.*convert.*long"),
        (
            {"target": torch.zeros(3, 2, dtype=torch.int64)},
            r"target: expected shape \(2, 3\) .*, got \(3, 2\); .*transp",
        ),
        ({"target": torch.zeros(6, dtype=torch.int64)}, r"target: expected shape \(2, 3\)"),
        (
            {"target": torch.zeros(2, 3, dtype=torch.int64, device="meta")},
            "target: expected the device .* cpu, got meta",
        ),
        ({"backend": "cuda"}, "backend: expected one of auto, torch, triton, got 'cuda'"),
        ({"true_vocab_size": 0}, "true_vocab_size: expected .*, got 0"),
        ({"true_vocab_size": 9}, r"true_vocab_size: expected at most 8 \(1 shards of 8 columns\), got 9"),
    ],
)
def test_loss_rejects_mismatched_arguments(change, message):
    arguments = {"logits": torch.zeros(2, 3, 8), "target": torch.zeros(2, 3, dtype=torch.int64), **change}
    logits, target = arguments.pop("logits"), arguments.pop("target")
    with pytest.raises(ValueError, match=message):
        vocab_parallel_dft_loss(logits, target, **arguments)
    with pytest.raises(ValueError, match=message):
        vocab_stats(logits, target, **arguments)
