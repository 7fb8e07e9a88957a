#!/usr/bin/env python3
"""Writes tests/models/golden/<case>.safetensors: small random models of each family with what transformers makes of them.

Needs torch, safetensors and transformers==4.57.6 (the version the decoders are held to):
    python scripts/make_golden.py tests/models/golden

A file holds `weight/<name>`, `gradient/<name>` of the mean loss with respect to each weight, `tokens` [B, T + 1], `logits` [B, T, V]
and `loss` []; its metadata holds the model's own config.json. Everything is float32, attention is the eager form.
"""
import json
import pathlib
import sys

import torch
import transformers
from safetensors.torch import save_file

SIZES = dict(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
             max_position_embeddings=32, pad_token_id=None, bos_token_id=None, eos_token_id=None, use_cache=False,
             attn_implementation="eager")
MIXTURE = dict(num_key_value_heads=4, num_experts=4, num_experts_per_tok=2)
CASES = {
    "llama_gqa_biases": ("Llama", dict(num_key_value_heads=2, head_dim=6, attention_bias=True, mlp_bias=True)),
    "llama_tied": ("Llama", dict(num_key_value_heads=4, tie_word_embeddings=True, rope_theta=500.0)),
    "olmo2": ("Olmo2", dict(num_key_value_heads=4)),
    "olmo2_gqa": ("Olmo2", dict(num_key_value_heads=2, rms_norm_eps=1e-6, rope_theta=500000.0)),
    "flexolmo": ("FlexOlmo", dict(**MIXTURE, norm_topk_prob=False)),
    "flexolmo_renormalised": ("FlexOlmo", dict(**MIXTURE, norm_topk_prob=True)),
    # Wave lengths 6.3, 36 and 208 with an original context of 16: kept, blended, divided.
    "llama3_rope": ("Llama", dict(num_key_value_heads=4, head_dim=6, rope_theta=190.0, rope_scaling=dict(
        rope_type="llama3", factor=8.0, low_freq_factor=0.25, high_freq_factor=2.0, original_max_position_embeddings=16))),
    "llama_linear_rope": ("Llama", dict(num_key_value_heads=4, rope_scaling=dict(rope_type="linear", factor=2.5))),
    "mistral": ("Mistral", dict(num_key_value_heads=2, head_dim=6)),
    "mistral_window": ("Mistral", dict(num_key_value_heads=4, sliding_window=3)),
    "qwen2": ("Qwen2", dict(num_key_value_heads=2, tie_word_embeddings=True)),
    "qwen2_window": ("Qwen2", dict(num_key_value_heads=4, use_sliding_window=True, sliding_window=4, max_window_layers=1)),
}


def randomise(model, seed):
    """Larger than an initialisation, so that every branch matters and logits are far from zero; norms differ from one."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        deviation = 0.2 if name.endswith("norm.weight") else 0.35
        weight.data = torch.randn(weight.shape, generator=generator) * deviation + (1.0 if name.endswith("norm.weight") else 0.0)


def make(case, family, options, seed, folder):
    config = getattr(transformers, family + "Config")(**SIZES, **options)
    model = getattr(transformers, family + "ForCausalLM")(config).float().train()
    randomise(model, seed)
    tokens = torch.randint(0, config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(seed + 1))
    logits = model(input_ids=tokens[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.reshape(-1, config.vocab_size), tokens[:, 1:].reshape(-1))
    loss.backward()
    out = {"tokens": tokens, "logits": logits.detach(), "loss": loss.detach()}
    for name, weight in model.named_parameters():
        out["weight/" + name] = weight.detach()
        if weight.grad is not None:   # None: an expert no token selected
            out["gradient/" + name] = weight.grad
    out = {name: tensor.clone().contiguous() for name, tensor in out.items()}
    text = json.dumps(json.loads(config.to_json_string()), sort_keys=True)
    path = folder / f"{case}.safetensors"
    save_file(out, path, metadata={"config": text, "transformers": transformers.__version__})
    print(f"{path}: {path.stat().st_size} bytes, loss {loss.item():.4f}, logits up to {logits.abs().max().item():.2f}")
    if path.stat().st_size > 200_000:
        raise SystemExit(f"{path} exceeds 200 KB: make the case smaller")


if __name__ == "__main__":
    if len(sys.argv) != 2 or transformers.__version__ != "4.57.6":
        raise SystemExit(__doc__ + f"\nfound transformers {transformers.__version__}")
    target = pathlib.Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    for index, (case, (family, options)) in enumerate(CASES.items()):
        make(case, family, options, 100 + index, target)
