#!/usr/bin/env python3
"""Files that other tools read, and files of theirs that we read: relative errors of logits, and what is byte for byte the same.

    .cache/peers/bin/python scripts/roundtrip.py --moraine build/moraine      # scripts/evidence roundtrip does this

Needs torch, transformers, peft, safetensors, h5py and tensorboard. Prints Markdown; ends with exit code 1 if a line is out of bounds.
"""
import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import peft
import tensorboard
import torch
import transformers
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event

SOURCE = Path(__file__).resolve().parent.parent
SIZES = dict(vocab_size=264, hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
             max_position_embeddings=128, pad_token_id=None, bos_token_id=None, eos_token_id=None)
RECIPE = """
name: roundtrip
method: flexmore
model:
  architecture: {vocab_size: 264, hidden_size: 64, intermediate_size: 176, num_layers: 2, num_heads: 4, max_position_embeddings: 128}
  train: {steps: 30, batch_size: 8}
public_path: public.h5
domains: [{name: left, path: left.h5, rank: 8}, {name: right, path: right.h5, rank: 16}]
seq_len: 64
train: {steps: 30, batch_size: 8, log_every: 5}
router: {embedding_sequences: 8}
evaluation: {sequences: 8, validation_sequences: 8, batch_size: 8}
workers: {local: 2}
"""
BOUND = 2e-5   # float32, two layers: sums of a few hundred terms in another order

failures = []


