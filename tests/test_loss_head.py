"""Where the loss starts at the hidden states of a real Megatron model: what surrounds the output layer still works."""

import importlib.util
import itertools
from types import SimpleNamespace

import pytest
import torch
from ranks import run_ranks
from tiny_models import (
    BATCH,
    SEQUENCE,
    VOCAB,
    WAYS,
    batch,
    forward,
    gpt,
    gradients,
    hybrid,
    same,
    start,
    transformer_config,
)

from megatron_dft import DFTConfig, install
from megatron_dft.hosts import compat

pytest.importorskip("megatron.core")

HAS_HYBRID = importlib.util.find_spec("megatron.core.models.hybrid") is not None  # and output_processor: from 0.18 on
ROWS = ("dropped", "chunks", "chunks, not dropped", "chunks, kept")  # of WAYS, all in which the loss starts earlier


def dft(way="dropped", **settings):
    return DFTConfig(loss_type="dft", **WAYS[way], **settings)


def message(action):
    """Of the error, or that there is none."""
    try:
        action()
    except ValueError as error:
        return str(error)
    return "no error"


def adapted(model):
    """With an output layer of a class of its own, as adapters, quantization and fp8 bring along."""
    layer = model.output_layer
    layer.__class__ = type("LowRankOutput", (type(layer),), {"forward": lambda self, *args, **kwargs: None})
    return model


def configured(**settings):
    def change(model):
        vars(model.config).update(settings)
        return model

    return change


def hooked(model):
    model.output_layer.register_forward_hook(lambda module, args, output: None)
    return model


def in_fp8(model):
    model.output_layer.weight.data = model.output_layer.weight.data.to(torch.float8_e4m3fn)
    return model


def with_bias(model):
    model.output_layer.bias = torch.nn.Parameter(torch.zeros(len(model.output_layer.weight)))
    return model


def with_mtp(model):
    model.config.mtp_num_layers = 1
    return model


def bert():
    from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
    from megatron.core.models.bert.bert_model import BertModel

    return BertModel(transformer_config(), 0, bert_layer_local_spec, VOCAB, SEQUENCE)


NEITHER = {  # models whose loss cannot start at the hidden states, and what the error says they are
    "overlap": (gpt, configured(overlap_moe_expert_parallel_comm=True), "--overlap-moe-expert-parallel-comm"),
    "deferral": (gpt, configured(defer_embedding_wgrad_compute=True), "--defer-embedding-wgrad-compute"),
    "adapter": (gpt, adapted, "an output layer that is LowRankOutput (fp8, fp4, an adapter)"),
}
if HAS_HYBRID:
    NEITHER["hybrid with MTP"] = (hybrid, with_mtp, "HybridModel with multi-token prediction")
NOT_DROPPED = {
    "graph": (gpt, configured(cuda_graph_impl="full_iteration"), "a CUDA graph of the whole iteration"),
    "graph, by scope": (gpt, configured(cuda_graph_scope="full_iteration"), "a CUDA graph of the whole iteration"),
    "graph, by scopes": (gpt, configured(cuda_graph_scope=[SimpleNamespace(name="full_iteration")]), "a CUDA graph"),
}
NOT_IN_CHUNKS = {
    "hook": (gpt, hooked, "forward hooks on the output layer"),
    "fp8": (gpt, in_fp8, "an output layer in torch.float8_e4m3fn"),
    "bias": (gpt, with_bias, "an output layer with a bias"),
}


