"""Train a GPT with Megatron's own pretrain(). Requires only the megatron-core wheel (>= 0.19).

The script has no code for objectives. The launcher adds one:

    torchrun --nproc-per-node 2 -m megatron_dft.launch examples/pretrain_gpt.py <Megatron's arguments> --loss-type dft

It is a compact version of pretrain_gpt.py in a Megatron-LM checkout, which is started in the same way. Data: --sft
(chat JSONL, packed, prompts masked), --mock-data, or Megatron's indexed data sets. Tensor, sequence, pipeline, context,
expert and data parallelism are Megatron's.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import megatron.core.datasets.utils
import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank
from megatron.core.utils import (
    flatten_batch_for_packed_sequences,
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training import get_args, pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import core_transformer_config_from_args, parse_and_validate_args
from megatron.training.datasets.sft_dataset import SFTDataset
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

FIELDS = (
    "tokens",
    "labels",
    "loss_mask",
    "position_ids",
    "attention_mask",
    "cu_seqlens",
    "cu_seqlens_padded",
    "max_seqlen",
)


def datasets(sample_counts: list[int], vp_stage: int | None = None) -> tuple:
    """Build the training, validation and test sets of the requested sizes."""
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        path_to_cache=args.data_cache_path,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        full_validation=args.full_validation,
        context_parallel_size=args.context_parallel_size,
        data_parallel_size=args.data_parallel_size,
        sequence_parallel_size=args.tensor_model_parallel_size * args.sequence_parallel,
    )
    kind = SFTDataset if args.sft else MockGPTDataset if args.mock_data else GPTDataset
    on_this_rank = partial(_reads_data, vp_stage=vp_stage)
    return BlendedMegatronDatasetBuilder(kind, sample_counts, on_this_rank, config).build()


datasets.is_distributed = True  # Megatron calls it on every rank; `_reads_data` selects the ranks that build


def forward_step(data_iterator: Iterator | None, model: Any) -> tuple[torch.Tensor, partial]:
    """Per-token loss [b, s] of one micro-batch, and the function that reduces it with the loss mask."""
    batch = _get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    output = model(
        batch["tokens"],
        batch["position_ids"],
        batch["attention_mask"],
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
        packed_seq_params=_packing(batch),
    )
    return output, partial(loss_func, batch["loss_mask"])


def loss_func(loss_mask: torch.Tensor, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Sum of the losses, number of tokens, and the report [sum, count]."""
    loss_mask = loss_mask.view(-1).float()
    loss = torch.sum(output.view(-1).float() * loss_mask)
    num_tokens = loss_mask.sum().to(torch.int)
    if get_args().check_for_nan_in_loss_and_grad:
        get_rerun_state_machine().validate_result(
            result=loss, rejection_func=torch.isnan, message="NaN in the loss", tolerance=0.0, fatal=True
        )
    return loss, num_tokens, {"lm loss": torch.stack([loss.detach(), num_tokens.float()])}


def _get_batch(data_iterator: Iterator | None, vp_stage: int | None) -> dict[str, torch.Tensor | None]:
    """This rank's part of a micro-batch: read on tensor-parallel rank 0, broadcast, split for context parallelism."""
    args = get_args()
    if not _needs_batch(vp_stage):
        return dict.fromkeys(FIELDS)
    tp_rank = mpu.get_tensor_model_parallel_rank()
    batch: dict[str, Any] = {}
    if tp_rank == 0:
        sample = next(data_iterator)
        batch = {name: sample[name].cuda(non_blocking=True) if name in sample else None for name in FIELDS}
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=args.sft,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=_has_mtp(vp_stage),
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )
    batch = flatten_batch_for_packed_sequences(batch)
    if is_first_or_last_pipeline_stage(vp_stage) or _has_mtp(vp_stage):
        batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group())
    return {name: batch.get(name) for name in FIELDS}


def _packing(batch: dict[str, torch.Tensor | None]) -> PackedSeqParams | None:
    """Boundaries of the packed documents, for attention."""
    if batch["cu_seqlens"] is None:
        return None
    unpadded = batch["cu_seqlens"].squeeze(0)
    padded = None if batch["cu_seqlens_padded"] is None else batch["cu_seqlens_padded"].squeeze(0)
    longest = int(batch["max_seqlen"].item())
    edges = unpadded if padded is None else padded
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=edges,
        cu_seqlens_kv=edges,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def _needs_batch(vp_stage: int | None) -> bool:
    """Every pipeline stage needs the boundaries of packed sequences; otherwise only the first and last stage do."""
    return get_args().sft or is_first_or_last_pipeline_stage(vp_stage) or _has_mtp(vp_stage)


def _reads_data(vp_stage: int | None) -> bool:
    return mpu.get_tensor_model_parallel_rank() == 0 and _needs_batch(vp_stage)


def _has_mtp(vp_stage: int | None) -> bool:
    config = core_transformer_config_from_args(get_args())
    return mtp_on_this_rank(
        layout=config.pipeline_model_parallel_layout,
        mtp_num_layers=config.mtp_num_layers,
        ignore_virtual=False,
        vp_stage=vp_stage,
    )


def main() -> None:
    if not Path(megatron.core.datasets.utils.__file__).with_name("Makefile").exists():
        megatron.core.datasets.utils.compile_helpers = lambda: None  # compiled in the wheel; Megatron would call make
    args = parse_and_validate_args()
    config = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
    pretrain(config, datasets, ModelType.encoder_or_decoder, forward_step)


if __name__ == "__main__":
    main()
