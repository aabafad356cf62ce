"""LossHead on Megatron models: hooks, gradient accumulation, errors and unsupported output layers."""

import importlib.util
import itertools
import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from ranks import run_ranks
from tiny_models import (
    BATCH,
    SEQUENCE,
    VARIANTS,
    VOCAB,
    batch,
    forward,
    gpt,
    gradients,
    hybrid,
    message,
    same,
    start,
    transformer_config,
)

from megatron_dft import DFTConfig, install, parse_objective
from megatron_dft.hosts import compat
from megatron_dft.hosts.loss_head import Schedule

pytest.importorskip("megatron.core")

HAS_HYBRID = importlib.util.find_spec("megatron.core.models.hybrid") is not None  # with output_processor, from 0.18 on
FROM_HIDDEN = [name for name in VARIANTS if name not in ("not dropped", "out of place")]  # start at hidden states


def dft(variant="dropped", **settings):
    return DFTConfig(loss_type="dft", **VARIANTS[variant], **settings)


def adapted(model):
    """Give the output layer its own class, as adapters, quantization and fp8 do."""
    layer = model.output_layer
    layer.__class__ = type("LowRankOutput", (type(layer),), {"forward": lambda self, *args, **kwargs: None})
    return model


def capped(model):
    """Give the model a method in which models of mcore-bridge change their logits."""
    model.__class__ = type("Capped", (type(model),), {"_forward_output_layer": lambda self, hidden: None})
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


NEITHER = {  # models without support for compaction and linear-fused, and the reason in the error
    "overlap": (gpt, configured(overlap_moe_expert_parallel_comm=True), "--overlap-moe-expert-parallel-comm"),
    "deferral": (gpt, configured(defer_embedding_wgrad_compute=True), "--defer-embedding-wgrad-compute"),
    "capped logits": (gpt, capped, "Capped, which changes the logits of its output layer"),
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
    """For each model: the error for a requested feature, and whether the default disables it."""

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


def without_labels(make, variant):
    """Logits of a model with the loss, before and after a backward pass and a forward pass that failed."""
    torch.manual_seed(1)
    model = install([make()], dft(variant)).chunks[0]
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


def fuse_accumulation(model, weight):
    """Let the output layer add its weight gradient to main_grad, as with Apex."""
    from megatron.core.tensor_parallel import layers

    def accumulate(rows, gradient, main_grad):
        main_grad.add_(gradient.t() @ rows)

    # A PyTorch version of the CUDA extension that Megatron calls here.
    layers.fused_weight_gradient_mlp_cuda = SimpleNamespace(
        wgrad_gemm_accum_fp32=accumulate, wgrad_gemm_accum_fp16=accumulate
    )
    add_main_grad(weight)
    model.output_layer.gradient_accumulation_fusion = True


def add_main_grad(weight):
    """Give the weight the attributes that DDP sets. main_grad is 0.5 from the previous micro-batch."""
    weight.main_grad, weight.grad_added_to_main_grad = torch.full_like(weight, 0.5), False


def fused_accumulation(variant, tied, sequence_parallel, fused=True):
    """main_grad after a micro-batch, the weight gradient that autograd received, and all other gradients."""
    model = gpt(tied=tied, sequence_parallel=sequence_parallel)
    weight = model.shared_embedding_or_output_weight() if tied else model.output_layer.weight
    if fused:
        fuse_accumulation(model, weight)
    else:
        add_main_grad(weight)
    if variant:
        install([model], DFTConfig(loss_type="nll", **VARIANTS[variant]))
    others = {name: g for name, g in gradients(model)[1].items() if "output_layer" not in name}
    return weight.main_grad, weight.grad_added_to_main_grad, weight.grad if tied else weight.grad.shape, others


def layer_before_and_after(make, variant):
    """The state of an output layer under sequence parallelism, before and after a forward pass."""
    model = install([make(sequence_parallel=True)], dft(variant)).chunks[0]

    def state():
        layer = model.output_layer
        return layer.sequence_parallel, layer.allreduce_dgrad, "forward" in vars(layer)

    before = state()
    forward(model, *batch())
    return before, state()


def recomputed(variant):
    """Gradients with and without a checkpoint around the model, under which saved tensors are copies."""
    results = []
    for checkpointed in (False, True):
        model = gpt()
        fuse_accumulation(model, model.output_layer.weight)
        install([model], dft(variant))
        run = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False) if checkpointed else lambda f, *x: f(*x)
        run(forward, model, *batch()).sum().backward()
        others = {name: p.grad for name, p in model.named_parameters() if "output_layer" not in name}
        results.append((model.output_layer.weight.main_grad, others))
    return results


