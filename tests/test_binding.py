"""The loss bound to Megatron models and schedules, on two tensor-parallel ranks in a single launch."""

import functools
import inspect
import itertools
import math
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
    dft_line,
    forward,
    gpt,
    gradients,
    loss_func,
    micro_batch_with_metrics,
    same,
    start,
)

from megatron_dft import DFTConfig, TokenStats, install
from megatron_dft.hosts import compat
from megatron_dft.hosts.binding import _Report, vocab_parallel_cross_entropy, with_metrics
from megatron_dft.hosts.iterations import ChannelMeans
from megatron_dft.hosts.loss_head import Inputs, MicroBatch, head_of
from megatron_dft.labels import with_channels
from megatron_dft.metrics import MetricAccumulator
from megatron_dft.ops.objectives import DFT

pytest.importorskip("megatron.core")


def forward_step(data_iterator, model):
    tokens, labels, loss_mask = next(data_iterator)
    return forward(model, tokens, labels, loss_mask), partial(loss_func, loss_mask)


def on_ranks():
    """Run everything that needs Megatron models; returns the numbers that the tests compare."""
    start()
    facts = {"host": gradients(gpt()), "dft line": gradients(gpt(), dft_line)}
    for name, variant in itertools.product(("nll", "dft", "deft", "entropy", "cayley"), VARIANTS):
        settings = {key: x for key, x in VARIANTS[variant].items() if key != "token_chunk" or name != "cayley"}
        facts[name, variant] = gradients(*install([gpt()], DFTConfig(loss_type=name, **settings)).chunks)
    ignored, nothing = torch.full((BATCH, SEQUENCE), -100), torch.zeros(BATCH, SEQUENCE)
    for variant in VARIANTS:
        config = DFTConfig(loss_type="dft", **VARIANTS[variant])
        facts["ignored", variant] = gradients(*install([gpt()], config).chunks, labels=ignored)
        facts["masked", variant] = gradients(*install([gpt()], config).chunks, loss_mask=nothing)
    facts["ce is untouched"] = "compute_language_model_loss" not in vars(install([gpt()], DFTConfig()).chunks[0])
    bystander = gpt()
    facts["bystander"] = gradients(bystander)
    facts["report"] = reports()
    facts["mtp"] = {mtp: multi_token_prediction(mtp) for mtp in (None, "nll", "same")}
    if "output_processor" in inspect.signature(gpt().forward).parameters:  # from megatron-core 0.18 on
        for variant in VARIANTS:
            facts["mtp", variant] = multi_token_prediction("nll", **VARIANTS[variant])
    for variant in VARIANTS:
        facts["full metrics", variant] = full_metrics(variant)
    run = micro_batch_with_metrics("cpu", None)
    facts["micro-batches"] = run(), run()
    facts["drop-in"] = drop_in()
    facts["errors"] = errors()
    return facts


def reports():
    """Reports of two micro-batches with very different masks through Megatron's schedule, in bf16."""
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.transformer.module import Float16Module

    config = DFTConfig(loss_type="entropy:form=exponential")
    model = gpt(bf16=True, params_dtype=torch.bfloat16)
    chunk = install([Float16Module(model.config, model)], config).chunks[0]
    batches = [batch(0), batch(1)]
    batches[1][2][:, 2:] = 0.0
    pipeline = get_forward_backward_func()
    result = {}
    for forward_only in (False, True):
        result[forward_only] = pipeline(
            forward_step_func=with_metrics(forward_step, config),
            data_iterator=iter(batches),
            model=[chunk],
            num_microbatches=2,
            seq_length=SEQUENCE,
            micro_batch_size=BATCH,
            forward_only=forward_only,
        )
    head, singly = head_of(chunk), []
    for tokens, labels, loss_mask in batches:
        head.start()
        with torch.no_grad():
            output = forward(chunk, tokens, labels, loss_mask)
        micro_batch = head.take()
        singly.append((output.float(), micro_batch.stats, micro_batch.pick(loss_mask), loss_mask))
    return result, singly


SEEN = []  # token batches that the callback received


