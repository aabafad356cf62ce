"""`megatron sft` of ms-swift on a CPU rank: python swift_training.py ARGUMENTS.

ms-swift and mcore-bridge import Transformer Engine and build models of its layers. Here Megatron-Core's own layers take
its names and the names of its parameters, so mcore-bridge loads the weights of Hugging Face. Trainer, schedules,
DDP, optimizer and data are not changed.
"""

import importlib.machinery
import importlib.util
import runpy
import sys
from contextlib import nullcontext
from types import ModuleType

import torch
import torch.nn.functional as F

from megatron_dft.testing import cpu


def enable():
    """Make this process a CPU rank of ms-swift."""
    torch.set_num_threads(1)
    torch.jit._state.disable()  # scripted functions cannot call the tensor factories that cpu.py replaces
    cpu.enable()
    empty_transformer_engine()
    local_layers()
    torch.cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    torch.cuda.max_memory_reserved = lambda device=None: 0


def empty_transformer_engine():
    """`import transformer_engine` succeeds. Nothing of it runs without fp8."""
    modules = {}
    for name in ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.attention"):
        modules[name] = sys.modules[name] = ModuleType(name)
        modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
        modules[name].__path__ = []
    root, torch_part, attention = modules.values()
    root.pytorch, torch_part.attention = torch_part, attention
    attention.apply_rotary_pos_emb = attention._SplitAlongDim = None
    torch_part.fp8_autocast = torch_part.fp8_model_init = lambda *args, **kwargs: nullcontext()


def local_layers():
    """Megatron-Core's layers under the names of Transformer Engine's."""
    import megatron.core.extensions.transformer_engine as extensions
    import megatron.core.models.gpt.gpt_layer_specs as specs
    import megatron.core.transformer.multi_token_prediction as mtp
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    class LayerNormColumnParallelLinear(ColumnParallelLinear):
        """RMSNorm, then a ColumnParallelLinear."""

        def __init__(self, input_size, output_size, *, config, **kwargs):
            super().__init__(input_size, output_size, config=config, **kwargs)
            self.output_size = self.output_size_per_partition
            self.layer_norm_weight = torch.nn.Parameter(torch.ones(input_size, dtype=config.params_dtype))
            self.layer_norm_weight.sequence_parallel = config.sequence_parallel
            self.return_layernorm_output = False  # set by mcore-bridge's LoRA

        def forward(self, x, *args, **kwargs):
            x = F.rms_norm(x, x.shape[-1:], self.layer_norm_weight, self.config.layernorm_epsilon)
            output, bias = super().forward(x, *args, **kwargs)
            return ((output, x) if self.return_layernorm_output else output), bias

    class AnyLinear(type):
        """Parallel layers are instances of TELinear, too. LoRA selects its targets by that class."""

        def __instancecheck__(cls, x):
            return super().__instancecheck__(x) or isinstance(x, (ColumnParallelLinear, RowParallelLinear))

    class Linear(torch.nn.Linear, metaclass=AnyLinear):
        """A factor of LoRA, equal on all ranks."""

        def __init__(self, input_size, output_size, *, config, bias=False, **kwargs):
            super().__init__(input_size, output_size, bias=bias, dtype=config.params_dtype)
            self.config, self.use_bias, self.tp_size = config, bias, 1

        def forward(self, x, *args, **kwargs):
            return super().forward(x), None

    layers = {
        "TELinear": Linear,
        "TEColumnParallelLinear": ColumnParallelLinear,
        "TERowParallelLinear": RowParallelLinear,
        "TELayerNormColumnParallelLinear": LayerNormColumnParallelLinear,
        "TEDotProductAttention": DotProductAttention,
    }
    for name in ("TEGroupedLinear", "TEColumnParallelGroupedLinear", "TERowParallelGroupedLinear"):
        layers[name] = type(name, (torch.nn.Module,), {})
    for name, layer in layers.items():
        setattr(extensions, name, layer)
    for name, layer in {
        "linear": Linear,
        "column_parallel_linear": ColumnParallelLinear,
        "row_parallel_linear": RowParallelLinear,
        "column_parallel_layer_norm_linear": LayerNormColumnParallelLinear,
        "layer_norm": WrappedTorchNorm,
        "core_attention": DotProductAttention,
        "activation_func": None,
    }.items():
        setattr(TESpecProvider, name, lambda self, layer=layer, **kwargs: layer)
    mtp.TESpecProvider = specs.TESpecProvider = TESpecProvider
    specs.TENorm = extensions.TENorm


if __name__ == "__main__":
    enable()
    sys.argv[0] = importlib.util.find_spec("swift.cli._megatron.sft").origin
    runpy.run_path(sys.argv[0], run_name="__main__")
