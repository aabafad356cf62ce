"""Compatibility checks of Megatron, its settings and its models with a custom loss.

Each check returns, or raises ValueError with what was expected, what was found and what to do. The checks test for
features, not for versions. `settings` is Megatron's argparse namespace or its TransformerConfig: both use the same
names.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_dft.config import DFTConfig
from megatron_dft.ops.stats import MEDIAN

LOSS = "compute_language_model_loss"  # what `install` binds on a model
KNOWN_HOSTS = "use Megatron-LM or megatron-core 0.17 to 0.19, or a megatron_dft that supports yours"
# Settings of Megatron-LM that replace the language-modelling loss by another.
OTHER_LOSSES = {
    "logits_load_dir": "--logits-load-dir (distillation from cached logits)",
    "logits_save_dir": "--logits-save-dir (saving a teacher's logits)",
    "export_kd_teacher_load": "--export-kd-teacher-load (ModelOpt distillation)",
    "perform_rl_step": "--perform-rl-step (reinforcement learning)",
}
FP32_MAIN_GRAD = (
    "--dft-token-chunk requires an fp32 main_grad, to which every chunk is added; add "
    "--accumulate-allreduce-grads-in-fp32 and omit --grad-reduce-in-bf16, or omit --dft-token-chunk"
)
MCORE_BRIDGE = "mcore_bridge.model.gpt_model"  # module of the GPTModel of ms-swift
LOGITS = "_forward_output_layer"  # its method in which subclasses cap or scale the logits
OUTPUT_PROCESSOR = "output_processor"  # argument of GPTModel.forward, from 0.18 on: hidden states instead of logits


def check_pretrain(signature: inspect.Signature) -> None:
    """Raises ValueError for a `pretrain()` whose signature is not supported."""
    offered = signature.parameters.keys()
    if "forward_step_func" not in offered or not {"cfg_container", "extra_args_provider"} & offered:
        raise ValueError(
            "pretrain(): expected one that takes a forward_step_func, and a cfg_container or an extra_args_provider, "
            f"got pretrain{signature}; {KNOWN_HOSTS}"
        )


def check_settings(settings: Any, config: DFTConfig) -> None:
    """Raises ValueError for settings that are incompatible with a custom loss. Call it before a model is built."""
    refuse_label_smoothing(getattr(settings, "label_smoothing", 0.0) or 0.0)
    for name, description in OTHER_LOSSES.items():
        if getattr(settings, name, None):
            raise ValueError(
                f"--loss-type {config.loss_type} cannot be combined with {description}, which replaces the "
                "language-modelling loss; remove one of the two"
            )
    fusion = getattr(settings, "cross_entropy_fusion_impl", None) or "native"
    if getattr(settings, "cross_entropy_loss_fusion", False) and fusion != "native":
        raise ValueError(
            f"--loss-type {config.loss_type} replaces Megatron's cross entropy and cannot be combined with "
            f"--cross-entropy-fusion-impl {fusion}; use native, or switch off --cross-entropy-loss-fusion"
        )
    backend(config)
    for name in ("hybrid_context_parallel", "dynamic_context_parallel"):
        if getattr(settings, name, False) and config.enabled and MEDIAN in config.objective.needs:
            raise ValueError(
                f"--loss-type {config.loss_type} cannot be combined with --{name.replace('_', '-')}: ranks run "
                "different numbers of micro-batches, and the median needs all of them; remove one of the two"
            )
    cp = getattr(settings, "context_parallel_size", 1)
    if cp > 1 and not getattr(settings, "calculate_per_token_loss", False):
        raise ValueError(
            f"--loss-type {config.loss_type} with --context-parallel-size {cp} requires --calculate-per-token-loss; "
            "without it Megatron divides by each rank's token count, which gives a wrong gradient for uneven loss masks"
        )
    if config.by_conversation and not getattr(settings, "calculate_per_token_loss", True):
        raise ValueError(
            f"--dft-reduction {config.reduction} requires --calculate-per-token-loss, under which Megatron divides the "
            "gradient by one number for the whole batch; add it"
        )
    if config.token_chunk is not None:
        if not getattr(settings, "calculate_per_token_loss", True):
            raise ValueError(
                "--dft-token-chunk computes the gradient in forward and requires --calculate-per-token-loss "
                "(calculate_per_token_loss), without which the upstream gradient is not known there; add it, or omit "
                "--dft-token-chunk"
            )
        in_fp16 = getattr(settings, "fp16", False) and not getattr(settings, "accumulate_allreduce_grads_in_fp32", True)
        if in_fp16 or getattr(settings, "grad_reduce_in_bf16", False):
            raise ValueError(FP32_MAIN_GRAD)
    if getattr(settings, "overlap_moe_expert_parallel_comm", False):
        for flag, needed in (
            ("--dft-channels", config.channels),
            ("--dft-weights", config.weights),
            (f"--dft-reduction {config.reduction}", config.by_conversation),
            (f"--loss-type {config.loss_type}", config.of_reference),
        ):
            if needed:
                raise ValueError(
                    f"{flag} cannot be combined with --overlap-moe-expert-parallel-comm, whose schedule plan bypasses "
                    "forward, where labels are separated from what they carry; remove one of the two"
                )
        if has_mtp(settings) and config.mtp == "nll":
            raise ValueError(
                "--dft-mtp nll cannot be combined with --overlap-moe-expert-parallel-comm, under which the loss cannot "
                "distinguish the labels of the heads; use --dft-mtp same"
            )
    if config.linear_fused and any(getattr(settings, name, False) for name in ("use_megatron_fsdp", "use_torch_fsdp2")):
        raise ValueError(
            "--dft-linear-fused cannot be combined with fully sharded parameters: it needs the weight of the output "
            "layer on each rank; remove one of the two"
        )


def backend(config: DFTConfig) -> str:
    """Name of the backend for bf16 logits on this machine. Raises ValueError if it cannot run here."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return config.options().kernels(device, torch.bfloat16).NAME


