"""Megatron on CPU ranks over gloo, for trials and tests.

Megatron has no CPU mode: it allocates tensors on "cuda", keeps its random state there, and requires Transformer Engine
for context parallelism and packed sequences. `enable` maps tensors and random state to the CPU and supplies an
attention. `complete_arguments` adds the flags that avoid CUDA kernels.

    tensors     a CUDA device is replaced by the CPU. Only functions with a device argument are wrapped
    torch.cuda  one device with the CPU's random state. is_available() stays False for code that tests it
    megatron    initialization, random state, norms, attention, tensors sent to the next pipeline stage

Everything else is Megatron's own: model, schedules, optimizer, checkpoints, all parallel layouts. Losses and gradients
are therefore comparable with a GPU. Printed times, throughput and memory are not, and nothing overlaps. Not supported:
FP8, CUDA graphs, FSDP, offloading; their flags raise ValueError.
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

from megatron_dft.hosts.patches import Patches
from megatron_dft.testing import cpu_attention

# Flags that a CPU run requires; added unless the user sets them.
REQUIRED_FLAGS = {
    "--transformer-impl": "local",  # the default is Transformer Engine
    "--distributed-backend": "gloo",  # the default is NCCL
    "--no-gradient-accumulation-fusion": None,  # an Apex kernel
    "--no-masked-softmax-fusion": None,  # a CUDA kernel, used in half precision
    "--no-persist-layer-norm": None,  # an Apex kernel
    "--no-rope-fusion": None,  # a Transformer Engine kernel
    "--use-cpu-initialization": None,  # the same weights for every tensor-parallel size
}
# Flags with values that work on the CPU; all other values require CUDA.
SUPPORTED_VALUES = {
    "--transformer-impl": ("local",),
    "--distributed-backend": ("gloo",),
    "--attention-backend": ("auto", "local", "unfused"),
    "--cuda-graph-impl": ("none",),
    "--moe-token-dispatcher-type": ("allgather",),
}
UNSUPPORTED_FLAGS = (
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
# Factory functions that Megatron calls with a device.
FACTORIES = (
    *("arange", "as_tensor", "empty", "empty_like", "full", "linspace"),
    *("ones", "rand", "randint", "randn", "tensor", "zeros"),
)
CPU = torch.device("cpu")
TRANSFORMER_ENGINE = ("transformer_engine", "transformer_engine_torch")
DEVICES = ("cuda", "cpu", "auto")
DEVICE_HELP = "cpu: CPU ranks over gloo, for trials and tests; auto: CPU ranks if no GPU is found"


def requested_by(device: str) -> bool:
    """Whether a value of --device selects CPU ranks; `auto` does if no GPU is found."""
    return device == "cpu" or (device == "auto" and not torch.cuda.is_available())


@functools.cache
def enable() -> None:
    """Make this process a CPU rank, irreversibly. Further calls do nothing.

    Call it after Megatron is importable (a checkout on sys.path) and before any of it is imported.
    """
    _environment()
    _tensors()
    _cuda()
    _megatron()


@functools.cache
def enable_bridge() -> None:
    """Like `enable`, for Megatron-Bridge. Does not check the recipe for settings that require CUDA."""
    enable()
    # Bridge's imports require Transformer Engine. Megatron-Core was imported without it above.
    for name in TRANSFORMER_ENGINE:
        del sys.modules[name]
    _initialization("megatron.bridge.training.initialize")
    # Bridge compares layers with Megatron-Core's Transformer Engine layers, which do not exist here.
    Patches().put("megatron.bridge.peft.utils:HAVE_TE", False)


def complete_arguments(argv: list[str]) -> list[str]:
    """`argv` of a Megatron script, followed by the flags of `REQUIRED_FLAGS` that it lacks.

    Raises:
        ValueError: for a flag that requires a GPU.
    """
    given = {}
    for argument, following in zip(argv, [*argv[1:], ""], strict=False):
        flag, equals, value = argument.partition("=")
        given[flag] = value if equals else following
    for flag, values in SUPPORTED_VALUES.items():
        if given.get(flag, values[0]) not in values:
            raise ValueError(f"{flag}: expected {' or '.join(values)} on the CPU, got {given[flag]}; leave it out")
    for flag in UNSUPPORTED_FLAGS:
        if flag in given:
            raise ValueError(f"--device cpu: expected a run without CUDA kernels, got {flag}; leave it out")
    missing = {flag: value for flag, value in REQUIRED_FLAGS.items() if flag not in given}
    return [*argv, *(item for pair in missing.items() for item in pair if item is not None)]


def _environment() -> None:
    """Set environment variables and block modules before Megatron is imported."""
    # torch.cuda.is_available() is False, also on a machine with GPUs.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # Megatron compiles pointwise functions at import, which takes minutes and a C++ compiler on the CPU.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    # Megatron requires this value under tensor and context parallelism.
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    # If these are installed, Megatron uses their CUDA kernels.
    for name in ("apex", *TRANSFORMER_ENGINE):
        sys.modules[name] = None  # type: ignore[assignment]


def _tensors() -> None:
    """Allocate CUDA tensors on the CPU."""
    for name in FACTORIES:
        _patch(torch, **{name: _on_cpu(getattr(torch, name))})
    host_type = Tensor.type

    def type_name(self: Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        result = host_type(self, dtype, *args, **kwargs)
        return result.replace("torch.", "torch.cuda.", 1) if dtype is None else result

    # Batches and counters are moved to the GPU individually.
    _patch(Tensor, to=_on_cpu(Tensor.to), cuda=lambda self, *args, **kwargs: self)
    # The optimizers group parameters by type names such as "torch.cuda.FloatTensor".
    _patch(Tensor, type=type_name)


def _on_cpu(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wrap a function: replace CUDA devices in its arguments by the CPU, and drop pin_memory, which requires CUDA."""

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
    """Replace the functions of torch.cuda that Megatron calls without testing is_available()."""
    # Without a device Megatron does not initialize its parallel groups and random seeds.
    _patch(torch.cuda, device_count=lambda: 1, set_device=lambda device: None)
    # Megatron builds names such as "cuda:0" from the index.
    _patch(torch.cuda, current_device=lambda: 0)
    # Megatron validates arguments by compute capability; 0.0 is below all requirements.
    _patch(torch.cuda, get_device_properties=lambda device=None: SimpleNamespace(major=0, minor=0))
    # Timers synchronize, and DDP is constructed on its own stream.
    _patch(torch.cuda, synchronize=lambda device=None: None, Stream=torch.cpu.Stream)
    _patch(torch.cuda, current_stream=lambda device=None: torch.cpu.current_stream(), stream=lambda s: nullcontext())
    # Megatron's RNG tracker seeds, saves and restores random states with these.
    _patch(torch.cuda, manual_seed=torch.default_generator.manual_seed, get_rng_state=_get_rng_state)


