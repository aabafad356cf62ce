"""A user's recipe for Megatron-Bridge: a tiny GPT trained on the noisy counting data of `training_script`.

The model has the shape of `test_layouts.MODEL`, and loads a checkpoint of Megatron-LM. Two scripts in one:

    bridge_recipe.py [OBJECTIVE] KEY=VALUE ...    train as a user's own script does, with a callback
    bridge_recipe.py export FROM TO               export a checkpoint to the Hugging Face format
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

# Settings that run on a CPU and give the same numbers in every layout.
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
    vocab_size: int = 30

    def build_datasets(self, context: DatasetBuildContext) -> tuple:
        counts = context.train_samples, context.valid_samples, context.test_samples
        return tuple(
            NoisyCounting(split, count, self.vocab_size, self.seq_length, ignore_masked=False)
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
    """`tiny` with one multi-token-prediction layer of Megatron's local spec; Bridge uses Transformer Engine's."""
    gpt_layer_specs.TESpecProvider = LocalSpecProvider
    cfg = tiny()
    cfg.model.mtp_num_layers = 1
    return cfg


def tiny_lora() -> ConfigContainer:
    """LoRA adapters on frozen weights."""
    cfg = tiny()
    cfg.peft = LoRA(target_modules=["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"], dim=4, alpha=8)
    return cfg


def tiny_llama() -> ConfigContainer:
    """The Hugging Face Llama in the folder $TINY_LLAMA."""
    cfg = tiny()
    provider = AutoBridge.from_hf_pretrained(os.environ["TINY_LLAMA"]).to_megatron_provider(load_weights=False)
    for name, value in LOCAL.items():
        setattr(provider, name, value)
    cfg.model = provider
    cfg.checkpoint.pretrained_checkpoint = os.environ["TINY_LLAMA"]
    return cfg


class PrintMetrics(Callback):
    """Prints the names of the metrics that Bridge passes to callbacks at each step and each evaluation."""

    def on_train_step_end(self, context: CallbackContext) -> None:
        print("step:", *sorted(context.loss_dict), sep="|")

    def on_eval_end(self, context: CallbackContext) -> None:
        print("evaluation:", *sorted(context.total_loss_dict), sep="|")


def main(argv: list[str]) -> None:
    if argv[0] == "export":
        AutoBridge.from_hf_pretrained(os.environ["TINY_LLAMA"]).export_ckpt(argv[1], argv[2], show_progress=False)
        return
    objectives = [argument for argument in argv if "=" not in argument]
    cfg = process_config_with_overrides(tiny(), cli_overrides=[argument for argument in argv if "=" in argument])
    if objectives:
        from megatron_dft import DFTConfig
        from megatron_dft.hosts import bridge

        bridge.finetune(cfg, DFTConfig(loss_type=objectives[0]), callbacks=[PrintMetrics()])
    else:
        finetune(cfg, forward_step)


if __name__ == "__main__":
    main(sys.argv[1:])
