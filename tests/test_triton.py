"""The Triton kernels: on a GPU where there is one, otherwise in Triton's interpreter (conftest.py).

References are the formula in fp64 and the torch backend. The interpreter truncates to bf16 where a GPU rounds, so its
gradients may differ by a full unit in the last place. Compiled kernels: test_triton_compiled.py and test_gpu.py.
"""

import ctypes
import math
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from formulas import FORMULAS, REFERENCE_FORMULAS, example, loss_and_gradient, token
from kernel_cases import (
    EXACT,
    LAYOUTS,
    assert_any_split_merges,
    assert_saving_changes_nothing,
    at_iteration,
    fp32_rounding,
)
from ranks import run_ranks
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_dft import DFTConfig, vocab_parallel_dft_loss, vocab_stats
from megatron_dft.labels import with_reference
from megatron_dft.ops import objectives, torch_backend
from megatron_dft.ops.objectives import Objective
from megatron_dft.ops.stats import COLLISION, ENTROPY, VocabShard
from megatron_dft.ops.vocab_parallel import LossOptions, loss_and_stats

pytestmark = pytest.mark.usefixtures("uninitialized_memory_is_nan")

triton_backend = pytest.importorskip("megatron_dft.ops.triton_backend")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = DEVICE == "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PRESENT = [torch.float32, torch.bfloat16]
SCHEDULES = ["dft:start=2,ramp=4", "deft:start=0,ramp=8", "cayley:start=2,ramp=4"]


def run(logits, target, upstream, backend="triton", layout=lambda x: x, **options):
    """Loss and gradient, moved to the CPU. As in a model, the logits are the output of an operation, `layout`."""
    leaf = logits.to(DEVICE, copy=True).requires_grad_()
    loss = vocab_parallel_dft_loss(layout(leaf * 1), target.to(DEVICE), backend=backend, **options)
    loss.backward(upstream.to(DEVICE, loss.dtype))
    return loss.detach().cpu(), leaf.grad.cpu()


def rounding(gradient, dtype):
    """The rounding error of a gradient in this dtype."""
    if dtype == torch.float32:
        return torch.zeros_like(gradient)
    info = torch.finfo(dtype)
    unit = torch.ldexp(torch.full_like(gradient, info.eps), gradient.frexp().exponent - 1)
    return unit.clamp(min=info.smallest_normal * info.eps) * (1.0 if INTERPRETED and dtype == torch.bfloat16 else 0.5)


def assert_true(case, dtype, specification="dft", **options):
    """Assert that loss and gradient match the formula up to fp32 rounding and one rounding of the gradient."""
    logits, target, upstream = case
    logits, upstream = logits.to(dtype), upstream.float()
    vocab = options.get("true_vocab_size")
    loss, gradient = loss_and_gradient(specification, logits, target, upstream, vocab)
    slack = fp32_rounding(logits[..., :vocab], target, torch.ones_like(upstream))[0].double()
    actual_loss, actual_gradient = run(logits, target, upstream, objective=specification, **options)
    assert (actual_loss.dtype, actual_gradient.dtype) == (torch.float32, dtype)
    assert ((actual_loss.double() - loss).abs() <= 2 * slack).all()
    size = gradient.abs().amax(-1, keepdim=True) + 1e-30
    allowed = rounding(gradient, dtype) + 2 * slack[..., None] * (size + upstream.double().abs()[..., None])
    assert ((actual_gradient.double() - gradient).abs() <= allowed).all()


@pytest.mark.parametrize("return_nll", [False, True])
@pytest.mark.parametrize("specification", [*FORMULAS, *SCHEDULES])
def test_triton_matches_torch_backend(specification, return_nll):
    """Loss, gradient and statistics, up to fp32 rounding."""
    logits, target, upstream = example(12)
    objective = at_iteration(specification, 5, DEVICE)
    results = []
    for backend in ("triton", "torch"):
        leaf = logits.float().to(DEVICE).requires_grad_()
        options = LossOptions(objective=objective, return_nll=return_nll, backend=backend)
        loss, stats = loss_and_stats(leaf * 1, target.to(DEVICE), options)
        loss.backward(upstream.to(DEVICE, torch.float32))
        extras = (stats.entropy, stats.collision)
        assert [x is None for x in extras] == [ENTROPY not in objective.needs, COLLISION not in objective.needs]
        extras = [x for x in extras if x is not None]
        results.append((loss, leaf.grad, stats.logprob, stats.loss, stats.gate, *extras))
        results[-1] += (stats.valid, stats.top1)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("specification", [*REFERENCE_FORMULAS, "asft:start=2,ramp=4"])
