"""Weights of the data and --dft-reduction: gradients against the definition, data, errors, real runs in all layouts."""

import importlib.util
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from ranks import run_ranks
from tiny_models import BATCH, SEQUENCE, VARIANTS, batch, dft_line, forward, gpt, loss_func, message, same, start

from megatron_dft import DFTConfig, install
from megatron_dft.hosts.binding import with_metrics
from megatron_dft.hosts.loss_head import ignore_masked
from megatron_dft.labels import split_counts, with_conversations, with_weights

pytest.importorskip("megatron.core")

MEAN_LENGTH = 60
ENDS = ((5, 8), (8,), (3, 6, 8))  # of the conversations in each row
LAST = torch.tensor([[0, 0, 0, 0, 1, 0, 0, 1], [0] * 7 + [1], [0, 0, 1, 0, 0, 1, 0, 1]]).bool()


def packed(seed):
    """A batch of packed conversations: tokens, labels, loss mask, weights, conversation of each token."""
    tokens, labels, loss_mask = batch(seed)
    loss_mask = loss_mask.masked_fill(LAST, 0.0)
    labels = labels.masked_fill(loss_mask == 0.0, -100)
    generator = torch.Generator().manual_seed(seed)
    weights = 2.0 ** torch.randint(-3, 4, (BATCH, SEQUENCE), generator=generator)
    conversation = LAST.flatten().cumsum(0).view_as(LAST) - LAST.long()
    return tokens, labels, loss_mask, weights, conversation


def carried(labels, weights, config):
    if not config.by_conversation:
        return with_weights(labels, weights) if config.weights else labels
    rows = [
        with_conversations(
            row,
            torch.tensor([0, *ends]),
            config.reduction,
            MEAN_LENGTH,
            weight if config.weights else None,
        )
        for row, weight, ends in zip(labels, weights, ENDS, strict=True)
    ]
    return torch.stack(rows)


def trained(config):
    """Gradients after two micro-batches of Megatron's schedule, divided as Megatron divides them; report; divisor."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    model, divisors = gpt(), []
    model.config.finalize_model_grads_func = lambda chunks, num_tokens, **_: divisors.append(num_tokens.item())

    def forward_step(data_iterator, model):
        tokens, labels, loss_mask, weights, _ = next(data_iterator)
        output = forward(model, tokens, carried(labels, weights, config), loss_mask)
        return output, lambda x: loss_func(loss_mask, x)

    install([model], config)
    report = get_forward_backward_func()(
        forward_step_func=with_metrics(forward_step, config),
        data_iterator=iter([packed(0), packed(1)]),
        model=[model],
        num_microbatches=2,
        seq_length=SEQUENCE,
        micro_batch_size=BATCH,
        forward_only=False,
    )
    (divisor,) = divisors
    return {name: p.grad / divisor for name, p in model.named_parameters() if p.grad is not None}, report, divisor


def defined(reduction, weighted):
    """The gradients from the definition, with Megatron's own loss."""
    model, total, divisor = gpt(), 0.0, 0.0
    for seed in (0, 1):
        tokens, labels, loss_mask, weights, conversation = packed(seed)
        loss = dft_line(forward(model, tokens, labels.clamp(min=0), loss_mask))
        loss = torch.where(loss_mask > 0.0, loss * weights if weighted else loss, 0.0)
        for number in conversation.unique():
            part = conversation == number
            n = loss_mask[part].sum()
            if n > 0:
                scale, count = {"token": (1.0, n), "sample": (1 / n, 1.0), "square-root": (n**-0.5, n**0.5)}[reduction]
                total, divisor = total + scale * loss[part].sum(), divisor + count
    (total / divisor).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, divisor


def on_a_rank(reduction, weighted, variant):
    start()
    config = DFTConfig("dft", reduction=reduction, weights=weighted, **VARIANTS[variant])
    return *trained(config), trained(DFTConfig("dft"))[1], defined(reduction, weighted)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("reduction", "weighted", "variant"),
    [
        ("token", True, "dropped"),
        ("token", True, "chunks"),
        ("sample", False, "dropped"),
        ("sample", True, "not dropped"),
        ("square-root", False, "chunks, kept"),
        ("square-root", True, "dropped"),
        ("token", True, "token chunks, not dropped"),
        ("sample", True, "token chunks"),
    ],
)
def test_gradient_is_mean_of_the_reduction(reduction, weighted, variant, ranks):
    for ours, report, divisor, plain, (expected, exact) in run_ranks(ranks, on_a_rank, reduction, weighted, variant):
        exact *= {"token": 1, "sample": MEAN_LENGTH, "square-root": MEAN_LENGTH**0.5}[reduction]
        assert divisor == pytest.approx(exact, abs=0.5 * 2 * BATCH if reduction == "square-root" else 0.0)
        for name, gradient in expected.items():
            scale = gradient.abs().max() * exact / divisor
            same(ours[name] / scale, gradient / scale * exact / divisor, 5e-4 if reduction == "square-root" else 2e-5)
        for pairs, without in zip(report, plain, strict=True):  # metrics are means over tokens, without weights
            weight = pairs.pop("dft/weight")
            assert pairs.keys() == without.keys() and weight[1] == pairs["dft/loss"][1]
            same(pairs, without, 1e-5)


