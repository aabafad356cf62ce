"""Token files as data sets of Megatron-LM's pretrain(): equal curves in every layout, errors for other settings."""

import contextlib
import json
import pickle
import subprocess
import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("megatron.training")
pytest.importorskip("pyarrow")

from chat_examples import talk, tokenizer
from chat_runs import CHAT_MODEL
from host_runs import EXAMPLE, Host, agree

from megatron_dft.data import __main__ as command
from megatron_dft.data.token_file import TokenFile
from megatron_dft.hosts import sft, token_data

pytestmark = pytest.mark.host
LENGTH = 256


class TokenHost(Host):
    """Runs of the example on a token file that is prepared for CP 2 and TP 2 with sequence parallelism."""

    def __init__(self, folder):
        super().__init__(folder)
        tokenizer().save_pretrained(folder / "tokenizer")
        records = [
            {
                "messages": talk("one " * (i % 7), "yes no " * (i % 23 + 1), "and", "two"),
                "channel": ("maths", "code")[i % 2],
            }
            for i in range(200)
        ]
        (folder / "x.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        argv = [str(folder / "x.jsonl"), "--tokenizer", str(folder / "tokenizer"), "--seq-length", str(LENGTH)]
        argv += ["--context-parallel-size", "2", "--tensor-model-parallel-size", "2", "--sequence-parallel"]
        self.file = folder / "x.arrow"
        command.main([*argv, "--out", str(self.file)])
        self.flags = CHAT_MODEL.replace("divisible-by 64", "divisible-by 256") + (
            "--sft --tokenizer-type HuggingFaceTokenizer --no-create-attention-mask-in-dataloader "
            f"--calculate-per-token-loss --tokenizer-model {folder / 'tokenizer'} --train-data-path {self.file} "
            f"--valid-data-path {self.file} --data-cache-path {folder / 'cache'} --loss-type dft "
        )

    def rejection(self, flags):
        """The output of a run that is rejected before its first iteration."""
        code, output = self.start(flags, script=EXAMPLE)
        assert code and "iteration        1/" not in output
        return output


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return TokenHost(tmp_path_factory.mktemp("token_data"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        pytest.param(2, "--tensor-model-parallel-size 2 --sequence-parallel", marks=pytest.mark.smoke),
        (2, "--context-parallel-size 2"),
        (2, ""),
        (4, "--context-parallel-size 2 --tensor-model-parallel-size 2 --sequence-parallel"),
    ],
)
def test_token_file_training_is_equal_in_every_layout(host, ranks, layout):
    one = host.curves(host.flags + "--dft-channels maths", script=EXAMPLE)
    many = host.curves(f"{host.flags}--dft-channels maths {layout}", script=EXAMPLE, ranks=ranks)
    agree(many, one, 2e-5)
    assert one["dft/channel/maths/tokens"][0] + one["dft/channel/other/tokens"][0] == one["dft/valid_tokens"][0]


@pytest.mark.slow
def test_epochs_train_each_token_once_in_another_order(host):
    """The global batch is the whole file, so each step is an epoch."""
    file = TokenFile(str(host.file))
    flags = host.flags.replace("--global-batch-size 6", f"--global-batch-size {len(file)}")
    curves = host.curves(flags, script=EXAMPLE)
    assert set(curves["dft/valid_tokens"]) == {file.header.statistics["trained_tokens"]}
    first, second = (token_data._order(len(file), 1234, epoch).tolist() for epoch in (0, 1))
    assert first != second and sorted(first) == sorted(second) == list(range(len(file)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            "--seq-length 128 --max-position-embeddings 128",
            "prepared for --seq-length 256, the run has --seq-length 128",
        ),
        ("--dft-channels maths,law", "--dft-channels: the data has no channel 'law': it has code, maths"),
        ("--valid-data-path {folder}/x.jsonl", "x.jsonl: expected a token file like"),
        ("--train-data-path {folder}/none.arrow", "none.arrow: no such token file; check the path"),
        ("--tokenizer-type NullTokenizer --vocab-size 20", "contains token id"),
        ("--tokenizer-model {folder}/other", "prepared with another tokenizer: tokenizer '"),
    ],
)
def test_settings_incompatible_with_token_file_are_rejected(host, change, reason):
    other = tokenizer()
    other.add_tokens(["new"])
    other.save_pretrained(host.folder / "other")
    assert reason in host.rejection(host.flags + change.format(folder=host.folder))


def test_token_file_without_objective_is_rejected(host):
    flags = host.flags.replace("--loss-type dft", "")
    for given in (flags, flags.replace("--train-data-path ", "--train-data-path=")):
        assert "x.arrow: a token file requires --loss-type;" in host.rejection(given)


