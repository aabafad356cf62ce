"""What a host can and cannot do, decided by what it offers, not by its version.

Each function either lets a run pass or raises ValueError saying what was expected, what was found and what to do.
The checks on settings take Megatron's argparse namespace or its TransformerConfig: both use the same names.
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

LOSS = "compute_language_model_loss"  # what `install` binds on a model
KNOWN_HOSTS = "use Megatron-LM or megatron-core 0.17 to 0.19, or a megatron_dft that knows yours"
# Settings of Megatron-LM that put another loss in the place of the language-modelling loss.
OTHER_LOSSES = {
    "logits_load_dir": "--logits-load-dir (distillation from cached logits)",
    "logits_save_dir": "--logits-save-dir (saving a teacher's logits)",
    "export_kd_teacher_load": "--export-kd-teacher-load (ModelOpt distillation)",
    "perform_rl_step": "--perform-rl-step (reinforcement learning)",
}
OUTPUT_PROCESSOR = "output_processor"  # argument of GPTModel.forward, from 0.18 on: hidden states instead of logits


def check_pretrain(signature: inspect.Signature) -> None:
    """Refuse a `pretrain()` of a generation that is older or newer than those we know."""
    offered = signature.parameters.keys()
    if "forward_step_func" not in offered or not {"cfg_container", "extra_args_provider"} & offered:
        raise ValueError(
            "pretrain(): expected one that takes a forward_step_func, and a cfg_container or an extra_args_provider, "
            f"got pretrain{signature}; {KNOWN_HOSTS}"
        )


def check_settings(settings: Any, config: DFTConfig) -> None:
    """Raise ValueError for settings that are incompatible with a custom loss; before a model is built."""
    refuse_label_smoothing(getattr(settings, "label_smoothing", 0.0) or 0.0)
    for name, description in OTHER_LOSSES.items():
        if getattr(settings, name, None):
            raise ValueError(
                f"--loss-type {config.loss_type}: expected a run on Megatron's language-modelling loss, got "
                f"{description}, which replaces it; drop one of the two"
            )
    fusion = getattr(settings, "cross_entropy_fusion_impl", None) or "native"
    if getattr(settings, "cross_entropy_loss_fusion", False) and fusion != "native":
        raise ValueError(
            f"--loss-type {config.loss_type}: expected Megatron's own cross entropy underneath, got "
            f"--cross-entropy-fusion-impl {fusion}, which computes another; omit --cross-entropy-loss-fusion, our loss "
            "is fused already"
        )
    backend(config)
    cp = getattr(settings, "context_parallel_size", 1)
    if cp > 1 and not getattr(settings, "calculate_per_token_loss", False):
        raise ValueError(
            f"--loss-type {config.loss_type}: expected --calculate-per-token-loss with --context-parallel-size {cp}, "
            "got Megatron's default, which divides by each rank's own token count and gives a wrong gradient when "
            "the loss mask is uneven; add --calculate-per-token-loss"
        )
    if getattr(settings, "overlap_moe_expert_parallel_comm", False):
        if config.channels:
            raise ValueError(
                "--loss-channels: expected forward passes through the model, which take the channels off the labels, "
                "got --overlap-moe-expert-parallel-comm, whose schedule plan goes around them; leave one of the two out"
            )
        if has_mtp(settings) and config.mtp == "nll":
            raise ValueError(
                "--loss-mtp nll: expected forward passes through the model, got --overlap-moe-expert-parallel-comm, "
                "under which the heads cannot be told apart; use --loss-mtp same"
            )
    if config.linear_fused and any(getattr(settings, name, False) for name in ("use_megatron_fsdp", "use_torch_fsdp2")):
        raise ValueError(
            "--loss-linear-fused: expected the weight of the output layer on each rank, got fully sharded parameters; "
            "leave one of the two out"
        )


def backend(config: DFTConfig) -> str:
    """What computes the loss of bf16 logits here; refused where it cannot run."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return config.options().kernels(device, torch.bfloat16).NAME


def check_model(model: Any, config: DFTConfig) -> None:
    """Refuse a model whose loss we cannot replace without changing its meaning."""
    check_settings(model.config, config)
    if LOSS in vars(model):
        raise ValueError(
            f"install: expected the loss of {type(model).__name__} as Megatron defines it, got one that is already "
            "replaced on this instance; install once, and not beside a distillation or logit-saving hook"
        )
    if tp_group(model).size() > 1 and not getattr(model, "parallel_output", True):
        raise ValueError(
            f"install: expected logits split over {tp_group(model).size()} tensor-parallel ranks, got a model built "
            "with parallel_output=False, which gathers them; build it with parallel_output=True"
        )
    compacts(model, config)
    if config.linear_fused:
        obstacle = _obstacle(model) or _obstacle_to_chunks(model)
        if obstacle:
            raise ValueError(
                "--loss-linear-fused: expected a model whose output layer can be computed together with the loss, got "
                f"{obstacle}; leave the flag out"
            )


