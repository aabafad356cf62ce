"""Options that determine the tokens of chat data, and the tokenizer that they describe.

`megatron-dft data` and `megatron-dft advise` share them, so both count the same tokens.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from megatron_dft.data.conversations import RESERVED
from megatron_dft.data.tokens import FORMATS, ConversationTokenizer


def add_arguments(parser: argparse._ActionsContainer) -> None:
    """Add the format, the chat template, the channel and the action for long sequences."""
    add = parser.add_argument
    add(
        "--format",
        choices=FORMATS,
        default="chat",
        help="chat: the chat template, the loss covers assistant turns; completion: contents without a template, the "
        "loss covers assistant turns and the end of the text",
    )
    add("--chat-template", type=Path, metavar="FILE", help="Jinja template to use instead of the tokenizer's")
    add(
        "--chat-template-kwargs",
        type=_json_object,
        default={},
        metavar="JSON",
        help='variables of the chat template, e.g. {"enable_thinking": false}',
    )
    add("--channel", type=_name, metavar="NAME", help="channel of records without one (default: their file's name)")
    add(
        "--too-long",
        choices=("drop", "truncate"),
        default="drop",
        help="action for sequences that are longer than --seq-length (default: %(default)s, counted as rejected)",
    )


def auto_tokenizer(folder: str, option: str, **kwargs: Any) -> Any:
    """`AutoTokenizer.from_pretrained` with one-line errors.

    Raises:
        ValueError: for missing packages, or no tokenizer.
    """
    try:
        from transformers import AutoTokenizer
    except ModuleNotFoundError as error:
        raise ValueError(f"transformers is missing ({error}); pip install 'megatron_dft[data]'") from None
    try:
        return AutoTokenizer.from_pretrained(folder, **kwargs)
    except Exception as error:  # transformers raises many types for an invalid folder
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{option} {folder}: no tokenizer found ({reason}); check the path") from None


def load_tokenizer(
    args: argparse.Namespace, folder: str, option: str = "--tokenizer", **kwargs: Any
) -> ConversationTokenizer:
    """The tokenizer of a folder, with the format and chat template of `args`.

    Args:
        folder: folder or Hub name of a model.
        option: the flag with the folder, for the error message.
        kwargs: for `AutoTokenizer.from_pretrained`.

    Raises:
        ValueError: for missing packages, no tokenizer, or an unusable chat template.
    """
    tokenizer = auto_tokenizer(folder, option, **kwargs)
    for flag, value in (("--chat-template", args.chat_template), ("--chat-template-kwargs", args.chat_template_kwargs)):
        if value and args.format != "chat":
            raise ValueError(f"{flag}: --format {args.format} uses no chat template; drop one of them")
    for name in args.chat_template_kwargs:
        if name in RESERVED:
            raise ValueError(f"--chat-template-kwargs: {name!r} is reserved; remove it")
    template = None
    if args.chat_template is not None:
        try:
            template = args.chat_template.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--chat-template {args.chat_template}: expected a Jinja file ({error})") from None
    try:
        return ConversationTokenizer(tokenizer, args.format, template, args.chat_template_kwargs)
    except ValueError as error:
        raise ValueError(f"{args.chat_template or folder}: {error}") from None


def positive(text: str) -> int:
    """An integer of 1 or more, for `type=` of argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of 1 or more, got {text!r}")
    return int(text)


def _name(text: str) -> str:
    if not text or "," in text:
        raise argparse.ArgumentTypeError(f"expected a name without a comma, got {text!r}")
    return text


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a JSON object ({error})") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text}")
    return value
