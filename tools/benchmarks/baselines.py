"""Baselines of the benchmarks: the cross entropies available to a Megatron user, turned into DFT by one line.

    loss = ce * torch.exp(-ce).detach()

A baseline is a function of logits [N, 1, V/tp], targets [N, 1] and a process group, as Megatron calls a loss. With the
output layer, it is a function of hidden states [N, H], weight [V/tp, H], targets [N] and a process group. A name that
ends with (NLL) marks a baseline that cannot compute DFT. Each `make` imports its package when it is called; a missing
package becomes a note in the results. Transformer Engine, flash-attn and TRL need only their Python files: unpack their
archives into .baselines/.
"""

from __future__ import annotations

import contextlib
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
from megatron_dft.ops.linear_fused import Split, WeightGradient, add_product, linear_loss_and_stats
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


def quack(inplace: bool) -> Callable[[], Loss]:
    def make() -> Loss:
        module = importlib.import_module("quack.cross_entropy")

        def cross_entropy(logits: Tensor, target: Tensor, group: ProcessGroup) -> Tensor:
            _require_whole_vocabulary(group)
            rows = logits.view(-1, logits.shape[-1])
            options = {"ignore_index": -100, "reduction": "none", "inplace_backward": inplace}
            return module.cross_entropy(rows, target.view(-1), **options)

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

    def __init__(self, weight: Tensor, summed: bool = False) -> None:
        self.total = weight.main_grad  # type: ignore[attr-defined]

    def add(self, columns: slice, gradient: Tensor, hidden: Tensor) -> None:
        add_product(self.total[columns], gradient.t(), hidden)

    def multiply(self, factor: Tensor) -> None:
        self.total[:1].mul_(factor)

    def result(self) -> None:
        return None


def megatron_linear(hidden: Tensor, weight: Tensor, group: ProcessGroup) -> Tensor:
    """Megatron's output layer with gradient accumulation fusion; without Apex, `torch.addmm` replaces its kernel."""
    from megatron.core.tensor_parallel import layers

    if not hasattr(layers, "fused_weight_gradient_mlp_cuda"):
        kernels = SimpleNamespace(wgrad_gemm_accum_fp32=lambda rows, grad, total: add_product(total, grad.t(), rows))
        layers.fused_weight_gradient_mlp_cuda = kernels
    return layers.linear_with_grad_accumulation_and_async_allreduce(
        hidden, weight, None, True, group.size() > 1, False, tp_group=group
    )


def ours_from_hidden(compact: bool, chunks: bool = False, in_forward: bool = False) -> Callable[[], Head]:
    """Our output layer with loss as a Megatron host calls it.

    Masked tokens are removed or not. All logits are materialized, or output layer and loss run in chunks: of the
    vocabulary, or of tokens with the gradient in forward.
    """

    def head(hidden: Tensor, weight: Tensor, target: Tensor, group: ProcessGroup) -> Tensor:
        options = LossOptions(objective=parse_objective("dft"), tp_group=group, return_nll=True, inplace_backward=True)

        def of_rows(rows: Tensor, target: Tensor, upstream: Tensor | None = None):
            if chunks:
                return linear_loss_and_stats(rows, weight, target, options, Split(), upstream, MainGrad)
            return loss_and_stats(megatron_linear(rows, weight, group), target, options)

        per_token = [target, (1.0 / (target != -100).sum()).expand(len(target))] if in_forward else [target]
        return (loss_valid_tokens if compact else loss_all_tokens)(of_rows, hidden, *per_token, ignore_index=-100)[0]

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


def liger_scaled_from_hidden() -> Head:
    """Liger's scaled linear cross entropy: one loss and one upstream gradient per token."""
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    if torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0):  # elsewhere Liger runs PyTorch
        importlib.import_module("liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90")
    return _head_with_dft_line(LigerFusedLinearScaledCrossEntropyFunction.apply)


def quack_from_hidden() -> Head:
    """quack's chunked linear cross entropy, of NLL.

    Forward computes the gradient of each token's NLL. It returns a sum or mean and takes no weight per token.
    """
    module = importlib.import_module("quack.linear_cross_entropy")

    def head(hidden: Tensor, weight: Tensor, target: Tensor, group: ProcessGroup) -> Tensor:
        _require_whole_vocabulary(group)
        mean = module.chunked_linear_cross_entropy(hidden, weight, target, ignore_index=-100, reduction="mean")
        return mean.expand(len(target))

    return head


