"""Run a Megatron host on CPU ranks over gloo: to try things out, and for tests.

Megatron has no CPU mode: it asks for tensors on "cuda", keeps its random state there, and leaves context parallelism
and packed sequences to Transformer Engine. `enable` maps the first two to their CPU counterparts and lends Megatron
an attention; `complete_arguments` adds the flags without which it would call CUDA kernels.

    tensors     a CUDA device means the CPU; only functions that take a device are wrapped, no other operation pays
    torch.cuda  one device with the CPU's random state; is_available() stays False, for all who ask before they use it
    megatron    start without CUDA, random state, norms, attention, tensors on their way to the next pipeline stage

Everything else is Megatron's own (model, schedules, optimizer, checkpoints, all parallel layouts), so losses and
gradients mean what they mean on a GPU. What it prints about time, throughput and memory does not, and nothing
overlaps. Left out: FP8, CUDA graphs, FSDP, offloading; flags that ask for them are refused.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from megatron_dft.hosts import cpu_attention
from megatron_dft.hosts.patches import Patches

# What a CPU run needs, where the user said nothing, and why.
NEEDED = {
    "--transformer-impl": "local",  # the default is Transformer Engine
    "--distributed-backend": "gloo",  # the default is NCCL
    "--no-gradient-accumulation-fusion": None,  # an Apex kernel
    "--no-masked-softmax-fusion": None,  # a CUDA kernel, taken in half precision
    "--no-persist-layer-norm": None,  # an Apex kernel
    "--no-rope-fusion": None,  # a Transformer Engine kernel
    "--use-cpu-initialization": None,  # the same weights for every tensor-parallel size
}
# Flags of which some values work; all others name something that runs on CUDA alone.
POSSIBLE = {
    "--transformer-impl": ("local",),
    "--distributed-backend": ("gloo",),
    "--attention-backend": ("auto", "local", "unfused"),
    "--cuda-graph-impl": ("none",),
    "--moe-token-dispatcher-type": ("allgather",),
}
IMPOSSIBLE = (
    "--enable-cuda-graph",
    "--external-cuda-graph",
    "--fp4-format",
    "--fp8-format",
    "--moe-grouped-gemm",
    "--optimizer-cpu-offload",
    "--tp-comm-overlap",
    "--use-flash-attn",
    "--use-megatron-fsdp",
    "--use-torch-fsdp2",
)
# The functions to which Megatron gives a device.
FACTORIES = (
    *("arange", "as_tensor", "empty", "empty_like", "full", "linspace"),
    *("ones", "rand", "randint", "randn", "tensor", "zeros"),
)
CPU = torch.device("cpu")
TRANSFORMER_ENGINE = ("transformer_engine", "transformer_engine_torch")
DEVICES = ("cuda", "cpu", "auto")


def is_meant_by(device: str) -> bool:
    """Whether --device asks for CPU ranks; `auto` does where no GPU is found."""
    return device == "cpu" or (device == "auto" and not torch.cuda.is_available())


@functools.cache
def enable() -> None:
    """Make this process a CPU rank, for good. Further calls do nothing.

    Call it once the Megatron to be used is importable (a checkout on sys.path) and before any of it is imported.
    """
    _environment()
    _tensors()
    _cuda()
    _megatron()


@functools.cache
def enable_bridge() -> None:
    """The same, and Megatron-Bridge runs on it. Its settings are the user's: nothing that needs CUDA among them."""
    enable()
    # Bridge cannot be imported without it, whether it is used or not; Megatron-Core has found none by now.
    for name in TRANSFORMER_ENGINE:
        del sys.modules[name]
    _initialization("megatron.bridge.training.initialize")
    # It compares layers with those of Transformer Engine that Megatron-Core offers: none.
    Patches().put("megatron.bridge.peft.utils:HAVE_TE", False)


def complete_arguments(argv: list[str]) -> list[str]:
    """The arguments of a Megatron script, and after them the flags that a CPU run needs and `argv` lacks.

    Raises:
        ValueError: for a flag that asks for something only a GPU can do.
    """
    given = {}
    for word, following in zip(argv, [*argv[1:], ""], strict=False):
        flag, equals, value = word.partition("=")
        given[flag] = value if equals else following
    for flag, values in POSSIBLE.items():
        if given.get(flag, values[0]) not in values:
            raise ValueError(f"{flag}: expected {' or '.join(values)} on the CPU, got {given[flag]}; leave it out")
    for flag in IMPOSSIBLE:
        if flag in given:
            raise ValueError(f"--device cpu: expected a run without CUDA kernels, got {flag}; leave it out")
    missing = {flag: value for flag, value in NEEDED.items() if flag not in given}
    return [*argv, *(word for pair in missing.items() for word in pair if word is not None)]


