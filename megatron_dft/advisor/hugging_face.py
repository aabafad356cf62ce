"""Evaluation of a data set with a model of Hugging Face transformers, on one CPU or GPU, without Megatron.

    samples.py    a random sample of the data, tokenized as by `megatron-dft data`
    here          the model, forward only; statistics of the trained tokens

Sequences are batched by length and padded on the right. The output layer receives the hidden states of the trained
tokens only. Nothing is downloaded: model and tokenizer are folders.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_dft.advisor.statistics import DatasetStatistics
from megatron_dft.data import options, sources
from megatron_dft.data.options import positive
from megatron_dft.data.tokens import check_fingerprint
from megatron_dft.hosts.sft import is_token_file
from megatron_dft.metrics import TokenBatch
from megatron_dft.ops.objectives import Objective
from megatron_dft.ops.vocab_parallel import vocab_stats

if TYPE_CHECKING:
    import numpy as np

    from megatron_dft.advisor.samples import Sample, TokenSequence

PACKAGES = ("transformers", "tokenizers", "jinja2", "numpy", "pyarrow", "tqdm", "matplotlib")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SEQ_LENGTH = 4096
BATCH_TOKENS = {"cpu": 2048, "cuda": 8192}  # padding included; a longer sequence is a batch of its own
IGNORED = -100


def add_arguments(parser: argparse._ActionsContainer, required: bool = True) -> None:
    """Add the options of this form of the advisor."""
    add = parser.add_argument
    add("--model", required=required, metavar="FOLDER", help="folder of a causal language model of transformers")
    add(
        "--data",
        required=required,
        nargs="+",
        metavar="FILE",
        help="chat data, as for megatron-dft data: files, folders, or - for a pipe; or token files that it wrote",
    )
    add("--tokenizer", metavar="FOLDER", help="folder of the tokenizer (default: that of --model)")
    add(
        "--seq-length",
        type=positive,
        metavar="N",
        help=f"tokens per row, as in the training run (default: {SEQ_LENGTH}, or the positions of the model if fewer)",
    )
    options.add_arguments(parser)
    add(
        "--advise-tokens",
        type=positive,
        default=8192,
        metavar="N",
        help="tokens to evaluate, prompts included: whole records in random order until they have N tokens",
    )
    add("--train-iters", type=positive, metavar="N", help="training steps of your run: start and ramp of a schedule")
    add_device_arguments(parser)


def add_device_arguments(parser: argparse._ActionsContainer) -> None:
    """Add --device and --dtype."""
    add = parser.add_argument
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda if there is a GPU, else cpu")
    add("--dtype", choices=("auto", *DTYPES), default="auto", help="dtype of the weights; auto: cuda bf16, cpu fp32")


def evaluate(args: argparse.Namespace, objectives: Sequence[Objective]) -> dict[str, Any]:
    """The result of `DatasetStatistics`, with the counts of the sample as `data`.

    Raises:
        OSError: for data that cannot be read.
        ValueError: for missing packages, an invalid model, tokenizer or data, no usable record, token ids that the
            model does not have, or too little GPU memory.
    """
    check_environment()
    device, dtype = device_and_dtype(args)
    config = config_of(args.model)
    sample = _sample(args, _positions(config))
    check_fit("--data", args.model, config, sample.max_id, max(len(x.ids) for x in sample.sequences))
    try:
        model = load_model(args.model, dtype).to(device)
        statistics = statistics_of(model, sample.sequences, objectives)
    except torch.OutOfMemoryError:
        raise ValueError(
            f"--device {device.type}: out of memory; use --dtype bf16, a smaller --seq-length, or --device cpu"
        ) from None
    result = statistics.result(statistics.totals(device), args.train_iters)
    if not math.isfinite(result["nll"]):
        raise ValueError(f"--model {args.model}: the NLL is {result['nll']}; use another --dtype, or check the weights")
    return {**result, "data": sample.report()}


def nll_of(model: Any, sequences: Sequence[TokenSequence], bar: Any) -> list[np.ndarray]:
    """The NLL [s] of the tokens of each sequence, nats, fp32; 0 for tokens that are not trained.

    `bar` is a progress bar of tokens.
    """
    import numpy as np

    found: dict[int, np.ndarray] = {}
    model.eval()
    with torch.inference_mode():
        for batch in batches_of(sequences, BATCH_TOKENS[model.device.type]):
            nll = token_batch(model, batch, [sequence.channel for sequence in batch]).stats.nll[0].cpu()
            for sequence, part in zip(batch, nll.split([int(x.trained[1:].sum()) for x in batch]), strict=True):
                values = np.zeros(len(sequence.ids), dtype=np.float32)
                values[1:][sequence.trained[1:]] = part.numpy()
                found[id(sequence)] = values
                bar.update(len(sequence.ids))
    return [found[id(sequence)] for sequence in sequences]


def statistics_of(model: Any, sequences: Sequence[TokenSequence], objectives: Sequence[Objective]) -> DatasetStatistics:
    """The statistics of the trained tokens. Channels have the names of the sequences."""
    from tqdm import tqdm

    channels = sorted({sequence.channel for sequence in sequences})
    statistics = DatasetStatistics(objectives, channels)
    model.eval()
    total = sum(len(sequence.ids) for sequence in sequences)
    with torch.inference_mode(), tqdm(total=total, unit="token", desc="evaluating", disable=None) as bar:
        for batch in batches_of(sequences, BATCH_TOKENS[model.device.type]):
            statistics.add(token_batch(model, batch, channels))
            bar.update(sum(len(sequence.ids) for sequence in batch))
    return statistics


def batches_of(sequences: Sequence[TokenSequence], tokens: int) -> Iterator[list[TokenSequence]]:
    """Batches of at most `tokens` tokens, padding included; at least one sequence each. The longest come first."""
    batch: list[TokenSequence] = []
    for sequence in sorted(sequences, key=lambda sequence: len(sequence.ids), reverse=True):
        if batch and (len(batch) + 1) * len(batch[0].ids) > tokens:
            yield batch
            batch = []
        batch.append(sequence)
    if batch:
        yield batch


def token_batch(model: Any, sequences: list[TokenSequence], channels: list[str]) -> TokenBatch:
    """Statistics of the n trained tokens of a batch, [1, n]."""
    shape = len(sequences), len(sequences[0].ids)
    tokens = torch.zeros(shape, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORED)
    channel = torch.zeros(shape, dtype=torch.int64)
    for i, sequence in enumerate(sequences):
        ids, length = torch.from_numpy(sequence.ids), len(sequence.ids)
        tokens[i, :length], attention_mask[i, :length] = ids, 1
        labels[i, : length - 1] = ids[1:].masked_fill(~torch.from_numpy(sequence.trained[1:]), IGNORED)
        channel[i] = channels.index(sequence.channel)
    trained = (labels.flatten() != IGNORED).nonzero()[:, 0].to(model.device)
    target = labels.to(model.device).flatten()[trained][None]
    with _output_layer_at(model, trained):
        logits = model(
            input_ids=tokens.to(model.device), attention_mask=attention_mask.to(model.device), use_cache=False
        ).logits.flatten(0, -2)
    if len(logits) != target.numel():  # the model does not call its output layer as a module
        logits = logits[trained]
    return TokenBatch(
        stats=vocab_stats(logits[None], target),
        loss_mask=torch.ones_like(target, dtype=torch.float32),
        channel=channel.to(model.device).flatten()[trained][None],
        training=False,
    )


@contextlib.contextmanager
def _output_layer_at(model: Any, places: Tensor) -> Iterator[None]:
    """Apply the output layer of the model to these places of [b, s] only: hidden states [b, s, h] become [1, n, h]."""

    def select(module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *others = inputs
        return hidden.flatten(0, -2)[places][None], *others

    layer = model.get_output_embeddings()
    if layer is None:
        yield
        return
    handle = layer.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


# Model and data


def check_environment() -> None:
    """Raises ValueError for missing packages, or several ranks."""
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise ValueError(f"--model: missing packages: {', '.join(missing)}; pip install 'megatron_dft[data,advisor]'")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("--model evaluates on one device; start it with megatron-dft, without torchrun")


def device_and_dtype(args: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """Device, and dtype of the weights. Raises ValueError for cuda without a GPU."""
    device = _device(args.device)
    return device, DTYPES[{"cuda": "bf16", "cpu": "fp32"}[device.type] if args.dtype == "auto" else args.dtype]


def _device(name: str) -> torch.device:
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ValueError("--device cuda: PyTorch finds no GPU; use --device cpu")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def config_of(folder: str) -> Any:
    """The configuration of the text model in a folder. Raises ValueError if there is none."""
    from transformers import AutoConfig

    if not os.path.isdir(folder):  # transformers would look for it on the Hub
        raise ValueError(f"--model {folder}: no such folder; download the model first, and pass its folder")
    if not os.path.isfile(os.path.join(folder, "config.json")):
        raise ValueError(f"--model {folder}: the folder has no config.json; pass a model in the format of transformers")
    with _one_line_errors(folder):
        config = AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config()
    if not hasattr(config, "vocab_size"):
        raise ValueError(f"--model {folder}: config.json has no vocab_size; pass a causal language model")
    return config


def load_model(folder: str, dtype: torch.dtype) -> Any:
    """The causal language model in a folder. Raises ValueError if it cannot be loaded, or lacks weights."""
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    version = tuple(map(int, transformers.__version__.split(".")[:2]))
    name = "dtype" if version >= (4, 56) else "torch_dtype"
    with _one_line_errors(folder):
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, **{name: dtype}
        )
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"--model {folder}: the weights lack {len(missing)} tensors of {type(model).__name__}, e.g. {missing[0]}; "
            "pass the folder of a causal language model"
        )
    return model


@contextlib.contextmanager
def _one_line_errors(folder: str) -> Iterator[None]:
    """transformers raises many types for an invalid folder."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"--model {folder}: expected a causal language model ({reason})") from None


