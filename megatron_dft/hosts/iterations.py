"""What happens once per iteration of Megatron's training loop: the schedule moves on, and valid tokens are counted.

    valid tokens              of this iteration, over all ranks: what the loss mask leaves, Megatron's num_tokens
    valid tokens total        since the training began; checkpoints keep it
    valid tokens per second   of the training step alone, without evaluation and checkpoints

They join the losses that Megatron's train_step() returns, so every writer that the host has shows them: the console
(as means over --log-interval, like all it shows), TensorBoard, Weights & Biases.

Cost: an addition per micro-batch and, beside the collectives with which Megatron ends each step, an all-reduce of 8
bytes. The counter and the blend of a schedule are device tensors, set outside of forward and backward: a captured
graph sees them change.
"""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from megatron_dft.hosts import compat
from megatron_dft.objectives import Objective

# Where Megatron's arguments, which it saves in every checkpoint, hold the total.
TOTAL = "dft_valid_tokens"


class TokenCount:
    """The valid tokens of an iteration, counted on the device."""

    def __init__(self) -> None:
        self._count: Tensor | None = None

    def add(self, num_tokens: Tensor) -> None:
        """Of one micro-batch on this rank."""
        self._on_device().add_(num_tokens)

    def take(self, tp_size: int) -> int:
        """Over all ranks, each token once; starts again from zero. Collective."""
        # Pipeline stages before the last have counted none, tensor-parallel ranks the same ones.
        count = self._on_device()
        torch.distributed.all_reduce(count)
        total = int(count.item()) // tp_size
        count.zero_()
        return total

    def _on_device(self) -> Tensor:
        if self._count is None:
            self._count = torch.zeros((), dtype=torch.int64, device="cuda")
        return self._count


def token_report(count: int, seconds: float) -> dict[str, Tensor]:
    """Of one iteration, in the form of the losses that a host logs."""
    report = {"valid tokens": count, "valid tokens per second": count / seconds}
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in report.items()}


@contextmanager
def followed(objective: Objective, tokens: TokenCount) -> Iterator[None]:
    """Within it, Megatron's training loop tells the objective each iteration, and reports the tokens.

    Raises:
        ValueError: if the training loop is not made of the functions that we know.
    """
    from megatron.training import checkpointing, training

    wrappers: list[tuple[Any, str, Callable[..., Any]]] = [
        (training, "train_step", functools.partial(_train_step, objective=objective, tokens=tokens)),
        (training, "evaluate_and_print_results", functools.partial(_evaluate, objective=objective)),
        (checkpointing, "check_checkpoint_args", _check_checkpoint_args),
    ]
    for module, name, _ in wrappers:
        if not hasattr(module, name):
            raise ValueError(
                f"{module.__name__}: expected a function {name}(), got a Megatron without it; {compat.KNOWN_HOSTS}"
            )
    originals = [getattr(module, name) for module, name, _ in wrappers]
    for (module, name, wrapper), original in zip(wrappers, originals, strict=True):
        setattr(module, name, functools.wraps(original)(wrapper(original)))
    try:
        yield
    finally:
        for (module, name, _), original in zip(wrappers, originals, strict=True):
            setattr(module, name, original)


def _train_step(train_step: Callable[..., Any], objective: Objective, tokens: TokenCount) -> Callable[..., Any]:
    from megatron.training import get_args

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        run = get_args()
        objective.begin(run.curr_iteration + 1)
        start = time.perf_counter()
        losses, *rest = train_step(*args, **kwargs)
        count = tokens.take(run.tensor_model_parallel_size)
        seconds = time.perf_counter() - start
        total = getattr(run, TOTAL, 0) + count
        setattr(run, TOTAL, total)
        if losses:  # on the last pipeline stage
            report = token_report(count, seconds)
            losses = losses | report | {"valid tokens total": torch.tensor(total, dtype=torch.float64)}
        return losses, *rest

    return wrapped


def _evaluate(evaluate_and_print_results: Callable[..., Any], objective: Objective) -> Callable[..., Any]:
    """With the objective as it was in the last iteration of training, in this run or in the one that was loaded."""
    signature = inspect.signature(evaluate_and_print_results)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        objective.begin(signature.bind(*args, **kwargs).arguments["iteration"])
        return evaluate_and_print_results(*args, **kwargs)

    return wrapped


def _check_checkpoint_args(check_checkpoint_args: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron calls it when a run goes on (not under --finetune), and takes back its own counters right after."""
    from megatron.training import get_args

    def wrapped(checkpoint_args: Any, *args: Any, **kwargs: Any) -> Any:
        setattr(get_args(), TOTAL, getattr(checkpoint_args, TOTAL, 0))
        return check_checkpoint_args(checkpoint_args, *args, **kwargs)

    return wrapped
