"""Objectives with a reference model: the formula under every backend and split, labels, metrics, real runs."""

import json
import math
import random
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from formulas import REFERENCE_FORMULAS, example, loss_and_gradient, referenced, token
from ranks import ROOT, run_ranks

from megatron_dft import DFTConfig, linear_dft_loss, parse_objective, token_loss, vocab_parallel_dft_loss
from megatron_dft.labels import split_channels, split_reference, with_channels, with_reference
from megatron_dft.metrics import token_metrics
from megatron_dft.ops.vocab_parallel import LossOptions, loss_and_stats

TOLERANCE = {"rtol": 1e-12, "atol": 1e-12}


def make_case(vocab=12):
    logits, target, upstream = example(6, 4, vocab=vocab)
    return logits, referenced(logits, target), upstream


def run(loss_function, logits, target, upstream):
    leaf = logits.clone().requires_grad_()
    loss = loss_function(leaf * 1, target)
    loss.backward(upstream.to(loss.dtype))
    return loss.detach(), leaf.grad


# Labels


def test_label_carries_token_channel_and_reference():
    ids = torch.tensor([0, 151935, 7, 3, -100])
    nll = torch.tensor([0.0, 2.5, 1e-9, 1e9, 1.0])
    labels = with_reference(with_channels(ids, torch.tensor([1, 0, 2, 1, 1])), nll)
    rest, logprob = split_reference(labels)
    assert logprob.tolist() == [-(2.0**-24), -2.5, -(2.0**-24), -65504.0, 0.0]
    clean, channel = split_channels(rest, 3)
    assert clean.tolist() == ids.tolist() and channel.tolist() == [1, 0, 2, 1, 0]
    again, channel = split_channels(labels, 3)  # in the other order
    assert channel.tolist() == [1, 0, 2, 1, 0] and split_reference(again)[0].tolist() == ids.tolist()


def test_reference_is_stored_to_11_bits():
    nll = torch.logspace(-4, 3, 1000)
    _, logprob = split_reference(with_reference(torch.arange(1000), nll))
    torch.testing.assert_close(-logprob, nll, rtol=2.0**-11, atol=2.0**-25)


def test_missing_reference_is_nan():
    _, logprob = split_reference(with_reference(torch.tensor([5, 6, -100]), torch.tensor([math.nan, 1.0, math.nan])))
    assert logprob[0].isnan() and logprob[1:].tolist() == [-1.0, 0.0]


def test_second_reference_replaces_the_first():
    labels = with_reference(
        with_reference(torch.tensor([5, 6]), torch.tensor([1.0, 2.0])), torch.tensor([3.0, math.nan])
    )
    ids, logprob = split_reference(labels)
    assert ids.tolist() == [5, 6] and logprob[0] == -3.0 and logprob[1].isnan()


@pytest.mark.parametrize(
    ("labels", "nll", "message"),
    [
        (torch.tensor([5], dtype=torch.int32), torch.ones(1), "labels: expected int64"),
        (torch.tensor([5]), torch.tensor([-3.0]), r"nll: expected nats >= 0, got -3; pass -log p"),
        (torch.tensor([5]), torch.ones(2), r"nll: expected the shape of the labels, \(1,\), got \(2,\)"),
    ],
)
def test_invalid_references_are_rejected(labels, nll, message):
    with pytest.raises(ValueError, match=message):
        with_reference(labels, nll)


# Loss and gradient


@pytest.mark.parametrize("specification", REFERENCE_FORMULAS)
def test_loss_and_gradient_match_formula(specification):
    case = make_case()
    expected = loss_and_gradient(specification, *case)
    for ours, truth in zip(run(lambda x, t: loss_of(x, t, specification), *case), expected, strict=True):
        torch.testing.assert_close(ours, truth, **TOLERANCE)
    logits, target, upstream = case
    hidden, weight = logits.flatten(0, 1), torch.eye(12, dtype=torch.float64)

    for chunk in ({"vocab_chunk": 5}, {"token_chunk": 5, "upstream": upstream.flatten()}):

        def linear(x, t, chunk=chunk):
            return linear_dft_loss(x, weight, t, objective=specification, **chunk)

        loss, gradient = run(linear, hidden, target.flatten(), upstream.flatten())
        torch.testing.assert_close(loss.view(6, 4), expected[0], **TOLERANCE)
        torch.testing.assert_close(gradient.view(6, 4, 12), expected[1], **TOLERANCE)


