"""The value of ms-swift's --external_plugins. Settings are in the environment variable MEGATRON_DFT.

Checkpoints of ms-swift name their plugins, and other commands (infer, export) import them. This file does
nothing there.
"""

import sys
from pathlib import Path

folder, command = ("", *Path(sys.argv[0]).parts)[-2:]
if "swift.megatron" in sys.modules:
    from megatron_dft.hosts import ms_swift

    try:
        ms_swift.register()
    except ValueError as error:
        sys.exit(f"megatron_dft: {error}")
elif folder == "cli" and command in ("sft.py", "pt.py", "rlhf.py"):
    sys.exit(
        f"megatron_dft: expected megatron sft or megatron pt, got swift {command.removesuffix('.py')}, whose trainer "
        "this plugin does not change; use --enable_dft_loss true there"
    )
