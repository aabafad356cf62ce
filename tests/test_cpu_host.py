"""CPU ranks: attention on one, two and four ranks compared with its formula, flags, and Megatron's classes."""

import importlib.util
import math
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from megatron_dft.testing import cpu
from megatron_dft.testing.cpu_attention import attention, partition

TOLERANCE = {"rtol": 0.0, "atol": 1e-12}


@dataclass(frozen=True)
class Case:
    documents: tuple[int, ...]
    packed: bool
    batch: int = 1
    heads: int = 2
    groups: int = 2
    scale: float | None = None

    def tensors(self):
        """query, key, value and the gradient of the output, for the whole sequence."""
        generator = torch.Generator().manual_seed(sum(self.documents))
        batch = () if self.packed else (self.batch,)
        shapes = [(self.heads, 6), (self.groups, 6), (self.groups, 5), (self.heads * 5,)]
        return [torch.randn(sum(self.documents), *batch, *s, dtype=torch.float64, generator=generator) for s in shapes]

    def cu_seqlens(self):
        """cu_seqlens as in Megatron: int32, with empty documents at the end."""
        if not self.packed:
            return None
        ends = torch.tensor((0, *self.documents, 0, 0)).cumsum(0)
        return ends.to(torch.int32)


CASES = {
    "causal": Case((16,), packed=False, batch=3),
    "grouped": Case((16,), packed=False, batch=2, heads=6, groups=2),
    "scaled": Case((8,), packed=False, scale=0.7),
    "packed": Case((8, 24, 16), packed=True),
    "packed, grouped, scaled": Case((16, 8, 8, 32), packed=True, heads=4, groups=1, scale=0.2),
}


def formula(query, key, value, case):
    """Causal softmax(scale q k^T) v, one document and one head at a time."""
    scale = 1.0 / math.sqrt(query.shape[-1]) if case.scale is None else case.scale
    documents = []
    for q, k, v in zip(*(x.split(case.documents) for x in (query, key, value)), strict=True):
        heads = []
        for head in range(case.heads):
            group = head * case.groups // case.heads
            scores = scale * torch.einsum("i...d,j...d->...ij", q[..., head, :], k[..., group, :])
            later = torch.arange(len(q))[None, :] > torch.arange(len(q))[:, None]
            weight = scores.masked_fill(later, -torch.inf).softmax(-1)
            heads.append(torch.einsum("...ij,j...d->i...d", weight, v[..., group, :]))
        documents.append(torch.cat(heads, -1))
    return torch.cat(documents)


def cp_positions(documents, cp_size, cp_rank):
    """Positions of a rank: chunk `rank` from the front and chunk `rank` from the back of each document."""
    positions, start = [], 0
    for length in documents:
        chunk = length // (2 * cp_size)
        front = start + cp_rank * chunk
        back = start + length - (cp_rank + 1) * chunk
        positions += [*range(front, front + chunk), *range(back, back + chunk)]
        start += length
    return torch.tensor(positions)


def output_and_gradients(function, tensors, upstream):
    leaves = [x.clone().requires_grad_() for x in tensors]
    out = function(*leaves)
    out.backward(upstream)
    return [out.detach(), *(x.grad for x in leaves)]


def expected(case):
    *tensors, upstream = case.tensors()
    return output_and_gradients(lambda *qkv: formula(*qkv, case), tensors, upstream)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_attention_matches_formula(case):
    *tensors, upstream = case.tensors()
    ours = output_and_gradients(
        lambda *qkv: attention(*qkv, cu_seqlens=case.cu_seqlens(), softmax_scale=case.scale), tensors, upstream
    )
    torch.testing.assert_close(ours, expected(case), **TOLERANCE)


def test_attention_dropout_zeroes_weights_and_keeps_mean():
    query = key = torch.zeros(512, 1, 1, 4)
    torch.manual_seed(0)
    out = attention(query, key, torch.ones_like(key), dropout=0.25)
    assert out[256:].mean() == pytest.approx(1.0, abs=0.02)
    assert out[0].unique().tolist() in ([0.0], pytest.approx([1.0 / 0.75]))


@pytest.mark.parametrize("cp_size", [1, 2, 4])
@pytest.mark.parametrize("documents", [(16,), (8, 24, 16)])
def test_partition_gives_each_rank_front_and_back_chunk_of_documents(documents, cp_size):
    ends = torch.tensor((0, *documents, 0)).cumsum(0).to(torch.int32)
    for rank in range(cp_size):
        ours = partition(ends, sum(documents), cp_size, rank)
        assert ours.tolist() == cp_positions(documents, cp_size, rank).tolist()