def check_model(model: Any, config: DFTConfig) -> None:
    """Raises ValueError for a model whose loss cannot be replaced without changing its meaning."""
    check_settings(model.config, config)
    if LOSS in vars(model):
        raise ValueError(
            f"install: the loss of {type(model).__name__} is already replaced on this instance; call install() once, "
            "and without other hooks on the loss (distillation, saved logits)"
        )
    if tp_group(model).size() > 1 and not getattr(model, "parallel_output", True):
        raise ValueError(
            f"install: expected logits split over {tp_group(model).size()} tensor-parallel ranks, got a model built "
            "with parallel_output=False, which gathers them; build it with parallel_output=True"
        )
    if has_mtp(model.config) and config.mtp == "nll" and "labels" not in inspect.signature(model.forward).parameters:
        raise ValueError(
            f"--dft-mtp nll is not supported with {type(model).__name__}, whose forward does not name its labels; use "
            "--dft-mtp same"
        )
    compacts(model, config)
    if config.linear_fused:
        obstacle = _obstacle(model) or _obstacle_to_chunks(model)
        if obstacle:
            raise ValueError(f"--dft-linear-fused is not supported with {obstacle}; remove the flag")


def compacts(model: Any, config: DFTConfig) -> bool:
    """Whether masked tokens skip the output layer of this model.

    Raises:
        ValueError: if that is requested and not possible.
    """
    obstacle = compaction_obstacle(model)
    if config.compact_masked_tokens and obstacle:
        raise ValueError(f"--dft-compact-masked-tokens is not supported with {obstacle}; remove the flag")
    return config.compact_masked_tokens is not False and obstacle is None


def compaction_obstacle(model: Any) -> str | None:
    """Why masked tokens of this model cannot skip its output layer; None: they can."""
    scopes = getattr(model.config, "cuda_graph_scope", None) or ()
    names = {getattr(x, "name", x) for x in ([scopes] if isinstance(scopes, str) else scopes)}
    if "full_iteration" in names | {getattr(model.config, "cuda_graph_impl", None)}:
        return "a CUDA graph of the whole iteration, whose shapes cannot depend on data"
    return _obstacle(model)


def describe_output_layer(model: Any, config: DFTConfig) -> str:
    """Log line: whether masked tokens skip the output layer of this model, and why."""
    fused = ""
    if config.token_chunk is not None:
        fused = f"; linear-fused, {config.token_chunk} tokens per chunk, gradient in forward"
    elif config.linear_fused:
        fused = f"; linear-fused, {config.split().vocab_chunk} columns per chunk"
    if compacts(model, config):
        return f"masked tokens skip the output layer{fused}"
    requested = config.compact_masked_tokens is False
    reason = "as requested" if requested else f"because of {compaction_obstacle(model)}"
    return f"masked tokens pass through the output layer, {reason}{fused}"


def check_forward(model: Any, given: Mapping[str, Any]) -> None:
    """Raises ValueError for forward arguments that conflict with a loss computed from hidden states."""
    if given.get(OUTPUT_PROCESSOR) is not None:
        raise ValueError(
            f"{OUTPUT_PROCESSOR}: expected none with a loss computed from hidden states, got one; pass "
            "--no-dft-compact-masked-tokens, and no --dft-linear-fused"
        )
    if given.get("runtime_gather_output") and tp_group(model).size() > 1:
        raise ValueError(
            "runtime_gather_output=True is not supported with labels: the loss needs vocabulary shards; remove it"
        )


