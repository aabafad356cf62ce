"""Convert the weights of Llama-type models between Hugging Face and Megatron's distributed checkpoint, on a CPU.

    python examples/llama_weights.py arguments HF_FOLDER                    Megatron's arguments of the model
    python examples/llama_weights.py import HF_FOLDER CHECKPOINT            for --load CHECKPOINT --finetune
    python examples/llama_weights.py export CHECKPOINT HF_FOLDER OUT        HF_FOLDER: configuration and tokenizer

A checkpoint loads in any tensor- and pipeline-parallel layout, with Transformer Engine or without. Requires the
megatron-core wheel (>= 0.19), and memory for the model in fp32. For other models and for large ones use the converters
of Megatron-Bridge: docs/weights.md.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

EMBEDDING = "embedding.word_embeddings.weight"
OUTER = {  # Megatron -> Hugging Face
    EMBEDDING: "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
IN_LAYER = {  # Megatron -> Hugging Face; several are concatenated
    "self_attention.linear_qkv.weight": (
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
    ),
    "self_attention.linear_proj.weight": ("self_attn.o_proj.weight",),
    "mlp.linear_fc1.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.linear_fc2.weight": ("mlp.down_proj.weight",),
    "input_layernorm.weight": ("input_layernorm.weight",),
    "pre_mlp_layernorm.weight": ("post_attention_layernorm.weight",),
}
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "*.jinja", "*.model", "vocab.*", "merges.txt")


def megatron_arguments(config: Any) -> list[str]:
    """Megatron's arguments of a Llama-type model.

    Raises:
        ValueError: for a setting that the conversion does not cover.
    """
    rope = getattr(config, "rope_parameters", None) or {"rope_type": "default", "rope_theta": config.rope_theta}
    read = {**config.to_dict(), **rope}
    expected = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    for name, wanted in {**expected, "rope_type": "default"}.items():
        if (value := read.get(name)) != wanted:
            raise ValueError(f"config.json: expected {name} {wanted!r}, got {value!r}; use Megatron-Bridge's converter")
    settings = {
        "--num-layers": config.num_hidden_layers,
        "--hidden-size": config.hidden_size,
        "--ffn-hidden-size": config.intermediate_size,
        "--num-attention-heads": config.num_attention_heads,
        "--num-query-groups": config.num_key_value_heads,
        "--kv-channels": config.head_dim,
        "--max-position-embeddings": config.max_position_embeddings,
        "--position-embedding-type": "rope",
        "--rotary-base": int(rope["rope_theta"]),
        "--normalization": "RMSNorm",
        "--norm-epsilon": config.rms_norm_eps,
        "--attention-dropout": 0.0,
        "--hidden-dropout": 0.0,
    }
    flags = ["--group-query-attention", "--swiglu", "--disable-bias-linear"]
    flags += [] if config.tie_word_embeddings else ["--untie-embeddings-and-output-weights"]
    return [str(part) for pair in settings.items() for part in pair] + flags


def to_megatron(weights: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    """Weights of an unsharded GPTModel with local layers, from those of Hugging Face."""
    found = {ours: weights[theirs] for ours, theirs in OUTER.items() if theirs in weights}
    if config.tie_word_embeddings:
        found.pop("output_layer.weight", None)
    for i in range(config.num_hidden_layers):
        for ours, theirs in IN_LAYER.items():
            parts = [weights[f"model.layers.{i}.{name}"] for name in theirs]
            joined = by_group(parts, config) if len(parts) == 3 else torch.cat(parts)
            found[f"decoder.layers.{i}.{ours}"] = joined
    return found


def to_hugging_face(weights: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    """The inverse of `to_megatron`; removes padding rows of the vocabulary."""
    found = {theirs: weights[ours] for ours, theirs in OUTER.items() if ours in weights}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in found:
            found[name] = found[name][: config.vocab_size]
    for i in range(config.num_hidden_layers):
        for ours, theirs in IN_LAYER.items():
            whole = weights[f"decoder.layers.{i}.{ours}"]
            parts = from_groups(whole, config) if len(theirs) == 3 else whole.chunk(len(theirs))
            found |= {f"model.layers.{i}.{name}": part for name, part in zip(theirs, parts, strict=True)}
    return {name: weight.contiguous() for name, weight in found.items()}


def by_group(parts: list[Tensor], config: Any) -> Tensor:
    """Query, key and value [rows, h] in Megatron's order: for each query group its queries, its key, its value."""
    groups = config.num_key_value_heads
    return torch.cat([part.view(groups, -1, part.shape[-1]) for part in parts], 1).flatten(0, 1)


