"""Entry point of NeMo-Run's command line: the factories of `nemo.py`, if NeMo 2 is installed."""

import importlib.util

if importlib.util.find_spec("nemo") is not None and importlib.util.find_spec("nemo.collections.llm") is not None:
    import megatron_dft.hosts.nemo  # noqa: F401