def refusals():
    """For each model: the message when a feature is asked for, and whether the default leaves it out."""

    def refused(make, change, config):
        return message(lambda: install([change(make())], config))

    facts = {}
    for name, (make, change, _) in (NEITHER | NOT_DROPPED).items():
        facts["dropped", name] = refused(make, change, dft(compact_masked_tokens=True))
        model = change(make())
        facts["default", name] = compat.compacts(model, dft()), compat.describe_output_layer(model, dft())
    for name, (make, change, _) in (NEITHER | NOT_IN_CHUNKS).items():
        facts["chunks", name] = refused(make, change, dft("chunks"))
    facts["bert"] = message(lambda: compat.compacts(bert(), dft(compact_masked_tokens=True)))
    facts["passes"] = compat.compacts(gpt(), dft()), compat.compaction_obstacle(gpt())
    model = install([gpt()], dft()).chunks[0]
    tokens, labels, _ = batch()
    facts["loss mask"] = message(lambda: forward(model, tokens, labels, torch.ones(BATCH, SEQUENCE + 1)))
    if HAS_HYBRID:
        facts["processor"] = message(lambda: model(tokens, tokens, None, labels=labels, output_processor=print))
    chunks = install([gpt()], dft("chunks")).chunks[0]
    facts["passed by"] = message(lambda: chunks.forward(tokens, tokens, None, labels=labels))
    facts["gathered"] = message(lambda: model(tokens, tokens, None, labels=labels, runtime_gather_output=True))
    return facts