def loss_of(logits, target, specification, **options):
    return vocab_parallel_dft_loss(logits, target, objective=specification, **options)


@pytest.mark.parametrize("specification", ["asft", "iw", "psft"])
def test_compiled_loss_equals_eager(specification):
    case = make_case()
    compiled = torch.compile(lambda x, t: loss_of(x, t, specification), fullgraph=True, backend="aot_eager")
    for ours, eager in zip(run(compiled, *case), run(lambda x, t: loss_of(x, t, specification), *case), strict=True):
        assert torch.equal(ours, eager)


def on_one_rank():
    group, results = dist.group.WORLD, {}
    for specification in REFERENCE_FORMULAS:
        logits, target, upstream = make_case()
        share = logits.chunk(2, -1)[dist.get_rank()]
        results[specification] = run(
            lambda x, t, name=specification: loss_of(x, t, name, tp_group=group), share, target, upstream
        )
    return results


def test_two_tensor_parallel_ranks_match_formula():
    ranks = run_ranks(2, on_one_rank)
    for specification in REFERENCE_FORMULAS:
        loss, gradient = loss_and_gradient(specification, *make_case())
        assert torch.equal(ranks[0][specification][0], ranks[1][specification][0])
        torch.testing.assert_close(ranks[0][specification][0], loss, **TOLERANCE)
        torch.testing.assert_close(torch.cat([r[specification][1] for r in ranks], -1), gradient, **TOLERANCE)


@pytest.mark.parametrize("specification", ["asft", "iw", "psft", "psft:eps=0.28,start=0,ramp=4"])
def test_label_without_reference_makes_only_its_token_nan(specification):
    logits, target, upstream = make_case()
    objective = parse_objective(specification)
    if ",start" in specification:
        objective = objective.with_blend(torch.tensor(0.5, dtype=torch.float64))
    expected = run(lambda x, t: loss_of(x, t, objective), logits, target, upstream)
    assert target[2, 3] >= 0
    target[2, 3] %= 2**48
    loss, gradient = run(lambda x, t: loss_of(x, t, objective), logits, target, upstream)
    assert loss[2, 3].isnan() and gradient[2, 3].isnan().all()
    assert loss_of(logits, target, objective, return_nll=True)[2, 3].isnan()
    others = torch.ones(6, 4, dtype=torch.bool)
    others[2, 3] = False
    assert torch.equal(loss[others], expected[0][others]) and torch.equal(gradient[others], expected[1][others])


def test_ignored_token_id_needs_no_reference():
    logits, target, upstream = make_case()
    padding = torch.where(target < 0, 7, target)  # 7 is ignored, and carries no reference
    expected = run(lambda x, t: loss_of(x, t, "iw"), logits, target, upstream)
    target_7 = (padding >= 0) & (padding % 2**48 == 7) & (target >= 0)
    loss, gradient = run(lambda x, t: loss_of(x, t, "iw", ignore_index=7), logits, padding, upstream)
    assert loss.isfinite().all() and not gradient[(target < 0) | target_7].any()
    assert torch.equal(loss[~target_7], expected[0][~target_7])


def test_invalid_target_is_named():
    logits, target, _ = make_case()
    with pytest.raises(ValueError, match=r"target: expected int64 token ids, got torch\.float32"):
        loss_of(logits, target.float(), "iw")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("specification", ["asft", "iw", "psft"])
