"""DFTConfig: the same fields in Python, on the command line and in YAML."""

import argparse
from dataclasses import fields

import pytest

from megatron_dft import OBJECTIVES, DFTConfig, parse_objective
from megatron_dft.ops.linear_fused import Split
from megatron_dft.utils import load_function

FLAGS = {
    "loss_type": (["--loss-type", "tsallis:q=0.5"], "tsallis:q=0.5"),
    "mtp": (["--dft-mtp", "same"], "same"),
    "true_vocab_size": (["--dft-true-vocab-size", "50257"], 50257),
    "backend": (["--dft-backend", "torch"], "torch"),
    "inplace_backward": (["--no-dft-inplace-backward"], False),
    "compact_masked_tokens": (["--no-dft-compact-masked-tokens"], False),
    "linear_fused": (["--dft-linear-fused"], True),
    "token_chunk": (["--dft-token-chunk", "1024", "--dft-linear-fused"], 1024),
    "vocab_chunk": (["--dft-vocab-chunk", "4096", "--dft-linear-fused"], 4096),
    "keep_chunks": (["--dft-keep-chunks", "2", "--dft-linear-fused"], 2),
    "weights": (["--dft-weights"], True),
    "reduction": (["--dft-reduction", "sample"], "sample"),
    "metrics": (["--dft-metrics", "full"], "full"),
    "channels": (["--dft-channels", "maths,code"], "maths,code"),
    "callback": (["--dft-callback", "json:dumps"], "json:dumps"),
}


def parse(*argv):
    return DFTConfig.from_args(DFTConfig.add_arguments(argparse.ArgumentParser()).parse_args(argv))


@pytest.mark.parametrize("name", [f.name for f in fields(DFTConfig)])
def test_config_field_has_flag_key_and_help(name):
    argv, value = FLAGS[name]
    settings = {"linear_fused": "--dft-linear-fused" in argv, "loss_type": "nll"} | {name: value}
    argv = argv if name == "loss_type" else [*argv, "--loss-type", "nll"]
    expected = DFTConfig(**settings)
    assert expected != DFTConfig()
    assert parse(*argv) == expected == DFTConfig.from_mapping(settings)
    flag = argv[0].replace("--no-", "--")
    (action,) = (a for a in DFTConfig.add_arguments(argparse.ArgumentParser())._actions if flag in a.option_strings)
    assert action.help.endswith(".") and action.default == getattr(DFTConfig(), name)


def test_config_without_flags_is_disabled():
    assert parse() == DFTConfig() == DFTConfig.from_mapping({}) == DFTConfig.from_args(argparse.Namespace())
    assert not DFTConfig().enabled
    assert DFTConfig(loss_type="nll").enabled  # the cross entropy of megatron_dft, not of the host


def test_help_lists_every_objective():
    text = DFTConfig.add_arguments(argparse.ArgumentParser()).format_help()
    assert "megatron_dft" in text and all(name in text for name in OBJECTIVES)


def test_from_args_ignores_missing_and_foreign_fields():
    args = argparse.Namespace(loss_type="dft", backend="nccl", mtp=3)  # not flags of megatron_dft
    assert DFTConfig.from_args(args) == DFTConfig(loss_type="dft")


@pytest.mark.parametrize("loss_type", OBJECTIVES)
def test_config_accepts_every_objective(loss_type):
    assert DFTConfig(loss_type=loss_type).objective == OBJECTIVES[loss_type]()


