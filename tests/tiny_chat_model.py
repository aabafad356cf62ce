"""A Llama-type chat model with random weights, in the format of transformers."""

import torch
from chat_examples import tokenizer

VOCABULARY = 768  # a multiple of 128 x TP for TP 1, 2 and 3: no padding


def write_tiny_llama(folder, *, tied=True, vocabulary=VOCABULARY, groups=3, **settings):
    """Write model and tokenizer in bf16; returns the model as read in fp32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=48,
        intermediate_size=72,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=groups,
        head_dim=8,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        **settings,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
    model.bfloat16().save_pretrained(folder)
    fast = tokenizer(eos_token="<|im_end|>")
    fast.add_tokens([f"<extra_{i}>" for i in range(vocabulary - len(fast))])
    fast.save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)  # .float() would keep a rounded inv_freq
