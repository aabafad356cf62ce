"""python -m megatron_dft COMMAND: the command megatron-dft."""

from megatron_dft.cli import main

if __name__ == "__main__":
    main()
