"""NeMo 2 (nemo-toolkit 2.7): the loss in recipes of `nemo.collections.llm`.

    with_dft     a NeMo-Run recipe -> the same recipe, trained with another objective
    dft          the same for YAML files and NeMo-Run's command line: "trainer.callbacks+=": "[...nemo.dft(...)]"
    DFTCallback  what both add: a Lightning callback

NeMo's events of a Megatron step are the one place that comes after adapters, DDP and mixed precision, and the one that
sees each micro-batch. So the callback installs the loss in the first of them; masks the labels of each micro-batch;
adds up the metrics of its output; logs their means. NeMo's own loss reduction is left alone: `reduced_train_loss` and
`val_loss` stay the NLL.

Nothing of ours is stored in the context of a checkpoint, which then loads where megatron_dft is not installed. Left
out: what NeMo does not tell its callbacks, such as a captured CUDA graph of the whole iteration. There are no LLMs in
NeMo 3: Megatron-Bridge has taken them over.
"""

# NeMo-Run reads annotations as they stand: no `from __future__ import annotations` here.
import dataclasses
import inspect
from importlib import metadata
from typing import Any, Optional

import torch
from torch import Tensor

from megatron_dft.config import DFTConfig, load_function
from megatron_dft.hosts.hook import Installation, install
from megatron_dft.hosts.loss_head import LossHead, ignore_masked
from megatron_dft.metrics import token_metrics

try:
    import nemo.collections.llm  # noqa: F401
    import nemo_run as run
    from lightning.pytorch import Callback
    from nemo.lightning import io
except ModuleNotFoundError as error:
    try:
        found = f"nemo-toolkit {metadata.version('nemo-toolkit')}"
    except metadata.PackageNotFoundError:
        found = "none"
    raise ImportError(
        f"expected NeMo 2 with nemo.collections.llm, whose last release is nemo-toolkit 2.7.3, got {found} ({error}); "
        "for NeMo 3 use Megatron-Bridge: python -m megatron_dft.bridge"
    ) from error


