"""The data of Megatron-LM's --sft: token files, and checks of Megatron's own JSONL format.

    token files      a data set of ours in place of the script's (`token_data.py`)
    invalid lines    of JSONL end the run before it trains, with file, line number and reason
    channels         of JSONL: `channels`, a name for each conversation of a packed line, or `channel`, for the line

Megatron alone refuses a line that is no JSON, without its number, fails in the iteration that reads one whose messages
or contents are missing, and trains on nothing where no assistant speaks. Empty lines hold nothing and are passed over.
Formats that train on every token (`default`, `identity`) may have templates that read anything: left to Megatron.

Lines are checked, and channels put on the labels (`channels.py`), in the data sets that pretrain() is given, through
its argument for them. Nothing else about those data sets changes.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_dft.channels import OTHER, with_channels
from megatron_dft.objectives import nearest

ROLES = ("system", "user", "assistant", "tool")
MEGATRON_FORMATS = ("nemotron-nano-v2", "nemotron-h-aligned")  # of which Megatron masks what is not the assistant's
DATA = ("data_path", "train_data_path", "valid_data_path", "test_data_path")


def check_settings(settings: Any) -> None:
    """Refuse, by name, what Megatron's --sft ends with an assertion without a text for."""
    if getattr(settings, "sft", False) and getattr(settings, "create_attention_mask_in_dataloader", False):
        raise ValueError(
            "--sft: packed sequences have no attention mask [s, s]; add --no-create-attention-mask-in-dataloader"
        )


def data_paths(settings: Any) -> list[str]:
    """The files in Megatron's lists of paths, or of weights and paths in turn, as Megatron reads them."""
    paths: list[str] = []
    for given in _path_lists(settings):
        words = given.split() if isinstance(given, str) else list(given or ())
        if len(words) % 2 == 0 and all(map(_is_number, words[::2])):
            words = words[1::2]
        paths += words
    return paths


def _path_lists(settings: Any) -> Iterator[Any]:
    for name in DATA:
        yield getattr(settings, name, None)
    if path := getattr(settings, "data_args_path", None):
        with open(path) as file:
            yield file.read()
    if path := getattr(settings, "per_split_data_args_path", None):
        with open(path) as file:
            yield from json.load(file).values()


def _is_number(word: str) -> bool:
    try:
        float(word)
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
    """The token files among the data paths. Raises ValueError if there are others beside them."""
    paths = data_paths(settings)
    found = [path for path in paths if is_token_file(path)]
    for path in paths:
        if found and path not in found:
            raise ValueError(
                f"{path}: expected a token file, as {found[0]} is; prepare it with python -m megatron_dft.data"
            )
    return found


def dataset_provider(provider: Callable[..., Any], settings: Any, channels: tuple[str, ...]) -> Callable[..., Any]:
    """The provider of data sets for `pretrain()`: of token files, or the script's own with checks."""
    paths = token_files(settings)
    if not paths:
        return with_checks(provider, settings, channels)
    from megatron_dft.hosts import token_data

    check_channels(channels, token_data.channels_of(paths), "--loss-channels", settings.rank == 0)
    return token_data.provider(settings, paths, channels)


def with_checks(provider: Callable[..., Any], settings: Any, channels: tuple[str, ...]) -> Callable[..., Any]:
    """A provider of data sets, of which those of --sft are checked and carry channels on their labels.

    Args:
        channels: names by number; empty: labels stay as they are. Data sets that are not Megatron's for --sft put
            channels on their labels themselves (`with_channels`).
    """

    @functools.wraps(provider)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        masking = getattr(settings, "sft_tokenizer_prompt_format", None) in MEGATRON_FORMATS
        try:
            provided = provider(*args, **kwargs)
        except Exception as error:
            _refuse_damage(settings, error)
            raise
        tables = [low.data for low in map(_table_of, _parts(provided)) if low is not None]
        if masking and not all(map(_whole, tables)):
            _refuse_damage(settings, None)
        if tables:
            check_channels(channels, _names_in(tables), "--loss-channels", getattr(settings, "rank", 0) == 0)
        return _replaced(provided, functools.partial(_named, names=channels)) if channels else provided

    return wrapped


def _refuse_damage(settings: Any, error: Exception | None) -> None:
    """Name the first line that cannot train, if there is one."""
    if not getattr(settings, "sft", False):
        return
    for path in filter(os.path.isfile, data_paths(settings)):
        if reason := damage(path):
            raise ValueError(
                f"{reason}. Nothing in this line can be trained on; python -m megatron_dft.data names all such lines "
                "and prepares the others"
            ) from error