def _sample(args: argparse.Namespace, positions: float) -> Sample:
    from megatron_dft.advisor import samples
    from megatron_dft.data.prepare import Plan
    from megatron_dft.data.token_file import TokenFile

    files = sources.expand(args.data)
    if token_files := [file for file in files if is_token_file(file)]:
        _check_token_files(args, files, token_files)
        return samples.of_token_files([TokenFile(file) for file in token_files], args.advise_tokens)
    plan = Plan(
        files=files,
        out=Path(),  # nothing is written
        seq_length=args.seq_length or int(min(SEQ_LENGTH, positions)),
        channel=args.channel,
        truncate=args.too_long == "truncate",
    )
    tokenizer = options.load_tokenizer(args, *_tokenizer_folder(args), local_files_only=True)
    return samples.of_chat(plan, tokenizer, args.advise_tokens)


def _tokenizer_folder(args: argparse.Namespace) -> tuple[str, str]:
    """The folder of the tokenizer, and the flag that it was given with."""
    if args.tokenizer is not None and not os.path.isdir(args.tokenizer):
        raise ValueError(f"--tokenizer {args.tokenizer}: no such folder; download it first, and pass its folder")
    return (args.model, "--model") if args.tokenizer is None else (args.tokenizer, "--tokenizer")


def _check_token_files(args: argparse.Namespace, files: list[str], token_files: list[str]) -> None:
    """Raises ValueError for other data beside token files, options without effect on them, or another tokenizer."""
    if others := [file for file in files if file not in token_files]:
        raise ValueError(f"{others[0]}: expected a token file like {token_files[0]}; pass them in separate runs")
    for flag, given in {
        "--seq-length": args.seq_length,
        "--format": args.format != "chat",
        "--chat-template": args.chat_template,
        "--chat-template-kwargs": args.chat_template_kwargs,
        "--channel": args.channel,
        "--too-long": args.too_long != "drop",
    }.items():
        if given:
            raise ValueError(f"{flag} has no effect on {token_files[0]}, which contains tokens; remove it")
    check_tokenizer(args, token_files)