def test_kernels_of_objectives_with_reference_match_torch_backend(specification):
    logits, target, upstream = (x.float() if x.is_floating_point() else x for x in example(6, 2))
    nll = torch.linspace(0.0, 30.0, target.numel()).view(target.shape)
    logits[3, 0, target[3, 0]] = -math.inf
    nll[4, 1] = math.nan
    target = with_reference(target, nll)
    objective = at_iteration(specification, 5, DEVICE)
    ours, theirs = (run(logits, target, upstream, backend, objective=objective) for backend in ("triton", "torch"))
    assert ours[0][4, 1].isnan() and ours[0].isnan().sum() == 1
    torch.testing.assert_close(ours, theirs, rtol=4e-6, atol=4e-6, equal_nan=True)


@pytest.mark.parametrize("specification", ["cayley", "cayley:floor=1", "cayley:start=2,ramp=4"])
def test_cayley_mean_covers_all_programs(specification):
    """More programs than one program adds up at a time."""
    n = 128 * 128 + 77
    generator = torch.Generator().manual_seed(0)
    shards = torch.rand(2, 3, n, generator=generator).to(DEVICE)
    target = torch.where(torch.rand(n, generator=generator) < 0.3, -100, 5).to(DEVICE)
    shards[1, 2, 7::100] = math.nan
    objective = at_iteration(specification, 5, DEVICE)
    arguments = shards, target, -100, 50, objective, frozenset(), False
    for ours, theirs in zip(triton_backend.merge(*arguments)[:2], torch_backend.merge(*arguments)[:2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=4e-6, atol=4e-6, equal_nan=True)


@pytest.mark.parametrize("specification", FORMULAS)
def test_loss_and_gradient_match_formula(specification):
    assert_true(example(12), torch.float32, specification)


def test_eaft_gate_is_1_above_ln_20():
    case = torch.zeros(1, 48, device=DEVICE), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    loss = vocab_parallel_dft_loss(*case, objective="eaft:alpha=2", backend="triton")
    assert loss.item() == pytest.approx(math.log(48))


@pytest.mark.parametrize("specification", ["tsallis:q=0.001", "tsallis:q=0.01"])
def test_tsallis_with_small_q_keeps_precision(specification):
    """(1 - p^q) / q, where 1 - p^q is small."""
    case = [x.float() if x.is_floating_point() else x for x in example(12)]
    ours, theirs = (run(*case, backend=backend, objective=specification)[0] for backend in ("triton", "torch"))
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-7)


# Sizes around one vector (4 or 8 logits), one tile (512 vectors), several tiles, and the larger tile (1024).
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 2, 3, 7, 8, 9, 1009, 1024, 4095, 4096, 4104, 8191, 9000, 33000])
def test_loss_supports_any_vocab_size(vocab, dtype):
    logits, target, upstream = example(3, vocab=vocab)
    target = torch.tensor([vocab - 1, -100, 0])
    assert_true((logits, target, upstream), dtype)


@pytest.mark.parametrize("specification", ["deft", "entropy:form=ratio"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [9, 4099, 33001])
def test_entropy_and_collision_support_any_vocab_size(vocab, dtype, specification):
    assert_true(example(3, vocab=vocab), dtype, specification)


@pytest.mark.parametrize("columns", [1, 9, 64, 67])  # of 75 and 80; 9 is one vector and one column
@pytest.mark.parametrize("width", [75, 80])
def test_padding_columns_are_ignored_and_get_zero_gradient(width, columns):
    logits, target, upstream = example(4, vocab=width)
    target = torch.where(target >= columns, target % columns, target)
    logits[..., columns:] = torch.tensor([math.nan, math.inf, 1e4, 0.0]).repeat(30)[: width - columns]
    assert_true((logits, target, upstream), torch.bfloat16, true_vocab_size=columns)
    _, gradient = run(logits.bfloat16(), target, upstream, true_vocab_size=columns)
    assert not gradient[:, columns:].any()


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", PRESENT)
def test_loss_supports_any_strides(dtype, layout, inplace):
    logits, target, upstream = example(4, 2, vocab=37)  # rows start at any alignment
    logits = logits.to(dtype)
    expected = run(logits, target, upstream)
    transposed = target.t().contiguous().t()
    actual = run(logits, transposed, upstream, layout=LAYOUTS[layout], inplace_backward=inplace)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(), (5,), (0,), (2, 0), (2, 3, 2)])