def test_improbable_target_and_improbable_reference_are_finite(specification, dtype):
    logits = torch.tensor([[0.0, -1e4], [0.0, 0.0], [0.0, -1e4]], dtype=dtype)
    target = with_reference(torch.tensor([1, 0, 1]), torch.tensor([0.1, 6e4, 6e4]))
    loss, gradient = run(lambda x, t: loss_of(x, t, specification), logits, target, torch.ones(3))
    assert loss.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize("specification", ["iw:lo=0", "psft"])
def test_loss_at_p_0_is_0(specification):
    logits = torch.tensor([[0.0, -math.inf]])
    loss, gradient = run(
        lambda x, t: loss_of(x, t, specification),
        logits,
        with_reference(torch.tensor([1]), torch.ones(1)),
        torch.ones(1),
    )
    assert loss.item() == 0.0 and not gradient.any()


def test_clamp_of_asft_removes_negative_gates():
    logits, target, _ = make_case()
    _, plain = loss_and_stats(logits, target, LossOptions(objective=parse_objective("asft:lambda=5")))
    _, clamped = loss_and_stats(logits, target, LossOptions(objective=parse_objective("asft:lambda=5,clamp=1")))
    assert plain.gate.min() < 0.0 and torch.equal(clamped.gate, plain.gate.clamp(min=0.0))
    assert torch.equal(clamped.loss, plain.loss)


def test_token_loss_and_wrong_settings_are_rejected():
    with pytest.raises(ValueError, match=r"token_loss: objective 'psft:eps=0\.28' requires reference log-probability"):
        token_loss(torch.ones(1), "psft")
    with pytest.raises(ValueError, match=r"--dft-mtp same.*no reference log-probabilities for iw"):
        DFTConfig("iw", mtp="same")


# Metrics


@pytest.mark.parametrize(("specification", "limits"), [("asft", None), ("iw", (0.2, 1.8)), ("psft", (0.0, 1.28))])
def test_metrics_match_formula(specification, limits):
    logits, target, _ = make_case()
    objective = parse_objective(specification)
    _, stats = loss_and_stats(logits, target, LossOptions(objective=objective))
    mask = torch.ones(6, 4)
    mask[0] = 0.0
    metrics = token_metrics(stats, objective, mask)
    t = token(logits, target)
    r = t.r[(mask > 0) & t.valid]
    expected = {"dft/kl": 1 / r - 1 + r.log(), "dft/ratio": r}
    if limits:
        expected["dft/clipped"] = ((r < limits[0]) | (r > limits[1])).double()
    assert set(metrics) - {"dft/loss", "dft/prob", "dft/gate", "dft/accuracy"} == set(expected)
    for name, values in expected.items():
        assert (metrics[name][0] / metrics[name][1]).item() == pytest.approx(values.mean().item()), name


