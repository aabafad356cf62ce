"""Preloaded once by the fork server of `ranks`: imports Megatron and enables its CPU support."""

import contextlib
import importlib.util
import os

os.environ["OMP_NUM_THREADS"] = "1"

import torch.testing

if importlib.util.find_spec("megatron"):
    from megatron_dft.testing import cpu

    cpu.enable()
    with contextlib.suppress(ModuleNotFoundError):  # before 0.17
        import megatron.training
    with contextlib.suppress(ModuleNotFoundError):
        import torch.utils.tensorboard  # noqa: F401
    with contextlib.suppress(ModuleNotFoundError):  # 0.17
        import megatron.core.tokenizers.text  # imports transformers, which takes half the time of a small run
    if importlib.util.find_spec("megatron.bridge"):
        cpu.enable_bridge()
        import megatron.bridge.training.finetune
        import megatron.bridge.training.gpt_step  # noqa: F401
