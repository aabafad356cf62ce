"""A look at the training data through Megatron's `pretrain()`, which evaluates it while a survey listens."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from megatron_dft.config import DFTConfig
from megatron_dft.hosts import megatron_lm
from megatron_dft.metrics import TokenBatch
from megatron_dft.objectives import Objective
from megatron_dft.survey import Survey

_surveys: list[Survey] = []  # the one of this run


def arguments(batches: int) -> list[str]:
    """Megatron's and ours, for a run that looks at so many global batches and changes nothing."""
    ours = ["--loss-type", "nll", "--loss-metrics", "full", "--loss-callback", f"{__name__}:collect"]
    return [*ours, "--skip-train", "--eval-iters", str(batches), "--finetune", "--no-load-optim", "--no-load-rng"]


def collect(batch: TokenBatch) -> None:
    """The callback of such a run."""
    _surveys[-1].add(batch)


def enable(config: DFTConfig, objectives: list[Objective], report: Callable[[dict[str, Any]], None]) -> megatron_lm.Run:
    """As `megatron_lm.enable`, and `report` is called with the result on the first rank."""
    survey = Survey(objectives, config.detail.channels)
    _surveys.append(survey)

    def prepare(call: inspect.BoundArguments) -> None:
        call.arguments[megatron_lm.DATASETS] = _training_data(call.arguments[megatron_lm.DATASETS])

    def finish() -> None:
        result = _over_all_ranks(survey)
        if torch.distributed.get_rank() == 0:
            report(result)

    return megatron_lm.enable(config, prepare=prepare, finish=finish)


def _training_data(provider: Callable[..., Any]) -> Callable[..., Any]:
    """The training set in the place of the validation set, as long as that was to be."""

    @functools.wraps(provider)
    def wrapped(sample_counts: list[int], *args: Any, **kwargs: Any) -> tuple[Any, Any, None]:
        train, _, _ = provider([sample_counts[1]] * 3, *args, **kwargs)
        return train, train, None

    return wrapped


def _over_all_ranks(survey: Survey) -> dict[str, Any]:
    from megatron.training import get_args

    totals = survey.totals(torch.device("cuda", torch.cuda.current_device()))
    torch.distributed.all_reduce(totals)
    return survey.result(totals / get_args().tensor_model_parallel_size)
