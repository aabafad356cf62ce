"""One training step of a Megatron model in any parallel layout: its time, memory and collectives.

A step is Megatron's train_step: GPTModel, DDP, pipeline schedule and distributed optimizer. Every layout has the same
global batch and the same initial weights, so loss and gradient norm must not depend on the layout. The data resemble
chat data: contiguous masked tokens, whose share differs between samples; two of eight samples have no valid token. Two
of three targets have a probability p of about one half under the model.

The loss stage is everything between the hidden states of the last layer and the loss, forward and backward: output
layer, loss and their collectives. Two module hooks and two gradient hooks mark its begin and end.

Not supported: interleaved pipelines, experts, tied embeddings, data loading.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import math
import os
import re
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from measure import MIB, Collectives, resident
from torch import Tensor

from megatron_dft import DFTConfig, install
from megatron_dft.hosts.binding import with_metrics
from megatron_dft.testing import cpu

EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
Batch = tuple[Tensor, Tensor, Tensor, Tensor]  # tokens, positions, labels, loss mask, all [b, s / cp]


@dataclass(frozen=True)
class Layout:
    """Parallel sizes; the remaining ranks after tp x pp x cp are data-parallel."""

    tp: int = 1
    sp: bool = False
    pp: int = 1
    cp: int = 1

    @staticmethod
    def parse(text: str) -> Layout:
        """Parse "tp2", "tp4sppp2", "pp2cp2", or "dp" for data parallelism alone.

        Raises:
            ValueError: for any other text.
        """
        found = re.fullmatch(r"(?:tp(\d+)(sp)?)?(?:pp(\d+))?(?:cp(\d+))?(?:dp)?", text)
        if not text or not found:
            raise ValueError(f"layout: expected tp (sp), pp, cp with their sizes, as in tp4sppp2, or dp, got {text!r}")
        tp, sp, pp, cp = found.groups()
        return Layout(int(tp or 1), sp is not None, int(pp or 1), int(cp or 1))

    def dp(self, world: int) -> int:
        """Data-parallel size.

        Raises:
            ValueError: if the number of ranks is not a multiple of tp x pp x cp.
        """
        ranks = self.tp * self.pp * self.cp
        if world % ranks:
            raise ValueError(f"{self}: expected a multiple of {ranks} ranks, got {world}")
        return world // ranks


@dataclass(frozen=True)
class Task:
    """Model and batch of the benchmark; batch sizes in samples."""

    hidden: int
    layers: int
    heads: int
    vocab: int
    seq_length: int
    micro_batch: int
    global_batch: int
    dtype: torch.dtype

    def sample(self, index: int) -> Batch:
        """One sample, fields [s]. Of every 32 tokens, the first 40 to 98% or all are masked."""
        generator = torch.Generator().manual_seed(index)
        tokens, unlikely = torch.randint(self.vocab, (2, self.seq_length), generator=generator)
        prompt = 1.0 if index % 8 >= 6 else 0.4 + 0.58 * float(torch.rand((), generator=generator))
        positions = torch.arange(self.seq_length)
        labels = torch.where(positions % 3 == 0, unlikely, tokens)
        masked = positions % 32 < round(32 * prompt)
        return tokens, positions, labels.masked_fill(masked, -100), (~masked).float()

    def valid(self) -> int:
        """Number of valid tokens in the global batch."""
        return int(sum(self.sample(i)[3].sum() for i in range(self.global_batch)))


def start() -> torch.device:
    """Initialize torch.distributed, on the CPU if there is no GPU; return the device. Without torchrun: one rank."""
    logging.getLogger("megatron").setLevel(logging.ERROR)
    one: dict[str, Any] = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    if cpu.requested_by("auto"):
        cpu.enable()
        torch.set_num_threads(1)
        dist.init_process_group("gloo", **one)
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device, **one)
    return device


@contextmanager
def model_parallel(layout: Layout) -> Iterator[dict[str, str]]:
    """Initialize Megatron's parallel state within the context; yield torch group name -> Megatron group name."""
    from megatron.core import parallel_state as state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    layout.dp(dist.get_world_size())
    state.initialize_model_parallel(layout.tp, layout.pp, context_parallel_size=layout.cp)
    model_parallel_cuda_manual_seed(1)
    groups = {
        "world": dist.group.WORLD,
        "tp-pp": state.get_model_parallel_group(),
        "dp-cp": state.get_data_parallel_group(with_context_parallel=True),
        "dp": state.get_data_parallel_group(),
        "cp": state.get_context_parallel_group(),
        "pp": state.get_pipeline_model_parallel_group(),
        "tp": state.get_tensor_model_parallel_group(),
    }
    try:
        yield {group.group_name: name for name, group in groups.items() if group.size() > 1}
    finally:
        state.destroy_model_parallel()