def compacts(model: Any, config: DFTConfig) -> bool:
    """Whether masked tokens skip the output layer of this model; refused where that is requested and not possible."""
    obstacle = compaction_obstacle(model)
    if config.compact_masked_tokens and obstacle:
        raise ValueError(
            "--loss-compact-masked-tokens: expected a model whose masked tokens can be dropped before its output "
            f"layer, got {obstacle}; leave the flag out"
        )
    return config.compact_masked_tokens is not False and obstacle is None


def compaction_obstacle(model: Any) -> str | None:
    """Why masked tokens of this model have to pass its output layer; None: they do not."""
    scopes = getattr(model.config, "cuda_graph_scope", None) or ()
    names = {getattr(x, "name", x) for x in ([scopes] if isinstance(scopes, str) else scopes)}
    if "full_iteration" in names | {getattr(model.config, "cuda_graph_impl", None)}:
        return "a CUDA graph of the whole iteration, whose sizes cannot depend on data"
    return _obstacle(model)


def describe_output_layer(model: Any, config: DFTConfig) -> str:
    """For the log: whether masked tokens skip the output layer of this model, and why."""
    chunk = config.split().vocab_chunk
    way = f"; it is computed with the loss, {chunk} columns at a time" if config.linear_fused else ""
    if compacts(model, config):
        return f"masked tokens skip the output layer{way}"
    requested = config.compact_masked_tokens is False
    reason = "as requested" if requested else f"because of {compaction_obstacle(model)}"
    return f"masked tokens pass through the output layer, {reason}{way}"


def check_forward(model: Any, given: Mapping[str, Any]) -> None:
    """Refuse forward arguments that conflict with a loss computed from hidden states."""
    if given.get(OUTPUT_PROCESSOR) is not None:
        raise ValueError(
            f"{OUTPUT_PROCESSOR}: expected none beside a loss that starts at the hidden states, got one; pass "
            "--no-loss-compact-masked-tokens, and no --loss-linear-fused"
        )
    if given.get("runtime_gather_output") and tp_group(model).size() > 1:
        raise ValueError(
            "runtime_gather_output: expected logits that stay split over the tensor-parallel ranks, got True beside "
            "labels; leave it out"
        )


def check_width(model: Any, logits: Tensor) -> None:
    """Refuse logits that are not this rank's equal share of the vocabulary."""
    ranks = tp_group(model).size()
    if logits.shape[-1] * ranks != model.vocab_size:
        raise ValueError(
            f"logits: expected an equal share of the vocabulary, {model.vocab_size} / {ranks} columns on "
            f"each tensor-parallel rank, got {logits.shape[-1]}; pad the vocabulary (--make-vocab-size-divisible-by) "
            "and do not gather the output"
        )


def refuse_label_smoothing(label_smoothing: float) -> None:
    """Refuse a target that is spread over several tokens."""
    if label_smoothing != 0.0:
        raise ValueError(
            f"label smoothing: expected 0, got {label_smoothing}; a smoothed target has no single probability to "
            "gate with"
        )


def loss_mask_of(loss_func: Callable[..., Any], given: Tensor | None, tokens: int) -> Tensor:
    """The loss mask that a loss_func applies, or else the one that the model was given.

    A partial of a function with a parameter `loss_mask` has it there, in whatever place. Of other partials it is the
    only tensor among the arguments that can be a mask of so many tokens.

    Raises:
        ValueError: where no tensor, or more than one, can be the mask.
    """
    arguments = (*getattr(loss_func, "args", ()), *getattr(loss_func, "keywords", {}).values())
    try:
        bound = inspect.signature(loss_func.func).bind_partial(*loss_func.args, **loss_func.keywords).arguments  # type: ignore[attr-defined]
    except (AttributeError, TypeError, ValueError):  # not a partial, or of something without a signature
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
            "forward_step: expected it to return functools.partial(loss_func, loss_mask, ...) beside the output, as "
            f"Megatron's scripts do, got {loss_func!r} with {len(masks)} tensors that could be the mask; name the "
            "parameter loss_mask, or pass loss_mask= to the model"
        )
    return given


