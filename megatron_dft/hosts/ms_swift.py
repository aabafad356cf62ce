"""ms-swift 4.6: the objective in `megatron sft` and `megatron pt`, whose models are those of mcore-bridge.

    MEGATRON_DFT="--loss-type dft" megatron sft ARGUMENTS --external_plugins $(megatron-dft plugin)

`register` adds a callback to ms-swift's `megatron_callbacks_map`. ms-swift creates it on every rank, after model,
adapters, DDP, optimizer and checkpoint. It binds the loss on the model chunks. Two methods of the trainer instance are
wrapped: `forward_step`, whose loss_func reports the metrics, and `_log_callback`, which adds their means to the log. No
class is patched.

`loss` stays the NLL, times the `loss_scale` weights of ms-swift. These weights multiply the gradient of the objective,
too. Metrics are means over tokens without weights.

Cost: one all-reduce per log, over the data- and context-parallel ranks of the last pipeline stage.
"""

from __future__ import annotations

import functools
import os
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_dft.config import DFTConfig
from megatron_dft.hosts import compat
from megatron_dft.hosts.binding import install, with_metrics
from megatron_dft.hosts.iterations import TOKENS_PER_SECOND
from megatron_dft.labels import IGNORE_INDEX
from megatron_dft.metrics import VALID_TOKENS, MetricAccumulator, is_total
from megatron_dft.utils import Parser

VARIABLE = "MEGATRON_DFT"
ALWAYS = "default_flow"  # name of a callback that every run creates


def environment() -> DFTConfig:
    """The settings in MEGATRON_DFT: our flags, or the path of a YAML file with a block `dft:`.

    Raises:
        ValueError: for an invalid setting, or if no objective is set.
    """
    text = os.environ.get(VARIABLE, "")
    if text.endswith((".yaml", ".yml")):
        if not os.path.isfile(text):
            raise ValueError(f"{VARIABLE}={text}: no such file; check the path")
        import yaml

        with open(text) as file:
            block = yaml.safe_load(file)
        if not isinstance(block, dict) or not isinstance(block.get("dft"), dict):
            raise ValueError(f"{VARIABLE}={text}: expected a block `dft:` of KEY: VALUE, got {block!r}")
        config = DFTConfig.from_mapping(block["dft"])
    else:
        config = DFTConfig.from_args(DFTConfig.add_arguments(Parser()).parse_args(shlex.split(text)))
    if not config.enabled:
        raise ValueError(f'{VARIABLE}={text!r}: no objective; export {VARIABLE}="--loss-type dft"')
    return config


def register(config: DFTConfig | None = None) -> None:
    """Train with an objective in every run of this process. A plugin file of your own calls it.

    Args:
        config: the settings. None: those of `environment`.

    Raises:
        ValueError: for settings that ms-swift's data do not support, or a second call. Later, when the trainer is
            built: if no objective is set, or for arguments that are incompatible with it.
    """
    if config is None and os.environ.get(VARIABLE):
        config = environment()
    if config is not None:
        _check_data(config)
    from swift.megatron.callbacks import MegatronCallback, megatron_callbacks_map

    class DFTCallback(Run, MegatronCallback):
        """`Run` as a callback of ms-swift. Other events do nothing."""

        def __init__(self, trainer: Any) -> None:
            MegatronCallback.__init__(self, trainer)
            Run.__init__(self, trainer, environment() if config is None else config)

    if isinstance(megatron_callbacks_map[ALWAYS], _Both):
        raise ValueError("--external_plugins: two plugins of megatron_dft; keep one of them")
    megatron_callbacks_map[ALWAYS] = _Both(DFTCallback, megatron_callbacks_map[ALWAYS])


@dataclass(frozen=True)
class _Both:
    """An entry of ms-swift's callback map that also creates ours."""

    ours: Callable[[Any], Any]
    host: Callable[[Any], Any]

    def __call__(self, trainer: Any) -> Any:
        trainer.callbacks.append(self.ours(trainer))
        return self.host(trainer)


def _check_data(config: DFTConfig) -> None:
    """Raises ValueError for settings that need labels of a token file."""
    for name, unsupported in (
        ("channels (--dft-channels)", config.channels),
        ("weights (--dft-weights)", config.weights),
        (f"reduction={config.reduction} (--dft-reduction)", config.by_conversation),
        (f"loss_type={config.loss_type} (--loss-type)", config.of_reference),
    ):
        if unsupported:
            raise ValueError(
                f"{name}: the data of ms-swift contain no channels, weights, conversation lengths or reference "
                "log-probabilities; remove it, or train with Megatron-LM or Megatron-Bridge. --loss_scale and "
                "--enable_channel_loss of ms-swift are supported"
            )