def trl_from_hidden(compact: bool) -> Callable[[], Head]:
    """The output layer of TRL's SFTTrainer with loss_type="dft", without the entropy and accuracy that it logs.

    TRL removes masked tokens on a GPU only (`compact`).
    """
    stubs = {
        "transformers": {},
        "transformers.utils": {"is_triton_available": lambda: True},
        "trl.trainer.utils": {"maybe_gather_lm_head_ctx": lambda *_: contextlib.nullcontext()},
    }

    def make() -> Head:
        module = _import_unpacked("trl.kernels.chunked_logprob", stubs, needed="trl.trainer.utils")

        def cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
            mask = target != -100
            rows, labels = (hidden[mask], target[mask]) if compact else (hidden, target.clamp(min=0))
            # bias, labels, temperature, vocabulary entries of a chunk, soft cap, scale of the logits, further outputs
            options = (None, labels, 1.0, 32768, None, 1.0, ())
            logprobs = module.ChunkedLogProbFunction.apply(rows, weight, *options)[0]
            if compact:
                logprobs = logprobs.new_zeros(mask.shape).masked_scatter(mask, logprobs)
            return -logprobs.masked_fill(~mask, 0.0)

        return _head_with_dft_line(cross_entropy)

    return make


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


def _import_unpacked(name: str, stubs: dict[str, dict[str, object]], needed: str = "sys") -> ModuleType:
    """Import one module of a package, which later imports the module `needed`.

    If an import fails, bypass the __init__ of the package in .baselines/ and replace the modules of `stubs`. Stubs of
    other packages are removed again.
    """
    root = name.partition(".")[0]
    try:
        importlib.import_module(needed)
        return importlib.import_module(name)
    except ImportError:
        if not (UNPACKED / root).is_dir():
            raise
    for folder in [UNPACKED / root, *(path for path in (UNPACKED / root).rglob("*") if path.is_dir())]:
        package = folder.relative_to(UNPACKED).as_posix().replace("/", ".")
        sys.modules[package] = _module(package)
        sys.modules[package].__path__ = [str(folder)]
    before = {module: sys.modules.get(module) for module in stubs if module.partition(".")[0] != root}
    for module, contents in stubs.items():
        sys.modules[module] = _module(module)
        vars(sys.modules[module]).update(contents)
    imported = importlib.import_module(name)
    for module, original in before.items():
        sys.modules.pop(module)
        if original is not None:
            sys.modules[module] = original
    return imported


def _module(name: str) -> ModuleType:
    """An empty module with a spec, which `importlib.util.find_spec` requires."""
    module = ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    return module


DFT = "ours: dft"
NLL = "(NLL)"
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
    "quack": quack(inplace=False),
    "quack, in place": quack(inplace=True),
    "F.cross_entropy": torch_cross_entropy,
}
STOCK = "Megatron: output layer, unfused"
HEADS: dict[str, Callable[[], Head]] = {
    "ours: masked tokens removed": ours_from_hidden(compact=True),
    "ours: masked tokens removed, linear-fused": ours_from_hidden(compact=True, chunks=True),
    "ours: masked tokens removed, linear-fused, gradient in forward": ours_from_hidden(True, True, in_forward=True),
    "ours: linear-fused": ours_from_hidden(compact=False, chunks=True),
    "ours: linear-fused, gradient in forward": ours_from_hidden(False, True, in_forward=True),
    "ours: materialized logits": ours_from_hidden(compact=False),
    STOCK: megatron_from_hidden(megatron_unfused),
    "Liger fused linear": liger_from_hidden,
    "Liger scaled linear": liger_scaled_from_hidden,
    "cut cross entropy": cut_cross_entropy,
    "F.linear_cross_entropy": torch_from_hidden(chunks=False),
    "F.linear_cross_entropy, chunked": torch_from_hidden(chunks=True),
    f"quack chunked linear {NLL}": quack_from_hidden,
    "TRL fused head": trl_from_hidden(compact=torch.cuda.is_available()),
}
NOT_ON_A_CPU = {
    name: "requires a GPU"
    for name in [*IMPLEMENTATIONS, *HEADS]
    if name.startswith(("Transformer", "Liger", "flash", "cut", "quack"))
} | {
    "F.linear_cross_entropy, chunked": "much slower on a CPU than without chunks",
    "Liger scaled linear": "its kernel requires a Hopper GPU",
}
