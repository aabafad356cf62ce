"""Dynamic Fine-Tuning (DFT) and its family of token-level SFT objectives for NVIDIA Megatron.

    loss = sg(p) * -log p          per token, exact for a vocabulary that is split over tensor-parallel ranks

`import megatron_dft` imports torch alone. `install` and the launchers import Megatron when they are called.
"""

from megatron_dft.config import DFTConfig
from megatron_dft.hosts.binding import install
from megatron_dft.ops.linear_fused import linear_dft_loss
from megatron_dft.ops.objectives import OBJECTIVES, Objective, parse_objective
from megatron_dft.ops.stats import TokenStats
from megatron_dft.ops.vocab_parallel import token_loss, vocab_parallel_dft_loss, vocab_stats
from megatron_dft.version import __version__

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