def test_zigzag_context_parallel_ranks_add_the_same_counts():
    labels = with_conversations(
        torch.tensor([-100, 7, 8, -100, 9, 9, -100, -100]), torch.tensor([0, 4, 8]), "sample", 9
    )
    parts = labels.chunk(4)
    counts = [split_counts(torch.cat([parts[rank], parts[3 - rank]]))[1] for rank in (0, 1)]
    assert sum(counts) == split_counts(labels)[1] == 18


def test_ignore_masked_keeps_counts():
    masked = ignore_masked({"labels": torch.tensor([5, 6, -100, -160]), "loss_mask": torch.tensor([1.0, 0, 0, 0])})
    assert masked["labels"].tolist() == [5, -100, -100, -160]


def micro_batch(config, make):
    """Forward pass and loss_func of a micro-batch whose labels are `make(labels)`."""
    model = gpt()
    install([model], config)

    def forward_step(data_iterator, model):
        tokens, labels, loss_mask = batch()
        return forward(model, tokens, make(labels), loss_mask), lambda output: loss_func(loss_mask, output)

    output, wrapped = with_metrics(forward_step, config)(None, model)
    wrapped(output)


def messages():
    start()
    weights, sample = DFTConfig("dft", weights=True), DFTConfig("dft", reduction="sample")

    def half(labels):
        return with_weights(labels, torch.full(labels.shape, 0.5))

    def by_conversation(labels):
        offsets = torch.tensor([0, SEQUENCE])
        labels = labels.index_fill(1, torch.tensor([SEQUENCE - 1]), -100)
        return torch.stack([with_conversations(row, offsets, "sample", 5) for row in labels])

    def alone():
        forward(install([gpt()], sample).chunks[0], *batch())

    return {
        "no weight": message(lambda: micro_batch(weights, torch.clone)),
        "no weight, sample": message(lambda: micro_batch(sample, torch.clone)),
        "no conversations": message(lambda: micro_batch(sample, half)),
        "conversations": message(lambda: micro_batch(weights, by_conversation)),
        "unused": message(lambda: micro_batch(DFTConfig("dft"), half)),
        "used": message(lambda: micro_batch(weights, half)),
        "no with_metrics": message(alone),
        "per micro-batch": message(lambda: install([gpt(calculate_per_token_loss=False)], sample)),
    }


@pytest.fixture(scope="module")
def found():
    return run_ranks(1, messages)[0]


def test_label_without_weight_ends_the_run(found):
    data = "a label carries no weight; train on token files of megatron-dft data, return labels of"
    for name in ("no weight", "conversations"):
        assert found[name].startswith(f"--dft-weights: {data} with_weights from your data set")
    for name in ("no weight, sample", "no conversations"):
        assert found[name].startswith(f"--dft-reduction sample: {data} with_conversations(..., 'sample')")


def without_metrics():
    start()
    model = install([gpt()], DFTConfig("dft", weights=True)).chunks[0]
    tokens, labels, loss_mask = batch()
    return forward(model, tokens, labels, loss_mask).isnan(), loss_mask


def test_label_without_weight_is_nan_without_with_metrics():
    nan, loss_mask = run_ranks(1, without_metrics)[0]
    assert torch.equal(nan, loss_mask != 0)


def test_unused_weight_is_rejected(found):
    assert found["used"] == "no error"
    assert found["unused"].startswith("--loss-type dft: a label carries a weight; add --dft-weights")


def test_reduction_requires_per_token_loss_and_with_metrics(found):
    assert "--dft-reduction sample requires --calculate-per-token-loss" in found["per micro-batch"]
    assert "wrap forward_step by with_metrics(forward_step, config)" in found["no with_metrics"]


# Data

needs_transformers = pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")