def _get_rng_state(*args: Any, **kwargs: Any) -> Tensor:
    return torch.get_rng_state()


def _megatron() -> None:
    """Replace functions of Megatron that require CUDA or Transformer Engine."""
    patches = Patches()
    # These access the CUDA generators directly.
    patches.put("megatron.core.tensor_parallel.random:_get_cuda_rng_state", _get_rng_state)
    patches.put("megatron.core.tensor_parallel.random:_set_cuda_rng_state", lambda s, *a, **k: torch.set_rng_state(s))
    # It compares with classes that exist only with Transformer Engine.
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
    """Allow pretrain() without a GPU: set allow_no_cuda and disable the JIT warm-up."""
    initialize = importlib.import_module(name)
    # The default asserts that a GPU exists. Changed in place, because other modules have imported the function.
    _set_default(initialize.initialize_megatron, allow_no_cuda=True)
    # The warm-up draws from the only random stream. Initial weights would depend on the layout.
    Patches().put(f"{name}:_warmup_jit_function", lambda *args, **kwargs: None)


def _dataset_helpers() -> None:
    """Use the compiled data set functions of an installed wheel. A checkout compiles them with make and pybind11."""
    import megatron.core.datasets as datasets

    datasets.__path__ += [os.path.join(folder, "megatron", "core", "datasets") for folder in sys.path]
    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp"):
        Patches().put("megatron.core.datasets.utils:compile_helpers", lambda: None)


def _norm() -> None:
    """Allow PyTorch's norms under sequence parallelism: mark their parameters, so Megatron sums their gradients."""
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    host_new = WrappedTorchNorm.__new__

    def new(cls: type, config: Any, *args: Any, **kwargs: Any) -> torch.nn.Module:
        norm = host_new(cls, _replace(config, sequence_parallel=False), *args, **kwargs)
        for parameter in norm.parameters():
            _patch(parameter, sequence_parallel=config.sequence_parallel)  # read by Megatron's gradient all-reduce
        return norm

    Patches().put("megatron.core.transformer.torch_norm:WrappedTorchNorm.__new__", new)
    # The final norm of hybrid models is Transformer Engine's, for any layer spec.
    Patches().put(
        "megatron.core.extensions.transformer_engine:TENorm.__new__",
        lambda cls, *args, has_residual=False, **kwargs: WrappedTorchNorm(*args, **kwargs),
    )


def _attention() -> None:
    """Extend DotProductAttention to context parallelism and packed sequences, in place: specs hold the class."""
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
    """Keep the data of sent tensors alive when Megatron deallocates them: gloo sends asynchronously from them."""
    from megatron.core.pipeline_parallel import schedules

    host_deallocate = schedules.deallocate_output_tensor

    def deallocate(out: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(out, Tensor):
            _patch(out, megatron_dft_sent=out.data)
        host_deallocate(out, *args, **kwargs)

    Patches().put("megatron.core.pipeline_parallel.schedules:deallocate_output_tensor", deallocate)


def _packed_or_context_parallel(module: Any, query: Tensor, key: Tensor, value: Tensor, packed: Any) -> Tensor:
    """Attention with a mask from positions and documents. As in Transformer Engine the given mask is not read."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    config, cu_seqlens = module.config, None
    if packed is not None:
        cu_seqlens = packed.cu_seqlens_q if packed.cu_seqlens_q_padded is None else packed.cu_seqlens_q_padded
    # As in Megatron: heads are split over tensor-parallel ranks, so each rank has its own dropout mask.
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
    """A copy with changes, without the checks of __post_init__."""
    config = copy.copy(config)
    _patch(config, **changes)
    return config


def _set_default(function: Callable[..., Any], **defaults: Any) -> None:
    parameters = inspect.signature(function).parameters.values()
    known = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is not p.empty]
    function.__defaults__ = tuple(defaults.get(p.name, p.default) for p in known)  # type: ignore[attr-defined]