class Run:
    """The objective on the models of a trainer, and the metrics in its log."""

    def __init__(self, trainer: Any, config: DFTConfig) -> None:
        check_arguments(trainer.args, config)
        self.trainer, self.config = trainer, config
        self.installation = install(trainer.wrapped_models, config)
        for binding in self.installation.bindings:
            print(f"> megatron_dft: objective {config.objective}; {binding.output_layer}", flush=True)
        self.training, self.validation = MetricAccumulator(), MetricAccumulator()
        self.evaluating, self.seconds, self.start = False, 0.0, 0.0
        trainer.forward_step = self._forward_step(trainer.forward_step)
        trainer._log_callback = self._log_callback(trainer._log_callback)

    def _forward_step(self, host: Callable[..., Any]) -> Callable[..., Any]:
        """ms-swift's forward_step, whose loss_func adds the metrics to the sums of this run."""

        def masked(data_iterator: Any, model: Any) -> tuple[Any, Any]:
            output, loss_func = host(data_iterator, model)
            labels = loss_func.keywords["labels"]
            return output, loss_func if labels is None else _with_mask(loss_func, labels)

        step = with_metrics(masked, self.config, micro_batches=self._micro_batches)

        @functools.wraps(host)
        def forward_step(data_iterator: Any, model: Any) -> tuple[Any, Any]:
            output, loss_func = step(data_iterator, model)

            def recorded(output: Any, **kwargs: Any) -> Any:
                *values, report = loss_func(output, **kwargs)
                ours = {name: report.pop(name) for name in list(report) if name.startswith("dft/")}
                (self.training if torch.is_grad_enabled() else self.validation).add(ours)
                return *values, report

            return output, recorded

        return forward_step

    def _micro_batches(self) -> int:
        """Micro-batches of an iteration over all ranks. ms-swift does not set Megatron's calculator."""
        from megatron.core import parallel_state

        ranks = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
        return self.trainer.args.num_microbatches * ranks

    def _log_callback(self, host: Callable[..., Any]) -> Callable[..., Any]:
        """ms-swift's reduction of a log over ranks, with the means of our metrics."""
        from megatron.core import parallel_state

        @functools.wraps(host)
        def log_callback(logs: dict[str, Any], n_steps: int) -> Any:
            if parallel_state.is_pipeline_last_stage(ignore_virtual=True):
                sums = self.validation if self.evaluating else self.training
                means = sums.take(parallel_state.get_data_parallel_group(with_context_parallel=True))
                logs |= {name: value / n_steps if is_total(name) else value for name, value in means.items()}
                if not self.evaluating:
                    logs[TOKENS_PER_SECOND] = logs[VALID_TOKENS] * n_steps / self.seconds
                    self.seconds = 0.0
            return host(logs, n_steps)

        return log_callback

    # Events

    def on_step_begin(self) -> None:
        """Set the iteration of a scheduled objective."""
        self.installation.begin(self.trainer.state.iteration + 1)
        self.start = time.perf_counter()

    def on_step_end(self) -> None:
        """Check that the step used the objective. Raises ValueError if not."""
        self.seconds += time.perf_counter() - self.start
        self.installation.check_step()

    def on_eval_begin(self) -> None:
        """Set the iteration of a scheduled objective."""
        self.installation.begin(self.trainer.state.iteration)
        self.evaluating = True

    def on_eval_end(self) -> None:
        """Check the tokens of the evaluation. Raises ValueError for a counted token without a loss."""
        self.evaluating = False
        self.installation.check_tokens()


def check_arguments(args: Any, config: DFTConfig) -> None:
    """Raises ValueError for ms-swift arguments that are incompatible with the objective."""
    if args.enable_dft_loss:
        raise ValueError(
            f"--enable_dft_loss multiplies the loss of {config.loss_type} by the probability once more; remove it"
        )
    if args.rlhf_type is not None or args.task_type != "causal_lm":
        raise ValueError(
            f"{VARIABLE}: expected megatron sft or megatron pt of a causal language model, got --rlhf_type "
            f"{args.rlhf_type} and --task_type {args.task_type}; remove the plugin of megatron_dft"
        )
    compat.check_settings(args, config)


def _with_mask(loss_func: Callable[..., Any], labels: Tensor) -> Callable[..., Any]:
    """ms-swift's loss_func, which counts labels that are not -100, with this mask as an argument."""

    def with_mask(output: Any, *, loss_mask: Tensor) -> Any:
        return loss_func(output)

    return functools.partial(with_mask, loss_mask=labels != IGNORE_INDEX)
