"""Imported once by the server from which `host_runs` forks its ranks: this process becomes a CPU rank of Megatron."""

import os

os.environ["OMP_NUM_THREADS"] = "1"

from megatron_dft.hosts import cpu

cpu.enable()

import megatron.training  # noqa: E402, F401
import torch.utils.tensorboard  # noqa: E402, F401