def check_loss_values(count: int, settings: Any) -> None:
    """Refuse a loss_func without a number of tokens where the gradient is divided by it.

    Megatron's legacy form returns a mean and the report; then the gradient is a mean over micro-batches.
    """
    if count == 1 and getattr(settings, "calculate_per_token_loss", False):
        raise ValueError(
            "loss_func: expected (loss, num_tokens, report) under --calculate-per-token-loss, which divides by "
            "num_tokens, got two values; return the sum of the losses and the number of tokens"
        )


def check_num_tokens(num_tokens: Any, given: Tensor) -> None:
    """Refuse a loss_func whose mask is not among its arguments, and which counts more tokens than the model's mask."""
    counted, valid = int(num_tokens), int((given != 0).sum())
    if counted > valid:
        raise ValueError(
            f"loss_func: it counts {counted} tokens, and the loss_mask given to the model has {valid}; its own mask is "
            "not known: return functools.partial(loss_func, loss_mask, ...), as Megatron's scripts do"
        )


def model_with_loss(chunk: torch.nn.Module) -> Any | None:
    """The module that computes the loss, below DDP, Float16Module or LLaVA; None where this stage has none.

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
    """Known faults of Megatron that change numbers of this run beside our loss, a line each, with the issue.

    See the table "Faults of Megatron itself" in the README.
    """
    per_token = getattr(settings, "calculate_per_token_loss", False)
    tp, pp = (getattr(settings, f"{axis}_model_parallel_size", 1) for axis in ("tensor", "pipeline"))
    several = int(os.environ.get("WORLD_SIZE", "1")) > tp * pp  # ranks with tokens of their own
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
            "tensor-parallel ranks (github.com/NVIDIA/Megatron-LM/issues/7452, number 10); our loss is not affected"
        )


def tp_group(model: Any) -> ProcessGroup:
    """The tensor-parallel ranks of a model; before 0.16 it has them among its other groups."""
    return model.tp_group if hasattr(model, "tp_group") else model.pg_collection.tp


def has_mtp(settings: Any) -> bool:
    """Whether there are multi-token-prediction heads."""
    return bool(getattr(settings, "mtp_num_layers", None))


def _obstacle(model: Any) -> str | None:
    """Why the loss of this model cannot start at its hidden states."""
    name, parameters = type(model).__name__, inspect.signature(model.forward).parameters
    if "labels" not in parameters or not hasattr(model, "output_layer"):
        return f"{name}, which is not a decoder with labels and an output layer"
    if OUTPUT_PROCESSOR not in parameters and has_mtp(model.config):
        return f"{name} with multi-token prediction, whose heads share the output layer"
    if getattr(model.config, "overlap_moe_expert_parallel_comm", False):
        return "--overlap-moe-expert-parallel-comm, which goes around the forward pass of the model"
    if getattr(model.config, "defer_embedding_wgrad_compute", False):
        return "--defer-embedding-wgrad-compute, which computes the weight's gradient later, from all tokens"

    from megatron.core.tensor_parallel import ColumnParallelLinear

    layer = model.output_layer
    if type(layer).forward not in _plain_forwards(ColumnParallelLinear) or "forward" in vars(layer):
        return f"an output layer that is {type(layer).__name__} (fp8, fp4, an adapter), not ColumnParallelLinear"
    if layer.sequence_parallel and layer._forward_hooks:
        return "forward hooks on the output layer under sequence parallelism, which wait for logits of the whole layer"
    if getattr(layer, "gtp_remat_size", 1) > 1:
        return "an output layer whose weight is split further (generalized tensor parallelism)"
    return None


def _plain_forwards(column_parallel_linear: Any) -> tuple[Any, ...]:
    """Of ColumnParallelLinear, and of the subclass on Megatron's dev branch, which calls it for logits."""
    try:
        from megatron.core.transformer.linear_cross_entropy import LinearCrossEntropyModule
    except ImportError:
        return (column_parallel_linear.forward,)
    return column_parallel_linear.forward, LinearCrossEntropyModule.forward


def _obstacle_to_chunks(model: Any) -> str | None:
    """Why the output layer of this model cannot be computed in chunks of the vocabulary."""
    layer = model.output_layer
    weight = model.shared_embedding_or_output_weight() if layer.weight is None else layer.weight
    if layer._forward_hooks:
        return "forward hooks on the output layer (adapters, quantization, logging), which wait for logits"
    if type(weight.data) is not Tensor or not weight.is_floating_point() or weight.element_size() < 2:
        return f"an output layer in {weight.dtype} ({type(weight.data).__name__}), not bf16, fp16 or fp32"
    if layer.bias is not None:
        return "an output layer with a bias"
    return None