def _table_of(dataset: Any) -> Any | None:
    """The table of JSONL lines below a data set of --sft; None: it is another one."""
    try:
        from megatron.training.datasets.sft_dataset import SFTDataset
    except ModuleNotFoundError:
        return None
    return dataset.dataset.dataset if isinstance(dataset, SFTDataset) else None


def _whole(table: Any) -> bool:
    """Whether all rows of an Arrow table are conversations: by columns, in a small part of the time to load them.

    False, too, for a column that Arrow stores in another way, as messages with unequal keys; then lines are read.
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
    except (pyarrow.ArrowException, KeyError, AttributeError):  # another type, no such column
        return False
    return True


def _names_in(tables: list[Any]) -> set[str]:
    """Channels that lines of JSONL name."""
    found: set[str] = set()
    for table in tables:
        for column in {"channel", "channels"} & set(table.column_names):
            for value in table.column(column).to_pylist():
                found |= {name for name in (value if isinstance(value, list) else [value]) if name}
    return found


def check_channels(channels: tuple[str, ...], found: set[str], option: str, prints: bool = False) -> None:
    """Raises ValueError if a name in `option` is no channel of the data. Prints those that count as `other`."""
    for name in channels:
        if name != OTHER and name not in found:
            known = f"it has {', '.join(sorted(found)[:20])}{nearest(name, found)}" if found else "it has none"
            raise ValueError(f"{option}: the data has no channel {name!r}; {known}")
    rest = sorted(found - set(channels))
    if channels and rest and prints:
        print(f"> megatron_dft: channels that are reported as {OTHER!r}: {', '.join(rest[:20])}", flush=True)


def damage(path: str) -> str | None:
    """File, number and fault of the first line on which --sft cannot train; None if there is no such line."""
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip() and (reason := _fault(line)):
                return f"{path}:{number}: {reason}"
    return None


def _fault(line: bytes) -> str | None:
    try:
        record = json.loads(line)
    except ValueError as error:
        return f"not JSON: {error}"
    messages = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(messages, list):
        return f"no messages: expected an object with a list of them, got {line[:60]!r}"
    for i, message in enumerate(messages):
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if role not in ROLES or not isinstance(content, str):
            return (
                f"bad message: message {i}: expected content that is text and a role of {', '.join(ROLES)}, "
                f"got {type(content).__name__} and {role!r}"
            )
        if role == "assistant" and not content.strip():
            return f"empty reply: message {i}: expected text of the assistant"
    return None if any(x["role"] == "assistant" for x in messages) else "no assistant: nothing in it would train"


class ChannelDataset(torch.utils.data.Dataset):
    """Megatron's data set for --sft, with channels on its labels. Delegates all other attributes."""

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
        if name.startswith("__") or "dataset" not in vars(self):  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.dataset, name)


def _named(dataset: Any, names: tuple[str, ...]) -> Any:
    return dataset if _table_of(dataset) is None else ChannelDataset(dataset, names)


def _parts(provided: Any) -> Iterator[Any]:
    """Data sets below lists, and below Megatron's blends of several files."""
    if isinstance(provided, (list, tuple)):
        for item in provided:
            yield from _parts(item)
    elif hasattr(provided, "datasets"):
        yield from _parts(provided.datasets)
    elif provided is not None:
        yield provided


def _replaced(provided: Any, replace: Callable[[Any], Any]) -> Any:
    """The same lists and blends, of replaced data sets."""
    if isinstance(provided, (list, tuple)):
        items = [_replaced(item, replace) for item in provided]
        return provided._make(items) if hasattr(provided, "_make") else type(provided)(items)  # a namedtuple
    if hasattr(provided, "datasets"):
        provided.datasets = _replaced(provided.datasets, replace)
        return provided
    return None if provided is None else replace(provided)


def _by_token(line: dict[str, Any], sample: dict[str, Any], numbers: dict[str, int]) -> torch.Tensor:
    """The channel's number of each label of a packed line."""
    names = line.get("channels") or [line.get("channel")]
    ends = sample["cu_seqlens"][1:]  # of conversations; filled up with the length of the line
    following = torch.arange(1, len(sample["labels"]) + 1, dtype=ends.dtype)  # the label of a token is the next one
    conversation = torch.searchsorted(ends, following, right=True).clamp(max=len(names) - 1)
    return torch.tensor([numbers.get(name, 0) for name in names])[conversation]
