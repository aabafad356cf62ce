"""Every form of forward_step and loss_func that Megatron accepts trains with the objective or raises ValueError.

Megatron models and schedules on two tensor-parallel ranks. The reference is Megatron's own loss with DFT as one line on
top of it.
"""

import importlib.util
from functools import partial

import pytest
import torch
from ranks import run_ranks
from tiny_models import (
    BATCH,
    SEQUENCE,
    VARIANTS,
    batch,
    dft_line,
    forward,
    gpt,
    loss_func,
    message,
    same,
    start,
)

from megatron_dft import DFTConfig, install
from megatron_dft.hosts import compat
from megatron_dft.hosts.binding import head_of, with_metrics
from megatron_dft.labels import with_channels

pytest.importorskip("megatron.core")

HAS_PLAN = importlib.util.find_spec("megatron.core.models.common.model_chunk_schedule_plan") is not None


def plain(output):
    return output


TRANSFORMS = {  # operations of a forward_step on the model's output
    "unchanged": plain,
    "clone": torch.clone,
    "flat": lambda output: output.view(-1),
    "times 1": lambda output: output * 1,
    "to fp32": lambda output: output.float(),
    "detour": lambda output: torch.cat([output[:1], output[1:]]),
}


def behind_labels(labels, loss_mask, output):
    return loss_func(loss_mask, output.view(-1))


def output_first(output, loss_mask):
    return loss_func(loss_mask, output)


def flat_mask(loss_mask, output):
    return loss_func(loss_mask.reshape(-1), output.view(-1))


def mean_and_report(loss_mask, output):
    """The legacy form of Megatron's loss_func, with two values."""
    total, tokens, report = loss_func(loss_mask, output)
    return total / tokens.clamp(min=1), report


def closure(labels, loss_mask):
    return lambda output: loss_func(loss_mask, output)


def unnamed_mask(mask, output):
    return loss_func(mask, output)


def integer_num_tokens(loss_mask, output):
    loss, tokens, report = loss_func(loss_mask, output)
    return loss, int(tokens), report


def from_list(loss_mask, output):
    return loss_func(loss_mask, output[0])


LOSS_FUNCS = {
    "loss_mask first": lambda labels, loss_mask: partial(loss_func, loss_mask),
    "loss_mask by name": lambda labels, loss_mask: partial(output_first, loss_mask=loss_mask),
    "labels first": lambda labels, loss_mask: partial(behind_labels, labels, loss_mask),
    "closure": closure,
    "mask by its dtype": lambda labels, loss_mask: partial(unnamed_mask, loss_mask),
    "mask that is a view": lambda labels, loss_mask: partial(
        flat_mask, torch.stack([loss_mask, loss_mask], -1)[..., 0]
    ),
    "num_tokens is an int": lambda labels, loss_mask: partial(integer_num_tokens, loss_mask),
    "two values": lambda labels, loss_mask: partial(mean_and_report, loss_mask),
}


def decorated(function):
    """A decorator that hides the names of the arguments."""
    return lambda *args, **kwargs: function(*args, **kwargs)


def step(transform=plain, make=LOSS_FUNCS["loss_mask first"], line=None, passes=1):
    """A forward_step. `line` is applied to the loss of the model."""

    def forward_step(data_iterator, model):
        tokens, labels, loss_mask = next(data_iterator)
        for _ in range(passes):
            output = forward(model, tokens, labels, loss_mask)
        made = make(labels, loss_mask)
        return transform(output), made if line is None else lambda x: made(line(x))

    return forward_step


