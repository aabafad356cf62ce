"""Baselines of the benchmarks: the cross entropies available to a Megatron user, turned into DFT by one line.

    loss = ce * torch.exp(-ce).detach()

A baseline is a function of logits [N, 1, V/tp], targets [N, 1] and a process group, as Megatron calls a loss. With the
output layer, it is a function of hidden states [N, H], weight [V/tp, H], targets [N] and a process group. Each `make`
imports its package when it is called; a missing package becomes a note in the results. Transformer Engine and
flash-attn need only their Python files: unpack their archives into .baselines/.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_dft import parse_objective, vocab_parallel_dft_loss
from megatron_dft.ops.compaction import loss_all_tokens, loss_valid_tokens
from megatron_dft.ops.linear_fused import Split, WeightGradient, linear_loss_and_stats
from megatron_dft.ops.objectives import WITHOUT_REFERENCE
from megatron_dft.ops.vocab_parallel import LossOptions, loss_and_stats

UNPACKED = Path(__file__).resolve().parents[2] / ".baselines"
Loss = Callable[[Tensor, Tensor, ProcessGroup], Tensor]
Head = Callable[[Tensor, Tensor, Tensor, ProcessGroup], Tensor]


def ours(objective: str, inplace: bool = True) -> Callable[[], Loss]:
    """Our loss as a Megatron host calls it, or out of place."""

    def loss(logits: Tensor, target: Tensor, group: ProcessGroup) -> Tensor:
        return vocab_parallel_dft_loss(
            logits, target, objective=objective, tp_group=group, return_nll=True, inplace_backward=inplace
        )

    return lambda: loss


def with_dft_line(cross_entropy: Loss) -> Loss:
    """DFT from a per-token cross entropy, by the line above."""

    def loss(logits: Tensor, target: Tensor, group: ProcessGroup) -> Tensor:
        ce = cross_entropy(logits, target, group).view(target.shape)
        return ce * torch.exp(-ce).detach()

    return loss


def megatron_unfused() -> Loss:
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    return with_dft_line(lambda x, t, group: vocab_parallel_cross_entropy(x, t, tp_group=group))


def megatron_fused() -> Loss:
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

    return with_dft_line(fused_vocab_parallel_cross_entropy)


def transformer_engine(overwrite: bool) -> Callable[[], Loss]:
    def make() -> Loss:
        module = _import_unpacked(
            "transformer_engine.pytorch.cross_entropy",
            {"transformer_engine.pytorch.jit": {"no_torch_dynamo": lambda **_: lambda function: function}},
        )
        options = {"overwrite_input": True} if overwrite else {}
        return with_dft_line(lambda x, t, group: module.parallel_cross_entropy(x, t, 0.0, False, group, **options))

    return make


def liger_vocab_parallel() -> Loss:
    from liger_kernel.megatron.cross_entropy import LigerMegatronCrossEntropy

    return with_dft_line(LigerMegatronCrossEntropy())


def liger() -> Loss:
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    def cross_entropy(logits: Tensor, target: Tensor, group: ProcessGroup) -> Tensor:
        _require_whole_vocabulary(group)
        rows = logits.view(-1, logits.shape[-1])
        return LigerCrossEntropyFunction.apply(rows, target.view(-1), None, -100, 0.0, 0.0, "none")[0]

    return with_dft_line(cross_entropy)


def flash_attn(inplace: bool) -> Callable[[], Loss]:
    def make() -> Loss:
        module = _import_unpacked("flash_attn.ops.triton.cross_entropy", {})

        def cross_entropy(logits: Tensor, target: Tensor, group: ProcessGroup) -> Tensor:
            rows = logits.view(-1, logits.shape[-1])
            options = {"ignore_index": -100, "inplace_backward": inplace, "process_group": group}
            return module.cross_entropy_loss(rows, target.view(-1), **options)[0]

        return with_dft_line(cross_entropy)

    return make


def torch_cross_entropy() -> Loss:
    def cross_entropy(logits: Tensor, target: Tensor, group: ProcessGroup) -> Tensor:
        _require_whole_vocabulary(group)
        rows = logits.view(-1, logits.shape[-1]).float()  # in bf16 the gate exp(-ce) is off by 10%
        return F.cross_entropy(rows, target.view(-1), reduction="none")

    return with_dft_line(cross_entropy)


class MainGrad(WeightGradient):
    """Add the weight gradient to `weight.main_grad`, as Megatron's gradient accumulation fusion does."""

    def __init__(self, weight: Tensor, summed: bool) -> None:
        self.total = weight.main_grad  # type: ignore[attr-defined]

    def add(self, columns: slice, gradient: Tensor, hidden: Tensor) -> None:
        self.total[columns].addmm_(gradient.t(), hidden)

    def result(self) -> None:
        return None


def megatron_linear(hidden: Tensor, weight: Tensor, group: ProcessGroup) -> Tensor:
    """Megatron's output layer with gradient accumulation fusion; without Apex, `addmm_` replaces its kernel."""
    from megatron.core.tensor_parallel import layers

    if not hasattr(layers, "fused_weight_gradient_mlp_cuda"):
        add = lambda rows, gradient, main_grad: main_grad.addmm_(gradient.t(), rows)  # noqa: E731
        kernels = SimpleNamespace(wgrad_gemm_accum_fp32=add, wgrad_gemm_accum_fp16=add)
        layers.fused_weight_gradient_mlp_cuda = kernels
    return layers.linear_with_grad_accumulation_and_async_allreduce(
        hidden, weight, None, True, group.size() > 1, False, tp_group=group
    )