def test_loss_supports_any_leading_shape(shape):
    logits, target, upstream = (x[0] for x in example(1, *shape, seed=3))
    loss, gradient = run(logits.float(), target, upstream)
    expected = run(logits.float(), target, upstream, backend="torch")
    torch.testing.assert_close((loss, gradient), expected, rtol=1e-5, atol=1e-6)


def test_target_and_upstream_gradient_support_any_stride():
    """Every second element of another tensor, and an expanded gradient like that of loss.sum()."""
    logits, target, upstream = example(6)
    other = torch.stack([target.roll(1), target], 1)[:, 1]
    for strided in (torch.tensor(2.0).expand(6), torch.stack([upstream.float()] * 2, 1)[:, 1]):
        expected = run(logits.float(), target, strided.contiguous())
        torch.testing.assert_close(run(logits.float(), target, strided), expected, **EXACT)
        torch.testing.assert_close(run(logits.float(), other, strided), expected, **EXACT)


def rows_far_apart():
    """Run the kernels on three rows, 2^30 logits apart. Only their own memory is touched."""
    logits, target, upstream = (x.to(DEVICE) for x in example(3, vocab=50))
    memory = torch.empty((1 << 31) + 50, dtype=torch.bfloat16, device=DEVICE)
    rows = memory.as_strided((3, 50), (1 << 30, 1))
    rows.copy_(logits)
    target = target.clamp(min=0)
    packed = triton_backend.shard_stats(rows, target, -100, VocabShard(0, 50, 50), frozenset())
    loss, saved, _ = triton_backend.merge(packed[None], target, -100, 50, objectives.DFT(), frozenset(), False)
    triton_backend.shard_gradient(rows, target, saved, upstream.float(), VocabShard(0, 50, 50), rows)
    expected = run(logits.cpu().bfloat16(), target.cpu(), upstream.cpu())
    torch.testing.assert_close(loss.cpu(), expected[0], rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(rows.cpu(), expected[1], rtol=2**-7, atol=1e-7)
    print("done")


def shards_far_apart():
    """Merge three shards, 2^30 numbers apart. Only the memory of their sums is touched."""
    sums = torch.rand(3, 3, 128, device=DEVICE)
    shards = torch.empty(3, 1 << 23, 128, device=DEVICE)
    shards[:, :3] = sums
    arguments = torch.full((128,), 5, device=DEVICE), -100, 50, objectives.DFT(), frozenset(), False
    expected = triton_backend.merge(sums, *arguments)[0]
    torch.testing.assert_close(triton_backend.merge(shards, *arguments)[0], expected, **EXACT)
    print("done")


def run_in_subprocess(call):
    """Run a function of this file in its own process, as it may crash."""
    command = [sys.executable, "-c", f"import conftest, test_triton; test_triton.{call}"]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)


@pytest.mark.parametrize("call", ["rows_far_apart()", "shards_far_apart()"])
def test_kernels_support_offsets_beyond_2_to_31(call):
    out = run_in_subprocess(call)
    assert "done" in out.stdout, out.stderr


@pytest.mark.parametrize("shift", [500.0, -500.0, 1e4, -1e4])
def test_shifted_logits_give_bitwise_equal_results(shift):
    logits, target, upstream = example(5)
    logits = (logits * 64).round().float() / 64  # the shift is exact
    expected = run(logits, target, upstream, objective="entropy")
    torch.testing.assert_close(run(logits + shift, target, upstream, objective="entropy"), expected, **EXACT)


BROKEN = ["nan", "inf", "inf target", "all -inf", "id -1", "id V", "id far", "id padding"]


