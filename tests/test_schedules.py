"""Pipeline schedules of Megatron-Core with two stages and no training loop, also in its oldest supported version."""

from functools import partial

import pytest
import torch
from ranks import run_ranks
from tiny_models import (
    BATCH,
    SEQUENCE,
    VOCAB,
    batch,
    dft_line,
    loss_func,
    same,
    transformer_config,
)

from megatron_dft import DFTConfig, install
from megatron_dft.hosts.binding import with_metrics

pytest.importorskip("megatron.core")

STAGES, MICRO_BATCHES = 2, 4


def chunks(virtual):
    """This rank's `virtual` chunks of a model of four layers."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    config = transformer_config(
        num_layers=4,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=STAGES,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        pipeline_dtype=torch.float32,
        calculate_per_token_loss=True,
    )
    torch.manual_seed(1)
    rank = parallel_state.get_pipeline_model_parallel_rank()
    return [
        GPTModel(
            config,
            get_gpt_layer_local_spec(),
            VOCAB,
            SEQUENCE,
            pre_process=(rank, piece) == (0, 0),
            post_process=(rank, piece) == (STAGES - 1, virtual - 1),
            share_embeddings_and_output_weights=False,
            position_embedding_type="rope",
            vp_stage=piece if virtual > 1 else None,
        )
        for piece in range(virtual)
    ]


def forward_step(data_iterator, model, transform=lambda loss: loss):
    tokens, labels, loss_mask = next(data_iterator)
    causal = torch.ones(1, 1, SEQUENCE, SEQUENCE).triu(1).bool()
    output = model(tokens, torch.arange(SEQUENCE).expand(BATCH, -1), causal, labels=labels, loss_mask=loss_mask)
    return output, partial(transformed_loss_func, loss_mask, transform=transform)


def transformed_loss_func(loss_mask, output, transform):
    return loss_func(loss_mask, transform(output))


def run(virtual, config=None, transform=lambda loss: loss):
    """Reports and gradients of one iteration."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    model = chunks(virtual)
    step = partial(forward_step, transform=transform)
    if config:
        install(model, config)
        step = with_metrics(step, config)
    batches = [batch(seed) for seed in range(MICRO_BATCHES)]
    batches[1][2].zero_()  # no valid token
    reports = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter(batches) for _ in model] if virtual > 1 else iter(batches),
        model=model if virtual > 1 else model[0],
        num_microbatches=MICRO_BATCHES,
        seq_length=SEQUENCE,
        micro_batch_size=BATCH,
        forward_only=False,
    )
    return reports, [p.grad.clone() for chunk in model for p in chunk.parameters() if p.grad is not None]


def on_ranks(virtual):
    from megatron_dft.testing import cpu

    cpu.enable()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(
        pipeline_model_parallel_size=STAGES, virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None
    )
    model_parallel_cuda_manual_seed(1)
    return {
        "stock": run(virtual),
        "stock with the line": run(virtual, transform=dft_line),
        "nll": run(virtual, DFTConfig(loss_type="nll")),
        "dft": run(virtual, DFTConfig(loss_type="dft")),
    }


@pytest.fixture(scope="module", params=[1, 2], ids=["1F1B", "interleaved"])
def stages(request):
    return run_ranks(STAGES, on_ranks, request.param, timeout=150)


def test_nll_and_dft_gradients_match_megatron_in_pipeline_schedule(stages):
    for stage in stages:
        same(stage["nll"][1], stage["stock"][1], 2e-5)
        same(stage["dft"][1], stage["stock with the line"][1], 2e-5)
        assert any(g.any() for g in stage["dft"][1])


def test_report_counts_tokens_of_its_own_micro_batch(stages):
    assert stages[0]["dft"][0] == []
    reports, stock, line = (stages[-1][name][0] for name in ("dft", "stock", "stock with the line"))
    for report, nll, dft, seed in zip(reports, stock, line, range(MICRO_BATCHES), strict=True):
        same(report["lm loss"], nll["lm loss"], 1e-5)
        same(report["dft/loss"], dft["lm loss"], 1e-5)
        assert report["dft/prob"][1] == (0.0 if seed == 1 else batch(seed)[2].sum())
