"""Checks of the arguments of a Megatron run: layout, vocabulary, objective, files.

Megatron's own parser reads the arguments, so defaults, YAML files and new flags are those of the installed Megatron.
The layout check reports every mismatch; Megatron's validation, which runs after it, stops at the first. No process
group, model or data set is created. Not checked: memory, whether a checkpoint fits the model, and sizes that
--use-checkpoint-args reads.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import importlib.util
import io
import json
import os
import runpy
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from megatron_dft.config import DFTConfig
from megatron_dft.hosts import compat, megatron_lm, sft
from megatron_dft.utils import load_function, nearest

# Settings under which stages may have different numbers of layers.
UNEVEN = (
    *("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers", "pipeline_model_parallel_layout"),
    *("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split", "hybrid_layer_pattern"),
)


class Finding(NamedTuple):
    """One line of the report. Level: ok, note (a hint) or error (the run would fail or give wrong numbers)."""

    level: str
    subject: str
    text: str


def failure(subject: str, expected: str, got: object, remedy: str) -> Finding:
    """A finding with what was expected, what was found and what to do."""
    return Finding("error", subject, f"expected {expected}, got {got}; {remedy}")


def megatron_in_use() -> tuple[str, str] | None:
    """Version and folder of the megatron-core that an import would find. Does not import it."""
    try:
        spec = importlib.util.find_spec("megatron.core")
    except ModuleNotFoundError:
        return None
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent
    return runpy.run_path(str(folder / "package_info.py"))["__version__"], str(folder)


def settings_of(script: str, argv: list[str], world_size: int) -> tuple[Any, list[str]]:
    """Megatron's parsed arguments, and the flags of `argv` that its parser does not define.

    Replaces `sys.argv` and WORLD_SIZE, and patches Megatron's parser.

    Raises:
        ValueError: if no Megatron with a supported pretrain() is installed, or its parser rejects the arguments.
    """
    quietly(megatron_lm.enable, DFTConfig())
    from megatron.training import arguments

    sys.argv = [script, *argv]
    os.environ["WORLD_SIZE"] = str(world_size)
    parsed = quietly(arguments.parse_args, None, True)
    parser = arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    defaults, rest = parser.parse_known_args(argv)
    settings = vars(defaults) | vars(parsed)
    for section in ("model_parallel", "language_model"):  # sections of --yaml-cfg, which replaces the flags
        settings |= vars(settings.get(section, SimpleNamespace()))
    known = [flag for action in parser._actions for flag in action.option_strings]
    unknown = [argument.split("=")[0] for argument in rest if argument.startswith("--")]
    return SimpleNamespace(**settings), [flag + nearest(flag, known).replace(";", ",") for flag in unknown]


def quietly(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function without its output. Exceptions and exits are raised as a ValueError of one line."""
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            return function(*args)
    except SystemExit:
        text = (output.getvalue().strip().splitlines() or [f"{function.__name__} ended the process"])[-1]
    except Exception as error:
        text = str(error) or f"{type(error).__name__} at: {traceback.extract_tb(error.__traceback__)[-1].line}"
    raise ValueError(" ".join(text.split()))


def layout(settings: Any, world_size: int) -> Iterator[Finding]:
    """Check world size, batch size and model sizes for divisibility."""
    if settings.use_checkpoint_args:
        yield Finding("note", "layout", "--use-checkpoint-args: sizes come from the checkpoint and are not checked")
        return
    tp, pp, cp = (_size(settings, f"{axis}_parallel_size") for axis in ("tensor_model", "pipeline_model", "context"))
    errors = [*_ranks(settings, world_size, tp, pp, cp), *_model(settings, tp, pp), *_sequence(settings, tp, cp)]
    yield from errors
    if settings.sequence_parallel and tp == 1:
        yield Finding("note", "layout", "--sequence-parallel without tensor parallelism: Megatron turns it off")
    if not errors:
        dp = world_size // (tp * pp * cp)
        text = f"world size {world_size} = tensor {tp} x pipeline {pp} x context {cp} x data {dp}"
        yield Finding("ok", "layout", text)


def _ranks(s: Any, world_size: int, tp: int, pp: int, cp: int) -> Iterator[Finding]:
    what = f"tensor {tp} x pipeline {pp} x context {cp}"
    yield from _multiple("world size", world_size, tp * pp * cp, what)
    ep, etp, experts = (
        _size(s, "expert_model_parallel_size"),
        _size(s, "expert_tensor_parallel_size", tp),
        s.num_experts,
    )
    if ep > 1:
        what = f"expert {ep} x expert tensor {etp} x pipeline {pp}"
        yield from _multiple("world size", world_size, ep * etp * pp, what)
        yield from _multiple("--num-experts", experts, ep, "expert parallel size")
        if not experts:
            yield failure("layout", f"--num-experts with --expert-model-parallel-size {ep}", "none", "add it")
    if world_size % (tp * pp * cp) == 0 and not s.rampup_batch_size:
        micro, dp = _size(s, "micro_batch_size"), world_size // (tp * pp * cp)
        what = f"micro-batch {micro} x data parallel {dp}"
        yield from _multiple("--global-batch-size", s.global_batch_size, micro * dp, what)


