#!/usr/bin/env python3
"""A Llama in a GGUF file as a Hugging Face directory: convert_gguf.py FILE.gguf DIRECTORY

Writes config.json, model.safetensors (float32: quantised weights are widened, which loses nothing more), tokenizer.json and
tokenizer_config.json. Needs numpy, safetensors, tokenizers and gguf. Exit codes: 2 the file is no Llama with a byte-level BPE tokeniser.
"""
import json
import pathlib
import re
import sys

import numpy as np
from gguf import GGUFReader, dequantize
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

NAMES = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
         "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm",
         "ffn_norm": "post_attention_layernorm"}
WHOLE = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight", "output.weight": "lm_head.weight"}
CONTROL = 3   # a token's type: one that stands for no text


def halves(weight, heads):
    """GGUF interleaves a rotary pair's rows, Hugging Face puts them into two halves of a head."""
    return weight.reshape(heads, weight.shape[0] // heads // 2, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def tensors_of(reader, facts):
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape([int(side) for side in tensor.shape[::-1]])
        name = WHOLE.get(tensor.name)
        if name is None:
            layer, part = re.match(r"blk\.(\d+)\.(\w+)\.weight", tensor.name).groups()
            name = f"model.layers.{layer}.{NAMES[part]}.weight"
            if part in ("attn_q", "attn_k"):
                weight = halves(weight, facts["llama.attention.head_count" + ("_kv" if part == "attn_k" else "")])
        yield name, np.ascontiguousarray(weight)


def config_of(facts, tied):
    width, heads = facts["llama.embedding_length"], facts["llama.attention.head_count"]
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": width, "intermediate_size": facts["llama.feed_forward_length"],
            "num_hidden_layers": facts["llama.block_count"], "num_attention_heads": heads,
            "num_key_value_heads": facts["llama.attention.head_count_kv"], "head_dim": width // heads, "vocab_size": facts["llama.vocab_size"],
            "max_position_embeddings": facts["llama.context_length"], "rope_theta": float(facts["llama.rope.freq_base"]),
            "rms_norm_eps": round(float(facts["llama.attention.layer_norm_rms_epsilon"]), 12), "hidden_act": "silu", "attention_bias": False,
            "mlp_bias": False, "tie_word_embeddings": tied, "bos_token_id": int(facts["tokenizer.ggml.bos_token_id"]),
            "eos_token_id": int(facts["tokenizer.ggml.eos_token_id"]), "torch_dtype": "float32"}


def tokenizer_of(facts):
    tokens, types = facts["tokenizer.ggml.tokens"], facts["tokenizer.ggml.token_type"]
    merges = [tuple(pair.split(" ")) for pair in facts["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token, kind in zip(tokens, types) if kind == CONTROL])
    return tokenizer


def main(source, out):
    reader = GGUFReader(source)
    facts = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    if facts.get("general.architecture") != "llama" or facts.get("tokenizer.ggml.model") != "gpt2":
        print(f"convert_gguf: {source} is no Llama with a byte-level BPE tokeniser", file=sys.stderr)
        return 2
    out = pathlib.Path(out)
    out.mkdir(parents=True)
    tensors = dict(tensors_of(reader, facts))
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    tokenizer_of(facts).save(str(out / "tokenizer.json"))
    tokens = facts["tokenizer.ggml.tokens"]
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": tokens[facts["tokenizer.ggml.bos_token_id"]],
                 "eos_token": tokens[facts["tokenizer.ggml.eos_token_id"]], "model_max_length": facts["llama.context_length"],
                 "chat_template": facts.get("tokenizer.chat_template")}
    (out / "tokenizer_config.json").write_text(json.dumps(described, indent=1))
    (out / "config.json").write_text(json.dumps(config_of(facts, "lm_head.weight" not in tensors), indent=1))
    print(f"{sum(tensor.size for tensor in tensors.values())} parameters, {len(tensors)} tensors")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
