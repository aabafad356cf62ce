"""What happens once per iteration of Megatron's training loop: the schedule moves on, and tokens are counted.

    valid tokens              of this iteration, over all ranks: what the loss mask leaves, Megatron's num_tokens
    valid tokens total        since the training began; checkpoints keep it
    valid tokens per second   of the training step alone, without evaluation and checkpoints
    ...                       what is reported in `Detail`: histograms, channels

They join the losses that Megatron's train_step() and evaluate() return, so every writer that the host has shows them:
the console (as means over --log-interval, like all it shows), TensorBoard, Weights & Biases.

Cost: an addition per micro-batch and, beside the collectives with which Megatron ends each step, one all-reduce of 8
bytes and 16 for each number of `Detail`. The tally and the blend of a schedule are device tensors, set outside of
forward and backward: a captured graph sees them change.
"""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from megatron_dft.hosts import compat
from megatron_dft.metrics import CHANNEL, Detail
from megatron_dft.objectives import Objective

# Where Megatron's arguments, which it saves in every checkpoint, hold the total.
TOTAL = "dft_valid_tokens"


class Tally:
    """The valid tokens of an iteration and the sums of `Detail`, added up on the device."""

    def __init__(self, detail: Detail) -> None:
        self.detail = detail
        self._sums: Tensor | None = None  # [1 + 2 K] fp64, which counts to 2^53
        self._known: dict[str, float] = {}

    def add(self, num_tokens: Tensor, sums: Tensor) -> None:
        """Of one micro-batch on this rank."""
        self._on_device().add_(torch.cat([num_tokens.double().view(1), sums.flatten()]))

    def take(self, tp_size: int) -> tuple[int, dict[str, float]]:
        """Number of tokens and values over all ranks, each token once; starts again from zero. Collective."""
        # Pipeline stages before the last have counted none, tensor-parallel ranks the same ones.
        sums = self._on_device()
        torch.distributed.all_reduce(sums)
        count, *pairs = (sums.cpu() / tp_size).split([1, *[2] * len(self.detail.names)])
        sums.zero_()
        return int(count), self.detail.values(torch.stack(pairs) if pairs else count.new_zeros(0, 2))

    def report(self, tp_size: int, seconds: float) -> dict[str, Tensor]:
        """Of a training iteration, in the form of the losses that a host logs. Collective.

        What no token was counted in, a channel that is missing in this batch, keeps its last value: a host that is
        given no number, or NaN, averages wrongly or reports an error.
        """
        count, values = self.take(tp_size)
        self._known |= values
        return as_losses({"valid tokens": count, "valid tokens per second": count / seconds, **self._known})

    def validation(self, tp_size: int) -> dict[str, Tensor]:
        """Of an evaluation: the channels, as losses. Histograms would bury a host's line of results. Collective."""
        _, values = self.take(tp_size)
        return as_losses({name: value for name, value in values.items() if name.startswith(CHANNEL)})

    def _on_device(self) -> Tensor:
        if self._sums is None:
            self._sums = torch.zeros(1 + 2 * len(self.detail.names), dtype=torch.float64, device="cuda")
        return self._sums


def as_losses(values: Mapping[str, float]) -> dict[str, Tensor]:
    """Numbers in the form in which a host logs its losses."""
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


@contextmanager
def followed(objective: Objective, tally: Tally) -> Iterator[None]:
    """Within it, Megatron's training loop tells the objective each iteration, and reports the tally.

    Raises:
        ValueError: if the training loop is not made of the functions that we know.
    """
    from megatron.training import checkpointing, training

    wrappers: list[tuple[Any, str, Callable[..., Any]]] = [
        (training, "train_step", functools.partial(_train_step, objective=objective, tally=tally)),
        (training, "evaluate", functools.partial(_evaluate, tally=tally)),
        (training, "evaluate_and_print_results", functools.partial(_before_evaluation, objective=objective)),
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


def _train_step(train_step: Callable[..., Any], objective: Objective, tally: Tally) -> Callable[..., Any]:
    from megatron.training import get_args

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        run = get_args()
        objective.begin(run.curr_iteration + 1)
        start = time.perf_counter()
        losses, *rest = train_step(*args, **kwargs)
        report = tally.report(run.tensor_model_parallel_size, time.perf_counter() - start)
        total = getattr(run, TOTAL, 0) + int(report["valid tokens"])
        setattr(run, TOTAL, total)
        if losses:  # on the last pipeline stage
            losses = losses | report | as_losses({"valid tokens total": total})
        return losses, *rest

    return wrapped


def _evaluate(evaluate: Callable[..., Any], tally: Tally) -> Callable[..., Any]:
    from megatron.training import get_args

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        losses, *rest = evaluate(*args, **kwargs)
        report = tally.validation(get_args().tensor_model_parallel_size)
        if losses:
            losses = losses | report
        return losses, *rest

    return wrapped


def _before_evaluation(evaluate_and_print_results: Callable[..., Any], objective: Objective) -> Callable[..., Any]:
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