def _model(s: Any, tp: int, pp: int) -> Iterator[Finding]:
    heads, groups = s.num_attention_heads, s.num_query_groups if s.group_query_attention else None
    yield from _multiple("--num-attention-heads", heads, tp, "tensor parallel size")
    if groups and groups % tp and tp % groups:
        expected = f"--num-query-groups to divide {tp} (tensor parallel size), or be a multiple of it"
        yield failure("layout", expected, groups, "change one of them")
    if heads and not s.kv_channels:
        yield from _multiple("--hidden-size", s.hidden_size, heads, "attention heads")
    yield from _multiple("--ffn-hidden-size", s.ffn_hidden_size, tp, "tensor parallel size")
    if not any(getattr(s, name, None) for name in UNEVEN):
        parts = _size(s, "num_virtual_stages_per_pipeline_rank") * _size(s, "num_layers_per_virtual_pipeline_stage")
        what = f"pipeline {pp} x virtual stages or their layers {parts}" if parts > 1 else f"pipeline {pp}"
        yield from _multiple("--num-layers", s.num_layers, pp * parts, what)


def _sequence(s: Any, tp: int, cp: int) -> Iterator[Finding]:
    if cp > 1:
        yield from _multiple("--seq-length", s.seq_length, 2 * cp, f"2 x context {cp}")
    if s.sequence_parallel:
        yield from _multiple("--seq-length", s.seq_length, cp * tp, f"context {cp} x tensor {tp}, --sequence-parallel")


def validation(on_cpu: bool) -> Iterator[Finding]:
    """Run Megatron's own validation of its arguments and of the model configuration."""
    from megatron.training import arguments, yaml_arguments

    if not on_cpu and not torch.cuda.is_available():
        yield Finding("note", "validation", "skipped: Megatron's validation requires a GPU, and this machine has none")
        return
    settings = quietly(arguments.parse_args, None, True)  # parsed again, because validation changes them
    if settings.yaml_cfg is not None:
        quietly(yaml_arguments.validate_yaml, settings)
    else:
        quietly(arguments.validate_args, settings)
        quietly(arguments.core_transformer_config_from_args, settings)
    yield Finding("ok", "validation", "Megatron accepts the arguments")


def vocabulary(settings: Any, config: DFTConfig | None) -> Iterator[Finding]:
    """Check --padded-vocab-size and --dft-true-vocab-size against the tokenizer."""
    settings, tp = copy.copy(settings), _size(settings, "tensor_model_parallel_size")
    yield from _multiple(
        "--padded-vocab-size", getattr(settings, "padded_vocab_size", None), tp, "tensor parallel size"
    )
    path = settings.tokenizer_model
    if settings.tokenizer_type is None or (path and not os.path.exists(path)):
        yield Finding("note", "vocabulary", "not checked: its size requires the tokenizer")
        return
    size = quietly(_tokenizer, settings).vocab_size
    padded, true = settings.padded_vocab_size or size, config and config.true_vocab_size
    text = f"{size} entries, {padded - size} padding columns"
    if padded < size:
        expected = f"--padded-vocab-size of {size}, the tokenizer's size, or more"
        yield failure("vocabulary", expected, padded, "increase it or leave it out")
    elif true is not None and true != size:
        expected = f"--dft-true-vocab-size {size}, the tokenizer's size"
        yield failure("vocabulary", expected, true, f"correct it; the remaining {padded - size} columns are padding")
    elif padded > size and true is None:
        text += f" that are part of the softmax and of p; --dft-true-vocab-size {size} excludes them"
        yield Finding("note", "vocabulary", text)
    else:
        yield Finding("ok", "vocabulary", text)


def _tokenizer(settings: Any) -> Any:
    """Build Megatron's tokenizer, which sets `padded_vocab_size` in the settings."""
    try:
        from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    except ModuleNotFoundError:  # 0.17
        from megatron.training.tokenizer import build_tokenizer
    return build_tokenizer(settings)


def objective(settings: Any, config: DFTConfig | None, without_gpu: bool) -> Iterator[Finding]:
    """Check the settings against the objective. `without_gpu`: skip the backend; the GPUs are on another machine."""
    if config is None or not config.enabled:
        text = "Megatron's own loss (no --loss-type)"
        yield from () if config is None else [Finding("note", "objective", text)]
        return
    errors = []
    for check in (
        lambda: compat.check_settings(settings, dataclasses.replace(config, backend="auto")),
        lambda: sft.check_settings(settings),
        lambda: config.callback and load_function(config.callback, "--dft-callback"),
        lambda: None if without_gpu else compat.backend(config),
    ):
        try:
            check()
        except ValueError as error:
            errors.append(Finding("error", "objective", str(error)))
    yield from errors or [Finding("ok", "objective", str(config.objective))]
    if not settings.calculate_per_token_loss:
        text = "without --calculate-per-token-loss a token weighs more in a micro-batch with few valid tokens"
        yield Finding("note", "objective", text)