def late_weight(variant):
    """Gradients of a model whose pre-hook loads the weight before use, as DDP's overlapped parameter gather does."""
    model = install([gpt()], DFTConfig(loss_type="nll", **VARIANTS[variant])).chunks[0]
    weight, calls = model.output_layer.weight, []
    right = weight.detach().clone()
    weight.data.zero_()

    def load(module, args):
        calls.append(len(calls))
        weight.data.copy_(right)

    model.output_layer.register_forward_pre_hook(load)
    return gradients(model), bool(calls)


def with_token_chunk():
    """The error with `token_chunk`, by model."""

    def error(model, loss_type="dft"):
        return message(lambda: install([model], DFTConfig(loss_type, **VARIANTS["token chunks"])))

    bf16 = {"bf16": True, "params_dtype": torch.bfloat16}
    return {
        "fp32": error(gpt()),
        "mean": error(gpt(calculate_per_token_loss=False)),
        "cayley": error(gpt(), "cayley"),
        "bf16": error(gpt(**bf16)),
        "log": [compat.describe_output_layer(gpt(), dft(variant)) for variant in ("token chunks", "chunks")],
    }


def known_upstream():
    """Gradients with a loss scale, and errors for gradients that forward did not expect."""
    tokens, labels, mask = batch()

    def train(scale=1.0, of_scale_func=None, first=(), fused=False, mask=mask, given=True):
        model = gpt()
        if fused:
            fuse_accumulation(model, model.output_layer.weight)
        installed = install([model], dft("token chunks"))
        model.config.grad_scale_func = of_scale_func
        for factor in (*first, scale):
            weights = mask * factor if factor == 0.0 else mask
            (forward(model, tokens, labels, weights if given else None) * weights * factor).sum().backward()
        return installed, model.output_layer.weight.grad

    facts = {"plain": train()[1]}
    for name, change in {
        "scaled": {"scale": 128.0, "of_scale_func": lambda loss: loss * torch.tensor([128.0])},
        "scaled by a number": {"scale": 128.0, "of_scale_func": lambda loss: 128.0},
        "half": {"mask": mask * 0.5},
        "half, fp64": {"mask": mask.double() * 0.5},
    }.items():
        try:
            facts[name] = train(**change)[1]
        except ValueError as error:
            facts[name] = str(error)
    facts["unexpected"] = message(lambda: train(0.5))
    facts["unexpected after an empty micro-batch"] = message(lambda: train(0.5, first=(0.0,)))
    facts["mask not given"] = message(lambda: train(given=False))
    installed, gradient = train(0.5, first=(1.0,))  # one host-device sync in the first backward, none later
    facts["later"] = message(installed.check_tokens), gradient.norm()
    facts["main_grad"] = train(0.5, first=(1.0,), fused=True)[0].chunks[0].output_layer.weight.main_grad.norm()
    installed, _ = train()
    installed.check_step()
    installed.check_tokens()
    forward(*installed.chunks, tokens, labels, mask)
    facts["not used"] = message(installed.check_step)
    installed, _ = train()
    with torch.no_grad():
        forward(*installed.chunks, tokens, labels, mask)
    facts["no_grad"] = message(installed.check_step)
    installed = install([gpt()], dft("token chunks"))
    (model,) = installed.chunks
    fuse_accumulation(model, model.output_layer.weight)
    torch.utils.checkpoint.checkpoint(forward, model, tokens, labels, mask, use_reentrant=False).sum().backward()
    facts["recomputed"] = message(installed.check_step)
    installed.begin(2)
    facts["next step"] = message(installed.check_step)
    model.output_layer.weight.main_grad = model.output_layer.weight.main_grad.bfloat16()
    facts["bf16 main_grad"] = message(lambda: forward(model, tokens, labels, mask))
    model.output_layer.gradient_accumulation_fusion = False
    facts["bf16 main_grad, not fused"] = message(lambda: forward(model, tokens, labels, mask))
    return facts


