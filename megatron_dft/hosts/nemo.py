"""NeMo 2 (nemo-toolkit 2.7): the loss in recipes of `nemo.collections.llm`.

    with_dft     sets the objective of a NeMo-Run recipe
    dft          the same for YAML files and NeMo-Run's command line: "trainer.callbacks+=": "[dft(...)]"
    DFTCallback  the Lightning callback that both add

The callback handles NeMo's events of a Megatron step. They come after adapters, DDP and mixed precision, and include
each micro-batch. In the first step the callback installs the loss. It masks the labels of each micro-batch, sums the
metrics of its output and logs their means. It does not change NeMo's loss reduction: `reduced_train_loss` and
`val_loss` stay the NLL.

The context of a checkpoint contains nothing of megatron_dft, so it loads where megatron_dft is not installed. Not
supported: runs without these events, such as a CUDA graph of the whole iteration. NeMo 3 has no LLMs: use
Megatron-Bridge.
"""

# NeMo-Run evaluates annotations at runtime: no `from __future__ import annotations` here.
import dataclasses
import inspect
from importlib import metadata
from typing import Any, Optional

import torch
from torch import Tensor

from megatron_dft.config import DFTConfig
from megatron_dft.hosts.binding import Installation, install
from megatron_dft.hosts.loss_head import LossHead, ignore_masked
from megatron_dft.metrics import token_metrics
from megatron_dft.utils import load_function

try:
    import nemo.collections.llm as llm
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
        "for NeMo 3 use Megatron-Bridge: python -m megatron_dft.launch_bridge"
    ) from error


class DFTCallback(Callback, io.IOMixin):
    """Train the Megatron model of a NeMo trainer with an objective. The arguments are the fields of DFTConfig.

    Raises:
        ValueError: for an invalid setting. Before the first step: for a model or layout that is incompatible with the
            objective.
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
        token_chunk: Optional[int] = None,  # noqa: UP045
        weights: bool = False,
        reduction: str = "token",
        metrics: str = "basic",
        channels: Optional[str] = None,  # noqa: UP045
        callback: Optional[str] = None,  # noqa: UP045
    ) -> None:
        given = locals()
        self.config = DFTConfig(**{f.name: given[f.name] for f in dataclasses.fields(DFTConfig)})
        if self.config.of_reference:
            raise ValueError(
                f"loss_type {loss_type}: the data sets of NeMo carry no reference "
                "log-probabilities; use another loss_type, or Megatron-LM or Megatron-Bridge"
            )
        if self.config.by_conversation:
            raise ValueError(
                f"reduction {reduction}: NeMo divides by the number of tokens; remove it, or use Megatron-LM or "
                "Megatron-Bridge"
            )
        self.callback = load_function(callback, "callback") if callback else None
        self.installation: Installation | None = None
        self.sums: dict[str, Tensor] = {}  # [sum, count] of each metric over the micro-batches of a step
        self.names: list[str] | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Remove this callback from the configuration that the trainer stores in checkpoints."""
        stored: Any = getattr(trainer, "__io__", None)
        callbacks = getattr(stored, "callbacks", None)
        if isinstance(callbacks, list):
            stored.callbacks = [callback for callback in callbacks if not _is_callback(callback, type(self))]

    def on_megatron_step_start(self, step: Any) -> None:
        """Start a global batch of training or validation; the first one installs the loss."""
        if not self.config.enabled:
            return
        if self.installation is None:
            self.installation = install([_megatron_model(chunk) for chunk in step.pipeline], self.config)
        self.sums = {}
        self.installation.begin(step.trainer.global_step + (0 if step.forward_only else 1))

    def on_megatron_microbatch_start(self, step: Any, batch: Any, forward_callback: Any) -> None:
        """Mask the labels before the model's forward pass. NeMo passes the model all labels and no loss mask."""
        if self.config.enabled and isinstance(batch, dict):
            batch.update(ignore_masked(batch))
        for head in self._heads():
            head.start()

    def on_megatron_microbatch_end(self, step: Any, batch: Any, forward_callback: Any, output: Any) -> None:
        """Add the metrics of the micro-batch, after the model's forward pass."""
        taken = [head.take() for head in self._heads()]
        loss_mask = batch.get("loss_mask") if isinstance(batch, dict) else None
        for micro_batch in taken:
            if micro_batch is None or loss_mask is None or loss_mask.numel() != micro_batch.shape.numel():
                continue  # no per-token loss of this batch on this chunk; the end of the step raises if none was found
            if self.callback is not None:
                self.callback(micro_batch.tokens(loss_mask, torch.is_grad_enabled()))
            spec, stats, mask = self.config.metric_spec, micro_batch.stats, micro_batch.pick(loss_mask)
            pairs = token_metrics(stats, micro_batch.objective, mask, micro_batch.weight)
            sums = spec.sums(stats, mask, micro_batch.channel)
            pairs |= zip(spec.names, sums, strict=True)
            for name, pair in pairs.items():
                self.sums[name] = self.sums.get(name, 0.0) + pair.double()

    def _heads(self) -> list[LossHead]:
        """The loss heads on this rank."""
        return [] if self.installation is None else [binding.head for binding in self.installation.bindings]

    def on_megatron_step_end(self, step: Any, microbatch_outputs: Any, reduced: Any = None) -> None:
        """Log means over all tokens of the global batch, on the ranks that NeMo logs from."""
        if not self.config.enabled:
            return
        if self.installation is not None:
            self.installation.check_step()
            self.installation.check_tokens()
        prefix = "val_" if step.forward_only else ""
        pairs, spec = self._over_all_ranks(), self.config.metric_spec
        configured = torch.stack([pairs.pop(name) for name in spec.names]) if spec.names else torch.empty(0, 2)
        means = {name: total / count for name, (total, count) in pairs.items()}
        for name, value in (means | spec.values(configured)).items():
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
                "DFTCallback: the model returned no per-token loss [b, s], or the batch has no loss_mask of that "
                "shape; use a text model and data set of nemo.collections.llm"
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
    """The callback as a run.Config for a recipe; arguments as for DFTCallback."""
    return run.Config(DFTCallback, *args, **settings)


