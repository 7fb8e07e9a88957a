#!/usr/bin/env python3
"""Runs `method: finetune` as a user would: finetune_test.py BINARY CLAIM."""
import json
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy
from safetensors import safe_open
from safetensors.numpy import save_file

from run_test import BINARY, SOURCE, World, expect_in

RECIPE = f"""
name: tiny
method: finetune
model: {{path: {SOURCE}/recipes/models/tiny-public}}
tasks:
  - {{name: left, path: left.h5}}
  - {{name: right, path: right.h5}}
adapters:
  - {{name: small, adapter: {{type: lora, rank: 2, alpha: 4, dropout: 0.1}}}}
  - {{name: pissa, adapter: {{type: lora, rank: 2, alpha: 2, init: pissa}}}}
  - {{name: dora, adapter: {{type: dora, rank: 2, alpha: 4, target_modules: [q_proj, up_proj]}}}}
  - {{name: sb, learning_rate: 1e-3, adapter: {{type: lora_sb, rank: 4, options: {{examples: 6}}}}}}
  - {{name: galore, learning_rate: 1e-3, optimizer: adamw8bit, galore: {{rank: 8, update_proj_gap: 4, scale: 1}}}}
  - {{name: whole, learning_rate: 1e-3}}
seeds: [1, 2]
seq_len: 32
train: {{steps: 6, batch_size: 4, learning_rate: 1e-2, schedule: constant, checkpoint_every: 2}}
evaluation: {{sequences: 4, batch_size: 4}}
workers: {{local: 2}}
"""


class Finetuning(World):
    def __init__(self, directory: Path):
        super().__init__(directory)
        self.recipe.write_text(RECIPE)

    def table(self, run: str, title: str) -> list[dict]:
        tables = json.loads((self.directory / run / "summary.json").read_text())["tables"]
        return next(table for table in tables if table["title"].startswith(title))["rows"]

    def score(self, *arguments) -> float:
        line = [BINARY, "eval", *map(str, arguments), "--data", str(self.directory / "left.h5"), "--seq-len", "32", "--sequences", "4",
                "--batch-size", "4", "--format", "json"]
        done = subprocess.run(line, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)[0]["bits_per_byte"]


