"""torch.compile: the loss is one operator forward and one backward, of either backend, without graph breaks."""

import copy
from dataclasses import dataclass

import pytest
import torch
from formulas import example
from kernel_cases import at_iteration, begin

from megatron_dft import parse_objective, vocab_parallel_dft_loss
from megatron_dft.ops import compiled
from megatron_dft.ops.objectives import Objective, of_graph_name

pytestmark = pytest.mark.usefixtures("uninitialized_memory_is_nan")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXACT = {"rtol": 0.0, "atol": 0.0}
SPECIFICATIONS = ["nll", "dft", "deft", "entropy:form=complement", "cayley", "dft:start=2,ramp=4"]


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


@pytest.fixture(autouse=True)
def _reset_dynamo():
    torch._dynamo.reset()


def make_case():
    logits, target, upstream = (x.to(DEVICE) for x in example(4, 2))
    return logits.float().requires_grad_(), target, upstream.float()


def run(function, logits, target, upstream, *others):
    loss = function(logits, target, *others)
    return loss.detach(), torch.autograd.grad(loss, logits, upstream)[0]


def eager_and_compiled(function, *case):
    """Results of the function in eager mode, and compiled into a single graph."""
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    return run(function, *case), run(compiled, *case)


@pytest.mark.parametrize("return_nll", [False, True])
@pytest.mark.parametrize("specification", SPECIFICATIONS)
def test_compiled_loss_is_bitwise_equal_to_eager(specification, return_nll, backend):
    objective = at_iteration(specification, 4, DEVICE)

    def function(logits, target):
        return vocab_parallel_dft_loss(
            2.0 * logits, target, objective=objective, return_nll=return_nll, backend=backend
        )

    eager, compiled = eager_and_compiled(function, *make_case())
    torch.testing.assert_close(compiled, eager, **EXACT)
    assert eager[1].abs().max() > 0.0


def test_compiled_loss_uses_options_of_each_call(backend):
    """One compiled function with several objectives and options in sequence, twice."""

    def function(logits, target, objective, size, ignored):
        options = {"true_vocab_size": size, "ignore_index": ignored, "backend": backend, "inplace_backward": True}
        return vocab_parallel_dft_loss(2.0 * logits, target, objective=objective, **options)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    logits, target, upstream = make_case()
    target = target.clamp(max=7)
    tsallis = [parse_objective(f"tsallis:q={q}") for q in (0.3, 0.6)]
    seen = set()
    for others in [("dft", None, -100), ("nll", None, -100), (tsallis[0], 9, -100), (tsallis[1], 9, 3)] * 2:
        case = (logits, target.masked_fill(target == -100, others[2]), upstream, *others)
        eager = run(function, *case)
        torch.testing.assert_close(run(compiled, *case), eager, **EXACT)
        seen.add(eager[0].sum().item())
    assert len(seen) == 4


def test_graph_name_is_shared_by_equal_unscheduled_objectives():
    names = [parse_objective("tsallis:q=0.125").graph_name() for _ in range(3)]
    assert len(set(names)) == 1 and of_graph_name(names[0]) == parse_objective("tsallis:q=0.125")
    scheduled = [at_iteration("dft:start=7", 8) for _ in range(2)]
    names = [objective.graph_name() for objective in scheduled * 2]
    assert (
        len(set(names)) == 2
        and [of_graph_name(name) is x for name, x in zip(names, scheduled * 2, strict=True)] == [True] * 4
    )


def test_compiled_loss_follows_schedule(backend):
    objective = at_iteration("dft:start=0,ramp=4", 1, DEVICE)

    def function(logits, target):
        return vocab_parallel_dft_loss(2.0 * logits, target, objective=objective, backend=backend)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    case, sums = make_case(), []
    for iteration in (1, 2, 4):
        begin(objective, iteration)
        torch.testing.assert_close(run(compiled, *case), run(function, *case), **EXACT)
        sums.append(run(compiled, *case)[0].sum().item())
    assert len(set(sums)) == 3


@pytest.mark.parametrize("shape", [(6,), (2, 3), (0,)])
def test_loss_operator_passes_opcheck(shape, backend):
    """Schema, fake tensors, autograd registration and dynamic shapes."""
    logits, target, _ = (x.to(DEVICE) for x in example(*shape))
    if not target.numel():
        logits, target = logits[:0], target[:0]
    arguments = (logits.float().requires_grad_(), target.clamp(max=8), "deft", None, -100, True, 9, backend, None)
    torch.library.opcheck(compiled._loss, arguments)


def test_compiled_loss_rejects_wrong_shape_at_compile_time(backend):
    compiled = torch.compile(lambda x, t: vocab_parallel_dft_loss(x, t, backend=backend), backend="aot_eager")
    with pytest.raises(Exception, match=r"target: expected shape \(4, 2\)"):
        compiled(torch.zeros(4, 2, 5, device=DEVICE), torch.zeros(2, 4, dtype=torch.int64, device=DEVICE))


def test_compiled_loss_distinguishes_schedules_and_parameters(backend):
    """One compiled function with several objects of a class: each uses its own parameters and iteration."""

    def function(logits, target, objective):
        return vocab_parallel_dft_loss(2.0 * logits, target, objective=objective, backend=backend)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    texts = ["dft:start=0,ramp=4", "dft:start=0,ramp=4", "dft:start=2,ramp=4", "deft:start=0,ramp=4"]
    objectives = [at_iteration(*case, DEVICE) for case in zip(texts, (1, 3, 4, 3), strict=True)]
    objectives += [parse_objective(f"entropy:form={form}") for form in ("complement", "exponential")]
    sums = set()
    for objective in objectives * 2:
        case = (*make_case(), objective)
        eager = run(function, *case)
        torch.testing.assert_close(run(compiled, *case), eager, **EXACT)
        sums.add(eager[0].sum().item())
    assert len(sums) == len(objectives)


@dataclass(frozen=True)
class Powers(Objective):
    """The gate is p to the sum of `powers`. Its fields are neither numbers nor strings."""

    powers: tuple[float, ...]
    on: bool = True
    name = "powers"

    def __call__(self, stats):
        gate = stats.prob ** sum(self.powers) if self.on else torch.ones_like(stats.prob)
        return gate * stats.nll, gate


class OwnInit(Objective):
    """An objective without dataclass fields. Its own __init__ sets the parameter."""

    name = "own init"

    def __init__(self, k):
        object.__setattr__(self, "k", k)

    def __call__(self, stats):
        gate = stats.prob**self.k
        return gate * stats.nll, gate


def test_compiled_loss_distinguishes_custom_objectives(backend):
    """Custom objectives with any fields, and a copy that is changed after copying."""

    def function(logits, target, objective):
        return vocab_parallel_dft_loss(2.0 * logits, target, objective=objective, backend=backend)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    objectives = [Powers((1.0,)), Powers((3.0,)), Powers((1.0,), on=False), OwnInit(0.5), OwnInit(2.0)]
    copied = copy.deepcopy(objectives[-1])
    object.__setattr__(copied, "k", 4.0)
    objectives.append(copied)
    sums = set()
    for objective in objectives:
        case = (*make_case(), objective)
        eager = run(function, *case)
        torch.testing.assert_close(run(compiled, *case), eager, **EXACT)
        sums.add(eager[0].sum().item())
    assert len(sums) == len(objectives)