_parameters = list(inspect.signature(DFTCallback.__init__).parameters.values())[1:]
dft.__signature__ = inspect.Signature(_parameters, return_annotation=run.Config[DFTCallback])  # type: ignore[attr-defined]
dft.__annotations__ = {p.name: p.annotation for p in _parameters} | {"return": run.Config[DFTCallback]}


def with_dft(recipe: Any, **settings: Any) -> Any:
    """Train a recipe with an objective.

    Args:
        recipe: a run.Partial of llm.finetune or llm.pretrain, e.g. llm.llama3_8b.finetune_recipe(). It is changed in
            place: the callback is added, and Megatron's cross entropy replaces Transformer Engine's. Under context
            parallelism the loss is divided by the tokens of all ranks. Changed settings are printed.
        settings: fields of DFTConfig. The default of loss_type is "dft"; "ce" changes nothing.

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


def _recipe_of(command: Any) -> Any:
    """The NeMo-Run factory of a command: (name of a recipe, fields of DFTConfig) -> recipe with an objective."""

    def with_objective(recipe: str, **settings: Any) -> run.Partial:
        try:
            factory = run.cli.resolve_factory(command, recipe)
        except ValueError:
            known = f"see nemo llm {command.__name__} --help"
            raise ValueError(f"recipe={recipe}: no recipe of this name for {command.__name__}; {known}") from None
        return with_dft(factory(), **settings)

    name = inspect.Parameter("recipe", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=str)
    with_objective.__signature__ = inspect.Signature([name, *_parameters], return_annotation=run.Partial)  # type: ignore[attr-defined]
    with_objective.__annotations__ = {p.name: p.annotation for p in (name, *_parameters)} | {"return": run.Partial}
    return with_objective


# Names on NeMo-Run's command line, which imports this module through its entry point, nemo_names.py.
run.cli.factory(dft, target=Callback, name="dft")
for _command in (llm.finetune, llm.pretrain):
    run.cli.factory(_recipe_of(_command), target=_command, name="dft")


def _set(owner: Any, name: str, value: Any) -> None:
    before = getattr(owner, name, None)
    if before != value:
        setattr(owner, name, value)
        print(f"> megatron_dft: {name}: {before} -> {value}")


def _is_callback(stored: Any, kind: type) -> bool:
    """Whether `stored` is a callback of this kind, or its configuration."""
    return isinstance(stored, kind) or getattr(stored, "__fn_or_cls__", None) is kind


def _megatron_model(chunk: Any) -> Any:
    """Megatron's own module, below DDP, Float16Module and Lightning, which forward its attributes."""
    while "module" in chunk._modules:
        chunk = chunk._modules["module"]
    return chunk