def workers_kills_and_seeds_decide_what_they_should(world: Finetuning) -> None:
    world.run("one", "workers.local=1")
    rows = world.table("one", "Bits per byte")
    assert [row["adapter"] for row in rows] == ["base", "small", "pissa", "dora", "sb", "galore", "whole"], rows
    for row in rows[1:]:
        assert row["task left"] < rows[0]["task left"] and row["mean"] < rows[0]["mean"], (row, rows[0])
        assert row["spread"] > 0, row   # two seeds differ
    memory = {row["training"]: row["optimizer"] for row in world.table("one", "What training cost")}
    trained = {row["adapter"]: row["trained"] for row in rows}
    # Two float32 moments a number, and a count of steps a tensor.
    assert 0 <= memory["whole"] * 2**20 / (8 * trained["whole"]) - 1 < 1e-3, memory
    assert memory["galore"] < memory["whole"] / 2, memory
    world.run("four", "workers.local=4")
    assert world.hash("four") == world.hash("one")
    world.run("recomputed", "gradient_checkpointing=true")
    assert world.hash("recomputed") == world.hash("one")
    shared = world.run("shared", "gradient_checkpointing=true", "adapters=[{name: it, adapter: {type: compacter}}]", expect=2)
    expect_in(shared.stderr, "trains a tensor that all slots share")
    for sign in (signal.SIGKILL, signal.SIGTERM):
        process = subprocess.Popen(world.command("killed"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for line in process.stderr:
            if "unit finished" in line and "train/" in line:
                process.send_signal(sign)
                break
        process.stderr.read()
        process.wait(timeout=120)
    world.run("killed")
    assert world.hash("killed") == world.hash("one")


def exports_are_what_was_scored(world: Finetuning) -> None:
    model = SOURCE / "recipes/models/tiny-public"
    world.run("run", "seeds=[1]")
    scores = {row["adapter"]: row["task left"] for row in world.table("run", "Bits per byte")}
    for name in ("small", "pissa", "dora", "sb", "galore", "whole"):
        merged = world.directory / f"{name}-merged"
        done = subprocess.run([BINARY, "export", world.directory / "run", merged, "--to", "hf", "--what", f"{name}/left/seed1"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        # Merged weights are rounded to the model's bfloat16 storage, 2^-9 of each.
        assert abs(world.score(merged) - scores[name]) < 2e-2 * scores[name], name
        if name in ("galore", "whole"):
            continue
        adapter = world.directory / f"{name}-peft"
        done = subprocess.run([BINARY, "export", world.directory / "run", adapter, "--to", "peft", "--what", f"{name}/left/seed1"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        # The same factors; a pair of twice the rank sums in another order.
        assert abs(world.score(model, "--adapter", adapter, "--dtype", "float32") - scores[name]) < 1e-5 * scores[name], name
        assert (adapter / "adapter_model.safetensors").read_bytes() == (world.directory / "run/adapters" / name / "left/seed1/adapter_model.safetensors").read_bytes()
    for arguments, parts in (((), ("the run has 12 results", "--what")), (("--what", "smal/left/seed1"), ("no result 'smal/left/seed1'", "small/left/seed1")),
                             (("--what", "whole/left/seed1"), ("whole/left/seed1 is no adapter", "--to hf"))):
        done = subprocess.run([BINARY, "export", world.directory / "run", world.directory / "new", "--to", "peft", *arguments], capture_output=True, text=True)
        assert done.returncode == 2, done
        expect_in(done.stderr, *parts)


def an_adapter_is_trained_further(world: Finetuning) -> None:
    world.run("first", "seeds=[1]", "adapters=[{name: small, adapter: {rank: 2, alpha: 4, rank_pattern: [{module: up_proj, rank: 3}]}}]")
    start = world.directory / "first/adapters/small/left/seed1"
    more = ("seeds=[1]", f"adapters=[{{name: more, start: {start}}}]")
    world.run("second", *more)
    first, second = (world.table(run, "Bits per byte")[1]["task left"] for run in ("first", "second"))
    assert second < first, (first, second)
    config = json.loads((world.directory / "second/adapters/more/left/seed1/adapter_config.json").read_text())
    assert config["r"] == 2 and config["rank_pattern"] == {"up_proj": 3}, config
    weights = start / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    expect_in(world.run("third", *more, expect=2).stderr, "adapter_model.safetensors", "SHA256SUMS")
    expect_in(world.run("third", "seeds=[1]", f"adapters=[{{name: more, start: {start}, adapter: {{rank: 2}}}}]", expect=2).stderr, "one of adapter, start and head_only")
    expect_in(world.run("third", "seeds=[1]", "adapters=[{name: more, start: nowhere}]", expect=2).stderr, "adapters.0.start", "nowhere")


def training_ends_when_validation_no_longer_improves(world: Finetuning) -> None:
    base = ("seeds=[1]", "train.steps=40", "train.learning_rate=0.1", "train.batch_size=2", f"tasks=[{{name: left, path: {world.directory}/left.h5}}]",
            "adapters=[{name: small, adapter: {rank: 4, alpha: 32}}, {name: whole, learning_rate: 0.02}]")
    stop = ("early_stopping={every: 4, patience: 2, sequences: 6}",)
    world.run("stopped", *base, *stop)
    rows = {row["result"]: row for row in world.table("stopped", "Where training ended")}
    curves = {series["name"]: series["points"] for curve in json.loads((world.directory / "stopped/summary.json").read_text())["curves"]
              if curve["title"] == "Validation score on left" for series in curve["series"]}
    assert any(row["steps"] < 40 for row in rows.values()), rows
    for name, points in curves.items():
        row = rows[f"{name}/left/seed1"]
        best = min(range(len(points)), key=lambda i: points[i][1])
        assert [step for step, _ in points] == list(range(4, 4 * len(points) + 1, 4)), points
        assert row["best_step"] == points[best][0] and row["score"] == points[best][1] and row["steps"] == points[-1][0], (row, points)
        assert row["steps"] == 40 or len(points) - 1 - best == 2, (row, points)   # patience
    # What is kept is what was best: scored alone on the same validation data it has the same score.
    world.run("again", *base, *stop, "evaluation.split=validation", "evaluation.sequences=6", "evaluation.batch_size=2")
    for row in world.table("again", "Bits per byte")[1:]:
        expected = rows[f"{row['adapter']}/left/seed1"]["score"]
        assert abs(row["task left"] - expected) < 1e-9 * expected, (row, expected)
    metrics = [json.loads(line) for line in (world.directory / "stopped/metrics.jsonl").read_text().splitlines()]
    assert {(r["step"], r["value"]) for r in metrics if r["key"] == "validation_score" and r["unit"] == "train/small/left/seed1"} == {tuple(p) for p in curves["small"]}
    # Killed in the middle, behind evaluations that a checkpoint holds and those that it does not.
    for step in (6, 9):
        world.run(f"killed{step}", *base, *stop, "workers.local=1", env={"MORAINE_FAULT": f"exit@train/small/left/seed1:{step}"}, expect=-signal.SIGKILL)
        world.run(f"killed{step}", *base, *stop, "workers.local=1")
        assert world.hash(f"killed{step}") == world.hash("stopped"), step
    group = (*base, *stop, "workers.local=2", "workers.group_size=2")
    world.run("group", *group)
    world.run("group_again", *group)
    assert world.hash("group") == world.hash("group_again")
    for curve in json.loads((world.directory / "group/summary.json").read_text())["curves"]:
        if curve["title"] == "Validation score on left":   # four steps from the start, before rounding is magnified
            for series in curve["series"]:
                assert abs(series["points"][0][1] / curves[series["name"]][0][1] - 1) < 1e-2, (series, curves)
    refused = world.run("refused", *base, "early_stopping={every: 50}", expect=2).stderr
    expect_in(refused, "early_stopping.every 50 is larger than train.steps 40")


def updates_in_backward_change_nothing(world: Finetuning) -> None:
    base = ("seeds=[1]", "train.clip_norm=0")
    world.run("behind", *base)
    world.run("within", *base, "update_in_backward=true")
    world.run("recomputed", *base, "update_in_backward=true", "gradient_checkpointing=true")
    assert world.hash("behind") == world.hash("within") == world.hash("recomputed")
    for overrides in (("seeds=[1]",), (*base, "train.micro_batch_size=2"), (*base, "workers.group_size=2")):
        expect_in(world.run("refused", *overrides, "update_in_backward=true", expect=2).stderr, "update_in_backward needs train.clip_norm: 0")


def save_model(directory: Path, config: dict, shapes: dict) -> None:
    """A model with random weights, norms at one."""
    rng = numpy.random.default_rng(1)
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    norm = lambda name: "norm" in name.lower()
    save_file({name: (numpy.ones(shape) if norm(name) and name.endswith("weight") else rng.normal(0, 0.2, shape)).astype(numpy.float32) for name, shape in shapes.items()},
              directory / "model.safetensors")


def blocks_of(names: dict, layers: int = 2) -> dict:
    return {f"encoder.layer.{layer}.{name}": shape for layer in range(layers) for name, shape in names.items()}


def linear(name: str, out: int, inputs: int) -> dict:
    return {f"{name}.weight": (out, inputs), f"{name}.bias": (out,)}


def tiny_bert(directory: Path) -> None:
    d, h = 16, 32
    block = {**linear("intermediate.dense", h, d), **linear("output.dense", d, h), **linear("attention.output.dense", d, d)}
    for part in ("query", "key", "value"):
        block |= linear(f"attention.self.{part}", d, d)
    for norm in ("attention.output.LayerNorm", "output.LayerNorm"):
        block |= {f"{norm}.weight": (d,), f"{norm}.bias": (d,)}
    embeddings = {"embeddings.word_embeddings.weight": (257, d), "embeddings.position_embeddings.weight": (64, d), "embeddings.token_type_embeddings.weight": (2, d),
                  "embeddings.LayerNorm.weight": (d,), "embeddings.LayerNorm.bias": (d,)}
    save_model(directory, {"model_type": "bert", "vocab_size": 257, "hidden_size": d, "intermediate_size": h, "num_hidden_layers": 2, "num_attention_heads": 2,
                           "max_position_embeddings": 64}, {**embeddings, **blocks_of(block), **linear("pooler.dense", d, d)})


def tiny_vit(directory: Path) -> None:
    d, h = 16, 32
    block = {**linear("intermediate.dense", h, d), **linear("output.dense", d, h), **linear("attention.output.dense", d, d)}
    for part in ("query", "key", "value"):
        block |= linear(f"attention.attention.{part}", d, d)
    for norm in ("layernorm_before", "layernorm_after"):
        block |= {f"{norm}.weight": (d,), f"{norm}.bias": (d,)}
    rest = {"embeddings.cls_token": (1, 1, d), "embeddings.position_embeddings": (1, 5, d), "embeddings.patch_embeddings.projection.weight": (d, 1, 4, 4),
            "embeddings.patch_embeddings.projection.bias": (d,), "layernorm.weight": (d,), "layernorm.bias": (d,)}
    save_model(directory, {"model_type": "vit", "hidden_size": d, "intermediate_size": h, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8,
                           "patch_size": 4, "num_channels": 1}, {**rest, **blocks_of(block)})


def prepare(script: str, *arguments) -> None:
    subprocess.run([sys.executable, SOURCE / f"scripts/{script}.py", *map(str, arguments)], check=True, capture_output=True)


def classes_are_learnt_by_a_head_and_exported_with_it(world: Finetuning) -> None:
    """Letters a to d against letters e to h, and images of a light left or right half: easy for whoever reads them at all."""
    tiny_bert(world.directory / "bert")
    tiny_vit(world.directory / "vit")
    rng = numpy.random.default_rng(3)
    texts = [{"text": "".join(rng.choice(list(letters), 12)), "label": letters} for letters in ("abcd", "efgh") for _ in range(150)]
    (world.directory / "texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    prepare("prepare_examples", "classification", "--name", "letters", "--out", world.directory / "texts.h5", world.directory / "texts.jsonl")
    rows = []
    for number in range(200):
        image = rng.integers(0, 80, (8, 8))
        image[:, :4] += 120 * (number % 2)
        rows.append(",".join(map(str, [number % 2, *image.flatten()])))
    (world.directory / "images.csv").write_text("\n".join(["label," + ",".join(f"p{i}" for i in range(64)), *rows]))
    prepare("prepare_images", "--name", "halves", "--out", world.directory / "images.h5", "--table", world.directory / "images.csv", "--shape", "1x8x8")
    entries = "adapters=[{name: head, head_only: true}, {name: lora, adapter: {rank: 2, alpha: 4}}, {name: whole, learning_rate: 1e-3}]"
    for model, data, prefix, module in (("bert", "texts", "bert.", "classifier"), ("vit", "images", "vit.", "classifier")):
        world.run(data, f"model.path={world.directory / model}", f"tasks=[{{name: task, path: {world.directory / data}.h5}}]", entries, "seeds=[1]", "train.steps=150",
                  "train.batch_size=16", "evaluation.sequences=0")
        scores = {row["adapter"]: row.get("task task") for row in world.table(data, "Accuracy")}
        assert scores["base"] is None and scores["lora"] > 90 and scores["whole"] > 90 and scores["head"] > 60, scores
        for name in ("head", "lora", "whole"):
            out = world.directory / f"{data}-{name}"
            done = subprocess.run([BINARY, "export", world.directory / data, out, "--to", "hf", "--what", f"{name}/task/seed1"], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            config = json.loads((out / "config.json").read_text())
            assert config["architectures"][0].endswith("Classification") and len(config["id2label"]) == 2, config
            with safe_open(out / "model.safetensors", "numpy") as file:
                names = set(file.keys())
            assert f"{module}.weight" in names and all(name.startswith((prefix, module)) for name in names), names
        peft = world.directory / data / "adapters/lora/task/seed1"
        config = json.loads((peft / "adapter_config.json").read_text())
        assert config["modules_to_save"] == [module] and config["task_type"] == ("SEQ_CLS" if model == "bert" else None), config
        with safe_open(peft / "adapter_model.safetensors", "numpy") as file:
            assert {f"base_model.model.{module}.weight", f"base_model.model.{module}.bias"} <= set(file.keys())
            assert all(name.startswith(f"base_model.model.{prefix}") for name in file.keys() if module not in name)
        # Trained further by a step that moves nothing to speak of, the adapter and its head score as before.
        more = (f"model.path={world.directory / model}", "seeds=[1]", "train.steps=1", "train.learning_rate=1e-12", "evaluation.sequences=0")
        world.run(f"{data}-more", *more, f"tasks=[{{name: task, path: {world.directory / data}.h5}}]", f"adapters=[{{name: more, start: {peft}}}]")
        assert world.table(f"{data}-more", "Accuracy")[1]["task task"] == scores["lora"]
    three = [{"text": "".join(rng.choice(list(letters), 12)), "label": letters} for letters in ("abcd", "efgh", "ijkl") for _ in range(50)]
    (world.directory / "three.jsonl").write_text("".join(json.dumps(text) + "\n" for text in three))
    prepare("prepare_examples", "classification", "--name", "three", "--out", world.directory / "three.h5", world.directory / "three.jsonl")
    start = world.directory / "texts/adapters/lora/task/seed1"
    refused = world.run("refused", f"model.path={world.directory / 'bert'}", f"tasks=[{{name: task, path: {world.directory}/three.h5}}]",
                        f"adapters=[{{name: more, start: {start}}}]", expect=2).stderr
    expect_in(refused, "has a head for 2 classes, task 'task' has 3")
    expect_in(world.run("refused", f"model.path={world.directory / 'vit'}", f"tasks=[{{name: task, path: {world.directory}/images.h5}}]",
                        "adapters=[{name: lora, adapter: {rank: 2}}]", "early_stopping={every: 1}", expect=2).stderr,
              "task 'task' has no validation data to score", "validation_share")


def completions_and_choices_are_learnt(world: Finetuning) -> None:
    """What follows a letter is its successor."""
    pairs = [(a, b) for a, b in zip("abcdefghijklmnopqrst", "bcdefghijklmnopqrstu")]
    records = [{"question": f"{number} after {a} comes", "choices": [b, "z", "0"], "answer": b, "completion": f" {b}"} for number in range(20) for a, b in pairs]
    (world.directory / "r.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    prepare("prepare_examples", "choice", "--name", "choice", "--out", world.directory / "choice.h5", "--prompt", "question", "--separator", " ",
            world.directory / "r.jsonl")
    prepare("prepare_examples", "completion", "--name", "completion", "--out", world.directory / "completion.h5", "--prompt", "question", "--completion", "completion",
            world.directory / "r.jsonl")
    base = ("seeds=[1]", "train.steps=60", "evaluation.sequences=0", "adapters=[{name: lora, adapter: {rank: 4, alpha: 8}}]")
    world.run("choice", f"tasks=[{{name: choice, path: {world.directory}/choice.h5}}]", *base)
    before, after = (row["task choice"] for row in world.table("choice", "Accuracy"))
    assert after > 90 > before, (before, after)
    world.run("apart", f"tasks=[{{name: completion, path: {world.directory}/completion.h5}}]", *base)
    world.run("packed", f"tasks=[{{name: completion, path: {world.directory}/completion.h5, packing: true}}]", *base, "seq_len=64")
    for run in ("apart", "packed"):
        before, after = (row["task completion"] for row in world.table(run, "Bits per byte"))
        assert after < before / 2, (run, before, after)
    both = "tasks=[" + ", ".join(f"{{name: {name}, path: {world.directory}/{name}.h5}}" for name in ("completion", "left", "choice")) + "]"
    world.run("mixed", both, *base, "train.steps=2")
    columns = next(t for t in json.loads((world.directory / "mixed/summary.json").read_text())["tables"] if t["title"].startswith("Scores"))["columns"]
    assert [c["label"] for c in columns][4:] == ["completion (bits per byte)", "left (bits per byte)", "choice (accuracy, %)"], columns
    expect_in(world.run("refused", f"tasks=[{{name: choice, path: {world.directory}/choice.h5}}]", *base, "seq_len=8", expect=2).stderr, "longer than", "seq_len")
    expect_in(world.run("refused", f"tasks=[{{name: choice, path: {world.directory}/choice.h5}}]", *base, "adapters=[{name: h, head_only: true}]", expect=2).stderr, "no head to train")
    tiny_vit(world.directory / "vit")
    expect_in(world.run("refused", f"model.path={world.directory / 'vit'}", *base, expect=2).stderr, "text needs a decoder or an encoder")


def first_ranks_are_scored_alone(world: Finetuning) -> None:
    world.run("ranks", "seeds=[1]", "evaluation.ranks=[2, 1]", f"tasks=[{{name: left, path: {world.directory}/left.h5}}]",
              "adapters=[{name: nested, adapter: {type: matryoshka, rank: 4, alpha: 8}}, {name: plain, adapter: {rank: 4, alpha: 8}}, {name: dora, adapter: {type: dora, rank: 4}}]")
    rows = world.table("ranks", "The first ranks alone")
    assert [row["adapter"] for row in rows] == ["nested", "plain"], rows
    for row in rows:
        r1, r2, r4 = (row[f"rank{r}"] for r in (1, 2, 4))
        assert abs(row["area"] - ((r1 + r2) / 2 + (r2 + r4)) / 3) < 1e-12, row
        assert abs(row["area_log2"] - ((r1 + r2) / 2 + (r2 + r4) / 2) / 2) < 1e-12, row


def bad_recipes_are_refused(world: Finetuning) -> None:
    cases = {
        ("adapters=[]",): ("adapters must not be empty",),
        ("adapters.1.name=small",): ("'small' stands twice",),
        ("adapters.0.name=base",): ("'base' is no name",),
        ("tasks.0.path=nowhere.h5",): ("tasks.0.path", "nowhere.h5"),
        ("adapters.0.adapter.type=lroa",): ("'lroa' is not one of the choices", "lora"),
        ("adapters.0.adapter.rank=4000",): ("rank 4000 does not fit",),
        ("adapters.0.adapter.options={speed: 3}",): ("options.speed: type lora has no such option",),
        ("adapters.2.adapter.init=olora",): ("dora starts from A of its own",),
        ("seeds=[1, 1]",): ("seeds", "1 stands twice"),
        ("seq_len=100000",): ("positions",),
    }
    for overrides, parts in cases.items():
        expect_in(world.run("refused", *overrides, expect=2).stderr, *parts)
    assert not (world.directory / "refused").exists()


def main() -> None:
    claims = {f.__name__: f for f in (workers_kills_and_seeds_decide_what_they_should, exports_are_what_was_scored,
                                      an_adapter_is_trained_further, classes_are_learnt_by_a_head_and_exported_with_it,
                                      completions_and_choices_are_learnt, first_ranks_are_scored_alone, bad_recipes_are_refused,
                                      training_ends_when_validation_no_longer_improves, updates_in_backward_change_nothing)}
    with tempfile.TemporaryDirectory() as directory:
        claims[sys.argv[2]](Finetuning(Path(directory)))
    print("ok")


if __name__ == "__main__":
    main()