def run(forward_step, config=None, model=None, batches=None, per_token=True, **kwargs):
    """Report and gradients of a step of two micro-batches through Megatron's schedule."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    model = model or gpt(calculate_per_token_loss=per_token)
    if config is not None:
        install([model], config)
        forward_step = with_metrics(forward_step, config, **kwargs)
    batches = batches or [batch(0), batch(1)]
    report = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(batches),
        model=[model],
        num_microbatches=len(batches),
        seq_length=SEQUENCE,
        micro_batch_size=BATCH,
        forward_only=False,
    )
    return report, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def with_full_backward_hook():
    model = gpt()
    model.register_full_backward_hook(lambda module, into, out: None)
    return model


def multi_token_prediction(config, masked_labels, given):
    """Gradients of the MTP layers, for scripts that mask labels and scripts that pass the mask to the model."""
    model = gpt(mtp_num_layers=1)
    if config is not None:
        install([model], config)
    tokens, labels, loss_mask = batch()
    if masked_labels:
        labels = labels.masked_fill(loss_mask == 0, -100)
    output = forward(model, tokens, labels, loss_mask if given else None)
    (output * loss_mask).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if name.startswith("mtp.")}


def model_with_own_loss():
    """A model whose forward computes its loss without compute_language_model_loss."""
    model = gpt()
    kind = type("OwnLoss", (type(model),), {"forward": own_forward})
    model.__class__ = kind
    return model


def own_forward(self, *args, labels=None, **kwargs):
    logits = super(type(self), self).forward(*args, **kwargs)  # without labels
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels % logits.shape[-1], reduction="none")


def schedule_plan_labels():
    """Check the labels that build_schedule_plan of --overlap-moe-expert-parallel-comm receives."""
    model = gpt()
    seen = {}
    model.build_schedule_plan = lambda tokens, positions, mask, labels=None, loss_mask=None: seen.update(labels=labels)
    install([model], DFTConfig("cayley"))
    tokens, labels, loss_mask = batch()
    model.build_schedule_plan(tokens, tokens, None, labels=labels, loss_mask=loss_mask)
    head = head_of(model)
    return seen["labels"] is head.inputs.labels, torch.equal(head._target(head.inputs) >= 0, loss_mask.t() > 0)


def removed():
    model = gpt()
    before = set(vars(model)), len(model._forward_pre_hooks), len(model._forward_hooks)
    handle = install([model], DFTConfig("dft"))
    bound = compat.LOSS in vars(model) and head_of(model) is handle.bindings[0].head
    described = handle.bindings[0].output_layer
    handle.remove()
    after = set(vars(model)), len(model._forward_pre_hooks), len(model._forward_hooks)
    again = message(lambda: install([model], DFTConfig("nll")))  # not "already replaced"
    return before == after, bound, described, again


def out_of_range(variant):
    """Where the loss is NaN if one label is not a token id."""
    (model,) = install([gpt()], DFTConfig("dft", **VARIANTS[variant])).chunks
    tokens, labels, loss_mask = batch()
    labels[0, 0], loss_mask[0, 0] = 2**33 + 3, 1.0
    return forward(model, tokens, labels, loss_mask).isnan()


def on_ranks():
    start()
    dft = DFTConfig("dft")
    facts = {"host": run(step(line=dft_line)), "host, mean": run(step(make=legacy_line), per_token=False)}
    for name, transform in TRANSFORMS.items():
        facts["transform", name] = run(step(transform), dft)
    facts["transform", "decorated"] = run(decorated(step()), dft)
    facts["transform", "full backward hook"] = run(step(), dft, with_full_backward_hook())
    for name, make in LOSS_FUNCS.items():
        facts["loss_func", name] = run(step(make=make), dft, per_token=name != "two values")
    facts["loss_func", "output in a list"] = run(
        step(lambda output: [output], lambda labels, loss_mask: partial(from_list, loss_mask)), dft
    )
    facts["closure"] = message(lambda: run(step(make=lambda labels, mask: closure(labels, torch.ones_like(mask))), dft))
    facts["unnamed wrong mask"] = message(lambda: run(step(make=all_tokens_unnamed), dft))
    facts["transposed"] = message(lambda: run(step(lambda x: x.t().contiguous(), transposed), dft))
    facts["ignored counted"] = message(lambda: run(step(make=all_tokens), dft, batches=[ignored_labels()]))
    facts["later"] = run(step(make=later_all_tokens()), dft)[0]
    facts["wrong mask"] = message(lambda: run(step(make=all_tokens), dft))
    facts["too short"] = message(lambda: run(step(lambda output: output[:, 1:], shorter), dft))
    facts["twice"] = message(lambda: run(step(passes=2), dft))
    facts["two values per token"] = message(lambda: run(step(make=LOSS_FUNCS["two values"]), dft))
    facts["unnamed channel"] = message(
        lambda: run(step(), DFTConfig("dft", channels="a"), batches=[batch_of_channel(2)])
    )
    facts["elsewhere"] = message(lambda: forward(install([model_with_own_loss()], dft).chunks[0], *batch()))
    facts["not through forward"] = message(lambda: through_forward_method())
    for mtp in ("nll", "same"):
        config = DFTConfig("nll", mtp=mtp)
        for case in ((True, True), (True, False), (False, True)):
            facts["mtp", mtp, case] = multi_token_prediction(config, *case)
    facts["mtp host"] = multi_token_prediction(None, False, True)
    facts["plan"] = schedule_plan_labels()
    facts["removed"] = removed()
    for variant in VARIANTS:
        facts["out of range", variant] = out_of_range(variant)
    facts["totals"] = run(step(), DFTConfig("dft", metrics="full"), micro_batches=lambda: 2)[0]
    return facts


def legacy_line(labels, loss_mask):
    return lambda output: mean_and_report(loss_mask, dft_line(output))


def all_tokens(labels, loss_mask):
    """A loss_func that counts tokens which the mask of the model excludes."""
    return partial(loss_func, torch.ones_like(loss_mask))


def all_tokens_unnamed(labels, loss_mask):
    return partial(unnamed_mask, torch.ones_like(loss_mask))


def later_all_tokens():
    """A loss_func with the correct mask in the first micro-batch only."""
    masks = []

    def make(labels, loss_mask):
        masks.append(loss_mask)
        return partial(loss_func, loss_mask if len(masks) == 1 else torch.ones_like(loss_mask))

    return make


def transposed(labels, loss_mask):
    return partial(loss_func, loss_mask.t().contiguous())


def ignored_labels():
    """A batch with label -100 at masked tokens and a loss mask of ones."""
    tokens, labels, loss_mask = batch()
    return tokens, labels.masked_fill(loss_mask == 0, -100), torch.ones_like(loss_mask)


def shorter(labels, loss_mask):
    return partial(loss_func, loss_mask[:, 1:])


def batch_of_channel(channel):
    tokens, labels, loss_mask = batch()
    return tokens, with_channels(labels, channel), loss_mask


def through_forward_method():
    (model,) = install([gpt(mtp_num_layers=1)], DFTConfig("dft")).chunks
    tokens, labels, _ = batch()
    positions = torch.arange(SEQUENCE).expand(BATCH, -1)
    model.forward(tokens, positions, torch.ones(1, 1, SEQUENCE, SEQUENCE).triu(1).bool(), labels=labels)


@pytest.fixture(scope="module")
def facts():
    return run_ranks(2, on_ranks, timeout=150)


@pytest.mark.parametrize("name", [*TRANSFORMS, "decorated", "full backward hook"])
def test_forward_step_output_transform_keeps_loss_and_gradient(facts, name):
    for rank in facts:
        report, gradient = rank["transform", name]
        same(gradient, rank["host"][1], 2e-5)
        same([x["dft/loss"].view(-1) for x in report], [x["lm loss"].view(-1) for x in rank["host"][0]], 1e-5)


@pytest.mark.parametrize("name", [*LOSS_FUNCS, "output in a list"])
def test_loss_func_form_keeps_loss_and_gradient(facts, name):
    for rank in facts:
        report, gradient = rank["loss_func", name]
        same(gradient, rank["host, mean" if name == "two values" else "host"][1], 2e-5)
        same([x["dft/loss"].view(-1) for x in report], [x["lm loss"].view(-1) for x in rank["host"][0]], 1e-5)
        assert [x["dft/prob"][1] for x in report] == [batch(seed)[2].sum() for seed in (0, 1)]


@pytest.mark.parametrize(
    ("case", "fragments"),
    [
        ("wrong mask", ("its loss mask counts tokens that have no loss", "use the same mask for both")),
        ("unnamed wrong mask", ("its loss mask counts tokens that have no loss",)),
        ("ignored counted", ("their label is -100",)),
        ("closure", ("counts 24 tokens, but the loss_mask passed to the model has", "return functools.partial")),
        ("transposed", ("the per-token loss of the model (3, 8)", "the loss mask has shape (8, 3)")),
        (
            "too short",
            ("the per-token loss of the model (3, 8)", "shape (3, 7)", "unchanged from forward_step"),
        ),
        ("twice", ("expected one forward pass with labels, got 2",)),
        ("two values per token", ("--calculate-per-token-loss", "got two values")),
        ("unnamed channel", ("--dft-channels a:", "a label has channel 2,")),
        ("elsewhere", ("OwnLoss", "never called compute_language_model_loss")),
        ("not through forward", ("--dft-mtp nll", "call model(...), not model.forward(...)")),
    ],
)
def test_forward_step_rejects_invalid_mask_output_or_call(facts, case, fragments):
    for fragment in fragments:
        assert fragment in facts[0][case], facts[0][case]


def test_wrong_loss_mask_in_later_micro_batch_makes_loss_nan(facts):
    first, second = (x["lm loss"].view(-1)[0] for x in facts[0]["later"])
    assert first.isfinite() and second.isnan()


@pytest.mark.parametrize("case", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("mtp", ["nll", "same"])
def test_mtp_excludes_ignored_labels(facts, mtp, case):
    """Scripts may pass the mask to the model, mask the labels, or both."""
    for rank in facts:
        same(rank["mtp", mtp, case], rank["mtp host"], 2e-5)


def test_schedule_plan_ignores_masked_labels(facts):
    assert facts[0]["plan"] == (True, True)


def test_install_handle_describes_and_removes_binding(facts):
    assert facts[0]["removed"] == (True, True, "masked tokens skip the output layer", "no error")


@pytest.mark.parametrize("variant", VARIANTS)
def test_label_out_of_range_makes_only_its_loss_nan(facts, variant):
    expected = torch.zeros(BATCH, SEQUENCE, dtype=torch.bool)
    expected[0, 0] = True
    assert torch.equal(facts[0]["out of range", variant], expected)


def test_totals_are_summed_over_micro_batches(facts):
    pairs = torch.stack([x["dft/valid_tokens"] for x in facts[0]["totals"]]).sum(0)
    assert pairs.tolist() == [sum(float(batch(seed)[2].sum()) for seed in (0, 1)), 1.0]
    effective = torch.stack([x["dft/effective_tokens"] for x in facts[0]["totals"]]).sum(0)
    gate = torch.stack([x["dft/gate"] for x in facts[0]["totals"]]).sum(0)
    same(effective, torch.stack([gate[0].double(), torch.ones(()).double()]), 1e-6)