def files(settings: Any) -> Iterator[Finding]:
    """Check the data, tokenizer and checkpoint paths of the run."""
    paths = () if settings.mock_data else sft.data_paths(settings)
    yield from _labels([path for path in paths if sft.is_token_file(path)], settings)
    for path in paths:
        if sft.is_token_file(path):
            yield from _tokens(path, settings)
        else:
            yield from _conversations(path) if getattr(settings, "sft", False) else _indexed(path)
    tokenizer = settings.tokenizer_model
    if tokenizer and not os.path.exists(tokenizer):
        if tokenizer.startswith(("/", ".", "~")) or tokenizer.count("/") != 1:
            yield failure("files", f"a tokenizer at {tokenizer}", "none", "check --tokenizer-model")
        else:
            text = f"--tokenizer-model {tokenizer} is not a local path: every rank downloads it"
            yield Finding("note", "files", text)
    for flag, folder in (("--load", settings.load), ("--pretrained-checkpoint", settings.pretrained_checkpoint)):
        if folder and not os.path.isfile(os.path.join(folder, "latest_checkpointed_iteration.txt")):
            found = Finding("note", "files", f"{flag}: no checkpoint at {folder}: training starts from scratch")
            if settings.exit_on_missing_checkpoint:
                found = failure("files", f"{flag}: a checkpoint at {folder}", "none", "check the path")
            yield found
    yield from _saved(settings)


def _saved(settings: Any) -> Iterator[Finding]:
    """Check that checkpoints can be written, and that a restarted run resumes from them."""
    if not settings.save:
        yield Finding("note", "files", "without --save no checkpoint is written")
        return
    folder = Path(settings.save).absolute()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        yield failure("files", f"--save {settings.save} to be a writable folder", folder, "choose another")
    if settings.load != settings.save or settings.finetune:
        text = (
            "a restarted run (--max-restarts, a requeued job) begins at iteration 0; to resume, --load the folder of "
            "--save without --finetune, and pass the base model as --pretrained-checkpoint"
        )
        yield Finding("note", "files", text)


def _indexed(path: str) -> Iterator[Finding]:
    missing = [path + ending for ending in (".bin", ".idx") if not os.path.isfile(path + ending)]
    if missing:
        remedy = "pass the path without its extension"
        yield failure("files", f"data at {path}", f"no {' and no '.join(missing)}", remedy)


def _tokens(path: str, settings: Any) -> Iterator[Finding]:
    """Check that a token file fits the run."""
    from megatron_dft.data.token_file import TokenFile
    from megatron_dft.hosts import token_data

    try:
        file = TokenFile(path)
        token_data.check_fit(path, file.header, settings)
        token_data.check_validation(settings)
    except ValueError as error:
        yield Finding("error", "files", str(error))
        return
    trained = file.header.statistics["trained_tokens"]
    text = f"{path}: {len(file)} rows, --seq-length {file.header.seq_length}, {trained} tokens in the loss"
    yield Finding("ok", "files", text)


def _labels(paths: list[str], settings: Any) -> Iterator[Finding]:
    """Check that the token files have the reference and the weights that are configured."""
    if not paths:
        return
    from megatron_dft.hosts import token_data

    try:
        config = DFTConfig.from_args(settings)
    except ValueError:  # reported by `objective`
        return
    try:
        token_data.carried(paths, sft.data_paths(settings, training=True), config)
        sft.check_channels(config.metric_spec.channels, token_data.channels_of(paths), "--dft-channels", False)
    except ValueError as error:
        yield Finding("error", "files", str(error))


def _conversations(path: str) -> Iterator[Finding]:
    remedy = "prepare the data with megatron-dft data"
    if not os.path.isfile(path):
        yield failure("files", f"a JSONL file for --sft at {path}", "none", remedy)
        return
    with open(path, errors="replace") as lines:
        first = lines.readline()
    try:
        messages = json.loads(first)["messages"]
    except (ValueError, KeyError, TypeError):
        messages = None
    if not messages:
        yield failure("files", f"lines with `messages` in {path}", repr(first[:60]), remedy)


def _multiple(name: str, number: int | None, of: int, what: str) -> Iterator[Finding]:
    if number and number % of:
        yield failure("layout", f"{name} to be a multiple of {of} ({what})", number, "change one of them")


def _size(settings: Any, name: str, default: int = 1) -> int:
    return getattr(settings, name, None) or default
