"""Train a tiny GPT on noisy counting with a recipe of NeMo 2, on CPU ranks. Logs are written to OUT.

Each rank runs `nemo_training.py OUT [loss_type=dft ...] [tp=2] [pp=2] [checkpoint=true]`. Settings of the objective are
passed to `with_dft`. Without any, the recipe stays unchanged.
"""

import os
import sys

os.environ |= {"OMP_NUM_THREADS": "1", "TORCH_CUDA_ARCH_LIST": "9.0", "NO_WANDB": "1", "HF_HUB_OFFLINE": "1"}

from megatron_dft.testing import cpu

cpu.enable()

import fiddle  # noqa: E402
import lightning.pytorch as pl  # noqa: E402
import nemo_run as run  # noqa: E402
import torch  # noqa: E402
from megatron.core.distributed import DistributedDataParallelConfig  # noqa: E402
from megatron.core.optimizer import OptimizerConfig  # noqa: E402
from nemo import lightning as nl  # noqa: E402
from nemo.collections import llm  # noqa: E402
from nemo.lightning import io  # noqa: E402
from nemo.lightning.pytorch.plugins import MegatronDataSampler  # noqa: E402
from noisy_counting import NoisyCounting  # noqa: E402

os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "0"  # Lightning counts GPUs with NVML; there are none


class TinyTokenizer(io.IOMixin):
    """The attributes that NeMo reads from a tokenizer."""

    def __init__(self, vocab_size: int = 32):
        self.vocab_size, self.eos_id, self.unique_identifiers = vocab_size, 0, {}


class WithCausalMask(NoisyCounting):
    """Samples with a causal mask, which NeMo requires without Transformer Engine."""

    def __getitem__(self, index):
        return super().__getitem__(index) | {"attention_mask": torch.ones(1, 32, 32, dtype=torch.bool).triu(1)}


class Counting(pl.LightningDataModule):
    def __init__(self):
        super().__init__()
        self.tokenizer = TinyTokenizer()
        self.seq_length, self.micro_batch_size, self.global_batch_size = 32, 2, 8
        self.data_sampler = MegatronDataSampler(seq_len=32, micro_batch_size=2, global_batch_size=8)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(WithCausalMask(0, 64, 30, 32, ignore_masked=False))

    def val_dataloader(self):
        return torch.utils.data.DataLoader(WithCausalMask(1, 64, 30, 32, ignore_masked=False))


def recipe(out, tp, pp, checkpoint):
    """A recipe in the form of those in nemo.collections.llm.recipes."""
    no_kernels = ["gradient_accumulation_fusion", "masked_softmax_fusion", "persist_layer_norm", "bias_dropout_fusion"]
    others = ["apply_rope_fusion", "cross_entropy_loss_fusion", "add_bias_linear"]
    shape = {"num_layers": 4, "hidden_size": 32, "ffn_hidden_size": 128, "num_attention_heads": 4, "seq_length": 32}
    model = run.Config(
        llm.GPTConfig,
        **shape,
        **dict.fromkeys((*no_kernels, *others), False),
        make_vocab_size_divisible_by=16,
        use_cpu_initialization=True,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        calculate_per_token_loss=True,
    )
    strategy = run.Config(
        nl.MegatronStrategy,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        pipeline_dtype=torch.float32,
        ddp=run.Config(DistributedDataParallelConfig),
        ckpt_async_save=False,
    )
    trainer = run.Config(
        nl.Trainer,
        accelerator="cpu",
        devices=int(os.environ["WORLD_SIZE"]),
        strategy=strategy,
        max_steps=4,
        limit_val_batches=8,  # micro-batches
        val_check_interval=2,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        logger=run.Config(pl.loggers.CSVLogger, out),
        enable_checkpointing=checkpoint,
        use_distributed_sampler=False,
    )
    kept = run.Config(nl.ModelCheckpoint, save_last=True, every_n_train_steps=4, monitor="val_loss")
    adam = run.Config(OptimizerConfig, optimizer="adam", lr=1e-3, clip_grad=1.0, params_dtype=torch.float32)
    return run.Partial(
        llm.pretrain,
        model=run.Config(llm.GPTModel, model, tokenizer=run.Config(TinyTokenizer)),
        data=run.Config(Counting),
        trainer=trainer,
        log=run.Config(nl.NeMoLogger, log_dir=out, use_datetime_version=False, ckpt=kept if checkpoint else None),
        optim=run.Config(nl.MegatronOptimizerModule, config=adam),
    )


def main(out, *arguments):
    settings = dict(argument.split("=", 1) for argument in arguments)
    layout = int(settings.pop("tp", 1)), int(settings.pop("pp", 1)), settings.pop("checkpoint", "") == "true"
    torch.manual_seed(0)
    task = recipe(out, *layout)
    if settings:
        from megatron_dft.hosts.nemo import with_dft

        fields = {"linear_fused": bool, "vocab_chunk": int, "token_chunk": int}
        task = with_dft(task, **{name: fields.get(name, str)(value) for name, value in settings.items()})
    fiddle.build(task)()


if __name__ == "__main__":
    main(*sys.argv[1:])
