"""Every cross entropy that a Megatron user could take instead, and the line that makes it DFT.

    loss = ce * torch.exp(-ce).detach()

A rival is a function of logits [N, 1, V/tp], targets [N, 1] and a process group, as Megatron calls a loss. Each
`make` imports what it needs when it is called, so that one that is not installed costs a row that says so. Of
Transformer Engine and flash-attn the Python files are enough: their archives, unpacked into .rivals/.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_dft import OBJECTIVES, vocab_parallel_dft_loss

UNPACKED = Path(__file__).resolve().parent.parent / ".rivals"
Loss = Callable[[Tensor, Tensor, ProcessGroup], Tensor]


def ours(objective: str, inplace: bool = True) -> Callable[[], Loss]:
    """The loss as a Megatron host uses it, or out of place."""

    def loss(logits: Tensor, target: Tensor, group: ProcessGroup) -> Tensor:
        return vocab_parallel_dft_loss(
            logits, target, objective=objective, tp_group=group, value="nll", inplace_backward=inplace
        )

    return lambda: loss


def with_dft_line(cross_entropy: Loss) -> Loss:
    """A cross entropy per token, made DFT by the one line that its users write."""

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
        _refuse_split(group)
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
        _refuse_split(group)
        rows = logits.view(-1, logits.shape[-1]).float()  # in bf16 the weight is wrong by a tenth
        return F.cross_entropy(rows, target.view(-1), reduction="none")

    return with_dft_line(cross_entropy)


def _refuse_split(group: ProcessGroup) -> None:
    if group.size() > 1:
        raise ValueError("knows the whole vocabulary only")


def _import_unpacked(name: str, stand_ins: dict[str, dict[str, object]]) -> ModuleType:
    """Import one Python file of a package, without the package's own import where its compiled parts are missing."""
    try:
        return importlib.import_module(name)
    except ImportError:
        root = name.partition(".")[0]
        if not (UNPACKED / root).is_dir():
            raise
    for folder in [UNPACKED / root, *(path for path in (UNPACKED / root).rglob("*") if path.is_dir())]:
        package = folder.relative_to(UNPACKED).as_posix().replace("/", ".")
        sys.modules[package] = ModuleType(package)
        sys.modules[package].__path__ = [str(folder)]
    for module, contents in stand_ins.items():
        sys.modules[module] = ModuleType(module)
        vars(sys.modules[module]).update(contents)
    return importlib.import_module(name)


DFT = "ours: dft"
IMPLEMENTATIONS: dict[str, Callable[[], Loss]] = {
    DFT: ours("dft"),
    "ours: dft, out of place": ours("dft", inplace=False),
    **{f"ours: {name}": ours(name) for name in OBJECTIVES if name != "dft"},
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
NEED_A_GPU = [name for name in IMPLEMENTATIONS if name.startswith(("Transformer", "Liger", "flash"))]
