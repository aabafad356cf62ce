"""Dynamic Fine-Tuning and its family of token-level objectives for NVIDIA Megatron.

    loss = sg(p) * -log p          per token, exact under a vocabulary that is split over tensor-parallel ranks

Importing this needs torch alone; Megatron is imported by `install` and the launcher when they run.
"""

from megatron_dft.config import DFTConfig
from megatron_dft.hosts.hook import install
from megatron_dft.linear import linear_dft_loss
from megatron_dft.objectives import OBJECTIVES, Objective, parse_objective
from megatron_dft.stats import TokenStats
from megatron_dft.version import __version__
from megatron_dft.vocab_parallel import token_loss, vocab_parallel_dft_loss, vocab_stats

__all__ = [
    "OBJECTIVES",
    "DFTConfig",
    "Objective",
    "TokenStats",
    "__version__",
    "install",
    "linear_dft_loss",
    "parse_objective",
    "token_loss",
    "vocab_parallel_dft_loss",
    "vocab_stats",
]
