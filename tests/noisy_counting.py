"""The data of the host tests: counting with noise and very uneven loss masks."""

import os

import torch

from megatron_dft.labels import with_channels


class NoisyCounting(torch.utils.data.Dataset):
    """Each token is its predecessor plus 1, 30% are random. By sample, no, 1 or 2, about 30% or all are valid."""

    def __init__(self, split: int, samples: int, vocab_size: int, length: int, ignore_masked: bool = True) -> None:
        self.split, self.samples, self.vocab_size, self.length = split, samples, vocab_size, length
        self.ignore_masked = ignore_masked

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        vocab_size, length = self.vocab_size, self.length
        random = torch.Generator().manual_seed(1_000_003 * self.split + int(index))
        text = (torch.randint(vocab_size, (1,), generator=random) + torch.arange(length + 1)) % vocab_size
        noise = torch.rand(length + 1, generator=random) < 0.3
        text = torch.where(noise, torch.randint(vocab_size, text.shape, generator=random), text)
        position = torch.arange(length)
        valid = (
            position < 0,
            position < 1 + index // 4 % 2,
            torch.rand(length, generator=random) < 0.3,
            position >= 0,
        )[index % 4]
        labels = text[1:].masked_fill(~valid, -100) if self.ignore_masked else text[1:]
        if os.environ.get("CHANNELS"):
            labels = with_channels(labels, index % int(os.environ["CHANNELS"]))
        return {"tokens": text[:-1], "labels": labels, "loss_mask": valid.float(), "position_ids": position}
