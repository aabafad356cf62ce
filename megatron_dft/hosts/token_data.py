"""Token files (`megatron_dft.data`) as the data of Megatron-LM's `pretrain()`.

Their data set provider replaces that of the script. Megatron's builder handles blends, weights, splits and sizes.
Samples have the format of `--sft`: packed, and padded as Megatron pads them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from megatron.core.datasets.blended_megatron_dataset_config import BlendedMegatronDatasetConfig
from megatron.core.datasets.megatron_dataset import MegatronDataset
from megatron.core.datasets.utils import Split

from megatron_dft.config import DFTConfig
from megatron_dft.data.token_file import Header, Sample, TokenFile, named, sample_of
from megatron_dft.labels import MEAN_LENGTHS, with_channels, with_conversations, with_reference, with_weights

UNUSED = ("reset_position_ids", "reset_attention_mask", "eod_mask_loss", "fim_data", "mock_data")  # with token files
HUGGING_FACE = ("HuggingFaceTokenizer", "SFTTokenizer")  # values of --tokenizer-type with a folder as --tokenizer-model


@dataclass(frozen=True)
class Carried:
    """What the labels of a run carry beside token ids.

    Attributes:
        config: the settings of the objective.
        mean_length: mean number of trained tokens of a conversation in the training data.
    """

    config: DFTConfig = field(default_factory=DFTConfig)
    mean_length: int = 1


def carried(paths: list[str], training: list[str], config: DFTConfig) -> Carried:
    """Check what the token files of a run contain.

    Args:
        paths: all token files.
        training: those of the training data; none: the run evaluates only.

    Raises:
        ValueError: if the files do not have what the configuration requires, or have weights that it does not use.
    """
    headers = {path: TokenFile(path).header for path in paths}
    _check_reference(headers, config)
    weighted = [path for path in training if headers[path].weighted]
    if weighted and not config.weights:
        raise ValueError(
            f"{weighted[0]}: contains weights; add --dft-weights (dft.weights), or prepare the data without them"
        )
    if config.weights and training and not weighted:
        raise ValueError(f"--dft-weights (dft.weights): all weights in {', '.join(training)} are 1; remove the setting")
    trained, sequences = (
        sum(headers[path].statistics[name] for path in training or paths) for name in ("trained_tokens", "sequences")
    )
    return Carried(config, min(max(round(trained / sequences), MEAN_LENGTHS[0]), MEAN_LENGTHS[1]))


@dataclass
class TokenDatasetConfig(BlendedMegatronDatasetConfig):
    """Megatron's data set configuration, and what labels carry."""

    carried: Carried = field(default_factory=Carried)


class TokenDataset(MegatronDataset):
    """Rows of a token file as samples. The training split is reshuffled in each epoch with `random_seed`."""

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: TokenDatasetConfig) -> TokenFile:
        """Open the file."""
        return TokenFile(dataset_path)

    @staticmethod
    def numel_low_level_dataset(low_level_dataset: TokenFile) -> int:
        """Rows of the file."""
        return len(low_level_dataset)

    def __len__(self) -> int:
        return len(self.indices) if self.num_samples is None else self.num_samples

    def __getitem__(self, idx: int) -> dict[str, torch.Tensor]:
        seed = self.config.random_seed if self.index_split == Split.train else None
        header = self.dataset.header
        sample = sample_of(self.dataset[int(self.indices[row_number(idx, len(self.indices), seed)])], header)
        cu_seqlens = numpy.full(header.seq_length + 1, header.seq_length, dtype=numpy.int32)  # fixed size, for collate
        cu_seqlens[: len(sample.cu_seqlens)] = sample.cu_seqlens
        return {
            **tensors_of(sample, header, self.config.carried),
            "cu_seqlens": torch.from_numpy(cu_seqlens),
            "max_seqlen": torch.tensor(numpy.diff(sample.cu_seqlens).max()),
        }


def row_number(index: int, rows: int, seed: int | None) -> int:
    """Row of the `index`-th sample of a run. Rows are reshuffled in each epoch; seed None keeps their order."""
    epoch, place = divmod(index, rows)
    return place if seed is None else int(_order(rows, seed, epoch)[place])


@functools.lru_cache(maxsize=4)
def _order(count: int, seed: int, epoch: int) -> numpy.ndarray:
    return numpy.random.default_rng((seed, epoch)).permutation(count)