def check_tokenizer(args: argparse.Namespace, token_files: Sequence[str]) -> None:
    """Raises ValueError for token files of another tokenizer than that of --tokenizer or --model."""
    from megatron_dft.data.token_file import TokenFile

    folder, option = _tokenizer_folder(args)
    tokenizer = options.auto_tokenizer(folder, option, local_files_only=True)
    for file in token_files:
        try:
            check_fingerprint(file, TokenFile(file).header.fingerprint, tokenizer, f"{option} {folder}")
        except ValueError as error:
            raise ValueError(f"{error}, or pass the folder of the data's tokenizer as --tokenizer") from None


def check_fit(data: str, folder: str, config: Any, max_id: int, longest: int) -> None:
    """Raises ValueError if the model has no embedding for a token id of the data, or for a position of a sequence."""
    if max_id >= config.vocab_size:
        raise ValueError(
            f"{data}: contains token id {max_id}, --model {folder} has a vocabulary of {config.vocab_size}; use the "
            "tokenizer of the model"
        )
    positions = _positions(config)
    if longest > positions:
        raise ValueError(
            f"{data}: contains a sequence of {longest} tokens, --model {folder} has {positions} positions "
            f"(max_position_embeddings); prepare the data with --seq-length {positions}, or use another model"
        )


def _positions(config: Any) -> float:
    return getattr(config, "max_position_embeddings", None) or math.inf
