"""Print the path of the plugin for ms-swift.

    MEGATRON_DFT="--loss-type dft" megatron sft ARGUMENTS --external_plugins $(megatron-dft plugin)

See docs/ms-swift.md.
"""

import argparse
import sys
from pathlib import Path

from megatron_dft.utils import HelpFormatter


def main(argv: list[str]) -> None:
    """Print the path."""
    argparse.ArgumentParser(
        "megatron-dft plugin", allow_abbrev=False, description=__doc__, formatter_class=HelpFormatter
    ).parse_args(argv)
    print(Path(__file__).with_name("ms_swift.py"))


if __name__ == "__main__":
    main(sys.argv[1:])