class World:
    def __init__(self, binary: Path, directory: Path):
        self.binary, self.directory = binary.resolve(), directory
        for name, alphabet in (("public", "etaoin shrdlu"), ("left", "abcdefg "), ("right", "uvwxyz.; ")):
            rng = random.Random(name)
            text = directory / f"{name}.jsonl"
            text.write_text("".join(json.dumps({"text": "".join(rng.choice(alphabet) for _ in range(500))}) + "\n" for _ in range(80)))
            subprocess.run([sys.executable, SOURCE / "scripts/prepare_text.py", "--name", name, "--out", directory / f"{name}.h5",
                            "--validation", "0.2", "--test", "0.2", text], check=True, capture_output=True)
        (directory / "recipe.yaml").write_text(RECIPE)
        self("run", "recipe.yaml", "--run-dir", "run")

    def __call__(self, *arguments) -> str:
        done = subprocess.run([self.binary, *map(str, arguments)], cwd=self.directory, capture_output=True, text=True,
                              env={**os.environ, "MORAINE_LOG": "error"})
        if done.returncode:
            raise SystemExit(f"moraine {arguments}: exit code {done.returncode}\n{done.stderr}")
        return done.stdout

    def logits(self, model, *options) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and what Moraine makes of them."""
        self("eval", model, "--data", "left.h5,right.h5", "--seq-len", 64, "--batch-size", 8, "--sequences", 8, "--logits", "logits.safetensors", *options)
        file = load_file(self.directory / "logits.safetensors")
        return file["tokens"][:, :-1], file["logits"]


def line(tool: str, direction: str, what: str, value: float | str, bound: float = BOUND) -> None:
    good = value == "equal" if isinstance(value, str) else value <= bound
    if not good:
        failures.append(f"{tool} {direction} {what}: {value}")
    print(f"| {tool} | {direction} | {what} | {value if isinstance(value, str) else f'{value:.1e}'} |", flush=True)


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()).item()


@torch.no_grad()
def theirs(model, tokens: torch.Tensor) -> torch.Tensor:
    return model.eval()(input_ids=tokens).logits


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def same_tensors(a: Path, b: Path) -> str:
    first, second = tensors_of(a), tensors_of(b)
    if first.keys() != second.keys():
        return "other keys"
    different = [n for n in first if first[n].dtype != second[n].dtype or not torch.equal(first[n], second[n])]
    return "equal" if not different else f"{len(different)} differ"


def ours_to_transformers(world: World) -> None:
    auto = transformers.AutoModelForCausalLM
    tokens, ours = world.logits("run/public_model")
    line("transformers", "reads ours", "public model (OLMo2)", relative(ours, theirs(auto.from_pretrained(world.directory / "run/public_model"), tokens)))
    for what, title in (("full_mixture", "full-size experts as FlexOlmo"), ("mixture", "ranks 8 and 16, made dense, as FlexOlmo")):
        world("export", "run", what, "--to", "flexolmo", "--what", what)
        model = auto.from_pretrained(world.directory / what)
        assert type(model).__name__ == "FlexOlmoForCausalLM", type(model)
        tokens, ours = world.logits(what)
        line("transformers", "reads ours", title, relative(ours, theirs(model, tokens)))
    tokens, factored = world.logits("run")
    line("Moraine", "reads ours", "the same mixture dense and factored (W + BA against W, A, B)", relative(world.logits("mixture")[1], factored))
    line("transformers", "reads ours", "factored mixture here against dense there", relative(factored, theirs(auto.from_pretrained(world.directory / "mixture"), tokens)))


def ours_to_peft(world: World) -> None:
    world("export", "run", "lora", "--to", "peft")
    base = world.directory / "run/public_model"
    for name in ("left", "right"):
        model = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), world.directory / "lora" / name)
        tokens, ours = world.logits("run/public_model", "--adapter", f"lora/{name}")
        line("PEFT", "reads ours", f"low-rank expert '{name}' as LoRA", relative(ours, theirs(model, tokens)))


def randomised(model, seed: int, part: str = ""):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if part in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.08 + (1.0 if name.endswith("norm.weight") else 0.0))
    return model.float()


def transformers_to_ours(world: World) -> None:
    cases = {"Llama": transformers.LlamaConfig(**SIZES), "OLMo2": transformers.Olmo2Config(**SIZES),
             "FlexOlmo": transformers.FlexOlmoConfig(**SIZES, num_experts=4, num_experts_per_tok=2)}
    for seed, (name, config) in enumerate(cases.items()):
        model = randomised(transformers.AutoModelForCausalLM.from_config(config), seed)
        model.save_pretrained(world.directory / name)
        tokens, ours = world.logits(name)
        line("transformers", "writes, we read", f"{name}, random weights", relative(ours, theirs(model, tokens)))
    pack(world.directory / "FlexOlmo", world.directory / "packed", config)
    tokens, ours = world.logits("packed")
    line("transformers", "writes, we read", "FlexOlmo in the packed layout of transformers 5", relative(ours, theirs(model, tokens)))
    for source in ("FlexOlmo", "packed"):
        world("import", source, f"imported_{source}")
        experts = "".join(f"  - artefact: imported_{source}/expert{e}.safetensors\n" for e in (1, 2, 3))
        (world.directory / "merge.yaml").write_text(f"base: imported_{source}/public_model\ntop_k: 2\nexperts:\n{experts}")
        world("merge", "merge.yaml", f"merged_{source}")
        world("export", f"merged_{source}", f"back_{source}", "--to", "flexolmo")
        line("transformers", "there and back", f"{source}: import, merge, export; every tensor", same_tensors(world.directory / "FlexOlmo", world.directory / f"back_{source}"))


def pack(source: Path, target: Path, config) -> None:
    """One tensor per expert -> gate_up_proj [E, 2h, d] (gate rows first), down_proj [E, d, h]."""
    tensors = tensors_of(source)
    for layer in range(config.num_hidden_layers):
        path = f"model.layers.{layer}.mlp.experts"
        take = lambda kind: [tensors.pop(f"{path}.{e}.{kind}_proj.weight") for e in range(config.num_experts)]
        gate, up, down = take("gate"), take("up"), take("down")
        tensors[f"{path}.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in zip(gate, up)])
        tensors[f"{path}.down_proj"] = torch.stack(down)
    target.mkdir()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text((source / "config.json").read_text())


def peft_to_ours(world: World) -> None:
    base = world.directory / "OLMo2"
    configs = {"LoRA": peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"], rank_pattern={"down_proj": 6}),
               "rsLoRA": peft.LoraConfig(r=8, lora_alpha=4, use_rslora=True, target_modules="all-linear")}
    for seed, (name, config) in enumerate(configs.items()):
        model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), config)
        randomised(model, 10 + seed, part="lora_").save_pretrained(world.directory / name)
        tokens, ours = world.logits("OLMo2", "--adapter", name)
        line("PEFT", "writes, we read", f"{name} on OLMo2", relative(ours, theirs(model, tokens)))
        world("import", name, f"{name}.safetensors", "--base", "OLMo2")
        world("export", f"{name}.safetensors", f"{name}_back", "--to", "peft")
        line("PEFT", "there and back", f"{name}: import, export; every tensor", same_tensors(world.directory / name, world.directory / f"{name}_back"))
        read = lambda directory: json.loads((world.directory / directory / "adapter_config.json").read_text())
        line("PEFT", "there and back", f"{name}: adapter_config.json, every field", "equal" if read(name) == read(f"{name}_back") else "differs")


def tensorboard_reads(world: World) -> None:
    found = {}
    root = world.directory / "run/tensorboard"
    for file in root.rglob("*tfevents*"):
        for raw in RawEventFileLoader(str(file)).Load():
            event = Event.FromString(raw)
            for value in event.summary.value:
                found[(str(file.parent.relative_to(root)), value.tag, event.step)] = value.simple_value
    written = {}
    for text in (world.directory / "run/metrics.jsonl").read_text().splitlines():
        record = json.loads(text)
        written[(record["unit"], record["key"], record["step"])] = torch.tensor(record["value"], dtype=torch.float32).item()
    line("TensorBoard", "reads ours", f"{len(written)} scalars of a run, as float32", "equal" if found == written and written else "differ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moraine", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}, tensorboard {tensorboard.__version__}; float32.\n"
          "A figure is the largest difference of a logit divided by the largest logit, over 8 sequences of 64 tokens.\n")
    print("| tool | direction | what | relative error of logits, or bytes |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="moraine-roundtrip-") as temporary:
        world = World(arguments.moraine, Path(temporary))
        for part in (ours_to_transformers, ours_to_peft, transformers_to_ours, peft_to_ours, tensorboard_reads):
            part(world)
    if failures:
        raise SystemExit("out of bounds:\n" + "\n".join(failures))


if __name__ == "__main__":
    main()
