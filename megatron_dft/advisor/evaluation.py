"""Evaluation of the training data with Megatron's `pretrain()`, with statistics of its tokens."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from megatron_dft.advisor.statistics import DatasetStatistics
from megatron_dft.config import DFTConfig
from megatron_dft.hosts import megatron_lm
from megatron_dft.metrics import TokenBatch
from megatron_dft.ops.objectives import Objective

_statistics: list[DatasetStatistics] = []  # the last one belongs to this run


def arguments(batches: int) -> list[str]:
    """Arguments of a run that evaluates `batches` global batches without training."""
    ours = ["--loss-type", "nll", "--dft-metrics", "full", "--dft-callback", f"{__name__}:collect"]
    return [*ours, "--skip-train", "--eval-iters", str(batches), "--finetune", "--no-load-optim", "--no-load-rng"]


def collect(batch: TokenBatch) -> None:
    """The --dft-callback of the evaluation: add a micro-batch to the statistics."""
    _statistics[-1].add(batch)


def enable(config: DFTConfig, objectives: list[Objective], report: Callable[[dict[str, Any]], None]) -> megatron_lm.Run:
    """Like `megatron_lm.enable`; after the run, calls `report` with the result on rank 0."""
    statistics = DatasetStatistics(objectives, config.metric_spec.channels)
    _statistics.append(statistics)

    def prepare(call: inspect.BoundArguments) -> None:
        call.arguments[megatron_lm.DATASETS] = _training_data(call.arguments[megatron_lm.DATASETS])

    def finish() -> None:
        result = _over_all_ranks(statistics)
        if torch.distributed.get_rank() == 0:
            report(result)

    return megatron_lm.enable(config, prepare=prepare, finish=finish)


def _training_data(provider: Callable[..., Any]) -> Callable[..., Any]:
    """Replace the validation set by the training set, with the same number of samples."""

    @functools.wraps(provider)
    def wrapped(sample_counts: list[int], *args: Any, **kwargs: Any) -> tuple[Any, Any, None]:
        train, _, _ = provider([sample_counts[1]] * 3, *args, **kwargs)
        return train, train, None

    return wrapped


def _over_all_ranks(statistics: DatasetStatistics) -> dict[str, Any]:
    from megatron.training import get_args

    totals = statistics.totals(torch.device("cuda", torch.cuda.current_device()))
    torch.distributed.all_reduce(totals)
    args = get_args()
    return statistics.result(totals / args.tensor_model_parallel_size, args.train_iters)
