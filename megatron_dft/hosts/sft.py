"""Data of Megatron-LM's --sft: token files, and checks of Megatron's own JSONL format.

    token files      replace the data set of the script (`token_data.py`)
    invalid lines    of JSONL end the run before training, with file, line number and reason
    channels         of JSONL: `channels`, a name per conversation of a packed line, or `channel`, for the line

Without these checks Megatron rejects a line of invalid JSON but does not name it, fails in the iteration that reads a
line without messages or contents, and trains on no token of a line without an assistant message. Empty lines are
skipped. Formats that train on every token (`default`, `identity`) are not checked: their templates may read any fields.

The checks and the channels of the labels (`labels.py`) wrap the data set provider that pretrain() receives. The data
sets are otherwise unchanged.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_dft.config import DFTConfig
from megatron_dft.labels import with_channels
from megatron_dft.metrics import OTHER
from megatron_dft.utils import nearest

ROLES = ("system", "user", "assistant", "tool")
MEGATRON_FORMATS = ("nemotron-nano-v2", "nemotron-h-aligned")  # Megatron masks all but the assistant's messages
TRAINING = ("data_path", "train_data_path")
EVALUATION = ("valid_data_path", "test_data_path")


def check_settings(settings: Any) -> None:
    """Raises ValueError for settings that fail an assertion without a message in Megatron's --sft."""
    if getattr(settings, "sft", False) and getattr(settings, "create_attention_mask_in_dataloader", False):
        raise ValueError(
            "--sft: packed sequences have no attention mask [s, s]; add --no-create-attention-mask-in-dataloader"
        )


def data_paths(settings: Any, training: bool = False) -> list[str]:
    """The files in Megatron's data path settings: lists of paths, or of alternating weights and paths.

    Args:
        training: only those of the training data.
    """
    paths: list[str] = []
    for given in _path_lists(settings, training):
        items = given.split() if isinstance(given, str) else list(given or ())
        if len(items) % 2 == 0 and all(map(_is_number, items[::2])):
            items = items[1::2]
        paths += items
    return paths


def _path_lists(settings: Any, training: bool) -> Iterator[Any]:
    for name in TRAINING if training else (*TRAINING, *EVALUATION):
        yield getattr(settings, name, None)
    if path := getattr(settings, "data_args_path", None):
        with open(path) as file:
            yield file.read()
    if path := getattr(settings, "per_split_data_args_path", None):
        with open(path) as file:
            yield from (given for split, given in json.load(file).items() if split == "train" or not training)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def is_token_file(path: str) -> bool:
    """Whether a path names an Arrow file."""
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        return file.read(6) == b"ARROW1"


def token_files(settings: Any) -> list[str]:
    """The token files among the data paths. Raises ValueError for a mixture with other files."""
    paths = data_paths(settings)
    found = [path for path in paths if is_token_file(path)]
    for path in paths:
        if path.endswith(".arrow") and not os.path.isfile(path):
            raise ValueError(f"{path}: no such token file; check the path, or prepare it with megatron-dft data")
        if found and path not in found:
            raise ValueError(f"{path}: expected a token file like {found[0]}; prepare it with megatron-dft data")
    return found


def dataset_provider(provider: Callable[..., Any], settings: Any, config: DFTConfig) -> Callable[..., Any]:
    """The data set provider for `pretrain()`: token files, or the script's own provider with checks."""
    paths, channels = token_files(settings), config.metric_spec.channels
    if not paths:
        return with_checks(provider, settings, channels)
    from megatron_dft.hosts import token_data

    check_channels(channels, token_data.channels_of(paths), "--dft-channels", settings.rank == 0)
    return token_data.provider(settings, paths, data_paths(settings, training=True), config)


def with_checks(provider: Callable[..., Any], settings: Any, channels: tuple[str, ...]) -> Callable[..., Any]:
    """A data set provider whose --sft data sets are checked and carry channels in their labels.

    Args:
        channels: names by number; empty: labels are not changed. Other data sets than Megatron's for --sft have to
            add channels to their labels themselves (`with_channels`).
    """

    @functools.wraps(provider)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        masking = getattr(settings, "sft_tokenizer_prompt_format", None) in MEGATRON_FORMATS
        try:
            provided = provider(*args, **kwargs)
        except Exception as error:
            _raise_for_invalid_line(settings, error)
            raise
        tables = [low.data for low in map(_table_of, _parts(provided)) if low is not None]
        if masking and not all(map(_whole, tables)):
            _raise_for_invalid_line(settings, None)
        if tables:
            check_channels(channels, _names_in(tables), "--dft-channels", getattr(settings, "rank", 0) == 0)
        return _replaced(provided, functools.partial(_named, names=channels)) if channels else provided

    return wrapped


def _raise_for_invalid_line(settings: Any, error: Exception | None) -> None:
    """Raises ValueError with the first line that --sft cannot train on, if there is one."""
    if not getattr(settings, "sft", False):
        return
    for path in filter(os.path.isfile, data_paths(settings)):
        if reason := first_invalid_line(path):
            raise ValueError(
                f"{reason}. No token of this line can be trained on; megatron-dft data lists all such lines "
                "and prepares the others"
            ) from error


def _table_of(dataset: Any) -> Any | None:
    """The table of JSONL lines below a data set of --sft; None for other data sets."""
    try:
        from megatron.training.datasets.sft_dataset import SFTDataset
    except ModuleNotFoundError:
        return None
    return dataset.dataset.dataset if isinstance(dataset, SFTDataset) else None


