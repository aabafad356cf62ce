"""Registry of the Megatron functions that are replaced, with the reason and the missing official interface.

`Patches` applies and undoes the replacements. `wrap` replaces a function in every module that imports it, under any
name, because packages re-export functions (`megatron.training.pretrain` is `megatron.training.training.pretrain`).
`put` replaces one attribute of one module or class. Two changes are outside of this registry, both in testing/cpu.py:
the default of `allow_no_cuda`, and the search path of `megatron.core.datasets`.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from megatron_dft.hosts import compat


class Patch(NamedTuple):
    """One replaced attribute."""

    target: str  # "module:attribute" or "module:Class.attribute"
    when: str
    why: str
    missing_hook: str
    versions: str = "0.17 - dev"  # of Megatron


TRAINING = "megatron.training.training"
OBJECTIVE, DURING = "--loss-type", "--loss-type, while pretrain() runs"
EMULATION = "--device cpu"

REGISTRY = (
    Patch(
        f"{TRAINING}:pretrain",
        OBJECTIVE,
        "binds the loss on the model and wraps forward_step",
        "pretrain() has no argument for a loss; the model is reached through its arguments",
    ),
    Patch(
        "megatron.training.arguments:add_megatron_arguments",
        OBJECTIVE,
        "adds our flags to Megatron's parser, which logs and checkpoints them",
        "the script itself uses extra_args_provider",
    ),
    Patch(
        f"{TRAINING}:train_step",
        DURING,
        "sets the iteration of a scheduled objective, outside of a CUDA graph; counts tokens over iterations",
        "there is no callback for iterations",
    ),
    Patch(
        f"{TRAINING}:evaluate",
        DURING,
        "reports validation as sum over count",
        "with --sft Megatron averages means of micro-batches (PR 7207)",
    ),
    Patch(
        f"{TRAINING}:save_checkpoint",
        DURING,
        "stores the number of trained tokens in Megatron's arguments",
        "checkpoints have no field for counters of extensions",
    ),
    Patch(
        "megatron.training.checkpointing:check_checkpoint_args",
        DURING,
        "restores that number when a run resumes",
        "checkpoints have no field for counters of extensions",
    ),
    Patch(
        "megatron.core.tensor_parallel.random:_get_cuda_rng_state",
        EMULATION,
        "reads the random state of the CPU",
        "Megatron reads the CUDA generators directly, not through torch.cuda",
    ),
    Patch(
        "megatron.core.tensor_parallel.random:_set_cuda_rng_state",
        EMULATION,
        "sets the random state of the CPU",
        "Megatron sets the CUDA generators directly, not through torch.cuda",
    ),
    Patch(
        "megatron.core.transformer.multi_token_prediction:is_inference_column_parallel_linear",
        EMULATION,
        "returns False",
        "it compares with classes that exist only with Transformer Engine",
        "0.19 - dev",
    ),
    Patch(
        "megatron.core.utils:tex",
        EMULATION,
        "splits packed documents over context-parallel ranks",
        "Megatron leaves the split to Transformer Engine",
    ),
    Patch(
        "megatron.training.initialize:_warmup_jit_function",
        EMULATION,
        "is disabled: it draws from the only random stream, and the number of draws depends on the layout",
        "cannot be turned off",
    ),
    Patch(
        "megatron.training.initialize:initialize_megatron",
        EMULATION,
        "changes the default of allow_no_cuda",
        "pretrain() has no argument for it",
    ),
    Patch(
        "megatron.bridge.training.initialize:_warmup_jit_function",
        f"{EMULATION}, Bridge",
        "is disabled, as above",
        "cannot be turned off",
        "Bridge 0.6",
    ),
    Patch(
        "megatron.bridge.training.initialize:initialize_megatron",
        f"{EMULATION}, Bridge",
        "changes the default of allow_no_cuda",
        "finetune() has no argument for it",
        "Bridge 0.6",
    ),
    Patch(
        "megatron.bridge.peft.utils:HAVE_TE",
        f"{EMULATION}, Bridge",
        "is False: Transformer Engine is importable but not used",
        "its value depends only on the import",
        "Bridge 0.6",
    ),
    Patch(
        "megatron.core.datasets.utils:compile_helpers",
        f"{OBJECTIVE}, {EMULATION}",
        "is disabled if helpers_cpp is compiled and, without --device cpu, there is no Makefile",
        "it always calls make, and a wheel has no Makefile",
    ),
    Patch(
        "megatron.core.transformer.torch_norm:WrappedTorchNorm.__new__",
        EMULATION,
        "allows PyTorch's norms under sequence parallelism",
        "Megatron rejects them there, although their gradients are summed",
    ),
    Patch(
        "megatron.core.extensions.transformer_engine:TENorm.__new__",
        EMULATION,
        "creates PyTorch's norm",
        "the final norm of hybrid models is Transformer Engine's, for any layer spec",
    ),
    Patch(
        "megatron.core.transformer.dot_product_attention:DotProductAttention.__init__",
        EMULATION,
        "allows context parallelism",
        "local attention does not support it",
    ),
    Patch(
        "megatron.core.transformer.dot_product_attention:DotProductAttention.forward",
        EMULATION,
        "computes attention over context-parallel ranks and packed documents",
        "local attention supports neither",
    ),
    Patch(
        "megatron.core.pipeline_parallel.schedules:deallocate_output_tensor",
        EMULATION,
        "keeps a tensor alive while gloo sends it",
        "gloo sends asynchronously from the tensor's memory",
    ),
)
_BY_TARGET = {patch.target: patch for patch in REGISTRY}
_MISSING: Any = object()


class Patches:
    """Context manager for replacements: applied one by one, undone together in reverse order."""

    def __init__(self) -> None:
        self._applied: list[tuple[Any, str, Any, Any]] = []  # owner, name, original, replacement

    def wrap(self, target: str, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Replace a function by `wrapper(function)`, in every module that has it as an attribute.

        Raises:
            ValueError: for a Megatron without this function, or whose attribute cannot be set.
        """
        owner, name = _owner(target)
        if not hasattr(owner, name):
            raise ValueError(
                f"{owner.__name__}: expected a function {name}(), got a Megatron without it; {compat.KNOWN_HOSTS}"
            )
        original = getattr(owner, name)
        replacement = functools.wraps(original)(wrapper(original))
        for module, alias in list(_holders(original)):
            self._set(module, alias, replacement)

    def put(self, target: str, replacement: Any) -> None:
        """Replace an attribute of one module or class. The attribute may be missing there."""
        owner, name = _owner(target)
        self._set(owner, name, replacement)

    def undo(self) -> None:
        """Restore the originals, except for attributes that were replaced again since."""
        while self._applied:
            owner, name, original, replacement = self._applied.pop()
            if _own(owner, name) is not replacement:
                continue
            if original is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, original)

    def __enter__(self) -> Patches:
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()

    def _set(self, owner: Any, name: str, replacement: Any) -> None:
        self._applied.append((owner, name, _own(owner, name), replacement))
        setattr(owner, name, replacement)
        if _own(owner, name) is not replacement:
            raise ValueError(f"{owner.__name__}.{name}: assignment had no effect; remove other code that patches it")


def table() -> str:
    """The registry as Markdown, for CONTRIBUTING.md."""
    rows = ["| replaced | when | replacement | missing hook | Megatron |", "|---|---|---|---|---|"]
    for patch in REGISTRY:
        name = patch.target.replace(":", ".").replace("__", r"\_\_")
        rows.append(f"| {name} | {patch.when} | {patch.why} | {patch.missing_hook} | {patch.versions} |")
    return "\n".join(rows)


def _owner(target: str) -> tuple[Any, str]:
    """Module or class of a registered target, and the name of the attribute."""
    module, _, path = _BY_TARGET[target].target.partition(":")
    owner = importlib.import_module(module)
    *classes, name = path.split(".")
    for attribute in classes:
        owner = getattr(owner, attribute)
    return owner, name


def _own(owner: Any, name: str) -> Any:
    """The attribute as stored in `owner`: neither inherited nor bound."""
    return vars(owner).get(name, _MISSING)


def _holders(value: Any) -> Iterator[tuple[Any, str]]:
    """Modules that have this object as an attribute, and the attribute's name."""
    for module in list(sys.modules.values()):
        for name, held in list(getattr(module, "__dict__", {}).items()):
            if held is value:
                yield module, name
