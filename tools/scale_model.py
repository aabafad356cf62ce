"""What the loss costs at scale, by counting: time, memory and its weight in the pipeline, for four ways to compute it.

    python tools/scale_model.py --model "Llama 3 70B" --cluster H200 --masked 0.5      tables for one model
    python tools/scale_model.py --layers 48 --hidden 6144 --cp 4 --seq-length 65536    any value by its flag
    python tools/scale_model.py --check tools/results/DEVICE-DATE-layouts.csv          against measured steps
    python tools/scale_model.py --docs                                                 write docs/scale.md

The loss stage is what the last pipeline stage does beyond its layers: output layer and loss, forward and backward. A
micro-batch has n tokens on a context-parallel rank, and r of them pass the output layer: all, or where masked tokens
are dropped n (1 - f). With c = V / tp columns and hidden size H, on one rank:

    products      6 r H c FLOP: forward, gradient of hidden states, of weight; in chunks 8, as forward runs twice
    loss          b r c bytes: b = 52 for Megatron's loss, 51 for its fused one, 6 for ours, and 2 for tokens that are
                  masked but not dropped (README, "How it compares")
    weight        12 H c bytes whatever r is: read twice in bf16, its fp32 gradient read and written; in chunks 14
    hidden        8 r H + 2 n H bytes where r < n, rows picked and put back (compaction.py); in chunks 10 r H for each
                  of the chunks of 8192 columns, the fp32 sum of the hidden gradient (linear.py)
    collectives   `calls`, which the tests hold against counted ones. In a ring an all-gather of x bytes a rank sends
                  (tp - 1) x, a reduce-scatter (tp - 1) / tp x, an all-reduce twice that; time is latency + sent /
                  bandwidth, and beside a product what exceeds that product
    memory        logits 2 r c bytes, beyond them 6 r c for Megatron's loss, 10 for the fused one, none for ours, which
                  overwrites them; in chunks 2 r min(c, 8192) + 4 r H; 2 n H gathered hidden states

A transformer layer (RMSNorm, grouped-query attention of widths q and k, gated MLP of width F), all divided by tp:

    products      6 H (2 q + 2 k + 3 F) FLOP per token, and 7 q s of causal attention over s tokens, whose forward runs
                  once more in backward (FlashAttention-2, arXiv:2307.08691)
    elementwise   52 H + 22 F + 8 (q + k) bytes per token: norms, residuals, activation, rotary embedding in bf16
    collectives   of the gathers and scatters of sequence parallelism 6 are beside no product (arXiv:2205.05198)
    memory        4 (H + q + k + F) bytes per token; norms and activation functions are computed again (selective
                  recomputation, same source)

A stage has layers / pp of them, the last one the loss stage too. In 1F1B a step takes the sum of all stages, and m - 1
times the slowest one. So the share of the loss in a step is what would be saved if it were free, and t_loss / t_layer
is how many layers fewer than the others the last stage must hold in order not to be the slowest. A weight takes 6 bytes
(bf16, and an fp32 gradient) and 12 / (dp cp) of Adam's sharded state.

Left out: what does not depend on the loss or overlaps in a tuned run (data-parallel collectives, optimizer, sends
between stages, embedding), launches of kernels, padding of the vocabulary. Layers run here at the rate of large
products and in practice below it, so shares of a step are upper bounds.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

from report import BYTES_PER_US, LATENCY_US

from megatron_dft import parse_objective
from megatron_dft.linear import VOCAB_CHUNK

GPUS = [2**i for i in range(3, 13)]
ROOM = 0.9  # of the memory may be planned


@dataclass(frozen=True)
class Cluster:
    """Sustained rates of one GPU, and what joins them."""

    name: str
    flop_per_s: float  # large bf16 products
    memory_bytes_per_s: float  # of a copy, reading and writing
    memory_gb: float
    intra_bytes_per_s: float  # one direction, within a node
    inter_bytes_per_s: float = 45e9  # of a port of 400 Gb/s
    intra_latency_us: float = LATENCY_US
    inter_latency_us: float = 2 * LATENCY_US
    gpus_per_node: int = 8


@dataclass(frozen=True)
class Model:
    """Sizes; `q` and `k` are the widths of queries and of keys."""

    name: str
    hidden: int
    ffn: int
    layers: int
    q: int
    k: int
    vocab: int

    @property
    def layer_weights(self) -> int:
        return self.hidden * (2 * self.q + 2 * self.k + 3 * self.ffn)


@dataclass(frozen=True)
class Layout:
    tp: int = 1
    pp: int = 1
    cp: int = 1
    dp: int = 1


@dataclass(frozen=True)
class Batch:
    """Samples, and the share of masked tokens."""

    seq_length: int = 8192
    micro_batch: int = 1
    global_batch: int = 512
    masked: float = 0.7

    def tokens(self, layout: Layout) -> int:
        """Of a micro-batch on a rank."""
        return self.seq_length * self.micro_batch // layout.cp

    def micro_batches(self, layout: Layout) -> int:
        """Of a pipeline in a step. At least one: more pipelines than samples enlarge the batch."""
        return max(1, self.global_batch // (self.micro_batch * layout.dp))


@dataclass(frozen=True)
class Way:
    """One way to compute the loss."""

    name: str  # in the files of benchmark_layouts.py
    logit_bytes: int
    masked_logit_bytes: int
    extra_bytes: int  # of memory, per logit
    reductions: tuple[tuple[str, int], ...]  # collective, fp32 values per token
    drops: bool = False
    chunk: int = 0

    def rows(self, tokens: float, live: float) -> float:
        """Tokens that pass the output layer, of those in all and those that are not masked."""
        return live if self.drops else tokens


STOCK = Way("Megatron", 52, 52, 6, (("all_reduce", 1),) * 3)
FUSED = Way("Megatron, fused", 51, 51, 10, (("all_reduce", 1), ("all_reduce", 2)))
OURS = Way("ours", 6, 2, 0, (("all_gather", 3),))
DROPPED = replace(OURS, name="ours, masked tokens dropped", drops=True)
CHUNKS = replace(DROPPED, name="ours, in chunks", chunk=VOCAB_CHUNK)
FULL_METRICS = replace(DROPPED, name="ours, full metrics", reductions=(("all_gather", 5),))
WAYS = (STOCK, FUSED, OURS, DROPPED, CHUNKS)

CLUSTERS = (
    Cluster("H100", 790e12, 3.0e12, 80, 1e6 * BYTES_PER_US),
    Cluster("H200", 790e12, 4.3e12, 141, 1e6 * BYTES_PER_US),
    Cluster("B200", 1800e12, 7.2e12, 180, 2e6 * BYTES_PER_US),
)
MODELS = (
    Model("Llama 3 8B", hidden=4096, ffn=14336, layers=32, q=4096, k=1024, vocab=128256),
    Model("Qwen3-32B", hidden=5120, ffn=25600, layers=64, q=8192, k=1024, vocab=151936),
    Model("Llama 3 70B", hidden=8192, ffn=28672, layers=80, q=8192, k=1024, vocab=128256),
    Model("Llama 3 405B", hidden=16384, ffn=53248, layers=126, q=16384, k=1024, vocab=128256),
)


def way_of(implementation: str) -> Way:
    """By its name in the files of benchmark_layouts.py. "ours: OBJECTIVE" drops masked tokens.

    Raises:
        ValueError: for another name.
    """
    named = {way.name: way for way in (*WAYS, FULL_METRICS)}
    kind, _, objective = implementation.partition(": ")
    if implementation not in named and (kind != "ours" or not objective):
        raise ValueError(f'implementation: expected one of {", ".join(named)}, or "ours: NAME", got {implementation!r}')
    if implementation in named:
        return named[implementation]
    values = 3 + len(parse_objective(objective).needs)
    return replace(DROPPED, name=implementation, reductions=(("all_gather", values),))


@dataclass(frozen=True)
class Call:
    """A collective over the tensor-parallel ranks."""

    collective: str
    nbytes: float  # of the tensor that a rank puts in
    beside: float = 0.0  # FLOP that are computed meanwhile

    def sent(self, ranks: int) -> float:
        """Bytes that leave a rank, in a ring."""
        times = {"all_gather": ranks, "reduce_scatter": 1, "all_reduce": 2}[self.collective]
        return times * self.nbytes * (ranks - 1) / ranks

    def ms(self, cluster: Cluster, ranks: int) -> float:
        within = ranks <= cluster.gpus_per_node
        latency_us = cluster.intra_latency_us if within else cluster.inter_latency_us
        rate = cluster.intra_bytes_per_s if within else cluster.inter_bytes_per_s
        return max(0.0, latency_us / 1e3 + 1e3 * self.sent(ranks) / rate - 1e3 * self.beside / cluster.flop_per_s)


@dataclass(frozen=True)
class Work:
    """What the loss stage does for one micro-batch on one rank."""

    flop: float
    logit_bytes: float
    other_bytes: float  # of weight and hidden states
    calls: tuple[Call, ...]

    def ms(self, cluster: Cluster, tp: int) -> tuple[float, float, float, float]:
        """Of its four parts, which follow on each other."""
        rate = cluster.memory_bytes_per_s
        parts = self.flop / cluster.flop_per_s, self.logit_bytes / rate, self.other_bytes / rate
        return *(1e3 * part for part in parts), sum(call.ms(cluster, tp) for call in self.calls)


def loss_work(
    way: Way, model: Model, tokens: int, live: float, tp: int, sequence_parallel: bool = True, size: int = 2
) -> Work:
    """`live`: tokens that are not masked; `size`: bytes of a hidden value."""
    rows, columns = way.rows(tokens, live), model.vocab / tp
    chunks = math.ceil(columns / way.chunk) if way.chunk else 0
    product = 2 * rows * model.hidden * columns
    logits = columns * (way.logit_bytes * live + way.masked_logit_bytes * (rows - live))
    other = (8 + size * (3 if chunks else 2)) * model.hidden * columns
    other += (8 + size) * rows * model.hidden * chunks
    other += size * model.hidden * (4 * rows + tokens) * (rows < tokens)
    last_product = product / max(chunks, 1)
    done = calls(way, model.hidden, tokens, live, tp, sequence_parallel, size, last_product)
    return Work((4 if chunks else 3) * product, logits, other, done)


def calls(
    way: Way, hidden: int, tokens: int, live: float, tp: int, sequence_parallel: bool, size: int, beside: float = 0.0
) -> tuple[Call, ...]:
    """The collectives of the loss stage for one micro-batch, in order."""
    if tp == 1:
        return ()
    rows = way.rows(tokens, live)
    gather = Call("all_gather", tokens * hidden * size // tp)
    statistics = [Call(collective, 4 * values * rows) for collective, values in way.reductions]
    summed = Call("all_reduce", rows * hidden * size, beside)
    if not sequence_parallel:
        return *statistics, summed
    if way.drops or way.chunk:  # gathered once, and what comes back is summed over the rows that are left
        return gather, *statistics, summed
    scatter = Call("reduce_scatter", tokens * hidden * size, beside)
    return gather, *statistics, replace(gather, beside=beside), scatter


@dataclass(frozen=True)
class Plan:
    """A model in training on a cluster."""

    model: Model
    cluster: Cluster
    layout: Layout
    batch: Batch

    @property
    def tokens(self) -> int:
        return self.batch.tokens(self.layout)

    @property
    def live(self) -> float:
        return self.tokens * (1 - self.batch.masked)

    def loss_parts_ms(self, way: Way) -> tuple[float, float, float, float]:
        """Products, loss, weight and hidden states, collectives of the loss stage for a micro-batch."""
        return loss_work(way, self.model, self.tokens, self.live, self.layout.tp).ms(self.cluster, self.layout.tp)

    def loss_ms(self, way: Way) -> float:
        return sum(self.loss_parts_ms(way))

    def layer_ms(self) -> float:
        """A transformer layer, forward and backward, of a micro-batch."""
        model, cluster, tp = self.model, self.cluster, self.layout.tp
        flop = self.tokens * (6 * model.layer_weights + 7 * model.q * self.batch.seq_length)
        moved = self.tokens * (52 * model.hidden + 22 * model.ffn + 8 * (model.q + model.k))
        exchange = Call("reduce_scatter", 2 * self.tokens * model.hidden).ms(cluster, tp) if tp > 1 else 0.0
        return 1e3 * (flop / cluster.flop_per_s + moved / cluster.memory_bytes_per_s) / tp + 6 * exchange

    def layers_worth(self, way: Way) -> float:
        return self.loss_ms(way) / self.layer_ms()

    def step_ms(self, loss_ms: float) -> float:
        stage = self.layer_ms() * self.model.layers / self.layout.pp
        return self.layout.pp * stage + loss_ms + (self.batch.micro_batches(self.layout) - 1) * (stage + loss_ms)

    def share(self, way: Way) -> float:
        """Of a step, that would be saved if the loss were free."""
        return 1 - self.step_ms(0.0) / self.step_ms(self.loss_ms(way))

    def loss_gb(self, way: Way) -> float:
        """The peak of the loss stage's memory on a rank."""
        hidden, columns = self.model.hidden, self.model.vocab / self.layout.tp
        rows = way.rows(self.tokens, self.live)
        per_row = columns * (2 + way.extra_bytes)
        if way.chunk:
            per_row = 2 * min(columns, way.chunk) + 4 * hidden
        return (
            rows * (per_row + 2 * hidden * (rows < self.tokens)) + 2 * self.tokens * hidden * (self.layout.tp > 1)
        ) / 1e9

    def rank_gb(self, way: Way) -> float:
        """Of the fullest rank: the first stage, where pp micro-batches wait for their backward, or the last one."""
        model, layout = self.model, self.layout
        embeddings = model.vocab * model.hidden * (2 if layout.pp == 1 else 1)
        weights = (model.layer_weights * model.layers / layout.pp + embeddings) / layout.tp
        stage = 4 * self.tokens * (model.hidden + model.q + model.k + model.ffn) * model.layers / layout.pp / layout.tp
        waiting = min(layout.pp, self.batch.micro_batches(layout))
        activations = max(waiting * stage / 1e9, stage / 1e9 + self.loss_gb(way))
        return weights * (6 + 12 / (layout.dp * layout.cp)) / 1e9 + activations


def layouts(gpus: int, cluster: Cluster, cp: int = 1) -> Iterator[Layout]:
    """In the order in which one tries them: TP up to a node, then PP; CP as asked for, DP takes the rest."""
    node = cluster.gpus_per_node
    sizes = [(2**i, 1) for i in range(node.bit_length())] + [(node, 2**i) for i in range(1, 6)]
    return (Layout(tp, pp, cp, gpus // (tp * pp * cp)) for tp, pp in sizes if gpus % (tp * pp * cp) == 0)


def smallest(way: Way, model: Model, cluster: Cluster, gpus: int, batch: Batch, cp: int = 1) -> Plan | None:
    """The first layout that fits; None if none does."""
    plans = (Plan(model, cluster, layout, batch) for layout in layouts(gpus, cluster, cp))
    return next((plan for plan in plans if plan.rank_gb(way) <= ROOM * cluster.memory_gb), None)


if __name__ == "__main__":
    import scale_report

    sys.exit(scale_report.main())
