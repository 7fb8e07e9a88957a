#!/usr/bin/env python3
"""Makes tests/algorithms/golden/merge_golden.safetensors for tests/algorithms/mergers_test.cpp with PEFT.

    pip install torch==2.11.0 transformers==4.57.6 peft==0.21.0 safetensors
    scripts/make_merge_golden.py

Two sets of three LoRAs on a tiny Llama, and what PEFT's add_weighted_adapter makes of them by every combination_type whose
result does not depend on random masks:

<set>/<adapter>/<module>.lora_{A,B}      the adapters; set "same": rank 4, "mixed": ranks 2, 4 and 8
<set>/<case>/<module>.lora_{A,B}         the merged one, of scale 1
metadata                                 scales, weights and arguments, as JSON
"""
import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "algorithms" / "golden" / "merge_golden.safetensors"
BASE = LlamaConfig(vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
                   num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False)
NAMES = ["one", "two", "three"]
SETS = {"same": [4, 4, 4], "mixed": [2, 4, 8]}
WEIGHTS = [0.7, -0.4, 1.1]
ON_CHANGES = {
    "cat": {}, "svd": {"svd_rank": 5}, "svd_default": {},
    "magnitude_prune_svd": {"density": 0.4, "svd_rank": 6},
    "ties_svd": {"density": 0.4, "svd_rank": 6},
    "ties_svd_frequency": {"density": 0.6, "svd_rank": 6, "majority_sign_method": "frequency"},
    # Nothing is dropped at random: what remains is the sum, and the election.
    "dare_linear_svd": {"density": 1.0, "svd_rank": 6}, "dare_ties_svd": {"density": 1.0, "svd_rank": 6},
}
ON_FACTORS = {
    "linear": {}, "magnitude_prune": {"density": 0.3}, "ties": {"density": 0.45},
    "ties_frequency": {"density": 0.45, "majority_sign_method": "frequency"},
    "dare_linear": {"density": 1.0}, "dare_ties": {"density": 1.0},
}


def factors(model, adapter):
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and adapter in module.lora_A:
            path = name.removeprefix("base_model.model.")
            found[f"{path}.lora_A"] = module.lora_A[adapter].weight.detach().clone().contiguous()
            found[f"{path}.lora_B"] = module.lora_B[adapter].weight.detach().clone().contiguous()
    return found


def randomise(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def main():
    torch.manual_seed(0)
    tensors, described = {}, {"weights": WEIGHTS, "sets": {}, "cases": {}}
    for set_name, ranks in SETS.items():
        # One adapter leaves down_proj alone: the others are merged there.
        configs = [LoraConfig(r=rank, lora_alpha=alpha, target_modules=["q_proj"] if i == 1 else ["q_proj", "down_proj"])
                   for i, (rank, alpha) in enumerate(zip(ranks, [6, 4, 3]))]
        model = get_peft_model(LlamaForCausalLM(BASE), configs[0], adapter_name=NAMES[0])
        for name, config in zip(NAMES[1:], configs[1:]):
            model.add_adapter(name, config)
        randomise(model, 11)
        described["sets"][set_name] = {name: config.lora_alpha / config.r for name, config in zip(NAMES, configs)}
        for name in NAMES:
            tensors |= {f"{set_name}/{name}/{key}": value for key, value in factors(model, name).items()}
        for case, options in (ON_CHANGES | ON_FACTORS if set_name == "same" else ON_CHANGES).items():
            kind = case.removesuffix("_frequency").removesuffix("_default")
            model.add_weighted_adapter(NAMES, WEIGHTS, case, combination_type=kind, **options)
            described["cases"][case] = {"type": kind} | options
            tensors |= {f"{set_name}/{case}/{key}": value for key, value in factors(model, case).items()}
    save_file(tensors, GOLDEN, metadata={"described": json.dumps(described, sort_keys=True)})


if __name__ == "__main__":
    main()
