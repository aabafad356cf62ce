"""Analytic cost model of the loss at scale: time, memory and share of a training step, for each variant of the loss.

The rates of a GPU come from measurements in results/: bandwidth of a copy, FLOP/s of the products of the output layer
(`sustained_rates`). Everything else is counted. `scale_report.py` is the command line: it prints the tables, compares
predictions with measured times and writes docs/scale.md.

The loss stage is the work of the last pipeline stage beyond its layers: output layer and loss, forward and backward. A
micro-batch has n tokens on a context-parallel rank. r of them pass through the output layer: all n, or n (1 - f) if
masked tokens are removed. With c = V / tp vocabulary columns and hidden size H, per rank:

    products      6 r H c FLOP: forward, gradient of the hidden states, gradient of the weight
    loss          b r c bytes. b = 52 for Megatron's loss, 51 for its fused loss, 6 for ours, and 2 for ours on tokens
                  that are masked but not removed (docs/benchmarks.md). `GIVEN_LOGITS` has the baselines
    weight        12 H c bytes, independent of r: read twice in bf16, fp32 gradient read and written
    hidden        8 r H + 2 n H bytes if r < n: rows gathered and scattered (compaction.py)
    collectives   `calls`; tests compare them with counted calls. Bytes sent per rank in a ring, for x input bytes:
                  all-gather (tp - 1) x, reduce-scatter (tp - 1) / tp x, all-reduce twice that. The time is latency +
                  sent / bandwidth. A collective that overlaps with a product costs only what exceeds the product
    memory        the larger of p r c and 2 r c + 2 r H bytes. p = 6 for Megatron's loss (fp32 softmax, bf16 gradient),
                  10 for the fused loss, 2 for ours, which overwrites the logits. 2 r H: gradient of the hidden states.
                  Beyond that 2 r H for gathered rows if r < n, and 2 n H for the gathered sequence if tp > 1

"ours, linear-fused" splits the vocabulary into d chunks of 8192 columns and recomputes forward (linear_fused.py):

    products      8 r H c
    weight        14 H c: the weight is read once more
    hidden        10 r H d more: the fp32 sum of the hidden gradient
    memory        2 r min(c, 8192) + 8 r H instead of 2 r c + 2 r H: fp32 sum, last product and result

"ours, linear-fused, gradient in forward" splits the r tokens into k equal chunks, the fewest of at most 2048 tokens. It
needs --dft-token-chunk and an upstream gradient that is known in forward. Nothing is recomputed:

    products      6 r H c
    weight        12 H c k: every chunk reads the weight twice, and reads and writes the fp32 gradient
    hidden        4 r H more: the saved hidden gradient is read and written in backward
    collectives   k all-gathers of statistics. The all-reduce of the hidden gradient overlaps with the last product
    memory        2 (r / k) c + 2 r H instead of 2 r c + 2 r H

A transformer layer (RMSNorm, grouped-query attention of widths q and k, gated MLP of width F), everything divided by
tp:

    products      6 H (2 q + 2 k + 3 F) FLOP per token, and 7 q s of causal attention over s tokens, whose forward is
                  recomputed in backward (FlashAttention-2, arXiv:2307.08691)
    elementwise   52 H + 22 F + 8 (q + k) bytes per token: norms, residuals, activation, rotary embedding in bf16
    collectives   6 of the all-gathers and reduce-scatters of sequence parallelism do not overlap with a product
                  (arXiv:2205.05198)
    memory        4 (H + q + k + F) bytes per token. Norms and activation functions are recomputed (selective
                  recomputation, same source)

A stage has layers / pp layers; the last stage also has the loss stage. In 1F1B, a step takes the sum of all stages plus
m - 1 times the slowest stage. The share of the loss in a step is the time saved if the loss were free. t_loss / t_layer
is the number of layers to remove from the last stage so that it is not the slowest. A weight takes 6 bytes (bf16, fp32
gradient) plus 12 / (dp cp) bytes of sharded Adam state.

Not modelled: what does not depend on the loss or overlaps in a tuned run (data-parallel collectives, optimizer,
point-to-point communication between stages, embedding), kernel launches, vocabulary padding. Layers run at the rate of
large products, which they do not reach in practice. Shares of a step are therefore upper bounds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from report import BYTES_PER_US, LATENCY_US, RESULTS, Rows, read

from megatron_dft import parse_objective
from megatron_dft.ops.linear_fused import TOKEN_CHUNK, VOCAB_CHUNK

H100_LOGITS = RESULTS / "NVIDIA-H100-2026-11-26-logits.csv"
H100_HEADS = RESULTS / "NVIDIA-H100-2026-11-26-heads.csv"
DATA_SHEET = {"H100": (989e12, 3.35e12), "H200": (989e12, 4.8e12), "B200": (2250e12, 8.0e12)}  # dense bf16 FLOP/s, B/s
MAIN_GRAD_BYTES = 8  # per weight: fp32 gradient read and written
BENCHMARK_GRAD_BYTES = 4  # per weight: the runs of H100_HEADS had a bf16 main_grad
GPUS = [2**i for i in range(3, 13)]
USABLE_MEMORY = 0.9  # fraction of the GPU memory that a layout may use


@dataclass(frozen=True)
class Cluster:
    """Sustained rates of one GPU and of its interconnect."""

    name: str
    flop_per_s: float  # large bf16 products
    memory_bytes_per_s: float  # of a copy; reads and writes both count
    memory_gb: float
    intra_bytes_per_s: float  # per direction, within a node
    inter_bytes_per_s: float = 45e9  # of a 400 Gb/s port
    intra_latency_us: float = LATENCY_US
    inter_latency_us: float = 2 * LATENCY_US
    gpus_per_node: int = 8


@dataclass(frozen=True)
class Model:
    """Model sizes; `q` and `k` are the total widths of queries and keys."""

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
    """Sequence length in tokens, batch sizes in samples, share of masked tokens."""

    seq_length: int = 8192
    micro_batch: int = 1
    global_batch: int = 512
    masked: float = 0.7

    def tokens(self, layout: Layout) -> int:
        """Tokens of a micro-batch on one rank."""
        return self.seq_length * self.micro_batch // layout.cp

    def micro_batches(self, layout: Layout) -> int:
        """Micro-batches of one pipeline per step; at least one, so more pipelines than samples enlarge the batch."""
        return max(1, self.global_batch // (self.micro_batch * layout.dp))


@dataclass(frozen=True)
class Variant:
    """One variant of the loss computation."""

    name: str  # as in the files of benchmark_layouts.py
    logit_bytes: int
    masked_logit_bytes: int
    peak_bytes: int  # memory per logit
    reductions: tuple[tuple[str, int], ...]  # collective, fp32 values per token
    drops: bool = False
    vocab_chunk: int = 0  # columns per chunk
    token_chunk: int = 0  # tokens per chunk

    def rows(self, tokens: float, live: float) -> float:
        """Tokens that pass through the output layer. `live`: tokens that are not masked."""
        return live if self.drops else tokens

    def column_chunks(self, columns: float) -> int:
        """Chunks of the vocabulary shard; 0 if it is not split."""
        return math.ceil(columns / self.vocab_chunk) if self.vocab_chunk else 0

    def row_chunks(self, rows: float) -> int:
        """Equal chunks of the tokens; 1 if they are not split."""
        return max(1, math.ceil(rows / self.token_chunk)) if self.token_chunk else 1


STOCK = Variant("Megatron", 52, 52, 6, (("all_reduce", 1),) * 3)
FUSED = Variant("Megatron, fused", 51, 51, 10, (("all_reduce", 1), ("all_reduce", 2)))
OURS = Variant("ours", 6, 2, 2, (("all_gather", 3),))
DROPPED = replace(OURS, name="ours, masked tokens removed", drops=True)
CHUNKS = replace(DROPPED, name="ours, linear-fused", vocab_chunk=VOCAB_CHUNK)
IN_FORWARD = replace(DROPPED, name="ours, linear-fused, gradient in forward", token_chunk=TOKEN_CHUNK)
FULL_METRICS = replace(DROPPED, name="ours, full metrics", reductions=(("all_gather", 5),))
VARIANTS = (STOCK, FUSED, OURS, DROPPED, CHUNKS, IN_FORWARD)

# Loss of given logits: bytes moved per valid and per masked bf16 logit, bytes of memory per logit beyond the logits.
GIVEN_LOGITS = {
    "ours: dft": (OURS.logit_bytes, OURS.masked_logit_bytes, 0),
    "ours: dft, out of place": (OURS.logit_bytes, OURS.masked_logit_bytes, 2),
    "Megatron unfused": (STOCK.logit_bytes, STOCK.masked_logit_bytes, 6),
    "Megatron fused": (FUSED.logit_bytes, FUSED.masked_logit_bytes, 10),
    "Transformer Engine": (8, 6, 2),
    "Transformer Engine, overwriting": (6, 4, 0),
    "Liger vocab-parallel": (22, 18, 6),
    "flash-attn": (6, 6, 2),
    "flash-attn, in place": (6, 6, 0),
}
HEADS = {  # output layer with loss, by name in the files of benchmark_loss.py
    "Megatron: output layer, unfused": STOCK,
    "ours: materialized logits": OURS,
    "ours: masked tokens removed": DROPPED,
    "ours: linear-fused": replace(CHUNKS, drops=False),
    "ours: masked tokens removed, linear-fused": CHUNKS,
}
MODELS = (
    Model("Llama 3 8B", hidden=4096, ffn=14336, layers=32, q=4096, k=1024, vocab=128256),
    Model("Qwen3-32B", hidden=5120, ffn=25600, layers=64, q=8192, k=1024, vocab=151936),
    Model("Llama 3 70B", hidden=8192, ffn=28672, layers=80, q=8192, k=1024, vocab=128256),
    Model("Llama 3 405B", hidden=16384, ffn=53248, layers=126, q=16384, k=1024, vocab=128256),
)


def variant_of(implementation: str) -> Variant:
    """The variant with this name in the files of benchmark_layouts.py. "ours: OBJECTIVE" drops masked tokens.

    Raises:
        ValueError: for an unknown name.
    """
    named = {variant.name: variant for variant in (*VARIANTS, FULL_METRICS)}
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
    nbytes: float  # of the input tensor of a rank
    beside: float = 0.0  # FLOP of the product that it overlaps with

    def sent(self, ranks: int) -> float:
        """Bytes sent per rank, in a ring."""
        times = {"all_gather": ranks, "reduce_scatter": 1, "all_reduce": 2}[self.collective]
        return times * self.nbytes * (ranks - 1) / ranks

    def ms(self, cluster: Cluster, ranks: int) -> float:
        within = ranks <= cluster.gpus_per_node
        latency_us = cluster.intra_latency_us if within else cluster.inter_latency_us
        rate = cluster.intra_bytes_per_s if within else cluster.inter_bytes_per_s
        return max(0.0, latency_us / 1e3 + 1e3 * self.sent(ranks) / rate - 1e3 * self.beside / cluster.flop_per_s)


@dataclass(frozen=True)
class Work:
    """Work of the loss stage for one micro-batch on one rank."""

    flop: float
    logit_bytes: float
    other_bytes: float  # weight and hidden states
    calls: tuple[Call, ...]

    def ms(self, cluster: Cluster, tp: int) -> tuple[float, float, float, float]:
        """Times of products, loss, weight and hidden states, and collectives, which do not overlap."""
        rate = cluster.memory_bytes_per_s
        parts = self.flop / cluster.flop_per_s, self.logit_bytes / rate, self.other_bytes / rate
        return *(1e3 * part for part in parts), sum(call.ms(cluster, tp) for call in self.calls)


def loss_work(
    variant: Variant,
    model: Model,
    tokens: int,
    live: float,
    tp: int,
    sequence_parallel: bool = True,
    size: int = 2,
    gradient_bytes: int = MAIN_GRAD_BYTES,
) -> Work:
    """Work of the loss stage.

    `live`: tokens that are not masked. `size`: bytes per element of the hidden states. `gradient_bytes`: bytes that the
    gradient of one weight moves.
    """
    rows, columns = variant.rows(tokens, live), model.vocab / tp
    parts, pieces = variant.column_chunks(columns), variant.row_chunks(rows)
    product = 2 * rows * model.hidden * columns
    logits = columns * (variant.logit_bytes * live + variant.masked_logit_bytes * (rows - live))
    other = pieces * (gradient_bytes + size * (3 if parts else 2)) * model.hidden * columns
    other += ((8 + size) * parts + 2 * size * bool(variant.token_chunk)) * rows * model.hidden
    other += size * model.hidden * (4 * rows + tokens) * (rows < tokens)
    last_product = product / max(parts, pieces)
    done = calls(variant, model.hidden, tokens, live, tp, sequence_parallel, size, last_product)
    return Work((4 if parts else 3) * product, logits, other, done)


def loss_memory(variant: Variant, model: Model, tokens: int, live: float, tp: int) -> float:
    """Peak memory of the loss stage on one rank, in bytes, beyond its inputs and the gradient of the weight."""
    rows, columns, hidden = variant.rows(tokens, live), model.vocab / tp, model.hidden
    buffer = min(columns, variant.vocab_chunk or columns) / variant.row_chunks(rows)
    per_row = max(variant.peak_bytes * buffer, 2 * buffer + (8 if variant.vocab_chunk else 2) * hidden)
    return rows * (per_row + 2 * hidden * (rows < tokens)) + 2 * tokens * hidden * (tp > 1)


def calls(
    variant: Variant,
    hidden: int,
    tokens: int,
    live: float,
    tp: int,
    sequence_parallel: bool,
    size: int,
    beside: float = 0.0,
) -> tuple[Call, ...]:
    """The collectives of the loss stage for one micro-batch, in order."""
    if tp == 1:
        return ()
    rows = variant.rows(tokens, live)
    pieces = variant.row_chunks(rows)
    gather = Call("all_gather", tokens * hidden * size // tp)
    statistics = [Call(collective, 4 * values * rows / pieces) for collective, values in variant.reductions] * pieces
    summed = Call("all_reduce", rows * hidden * size, beside)
    if not sequence_parallel:
        return *statistics, summed
    if (
        variant.drops or variant.vocab_chunk or variant.token_chunk
    ):  # one all-gather; the hidden gradient is summed over the rows kept
        return gather, *statistics, summed
    scatter = Call("reduce_scatter", tokens * hidden * size, beside)
    return gather, *statistics, replace(gather, beside=beside), scatter


def head_work(variant: Variant, row: dict[str, str], gradient_bytes: int = BENCHMARK_GRAD_BYTES) -> Work:
    """Work of output layer and loss in a row of benchmark_loss.py, on one rank."""
    sizes = model_of(row), int(row["tokens"]), valid_tokens(row)
    return loss_work(variant, *sizes, tp=1, gradient_bytes=gradient_bytes)


def model_of(row: dict[str, str]) -> Model:
    """Hidden size and vocabulary of a row."""
    return Model("", int(row["hidden"]), 0, 0, 0, 0, int(row["vocab"]))


def valid_tokens(row: dict[str, str]) -> int:
    """Tokens that are not masked in a row of benchmark_loss.py, which masks the first part of every 64 tokens."""
    masked = round(64 * float(row["masked"]))
    return sum(i % 64 >= masked for i in range(int(row["tokens"])))


def logits_bytes(row: dict[str, str], name: str = "") -> float:
    """Bytes moved by the loss on given logits in a row of benchmark_loss.py."""
    valid_bytes, masked_bytes, _ = GIVEN_LOGITS[name or row["implementation"]]
    valid = valid_tokens(row)
    return int(row["vocab"]) * (valid_bytes * valid + masked_bytes * (int(row["tokens"]) - valid))


def products_rate(rows: Rows, memory_bytes_per_s: float) -> float:
    """FLOP/s of the products of the output layer, from rows of our materialized logits, all together.

    The time of the products is the measured time without the time of the counted bytes.
    """
    works = [head_work(OURS, row) for row in rows]
    seconds = sum(float(row["total_ms"]) for row in rows) / 1e3
    seconds -= sum(work.logit_bytes + work.other_bytes for work in works) / memory_bytes_per_s
    return sum(work.flop for work in works) / seconds


def materialized(heads: Rows) -> Rows:
    """Rows of output layer and loss with our materialized logits."""
    return [row for row in heads if not row["note"] and HEADS.get(row["implementation"]) == OURS]


def sustained_rates(logits: Rows, heads: Rows) -> tuple[float, float]:
    """FLOP/s of large bf16 products and bytes/s of a copy, from two files of benchmark_loss.py.

    Rows with masked tokens are left out: there, many rows of the gradient are zeros.
    """
    memory_bytes_per_s = 1e9 * float(logits[0]["copy_gb_per_s"])
    unmasked = [row for row in materialized(heads) if float(row["masked"]) == 0.0]
    return products_rate(unmasked, memory_bytes_per_s), memory_bytes_per_s


def cluster(name: str, memory_gb: float, intra_bytes_per_s: float) -> Cluster:
    """A GPU with the same shares of its data sheet that the H100 sustains, to three digits."""
    measured = sustained_rates(read(H100_LOGITS), read(H100_HEADS))
    shares = [rate / peak for rate, peak in zip(measured, DATA_SHEET["H100"], strict=True)]
    flop, moved = (float(f"{share * peak:.3g}") for share, peak in zip(shares, DATA_SHEET[name], strict=True))
    return Cluster(name, flop, moved, memory_gb, intra_bytes_per_s)


CLUSTERS = (
    cluster("H100", 80, 1e6 * BYTES_PER_US),
    cluster("H200", 141, 1e6 * BYTES_PER_US),
    cluster("B200", 180, 2e6 * BYTES_PER_US),
)


@dataclass(frozen=True)
class Plan:
    """A model trained on a cluster with a layout and a batch."""

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

    def loss_parts_ms(self, variant: Variant) -> tuple[float, float, float, float]:
        """Times of the loss stage per micro-batch: products, loss, weight and hidden states, collectives."""
        return loss_work(variant, self.model, self.tokens, self.live, self.layout.tp).ms(self.cluster, self.layout.tp)

    def loss_ms(self, variant: Variant) -> float:
        return sum(self.loss_parts_ms(variant))

    def layer_ms(self) -> float:
        """Time of one transformer layer per micro-batch, forward and backward."""
        model, cluster, tp = self.model, self.cluster, self.layout.tp
        flop = self.tokens * (6 * model.layer_weights + 7 * model.q * self.batch.seq_length)
        moved = self.tokens * (52 * model.hidden + 22 * model.ffn + 8 * (model.q + model.k))
        exchange = Call("reduce_scatter", 2 * self.tokens * model.hidden).ms(cluster, tp) if tp > 1 else 0.0
        return 1e3 * (flop / cluster.flop_per_s + moved / cluster.memory_bytes_per_s) / tp + 6 * exchange

    def layers_worth(self, variant: Variant) -> float:
        return self.loss_ms(variant) / self.layer_ms()

    def step_ms(self, loss_ms: float) -> float:
        stage = self.layer_ms() * self.model.layers / self.layout.pp
        return self.layout.pp * stage + loss_ms + (self.batch.micro_batches(self.layout) - 1) * (stage + loss_ms)

    def share(self, variant: Variant) -> float:
        """Share of a step that is saved if the loss is free."""
        return 1 - self.step_ms(0.0) / self.step_ms(self.loss_ms(variant))

    def loss_gb(self, variant: Variant) -> float:
        """Peak memory of the loss stage on one rank."""
        return loss_memory(variant, self.model, self.tokens, self.live, self.layout.tp) / 1e9

    def rank_gb(self, variant: Variant) -> float:
        """Memory of the fullest rank: on the first stage (activations of pp micro-batches) or the last (loss)."""
        model, layout = self.model, self.layout
        embeddings = model.vocab * model.hidden * (2 if layout.pp == 1 else 1)
        weights = (model.layer_weights * model.layers / layout.pp + embeddings) / layout.tp
        stage = 4 * self.tokens * (model.hidden + model.q + model.k + model.ffn) * model.layers / layout.pp / layout.tp
        in_flight = min(layout.pp, self.batch.micro_batches(layout))
        activations = max(in_flight * stage / 1e9, stage / 1e9 + self.loss_gb(variant))
        return weights * (6 + 12 / (layout.dp * layout.cp)) / 1e9 + activations


def layouts(gpus: int, cluster: Cluster, cp: int = 1) -> Iterator[Layout]:
    """Layouts in the usual order of preference: TP up to a node, then PP. `cp` is fixed; DP takes the rest."""
    node = cluster.gpus_per_node
    sizes = [(2**i, 1) for i in range(node.bit_length())] + [(node, 2**i) for i in range(1, 6)]
    return (Layout(tp, pp, cp, gpus // (tp * pp * cp)) for tp, pp in sizes if gpus % (tp * pp * cp) == 0)


def smallest(variant: Variant, model: Model, cluster: Cluster, gpus: int, batch: Batch, cp: int = 1) -> Plan | None:
    """The plan with the first layout that fits into memory, or None."""
    plans = (Plan(model, cluster, layout, batch) for layout in layouts(gpus, cluster, cp))
    return next((plan for plan in plans if plan.rank_gb(variant) <= USABLE_MEMORY * cluster.memory_gb), None)