def _whole(table: Any) -> bool:
    """Whether all rows of an Arrow table are valid conversations. Column operations; fast compared with loading.

    Also False for columns with another Arrow type, such as messages with unequal keys. The lines are then read.
    """
    import pyarrow
    import pyarrow.compute as compute

    try:
        for rows in table.column("messages").chunks:
            rows.validate(full=True)  # text that is no UTF-8
            roles, contents = (compute.struct_field(rows.flatten(), name) for name in ("role", "content"))
            spoken = compute.equal(roles, "assistant")
            replies = compute.list_parent_indices(rows).filter(spoken)
            nulls = rows.null_count + roles.null_count + contents.null_count
            if nulls or contents.type != pyarrow.string() or not set(roles.unique().to_pylist()) <= set(ROLES):
                return False
            blank = compute.equal(compute.utf8_trim_whitespace(contents.filter(spoken)), "")
            if len(replies.unique()) < len(rows) or compute.any(blank).as_py():
                return False
    except (pyarrow.ArrowException, KeyError, AttributeError):  # another type or a missing column
        return False
    return True


def _names_in(tables: list[Any]) -> set[str]:
    """Channels named in JSONL lines."""
    found: set[str] = set()
    for table in tables:
        for column in {"channel", "channels"} & set(table.column_names):
            for value in table.column(column).to_pylist():
                found |= {name for name in (value if isinstance(value, list) else [value]) if name}
    return found


def check_channels(channels: tuple[str, ...], found: set[str], option: str, prints: bool = False) -> None:
    """Raises ValueError for a name in `option` that is no channel of the data. Prints channels reported as `other`."""
    for name in channels:
        if name != OTHER and name not in found:
            present = f"it has {', '.join(sorted(found)[:20])}" if found else "it has none"
            raise ValueError(f"{option}: the data has no channel {name!r}: {present}{nearest(name, found)}")
    rest = sorted(found - set(channels))
    if channels and rest and prints:
        print(f"> megatron_dft: channels reported as {OTHER!r}: {', '.join(rest[:20])}", flush=True)


def first_invalid_line(path: str) -> str | None:
    """File, line number and error of the first line that --sft cannot train on; None if there is none."""
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip() and (reason := _line_error(line)):
                return f"{path}:{number}: {reason}"
    return None


def _line_error(line: bytes) -> str | None:
    try:
        record = json.loads(line)
    except ValueError as error:
        return f"not JSON: {error}"
    messages = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(messages, list):
        return f"no messages: expected an object with a list `messages`, got {line[:60]!r}"
    for i, message in enumerate(messages):
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if role not in ROLES or not isinstance(content, str):
            return (
                f"bad message: message {i}: expected text as content and one of the roles {', '.join(ROLES)}, "
                f"got {type(content).__name__} and {role!r}"
            )
        if role == "assistant" and not content.strip():
            return f"empty reply: message {i}: expected text of the assistant"
    if any(x["role"] == "assistant" for x in messages):
        return None
    return "no assistant message: nothing in this line contributes to the loss"


class ChannelDataset(torch.utils.data.Dataset):
    """Megatron's data set for --sft with channels in its labels. Delegates all other attributes."""

    def __init__(self, dataset: Any, names: tuple[str, ...]) -> None:
        self.dataset = dataset
        self.numbers = {name: number for number, name in enumerate(names)}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.dataset[index]
        line = self.dataset.dataset.dataset[int(self.dataset.indices[index % len(self.dataset.indices)])]
        sample["labels"] = with_channels(sample["labels"], _by_token(line, sample, self.numbers))
        return sample

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "dataset" not in vars(self):  # during unpickling
            raise AttributeError(name)
        return getattr(self.dataset, name)


def _named(dataset: Any, names: tuple[str, ...]) -> Any:
    return dataset if _table_of(dataset) is None else ChannelDataset(dataset, names)


def _parts(provided: Any) -> Iterator[Any]:
    """The data sets in nested lists and in Megatron's blends."""
    if isinstance(provided, (list, tuple)):
        for item in provided:
            yield from _parts(item)
    elif hasattr(provided, "datasets"):
        yield from _parts(provided.datasets)
    elif provided is not None:
        yield provided


def _replaced(provided: Any, replace: Callable[[Any], Any]) -> Any:
    """The same lists and blends with each data set replaced by `replace(dataset)`."""
    if isinstance(provided, (list, tuple)):
        items = [_replaced(item, replace) for item in provided]
        return provided._make(items) if hasattr(provided, "_make") else type(provided)(items)  # a namedtuple
    if hasattr(provided, "datasets"):
        provided.datasets = _replaced(provided.datasets, replace)
        return provided
    return None if provided is None else replace(provided)


def _by_token(line: dict[str, Any], sample: dict[str, Any], numbers: dict[str, int]) -> torch.Tensor:
    """Channel number of each label of a packed line."""
    names = line.get("channels") or [line.get("channel")]
    ends = sample["cu_seqlens"][1:]  # of conversations, padded with the length of the line
    following = torch.arange(1, len(sample["labels"]) + 1, dtype=ends.dtype)  # the label of a token is the next one
    conversation = torch.searchsorted(ends, following, right=True).clamp(max=len(names) - 1)
    return torch.tensor([numbers.get(name, 0) for name in names])[conversation]
