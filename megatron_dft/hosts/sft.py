"""What Megatron-LM's --sft does not know: other prompt formats, damaged lines, and where conversations come from.

    prompt formats   --sft-tokenizer-prompt-format chat | completion    (`chat.py`) beside Megatron's own
    damaged lines    end the run before it trains, with file, line number and reason
    channels         `channels`, a name for each conversation of a packed line, or `channel`, one for the line

Megatron alone refuses a line that is no JSON, without its number, fails in the iteration that reads one whose messages
or contents are missing, and trains on nothing where no assistant speaks. Empty lines hold nothing and are passed over.
Formats that train on every token (`default`, `identity`) may have templates that read anything: left to Megatron.

Formats are known wherever the launcher runs a script. Channels are put on the labels (`channels.py`) of the data sets
that pretrain() is given, when the run reports them; nothing else about those data sets changes.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_dft.channels import with_channels
from megatron_dft.chat import FORMATS, IGNORE_INDEX, ChatFormat, Conversation, Encoded, spans_of

ROLES = ("system", "user", "assistant", "tool")
MEGATRON_FORMATS = ("nemotron-nano-v2", "nemotron-h-aligned")  # of which Megatron masks what is not the assistant's
Encode = Callable[[list[Conversation]], list[Encoded | ValueError]]


def enable_formats() -> None:
    """Teach Megatron's tokenizer for --sft the formats `chat` and `completion`, and its data set to refuse damage."""
    _enable_checks()
    try:
        from megatron.core.tokenizers.text import libraries
        from megatron.core.tokenizers.text.libraries.sft_tokenizer import PromptConfig, SFTTokenizer
    except ModuleNotFoundError:
        return  # a Megatron without --sft, which will say so

    import numpy

    class ChatTokenizer(SFTTokenizer):
        def __init__(self, tokenizer_path: str, prompt_format: str) -> None:
            super().__init__(tokenizer_path, "default")
            self._format = ChatFormat(self._tokenizer, prompt_format)
            self._prompt_config = PromptConfig(
                assistant_prefix_len=0,
                pad_token_id=self._format.pad_id,
                custom_chat_template=self._tokenizer.chat_template,
                has_bos=False,
                has_system_role=True,
            )

        def tokenize_conversation(self, conversation: list[dict], return_target: bool, add_generation_prompt: bool):
            if add_generation_prompt:
                return super().tokenize_conversation(conversation, return_target, add_generation_prompt)
            (encoded,) = self._format.encode([conversation])
            if isinstance(encoded, ValueError):
                raise encoded
            ids = numpy.array(encoded.ids)
            return (ids, numpy.array(encoded.targets())) if return_target else ids

    @functools.wraps(SFTTokenizer, updated=())
    def of_format(tokenizer_path: str, prompt_format: str) -> Any:
        kind = ChatTokenizer if prompt_format in FORMATS else SFTTokenizer
        return kind(tokenizer_path, prompt_format)

    libraries.SFTTokenizer = of_format  # type: ignore[misc, assignment]


def _enable_checks() -> None:
    try:
        from megatron.training import get_args
        from megatron.training.datasets.sft_dataset import SFTLowLevelDataset
    except ModuleNotFoundError:
        return
    load = SFTLowLevelDataset.__init__

    @functools.wraps(load)
    def wrapped(self: Any, dataset_path: str) -> None:
        try:
            load(self, dataset_path)
        except Exception as error:
            if os.path.isfile(dataset_path) and damage(dataset_path):
                raise _refusal(dataset_path) from error
            raise
        if get_args().sft_tokenizer_prompt_format in (*FORMATS, *MEGATRON_FORMATS) and not _whole(self.dataset.data):
            raise _refusal(dataset_path)

    SFTLowLevelDataset.__init__ = wrapped  # type: ignore[method-assign]


def _refusal(path: str) -> ValueError:
    return ValueError(
        f"{damage(path) or path}; expected lines that all train, got one that cannot; python -m megatron_dft.data "
        "names all of them and writes a file without them"
    )