def on_ranks():
    start()
    facts = refusals() | {"host": gradients(gpt())}
    makes = {"gpt": gpt, "hybrid": hybrid} if HAS_HYBRID else {"gpt": gpt}
    for name, variant in itertools.product(makes, FROM_HIDDEN):
        facts["logits", name, variant] = without_labels(makes[name], variant)
        facts["layer", name, variant] = layer_before_and_after(makes[name], variant)
    for tied, split, variant in itertools.product([False, True], [False, True], [None, *FROM_HIDDEN]):
        facts["main_grad", tied, split, variant] = fused_accumulation(variant, tied, split)
        if variant and "token" in variant:
            facts["main_grad, not fused", tied, split, variant] = fused_accumulation(variant, tied, split, fused=False)
    for variant in FROM_HIDDEN:
        facts["late", variant] = late_weight(variant)
        if "token" not in variant:
            facts["recomputed", variant] = recomputed(variant)
    facts["token chunk"] = with_token_chunk()
    facts["known upstream"] = known_upstream()
    return facts


@pytest.fixture(scope="module")
def facts():
    return run_ranks(2, on_ranks, timeout=150)


@pytest.mark.parametrize("name", NEITHER | NOT_DROPPED)
def test_unsupported_compaction_is_off_by_default_and_rejected_on_request(facts, name):
    reason = (NEITHER | NOT_DROPPED)[name][2]
    assert "--dft-compact-masked-tokens is not supported" in facts[0]["dropped", name]
    assert re.search(f"not supported with {re.escape(reason)}.*; remove the flag", facts[0]["dropped", name])
    compacts, description = facts[0]["default", name]
    assert not compacts and f"masked tokens pass through the output layer, because of {reason}" in description


@pytest.mark.parametrize("name", NEITHER | NOT_IN_CHUNKS)
def test_linear_fused_is_rejected_where_unsupported(facts, name):
    reason = (NEITHER | NOT_IN_CHUNKS)[name][2]
    assert "--dft-linear-fused is not supported" in facts[0]["chunks", name]
    assert re.search(f"not supported with {re.escape(reason)}.*; remove the flag", facts[0]["chunks", name])


def test_linear_fused_rejects_fully_sharded_parameters():
    for name in ("use_megatron_fsdp", "use_torch_fsdp2"):
        compat.check_settings(SimpleNamespace(**{name: True}), dft())
        with pytest.raises(ValueError, match=r"--dft-linear-fused cannot be combined with fully sharded parameters"):
            compat.check_settings(SimpleNamespace(**{name: True}), dft("chunks"))


def test_compaction_is_on_for_gpt_and_rejected_for_bert(facts):
    assert facts[0]["passes"] == (True, None)
    assert "not supported with BertModel, which is not a decoder" in facts[0]["bert"]


def test_forward_rejects_unsupported_output_or_mask(facts):
    assert "loss_mask: expected one weight for each of the labels (3, 8), got (3, 9)" in facts[0]["loss mask"]
    assert "runtime_gather_output=True is not supported with labels" in facts[0]["gathered"]
    assert "call the model, model(...), not model.forward(...)" in facts[0]["passed by"]
    if HAS_HYBRID:
        assert "output_processor: expected none" in facts[0]["processor"]


