"""DFT of TRL's SFTTrainer and of this library, on the same hidden states, output layer and labels."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("trl", minversion="1.15")

from megatron_dft import linear_dft_loss, vocab_parallel_dft_loss


def make_case():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 9, 16, generator=generator, requires_grad=True)
    weight = torch.randn(40, 16, generator=generator, requires_grad=True)
    labels = torch.randint(40, (2, 9), generator=generator)
    labels[0, :4] = labels[1, :2] = -100
    return hidden, weight, labels


def trl_dft(hidden, weight, labels):
    """The loss of `SFTTrainer.compute_loss` with loss_type="dft" (TRL 1.16), from its own fused output layer."""
    from trl.kernels import ChunkedLogProbFunction

    target = labels[:, 1:].reshape(-1)
    mask = target != -100
    arguments = (None, target.clamp(min=0), 1.0, 32768)
    logprobs = ChunkedLogProbFunction.apply(hidden[:, :-1].reshape(-1, hidden.shape[-1]), weight, *arguments)[0]
    per_token = -logprobs.exp().detach() * logprobs
    return per_token.masked_fill(~mask, 0.0).sum() / mask.sum()


def test_dft_loss_and_gradients_equal_those_of_trl():
    hidden, weight, labels = make_case()
    expected = trl_dft(hidden, weight, labels)
    gradients = torch.autograd.grad(expected, (hidden, weight))
    target = torch.cat([labels[:, 1:], torch.full((2, 1), -100)], 1)
    count = (target != -100).sum()
    linear = linear_dft_loss(hidden, weight, target).sum() / count
    plain = vocab_parallel_dft_loss(hidden @ weight.t(), target).sum() / count
    for ours in (linear, plain):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-7)
        for x, truth in zip(torch.autograd.grad(ours, (hidden, weight)), gradients, strict=True):
            torch.testing.assert_close(x, truth, rtol=1e-4, atol=1e-6)
