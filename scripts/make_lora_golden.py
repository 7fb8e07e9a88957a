#!/usr/bin/env python3
"""Makes the golden files of tests/algorithms/lora_test.cpp and adapters_*_test.cpp with transformers and PEFT.

    pip install torch==2.11.0 transformers==4.57.6 peft==0.21.0 safetensors
    PYTHONHASHSEED=0 scripts/make_lora_golden.py     # writes tests/algorithms/golden/; PEFT writes sets in hash order

lora_golden.safetensors   a tiny Llama, tokens, and per adapter the logits, the summed loss and the gradients of A and B
lora_plain/, lora_rs/     the adapters as PEFT writes them
peft_golden.safetensors   the same of other types of adapters on the same model, with the dense changes of the weights
dora/, ia3/, vera/        those adapters
bert_seq_cls/             a LoRA of the classifier in tests/models/golden/bert_classifier.safetensors with its classifier, as
                          PEFT saves both, and the logits of the tokens there
lora_matching.json        which modules PEFT selects for various configurations, with rank and scaling
"""
import json
import shutil
from pathlib import Path

import torch
from peft import IA3Config, LoraConfig, VeraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "algorithms" / "golden"
BASE = LlamaConfig(vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
                   num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False)

ADAPTERS = {
    "lora_plain": LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj", "mlp.up_proj"],
                             rank_pattern={"layers.1.self_attn.v_proj": 2, "down_proj": 5},
                             alpha_pattern={".*.up_proj": 3}, exclude_modules=["layers.0.mlp.up_proj"]),
    "lora_rs": LoraConfig(r=3, lora_alpha=4, use_rslora=True, init_lora_weights="gaussian",
                          target_modules=r".*\.1\..*_proj"),
}
OTHERS = {
    "dora": LoraConfig(r=3, lora_alpha=6, use_dora=True, target_modules=["q_proj", "v_proj", "down_proj"]),
    "ia3": IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "vera": VeraConfig(r=20, projection_prng_key=5, d_initial=0.2, target_modules=["q_proj", "v_proj", "down_proj"]),
}
MATCHING = [
    {"target_modules": ["q_proj", "v_proj"]},
    {"target_modules": ["self_attn.k_proj", "model.layers.1.mlp.gate_proj"]},
    {"target_modules": ["q_proj", "model.layers.0.self_attn.o_proj"], "layers_to_transform": [1]},
    {"target_modules": ["o_proj"], "layers_to_transform": 0},
    {"target_modules": "all-linear"},
    {"target_modules": ["up_proj", "down_proj"], "exclude_modules": ["layers.0.mlp.up_proj"]},
    {"target_modules": r"model\.layers\.[01]\.self_attn\.(q|k)_proj"},
    {"target_modules": r".*proj"},
    {"target_modules": ["lm_head", "q_proj"]},
    {"target_modules": ["q_proj", "k_proj"], "r": 6, "lora_alpha": 9, "rank_pattern": {"0.self_attn.q_proj": 2, "q_proj": 3},
     "alpha_pattern": {"k_proj": 5, "layers.1.self_attn.k_proj": 7}},
    {"target_modules": ["q_proj", "up_proj"], "r": 4, "lora_alpha": 8, "use_rslora": True, "rank_pattern": {"^model.layers.1.*": 9}},
]


def randomise(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                around = 1 if "magnitude" in name or "ia3" in name else 0
                parameter.copy_(around + torch.randn(parameter.shape, generator=generator) * 0.3)


def run(name, config, base_state, tokens):
    model = LlamaForCausalLM(BASE)
    model.load_state_dict(base_state)
    model = get_peft_model(model, config)
    randomise(model, 7)
    logits = model(tokens[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
    loss.backward()
    directory = GOLDEN / name
    shutil.rmtree(directory, ignore_errors=True)
    model.save_pretrained(directory)
    (directory / "README.md").unlink()
    tensors = {f"{name}/logits": logits.detach(), f"{name}/loss": loss.detach()}
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = key.removeprefix("base_model.model.").replace(".default", "").replace("vector.weight", "vector")
            tensors[f"{name}/grad/{key}"] = parameter.grad
    return tensors, model


def changes(name, model, base_state):
    merged = model.merge_and_unload().state_dict()
    return {f"{name}/delta/{key}": merged[key] - tensor for key, tensor in base_state.items()
            if not torch.equal(merged[key], tensor)}


def selected(fields, base_state):
    model = LlamaForCausalLM(BASE)
    model.load_state_dict(base_state)
    model = get_peft_model(model, LoraConfig(**fields))
    return {name.removeprefix("base_model.model."): {"rank": module.r["default"], "scale": module.scaling["default"]}
            for name, module in model.named_modules() if hasattr(module, "lora_A") and hasattr(module, "scaling")}


def classifier():
    """The paths of a regular expression are those of the model with its classifier: "bert." stands before them."""
    path = GOLDEN.parent.parent / "models" / "golden" / "bert_classifier.safetensors"
    with safe_open(path, "pt") as file:
        model = BertForSequenceClassification(BertConfig.from_dict(json.loads(file.metadata()["config"]))).eval()
    golden = load_file(path)
    model.load_state_dict({name.removeprefix("weight/"): tensor for name, tensor in golden.items() if name.startswith("weight/")})
    config = LoraConfig(r=3, lora_alpha=6, task_type="SEQ_CLS", target_modules=r"bert\.encoder\.layer\.\d\.attention\.self\.(query|value)",
                        rank_pattern={"bert.encoder.layer.1.attention.self.query": 2})
    model = get_peft_model(model, config)
    randomise(model, 9)
    directory = GOLDEN / "bert_seq_cls"
    shutil.rmtree(directory, ignore_errors=True)
    model.save_pretrained(directory)
    (directory / "README.md").unlink()
    with torch.no_grad():
        logits = model(input_ids=golden["tokens"], attention_mask=golden["mask"].long()).logits
    save_file({"logits": logits}, directory / "logits.safetensors")


def main():
    torch.manual_seed(0)
    GOLDEN.mkdir(parents=True, exist_ok=True)
    base = LlamaForCausalLM(BASE)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    tokens = torch.randint(0, BASE.vocab_size, (2, 13))
    tensors = {f"base/{name}": tensor for name, tensor in state.items()} | {"tokens": tokens}
    for name, config in ADAPTERS.items():
        tensors |= run(name, config, state, tokens)[0]
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, GOLDEN / "lora_golden.safetensors",
              metadata={"config": base.config.to_json_string()})
    tensors = {}
    for name, config in OTHERS.items():
        of_pass, model = run(name, config, state, tokens)
        tensors |= of_pass | changes(name, model, state)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, GOLDEN / "peft_golden.safetensors")
    cases = [{"config": fields, "modules": selected(fields, state)} for fields in MATCHING]
    (GOLDEN / "lora_matching.json").write_text(json.dumps(cases, indent=1, sort_keys=True) + "\n")
    classifier()


if __name__ == "__main__":
    main()
