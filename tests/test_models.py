"""The loss on models other than a plain GPT matches Megatron's own loss, on two tensor-parallel ranks."""

import importlib.util
import itertools
from functools import partial

import pytest
import torch
from ranks import run_ranks
from tiny_models import (
    BATCH,
    SEQUENCE,
    VARIANTS,
    VOCAB,
    batch,
    dft_line,
    forward,
    gpt,
    hybrid,
    message,
    same,
    start,
    transformer_config,
)

from megatron_dft import DFTConfig, install

pytest.importorskip("megatron.core")

IMAGE_LENGTH, IMAGE_TOKEN = 5, -200


def llava():
    """A LLaVA model. Its image embeddings come from another pipeline stage."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.multimodal.llava_model import LLaVAModel

    vision = transformer_config()
    vision.vision_model_type = "clip"
    model = LLaVAModel(
        transformer_config(),
        get_gpt_layer_local_spec(),
        VOCAB,
        SEQUENCE + IMAGE_LENGTH,
        vision_transformer_config=vision,
        vision_transformer_layer_spec=None,
        drop_vision_class_token=False,
        vision_projection_config=transformer_config(),
        vision_projection_layer_spec=None,
        language_position_embedding_type="rope",
        img_h=28,
        img_w=28,
        add_encoder=False,
    )
    model.set_input_tensor([torch.linspace(-1, 1, IMAGE_LENGTH * BATCH * 16).view(IMAGE_LENGTH, BATCH, 16)])
    return model


def frozen():
    """A GPT in which only one layer is trained. The gradient passes through the frozen output layer."""
    model = gpt()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("linear_qkv" in name)
    return model


class LowRank(torch.nn.Module):
    """x -> x A B, added to the output of a frozen linear layer."""

    def __init__(self, linear):
        super().__init__()
        self.a = torch.nn.Parameter(torch.randn(linear.weight.shape[1], 2))
        self.b = torch.nn.Parameter(torch.randn(2, linear.weight.shape[0]))
        linear.register_forward_hook(lambda module, args, out: (out[0] + args[0] @ self.a @ self.b, out[1]))


def lora():
    """A GPT with a LoRA adapter. All base weights are frozen, including the output layer."""
    model = gpt().requires_grad_(False)
    model.adapter = LowRank(model.decoder.layers[0].self_attention.linear_qkv)
    return model


def forward_with_mask(model, tokens, labels, loss_mask):
    """Loss and upstream gradients, which the model receives as its loss mask."""
    loss_mask = weighted(loss_mask)
    return forward(model, tokens, labels, loss_mask), loss_mask


def weighted(loss_mask):
    return loss_mask * torch.linspace(0.0, 1.5, loss_mask.numel()).view(loss_mask.shape)


def forward_with_images(model, tokens, labels, loss_mask):
    """The same with an image as the first token of each text. LLaVA expands labels and mask."""
    tokens = torch.cat([torch.full((BATCH, 1), IMAGE_TOKEN), tokens[:, 1:]], dim=1)
    images = torch.zeros(BATCH, 3, 28, 28)
    loss, mask = model(images, tokens, torch.arange(SEQUENCE).expand(BATCH, -1), None, labels, loss_mask)
    return loss, weighted(mask)


MODELS = {
    "tied": partial(gpt, tied=True),
    "sequence parallel": partial(gpt, sequence_parallel=True),
    "tied, sequence parallel": partial(gpt, tied=True, sequence_parallel=True),
    "frozen": frozen,
    "lora": lora,
    "llava": llava,
}
if importlib.util.find_spec("megatron.core.models.hybrid") is not None:  # from 0.18 on
    if (
        importlib.util.find_spec("megatron.core.transformer.linear_cross_entropy") is None
    ):  # Megatron dev does not scale the logits
        MODELS["scaled logits"] = partial(gpt, use_mup=True, mup_output_mult=0.5)
    MODELS |= {
        "hybrid": hybrid,
        "hybrid, sequence parallel": partial(hybrid, sequence_parallel=True),
    }


def loss_and_gradients(name, objective, transform=lambda loss: loss, **variant):
    """Loss and gradients of one micro-batch. Objective None: Megatron's own loss. Gradient None: not trained."""
    forward_step = forward_with_images if name == "llava" else forward_with_mask
    torch.manual_seed(1)
    model = MODELS[name]()
    if name.startswith(("llava", "hybrid")):
        with torch.no_grad():
            getattr(model, "language_model", model).output_layer.weight.mul_(40.0)
    if objective:
        install([model], DFTConfig(loss_type=objective, **variant))
    loss, upstream = forward_step(model, *batch())
    (transform(loss) * upstream).sum().backward()
    loss = loss.detach() * (upstream != 0.0)  # Megatron's own loss is not 0 where the label is -100
    return loss, {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


CASES = [
    (name, variant)
    for name, variant in itertools.product(MODELS, VARIANTS)
    if name != "llava" or "token" not in variant  # the language model receives no loss mask
]


def on_ranks():
    start()
    facts = {}
    for name in MODELS:
        facts[name, "stock"] = loss_and_gradients(name, None)
        facts[name, "stock with the line"] = loss_and_gradients(name, None, dft_line)
    for (name, variant), objective in itertools.product(CASES, ("nll", "dft")):
        facts[name, objective, variant] = loss_and_gradients(name, objective, **VARIANTS[variant])
    facts["llava in chunks of tokens"] = message(lambda: loss_and_gradients("llava", "dft", **VARIANTS["token chunks"]))
    return facts


@pytest.fixture(scope="module")
def facts():
    return run_ranks(2, on_ranks, timeout=150)


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_nll_matches_megatron_loss_and_gradient(facts, name, variant):
    for rank in facts:
        same(rank[name, "nll", variant], rank[name, "stock"], 2e-5)


def test_llava_in_chunks_of_tokens_is_rejected(facts):
    assert "pass the loss mask to the model" in facts[0]["llava in chunks of tokens"]


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_dft_gradient_matches_megatron_loss_with_detached_weight(facts, name, variant):
    for rank in facts:
        loss, gradients = rank[name, "dft", variant]
        same(loss, rank[name, "stock"][0], 2e-5)
        same(gradients, rank[name, "stock with the line"][1], 2e-5)
        trained = {n for n, gradient in gradients.items() if gradient is not None and gradient.any()}
        assert trained and (name not in ("frozen", "lora") or not any("output_layer" in n for n in trained))
