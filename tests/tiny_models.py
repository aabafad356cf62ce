"""Tiny Megatron models with fixed weights, their input batches, forward pass and gradients."""

from functools import partial

import torch

SEQUENCE, BATCH, VOCAB = 8, 3, 64  # s != b, so that swapping [s, b] and [b, s] fails

# Settings with equal results: masked tokens removed before the output layer (the default) or not, the output layer in
# chunks of the vocabulary, in chunks of tokens (with the gradient in forward), or neither.
VARIANTS = {
    "dropped": {},
    "not dropped": {"compact_masked_tokens": False},
    "out of place": {"inplace_backward": False},
    "chunks": {"linear_fused": True, "vocab_chunk": 7},
    "chunks, not dropped": {"linear_fused": True, "vocab_chunk": 1000, "compact_masked_tokens": False},
    "chunks, kept": {"linear_fused": True, "vocab_chunk": 10, "keep_chunks": 2},
    "token chunks": {"linear_fused": True, "token_chunk": 5},
    "token chunks, not dropped": {"linear_fused": True, "token_chunk": 7, "compact_masked_tokens": False},
}


def start():
    from megatron_dft.testing import cpu

    cpu.enable()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=torch.distributed.get_world_size())
    model_parallel_cuda_manual_seed(1)


def transformer_config(**settings):
    """A tiny configuration without CUDA-only kernels."""
    from megatron.core.transformer import TransformerConfig

    tiny = {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "calculate_per_token_loss": True}
    return TransformerConfig(
        **{"tensor_model_parallel_size": torch.distributed.get_world_size(), **tiny, **settings},
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        bias_activation_fusion=False,
    )


def gpt(**settings):
    """A tiny GPTModel, with the same weights on every call."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_mtp_block_spec

    parallel_output, tied = settings.pop("parallel_output", True), settings.pop("tied", False)
    config = transformer_config(**settings)
    torch.manual_seed(1)
    spec = get_gpt_layer_local_spec()
    mtp = get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False) if config.mtp_num_layers else None
    model = GPTModel(
        config,
        spec,
        VOCAB,
        SEQUENCE,
        parallel_output=parallel_output,
        share_embeddings_and_output_weights=tied,
        mtp_block_spec=mtp,
        position_embedding_type="rope",
    )
    with torch.no_grad():
        (model.shared_embedding_or_output_weight() if tied else model.output_layer.weight).mul_(
            40.0
        )  # far from uniform probabilities, so that gates differ
    return model


def hybrid(**settings):
    """A tiny HybridModel of attention and MLP layers. Mamba layers need CUDA kernels."""
    from hybrid_stack import stack
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    return HybridModel(
        transformer_config(num_layers=4, **settings),
        stack,
        VOCAB,
        SEQUENCE,
        hybrid_layer_pattern="*-*-",
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCAB, (BATCH, SEQUENCE), generator=generator)
    labels = torch.randint(VOCAB, (BATCH, SEQUENCE), generator=generator)
    loss_mask = (torch.rand(BATCH, SEQUENCE, generator=generator) < 0.6).float()
    return tokens, labels, loss_mask


def forward(model, tokens, labels, loss_mask):
    positions = torch.arange(SEQUENCE).expand(BATCH, -1)
    causal = torch.ones(1, 1, SEQUENCE, SEQUENCE).triu(1).bool()
    return model(tokens, positions, causal, labels=labels, loss_mask=loss_mask)


def loss_func(loss_mask, output):
    """The usual loss_func of a Megatron script: sum, token count, report."""
    loss = (output.view(-1).float() * loss_mask.view(-1)).sum()
    tokens = loss_mask.sum().int()
    return loss, tokens, {"lm loss": torch.stack([loss.detach(), tokens.float()])}


def micro_batch_with_metrics(device, mtp):
    """A function that runs a micro-batch of a scheduled objective, forward and backward, and returns its report.

    With full metrics and channels, and without compaction.
    """
    from megatron_dft import DFTConfig, install
    from megatron_dft.hosts.binding import with_metrics
    from megatron_dft.labels import with_channels

    settings = {"compact_masked_tokens": False, "metrics": "full", "channels": "a,b", "mtp": "same"}
    config = DFTConfig("dft:start=1,ramp=4", **settings)
    model = gpt(mtp_num_layers=mtp).to(device)
    install([model], config).begin(2)
    tokens, labels, loss_mask = (x.to(device) for x in batch())
    labels = with_channels(labels, 1)
    positions = torch.arange(SEQUENCE, device=device).expand(BATCH, -1)
    causal = torch.ones(1, 1, SEQUENCE, SEQUENCE, device=device).triu(1).bool()

    def forward_step(data_iterator, model):
        return model(tokens, positions, causal, labels=labels, loss_mask=loss_mask), partial(loss_func, loss_mask)

    step = with_metrics(forward_step, config, micro_batches=lambda: 1)

    def micro_batch():
        output, func = step(None, model)
        loss, _, report = func(output)
        loss.backward()
        return report

    return micro_batch


def dft_line(ce):
    """DFT as one line on top of Megatron's per-token loss."""
    return ce * torch.exp(-ce).detach()


def gradients(model, transform=lambda loss: loss, **replaced):
    tokens, labels, loss_mask = batch()
    labels, loss_mask = replaced.get("labels", labels), replaced.get("loss_mask", loss_mask)
    loss_mask = loss_mask * torch.linspace(0.5, 1.5, BATCH * SEQUENCE).view(BATCH, SEQUENCE)
    output = forward(model, tokens, labels, loss_mask)
    (transform(output) * loss_mask).sum().backward()
    return output.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(ours, theirs, tolerance):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def message(action):
    """The error message of an action, or "no error"."""
    try:
        action()
    except ValueError as error:
        return str(error)
    return "no error"