def settings(**changes):
    values = {
        "sft": True,
        "seq_length": LENGTH,
        "context_parallel_size": 1,
        "tensor_model_parallel_size": 1,
        "sequence_parallel": False,
        "tokenizer_type": "NullTokenizer",
        "tokenizer_model": None,
    }
    return SimpleNamespace(**values | changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sft": False}, "requires --sft"),
        ({"eod_mask_loss": True}, "--eod-mask-loss has no effect on a token file"),
        ({"reset_position_ids": True}, "--reset-position-ids has no effect on a token file"),
        ({"seq_length": 512}, "prepared for --seq-length 256, the run has --seq-length 512"),
        ({"context_parallel_size": 4}, "prepared for --context-parallel-size 2, the run has --context-parallel-size 4"),
        (
            {"context_parallel_size": 2, "tensor_model_parallel_size": 3, "sequence_parallel": True},
            "prepared for --tensor-model-parallel-size 2, cannot be split for --tensor-model-parallel-size 3",
        ),
    ],
)
@pytest.mark.slow
def test_check_fit_reports_both_values(host, changes, reason):
    header = TokenFile(str(host.file)).header
    token_data.check_fit("x.arrow", header, settings())
    token_data.check_fit("x.arrow", header, settings(context_parallel_size=2))
    with pytest.raises(ValueError, match=reason):
        token_data.check_fit("x.arrow", header, settings(**changes))


@pytest.mark.slow
def test_token_files_are_found_in_every_list_of_paths(host, tmp_path):
    (tmp_path / "paths").write_text(f"0.3 {host.file} 0.7 {host.file}")
    (tmp_path / "splits").write_text(json.dumps({"train": [str(host.file)], "valid": f"1.0 {host.file}", "test": None}))
    for given in (
        {"data_path": [str(host.file)]},
        {"train_data_path": ["1", str(host.file)]},
        {"data_args_path": str(tmp_path / "paths")},
        {"per_split_data_args_path": str(tmp_path / "splits")},
    ):
        assert set(sft.token_files(SimpleNamespace(**given))) == {str(host.file)}
    assert sft.token_files(SimpleNamespace(data_path=["nothing"])) == []


@pytest.mark.slow
def test_token_dataset_can_be_pickled(host):
    file = TokenFile(str(host.file))
    config = token_data.TokenDatasetConfig(
        random_seed=1, sequence_length=LENGTH, blend=([str(host.file)], None), split="1"
    )
    import numpy
    from megatron.core.datasets.utils import Split

    dataset = token_data.TokenDataset(file, str(host.file), numpy.arange(len(file)), 10, Split.train, config)
    again = pickle.loads(pickle.dumps(dataset))
    assert all((again[3][name] == dataset[3][name]).all() for name in dataset[3])


@pytest.mark.parametrize(
    ("settings", "valid"),
    [
        ({"train_data_path": ["a"]}, False),
        ({"train_data_path": ["a"], "valid_data_path": ["b"]}, True),
        ({"train_data_path": ["a"], "eval_iters": 0}, True),
        ({"data_path": ["a"]}, True),
        ({"data_path": ["a"], "split": "9,1"}, True),
        ({"data_path": ["a"], "split": "100,0,0"}, False),
        ({"data_path": ["a"], "split": "1"}, False),
        ({"per_split_data_args_path": "a.json"}, True),
        ({"train_data_path": ["a"], "skip_train": True}, True),
    ],
)
def test_token_file_requires_validation_data_for_evaluation(settings, valid):
    names = ("valid_data_path", "per_split_data_args_path", "data_path", "data_args_path", "split", "full_validation")
    given = SimpleNamespace(
        **{**dict.fromkeys((*names, "skip_train")), "eval_iters": 2, "eval_interval": 9, **settings}
    )
    with contextlib.nullcontext() if valid else pytest.raises(ValueError, match="--eval-iters 2: there is no"):
        token_data.check_validation(given)


def test_evaluation_requires_an_interval():
    given = SimpleNamespace(skip_train=False, eval_iters=2, eval_interval=None)
    with pytest.raises(ValueError, match="--eval-iters 2 requires --eval-interval"):
        token_data.check_validation(given)


@pytest.mark.slow
def test_training_without_evaluation_needs_no_interval(host):
    flags = host.flags.replace(f"--valid-data-path {host.file} ", "").replace("--eval-iters 1 --eval-interval 100", "")
    curves = host.curves(flags + "--eval-iters 0", script=EXAMPLE)
    agree(curves, {tag: values for tag, values in host.curves(host.flags, script=EXAMPLE).items() if tag in curves})


@pytest.mark.slow
def test_advisor_needs_no_validation_data(host):
    flags = host.flags.replace(f"--valid-data-path {host.file} ", "") + f"--eval-iters 0 --advise-out {host.folder}"
    command = [sys.executable, "-m", "megatron_dft.advisor", str(EXAMPLE), "--device", "cpu", *flags.split()]
    done = subprocess.run([*command, "--advise-batches", "1"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((host.folder / "advice.json").read_text())["tokens"] > 0