def tokenized(template, *turns, of_record=1.0):
    """Pieces of text in the loss with their weights, from turns of (question, answer, weight)."""
    from chat_examples import talk, tokenizer

    from megatron_dft.data.conversations import conversation_of
    from megatron_dft.data.tokens import ConversationTokenizer

    chat = talk(*(text for question, answer, _ in turns for text in (question, answer)))
    for reply, (_, _, weight) in zip(chat[1::2], turns, strict=True):
        reply["weight"] = weight
    fast = tokenizer(template)
    (sequences,) = ConversationTokenizer(fast).encode([conversation_of({"messages": chat, "weight": of_record})])
    if isinstance(sequences, ValueError):
        raise sequences
    return [
        (fast.decode(sequence.ids[first:last]), weight)
        for sequence in sequences
        for (first, last), weight in zip(sequence.spans, sequence.weights, strict=True)
    ]


JOINED = (
    "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ '<|eot|>' }}{% endif %}{% endfor %}"
)


@needs_transformers
def test_turns_have_their_weights():
    from chat_examples import CHATML, MARKED, THINKING

    turns = (("one", "yes", 0.25), ("and", "no", 0), ("two", "maybe", 3))
    for template in (CHATML, MARKED, THINKING):
        found = tokenized(template, *turns, of_record=2.0)
        assert [weight for _, weight in found] == [0.5, 6.0]
        assert ["yes" in found[0][0], "maybe" in found[1][0]] == [True, True]
    adjacent = tokenized(JOINED, ("one", "yes", 0.5), ("", "no", 2.0))
    assert adjacent == [("yes<|eot|>", 0.5), ("no<|eot|>", 2.0)]


def test_weights_with_a_boolean_are_combined():
    from megatron_dft.data.conversations import conversation_of

    user, reply = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    for fields, weight in (
        ({"train": True, "weight": 0.5}, 0.5),
        ({"loss_scale": 2}, 2.0),
        ({"loss": 1, "train": 1}, 1.0),
    ):
        assert conversation_of({"messages": [user, {**reply, **fields}]}).weights == {1: weight}
    for fields in ({"train": False, "weight": 0.5}, {"train": True, "weight": 0}, {"loss": 2, "weight": 0.5}):
        with pytest.raises(ValueError, match="contradict each other"):
            conversation_of({"messages": [user, {**reply, **fields}]})


@needs_transformers
@pytest.mark.parametrize(
    ("weight", "of_record", "message"),
    [
        (-1, 1, r"unsupported weight: message 1: weight: expected a number >= 0"),
        (math.nan, 1, r"unsupported weight: message 1: weight: expected a number >= 0"),
        ("high", 1, "expected a number >= 0, false or true, got 'high'"),
        (1e-3, 1e-3, r"message 1: expected 0, or 0.0001 to 10000, got 1e-06 \(weight of the message times"),
    ],
)
def test_invalid_weights_are_rejected(weight, of_record, message):
    from chat_examples import CHATML

    with pytest.raises(ValueError, match=message):
        tokenized(CHATML, ("one", "yes", weight), of_record=of_record)


@needs_transformers
def test_marks_without_turns_need_one_weight():
    from chat_examples import MARKED

    twice = MARKED.replace("{{ m['content'] + '<|im_end|>' }}{% end", "{{ m['content'] }}{% endgeneration %}{{ ' ' }}"
                           "{% generation %}{{ '<|im_end|>' }}{% end", 1)  # fmt: skip
    assert {weight for _, weight in tokenized(twice, ("one", "yes", 2), ("two", "no", 2))} == {2.0}
    with pytest.raises(ValueError, match="cannot be assigned to turns of different weights"):
        tokenized(twice, ("one", "yes", 1), ("two", "no", 2))


# Real runs


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    pytest.importorskip("megatron.training")
    from chat_examples import talk, tokenizer
    from chat_runs import CHAT_MODEL
    from host_runs import Host

    from megatron_dft.data import __main__ as command

    host = Host(tmp_path_factory.mktemp("weights"))
    folder = host.folder
    tokenizer().save_pretrained(folder / "tokenizer")
    for name, weights in (("weighted", (0.5, 1, 2)), ("plain", (1,))):
        records = []
        for i in range(120):
            messages = talk("one " * (i % 7), "yes no " * (i % 23 + 1), "and", "two")
            messages[1]["weight"] = weights[i % len(weights)]
            records.append({"messages": messages})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        argv = [str(folder / f"{name}.jsonl"), "--tokenizer", str(folder / "tokenizer"), "--seq-length", "256"]
        argv += ["--context-parallel-size", "2", "--tensor-model-parallel-size", "2", "--sequence-parallel"]
        command.main([*argv, "--out", str(folder / f"{name}.arrow")])
    model = CHAT_MODEL.replace("divisible-by 64", "divisible-by 256")
    host.flags = model + (
        "--sft --tokenizer-type HuggingFaceTokenizer --no-create-attention-mask-in-dataloader "
        f"--calculate-per-token-loss --tokenizer-model {folder / 'tokenizer'} --eval-iters 0 "
        f"--data-cache-path {folder / 'cache'} --loss-type dft "
    )
    return host


