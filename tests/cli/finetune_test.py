#!/usr/bin/env python3
"""Runs `method: finetune` as a user would: finetune_test.py BINARY CLAIM."""
import json
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

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
        if name in ("sb", "galore", "whole"):
            continue
        adapter = world.directory / f"{name}-peft"
        done = subprocess.run([BINARY, "export", world.directory / "run", adapter, "--to", "peft", "--what", f"{name}/left/seed1"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        # The same factors; a pair of twice the rank sums in another order.
        assert abs(world.score(model, "--adapter", adapter, "--dtype", "float32") - scores[name]) < 1e-5 * scores[name], name
        assert (adapter / "adapter_model.safetensors").read_bytes() == (world.directory / "run/adapters" / name / "left/seed1/adapter_model.safetensors").read_bytes()
    for arguments, parts in (((), ("the run has 12 results", "--what")), (("--what", "smal/left/seed1"), ("no result 'smal/left/seed1'", "small/left/seed1")),
                             (("--what", "whole/left/seed1"), ("trained all weights", "--to hf"))):
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
    expect_in(world.run("third", "seeds=[1]", f"adapters=[{{name: more, start: {start}, adapter: {{rank: 2}}}}]", expect=2).stderr, "adapter or start")
    expect_in(world.run("third", "seeds=[1]", "adapters=[{name: more, start: nowhere}]", expect=2).stderr, "adapters.0.start", "nowhere")


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
                                      an_adapter_is_trained_further, bad_recipes_are_refused)}
    with tempfile.TemporaryDirectory() as directory:
        claims[sys.argv[2]](Finetuning(Path(directory)))
    print("ok")


if __name__ == "__main__":
    main()