def check_width(model: Any, logits: Tensor) -> None:
    """Raises ValueError for logits that are not this rank's equal shard of the vocabulary."""
    ranks = tp_group(model).size()
    if logits.shape[-1] * ranks != model.vocab_size:
        raise ValueError(
            f"logits: expected an equal shard of the vocabulary on each tensor-parallel rank, {model.vocab_size} / "
            f"{ranks} columns, got {logits.shape[-1]}; pad the vocabulary (--make-vocab-size-divisible-by) and do not "
            "gather the output"
        )


def refuse_label_smoothing(label_smoothing: float) -> None:
    """Raises ValueError for label smoothing."""
    if label_smoothing != 0.0:
        raise ValueError(
            f"label smoothing: expected 0, got {label_smoothing}: a smoothed target has no single probability; set it "
            "to 0"
        )


def loss_mask_of(loss_func: Callable[..., Any], given: Tensor | None, tokens: int) -> Tensor:
    """The loss mask that a loss_func applies, or `given`, the mask that the model received.

    If the function of a partial has a parameter `loss_mask`, its argument is the mask. Otherwise it is the only float
    or bool tensor of `tokens` elements among the arguments of the partial.

    Raises:
        ValueError: if the arguments do not have exactly one such tensor and `given` is None.
    """
    arguments = (*getattr(loss_func, "args", ()), *getattr(loss_func, "keywords", {}).values())
    try:
        bound = inspect.signature(loss_func.func).bind_partial(*loss_func.args, **loss_func.keywords).arguments  # type: ignore[attr-defined]
    except (AttributeError, TypeError, ValueError):  # not a partial, or its function has no signature
        bound = {}
    if isinstance(bound.get("loss_mask"), Tensor):
        return bound["loss_mask"]
    masks = [
        x
        for x in arguments
        if isinstance(x, Tensor) and x.numel() == tokens and (x.is_floating_point() or x.dtype == torch.bool)
    ]
    if len(masks) == 1:
        return masks[0]
    if given is None:
        raise ValueError(
            f"loss_func: {len(masks)} of its arguments could be the loss mask ({loss_func!r}); return "
            "functools.partial(loss_func, loss_mask, ...) from forward_step, as Megatron's scripts do, name the "
            "parameter loss_mask, or pass loss_mask= to the model"
        )
    return given


def check_loss_values(count: int, settings: Any) -> None:
    """Raises ValueError for a loss_func without num_tokens under --calculate-per-token-loss.

    The legacy form of Megatron returns a mean and the report. The gradient is then a mean over micro-batches.
    """
    if count == 1 and getattr(settings, "calculate_per_token_loss", False):
        raise ValueError(
            "loss_func: expected (loss, num_tokens, report) under --calculate-per-token-loss, which divides by "
            "num_tokens, got two values; return the sum of the losses and the number of tokens"
        )


def check_num_tokens(num_tokens: Any, given: Tensor) -> None:
    """Raises ValueError for a loss_func without a mask argument that counts more tokens than the model's mask."""
    counted, valid = int(num_tokens), int((given != 0).sum())
    if counted > valid:
        raise ValueError(
            f"loss_func: it counts {counted} tokens, but the loss_mask passed to the model has {valid}, and loss_func "
            "has no mask argument; return functools.partial(loss_func, loss_mask, ...), as Megatron's scripts do"
        )


def model_with_loss(chunk: torch.nn.Module) -> Any | None:
    """The module that computes the loss, below DDP, Float16Module or LLaVA; None if this stage has none.

    Raises:
        ValueError: for a module without a language model.
    """
    module: Any = chunk
    while not hasattr(module, LOSS):
        if hasattr(module, "language_model"):
            module = module.language_model
            if module is None:
                return None
        elif hasattr(module, "module"):
            module = module.module
        else:
            raise ValueError(
                f"install: expected a Megatron language model (GPTModel, HybridModel, LLaVAModel, ...) with "
                f"{LOSS}, got {type(chunk).__name__}"
            )
    return module if getattr(module, "post_process", False) else None