def curves(host, flags, file="weighted", **kwargs):
    from host_runs import EXAMPLE

    return host.curves(f"{host.flags}--train-data-path {host.folder / file}.arrow {flags}", script=EXAMPLE, **kwargs)


@pytest.mark.host
@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["token", "sample", "square-root"])
@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
        (2, "--context-parallel-size 2"),
        (2, ""),
        (2, "--dft-linear-fused --dft-vocab-chunk 100"),
        (2, "--dft-linear-fused --dft-token-chunk 60"),
        (4, "--context-parallel-size 2 --tensor-model-parallel-size 2 --sequence-parallel"),
    ],
)
def test_weighted_training_is_equal_in_every_layout(host, reduction, ranks, layout):
    from host_runs import agree

    flags = f"--dft-weights --dft-reduction {reduction} "
    one = curves(host, flags)
    agree(curves(host, flags + layout, ranks=ranks), one, 2e-5)
    other = curves(host, "--dft-weights") if reduction != "token" else curves(host, "", file="plain")
    assert one["grad-norm"][0] != pytest.approx(other["grad-norm"][0], rel=1e-3)
    assert one["lm loss"][0] == pytest.approx(other["lm loss"][0], rel=1e-6)  # before the first step


@pytest.mark.host
@pytest.mark.slow
def test_pipeline_stages_use_the_divisor_of_the_last_stage(host):
    from host_runs import agree

    flags = "--dft-weights --dft-reduction sample "
    save = f"--save {host.folder / 'checkpoint'} --save-interval 1 --train-iters 1 "
    curves(host, f"{flags}{save}")
    load = f"{flags}--load {host.folder / 'checkpoint'} --finetune "
    agree(curves(host, f"{load}--pipeline-model-parallel-size 2", ranks=2), curves(host, load), 2e-5)


@pytest.mark.host
@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["sample", "square-root"])
def test_conversations_without_trained_tokens_are_not_counted(host, reduction):
    """A file as after `megatron-dft clean`: every third conversation has no trained token, so its gradient is 0."""
    from host_runs import agree

    from megatron_dft.data import token_file

    file = token_file.TokenFile(str(host.folder / "plain.arrow"))
    rows, places = [], 0
    for i in range(len(file)):
        row = file[i]
        kept = np.repeat(np.arange(places, places + len(row.lengths)) % 3 > 0, row.lengths)
        places += len(row.lengths)
        rows.append(replace(row, loss_weights=row.loss_weights * kept))
    token_file.write(host.folder / "empties.arrow", file.header, rows)
    flags = f"--dft-reduction {reduction} "
    one = curves(host, flags, file="empties")
    agree(curves(host, f"{flags}--context-parallel-size 2", file="empties", ranks=2), one, 2e-5)
    assert all(0.0 < value < 10.0 for value in one["dft/weight"])
    assert one["dft/valid_tokens"][0] < curves(host, flags, file="plain")["dft/valid_tokens"][0]


@pytest.mark.host
@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "flags", "message"),
    [
        ("weighted", "", "weighted.arrow: contains weights; add --dft-weights (dft.weights)"),
        ("weighted", "--dft-reduction sample", "weighted.arrow: contains weights; add --dft-weights (dft.weights)"),
        ("plain", "--dft-weights", "plain.arrow are 1; remove the setting"),
    ],
)
def test_token_files_and_settings_must_agree(host, file, flags, message):
    from host_runs import EXAMPLE

    code, output = host.start(f"{host.flags}--train-data-path {host.folder / file}.arrow {flags}", script=EXAMPLE)
    assert code and message in output and "iteration        1/" not in output


@pytest.mark.host
def test_token_file_stores_weights(host):
    from megatron_dft.data.token_file import TokenFile, sample_of

    file = TokenFile(str(host.folder / "weighted.arrow"))
    assert file.header.weighted and not TokenFile(str(host.folder / "plain.arrow")).header.weighted
    found = np.concatenate([file[i].loss_weights for i in range(len(file))])
    assert set(found.tolist()) == {0.0, 0.5, 1.0, 2.0}
    stored = file.header.statistics["weights"]
    assert (stored["min"], stored["max"]) == (0.5, 2.0)
    assert stored["mean"] == pytest.approx(found.sum(dtype=np.float64) / (found > 0).sum())
    sample = sample_of(file[0], file.header)
    assert set(sample.loss_mask.tolist()) == {0.0, 1.0} and (sample.weights[sample.loss_mask == 0] == 1.0).all()
