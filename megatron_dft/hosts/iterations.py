"""Hooks of Megatron-LM's training loop: per iteration, evaluation and checkpoint.

    iteration     sets the iteration of a scheduled objective; logs `dft/valid_tokens_per_second`
    total         `dft/valid_tokens_total`, valid tokens since training began, to TensorBoard and Weights & Biases. Not
                  on the console, which shows means over --log-interval. Checkpoints keep it
    evaluation    each metric is its sum over its count over all tokens, however Megatron averages

Counts come from the reports of micro-batches, which Megatron reduces over ranks. When the rerun state machine repeats a
step, only the pass that Megatron keeps is counted. No collective is added per iteration.

Cost: no host-device sync per iteration, except when a writer logs a value; one after the first iteration if channels
are configured. Per evaluation one all-reduce, and one host-device sync per model chunk. Per checkpoint one all-reduce
of 8 bytes, because the rank that saves Megatron's arguments is not on the last stage, and one host-device sync.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_dft.hosts.patches import TRAINING, Patches
from megatron_dft.metrics import CHANNEL, CHANNEL_METRICS, VALID_TOKENS, MetricAccumulator, MetricSpec, channel_metric

TOTAL = "dft_valid_tokens"  # an argument of Megatron, saved in every checkpoint
TOKENS_PER_SECOND, TOKENS_TOTAL = "dft/valid_tokens_per_second", "dft/valid_tokens_total"


def micro_batches() -> int:
    """Micro-batches of a training iteration over all data- and context-parallel ranks."""
    from megatron.core import parallel_state
    from megatron.core.num_microbatches_calculator import get_num_microbatches

    return get_num_microbatches() * parallel_state.get_data_parallel_world_size(with_context_parallel=True)


class ChannelMeans:
    """The last mean of each channel metric, for iterations without tokens of that channel.

    The host divides sums by counts. For a channel that is missing in a global batch this is 0 / 0, and one NaN makes
    the console's mean over --log-interval NaN. Such a metric therefore keeps its last value, while `tokens` is 0. It is
    NaN before the first token of the channel.
    """

    def __init__(self, spec: MetricSpec) -> None:
        self.channels = spec.channels
        self._known: dict[str, Tensor] = {}

    def fill(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """Replace means of no tokens, if the losses contain totals. No host-device sync."""
        if VALID_TOKENS not in losses:
            return losses
        for channel in self.channels:
            seen = losses[channel_metric(channel, "tokens")] > 0
            for name in (channel_metric(channel, x) for x in CHANNEL_METRICS if x != "tokens"):
                value = losses[name]
                losses[name] = torch.where(seen, value, self._known.get(name, torch.full_like(value, math.nan)))
                self._known[name] = losses[name]
        return losses


class Progress:
    """The hooks of one pretrain()."""

    def __init__(
        self,
        spec: MetricSpec,
        validation: MetricAccumulator,
        *,
        begin: Callable[[int], None],  # sets the iteration
        check_step: Callable[[], None],  # raises ValueError for a step that did not train the objective
        check_tokens: Callable[
            [], None
        ],  # raises ValueError for a token without a loss, or a label that lacks something
    ) -> None:
        self.validation, self.means = validation, ChannelMeans(spec)
        self.begin, self.check_step, self.check_tokens = begin, check_step, check_tokens
        self.begun = False
        self.channels = spec.channels[1:]  # those with a name
        self.named: Tensor | None = None  # their tokens so far
        self.total: Tensor | None = None  # fp64, on the device; on the last pipeline stage

    def follow(self, patches: Patches) -> None:
        """Wrap the functions that the training loop calls."""
        patches.wrap(f"{TRAINING}:train_step", self._train_step)
        patches.wrap(f"{TRAINING}:evaluate", self._evaluate)
        patches.wrap(f"{TRAINING}:save_checkpoint", self._save_checkpoint)
        patches.wrap("megatron.training.checkpointing:check_checkpoint_args", _check_checkpoint_args)

    def _train_step(self, train_step: Callable[..., Any]) -> Callable[..., Any]:
        from megatron.training import get_args

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            run = get_args()
            self.begin(run.curr_iteration + 1)
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
                f"--dft-channels {','.join(self.channels)}: no label of this run carried a channel; see docs/data.md"
            )

    def _look_for_channels(self, losses: dict[str, Tensor]) -> None:
        """After the first iteration: report if it had no channel. One host-device sync."""
        from megatron.training import print_rank_last

        if self.channels and not sum(losses[channel_metric(name, "tokens")] for name in self.channels):
            print_rank_last(
                "> megatron_dft: no label of the first iteration carries a channel of --dft-channels; see docs/data.md"
            )

    def _count(self, run: Any, losses: dict[str, Tensor]) -> None:
        from megatron.training.global_vars import get_tensorboard_writer, get_wandb_writer

        tokens = losses[VALID_TOKENS]

        if self.total is None:
            self.total = torch.full_like(tokens, getattr(run, TOTAL, 0), dtype=torch.float64)
            self._look_for_channels(losses)
        self.total += tokens
        if self.channels:
            named = torch.stack([losses[channel_metric(name, "tokens")] for name in self.channels]).sum()
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
            if not self.begun:  # no training: the schedule of the checkpoint's iteration
                self.begin(getattr(get_args(), "iteration", 0))
            losses, *rest = evaluate(*args, **kwargs)
            if losses:
                losses = means_over_tokens(losses, self.validation)
            self.check_tokens()
            return losses, *rest

        return wrapped

    def _save_checkpoint(self, save_checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        from megatron.training import get_args

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.check_tokens()
            run = get_args()
            device = torch.device("cuda", torch.cuda.current_device())
            before = torch.tensor(getattr(run, TOTAL, 0), dtype=torch.float64, device=device)
            total = before if self.total is None else self.total.clone()
            torch.distributed.all_reduce(total, op=torch.distributed.ReduceOp.MAX)
            setattr(run, TOTAL, round(total.item()))
            return save_checkpoint(*args, **kwargs)

        return wrapped


def means_over_tokens(losses: Mapping[str, Tensor], validation: MetricAccumulator) -> dict[str, Tensor]:
    """The losses of an evaluation, with the host's averages replaced by means over all tokens. Collective."""
    from megatron.core import parallel_state

    values = validation.take(parallel_state.get_data_parallel_group(with_context_parallel=True))
    kept = {name: x for name, x in losses.items() if name in values or not name.startswith(CHANNEL)}
    return kept | {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


def _check_checkpoint_args(check_checkpoint_args: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap Megatron's resume check (not called under --finetune): restore the number of valid tokens."""
    from megatron.training import get_args

    def wrapped(checkpoint_args: Any, *args: Any, **kwargs: Any) -> Any:
        setattr(get_args(), TOTAL, getattr(checkpoint_args, TOTAL, 0))
        return check_checkpoint_args(checkpoint_args, *args, **kwargs)

    return wrapped