def _environment() -> None:
    """What has to be set before Megatron is imported."""
    # On a machine with GPUs, too, this process has none, so torch.cuda.is_available() is False.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # Megatron compiles its pointwise functions at import; for the CPU that would need a C++ compiler, and minutes.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    # Megatron insists on this order of kernel launches under tensor and context parallelism.
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    # Where these are installed, Megatron prefers their kernels, which run on CUDA alone, to PyTorch's.
    for name in ("apex", *TRANSFORMER_ENGINE):
        sys.modules[name] = None  # type: ignore[assignment]


def _tensors() -> None:
    """A tensor that is asked for on a GPU is made on the CPU."""
    for name in FACTORIES:
        _patch(torch, **{name: _on_cpu(getattr(torch, name))})
    host_type = Tensor.type

    def type_name(self: Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        result = host_type(self, dtype, *args, **kwargs)
        return result.replace("torch.", "torch.cuda.", 1) if dtype is None else result

    # Batches and counters are moved to the GPU one by one.
    _patch(Tensor, to=_on_cpu(Tensor.to), cuda=lambda self, *args, **kwargs: self)
    # The optimizers sort parameters by names such as "torch.cuda.FloatTensor".
    _patch(Tensor, type=type_name)


def _on_cpu(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function, with a CUDA device among its arguments replaced, and without page-locking, which needs CUDA."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Tensor:
        if len(args) > 1 and _is_cuda(args[1]):  # tensor.to(device)
            args = (args[0], CPU, *args[2:])
        if "device" in kwargs and (_is_cuda(kwargs["device"]) or isinstance(kwargs["device"], int)):
            kwargs["device"] = CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return function(*args, **kwargs)

    return wrapped


def _is_cuda(argument: Any) -> bool:
    return isinstance(argument, str | torch.device) and str(argument).startswith("cuda")


def _cuda() -> None:
    """The part of torch.cuda that Megatron calls without asking whether there is a GPU."""
    # Without a device Megatron leaves its parallel groups and random seeds uninitialised.
    _patch(torch.cuda, device_count=lambda: 1, set_device=lambda device: None)
    # An index, because it becomes part of names such as "cuda:0".
    _patch(torch.cuda, current_device=lambda: 0)
    # The arguments are checked against the generation of the GPU: older than all of them.
    _patch(torch.cuda, get_device_properties=lambda device=None: SimpleNamespace(major=0, minor=0))
    # Timers wait for the GPU, and DDP is built on a stream of its own.
    _patch(torch.cuda, synchronize=lambda device=None: None, Stream=torch.cpu.Stream)
    _patch(torch.cuda, current_stream=lambda device=None: torch.cpu.current_stream(), stream=lambda s: nullcontext())
    # The random states of the parallel regions are made, kept and restored through these.
    _patch(torch.cuda, manual_seed=torch.default_generator.manual_seed, get_rng_state=_get_rng_state)


def _get_rng_state(*args: Any, **kwargs: Any) -> Tensor:
    return torch.get_rng_state()


def _megatron() -> None:
    """Functions of Megatron that cannot run as they are."""
    patches = Patches()
    # They reach into the CUDA generators below torch.cuda.
    patches.put("megatron.core.tensor_parallel.random:_get_cuda_rng_state", _get_rng_state)
    patches.put("megatron.core.tensor_parallel.random:_set_cuda_rng_state", lambda s, *a, **k: torch.set_rng_state(s))
    # Compares with classes that only exist with Transformer Engine.
    patches.put(
        "megatron.core.transformer.multi_token_prediction:is_inference_column_parallel_linear", lambda module: False
    )
    # The split of packed documents over context-parallel ranks, which Megatron leaves to Transformer Engine.
    patches.put("megatron.core.utils:tex", SimpleNamespace(thd_get_partitioned_indices=cpu_attention.partition))
    _dataset_helpers()
    _norm()
    _attention()
    _pipeline()
    if importlib.util.find_spec("megatron.training"):  # not in wheels before 0.17
        _initialization("megatron.training.initialize")


def _initialization(name: str) -> None:
    """The start of a pretrain()."""
    initialize = importlib.import_module(name)
    # Asserts that there is a GPU unless it is told otherwise; changed in place, other modules hold it by now.
    _set_default(initialize.initialize_megatron, allow_no_cuda=True)
    # Draws from the one random stream there is, as much as the layout asks for: weights would depend on the layout.
    Patches().put(f"{name}:_warmup_jit_function", lambda *args, **kwargs: None)


def _dataset_helpers() -> None:
    """A checkout compiles its C++ functions with make and pybind11; those of an installed wheel are the same."""
    import megatron.core.datasets as datasets

    datasets.__path__ += [os.path.join(folder, "megatron", "core", "datasets") for folder in sys.path]
    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp"):
        Patches().put("megatron.core.datasets.utils:compile_helpers", lambda: None)


def _norm() -> None:
    """PyTorch's norms serve sequence parallelism, which Megatron refuses them, when their gradients are summed."""
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    host_new = WrappedTorchNorm.__new__

    def new(cls: type, config: Any, *args: Any, **kwargs: Any) -> torch.nn.Module:
        norm = host_new(cls, _replace(config, sequence_parallel=False), *args, **kwargs)
        for parameter in norm.parameters():
            _patch(parameter, sequence_parallel=config.sequence_parallel)  # read where gradients are summed
        return norm

    Patches().put("megatron.core.transformer.torch_norm:WrappedTorchNorm.__new__", new)
    # Hybrid models end in Transformer Engine's norm, whatever their layers are made of.
    Patches().put(
        "megatron.core.extensions.transformer_engine:TENorm.__new__",
        lambda cls, *args, has_residual=False, **kwargs: WrappedTorchNorm(*args, **kwargs),
    )


def _attention() -> None:
    """Ours where Megatron's own refuses: context parallelism and packed sequences. Specs hold the class by name."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    host_init, host_forward = DotProductAttention.__init__, DotProductAttention.forward

    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        host_init(self, _replace(config, context_parallel_size=1), *args, **kwargs)
        self.config = config

    def forward(
        self: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        if packed_seq_params is None and self.config.context_parallel_size == 1:
            return host_forward(self, query, key, value, attention_mask, attn_mask_type, attention_bias)
        _refuse_other_attention(self, attn_mask_type or self.attn_mask_type, attention_bias)
        return _packed_or_context_parallel(self, query, key, value, packed_seq_params)

    local = "megatron.core.transformer.dot_product_attention:DotProductAttention"
    Patches().put(f"{local}.__init__", init)
    Patches().put(f"{local}.forward", forward)


def _pipeline() -> None:
    """gloo sends in the background, from the tensor itself, which therefore lives on when Megatron frees it."""
    from megatron.core.pipeline_parallel import schedules

    host_deallocate = schedules.deallocate_output_tensor

    def deallocate(out: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(out, Tensor):
            _patch(out, megatron_dft_sent=out.data)
        host_deallocate(out, *args, **kwargs)

    Patches().put("megatron.core.pipeline_parallel.schedules:deallocate_output_tensor", deallocate)


def _packed_or_context_parallel(module: Any, query: Tensor, key: Tensor, value: Tensor, packed: Any) -> Tensor:
    """The mask follows from positions and documents; as in Transformer Engine the data loader's is not read."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    config, cu_seqlens = module.config, None
    if packed is not None:
        cu_seqlens = packed.cu_seqlens_q if packed.cu_seqlens_q_padded is None else packed.cu_seqlens_q_padded
    # As in Megatron's: heads are split over tensor-parallel ranks, so each drops weights of its own.
    with nullcontext() if config.sequence_parallel else get_cuda_rng_tracker().fork():
        return cpu_attention.attention(
            query,
            key,
            value,
            cu_seqlens=cu_seqlens,
            cp_group=module.pg_collection.cp if config.context_parallel_size > 1 else None,
            softmax_scale=module.softmax_scale * (module.scale_mask_softmax.scale or 1.0),
            dropout=module.attention_dropout.p if module.training else 0.0,
        )


def _refuse_other_attention(module: Any, mask_type: Any, attention_bias: Tensor | None) -> None:
    found = {
        f"the mask {mask_type.name}": mask_type.name not in ("causal", "padding_causal"),
        "a sliding window": module.scale_mask_softmax.window_size is not None,
        "a softmax offset": getattr(module, "softmax_offset", None) is not None,
        "an attention bias": attention_bias is not None,
    }
    for description, present in found.items():
        if present:
            raise ValueError(
                "attention on the CPU: expected plain causal attention with packed sequences or context parallelism, "
                f"got {description}; run without packing and with --context-parallel-size 1, or on a GPU"
            )


def _patch(owner: Any, **attributes: Any) -> None:
    for name, value in attributes.items():
        setattr(owner, name, value)


def _replace(config: Any, **changes: Any) -> Any:
    """A copy that does not run the checks of the configuration again."""
    config = copy.copy(config)
    _patch(config, **changes)
    return config


def _set_default(function: Callable[..., Any], **defaults: Any) -> None:
    parameters = inspect.signature(function).parameters.values()
    known = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is not p.empty]
    function.__defaults__ = tuple(defaults.get(p.name, p.default) for p in known)  # type: ignore[attr-defined]