def tensors_of(sample: Sample, header: Header, carried: Carried) -> dict[str, torch.Tensor]:
    """Tokens, labels, loss mask and position ids of a sample, [s] each. Labels carry what is configured."""
    labels, config = torch.from_numpy(sample.labels), carried.config
    if channels := config.metric_spec.channels:
        numbers = numpy.array([_number(name, channels) for name in header.channels])
        labels = with_channels(labels, torch.from_numpy(numbers[sample.channels]))
    if config.of_reference:
        assert sample.reference_nll is not None
        labels = with_reference(labels, torch.from_numpy(sample.reference_nll))
    weights = torch.from_numpy(sample.weights)
    if config.by_conversation:
        cu_seqlens = torch.from_numpy(sample.cu_seqlens)
        labels = with_conversations(labels, cu_seqlens, config.reduction, carried.mean_length, weights)
    elif config.weights:
        labels = with_weights(labels, weights)
    return {
        "tokens": torch.from_numpy(sample.tokens),
        "labels": labels,
        "loss_mask": torch.from_numpy(sample.loss_mask),
        "position_ids": torch.from_numpy(sample.position_ids),
    }


def _number(name: str, channels: tuple[str, ...]) -> int:
    return channels.index(name) if name in channels else 0


def provider(settings: Any, paths: list[str], training: list[str], config: DFTConfig) -> Callable[..., Any]:
    """The data set provider for `pretrain()`.

    Args:
        settings: Megatron's arguments.
        paths: the token files in `settings`.
        training: those of the training data.
        config: the settings of the objective.

    Raises:
        ValueError: if a file does not fit the run.
    """
    contents = carried(paths, [] if settings.skip_train else training, config)
    for path in paths:
        check_fit(path, TokenFile(path).header, settings)
    check_validation(settings)

    def provide(sample_counts: list[int], vp_stage: int | None = None) -> Any:
        from megatron.core import mpu
        from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
        from megatron.training import get_args
        from megatron.training.utils import get_blend_and_blend_per_split

        args = get_args()
        for path in paths:
            check_vocabulary(path, TokenFile(path).header, args.padded_vocab_size)
        blend, blend_per_split = get_blend_and_blend_per_split(args)
        dataset_config = TokenDatasetConfig(
            random_seed=args.seed,
            sequence_length=args.seq_length,
            blend=blend,
            blend_per_split=blend_per_split,
            split=args.split,
            path_to_cache=args.data_cache_path,
            multiple_validation_sets=args.multiple_validation_sets,
            full_validation=args.full_validation,
            num_dataset_builder_threads=args.num_dataset_builder_threads,
            carried=contents,
        )
        return BlendedMegatronDatasetBuilder(
            TokenDataset, sample_counts, lambda: mpu.get_tensor_model_parallel_rank() == 0, dataset_config
        ).build()

    provide.is_distributed = True  # type: ignore[attr-defined]  # Megatron then calls it on every rank
    return provide


def check_fit(path: str, header: Header, settings: Any) -> None:
    """Raises ValueError if the file was prepared for another length, layout or tokenizer than Megatron's arguments."""
    if not settings.sft:
        raise ValueError(f"{path}: a token file requires --sft, which makes Megatron read packed sequences")
    for name in UNUSED:
        if getattr(settings, name, False):
            raise ValueError(f"{path}: {_flag(name)} has no effect on a token file; drop it")
    for name in ("hybrid_context_parallel", "dynamic_context_parallel"):
        if getattr(settings, name, False):
            raise ValueError(f"{path}: a token file has a fixed layout and does not support {_flag(name)}; drop it")
    layout = Layout(
        settings.seq_length,
        settings.context_parallel_size,
        settings.tensor_model_parallel_size,
        settings.sequence_parallel,
    )
    check_layout(path, header, layout, _flag)
    if settings.tokenizer_type in HUGGING_FACE and settings.tokenizer_model:
        check_tokenizer(path, header, settings.tokenizer_model, "--tokenizer-model")


