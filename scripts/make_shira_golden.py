#!/usr/bin/env python3
"""Makes the golden files of tests/algorithms/adapters_shira_test.cpp with transformers and PEFT.

    pip install torch==2.11.0 transformers==4.57.6 peft==0.21.0 safetensors
    PYTHONHASHSEED=0 scripts/make_shira_golden.py    # writes tests/algorithms/golden/shira*; after make_lora_golden.py

shira/                    an adapter of the tiny Llama in lora_golden.safetensors, as PEFT writes it
shira_golden.safetensors  its logits, summed loss and gradients on that file's tokens
"""
import shutil

import torch
from peft import ShiraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from make_lora_golden import BASE, GOLDEN


def main():
    stored = load_file(GOLDEN / "lora_golden.safetensors")
    model = LlamaForCausalLM(BASE)
    model.load_state_dict({name.removeprefix("base/"): tensor for name, tensor in stored.items() if name.startswith("base/")})
    model = get_peft_model(model, ShiraConfig(r=2, random_seed=3, target_modules=["q_proj", "down_proj"]))
    generator = torch.Generator().manual_seed(7)
    trained = {name: value for name, value in sorted(model.named_parameters()) if value.requires_grad}
    with torch.no_grad():
        for value in trained.values():
            value.copy_(torch.randn(value.shape, generator=generator) * 0.3)
    tokens = stored["tokens"]
    logits = model(tokens[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
    loss.backward()
    shutil.rmtree(GOLDEN / "shira", ignore_errors=True)
    model.save_pretrained(GOLDEN / "shira")
    (GOLDEN / "shira" / "README.md").unlink()
    tensors = {"logits": logits.detach().contiguous(), "loss": loss.detach()}
    for name, value in trained.items():
        tensors["grad/" + name.removeprefix("base_model.model.").replace(".default", "")] = value.grad
    save_file(tensors, GOLDEN / "shira_golden.safetensors")


if __name__ == "__main__":
    main()
