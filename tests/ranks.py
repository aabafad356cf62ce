"""Ranks over gloo: processes that are forked from one fork server per pytest process.

Importing torch and Megatron takes longer than most tests. The fork server imports both once and enables CPU ranks of
Megatron (`rank_preload`). Each rank is a fresh fork of it, so no state is carried from one launch to the next.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib.util
import multiprocessing
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_dft.utils import exit_rank

ROOT = Path(__file__).resolve().parent.parent
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["rank_preload"])
# The fork server preloads modules from here. It ignores missing ones.
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])

needs_megatron = pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="needs megatron-core")


class Rendezvous:
    """A TCPStore that ranks join, as under torchrun. The constructor binds the port."""

    def __init__(self) -> None:
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    @property
    def environment(self) -> dict[str, str]:
        return {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }


def run_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 150.0, start: str = "forkserver"
) -> list[Any]:
    """Run `function(*args)` on each rank; returns the results in rank order.

    `function` must be importable (top level of a test module). Ranks that use a GPU need start="spawn", because forked
    ranks are CPU ranks.

    Raises:
        Exception: with its traceback, if a rank raises or exits.
        TimeoutError: with the stack of each rank, if a rank hangs for `timeout` seconds.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        context = mp.start_processes(
            _rank,
            (
                world_size,
                folder,
                dict(os.environ),
                torch.are_deterministic_algorithms_enabled(),
                function,
                args,
                timeout,
            ),
            nprocs=world_size,
            join=False,
            start_method=start,
        )
        started, deadline = False, time.monotonic() + 100.0  # for the imports, on a busy machine
        try:
            while not context.join(timeout=0.5):
                if not started and len(list(folder.glob("*.stack"))) == world_size:
                    started, deadline = True, time.monotonic() + timeout
                if time.monotonic() > deadline:
                    if started:
                        for process in context.processes:
                            with contextlib.suppress(ProcessLookupError):
                                os.kill(process.pid, signal.SIGUSR1)  # write the stack
                    time.sleep(1.0)
                    stacks = "\n".join(path.read_text() for path in sorted(folder.glob("*.stack")))
                    raise TimeoutError(f"{function.__name__}: a rank hangs after {timeout:.0f} s\n{stacks}")
        finally:
            for process in context.processes:
                process.kill()
                process.join()
        return [torch.load(folder / f"{rank}.result", weights_only=False) for rank in range(world_size)]


def _rank(
    rank: int,
    world_size: int,
    folder: Path,
    environment: dict[str, str],
    deterministic: bool,
    function: Callable[..., Any],
    args: tuple,
    timeout: float,
) -> None:
    os.environ.clear()
    os.environ.update(environment)  # the fork server has the environment of its start
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    with open(folder / f"{rank}.stack", "w") as stack:
        faulthandler.register(signal.SIGUSR1, file=stack)
        torch.set_num_threads(1)
        store = dist.FileStore(str(folder / "store"), world_size)
        limit = timedelta(
            seconds=timeout + 30.0
        )  # longer than `timeout`: the stacks are more useful than the error of gloo
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=limit)
        torch.save(function(*args), folder / f"{rank}.result")
        dist.barrier()  # keep connections open until every rank is done
        exit_rank(0)


def megatron_cross_entropy() -> Callable[[Tensor, Tensor], Tensor]:
    """Megatron's unfused cross entropy over all ranks as the tensor-parallel group. Call it on a rank."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=dist.get_world_size())
    return vocab_parallel_cross_entropy


class Collectives(TorchDispatchMode):
    """Record name and input shape of each collective that runs."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            tensors = [x for x in torch.utils._pytree.tree_leaves(args[:2]) if isinstance(x, torch.Tensor)]
            self.seen.append((function.__name__.split(".")[0], tuple(tensors[-1].shape)))
        return function(*args, **(kwargs or {}))

    def __enter__(self):
        self.seen = []
        return super().__enter__()


def run_processes(command, environment, outputs, timeout=180.0):
    """Run a command once per rank, with an output file each; the first exit code that is not 0.

    All ranks are killed when one has failed, or after the timeout.
    """
    processes = [
        subprocess.Popen(
            command,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=output.open("w"),
            stderr=subprocess.STDOUT,
        )
        for rank, output in enumerate(outputs)
    ]
    deadline = time.monotonic() + timeout
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        time.sleep(0.1)
        if any(process.returncode for process in processes):
            break
    for process in processes:
        process.kill()
        process.wait()
    return next((process.returncode for process in processes if process.returncode), 0)