def without_labels(make, way):
    """Logits of a model with the loss on it, before and after it was trained; and after a forward pass that failed."""
    torch.manual_seed(1)
    model = install([make()], dft(way)).chunks[0]
    tokens, labels, mask = batch()

    def logits():
        with torch.no_grad():
            return forward(model, tokens, None, None)

    first = logits()
    forward(model, tokens, labels, mask).sum().backward()
    broken = model.decoder.register_forward_hook(lambda module, args, output: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        forward(model, tokens, labels, mask)
    broken.remove()
    return first, logits(), "forward" in vars(model.output_layer)


def fused_accumulation(way, tied, sequence_parallel):
    """main_grad after a micro-batch, what autograd was told beside it, and all other gradients."""
    from megatron.core.tensor_parallel import layers

    # The CUDA extension that Megatron calls here, in PyTorch.
    layers.fused_weight_gradient_mlp_cuda = SimpleNamespace(
        wgrad_gemm_accum_fp32=lambda rows, gradient, main_grad: main_grad.addmm_(gradient.t(), rows)
    )
    model = gpt(tied=tied, sequence_parallel=sequence_parallel)
    weight = model.shared_embedding_or_output_weight() if tied else model.output_layer.weight
    weight.main_grad, weight.grad_added_to_main_grad = torch.full_like(weight, 0.5), False  # of one before
    model.output_layer.gradient_accumulation_fusion = True
    if way:
        install([model], DFTConfig(loss_type="nll", **WAYS[way]))
    others = {name: g for name, g in gradients(model)[1].items() if "output_layer" not in name}
    return weight.main_grad, weight.grad_added_to_main_grad, weight.grad if tied else weight.grad.shape, others


def layer_before_and_after(make, way):
    """The state of an output layer under sequence parallelism, around a forward pass."""
    model = install([make(sequence_parallel=True)], dft(way)).chunks[0]

    def state():
        layer = model.output_layer
        return layer.sequence_parallel, layer.allreduce_dgrad, "forward" in vars(layer)

    before = state()
    forward(model, *batch())
    return before, state()


def late_weight(way):
    """A hook that brings the weight just before the layer is used, as DDP's overlapped gathering of parameters does."""
    model = install([gpt()], DFTConfig(loss_type="nll", **WAYS[way])).chunks[0]
    weight, calls = model.output_layer.weight, []
    right = weight.detach().clone()
    weight.data.zero_()

    def bring(module, args):
        calls.append(len(calls))
        weight.data.copy_(right)

    model.output_layer.register_forward_pre_hook(bring)
    return gradients(model), bool(calls)


def on_ranks():
    start()
    facts = refusals() | {"host": gradients(gpt())}
    makes = {"gpt": gpt, "hybrid": hybrid} if HAS_HYBRID else {"gpt": gpt}
    for name, way in itertools.product(makes, ROWS):
        facts["logits", name, way] = without_labels(makes[name], way)
        facts["layer", name, way] = layer_before_and_after(makes[name], way)
    for tied, split, way in itertools.product([False, True], [False, True], [None, *ROWS]):
        facts["main_grad", tied, split, way] = fused_accumulation(way, tied, split)
    for way in ROWS:
        facts["late", way] = late_weight(way)
    return facts


@pytest.fixture(scope="module")
def facts():
    return run_ranks(2, on_ranks, timeout=150)


@pytest.mark.parametrize("name", NEITHER | NOT_DROPPED)
def test_unsupported_compaction_is_off_by_default_and_rejected_on_request(facts, name):
    reason = (NEITHER | NOT_DROPPED)[name][2]
    assert "--loss-compact-masked-tokens: expected a model" in facts[0]["dropped", name]
    assert f"got {reason}" in facts[0]["dropped", name] and "leave the flag out" in facts[0]["dropped", name]
    compacts, said = facts[0]["default", name]
    assert not compacts and f"masked tokens pass through the output layer, because of {reason}" in said


@pytest.mark.parametrize("name", NEITHER | NOT_IN_CHUNKS)
def test_linear_fused_is_rejected_where_unsupported(facts, name):
    reason = (NEITHER | NOT_IN_CHUNKS)[name][2]
    assert "--loss-linear-fused: expected a model" in facts[0]["chunks", name]
    assert f"got {reason}" in facts[0]["chunks", name]


def test_linear_fused_rejects_fully_sharded_parameters():
    for name in ("use_megatron_fsdp", "use_torch_fsdp2"):
        compat.check_settings(SimpleNamespace(**{name: True}), dft())
        with pytest.raises(ValueError, match=r"--loss-linear-fused: .* got fully sharded parameters"):
            compat.check_settings(SimpleNamespace(**{name: True}), dft("chunks"))


def test_compaction_is_on_for_gpt_and_rejected_for_bert(facts):
    assert facts[0]["passes"] == (True, None)
    assert "got BertModel, which is not a decoder" in facts[0]["bert"]


def test_forward_rejects_unsupported_output_or_mask(facts):
    assert "loss_mask: expected one weight for each of the labels (3, 8), got (3, 9)" in facts[0]["loss mask"]
    assert "logits that stay split" in facts[0]["gathered"]
    assert "call the model, model(...), not model.forward(...)" in facts[0]["passed by"]
    if HAS_HYBRID:
        assert "output_processor: expected none" in facts[0]["processor"]


@pytest.mark.parametrize("way", ROWS)
@pytest.mark.parametrize("name", ["gpt", "hybrid"] if HAS_HYBRID else ["gpt"])
def test_forward_without_labels_returns_logits_even_after_error(facts, name, way):
    for rank in facts:
        first, last, left_over = rank["logits", name, way]
        assert first.shape == (BATCH, SEQUENCE, VOCAB // 2) and torch.equal(first, last) and not left_over


@pytest.mark.parametrize("way", ROWS)
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_gradient_accumulation_fusion_matches_megatron(facts, tied, split, way):
    for rank in facts:
        (ours, added, told, others), (stock, stock_added, stock_told, stock_others) = (
            rank["main_grad", tied, split, name] for name in (way, None)
        )
        same(ours, stock, 2e-5)
        assert added and stock_added and (ours != 0.5).any()
        same(others, stock_others, 2e-5)
        if tied:
            same(told, stock_told, 2e-5)  # of the embedding alone
        else:
            assert told == stock_told


@pytest.mark.parametrize("way", ROWS)
@pytest.mark.parametrize("name", ["gpt", "hybrid"] if HAS_HYBRID else ["gpt"])
def test_forward_restores_output_layer_state(facts, name, way):
    before, after = facts[0]["layer", name, way]
    assert before == after == (True, False, False)


@pytest.mark.parametrize("way", ROWS)
def test_output_layer_pre_hooks_run_before_weight_is_read(facts, way):
    for rank in facts:
        (loss, gradient), called = rank["late", way]
        assert called
        same(loss, rank["host"][0] * batch()[2], 2e-5)
        same(gradient, rank["host"][1], 2e-5)
