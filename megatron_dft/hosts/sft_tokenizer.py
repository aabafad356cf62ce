"""Megatron's tokenizer for --sft, with the prompt formats `chat` and `completion` (chat.py) beside its own.

Imports Megatron. A class of a module of its own, so that its instances can be pickled: data loader workers that are
spawned receive the tokenizer with their data set.
"""

from __future__ import annotations

from typing import Any

import numpy
from megatron.core.tokenizers.text.libraries import sft_tokenizer

from megatron_dft.chat import FORMATS, ChatFormat


class SFTTokenizer(sft_tokenizer.SFTTokenizer):
    """As Megatron's; other formats than its own are rendered and masked by chat.py."""

    def __init__(self, tokenizer_path: str, prompt_format: str) -> None:
        super().__init__(tokenizer_path, "default" if prompt_format in FORMATS else prompt_format)
        self._chat = None
        if prompt_format in FORMATS:
            self._chat = ChatFormat(self._tokenizer, prompt_format)
            self._prompt_config = sft_tokenizer.PromptConfig(
                assistant_prefix_len=0,
                pad_token_id=self._chat.pad_id,
                custom_chat_template=self._tokenizer.chat_template,
                has_bos=False,
                has_system_role=True,
            )

    def tokenize_conversation(self, conversation: list[dict], return_target: bool, add_generation_prompt: bool) -> Any:
        """Ids and, if asked for, targets; -100 where a token does not train. Raises ValueError as chat.py does."""
        if self._chat is None or add_generation_prompt:
            return super().tokenize_conversation(conversation, return_target, add_generation_prompt)
        (encoded,) = self._chat.encode([conversation])
        if isinstance(encoded, ValueError):
            raise encoded
        ids = numpy.array(encoded.ids)
        return (ids, numpy.array(encoded.targets())) if return_target else ids
