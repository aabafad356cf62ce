"""The value of ms-swift's --external_plugins. Settings are in the environment variable MEGATRON_DFT."""

import sys

from megatron_dft.hosts import ms_swift

try:
    ms_swift.register(ms_swift.environment())
except ValueError as error:
    sys.exit(f"megatron_dft: {error}")
