"""What a host can and cannot do, decided by what it offers, not by its version.

Each function either lets a run pass or raises ValueError saying what was expected, what was found and what to do.
The checks on settings take Megatron's argparse namespace or its TransformerConfig: both use the same names.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_dft.config import DFTConfig

KNOWN_HOSTS = "use Megatron-LM or megatron-core 0.17 to 0.19, or a megatron_dft that knows yours"
# Settings of Megatron-LM that put another loss in the place of the language-modelling loss.
OTHER_LOSSES = {
    "logits_load_dir": "--logits-load-dir (distillation from cached logits)",
    "logits_save_dir": "--logits-save-dir (saving a teacher's logits)",
    "export_kd_teacher_load": "--export-kd-teacher-load (ModelOpt distillation)",
    "perform_rl_step": "--perform-rl-step (reinforcement learning)",
}


def check_pretrain(signature: inspect.Signature) -> None:
    """Refuse a `pretrain()` of a generation that is older or newer than those we know."""
    offered = signature.parameters.keys()
    if "forward_step_func" not in offered or not {"cfg_container", "extra_args_provider"} & offered:
        raise ValueError(
            "pretrain(): expected one that takes a forward_step_func, and a cfg_container or an extra_args_provider, "
            f"got pretrain{signature}; {KNOWN_HOSTS}"
        )


def check_settings(settings: Any, config: DFTConfig) -> None:
    """Refuse, before a model is built, what the objective would silently fight with."""
    refuse_label_smoothing(getattr(settings, "label_smoothing", 0.0) or 0.0)
    for name, description in OTHER_LOSSES.items():
        if getattr(settings, name, None):
            raise ValueError(
                f"--loss-type {config.loss_type}: expected a run on Megatron's language-modelling loss, got "
                f"{description}, which replaces it; drop one of the two"
            )
    if getattr(settings, "cross_entropy_loss_fusion", False) and settings.cross_entropy_fusion_impl == "te":
        raise ValueError(
            f"--loss-type {config.loss_type}: expected Megatron's own cross entropy underneath, got Transformer "
            "Engine's (--cross-entropy-fusion-impl te); omit --cross-entropy-loss-fusion, our loss is fused already"
        )
    backend(config)
    cp = getattr(settings, "context_parallel_size", 1)
    if cp > 1 and not getattr(settings, "calculate_per_token_loss", False):
        raise ValueError(
            f"--loss-type {config.loss_type}: expected --calculate-per-token-loss with --context-parallel-size {cp}, "
            "got Megatron's default, which divides by each rank's own token count and gives a wrong gradient when "
            "the loss mask is uneven; add --calculate-per-token-loss"
        )
    if _mtp(settings) and config.mtp == "nll" and getattr(settings, "overlap_moe_expert_parallel_comm", False):
        raise ValueError(
            "--loss-mtp nll: expected forward passes through the model, got --overlap-moe-expert-parallel-comm, under "
            "which the heads cannot be told apart; use --loss-mtp same"
        )


def backend(config: DFTConfig) -> str:
    """What computes the loss of bf16 logits here; refused where it cannot run."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return config.options().kernels(device, torch.bfloat16).NAME


def check_model(model: Any, config: DFTConfig) -> None:
    """Refuse a model whose loss we cannot replace without changing its meaning."""
    check_settings(model.config, config)
    if "compute_language_model_loss" in vars(model):
        raise ValueError(
            f"install: expected the loss of {type(model).__name__} as Megatron defines it, got one that is already "
            "replaced on this instance; install once, and not beside a distillation or logit-saving hook"
        )
    if model.tp_group.size() > 1 and not getattr(model, "parallel_output", True):
        raise ValueError(
            f"install: expected logits split over {model.tp_group.size()} tensor-parallel ranks, got a model built "
            "with parallel_output=False, which gathers them; build it with parallel_output=True"
        )


def check_width(model: Any, logits: Tensor) -> None:
    """Refuse logits that are not this rank's equal share of the vocabulary."""
    ranks = model.tp_group.size()
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


def loss_mask_of(loss_func: Callable[..., Any]) -> Tensor:
    """The loss mask inside `partial(loss_func, loss_mask, ...)`, the form of every Megatron forward_step."""
    arguments = getattr(loss_func, "args", ())
    mask = getattr(loss_func, "keywords", {}).get("loss_mask", arguments[0] if arguments else None)
    if not isinstance(mask, Tensor):
        raise ValueError(
            "forward_step: expected it to return functools.partial(loss_func, loss_mask, ...) beside the output, as "
            f"Megatron's scripts do, got {loss_func!r}"
        )
    return mask


def _mtp(settings: Any) -> bool:
    return bool(getattr(settings, "mtp_num_layers", None))