def _whole(table: Any) -> bool:
    """Whether all rows of an Arrow table are conversations: by columns, in a small part of the time to load them."""
    import pyarrow
    import pyarrow.compute as compute

    try:
        for rows in table.column("messages").chunks:
            rows.validate(full=True)  # text that is no UTF-8
            roles, contents = (compute.struct_field(rows.flatten(), name) for name in ("role", "content"))
            replies = compute.list_parent_indices(rows).filter(compute.equal(roles, "assistant"))
            nulls = rows.null_count + roles.null_count + contents.null_count
            if nulls or contents.type != pyarrow.string() or not set(roles.unique().to_pylist()) <= set(ROLES):
                return False
            if len(replies.unique()) < len(rows):
                return False
    except (pyarrow.ArrowException, KeyError, AttributeError):  # another type, no such column
        return False
    return True


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
    return None if any(x["role"] == "assistant" for x in messages) else "no assistant: nothing in it would train"


def encoder(folder: str, form: str) -> tuple[Any, Encode]:
    """A tokenizer, and the function by which Megatron will tokenize conversations in this format.

    Raises:
        ValueError: for a folder without a tokenizer, or a tokenizer that the format cannot use.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        from transformers import AutoTokenizer
    except ModuleNotFoundError as error:
        raise ValueError(f"expected transformers, got none ({error}); pip install 'megatron_dft[tools]'") from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--tokenizer: expected the folder of a tokenizer, got {folder!r} ({reason})") from None
    if form in FORMATS:
        chat = ChatFormat(tokenizer, form)
        chat.pad_id  # noqa: B018 (raises where there is none)
        return tokenizer, chat.encode
    from megatron.core.tokenizers.text.libraries.sft_tokenizer import SFTTokenizer

    host = SFTTokenizer(folder, form)
    return tokenizer, lambda conversations: [_by_megatron(host, conversation) for conversation in conversations]


def _by_megatron(host: Any, conversation: Conversation) -> Encoded | ValueError:
    try:
        ids, targets = host.tokenize_conversation(conversation, return_target=True, add_generation_prompt=False)
    except (ValueError, AssertionError) as error:
        return ValueError(str(error).partition("\n")[0])
    return Encoded(ids.tolist(), spans_of((targets != IGNORE_INDEX).tolist()))


def naming_channels(provider: Callable[..., Any], names: tuple[str, ...]) -> Callable[..., Any]:
    """A provider of data sets, and channels on the labels of those that are Megatron's for --sft.

    Other data sets are left alone: they put channels on their labels themselves, or all their tokens are `other`.
    """

    @functools.wraps(provider)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        provided = provider(*args, **kwargs)
        for dataset in _parts(provided):
            _name_channels(dataset, names)
        return provided

    return wrapped


def _parts(provided: Any) -> Iterator[Any]:
    """Data sets below lists, and below Megatron's blends of several files."""
    if isinstance(provided, (list, tuple)):
        for item in provided:
            yield from _parts(item)
    elif hasattr(provided, "datasets"):
        yield from _parts(provided.datasets)
    elif provided is not None:
        yield provided


def _name_channels(dataset: Any, names: tuple[str, ...]) -> None:
    from megatron.training.datasets.sft_dataset import SFTDataset

    kind = type(dataset)
    if not isinstance(dataset, SFTDataset) or hasattr(kind, "channels"):  # a provider may give one twice
        return
    numbers = {name: number for number, name in enumerate(names)}

    class WithChannels(kind):  # type: ignore[valid-type, misc]
        channels = names

        def __getitem__(self, index: int) -> dict[str, Any]:
            sample = super().__getitem__(index)
            line = self.dataset.dataset[int(self.indices[index % len(self.indices)])]
            sample["labels"] = with_channels(sample["labels"], _by_token(line, sample, numbers))
            return sample

    WithChannels.__name__ = WithChannels.__qualname__ = kind.__name__
    dataset.__class__ = WithChannels


def _by_token(line: dict[str, Any], sample: dict[str, Any], numbers: dict[str, int]) -> torch.Tensor:
    """The channel's number of each label of a packed line."""
    names = line.get("channels") or [line.get("channel")]
    ends = sample["cu_seqlens"][1:]  # of conversations; filled up with the length of the line
    following = torch.arange(1, len(sample["labels"]) + 1, dtype=ends.dtype)  # the label of a token is the next one
    conversation = torch.searchsorted(ends, following, right=True).clamp(max=len(names) - 1)
    return torch.tensor([numbers.get(name, 0) for name in names])[conversation]