@pytest.mark.parametrize(
    ("ends", "cp_size", "message"),
    [
        ([0, 6, 16], 2, "expected documents of a multiple of 4 tokens with context parallel size 2, got one of 6"),
        ([0, 8], 1, "expected cumulative lengths from 0 to 16, got 0 to 8; pad the last document"),
        ([4, 16], 1, "expected cumulative lengths from 0 to 16, got 4 to 16"),
    ],
)
def test_partition_rejects_invalid_document_lengths(ends, cp_size, message):
    with pytest.raises(ValueError, match=message):
        partition(torch.tensor(ends), 16, cp_size, 0)


def on_one_of_four_ranks():
    """Attention with context parallelism over four ranks, and over two ranks in each of two groups."""
    world, rank = dist.group.WORLD, dist.get_rank()
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    results = {}
    for cp_size, group in ((4, world), (2, pairs[rank // 2])):
        for name, case in CASES.items():
            mine = cp_positions(case.documents, cp_size, group.rank())
            *tensors, upstream = (x[mine] for x in case.tensors())
            results[name, cp_size] = output_and_gradients(
                lambda *qkv, case=case, group=group: attention(
                    *qkv, cu_seqlens=case.cu_seqlens(), cp_group=group, softmax_scale=case.scale
                ),
                tensors,
                upstream,
            )
    return results


@pytest.fixture(scope="module")
def four_ranks():
    return run_ranks(4, on_one_of_four_ranks)


@pytest.mark.parametrize("cp_size", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_context_parallel_attention_matches_one_rank(four_ranks, name, cp_size):
    wanted = expected(CASES[name])
    for rank, results in enumerate(four_ranks):
        mine = cp_positions(CASES[name].documents, cp_size, rank % cp_size)
        torch.testing.assert_close(results[name, cp_size], [x[mine] for x in wanted], **TOLERANCE)


def test_complete_arguments_adds_missing_cpu_flags():
    given = ["--num-layers", "2", "--distributed-backend", "gloo", "--no-rope-fusion", "--transformer-impl=local"]
    completed = cpu.complete_arguments(given)
    assert completed[: len(given)] == given
    assert completed[len(given) :] == [
        "--no-gradient-accumulation-fusion",
        "--no-masked-softmax-fusion",
        "--no-persist-layer-norm",
        "--use-cpu-initialization",
    ]
    assert cpu.complete_arguments(completed) == completed
    assert cpu.complete_arguments([])[:4] == ["--transformer-impl", "local", "--distributed-backend", "gloo"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--transformer-impl transformer_engine", "--transformer-impl: expected local on the CPU, got transformer_eng"),
        ("--transformer-impl=inference_optimized", "expected local on the CPU, got inference_optimized; leave it out"),
        ("--distributed-backend nccl --bf16", "--distributed-backend: expected gloo on the CPU, got nccl"),
        ("--attention-backend flash", "expected auto or local or unfused on the CPU, got flash"),
        ("--fp8-format hybrid", "expected a run without CUDA kernels, got --fp8-format; leave it out"),
        ("--lr 1e-3 --use-flash-attn", "expected a run without CUDA kernels, got --use-flash-attn"),
    ],
)
def test_complete_arguments_rejects_gpu_only_flags(flags, message):
    with pytest.raises(ValueError, match=message):
        cpu.complete_arguments(flags.split())


# The tests below need Megatron and their own processes, because enable() cannot be undone.


def on_one_rank_of_megatron():
    cpu.enable()
    cpu.enable()
    from megatron.core import parallel_state
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import get_cuda_rng_tracker, model_parallel_cuda_manual_seed
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_config import TransformerConfig

    def megatron_attention(case, cp_size, attn_mask_type=AttnMaskType.causal, **options):
        config = TransformerConfig(
            num_layers=2,
            hidden_size=12,
            num_attention_heads=case.heads,
            num_query_groups=case.groups,
            kv_channels=6,
            context_parallel_size=cp_size,
            attention_dropout=0.0,
            **options,
        )
        groups = ProcessGroupCollection.use_mpu_process_groups()
        core = DotProductAttention(config, 2, attn_mask_type, "self", softmax_scale=case.scale, pg_collection=groups)
        assert core.config is config
        return core

    def run(case, cp_size, rank, **options):
        core = megatron_attention(case, cp_size, **options)
        mine = cp_positions(case.documents, cp_size, rank)
        query, key, value = (x[mine] for x in case.tensors()[:3])
        value = torch.nn.functional.pad(value, (0, 1))  # Megatron's class requires values as wide as keys
        packed, ends = None, case.cu_seqlens()
        if case.packed:
            packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=ends // 2, cu_seqlens_q_padded=ends)
        out = core(query, key, value, None, packed_seq_params=packed)
        return out.unflatten(-1, (case.heads, 6))[..., :5].flatten(-2)

    parallel_state.initialize_model_parallel(context_parallel_size=2)
    model_parallel_cuda_manual_seed(1)
    rank, results = dist.get_rank(), {}
    for name, case in CASES.items():
        results[name, 2] = run(case, 2, rank)
        results[name, 1] = run(case, 1, 0)
    layer_scaling = {"apply_query_key_layer_scaling": True, "attention_softmax_in_fp32": True}
    results["layer scaling"] = run(CASES["causal"], 2, rank, **layer_scaling)
    for description, options in {
        "mask": {"attn_mask_type": AttnMaskType.no_mask},
        "window": {"window_size": (4, 0)},
        "bias": {},
    }.items():
        bias = torch.zeros(1) if description == "bias" else None
        core = megatron_attention(CASES["causal"], 2, **options)
        try:
            core(*CASES["causal"].tensors()[:3], None, attention_bias=bias)
        except ValueError as error:
            results["refused", description] = str(error)

    config = TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=2, sequence_parallel=True, tensor_model_parallel_size=2
    )
    norm = WrappedTorchNorm(config, 8)
    results["norm"] = [parameter.sequence_parallel for parameter in norm.parameters()]
    results["config"] = config.sequence_parallel
    draws = []
    for _ in range(2):
        with get_cuda_rng_tracker().fork():
            draws.append(torch.rand(3))
    outside = torch.get_rng_state()
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    with get_cuda_rng_tracker().fork():
        results["draws"] = [*draws, torch.rand(3)]
    results["stream"] = [outside, torch.get_rng_state()]
    made = [torch.zeros(2, device="cuda"), torch.empty(2, device=torch.cuda.current_device()), torch.ones(2).cuda()]
    made += [torch.ones(2).to("cuda:0"), torch.ones(2).to(device=0), torch.tensor([1.0], pin_memory=True)]
    results["devices"] = {x.device.type for x in made}
    from megatron.core.pipeline_parallel import schedules

    sent = torch.arange(4.0)
    on_its_way = sent.data_ptr()
    schedules.deallocate_output_tensor(sent, True)
    results["sent"] = [sent.numel(), sent.megatron_dft_sent.data_ptr() == on_its_way, sent.megatron_dft_sent.tolist()]
    results["type"] = [torch.ones(1).bfloat16().type(), torch.ones(1).type(torch.float64).dtype]
    return results


@pytest.fixture(scope="module")
def megatron():
    if importlib.util.find_spec("megatron") is None:
        pytest.skip("megatron-core is not installed")
    return run_ranks(2, on_one_rank_of_megatron)


@pytest.mark.host
@pytest.mark.parametrize("cp_size", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_megatron_attention_supports_packing_and_context_parallelism(megatron, name, cp_size):
    wanted = expected(CASES[name])[0]
    for rank, results in enumerate(megatron):
        mine = cp_positions(CASES[name].documents, cp_size, rank if cp_size > 1 else 0)
        torch.testing.assert_close(results[name, cp_size], wanted[mine], **TOLERANCE)


@pytest.mark.host
def test_query_key_layer_scaling_leaves_attention_unchanged(megatron):
    wanted = expected(CASES["causal"])[0]
    for rank, results in enumerate(megatron):
        torch.testing.assert_close(results["layer scaling"], wanted[cp_positions((16,), 2, rank)], **TOLERANCE)


@pytest.mark.host
@pytest.mark.parametrize(
    ("description", "message"),
    [("mask", "the mask no_mask"), ("window", "a sliding window"), ("bias", "an attention bias")],
)
def test_megatron_attention_rejects_mask_window_and_bias(megatron, description, message):
    refusal = megatron[0]["refused", description]
    assert f"expected plain causal attention with packed sequences or context parallelism, got {message};" in refusal


@pytest.mark.host
def test_norm_marks_sequence_parallel_parameters_and_keeps_config(megatron):
    assert megatron[0]["norm"] == [True, True]
    assert megatron[0]["config"] is True


@pytest.mark.host
def test_rng_tracker_fork_has_own_stream_restored_by_seed(megatron):
    first, second, again = megatron[0]["draws"]
    assert not torch.equal(first, second)
    assert torch.equal(first, again)
    before, after = megatron[0]["stream"]
    assert torch.equal(before, after)


@pytest.mark.host
def test_cuda_device_maps_to_cpu(megatron):
    assert megatron[0]["devices"] == {"cpu"}
    assert megatron[0]["type"] == ["torch.cuda.BFloat16Tensor", torch.float64]


@pytest.mark.host
def test_deallocate_output_tensor_keeps_memory_for_gloo_send(megatron):
    assert megatron[0]["sent"] == [1, True, [0.0, 1.0, 2.0, 3.0]]
