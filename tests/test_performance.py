"""Memory and time on a CPU, measured: 1024 tokens x 32768 words, 33.5M logits.

Memory is the peak of a fresh process, from /proc. Time is CPU time of one thread, which other processes on the
machine disturb least: medians of interleaved runs, against the stock cross entropy and the one line that makes it DFT.
`pytest tests/test_performance.py -s` prints what it measures.
"""

import itertools
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ranks import megatron_cross_entropy, needs_megatron, run_ranks

from megatron_dft import vocab_parallel_dft_loss

TOKENS, VOCAB = 1024, 32768
MIB = 1 << 20
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
CLEAR_REFS = Path("/proc/self/clear_refs")
# The second objective holds a second chunk of rows.
CASES = list(itertools.product(["dft", "entropy"], [True, False]))


def gradient(loss_function, source, target, upstream):
    """Forward and backward over a fresh copy of the logits that is not a leaf, and the CPU seconds they took."""
    logits = source + torch.zeros(1, dtype=source.dtype, requires_grad=True)
    start = time.process_time()
    result = torch.autograd.grad(loss_function(logits, target), logits, upstream)[0]
    return result, time.process_time() - start


def resident(name):
    """VmRSS or VmHWM, its peak, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


def print_extra_bytes(dtype_name):
    """In a fresh process: the peak of forward + backward over what was there before, for each of CASES."""
    source = torch.randn(TOKENS, VOCAB).to(DTYPES[dtype_name])
    target, upstream = torch.arange(TOKENS), torch.randn(TOKENS)
    target[::7] = -100  # rows are picked, not sliced
    before = 0

    for specification, inplace in CASES:

        def loss(logits, target, specification=specification, inplace=inplace):
            nonlocal before
            before = resident("VmRSS")
            CLEAR_REFS.write_text("5")  # the peak starts anew
            return vocab_parallel_dft_loss(logits, target, objective=specification, inplace_backward=inplace)

        for rows in (40, TOKENS):  # first a few: threads, allocator, code that is loaded late
            kept = gradient(loss, source[:rows], target[:rows], upstream[:rows])
            print(f"{resident('VmHWM') - before} " if rows == TOKENS else "", end="")
            del kept


@pytest.mark.skipif(not CLEAR_REFS.exists(), reason="needs /proc of Linux")
@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_beyond_logits_and_gradient_is_below_64_mib(dtype):
    code = f"import test_performance; test_performance.print_extra_bytes({dtype!r})"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parent), *sys.path]))}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert out.returncode == 0, out.stderr
    for (specification, inplace), extra in zip(CASES, map(int, out.stdout.split()), strict=True):
        print(f"\n{dtype}, {specification}, inplace_backward={inplace}: {extra / MIB:.0f} MiB", end="")
        allowed = 0 if inplace else TOKENS * VOCAB * DTYPES[dtype].itemsize
        assert extra < allowed + 64 * MIB, f"{specification}, inplace_backward={inplace}: {extra / MIB:.0f} MiB"
        assert extra > 0.5 * allowed - MIB, "the measurement misses even the gradient"


def time_ratios():
    """Ours over Megatron's unfused cross entropy with a detached weight: medians of 7, runs interleaved."""
    group, cross_entropy = torch.distributed.group.WORLD, megatron_cross_entropy()

    def stock(logits, target):
        ce = cross_entropy(logits, target)
        return ce * torch.exp(-ce.detach())

    def ours(logits, target):  # as a host uses it
        return vocab_parallel_dft_loss(logits, target, tp_group=group, value="nll", inplace_backward=True)

    target, upstream = torch.randint(VOCAB, (TOKENS,)), torch.rand(TOKENS)
    ratios = {}
    for name, dtype in DTYPES.items():
        source = torch.randn(TOKENS, VOCAB).to(dtype)
        runs = [[gradient(f, source, target, upstream)[1] for f in (stock, ours)] for _ in range(8)]
        stock_s, ours_s = (statistics.median(seconds) for seconds in zip(*runs[1:], strict=True))
        ratios[name] = ours_s / stock_s
    return ratios


@pytest.fixture(scope="module")
def ratios():
    return run_ranks(1, time_ratios)[0]


@needs_megatron
@pytest.mark.parametrize(("dtype", "limit"), [("bfloat16", 0.7), ("float32", 1.25)])
def test_time_against_megatrons_cross_entropy_with_a_weight(ratios, dtype, limit):
    if ratios[dtype] > limit:  # once more: a real regression is there both times
        ratios = run_ranks(1, time_ratios)[0]
    print(f"\n{dtype}: {ratios[dtype]:.2f} of the time of Megatron's cross entropy with a weight", end="")
    assert ratios[dtype] <= limit
