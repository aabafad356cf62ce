"""A recipe for Megatron-Bridge as users write them: a tiny GPT, and the noisy counting of `training_script`.

The model has the shape of `test_layouts.MODEL`, so that a checkpoint of Megatron-LM loads into it. As a script, it is
one of the user's own, with a callback: `bridge_recipe.py [OBJECTIVE] KEY=VALUE ...`, or exports a checkpoint to the
format of Hugging Face: `bridge_recipe.py export FROM TO`.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

import torch
from megatron.bridge.data.base import DatasetBuildContext, DatasetProvider
from megatron.bridge.models.conversion.auto_bridge import AutoBridge
from megatron.bridge.models.gpt_provider import GPTModelProvider, local_layer_spec
from megatron.bridge.peft.lora import LoRA
from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.bridge.training.config import (
    CheckpointConfig,
    ConfigContainer,
    DistributedInitConfig,
    LoggerConfig,
    OptimizerConfig,
    RerunStateMachineConfig,
    RNGConfig,
    SchedulerConfig,
    TokenizerConfig,
    TrainingConfig,
    ValidationConfig,
)
from megatron.bridge.training.finetune import finetune
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.utils.omegaconf_utils import process_config_with_overrides
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt import gpt_layer_specs
from noisy_counting import NoisyCounting

# What a CPU can run, and the same numbers in every layout.
LOCAL = {
    "transformer_layer_spec": local_layer_spec,
    "transformer_impl": "local",
    "seq_length": 32,
    "pipeline_dtype": torch.float32,
    "calculate_per_token_loss": True,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "use_cpu_initialization": True,
    "apply_rope_fusion": False,
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "bias_dropout_fusion": False,
    "bias_activation_fusion": False,
    "persist_layer_norm": False,
    "cross_entropy_loss_fusion": False,  # it rounds gradients to bf16 even in fp32
}


@dataclass
class Counting(DatasetProvider):
    """Labels of masked tokens are real tokens, as in Bridge's own data sets."""

    seq_length: int = 32
    words: int = 30

    def build_datasets(self, context: DatasetBuildContext) -> tuple:
        counts = context.train_samples, context.valid_samples, context.test_samples
        return tuple(
            NoisyCounting(split, count, self.words, self.seq_length, ignore_masked=False)
            for split, count in enumerate(counts)
        )


def tiny() -> ConfigContainer:
    """Full fine-tuning in fp32."""
    return ConfigContainer(
        model=GPTModelProvider(
            num_layers=4,
            hidden_size=32,
            ffn_hidden_size=128,
            num_attention_heads=4,
            vocab_size=32,
            normalization="RMSNorm",
            position_embedding_type="rope",
            add_bias_linear=False,
            share_embeddings_and_output_weights=False,
            **LOCAL,
        ),
        train=TrainingConfig(train_iters=3, global_batch_size=8, micro_batch_size=2),
        validation=ValidationConfig(eval_iters=2, eval_interval=100),
        optimizer=OptimizerConfig(
            optimizer="adam", lr=1e-3, min_lr=0.0, use_distributed_optimizer=False, clip_grad=1.0
        ),
        scheduler=SchedulerConfig(
            lr_decay_style="constant", lr_warmup_iters=0, start_weight_decay=0.01, end_weight_decay=0.01
        ),
        ddp=DistributedDataParallelConfig(use_distributed_optimizer=False),
        dataset=Counting(dataloader_type="single", num_workers=0, pin_memory=False, persistent_workers=False),
        logger=LoggerConfig(log_interval=1, tensorboard_log_interval=1),
        tokenizer=TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=30),
        checkpoint=CheckpointConfig(ckpt_format="torch_dist"),
        rng=RNGConfig(seed=1234),
        dist=DistributedInitConfig(distributed_backend="gloo"),
        rerun_state_machine=RerunStateMachineConfig(check_for_nan_in_loss=False),
    )


def tiny_mtp() -> ConfigContainer:
    """With a head for the next token but one, of Megatron's local layers, where Bridge takes Transformer Engine's."""
    gpt_layer_specs.TESpecProvider = LocalSpecProvider
    cfg = tiny()
    cfg.model.mtp_num_layers = 1
    return cfg


def tiny_lora() -> ConfigContainer:
    """Adapters alone."""
    cfg = tiny()
    cfg.peft = LoRA(target_modules=["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"], dim=4, alpha=8)
    return cfg


def tiny_llama() -> ConfigContainer:
    """A Llama that Hugging Face knows, from the folder in $TINY_LLAMA."""
    cfg = tiny()
    provider = AutoBridge.from_hf_pretrained(os.environ["TINY_LLAMA"]).to_megatron_provider(load_weights=False)
    for name, value in LOCAL.items():
        setattr(provider, name, value)
    cfg.model = provider
    cfg.checkpoint.pretrained_checkpoint = os.environ["TINY_LLAMA"]
    return cfg


class Shown(Callback):
    """Prints what Bridge tells callbacks of each step and each evaluation."""

    def on_train_step_end(self, context: CallbackContext) -> None:
        print("step:", *sorted(context.loss_dict), sep="|")

    def on_eval_end(self, context: CallbackContext) -> None:
        print("evaluation:", *sorted(context.total_loss_dict), sep="|")


def main(words: list[str]) -> None:
    if words[0] == "export":
        AutoBridge.from_hf_pretrained(os.environ["TINY_LLAMA"]).export_ckpt(words[1], words[2], show_progress=False)
        return
    objectives = [word for word in words if "=" not in word]
    cfg = process_config_with_overrides(tiny(), cli_overrides=[word for word in words if "=" in word])
    if objectives:
        from megatron_dft import DFTConfig
        from megatron_dft.hosts import bridge

        bridge.finetune(cfg, DFTConfig(loss_type=objectives[0]), callbacks=[Shown()])
    else:
        finetune(cfg, forward_step)


if __name__ == "__main__":
    main(sys.argv[1:])