# Token files and training


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tiny model, its Megatron checkpoint, chat data, a token file with the model as reference, and one without."""
    pytest.importorskip("megatron.training")
    pytest.importorskip("transformers")
    pytest.importorskip("pyarrow")
    from tiny_chat_model import write_tiny_llama
    from word_problems import word_problems

    from megatron_dft.advisor import reference
    from megatron_dft.data import __main__ as data

    folder = tmp_path_factory.mktemp("reference")
    write_tiny_llama(folder / "model", groups=2)
    script = [sys.executable, str(ROOT / "examples" / "llama_weights.py")]
    subprocess.run([*script, "import", folder / "model", folder / "checkpoint"], check=True, capture_output=True)
    arguments = [*script, "arguments", folder / "model"]
    flags = subprocess.run(arguments, check=True, capture_output=True, text=True).stdout
    problems = word_problems(random.Random(0), 40)
    records = [{"messages": x.messages, "channel": ("maths", "code")[i % 2]} for i, x in enumerate(problems)]
    (folder / "chat.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    argv = ["--tokenizer", str(folder / "model"), "--seq-length", "512", "--context-parallel-size", "2"]
    argv += ["--tensor-model-parallel-size", "2", "--sequence-parallel", "--workers", "1"]
    data.main([str(folder / "chat.jsonl"), *argv, "--out", str(folder / "plain.arrow")])
    out = ["--out", str(folder / "reference.arrow"), "--device", "cpu"]
    reference.main([str(folder / "plain.arrow"), "--model", str(folder / "model"), *out])
    (folder / "flags").write_text(
        f"{flags} --load {folder / 'checkpoint'} --finetune --sft --tokenizer-type HuggingFaceTokenizer "
        f"--tokenizer-model {folder / 'model'} --seq-length 512 --no-create-attention-mask-in-dataloader "
        "--calculate-per-token-loss --micro-batch-size 1 --global-batch-size 4 --train-iters 3 --lr 1e-3 "
        "--lr-decay-style constant --eval-iters 0 --eval-interval 1 --log-interval 1 --num-workers 0 --clip-grad 1.0 "
        f"--data-cache-path {folder / 'cache'} "
    )
    return folder


def test_file_stores_nll_of_transformers(files):
    from transformers import AutoModelForCausalLM

    from megatron_dft.advisor.samples import sequences_of
    from megatron_dft.data.token_file import TokenFile

    plain, file = (TokenFile(str(files / f"{name}.arrow")) for name in ("plain", "reference"))
    model = AutoModelForCausalLM.from_pretrained(files / "model", dtype=torch.float64)
    assert plain.header.reference is None and file.header.reference["model"] == "model"
    assert file.header.reference["dtype"] == "float32" and len(plain) == len(file)
    for i in range(len(file)):
        stored, first = file[i].reference_nll.astype("float64"), 0
        assert all(
            (getattr(file[i], x) == getattr(plain[i], x)).all() for x in ("input_ids", "loss_weights", "lengths")
        )
        for sequence in sequences_of(file[i], file.header):
            ids = torch.from_numpy(sequence.ids)
            with torch.no_grad():
                logprobs = model(ids[None]).logits[0].log_softmax(-1)
            nll = -logprobs[:-1].gather(1, ids[1:, None])[:, 0].numpy()
            trained = sequence.trained[1:]
            part = stored[first + 1 : first + len(ids)]
            assert part[trained] == pytest.approx(nll[trained], rel=2e-3, abs=1e-4)
            first += len(ids)


LAYOUTS = {
    "TP with SP": ("--tensor-model-parallel-size 2 --sequence-parallel ", 2),
    "CP": ("--context-parallel-size 2 ", 2),
    "PP": ("--pipeline-model-parallel-size 2 ", 2),
    "DP": ("", 2),
    "linear-fused": ("--dft-linear-fused --dft-vocab-chunk 100 ", 1),
    "without compaction": ("--no-dft-compact-masked-tokens ", 1),
}


@pytest.fixture(scope="module")
def host(files):
    from host_runs import Host

    return Host(files)


def curves(host, specification, layout="", ranks=1, more="--dft-channels maths "):
    from host_runs import EXAMPLE

    data = f"--train-data-path {host.folder / 'reference.arrow'} --loss-type {specification} {more}"
    return host.curves((host.folder / "flags").read_text() + data + layout, ranks=ranks, script=EXAMPLE)


@pytest.mark.host
@pytest.mark.slow
@pytest.mark.parametrize("specification", ["asft", "iw", "psft"])
def test_model_that_is_its_reference_has_ratio_1_in_the_first_step(host, specification):
    found = curves(host, specification)
    assert found["dft/ratio"][0] == pytest.approx(1.0, abs=2e-3) and found["dft/ratio"][2] != pytest.approx(
        1.0, abs=0.01
    )
    assert abs(found["dft/kl"][0]) < 1e-5 < found["dft/kl"][2]
    counts = [found[f"dft/channel/{name}/tokens"][0] for name in ("maths", "other")]
    assert min(counts) > 0 and sum(counts) == found["dft/valid_tokens"][0]
    if specification != "asft":
        assert found["dft/clipped"][0] == 0.0 and found["dft/gate"][0] == pytest.approx(1.0, abs=2e-3)


@pytest.mark.host
@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_training_is_equal_in_every_layout(host, name):
    from host_runs import agree

    layout, ranks = LAYOUTS[name]
    agree(curves(host, "iw", layout, ranks), curves(host, "iw"), 2e-5)


@pytest.mark.host
@pytest.mark.slow
def test_run_without_reference_ends_with_the_reason(host):
    from host_runs import EXAMPLE

    from megatron_dft.doctor import preflight

    flags = (host.folder / "flags").read_text() + "--loss-type psft "
    code, output = host.start(f"{flags} --train-data-path {host.folder / 'plain.arrow'}", script=EXAMPLE)
    assert code and "plain.arrow: has no reference log-probabilities, which psft requires" in output
    settings = SimpleNamespace(loss_type="psft")
    (finding,) = preflight._labels([str(host.folder / "plain.arrow")], settings)
    assert finding.level == "error" and "plain.arrow: has no reference" in finding.text
    assert not list(preflight._labels([str(host.folder / "reference.arrow")], settings))
    mock = flags.replace("--sft ", "--mock-data ")
    code, output = host.start(mock, script=EXAMPLE)
    assert code and "--loss-type psft:eps=0.28: a label carries no reference log-probability" in output
    assert "iteration        1/" not in output


def test_files_of_different_references_are_rejected(files, tmp_path):
    from tiny_chat_model import write_tiny_llama

    from megatron_dft.advisor import reference
    from megatron_dft.hosts.token_data import carried

    write_tiny_llama(tmp_path / "other", tied=False)
    plain = str(files / "plain.arrow")
    reference.main(
        [plain, "--model", str(tmp_path / "other"), "--out", str(tmp_path / "other.arrow"), "--device", "cpu"]
    )
    paths = [str(files / "reference.arrow"), str(tmp_path / "other.arrow")]
    carried(paths[:1], paths[:1], DFTConfig("iw"))
    carried([plain], [plain], DFTConfig("dft"))
    with pytest.raises(ValueError, match=r"other\.arrow: its reference model is other \(.*reference\.arrow is model"):
        carried(paths, paths, DFTConfig("iw"))
    bf16 = str(tmp_path / "bf16.arrow")
    reference.main([plain, "--model", str(files / "model"), "--out", bf16, "--device", "cpu", "--dtype", "bf16"])
    with pytest.raises(ValueError, match=r"model \(\w+, bfloat16\), that of .* is model \(\w+, float32\)"):
        carried([*paths[:1], bf16], paths[:1], DFTConfig("iw"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--out": "{files}/plain.arrow"}, "this is the input file"),
        ({"--model": "{files}/nowhere"}, "nowhere: no such folder"),
        ({"FILE": "{files}/chat.jsonl"}, "expected a token file"),
        ({"FILE": "{files}/nothing.arrow"}, "nothing.arrow: no such file"),
        ({"--model": "{tmp}/short"}, "plain.arrow: contains a sequence of .* prepare the data with --seq-length 16"),
        ({"--model": "{tmp}/smaller"}, "prepared with another tokenizer"),
    ],
)
def test_reference_command_rejects_invalid_arguments(files, tmp_path, change, message):
    from chat_examples import tokenizer
    from tiny_chat_model import write_tiny_llama

    from megatron_dft.advisor import reference

    write_tiny_llama(tmp_path / "short")
    config = json.loads((tmp_path / "short" / "config.json").read_text())
    (tmp_path / "short" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 16}))
    write_tiny_llama(tmp_path / "smaller")
    tokenizer().save_pretrained(tmp_path / "smaller")
    values = {"FILE": "{files}/plain.arrow", "--model": "{files}/model", "--out": "{tmp}/out.arrow"} | change
    values = {key: value.format(files=files, tmp=tmp_path) for key, value in values.items()}
    argv = [values.pop("FILE"), *(x for pair in values.items() for x in pair), "--device", "cpu"]
    with pytest.raises(SystemExit, match=f"megatron_dft.reference: .*{message}"):
        reference.main(argv)
    assert not (tmp_path / "out.arrow").exists()