class LossStage:
    """Timestamps of each micro-batch at the begin and end of the loss stage, forward and backward."""

    def __init__(self, model: torch.nn.Module, on_cuda: bool) -> None:
        self.on_cuda = on_cuda
        self.marks: list[Any] = []  # begin, end, begin, end, ...
        model.decoder.register_forward_hook(lambda module, args, hidden: self._mark_boundary(hidden))
        model.register_forward_hook(lambda module, args, loss: self._mark_boundary(loss))

    def _mark_boundary(self, tensor: Tensor) -> None:
        """Mark forward now, and backward when the gradient of the tensor is computed."""
        self._mark()
        tensor.register_hook(lambda gradient: self._mark())

    def _mark(self) -> None:
        self.marks.append(torch.cuda.Event(enable_timing=True) if self.on_cuda else time.perf_counter())
        if self.on_cuda:
            self.marks[-1].record()

    @property
    def inside(self) -> bool:
        return len(self.marks) % 2 == 1

    def take_ms(self) -> float:
        """Time in the loss stage since the last call."""
        pairs = list(zip(self.marks[::2], self.marks[1::2], strict=True))
        self.marks.clear()
        return sum(begin.elapsed_time(end) if self.on_cuda else 1e3 * (end - begin) for begin, end in pairs)


class Training:
    """Model, optimizer and batches of this rank."""

    def __init__(self, task: Task, layout: Layout, config: DFTConfig, device: torch.device) -> None:
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

        self.task, self.device = task, device
        self.before = memory(device)
        model = gpt(task, layout, device)
        install([model], config)
        self.loss_stage = LossStage(model, device.type == "cuda") if model.post_process else None
        wrapped, settings = float16_module(model) if task.dtype == torch.bfloat16 else model, model.config
        data_parallel = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
        self.model = DistributedDataParallel(settings, data_parallel, wrapped)
        adam = OptimizerConfig(lr=1e-4, bf16=settings.bf16, params_dtype=task.dtype, use_distributed_optimizer=True)
        self.optimizer = get_megatron_optimizer(adam, [self.model])
        self.forward_step = with_metrics(forward_step, config)
        self.batches = list(micro_batches(task, layout, device))

    def first_step(self) -> tuple[float, float, list[tuple[str, str, str, int]]]:
        """NLL per token and gradient norm of the global batch, and the `Collectives.calls` of this rank."""
        with Collectives(lambda: "loss" if self.loss_stage and self.loss_stage.inside else "rest") as seen:
            reports, grad_norm = self._step()
        if self.loss_stage:
            self.loss_stage.take_ms()
        zero = torch.zeros(2, dtype=torch.float64, device=self.device)
        # Ranks of the last stage have a report; tensor-parallel ranks have equal ones.
        sums = sum((report["lm loss"].double() for report in reports), zero)
        dist.all_reduce(sums)
        return float(sums[0] / sums[1]), float(grad_norm), seen.calls

    def timed_step(self) -> tuple[float, float, list[float]]:
        """ms of a step and of its loss stage, each on its slowest rank; peak MiB of every rank."""
        dist.barrier()
        reset_peak_memory(self.device)
        begin = time.perf_counter()
        self._step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        step_ms = 1e3 * (time.perf_counter() - begin)
        peak_mib = (memory(self.device, peak=True) - self.before) / MIB
        times = torch.tensor([step_ms, self.loss_stage.take_ms() if self.loss_stage else 0.0], device=self.device)
        dist.all_reduce(times, dist.ReduceOp.MAX)
        peaks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(peaks, peak_mib)
        return float(times[0]), float(times[1]), peaks

    def _step(self) -> tuple[list[dict[str, Tensor]], float]:
        """Reports of this rank's micro-batches (last stage only), and the gradient norm."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        reports = get_forward_backward_func()(
            forward_step_func=self.forward_step,
            data_iterator=iter(self.batches),
            model=[self.model],
            num_microbatches=len(self.batches),
            seq_length=self.task.seq_length,
            micro_batch_size=self.task.micro_batch,
            forward_only=False,
        )
        return reports, self.optimizer.step()[1]


def gpt(task: Task, layout: Layout, device: torch.device) -> Any:
    """This rank's shard of the model."""
    from megatron.core import parallel_state as state
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.models.gpt import GPTModel, gpt_layer_specs
    from megatron.core.transformer import TransformerConfig

    engine = device.type == "cuda" and gpt_layer_specs.HAVE_TE
    spec = "get_gpt_layer_with_transformer_engine_spec" if engine else "get_gpt_layer_local_spec"
    settings = TransformerConfig(
        num_layers=task.layers,
        hidden_size=task.hidden,
        num_attention_heads=task.heads,
        tensor_model_parallel_size=layout.tp,
        sequence_parallel=layout.sp,
        pipeline_model_parallel_size=layout.pp,
        context_parallel_size=layout.cp,
        pipeline_dtype=task.dtype,
        params_dtype=task.dtype,
        bf16=task.dtype == torch.bfloat16,
        calculate_per_token_loss=True,
        finalize_model_grads_func=finalize_model_grads,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=device.type == "cpu",
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        bias_activation_fusion=False,
    )
    model = GPTModel(
        settings,
        getattr(gpt_layer_specs, spec)(),
        task.vocab,
        task.seq_length,
        pre_process=state.is_pipeline_first_stage(),
        post_process=state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
    )
    same_weights(model, layout)
    return model.to(device)