def upstream_faults(settings: Any) -> Iterator[str]:
    """Log lines for known faults of Megatron that change other numbers of this run. See docs/support.md."""
    per_token = getattr(settings, "calculate_per_token_loss", False)
    tp, pp = (getattr(settings, f"{axis}_model_parallel_size", 1) for axis in ("tensor", "pipeline"))
    several = int(os.environ.get("WORLD_SIZE", "1")) > tp * pp  # several data- or context-parallel ranks
    if has_mtp(settings) and per_token and several:
        yield (
            "multi-token prediction: Megatron divides the loss of its heads by each rank's own token count, so their "
            "gradient depends on the layout, and logs `mtp_1 loss` as a mean over ranks "
            "(github.com/NVIDIA/Megatron-LM/issues/7452, number 3); the main loss is not affected"
        )
    experts = getattr(settings, "num_experts", None) or getattr(settings, "num_moe_experts", None)
    balancing = getattr(settings, "moe_router_load_balancing_type", "none")
    if experts and tp > 1 and per_token and balancing not in ("none", ["none"]):
        yield (
            "mixture of experts: with a padding mask Megatron scales the router's auxiliary loss by the tokens of all "
            "tensor-parallel ranks (github.com/NVIDIA/Megatron-LM/issues/7452, number 10); the main loss is not "
            "affected"
        )


def tp_group(model: Any) -> ProcessGroup:
    """Tensor-parallel group of a model: its `tp_group`, or that of its `pg_collection`."""
    return model.tp_group if hasattr(model, "tp_group") else model.pg_collection.tp


def batch_group(model: Any) -> ProcessGroup:
    """Data- and context-parallel ranks of a model: of its `pg_collection`, or those of Megatron's parallel state."""
    from megatron.core import parallel_state

    group = getattr(getattr(model, "pg_collection", None), "dp_cp", None)
    return parallel_state.get_data_parallel_group(with_context_parallel=True) if group is None else group


def has_mtp(settings: Any) -> bool:
    """Whether the model has multi-token-prediction heads."""
    return bool(getattr(settings, "mtp_num_layers", None))


def masks_mtp_labels(model: Any) -> bool:
    """Whether the model itself excludes ignored labels from multi-token prediction.

    mcore-bridge's GPTModel does, and does not accept a mask of floating-point numbers.
    """
    return any(cls.__module__ == MCORE_BRIDGE for cls in type(model).__mro__)


def _obstacle(model: Any) -> str | None:
    """Why the loss of this model cannot be computed from its hidden states; None: it can."""
    name, parameters = type(model).__name__, inspect.signature(model.forward).parameters
    if "labels" not in parameters or not hasattr(model, "output_layer"):
        return f"{name}, which is not a decoder with labels and an output layer"
    if OUTPUT_PROCESSOR not in parameters and has_mtp(model.config):
        return f"{name} with multi-token prediction, whose heads share the output layer"
    owner = next((cls for cls in type(model).__mro__ if LOGITS in vars(cls)), None)
    if owner is not None and owner.__module__ != MCORE_BRIDGE:
        return f"{name}, which changes the logits of its output layer"
    if getattr(model.config, "overlap_moe_expert_parallel_comm", False):
        return "--overlap-moe-expert-parallel-comm, which bypasses the forward pass of the model"
    if getattr(model.config, "defer_embedding_wgrad_compute", False):
        return "--defer-embedding-wgrad-compute, which computes the weight's gradient later, from all tokens"

    from megatron.core.tensor_parallel import ColumnParallelLinear

    layer = model.output_layer
    if type(layer).forward not in _plain_forwards(ColumnParallelLinear) or "forward" in vars(layer):
        return f"an output layer that is {type(layer).__name__} (fp8, fp4, an adapter), not ColumnParallelLinear"
    if layer.sequence_parallel and layer._forward_hooks:
        return "forward hooks on the output layer under sequence parallelism, which require the logits of all tokens"
    if getattr(layer, "gtp_remat_size", 1) > 1:
        return "an output layer whose weight is split further (generalized tensor parallelism)"
    return None


def _plain_forwards(column_parallel_linear: Any) -> tuple[Any, ...]:
    """The forward methods without extensions: ColumnParallelLinear's, and its subclass's on Megatron's dev branch."""
    try:
        from megatron.core.transformer.linear_cross_entropy import LinearCrossEntropyModule
    except ImportError:
        return (column_parallel_linear.forward,)
    return column_parallel_linear.forward, LinearCrossEntropyModule.forward


def _output_weight(model: Any) -> Tensor:
    """The weight of the output layer, its own or that of tied embeddings."""
    weight = model.output_layer.weight
    return model.shared_embedding_or_output_weight() if weight is None else weight


def _obstacle_to_chunks(model: Any) -> str | None:
    """Why the output layer of this model cannot be computed in chunks of the vocabulary; None: it can."""
    layer = model.output_layer
    weight = _output_weight(model)
    if layer._forward_hooks:
        return "forward hooks on the output layer (adapters, quantization, logging), which require logits"
    if type(weight.data) is not Tensor or not weight.is_floating_point() or weight.element_size() < 2:
        return f"an output layer in {weight.dtype} ({type(weight.data).__name__}), not bf16, fp16 or fp32"
    if layer.bias is not None:
        return "an output layer with a bias"
    return None