@pytest.mark.parametrize("variant", FROM_HIDDEN)
@pytest.mark.parametrize("name", ["gpt", "hybrid"] if HAS_HYBRID else ["gpt"])
def test_forward_without_labels_returns_logits_even_after_error(facts, name, variant):
    for rank in facts:
        first, last, left_over = rank["logits", name, variant]
        assert first.shape == (BATCH, SEQUENCE, VOCAB // 2) and torch.equal(first, last) and not left_over


@pytest.mark.parametrize("variant", FROM_HIDDEN)
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_gradient_accumulation_fusion_matches_megatron(facts, tied, split, variant):
    for rank in facts:
        (ours, added, returned, others), (stock, stock_added, stock_returned, stock_others) = (
            rank["main_grad", tied, split, name] for name in (variant, None)
        )
        same(ours, stock, 2e-5)
        assert added and stock_added and (ours != 0.5).any()
        same(others, stock_others, 2e-5)
        if tied:
            same(returned, stock_returned, 2e-5)  # of the embedding only
        else:
            assert returned == stock_returned


@pytest.mark.parametrize("variant", [name for name in FROM_HIDDEN if "token" in name])
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_token_chunks_add_to_main_grad_without_gradient_accumulation_fusion(facts, tied, split, variant):
    """DDP's hook adds the returned gradient, because `grad_added_to_main_grad` stays False."""
    for rank in facts:
        ours, added, returned, others = rank["main_grad, not fused", tied, split, variant]
        stock, _, stock_returned, stock_others = rank["main_grad", tied, split, None]
        same(ours, stock, 2e-5)
        assert not added and (ours != 0.5).any()
        same(others, stock_others, 2e-5)
        if tied:
            same(returned, stock_returned, 2e-5)  # of the embedding only
        else:
            assert returned == stock_returned


@pytest.mark.parametrize("variant", FROM_HIDDEN)
@pytest.mark.parametrize("name", ["gpt", "hybrid"] if HAS_HYBRID else ["gpt"])
def test_forward_restores_output_layer_state(facts, name, variant):
    before, after = facts[0]["layer", name, variant]
    assert before == after == (True, False, False)


@pytest.mark.parametrize("variant", FROM_HIDDEN)
def test_output_layer_pre_hooks_run_before_weight_is_read(facts, variant):
    for rank in facts:
        (loss, gradient), called = rank["late", variant]
        assert called
        same(loss, rank["host"][0] * batch()[2], 2e-5)
        same(gradient, rank["host"][1], 2e-5)


def test_token_chunk_is_rejected_where_gradient_in_forward_is_impossible(facts):
    errors = facts[0]["token chunk"]
    assert errors["fp32"] == errors["bf16"] == "no error"
    for name, reason in {
        "mean": "--dft-token-chunk computes the gradient in forward and requires --calculate-per-token-loss",
        "cayley": "token_chunk (--dft-token-chunk) computes the gradient in forward, but cayley:floor=0.5 depends on",
    }.items():
        assert errors[name].startswith(reason)
    assert [line.partition("; ")[2] for line in errors["log"]] == [
        "linear-fused, 5 tokens per chunk, gradient in forward",
        "linear-fused, 7 columns per chunk",
    ]
    for name in ("bf16 main_grad", "bf16 main_grad, not fused"):
        assert facts[0]["known upstream"][name].startswith("--dft-token-chunk requires an fp32 main_grad"), name


@pytest.mark.parametrize(
    ("name", "factor"), [("scaled", 128.0), ("scaled by a number", 128.0), ("half", 0.5), ("half, fp64", 0.5)]
)
def test_gradient_in_forward_contains_loss_scale_and_loss_mask(facts, name, factor):
    for rank in facts:
        torch.testing.assert_close(rank["known upstream"][name], factor * rank["known upstream"]["plain"])


def test_unexpected_upstream_raises_with_its_reason(facts):
    for rank in facts:
        found = rank["known upstream"]
        reason = "--dft-token-chunk: the loss received another gradient than the one for which forward computed"
        for name in ("unexpected", "unexpected after an empty micro-batch", "mask not given"):
            assert found[name].startswith(reason), name
        assert found["later"][0].startswith(reason)
        assert found["later"][1].isnan() and found["main_grad"].isnan()


def test_forward_whose_gradient_is_not_used_raises(facts):
    found = facts[0]["known upstream"]
    for name in ("not used", "recomputed"):
        assert found[name].startswith("--dft-token-chunk: backward did not use the gradients of 1 forward passes"), name
    assert found["no_grad"] == found["next step"] == "no error"


@pytest.mark.parametrize("variant", [name for name in FROM_HIDDEN if "token" not in name])
def test_checkpoint_around_the_model_leaves_gradients_unchanged(facts, variant):
    for rank in facts:
        same(*rank["recomputed", variant], 1e-6)


def test_schedule_updates_blend_tensor_in_place():
    schedule, cpu = Schedule(parse_objective("dft:ramp=4")), torch.device("cpu")
    with pytest.raises(
        ValueError, match=r"--loss-type dft:start=0,ramp=4: no iteration was set; call begin\(iteration\)"
    ):
        schedule.objective(cpu)
    schedule.begin(1)
    captured = schedule.objective(cpu).blend
    schedule.begin(3)
    assert captured.item() == 0.75 and schedule.objective(cpu).blend is captured
