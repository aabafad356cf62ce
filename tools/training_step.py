"""Seconds per training step of a small GPT on a CPU: Megatron's loss against ours, in one process.

    python tools/training_step.py        writes a file in tools/results/

Megatron's own GPTModel (hidden size 512, 4 layers, 32000 words, fp32), one rank, 512 tokens of which 70% are masked in
stretches, as prompts are; forward, report, backward and Adam. The candidates start from the same weights and take
turns; all must come to the same NLL in the first step. With the stock loss DFT is the one line that its users write.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from measure import conditions
from torch import Tensor

from megatron_dft import DFTConfig, install
from megatron_dft.hosts import cpu
from megatron_dft.hosts.hook import with_metrics
from megatron_dft.hosts.iterations import Tally

HIDDEN, LAYERS, VOCAB = 512, 4, 32000
SEQUENCE, BATCH = 256, 2
CANDIDATES = {  # how the loss is installed; None: not at all
    "Megatron": None,
    "ours": {},
    "ours, full metrics, 3 channels": {"metrics": "full", "channels": "maths,code,chat"},
    "ours, in chunks": {"linear_fused": True},
    "ours, masked tokens not dropped": {"compact_masked_tokens": False},
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--masked", type=float, default=0.7, help="share of masked tokens")
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--out", type=Path, help="default: tools/results/DEVICE-DATE-step.csv")
    wanted = parser.parse_args(arguments)
    facts = conditions(torch.device("cpu"))
    name = f"{str(facts['device']).replace(' ', '-')}-{facts['date']}-step.csv"
    path = wanted.out or Path(__file__).resolve().parent / "results" / name

    start()
    steps = {name: training(options, wanted.masked) for name, options in CANDIDATES.items()}
    first = {name: step() for name, step in steps.items()}
    torch.testing.assert_close(list(first.values()), [first["Megatron"]] * len(first), rtol=1e-5, atol=0.0)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(wanted.repetitions):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - begin)
    with open(path, "w", newline="") as file:
        columns = ["tokens", "masked", "repetitions", "implementation", "step_ms", "spread_ms"]
        writer = csv.DictWriter(file, [*facts, *columns])
        writer.writeheader()
        for name, taken in seconds.items():
            quarters = statistics.quantiles(taken, n=4)
            row = {"tokens": SEQUENCE * BATCH, "masked": wanted.masked, "repetitions": wanted.repetitions}
            row |= {"step_ms": round(1e3 * statistics.median(taken), 1)}
            row |= {"spread_ms": round(1e3 * (quarters[2] - quarters[0]), 1)}
            writer.writerow(facts | row | {"implementation": name})
            print(f"{name:32} {row['step_ms']:9.1f} ms")
    base, full = list(CANDIDATES)[1:3]
    apart = [after - before for before, after in zip(seconds[base], seconds[full], strict=True)]
    share = statistics.median(apart) / statistics.median(seconds[base])
    print(f"\n{full}: {1e3 * statistics.median(apart):+.1f} ms, {share:+.1%}, median of the rounds\n{path}")
    return 0


def start() -> None:
    """One CPU rank."""
    cpu.enable()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    store = torch.distributed.FileStore(tempfile.mktemp(), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)


def training(options: dict | None, masked: float) -> Callable[[], float]:
    """One step of training, which returns the mean NLL before it."""
    model = gpt()
    config = DFTConfig() if options is None else DFTConfig("dft", **options)
    install([model], config)
    forward_step = with_metrics(forward, config, Tally(config.detail).add)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    micro_batch = batch(masked)

    def step() -> float:
        output, loss_func = forward_step(micro_batch, model)
        loss, num_tokens, report = loss_func(output)
        if options is None:
            loss = (output * torch.exp(-output).detach() * micro_batch[2]).sum()
        (loss / num_tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(report["lm loss"][0] / report["lm loss"][1])

    return step


def forward(micro_batch: tuple[Tensor, Tensor, Tensor], model: torch.nn.Module) -> tuple[Tensor, Callable]:
    """A forward_step in Megatron's form."""
    tokens, labels, loss_mask = micro_batch
    positions = torch.arange(SEQUENCE).expand(BATCH, -1)
    causal = torch.ones(1, 1, SEQUENCE, SEQUENCE).triu(1).bool()
    return model(tokens, positions, causal, labels=labels, loss_mask=loss_mask), partial(loss_func, loss_mask)


def loss_func(loss_mask: Tensor, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum of the losses, number of tokens, and the report as [sum, count]."""
    loss, num_tokens = (output * loss_mask).sum(), loss_mask.sum()
    return loss, num_tokens.to(torch.int), {"lm loss": torch.stack([loss.detach(), num_tokens])}


def gpt() -> torch.nn.Module:
    """The same weights on every call."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    torch.manual_seed(1)
    config = TransformerConfig(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        num_attention_heads=8,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        bias_activation_fusion=False,
    )
    options = {"share_embeddings_and_output_weights": False, "position_embedding_type": "rope"}
    return GPTModel(config, get_gpt_layer_local_spec(), VOCAB, SEQUENCE, **options)


def batch(masked: float) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, labels and loss mask [b, s]; masked tokens have label -100, as those of chat data."""
    generator = torch.Generator().manual_seed(0)
    tokens, labels = torch.randint(VOCAB, (2, BATCH, SEQUENCE), generator=generator)
    prompt = torch.arange(SEQUENCE) % 64 < round(64 * masked)
    loss_mask = (~prompt).float().expand(BATCH, -1).contiguous()
    labels = labels.masked_fill(prompt, -100)
    return tokens, labels, loss_mask


if __name__ == "__main__":
    sys.exit(main())