@pytest.mark.parametrize("specification", ["nll", "dft", "deft", "entropy", "threshold", "luffy", "cayley"])
@pytest.mark.parametrize("broken", BROKEN)
def test_invalid_input_makes_only_its_token_nan(broken, specification):
    logits, target, upstream = (x.float() if x.is_floating_point() else x for x in example(4))
    where, column = 2, int(target[2])
    options = {"objective": specification, "true_vocab_size": 10}
    target[target == 10] = 9
    expected = run(logits, target.index_fill(0, torch.tensor(where), -100), upstream, **options)
    if broken.startswith("id"):
        target[where] = {"id -1": -1, "id V": 11, "id far": 1 << 40, "id padding": 10}[broken]
    elif broken == "all -inf":
        logits[where] = -math.inf
    else:
        logits[where, column if "target" in broken else (column + 1) % 10] = math.nan if broken == "nan" else math.inf
    loss, gradient = run(logits, target, upstream, **options)
    assert loss[where].isnan() and gradient[where, :10].isnan().all()
    loss[where] = gradient[where] = 0.0
    torch.testing.assert_close((loss, gradient), expected, **EXACT)


@pytest.mark.parametrize("specification", FORMULAS)
def test_minus_inf_logits_give_no_nan(specification):
    logits, target, upstream = example(6)
    rows = (target != -100).nonzero()[:, 0]
    logits[rows, (target[rows] + 1) % 11] = -math.inf
    assert_true((logits, target, upstream), torch.float32, specification)
    logits[3, target[3]] = -math.inf
    loss, gradient = run(logits.float(), target, upstream, objective=specification)
    assert not loss.isnan().any() and gradient.isfinite().all()


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("specification", ["nll", "dft", "deft", "entropy", "luffy", "cayley"])
def test_masked_token_has_zero_loss_and_gradient(specification, inplace):
    logits, target, upstream = (x.float() if x.is_floating_point() else x for x in example(11))
    clean = run(logits, target, upstream, objective=specification, inplace_backward=inplace)
    logits[0::5] = torch.tensor([math.nan, math.inf, -math.inf])[:, None]
    upstream[5] = math.nan
    broken = run(logits, target, upstream, objective=specification, inplace_backward=inplace)
    torch.testing.assert_close(broken, clean, **EXACT)
    assert not clean[0][::5].any() and not clean[1][::5].any()


