"""Tokenize problems with a numeric answer for a Hugging Face chat model, generate replies, and score them.

Used by `demo.py` and by `tools/studies/real_model.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from word_problems import SYSTEM, Problem, last_number

from megatron_dft.data.conversations import conversation_of
from megatron_dft.data.tokens import ConversationTokenizer
from megatron_dft.metrics import BINS, bin_of
from megatron_dft.ops.stats import TokenStats
from megatron_dft.ops.vocab_parallel import vocab_stats

BATCH = 16  # conversations in a forward pass of `reply_statistics`


class Example(NamedTuple):
    """Token ids of a conversation, and which of them are in the loss."""

    ids: list[int]
    trained: list[bool]


class ChatModel:
    """Tokenizer and chat template of a Hugging Face folder, on a device.

    Attributes:
        tokenizer: of transformers.
        device: where models are loaded.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        from transformers import AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self.conversations = ConversationTokenizer(self.tokenizer)
        self.device = device

    def load(self, folder: Path) -> nn.Module:
        """The weights of a folder with the same tokenizer, in fp32."""
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        return model.to(self.device)

    def encode(self, problems: Sequence[Problem]) -> list[Example]:
        """Tokens of the problems with their replies, as `megatron-dft data` marks them.

        Raises:
            ValueError: if the chat template cannot render a problem.
        """
        rows = self.conversations.encode([conversation_of({"messages": problem.messages}) for problem in problems])
        found = []
        for row in rows:
            if isinstance(row, ValueError):
                raise row
            (encoded,) = row
            trained = [any(a <= i < b for a, b in encoded.spans) for i in range(len(encoded.ids))]
            found.append(Example(encoded.ids, trained))
        return found

    @torch.no_grad()
    def generate(self, model: nn.Module, questions: Sequence[str], tokens: int, temperature: float = 0.0) -> list[str]:
        """Replies of at most `tokens` tokens; temperature 0: greedy."""
        messages = [[{"role": "system", "content": SYSTEM}, {"role": "user", "content": q}] for q in questions]
        prompts = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        self.tokenizer.padding_side = "left"
        batch = self.tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False).to(self.device)
        how = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        out = model.generate(**batch, max_new_tokens=tokens, pad_token_id=self.tokenizer.pad_token_id, **how)
        return self.tokenizer.batch_decode(out[:, batch.input_ids.shape[1] :], skip_special_tokens=True)

    def exact_match(
        self, model: nn.Module, problems: Sequence[Problem], *, tokens: int, samples: int, seed: int
    ) -> dict[str, list]:
        """Whether the last number of a reply is the answer, for each problem.

        Returns:
            greedy: 0 or 1; sampled: share of `samples` replies at temperature 1; replies: the greedy replies.
        """
        model.generation_config.update(temperature=None, top_p=None, top_k=None)
        questions = [problem.question for problem in problems]
        torch.manual_seed(seed)
        rounds = [self.generate(model, questions, tokens, temperature) for temperature in [0.0, *[1.0] * samples]]
        right = [[last_number(r) == p.answer for r, p in zip(replies, problems, strict=True)] for replies in rounds]
        shares = [sum(scores) / samples for scores in zip(*right[1:], strict=True)]
        return {"greedy": [float(score) for score in right[0]], "sampled": shares, "replies": rounds[0]}


def reply_logits(model: nn.Module, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Logits [t, V] of the tokens in the loss, and their targets [t], under bf16 autocast."""
    longest = max(len(example.ids) for example in examples)
    ids = torch.zeros(len(examples), longest, dtype=torch.int64)  # causal attention ignores padding on the right
    target = torch.full_like(ids, -100)
    for i, (tokens, trained) in enumerate(examples):
        ids[i, : len(tokens)] = torch.tensor(tokens)
        target[i, : len(tokens) - 1] = torch.tensor(tokens[1:]).masked_fill(~torch.tensor(trained[1:]), -100)
    device = next(model.parameters()).device
    ids, target = ids.to(device), target.to(device)
    with torch.autocast(device.type, torch.bfloat16):
        hidden = model.base_model(ids, use_cache=False).last_hidden_state
        chosen = target >= 0
        return model.get_output_embeddings()(hidden[chosen]), target[chosen]


@torch.no_grad()
def reply_stats(model: nn.Module, examples: Sequence[Example]) -> list[TokenStats]:
    """Token statistics of the replies, in batches."""
    batches = [examples[i : i + BATCH] for i in range(0, len(examples), BATCH)]
    return [vocab_stats(*reply_logits(model, batch)) for batch in batches]


def reply_means(model: nn.Module, examples: Sequence[Example]) -> dict[str, Any]:
    """Mean NLL (nats) and p of the replies' tokens, and the share of tokens by p in ten bins."""
    stats = reply_stats(model, examples)
    nll, p = (torch.cat([getattr(batch, name) for batch in stats]) for name in ("nll", "prob"))
    shares = torch.bincount(bin_of(p), minlength=BINS) / len(p)
    return {"nll": nll.mean().item(), "p": p.mean().item(), "histogram": shares.tolist()}