def ours_from_hidden(compact: bool, chunks: bool) -> Callable[[], Head]:
    """Our output layer with loss as a Megatron host calls it: all logits or in chunks, masked tokens removed or not."""

    def head(hidden: Tensor, weight: Tensor, target: Tensor, group: ProcessGroup) -> Tensor:
        options = LossOptions(objective=parse_objective("dft"), tp_group=group, return_nll=True, inplace_backward=True)

        def of_rows(rows: Tensor, target: Tensor):
            if chunks:
                return linear_loss_and_stats(rows, weight, target, options, Split(), weight_gradient=MainGrad)
            return loss_and_stats(megatron_linear(rows, weight, group), target, options)

        return (loss_valid_tokens if compact else loss_all_tokens)(of_rows, hidden, target, ignore_index=-100)[0]

    return lambda: head


def megatron_from_hidden(make: Callable[[], Loss]) -> Callable[[], Head]:
    """Megatron's output layer with a loss on its logits."""

    def made() -> Head:
        loss = make()

        def head(hidden: Tensor, weight: Tensor, target: Tensor, group: ProcessGroup) -> Tensor:
            logits = megatron_linear(hidden, weight, group)[:, None]
            # Megatron's loss has no ignore_index: hosts mask its result.
            value = loss(logits, target.clamp(min=0)[:, None], group)[:, 0]
            return value.masked_fill(target == -100, 0.0)

        return head

    return made


def liger_from_hidden() -> Head:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    def head(hidden: Tensor, weight: Tensor, target: Tensor, group: ProcessGroup) -> Tensor:
        _require_whole_vocabulary(group)
        options = (None, None, -100, 0.0, 0.0, "sum", None, False, None, True)  # the last one selects DFT
        total = LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, target, *options)[0]
        return (total / (target != -100).sum()).expand(len(target))

    return head


def cut_cross_entropy() -> Head:
    from cut_cross_entropy import linear_cross_entropy

    return _head_with_dft_line(lambda x, w, t: linear_cross_entropy(x, w, t, reduction="none"))


def torch_from_hidden(chunks: bool) -> Callable[[], Head]:
    def make() -> Head:
        if not hasattr(F, "linear_cross_entropy"):
            raise ImportError("requires torch 2.13")
        options = torch.nn.LinearCrossEntropyOptions() if chunks else None
        return _head_with_dft_line(
            lambda x, w, t: F.linear_cross_entropy(x, w, t, reduction="none", ignore_index=-100, options=options)
        )

    return make


def _head_with_dft_line(cross_entropy: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Head:
    def head(hidden: Tensor, weight: Tensor, target: Tensor, group: ProcessGroup) -> Tensor:
        _require_whole_vocabulary(group)
        ce = cross_entropy(hidden, weight, target)
        return ce * torch.exp(-ce).detach()

    return head


def _require_whole_vocabulary(group: ProcessGroup) -> None:
    if group.size() > 1:
        raise ValueError("does not support a sharded vocabulary")


def _import_unpacked(name: str, stubs: dict[str, dict[str, object]]) -> ModuleType:
    """Import one module of a package; bypass the package's __init__ if its compiled extensions are missing."""
    try:
        return importlib.import_module(name)
    except ImportError:
        root = name.partition(".")[0]
        if not (UNPACKED / root).is_dir():
            raise
    for folder in [UNPACKED / root, *(path for path in (UNPACKED / root).rglob("*") if path.is_dir())]:
        package = folder.relative_to(UNPACKED).as_posix().replace("/", ".")
        sys.modules[package] = _module(package)
        sys.modules[package].__path__ = [str(folder)]
    for module, contents in stubs.items():
        sys.modules[module] = _module(module)
        vars(sys.modules[module]).update(contents)
    return importlib.import_module(name)


def _module(name: str) -> ModuleType:
    """An empty module with a spec, which `importlib.util.find_spec` requires."""
    module = ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    return module


DFT = "ours: dft"
IMPLEMENTATIONS: dict[str, Callable[[], Loss]] = {
    DFT: ours("dft"),
    "ours: dft, out of place": ours("dft", inplace=False),
    **{f"ours: {name}": ours(name) for name in WITHOUT_REFERENCE if name != "dft"},
    "Megatron unfused": megatron_unfused,
    "Megatron fused": megatron_fused,
    "Transformer Engine": transformer_engine(overwrite=False),
    "Transformer Engine, overwriting": transformer_engine(overwrite=True),
    "Liger vocab-parallel": liger_vocab_parallel,
    "Liger": liger,
    "flash-attn": flash_attn(inplace=False),
    "flash-attn, in place": flash_attn(inplace=True),
    "F.cross_entropy": torch_cross_entropy,
}
STOCK = "Megatron: output layer, unfused"
HEADS: dict[str, Callable[[], Head]] = {
    "ours: masked tokens removed": ours_from_hidden(compact=True, chunks=False),
    "ours: masked tokens removed, linear-fused": ours_from_hidden(compact=True, chunks=True),
    "ours: linear-fused": ours_from_hidden(compact=False, chunks=True),
    "ours: materialized logits": ours_from_hidden(compact=False, chunks=False),
    STOCK: megatron_from_hidden(megatron_unfused),
    "Liger fused linear": liger_from_hidden,
    "cut cross entropy": cut_cross_entropy,
    "F.linear_cross_entropy": torch_from_hidden(chunks=False),
    "F.linear_cross_entropy, chunked": torch_from_hidden(chunks=True),
}
NOT_ON_A_CPU = {
    name: "requires a GPU"
    for name in [*IMPLEMENTATIONS, *HEADS]
    if name.startswith(("Transformer", "Liger", "flash", "cut"))
} | {"F.linear_cross_entropy, chunked": "much slower on a CPU than without chunks"}