def from_groups(whole: Tensor, config: Any) -> list[Tensor]:
    """The inverse of `by_group`."""
    queries = config.num_attention_heads // config.num_key_value_heads * config.head_dim
    rows = whole.view(config.num_key_value_heads, queries + 2 * config.head_dim, whole.shape[-1])
    return [part.flatten(0, 1) for part in rows.split([queries, config.head_dim, config.head_dim], 1)]


def build(config: Any, arguments: list[str]) -> Any:
    """An unsharded GPTModel on this CPU rank, built by Megatron from its arguments."""
    from megatron_dft.launch import set_single_rank
    from megatron_dft.testing import cpu

    set_single_rank()
    needed = "--micro-batch-size 1 --seq-length 8 --train-iters 1 --lr 0 --tokenizer-type NullTokenizer"
    vocabulary = ["--vocab-size", str(config.vocab_size)]
    sys.argv = ["", *cpu.complete_arguments([*megatron_arguments(config), *needed.split(), *vocabulary, *arguments])]
    cpu.enable()
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.arguments import parse_and_validate_args
    from megatron.training.initialize import initialize_megatron

    args = parse_and_validate_args()
    initialize_megatron()
    settings = gpt_config_from_args(args)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return settings.get_builder_cls()(settings).build_distributed_models(pg_collection=groups, wrap_with_ddp=False)


def import_weights(source: Path, checkpoint: Path) -> None:
    """Write the Megatron checkpoint of a Hugging Face folder."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, local_files_only=True)
    model = build(theirs.config, ["--save", str(checkpoint), "--save-interval", "1"])
    own = dict(model[0].named_parameters())
    converted = to_megatron(theirs.state_dict(), theirs.config)
    assert own.keys() == converted.keys(), own.keys() ^ converted.keys()
    with torch.no_grad():
        for name, weight in converted.items():
            own[name].zero_()[: len(weight)].copy_(weight)  # rows beyond: padding of the vocabulary
    from megatron.training.checkpointing import save_checkpoint

    save_checkpoint(0, model, None, None, 0, release=True)


def export_weights(checkpoint: Path, source: Path, out: Path) -> None:
    """Write a Hugging Face folder with the weights of a Megatron checkpoint, in bf16."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(source, local_files_only=True)
    model = build(config, ["--load", str(checkpoint), "--no-load-optim", "--no-load-rng", "--finetune"])
    from megatron.training.checkpointing import load_checkpoint

    load_checkpoint(model, None, None)
    theirs = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    weights = to_hugging_face(dict(model[0].named_parameters()), config)
    result = theirs.load_state_dict(weights, strict=False)
    assert not result.unexpected_keys and set(result.missing_keys) <= {"lm_head.weight"}, result
    theirs.save_pretrained(out)
    for pattern in TOKENIZER_FILES:
        for file in source.glob(pattern):
            shutil.copy(file, out)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, paths in {
        "arguments": ("HF_FOLDER",),
        "import": ("HF_FOLDER", "CHECKPOINT"),
        "export": ("CHECKPOINT", "HF_FOLDER", "OUT"),
    }.items():
        command = commands.add_parser(name)
        for path in paths:
            command.add_argument(path, type=Path)
    args = parser.parse_args(arguments)
    if not (args.HF_FOLDER / "config.json").is_file():
        sys.exit(f"{args.HF_FOLDER}: expected a Hugging Face folder with config.json; check the path")
    try:
        if args.command == "arguments":
            from transformers import AutoConfig

            print(*megatron_arguments(AutoConfig.from_pretrained(args.HF_FOLDER, local_files_only=True)))
        elif args.command == "import":
            import_weights(args.HF_FOLDER, args.CHECKPOINT)
        else:
            export_weights(args.CHECKPOINT, args.HF_FOLDER, args.OUT)
    except ValueError as error:
        sys.exit(f"{args.HF_FOLDER}: {error}")


if __name__ == "__main__":
    main()