def full_metrics(variant):
    """Reports and callback tokens of two iterations and an evaluation. The second has no token of channel b."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    settings = VARIANTS[variant] | ({"metrics": "full", "channels": "a,b"} if variant != "out of place" else {})
    config = DFTConfig("dft", callback="test_binding:remember", **settings)
    validation, means = MetricAccumulator(), ChannelMeans(config.metric_spec)
    (chunk,) = install([gpt()], config).chunks
    step = with_metrics(forward_step, config, micro_batches=lambda: 1, validation=validation)
    schedule = get_forward_backward_func()
    SEEN.clear()
    reports = []
    for seed, training in ((0, True), (1, True), (0, False)):
        tokens, labels, loss_mask = batch(seed)
        if config.channels:
            labels = with_channels(labels, channels_of(seed))
        with torch.set_grad_enabled(training):  # as Megatron's evaluate()
            (report,) = schedule(
                forward_step_func=step,
                data_iterator=iter([(tokens, labels, loss_mask)]),
                model=[chunk],
                num_microbatches=1,
                seq_length=SEQUENCE,
                micro_batch_size=BATCH,
                forward_only=not training,
            )
        if training:  # as Megatron's train_step()
            reports.append(means.fill({name: x.view(-1)[0] / x.view(-1)[1] for name, x in report.items()}))
        else:
            reports.append(validation.take(parallel_state.get_data_parallel_group(with_context_parallel=True)))
    return reports, [(x.stats.nll, x.stats.loss, x.loss_mask, x.channel, x.training) for x in SEEN]


def channels_of(seed):
    return torch.arange(BATCH * SEQUENCE).view(BATCH, SEQUENCE) % (3 - seed)


def remember(tokens):
    SEEN.append(tokens)


def multi_token_prediction(mtp, **variant):
    """Gradients of the MTP layer. Only the loss of its own head reaches it."""
    model = gpt(mtp_num_layers=1)
    if mtp is not None:
        install([model], DFTConfig(loss_type="dft", mtp=mtp, **variant))
    return {name: g for name, g in gradients(model)[1].items() if name.startswith("mtp.")}


def names_and_defaults(function):
    return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]


def drop_in():
    from megatron.core.parallel_state import get_tensor_model_parallel_rank
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy as stock

    torch.manual_seed(2)
    logits = 3 * torch.randn(SEQUENCE, BATCH, VOCAB)
    shard = logits.chunk(torch.distributed.get_world_size(), -1)[get_tensor_model_parallel_rank()].contiguous()
    target = batch()[1].t().contiguous()
    ce = stock(shard.clone(), target)
    return vocab_parallel_cross_entropy(shard, target), ce, names_and_defaults(stock)


def errors():
    """The error messages for incompatible models and calls."""
    dft = DFTConfig(loss_type="dft")

    def message(action):
        with pytest.raises(ValueError) as caught:
            action()
        return str(caught.value)

    installed = install([gpt()], dft).chunks[0]
    narrow = install([gpt()], dft).chunks[0]
    narrow.vocab_size += 2
    unwrapped = functools.partial(with_metrics(forward_step, dft), iter([batch()]))
    return {
        "twice": message(lambda: install([installed], dft)),
        "gathered": message(lambda: install([gpt(parallel_output=False)], dft)),
        "width": message(lambda: forward(narrow, *batch())),
        "te": message(lambda: install([gpt(cross_entropy_loss_fusion=True, cross_entropy_fusion_impl="te")], dft)),
        "not installed": message(lambda: (lambda out, func: func(out))(*unwrapped(gpt()))),
    }


@pytest.fixture(scope="module")
def facts():
    return run_ranks(2, on_ranks, timeout=150)


@pytest.mark.parametrize("variant", VARIANTS)
def test_nll_gradient_matches_megatron(facts, variant):
    for rank in facts:
        same(rank["nll", variant][1], rank["host"][1], 2e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_dft_gradient_matches_megatron_loss_with_detached_weight(facts, variant):
    for rank in facts:
        same(rank["dft", variant][1], rank["dft line"][1], 2e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["nll", "dft", "deft", "entropy", "cayley"])
def test_model_output_is_nll_and_zero_where_masked(facts, name, variant):
    for rank in facts:
        same(rank[name, variant][0], rank["host"][0] * batch()[2], 2e-5)
        weight = "output_layer.weight"
        assert name == "nll" or rank[name, variant][1][weight].norm() != rank["host"][1][weight].norm()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["deft", "entropy", "cayley"])
def test_gradient_is_equal_in_every_variant(facts, name, variant):
    for rank in facts:
        same(rank[name, variant][1], rank[name, "not dropped"][1], 2e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["ignored", "masked"])
def test_batch_without_targets_has_zero_loss_and_gradient(facts, name, variant):
    for rank in facts:
        loss, gradient = rank[name, variant]
        assert not loss.any()
        assert set(gradient) == set(rank["host"][1])
        assert not any(g.any() for g in gradient.values())


def test_install_leaves_other_models_unchanged(facts):
    for rank in facts:
        assert rank["ce is untouched"]
        same(rank["bystander"], rank["host"], 0.0)


@pytest.mark.parametrize("forward_only", [False, True])
def test_report_matches_token_stats_of_micro_batches(facts, forward_only):
    result, micro_batches = facts[0]["report"]
    keys = {"lm loss", "dft/loss", "dft/prob", "dft/gate", "dft/accuracy", "dft/entropy"}
    for report, (nll, stats, weights, mask) in zip(result[forward_only], micro_batches, strict=True):
        assert set(report) == keys and weights.sum() == mask.sum() == stats.valid.sum() == len(stats.valid)
        same(report["lm loss"].view(-1), torch.stack([(nll * mask).sum(), mask.sum()]), 1e-5)
        same(nll.t()[mask.t() > 0], stats.nll, 1e-5)
        for name, column in {
            "dft/prob": torch.exp(-stats.nll),
            "dft/entropy": stats.entropy,
            "dft/gate": torch.exp(-stats.entropy),
            "dft/loss": torch.exp(-stats.entropy) * stats.nll,
            "dft/accuracy": stats.top1.float(),
        }.items():
            same(report[name].view(-1), torch.stack([(column * weights).sum(), mask.sum()]), 1e-5)


def test_report_counts_tokens_of_its_own_micro_batch(facts):
    first, second = facts[0]["report"][0][False]
    assert first["dft/prob"][1] > 2 * second["dft/prob"][1]


def test_repeated_micro_batch_has_same_report(facts):
    """The body of test_gpu.py::test_micro_batch_has_no_host_device_sync_after_first."""
    for rank in facts:
        first, second = rank["micro-batches"]
        assert first.keys() == second.keys() >= {"dft/loss", "dft/valid_tokens", "dft/channel/b/tokens"}
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_mtp_keeps_nll_unless_requested(facts):
    for rank in facts:
        stock, kept, changed = (rank["mtp"][key] for key in (None, "nll", "same"))
        assert stock
        same(kept, stock, 2e-5)
        weight = next(name for name, g in stock.items() if name.endswith("eh_proj.weight") and g.any())
        assert changed[weight].norm() < 0.9 * stock[weight].norm()


@pytest.mark.parametrize("variant", VARIANTS)
def test_mtp_gradient_is_equal_in_every_variant(facts, variant):
    if ("mtp", variant) not in facts[0]:
        pytest.skip("this Megatron has no output_processor; test_loss_head.py tests the error")
    for rank in facts:
        same(rank["mtp", variant], rank["mtp"][None], 2e-5)


def test_drop_in_cross_entropy_has_megatron_signature_and_dft_loss(facts):
    ours, ce, theirs = facts[0]["drop-in"]
    same(ours, dft_line(ce), 1e-5)
    signature = names_and_defaults(vocab_parallel_cross_entropy)
    assert theirs == signature[: len(theirs)]
    assert [name for name, _ in signature[len(theirs) :]] in ([], ["tp_group"])  # newer than megatron-core 0.16.1


@pytest.mark.parametrize(
    ("case", "fragments"),
    [
        ("twice", ("already replaced", "call install() once")),
        ("gathered", ("split over 2", "parallel_output=True")),
        ("width", ("66 / 2 columns", "got 32", "--make-vocab-size-divisible-by")),
        ("te", ("--cross-entropy-fusion-impl te", "switch off --cross-entropy-loss-fusion")),
        ("not installed", ("install() was not called", "remove --loss-type")),
    ],
)
def test_incompatible_models_are_rejected(facts, case, fragments):
    for fragment in fragments:
        assert fragment in facts[0]["errors"][case]


def loss_func_of_either(loss_mask, output):
    """The loss_func of Megatron-Bridge: LLaVA returns its own mask with the output."""
    return loss_func(output[1], output[0]) if isinstance(output, tuple) else loss_func(loss_mask, output)


@pytest.mark.parametrize("own_mask", [False, True])
def test_report_excludes_masked_tokens_with_inf_or_nan_loss(own_mask):
    nll, mask = torch.tensor([[0.5, torch.inf, torch.nan]]), torch.tensor([[1.0, 0.0, 0.0]])
    prob = torch.exp(-nll)
    stats = TokenStats(-nll.t(), torch.ones(3, 1, dtype=torch.bool), loss=(prob * nll).t(), gate=prob.t())
    micro_batch = MicroBatch(stats, None, Inputs(torch.zeros(1, 3, dtype=torch.int64), None, None), DFT())
    result = ((nll, mask), torch.ones(1, 3)) if own_mask else (nll, mask)
    counted = []
    head = SimpleNamespace(model=SimpleNamespace(config=None), note_counted=counted.append, check_tokens=lambda: None)
    report = _Report(DFTConfig("dft"), None, None)
    func = report.of(partial(loss_func_of_either, result[1]), head, lambda: micro_batch)
    loss, tokens, report = func(result[0])
    assert (loss.item(), tokens.item()) == (0.5, 1)
    assert [without_loss.any().item() for without_loss in counted] == [False]
    assert report["dft/prob"].tolist() == pytest.approx([math.exp(-0.5), 1.0])
    assert report["dft/loss"].tolist() == pytest.approx([0.5 * math.exp(-0.5), 1.0])


@pytest.mark.parametrize("variant", VARIANTS)
def test_full_metrics_match_tokens_of_callback(facts, variant):
    """The report equals sums over the tokens that the callback received on one rank."""
    reports, seen = facts[0]["full metrics", variant]
    assert [training for *_, training in seen] == [True, True, False]
    known = {}
    for i, (report, (nll, loss, mask, channel, training)) in enumerate(zip(reports, seen, strict=True)):
        torch.testing.assert_close((loss * mask).sum(), (nll * torch.exp(-nll) * mask).sum())
        if training:
            assert report["dft/valid_tokens"] == mask.sum()
        if variant == "out of place":
            assert not any(name.count("/") > 1 for name in report) and channel is None
            continue
        assert torch.equal(channel, channels_of(int(i == 1)))
        for number, name in enumerate(("other", "a", "b")):
            of_channel = mask * (channel == number)
            assert report[f"dft/channel/{name}/tokens"] == of_channel.sum()
            if of_channel.any():
                known[name] = (nll * of_channel).sum() / of_channel.sum(), (loss * of_channel).sum() / of_channel.sum()
            assert float(report[f"dft/channel/{name}/nll"]) == pytest.approx(known[name][0].item(), rel=1e-6)
            assert float(report[f"dft/channel/{name}/loss"]) == pytest.approx(known[name][1].item(), rel=1e-6)
        shares = [float(x) for name, x in report.items() if name.startswith("dft/prob/")]
        assert (sum(shares), len(shares)) == ((pytest.approx(1.0), 10) if training else (0, 0))
    assert reports[1].get("dft/channel/b/tokens", 0) == 0


def test_install_rejects_other_config():
    with pytest.raises(ValueError, match=r"install: expected a DFTConfig, got str; write DFTConfig\(loss_type='dft'\)"):
        install([torch.nn.Linear(2, 2)], "dft")


def test_install_rejects_single_module():
    with pytest.raises(ValueError, match=r"install: expected a list of model chunks, got Linear; pass \[model\]"):
        install(torch.nn.Linear(2, 2), DFTConfig("dft"))


def test_install_rejects_module_without_language_model():
    with pytest.raises(ValueError, match=r"expected a Megatron language model .* got Linear"):
        install([torch.nn.Linear(2, 2)], DFTConfig(loss_type="dft"))


def test_drop_in_cross_entropy_rejects_label_smoothing():
    with pytest.raises(ValueError, match=r"label smoothing: expected 0, got 0.1"):
        vocab_parallel_cross_entropy(torch.zeros(1, 1, 4), torch.zeros(1, 1, dtype=torch.int64), 0.1)


@pytest.mark.parametrize(
    ("settings", "fragments"),
    [
        ({"context_parallel_size": 2}, "with --context-parallel-size 2 requires --calculate-per-token-loss"),
        ({"label_smoothing": 0.1}, "label smoothing: expected 0, got 0.1"),
        ({"logits_load_dir": "teacher"}, "--logits-load-dir"),
        ({"logits_save_dir": "teacher"}, "--logits-save-dir"),
        ({"export_kd_teacher_load": "teacher"}, "--export-kd-teacher-load"),
        ({"perform_rl_step": True}, "--perform-rl-step"),
        ({"cross_entropy_loss_fusion": True, "cross_entropy_fusion_impl": "te"}, "--cross-entropy-fusion-impl te"),
        (
            {"cross_entropy_loss_fusion": True, "cross_entropy_fusion_impl": "linear"},
            "--cross-entropy-fusion-impl linear",
        ),
        ({"mtp_num_layers": 1, "overlap_moe_expert_parallel_comm": True}, "--dft-mtp same"),
    ],
)
def test_check_settings_rejects_incompatible_settings(settings, fragments):
    arguments = SimpleNamespace(calculate_per_token_loss=False, cross_entropy_fusion_impl="native")
    compat.check_settings(arguments, DFTConfig(loss_type="dft"))
    vars(arguments).update(settings)
    with pytest.raises(ValueError, match=fragments):
        compat.check_settings(arguments, DFTConfig(loss_type="dft"))


def test_check_settings_requires_fp32_main_grad_for_token_chunks():
    config = DFTConfig("dft", linear_fused=True, token_chunk=64)
    accepted = {"calculate_per_token_loss": True, "cross_entropy_fusion_impl": "native"}
    in_fp16 = {**accepted, "fp16": True, "accumulate_allreduce_grads_in_fp32": False}
    for settings in (accepted, {**in_fp16, "accumulate_allreduce_grads_in_fp32": True}, {**in_fp16, "fp16": False}):
        compat.check_settings(SimpleNamespace(**settings), config)
    for settings in (in_fp16, {**accepted, "grad_reduce_in_bf16": True}):
        compat.check_settings(SimpleNamespace(**settings), DFTConfig("dft", linear_fused=True))
        with pytest.raises(ValueError, match=r"requires an fp32 main_grad.*add --accumulate-allreduce-grads-in-fp32"):
            compat.check_settings(SimpleNamespace(**settings), config)


def test_check_settings_rejects_talr_where_ranks_run_different_numbers_of_micro_batches():
    arguments = SimpleNamespace(hybrid_context_parallel=True)
    compat.check_settings(arguments, DFTConfig(loss_type="dft"))
    with pytest.raises(ValueError, match=r"talr.* cannot be combined with --hybrid-context-parallel"):
        compat.check_settings(arguments, DFTConfig(loss_type="talr:start=1,ramp=1"))


def test_check_settings_rejects_reference_with_schedule_plan():
    arguments = SimpleNamespace(overlap_moe_expert_parallel_comm=True)
    with pytest.raises(ValueError, match="--loss-type iw cannot be combined with --overlap-moe"):
        compat.check_settings(arguments, DFTConfig(loss_type="iw"))


def test_check_settings_rejects_channels_with_schedule_plan():
    arguments = SimpleNamespace(overlap_moe_expert_parallel_comm=True)
    compat.check_settings(arguments, DFTConfig(loss_type="dft"))
    with pytest.raises(ValueError, match=r"--dft-channels cannot be combined with"):
        compat.check_settings(arguments, DFTConfig(loss_type="dft", channels="a"))


def test_check_settings_accepts_context_parallel_with_per_token_loss():
    arguments = SimpleNamespace(context_parallel_size=2, calculate_per_token_loss=True)
    compat.check_settings(arguments, DFTConfig(loss_type="dft"))


def loss_func_behind_labels(labels, loss_mask, output):
    return loss_func(loss_mask, output)


def unnamed(mask, output):
    return loss_func(mask, output)


LABELS, MASK = torch.arange(3), torch.tensor([1.0, 0.0, 1.0])


@pytest.mark.parametrize(
    "named",
    [
        partial(loss_func, MASK),
        partial(loss_func, loss_mask=MASK),
        partial(loss_func_behind_labels, LABELS, MASK),
        partial(unnamed, MASK),
        partial(unnamed, MASK.bool()),
    ],
)
def test_loss_mask_of_finds_mask_by_name_or_dtype(named):
    assert torch.equal(compat.loss_mask_of(named, None, 3).float(), MASK)


def test_loss_mask_of_closure_is_mask_given_to_model():
    assert compat.loss_mask_of(lambda output: loss_func(MASK, output), MASK, 3) is MASK


@pytest.mark.parametrize(
    "wrong",
    [loss_func, partial(loss_func), partial(unnamed, "mask"), partial(unnamed, LABELS), partial(max, MASK, MASK)],
)
def test_loss_mask_of_rejects_loss_func_without_mask(wrong):
    with pytest.raises(ValueError, match=r"return functools.partial\(loss_func, loss_mask, ...\) from forward_step"):
        compat.loss_mask_of(wrong, None, 3)