def run_with_protected_row(kind):
    """Row 1 is on a memory page without read permission: reading it kills the process."""
    width = mmap.PAGESIZE // 4
    memory = mmap.mmap(-1, 4 * mmap.PAGESIZE)
    logits = torch.frombuffer(memory, dtype=torch.float32).view(4, width)
    logits.copy_(torch.arange(4 * width).view(4, width) % 7)
    target = torch.tensor([3, 5, 7, 9])
    upstream = torch.tensor([1.0, 0.0 if kind == "zero_upstream" else 1.0, 1.0, 1.0])

    def protect(row):
        page = ctypes.c_void_p(logits[row].data_ptr())
        assert ctypes.CDLL(None).mprotect(page, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0

    if kind == "masked":
        target[1] = -100
    if kind != "zero_upstream":
        protect(1)
    loss = vocab_parallel_dft_loss(logits.requires_grad_(), target, backend="triton")
    if kind == "zero_upstream":
        protect(1)
    loss.backward(upstream)
    assert not logits.grad[1].any() and logits.grad[[0, 2, 3]].all()
    print("done")


@pytest.mark.skipif(not INTERPRETED, reason="needs CPU memory")
@pytest.mark.parametrize(("kind", "code"), [("masked", 0), ("zero_upstream", 0), ("read", -11)])
def test_masked_and_zero_gradient_rows_are_not_read(kind, code):
    """Masked rows are never read, rows with zero gradient not in backward. The third case tests the protection."""
    out = run_in_subprocess(f"run_with_protected_row({kind!r})")
    assert out.returncode == code and ("done" in out.stdout) == (code == 0), out.stderr


class Operations(TorchDispatchMode):
    """Record the names of the operations that PyTorch runs."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(function.__name__.split(".")[0])
        return function(*args, **(kwargs or {}))

    def __enter__(self):
        self.seen = []
        return super().__enter__()


class Recorder:
    """Wraps a kernel: records its launches and hides the operations of the interpreter."""

    def __init__(self, kernel, name, launches):
        self.kernel, self.name, self.launches = kernel, name, launches

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self.launches.append(self.name)
            with torch.utils._python_dispatch._disable_current_modes():
                self.kernel[grid](*args, **kwargs)

        return launch


@pytest.mark.parametrize(
    "specification", ["nll", "dft", "deft", "entropy", "threshold", "luffy", "cayley", "dft:start=1,ramp=2"]
)
def test_loss_launches_only_its_kernels(specification, monkeypatch):
    """Only the kernels read or write values: no host-device sync and no other launch."""
    logits, target, upstream = (x.to(DEVICE) for x in example(4, 2))
    upstream, output = upstream.float(), logits.float().requires_grad_() * 1
    launches = []
    kernels = ["stats_kernel", "merge_kernel", *["cayley_kernel"] * (specification == "cayley"), "gradient_kernel"]
    for name in kernels:
        kernel = getattr(triton_backend, name)
        monkeypatch.setattr(triton_backend, name, Recorder(kernel, name, launches))
    objective = at_iteration(specification, 2, DEVICE)
    options = LossOptions(objective=objective, return_nll=True, backend="triton", inplace_backward=True)
    with Operations() as operations:
        loss, _ = loss_and_stats(output, target, options)
        torch.autograd.grad(loss, output, upstream)
    views = {"empty", "view", "unsqueeze", "slice", "select", "unbind", "detach", "alias"}
    assert launches == kernels
    assert set(operations.seen) <= views, operations.seen


@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_keeps_logits_and_inplace_backward_overwrites_them(dtype):
    logits, target, upstream = example(4, 2, vocab=41)
    logits = logits.to(DEVICE, dtype).requires_grad_()
    target, upstream = target.to(DEVICE), upstream.to(DEVICE, torch.float32)
    _, expected = run(logits.detach().cpu(), target.cpu(), upstream.cpu())
    output = logits * 1
    before, version = output.detach().clone(), output._version
    loss = vocab_parallel_dft_loss(output, target, backend="triton", inplace_backward=True)
    vocab_stats(output, target, backend="triton")
    assert torch.equal(output, before) and output._version == version
    (gradient,) = torch.autograd.grad(loss, output, upstream)
    assert gradient.data_ptr() == output.data_ptr() and output._version > version
    torch.testing.assert_close(gradient.cpu(), expected, **EXACT)


def test_inplace_backward_raises_on_reuse_of_overwritten_logits():
    logits, target, _ = (x.to(DEVICE) for x in example(4))
    output = logits.float().requires_grad_() * 1
    other = output.square().sum()
    loss = vocab_parallel_dft_loss(output, target, backend="triton", inplace_backward=True).sum()
    loss.backward(retain_graph=True)
    for again in (loss, other):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            again.backward()


def test_second_backward_out_of_place_is_bitwise_equal():
    logits, target, upstream = (x.to(DEVICE) for x in example(4))
    leaf = logits.float().requires_grad_()
    loss = vocab_parallel_dft_loss(leaf, target, backend="triton")
    first, second = (torch.autograd.grad(loss, leaf, upstream.float(), retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(first, second, **EXACT)


@pytest.mark.parametrize("inplace", [False, True])
def test_recompute_and_saved_tensor_hooks_leave_results_unchanged(inplace):
    logits, target, upstream = (x.to(DEVICE) for x in example(6))
    logits, upstream = logits.float(), upstream.float()

    def function(x):
        return vocab_parallel_dft_loss(x * 1, target, backend="triton", inplace_backward=inplace)

    expected = run(logits.cpu(), target.cpu(), upstream.cpu())
    assert_saving_changes_nothing(function, logits, upstream, expected)


@pytest.mark.parametrize("return_nll", [False, True])
def test_loss_is_contiguous_and_not_view(return_nll):
    logits, target, _ = (x.to(DEVICE) for x in example(4, 2))
    loss = vocab_parallel_dft_loss(logits.float().requires_grad_(), target, return_nll=return_nll, backend="triton")
    assert loss._base is None and loss.is_contiguous()
    assert loss.untyped_storage().nbytes() == loss.numel() * loss.element_size()


def test_vocab_stats_match_fp64():
    logits, target, _ = example(6, 2, vocab=129)
    logits, target = logits.to(DEVICE, torch.bfloat16), target.to(DEVICE)
    stats = vocab_stats(logits, target, backend="triton")
    t = token(logits.double(), target)
    for ours, truth in ((stats.logprob, -t.l), (stats.entropy, t.H), (stats.collision, t.C)):
        torch.testing.assert_close(ours.double(), truth.masked_fill(~t.valid, 0.0), rtol=1e-6, atol=2e-6)
    assert torch.equal(stats.top1, (logits.argmax(-1) == target) & t.valid)
    assert torch.equal(stats.valid, t.valid) and stats.loss is stats.gate is None


@pytest.mark.parametrize("width", [4, 16])
@pytest.mark.parametrize("empty", [None, 0, 1])
@pytest.mark.parametrize("apart", [3.0, 900.0])
def test_vocabulary_shards_merge_to_full_vocabulary(width, empty, apart):
    logits, target, upstream = (x.to(DEVICE) for x in example(6, vocab=16))
    case = (logits.float(), target, upstream.float())
    assert_any_split_merges(triton_backend, case, width, empty, apart, 3e-6)


class Halved(Objective):
    """A custom objective."""

    name = "halved"

    def __call__(self, stats):
        return 0.5 * stats.nll, torch.full_like(stats.logprob, 0.5)


class Doubled(objectives.DFT):
    """A subclass, which does not use the formula of DFT in the kernel."""

    def weight(self, stats):
        return 2.0 * stats.prob


@pytest.mark.parametrize(("objective", "times", "base"), [(Halved(), 0.5, "nll"), (Doubled(), 2.0, "dft")])
def test_custom_objective_is_applied(objective, times, base):
    case = [x.float() if x.is_floating_point() else x for x in example(6)]
    expected = [times * x for x in run(*case, objective=base)]
    torch.testing.assert_close(run(*case, objective=objective), tuple(expected), rtol=1e-5, atol=1e-6)


def two_ranks():
    results = {}
    logits, target, upstream = example(4, 2, vocab=24)
    share = logits.float().chunk(2, -1)[dist.get_rank()]
    for specification in ("dft", "deft", "entropy"):
        options = {"objective": specification, "tp_group": dist.group.WORLD, "return_nll": True}
        results[specification] = run(share, target, upstream, **options)
    return results


def test_two_tp_ranks_match_full_vocabulary():
    if not INTERPRETED:
        pytest.skip("test_gpu.py::test_two_tp_ranks_on_one_gpu_match_one_rank covers GPUs")
    ranks = run_ranks(2, two_ranks)
    logits, target, upstream = example(4, 2, vocab=24)
    for specification in ("dft", "deft", "entropy:form=ratio"):
        loss, _ = loss_and_gradient("nll", logits.float(), target, upstream)
        _, gradient = loss_and_gradient(specification, logits.float(), target, upstream)
        key = specification.partition(":")[0]
        assert torch.equal(ranks[0][key][0], ranks[1][key][0])
        torch.testing.assert_close(ranks[0][key][0].double(), loss, rtol=2e-6, atol=2e-6)
        ours = torch.cat([rank[key][1] for rank in ranks], -1)
        torch.testing.assert_close(ours.double(), gradient, rtol=1e-5, atol=2e-6)


def test_auto_backend_is_torch_on_cpu_and_triton_on_gpu():
    for dtype in (*DTYPES, torch.float64):
        kernels = LossOptions(objective=objectives.DFT()).kernels(torch.device(DEVICE), dtype)
        assert ("triton" if DEVICE == "cuda" and dtype != torch.float64 else "torch") == kernels.NAME


def test_triton_backend_rejects_fp64_logits():
    with pytest.raises(ValueError, match="'triton': expected bf16, fp16 or fp32 logits, got fp64; use backend="):
        vocab_parallel_dft_loss(torch.zeros(1, 2).double(), torch.zeros(1, dtype=torch.int64), backend="triton")


def run_without_interpreter(code):
    package = str(Path(objectives.__file__).parents[2])
    environment = {**os.environ, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": package}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


def test_triton_backend_raises_without_cuda_or_triton():
    """CPU logits without the interpreter, and Python without the triton package."""
    call = "import torch, megatron_dft; t = torch.zeros(1, 2); i = torch.zeros(1, dtype=torch.int64); "
    call += "megatron_dft.vocab_parallel_dft_loss(t, i, backend='triton')"
    assert (
        "expected logits on a CUDA device, got cpu; use backend='torch' or 'auto'"
        in run_without_interpreter(call).stderr
    )
    missing = f"import sys; sys.modules['triton'] = None; {call}"
    assert "cannot import triton" in run_without_interpreter(missing).stderr
    host = "import types, megatron_dft; from megatron_dft.hosts import compat; "
    host += "compat.check_settings(types.SimpleNamespace(), megatron_dft.DFTConfig('dft', backend='triton'))"
    assert "expected logits on a CUDA device" in run_without_interpreter(host).stderr  # before training starts


def test_config_accepts_triton_backend():
    assert DFTConfig(loss_type="dft", backend="triton").options().backend == "triton"