def test_options_report_nll_and_pass_every_setting():
    group = object()
    config = DFTConfig(loss_type="tsallis:q=2", true_vocab_size=7, backend="torch", inplace_backward=False)
    options = config.options(group)
    assert options.objective == parse_objective("tsallis:q=2.0") and options.tp_group is group
    assert (options.return_nll, options.ignore_index) == (True, -100)
    assert (options.true_vocab_size, options.backend, options.inplace_backward) == (7, "torch", False)
    assert DFTConfig(loss_type="dft").options().inplace_backward
    assert DFTConfig(loss_type="dft", linear_fused=True, vocab_chunk=5, keep_chunks=2).split() == Split(5, 2)
    assert DFTConfig(loss_type="dft", linear_fused=True).split() == Split(8192, 0)
    assert DFTConfig(loss_type="dft", linear_fused=True, token_chunk=512).split() == Split(8192, 0, 512)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_tpe": "dft"}, "dft: expected one of backend, .*, got 'loss_tpe'; did you mean 'loss_type'"),
        ({"loss_type": "dtf"}, "unknown objective 'dtf': expected one of .*; did you mean 'dft'"),
        ({"loss_type": "focal:gamma=-1"}, "'focal': expected 0 <= gamma"),
        ({"loss_type": None}, "dft: loss_type: expected str, got None"),
        ({"mtp": "none"}, "dft: mtp: expected one of nll, same, got 'none'"),
        ({"backend": "cuda"}, "dft: backend: expected one of auto, torch, triton, got 'cuda'"),
        ({"true_vocab_size": "7"}, "dft: true_vocab_size: expected int, got '7'"),
        ({"true_vocab_size": True}, "dft: true_vocab_size: expected int, got True"),
        ({"loss_type": "dft", "true_vocab_size": 0}, "true_vocab_size: expected .*, got 0"),
        ({"inplace_backward": "yes"}, "dft: inplace_backward: expected bool, got 'yes'"),
        ({"inplace_backward": None}, "dft: inplace_backward: expected bool, got None"),
        ({"compact_masked_tokens": 1}, "dft: compact_masked_tokens: expected bool, got 1"),
        (
            {"loss_type": "dft", "vocab_chunk": 1024, "keep_chunks": 1},
            r"--dft-vocab-chunk, --dft-keep-chunks \(vocab_chunk, keep_chunks\) require --dft-linear-fused",
        ),
        ({"loss_type": "dft", "keep_chunks": 1}, r"^--dft-keep-chunks \(keep_chunks\) requires --dft-linear-fused"),
        ({"loss_type": "dft", "token_chunk": 1024}, r"^--dft-token-chunk \(token_chunk\) requires --dft-linear-fused"),
        (
            {"loss_type": "cayley", "linear_fused": True, "token_chunk": 64},
            r"token_chunk \(--dft-token-chunk\) .* but cayley:floor=0.5 depends on all tokens of a batch; omit it",
        ),
        (
            {"loss_type": "dft", "linear_fused": True, "token_chunk": 64, "keep_chunks": 1},
            "token_chunk .*--dft-token-chunk.* selects chunks of tokens; .* give one kind",
        ),
        ({"loss_type": "dft", "linear_fused": True, "token_chunk": 0}, "token_chunk: expected at least 1 token, got 0"),
        (
            {"loss_type": "dft", "linear_fused": True, "vocab_chunk": 0},
            "vocab_chunk: expected at least 1",
        ),
        ({"loss_type": "dft", "linear_fused": True, "keep_chunks": -1}, "keep_chunks: expected 0 or more, got -1"),
    ],
)
def test_from_mapping_rejects_invalid_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        DFTConfig.from_mapping(settings)


@pytest.mark.parametrize("argv", [["--dft-mtp", "none"], ["--dft-true-vocab-size", "x"], ["--dft-backend", "nccl"]])
def test_parser_rejects_invalid_flags(argv, capsys):
    with pytest.raises(SystemExit):
        parse(*argv)
    assert argv[0] in capsys.readouterr().err


def test_compact_masked_tokens_flag_defaults_to_none():
    both = ([], ["--dft-compact-masked-tokens"])
    assert [parse("--loss-type", "dft", *argv).compact_masked_tokens for argv in both] == [None, True]


def test_load_function_resolves_module_and_name():
    assert load_function("json:dumps", "--recipe")({}) == "{}"
    with pytest.raises(ValueError, match=r"--recipe: json has no function 'dmps'; did you mean 'dumps'"):
        load_function("json:dmps", "--recipe")
    for path in ("nowhere:f", "f", "json.decode:f"):
        with pytest.raises(ValueError, match=f"--step: expected module:function .* got '{path}' .*check the name"):
            load_function(path, "--step")
    with pytest.raises(ValueError, match="--recipe: json has no function 'decoder'"):
        load_function("json:decoder", "--recipe")  # a module


@pytest.mark.parametrize("name", [name for name in FLAGS if name != "loss_type"])
def test_config_rejects_setting_without_loss_type(name):
    with pytest.raises(ValueError, match=rf"--dft-.* \({name}\) requires --loss-type \(loss_type\)"):
        DFTConfig(**{name: FLAGS[name][1]})


def test_config_derives_metric_spec_from_metrics_and_channels():
    assert DFTConfig("dft").metric_spec.names == ()
    assert DFTConfig("dft").options().needs == frozenset()
    config = DFTConfig("dft", metrics="full", channels="maths, code")
    assert config.metric_spec.channels == ("other", "maths", "code")
    assert config.options().needs == {"entropy", "collision"}
    for names in ("", "maths,", "maths,maths", "other"):
        with pytest.raises(ValueError, match=f"channels: expected distinct names, .* got '{names}'"):
            DFTConfig("nll", channels=names)
