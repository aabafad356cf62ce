"""Imported once by the server from which `host_runs` forks its ranks: this process becomes a CPU rank of Megatron."""

import contextlib
import importlib.util
import os

os.environ["OMP_NUM_THREADS"] = "1"

from megatron_dft.hosts import cpu

cpu.enable()

import megatron.training  # noqa: E402
import torch.utils.tensorboard  # noqa: E402, F401

with contextlib.suppress(ModuleNotFoundError):  # 0.17
    import megatron.core.tokenizers.text  # which imports transformers: half the time of a small run

if importlib.util.find_spec("megatron.bridge"):
    cpu.enable_bridge()
    import megatron.bridge.training.finetune
    import megatron.bridge.training.gpt_step  # noqa: F401
