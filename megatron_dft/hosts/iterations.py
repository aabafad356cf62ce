"""What Megatron-LM's training loop needs once per iteration, evaluation and checkpoint.

    iteration     sets that of a scheduled objective; `valid tokens per second` joins the losses that are logged
    total         `valid tokens total`, since the training began: to TensorBoard and Weights & Biases. The console
                  shows means over --log-interval, so it is not in there. Checkpoints keep it
    evaluation    each metric is the sum over the count of all its tokens, whatever the host averages

The counts are in the reports of micro-batches, which Megatron adds up over ranks. When its rerun state machine repeats
a step, only the pass that Megatron keeps is counted. They cost no collective of their own.

Cost per iteration: no host-device sync, but for the writers, which read what they log. One all-reduce per evaluation,
and one of 8 bytes per checkpoint, because the rank that writes Megatron's arguments is not on the last pipeline stage.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_dft.hosts.patches import TRAINING, Patches
from megatron_dft.metrics import CHANNEL, OF_CHANNEL, VALID_TOKENS, Detail, MetricAccumulator
from megatron_dft.objectives import Objective

TOTAL = "dft_valid_tokens"  # the total among Megatron's arguments, which it saves in every checkpoint
TOKENS_PER_SECOND, TOKENS_TOTAL = "valid tokens per second", "valid tokens total"


def micro_batches() -> int:
    """The number of micro-batches of a training iteration, on all data- and context-parallel ranks together."""
    from megatron.core import parallel_state
    from megatron.core.num_microbatches_calculator import get_num_microbatches

    return get_num_microbatches() * parallel_state.get_data_parallel_world_size(with_context_parallel=True)


class Means:
    """The last known means of each channel, for iterations in which no token of it was counted.

    A host divides the sum by the count. A channel that a global batch does not have is 0 / 0 there, and one NaN makes
    the console's mean over --log-interval NaN. So it keeps its last value, beside 0 `tokens`; before it was first seen
    it is NaN.
    """

    def __init__(self, detail: Detail) -> None:
        self.channels = detail.channels
        self._known: dict[str, Tensor] = {}

    def fill(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """What to log; without a host-device sync. Needs the totals among the losses."""
        if VALID_TOKENS not in losses:
            return losses
        for channel in self.channels:
            seen = losses[f"{CHANNEL}{channel} tokens"] > 0
            for name in (f"{CHANNEL}{channel} {what}" for what in OF_CHANNEL if what != "tokens"):
                value = losses[name]
                losses[name] = torch.where(seen, value, self._known.get(name, torch.full_like(value, math.nan)))
                self._known[name] = losses[name]
        return losses


class Progress:
    """Follows the training loop of one pretrain()."""

    def __init__(
        self,
        objective: Objective,
        detail: Detail,
        validation: MetricAccumulator,
        check_step: Callable[[], None],  # raises ValueError for a step that did not train the objective
        check_masks: Callable[[], None],  # raises ValueError if a loss mask counted a token without a loss
    ) -> None:
        self.objective, self.validation, self.means = objective, validation, Means(detail)
        self.check_step, self.check_masks = check_step, check_masks
        self.begun = False
        self.channels = detail.channels[1:]  # those that have a name
        self.named: Tensor | None = None  # tokens of them so far
        self.total: Tensor | None = None  # fp64, on the device; on the last pipeline stage

    def follow(self, patches: Patches) -> None:
        """Wrap what the loop calls."""
        patches.wrap(f"{TRAINING}:train_step", self._train_step)
        patches.wrap(f"{TRAINING}:evaluate", self._evaluate)
        patches.wrap(f"{TRAINING}:save_checkpoint", self._save_checkpoint)
        patches.wrap("megatron.training.checkpointing:check_checkpoint_args", _check_checkpoint_args)

    def _train_step(self, train_step: Callable[..., Any]) -> Callable[..., Any]:
        from megatron.training import get_args

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            run = get_args()
            self.objective.begin(run.curr_iteration + 1)
            self.begun = True
            start = time.perf_counter()
            losses, *rest = train_step(*args, **kwargs)
            self.check_step()
            if losses:  # on the last pipeline stage
                losses = self.means.fill(dict(losses))
                if VALID_TOKENS in losses:
                    losses[TOKENS_PER_SECOND] = losses[VALID_TOKENS] / (time.perf_counter() - start)
                    self._count(run, losses)
            return losses, *rest

        return wrapped

    def check_channels(self) -> None:
        """Raises ValueError if channels are configured and no label of the run carried one."""
        if self.named is not None and not self.named:
            raise ValueError(
                f"--loss-channels {','.join(self.channels)}: no label of this run carried a channel; see docs/data.md"
            )

    def _look_for_channels(self, losses: dict[str, Tensor]) -> None:
        """After the first iteration: say so if it had none. One host-device sync."""
        from megatron.training import print_rank_last

        if self.channels and not sum(losses[f"{CHANNEL}{name} tokens"] for name in self.channels):
            print_rank_last("> megatron_dft: no label of the first iteration carries a channel of --loss-channels")

    def _count(self, run: Any, losses: dict[str, Tensor]) -> None:
        from megatron.training.global_vars import get_tensorboard_writer, get_wandb_writer

        tokens = losses[VALID_TOKENS]

        if self.total is None:
            self.total = torch.full_like(tokens, getattr(run, TOTAL, 0), dtype=torch.float64)
            self._look_for_channels(losses)
        self.total += tokens
        if self.channels:
            named = torch.stack([losses[f"{CHANNEL}{name} tokens"] for name in self.channels]).sum()
            self.named = named if self.named is None else self.named + named
        iteration = run.curr_iteration + 1
        if iteration % run.tensorboard_log_interval == 0:
            if writer := get_tensorboard_writer():
                writer.add_scalar(TOKENS_TOTAL, self.total, iteration)
            if writer := get_wandb_writer():
                writer.log({TOKENS_TOTAL: self.total}, iteration)

    def _evaluate(self, evaluate: Callable[..., Any]) -> Callable[..., Any]:
        from megatron.training import get_args

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if not self.begun:  # without training, as after the last iteration of the checkpoint
                self.objective.begin(getattr(get_args(), "iteration", 0))
            losses, *rest = evaluate(*args, **kwargs)
            if losses:
                losses = means_over_tokens(losses, self.validation)
            self.check_masks()
            return losses, *rest

        return wrapped

    def _save_checkpoint(self, save_checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        from megatron.training import get_args

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.check_masks()
            run = get_args()
            device = torch.device("cuda", torch.cuda.current_device())
            before = torch.tensor(getattr(run, TOTAL, 0), dtype=torch.float64, device=device)
            total = before if self.total is None else self.total.clone()
            torch.distributed.all_reduce(total, op=torch.distributed.ReduceOp.MAX)
            setattr(run, TOTAL, round(total.item()))
            return save_checkpoint(*args, **kwargs)

        return wrapped


def means_over_tokens(losses: Mapping[str, Tensor], validation: MetricAccumulator) -> dict[str, Tensor]:
    """The losses of an evaluation, as a host has averaged them -> sums over counts of all its tokens. Collective."""
    from megatron.core import parallel_state

    values = validation.take(parallel_state.get_data_parallel_group(with_context_parallel=True))
    kept = {name: x for name, x in losses.items() if name in values or not name.startswith(CHANNEL)}
    return kept | {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


def _check_checkpoint_args(check_checkpoint_args: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron calls it when a run resumes (not under --finetune), and restores its own counters right after."""
    from megatron.training import get_args

    def wrapped(checkpoint_args: Any, *args: Any, **kwargs: Any) -> Any:
        setattr(get_args(), TOTAL, getattr(checkpoint_args, TOTAL, 0))
        return check_checkpoint_args(checkpoint_args, *args, **kwargs)

    return wrapped