@torch.no_grad()
def same_weights(model: Any, layout: Layout) -> None:
    """Initialize every matrix from its own seed, so that all layouts have shards of the same weights.

    The output layer equals the embedding, and both have large values: the untrained model predicts its input token.
    """
    from megatron.core import parallel_state as state

    scales = {EMBEDDING: 1.0, OUTPUT: math.log(model.vocab_size) / model.config.hidden_size}
    before = model.decoder.layers[0].layer_number - 1  # layers on earlier stages
    for name, matrix in model.named_parameters():
        if matrix.dim() < 2:
            continue  # norms and biases are initialized to ones and zeros
        scale = scales.get(name, model.config.init_method_std)
        name = re.sub(r"layers\.(\d+)", lambda found: f"layers.{int(found[1]) + before}", name)
        seed = zlib.crc32((EMBEDDING if name == OUTPUT else name).encode())
        shards = layout.tp if getattr(matrix, "tensor_model_parallel", False) else 1
        shape = list(matrix.shape)
        shape[getattr(matrix, "partition_dim", 0)] *= shards
        generator = torch.Generator(matrix.device).manual_seed(seed)
        whole = torch.empty(shape, device=matrix.device).normal_(0.0, scale, generator=generator)
        rank = state.get_tensor_model_parallel_rank() if shards > 1 else 0
        matrix.copy_(whole.chunk(shards, matrix.partition_dim)[rank] if shards > 1 else whole)


def float16_module(model: Any) -> torch.nn.Module:
    from megatron.core.transformer.module import Float16Module

    return Float16Module(model.config, model)


def micro_batches(task: Task, layout: Layout, device: torch.device) -> Iterator[Batch]:
    """Micro-batches of this data-parallel rank; context-parallel rank r has chunks r and 2 cp - 1 - r of 2 cp."""
    from megatron.core import parallel_state as state

    rank, ranks = state.get_data_parallel_rank(), layout.dp(dist.get_world_size())
    cp_rank = state.get_context_parallel_rank()
    for first in range(rank * task.micro_batch, task.global_batch, ranks * task.micro_batch):
        samples = zip(*map(task.sample, range(first, first + task.micro_batch)), strict=True)
        whole = (torch.stack(field) for field in samples)
        chunks = (field.chunk(2 * layout.cp, dim=1) for field in whole)
        yield tuple(torch.cat((c[cp_rank], c[-1 - cp_rank]), dim=1).to(device) for c in chunks)  # type: ignore[misc]


def forward_step(batches: Iterator[Batch], model: torch.nn.Module) -> tuple[Tensor, partial]:
    """Megatron's forward_step."""
    tokens, positions, labels, loss_mask = next(batches)
    output = model(tokens, positions, None, labels=labels, loss_mask=loss_mask)
    return output, partial(loss_func, loss_mask)


def loss_func(loss_mask: Tensor, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum of the losses, number of tokens, and the report [sum, count]."""
    loss, num_tokens = (output * loss_mask).sum(), loss_mask.sum()
    return loss, num_tokens.to(torch.int), {"lm loss": torch.stack([loss.detach(), num_tokens])}


def memory(device: torch.device, peak: bool = False) -> int:
    """Bytes allocated by this rank, now or at the peak, without cached free memory."""
    on_cuda = device.type == "cuda"
    if peak:
        return torch.cuda.max_memory_allocated() if on_cuda else resident("VmHWM")
    gc.collect()  # of models with references to themselves
    if on_cuda:
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)
    return resident("VmRSS")


def reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")
