"""Megatron on CPU ranks over gloo, without a GPU."""
