"""Train a GPT on noisy counting with very uneven loss masks, through the pretrain() of any supported Megatron.

A typical user script without any code for objectives. It runs on megatron-core 0.17 (pretrain() parses the arguments),
0.18 (pretrain() takes a configuration and a model_provider) and 0.19 (the configuration selects the model: GPTModel or,
with --hybrid-layer-pattern, HybridModel).
"""

from __future__ import annotations

import inspect
import os
import signal
from functools import partial

import torch
from megatron.core import mpu
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel, gpt_layer_specs
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import argument_utils, arguments, get_args, pretrain
from megatron.training.arguments import core_transformer_config_from_args
from noisy_counting import NoisyCounting


def datasets(sample_counts: list[int], vp_stage: int | None = None) -> tuple:
    """Training, validation and test sets. With interleaved pipelines, Megatron calls it once per model chunk."""
    vocab_size, length = get_args().vocab_size, get_args().seq_length
    return tuple(NoisyCounting(split, count or 0, vocab_size, length) for split, count in enumerate(sample_counts))


datasets.is_distributed = True  # every rank builds its own data sets


def on_this_cp_rank(batch: torch.Tensor) -> torch.Tensor:
    """[b, s] -> [b, s/cp]: rank r holds chunks r and 2cp-1-r of 2cp, which balances causal attention."""
    ranks, rank = mpu.get_context_parallel_world_size(), mpu.get_context_parallel_rank()
    if ranks == 1:
        return batch
    chunks = batch.chunk(2 * ranks, dim=1)
    return torch.cat((chunks[rank], chunks[-1 - rank]), dim=1)


def loss_func(loss_mask: torch.Tensor, output: torch.Tensor, model=None) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Sum of the losses, number of tokens, and the report as [sum, count]."""
    loss = torch.sum(output.view(-1).float() * loss_mask.view(-1))
    num_tokens = loss_mask.sum()
    return loss, num_tokens.to(torch.int), {"lm loss": torch.stack([loss.detach(), num_tokens])}


def forward_step(data_iterator, model) -> tuple[torch.Tensor, partial]:
    """Per-token loss [b, s] of one micro-batch. Inputs that a pipeline stage does not need are None."""
    first, last, mtp = (get_attr_wrapped_model(model, f"{name}_process") for name in ("pre", "post", "mtp"))
    batch = {name: on_this_cp_rank(value.cuda()) for name, value in next(data_iterator).items()}
    needs_tokens, needs_labels = first or mtp, last or mtp
    output = model(
        batch["tokens"] if needs_tokens else None,
        batch["position_ids"] if needs_tokens else None,
        None,  # causal
        labels=batch["labels"] if needs_labels else None,
        loss_mask=batch["loss_mask"] if needs_labels else None,
    )
    if model.training and os.environ.get("KILL_IN_ITERATION") == str(get_args().curr_iteration + 1):
        os.killpg(os.getpid(), signal.SIGKILL)  # a crash between forward and backward, with the async writer
    return output, partial(loss_func, batch["loss_mask"])


def model_provider(pre_process=True, post_process=True, vp_stage=None, config=None, pg_collection=None) -> GPTModel:
    """One model chunk of Megatron's local layers. Hosts with gpt_config_from_args do not call it."""
    args = get_args()
    config = config or core_transformer_config_from_args(args)
    layers = gpt_layer_specs.get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization=args.normalization, vp_stage=vp_stage
    )
    mtp = None
    if args.mtp_num_layers:
        layer = gpt_layer_specs.get_gpt_decoder_layer_specs(
            config, use_transformer_engine=False, normalization=args.normalization
        )[-1]
        mtp = gpt_layer_specs.get_gpt_mtp_block_spec(config, layer, use_transformer_engine=False, vp_stage=vp_stage)
    return GPTModel(
        config,
        layers,
        args.padded_vocab_size,
        args.max_position_embeddings,
        pre_process,
        post_process,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        mtp_block_spec=mtp,
        pg_collection=pg_collection,
        vp_stage=vp_stage,
    )


def main() -> None:
    kind = ModelType.encoder_or_decoder
    if "cfg_container" not in inspect.signature(pretrain).parameters:
        pretrain(datasets, model_provider, kind, forward_step)
        return
    args = arguments.parse_and_validate_args()
    if hasattr(argument_utils, "gpt_config_from_args"):
        hybrid = getattr(args, "hybrid_layer_pattern", None)
        model = (argument_utils.hybrid_config_from_args if hybrid else argument_utils.gpt_config_from_args)(args)
        pretrain(argument_utils.pretrain_cfg_container_from_args(args, model), datasets, kind, forward_step)
    else:
        config = argument_utils.pretrain_cfg_container_from_args(args)
        pretrain(config, datasets, model_provider, kind, forward_step)


if __name__ == "__main__":
    main()