def check_validation(settings: Any) -> None:
    """Check the settings of evaluation; set --eval-interval if there is none, because Megatron always divides by it.

    Raises:
        ValueError: for evaluation without validation data, where Megatron fails only after the last iteration, or
            without an interval.
    """
    if settings.skip_train:  # the advisor evaluates the training data
        return
    if settings.eval_interval is None:
        if settings.eval_iters:
            raise ValueError(
                f"--eval-iters {settings.eval_iters} requires --eval-interval; add it, or use --eval-iters 0"
            )
        settings.eval_interval = 1
    given = settings.valid_data_path or settings.per_split_data_args_path
    if settings.data_path or settings.data_args_path:
        shares = (settings.split or "969, 30, 1").replace("/", ",").split(",")
        given = given or (len(shares) > 1 and float(shares[1]) > 0.0)
    if settings.eval_iters and not settings.full_validation and not given:
        raise ValueError(
            f"--eval-iters {settings.eval_iters}: there is no validation data; add --valid-data-path, or --eval-iters 0"
        )


@dataclass(frozen=True)
class Layout:
    """Length and parallel layout of a run, which the rows of a token file must fit."""

    seq_length: int
    context_parallel_size: int = 1
    tensor_model_parallel_size: int = 1
    sequence_parallel: bool = False


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def check_layout(path: str, header: Header, layout: Layout, named: Callable[[str], str]) -> None:
    """Raises ValueError if the rows have another length or cannot be split over the ranks.

    Args:
        named: maps a field of `Layout` to the name of the host's setting.
    """
    again = "; prepare the data again with megatron-dft data"
    if layout.seq_length != header.seq_length:
        raise ValueError(
            f"{path}: prepared for --seq-length {header.seq_length}, the run has {named('seq_length')} "
            f"{layout.seq_length}{again}"
        )
    cp, tp = layout.context_parallel_size, layout.tensor_model_parallel_size
    multiple = 2 * cp if cp > 1 else 1
    if header.multiple % multiple:
        raise ValueError(
            f"{path}: prepared for --context-parallel-size {header.context_parallel_size}, the run has "
            f"{named('context_parallel_size')} {cp}{again}"
        )
    whole = multiple * (tp if layout.sequence_parallel else 1)
    if header.seq_length % whole:
        raise ValueError(
            f"{path}: rows of {header.seq_length} tokens, prepared for --tensor-model-parallel-size "
            f"{header.tensor_model_parallel_size}, cannot be split for {named('tensor_model_parallel_size')} {tp} with "
            f"{named('sequence_parallel')} and {named('context_parallel_size')} {cp}, which require a multiple of "
            f"{whole}{again}"
        )


def check_tokenizer(path: str, header: Header, folder: str, option: str, **kwargs: Any) -> None:
    """Raises ValueError if the file was prepared with another tokenizer than that in `folder`.

    Args:
        option: the host's setting with the folder.
        kwargs: for `AutoTokenizer.from_pretrained`.
    """
    from transformers import AutoTokenizer

    from megatron_dft.data.tokens import check_fingerprint

    tokenizer = AutoTokenizer.from_pretrained(folder, **kwargs)
    check_fingerprint(path, header.fingerprint, tokenizer, f"{option} {folder}")


def check_vocabulary(path: str, header: Header, padded_vocab_size: int) -> None:
    """Raises ValueError if the model has no embedding for a token of the file."""
    if header.max_id >= padded_vocab_size:
        raise ValueError(
            f"{path}: contains token id {header.max_id}, the model has a vocabulary of {padded_vocab_size}; prepare "
            "the data with the tokenizer of the model"
        )


def _check_reference(headers: dict[str, Header], config: DFTConfig) -> None:
    """Raises ValueError if a required reference is missing, or the files have different ones."""
    if not config.of_reference:
        return
    (first_path, first_header), *_ = headers.items()
    for path, header in headers.items():
        if header.reference is None:
            raise ValueError(
                f"{path}: has no reference log-probabilities, which {config.loss_type} requires; write it with "
                "megatron-dft reference FILE --model FOLDER --out FILE"
            )
        first = first_header.reference or {}
        if any(header.reference[x] != first[x] for x in ("weights", "dtype")):
            raise ValueError(
                f"{path}: its reference model is {named(header)}, that of {first_path} is {named(first_header)}; write "
                "all files with megatron-dft reference and one --model and --dtype"
            )


def channels_of(paths: list[str]) -> set[str]:
    """Channel names in token files."""
    return {name for path in paths for name in TokenFile(path).header.channels}
