"""Fixtures of several test modules. Without a GPU, Triton kernels run in Triton's interpreter."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported


@pytest.fixture(scope="module")
def uninitialized_memory_is_nan():
    """Fill torch.empty and new_empty with NaN (integers: the maximum), in this process and in `run_ranks`.

    test_gpu.py does not use it, because it measures memory and captures CUDA graphs.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all() and torch.zeros(1).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def host(tmp_path_factory, request):
    """The runs of one test module. They share a folder."""
    from host_runs import Host

    return Host(tmp_path_factory.mktemp(request.module.__name__))


@pytest.fixture(scope="session")
def chat(tmp_path_factory):
    """The runs on packed conversations."""
    pytest.importorskip("megatron.training")
    pytest.importorskip("tensorboard")
    from chat_runs import ChatHost

    return ChatHost(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="session")
def checkpoint(chat):
    """Flags that load the initial weights of every layout. Megatron initializes each pipeline stage differently."""
    from chat_runs import CHAT_STEPS

    path = chat.folder / "checkpoint"
    chat.curves(f"{chat.sft} --save {path} --save-interval {CHAT_STEPS}")
    return f"--load {path} --finetune"