class DFTCallback(Callback, io.IOMixin):
    """Trains the Megatron model of a NeMo trainer with an objective. The arguments are the fields of DFTConfig.

    Raises:
        ValueError: for a setting that is not possible, at once; for a model or layout with which the objective cannot
            be computed, before the first step.
    """

    def __init__(
        self,
        loss_type: str = "dft",
        mtp: str = "nll",
        true_vocab_size: Optional[int] = None,  # noqa: UP045 (the form that NeMo-Run reads)
        backend: str = "auto",
        inplace_backward: bool = True,
        compact_masked_tokens: Optional[bool] = None,  # noqa: UP045
        linear_fused: bool = False,
        vocab_chunk: Optional[int] = None,  # noqa: UP045
        keep_chunks: int = 0,
        metrics: str = "basic",
        channels: Optional[str] = None,  # noqa: UP045
        callback: Optional[str] = None,  # noqa: UP045
    ) -> None:
        given = locals()
        self.config = DFTConfig(**{f.name: given[f.name] for f in dataclasses.fields(DFTConfig)})
        self.callback = load_function(callback, "callback") if callback else None
        self.installation: Installation | None = None
        self.sums: dict[str, Tensor] = {}  # of the micro-batches of a step, [sum, count] each
        self.names: list[str] | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave no trace in what the trainer stores of itself."""
        stored: Any = getattr(trainer, "__io__", None)
        callbacks = getattr(stored, "callbacks", None)
        if isinstance(callbacks, list):
            stored.callbacks = [callback for callback in callbacks if not _makes(callback, type(self))]

    def on_megatron_step_start(self, step: Any) -> None:
        """Of a global batch, in training and validation."""
        if not self.config.enabled:
            return
        if self.installation is None:
            self.installation = install([_megatron_model(chunk) for chunk in step.pipeline], self.config)
        self.sums = {}
        self.config.objective.begin(step.trainer.global_step + (0 if step.forward_only else 1))

    def on_megatron_microbatch_start(self, step: Any, batch: Any, forward_callback: Any) -> None:
        """Before the model's forward pass. NeMo passes it labels, of masked tokens too, and no mask."""
        if self.config.enabled and isinstance(batch, dict):
            batch.update(ignore_masked(batch))
        for head in self._heads():
            head.start()

    def on_megatron_microbatch_end(self, step: Any, batch: Any, forward_callback: Any, output: Any) -> None:
        """After it, with the model's output."""
        taken = [head.take() for head in self._heads()]
        loss_mask = batch.get("loss_mask") if isinstance(batch, dict) else None
        for micro_batch in taken:
            if micro_batch is None or loss_mask is None or loss_mask.numel() != micro_batch.shape.numel():
                continue  # of another chunk of the pipeline, or not of these tokens: refused at the end of the step
            if self.callback is not None:
                self.callback(micro_batch.tokens(loss_mask, torch.is_grad_enabled()))
            detail, stats, weights = self.config.detail, micro_batch.stats, micro_batch.pick(loss_mask)
            channel = micro_batch.inputs.channel
            pairs = token_metrics(stats, self.config.objective, weights)
            sums = detail.sums(stats, weights, None if channel is None else micro_batch.pick(channel))
            pairs |= zip(detail.names, sums, strict=True)
            for name, pair in pairs.items():
                self.sums[name] = self.sums.get(name, 0.0) + pair.double()

    def _heads(self) -> list[LossHead]:
        """The losses on this rank."""
        return [] if self.installation is None else [binding.head for binding in self.installation.bindings]

    def on_megatron_step_end(self, step: Any, microbatch_outputs: Any, reduced: Any = None) -> None:
        """Log means over all tokens of the batch, on the ranks that NeMo logs from."""
        if not self.config.enabled:
            return
        for head in self._heads():
            head.check_trained()
        prefix = "val " if step.forward_only else ""
        pairs, detail = self._over_all_ranks(), self.config.detail
        details = torch.stack([pairs.pop(name) for name in detail.names]) if detail.names else torch.empty(0, 2)
        means = {name: total / count for name, (total, count) in pairs.items()}
        for name, value in (means | detail.values(details)).items():
            step.pl_module.log(f"{prefix}{name}", value, prog_bar=True, batch_size=1)

    def _over_all_ranks(self) -> dict[str, Tensor]:
        """[sum, count] of each metric over data- and context-parallel ranks, on every stage of the pipeline."""
        from megatron.core import parallel_state

        last, stages = (
            parallel_state.get_pipeline_model_parallel_last_rank(),
            parallel_state.get_pipeline_model_parallel_group(),
        )
        if torch.distributed.get_rank() == last and not self.sums:
            raise ValueError(
                "DFTCallback: expected a per-token loss [b, s] from the model, and a loss mask of its shape in each "
                "batch, got neither in this step; use a text model and data set of nemo.collections.llm"
            )
        if self.names is None:
            box = [list(self.sums)]
            torch.distributed.broadcast_object_list(box, src=last, group=stages)
            self.names = box[0]
        device = torch.device("cuda", torch.cuda.current_device())
        pairs = torch.zeros(len(self.names), 2, device=device, dtype=torch.float64)
        if self.sums:
            pairs = torch.stack([self.sums[name] for name in self.names])
        torch.distributed.all_reduce(pairs, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        torch.distributed.broadcast(pairs, src=last, group=stages)
        return dict(zip(self.names, pairs, strict=True))


def dft(*args: Any, **settings: Any) -> run.Config[DFTCallback]:
    """The callback as a part of a recipe; arguments as for DFTCallback."""
    return run.Config(DFTCallback, *args, **settings)


_parameters = list(inspect.signature(DFTCallback.__init__).parameters.values())[1:]
dft.__signature__ = inspect.Signature(_parameters, return_annotation=run.Config[DFTCallback])  # type: ignore[attr-defined]
dft.__annotations__ = {p.name: p.annotation for p in _parameters} | {"return": run.Config[DFTCallback]}


def with_dft(recipe: Any, **settings: Any) -> Any:
    """Train a recipe with an objective.

    Args:
        recipe: a run.Partial of llm.finetune or llm.pretrain, e.g. llm.llama3_8b.finetune_recipe(). It is changed:
            the callback is added; Transformer Engine's cross entropy gives way to Megatron's; under context parallelism
            the loss is divided by the tokens of all ranks. What is changed is printed.
        settings: fields of DFTConfig; loss_type is "dft" unless given, and "ce" changes nothing.

    Returns:
        The recipe.
    """
    settings = {"loss_type": "dft", **settings}
    if not DFTConfig.from_mapping(settings).enabled:
        return recipe
    model, strategy = recipe.model.config, recipe.trainer.strategy
    if getattr(model, "cross_entropy_fusion_impl", None) == "te":
        _set(model, "cross_entropy_fusion_impl", "native")
    if (getattr(strategy, "context_parallel_size", None) or 1) > 1:
        _set(model, "calculate_per_token_loss", True)
        if getattr(strategy.ddp, "average_in_collective", None):
            _set(strategy.ddp, "average_in_collective", False)
    callbacks = recipe.trainer.callbacks or []
    recipe.trainer.callbacks = [*(callbacks if isinstance(callbacks, list) else [callbacks]), dft(**settings)]
    return recipe


def _set(owner: Any, name: str, value: Any) -> None:
    before = getattr(owner, name, None)
    if before != value:
        setattr(owner, name, value)
        print(f"> megatron_dft: {name}: {before} -> {value}")


def _makes(stored: Any, kind: type) -> bool:
    """Whether this is the callback, or the configuration of one."""
    return isinstance(stored, kind) or getattr(stored, "__fn_or_cls__", None) is kind


def _megatron_model(chunk: Any) -> Any:
    """Megatron's own module, below DDP, Float16Module and Lightning, which answer for its attributes."""
    while "module" in chunk._modules:
        chunk = chunk._modules["module"]
    return chunk
