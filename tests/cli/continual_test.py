#!/usr/bin/env python3
"""Runs continual recipes as a user would, on tiny images: continual_test.py BINARY CLAIM."""
import gzip
import json
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import h5py
import numpy as np
from safetensors.numpy import load_file

from run_test import mpirun, same_losses

SOURCE = Path(__file__).resolve().parents[2]
BINARY = sys.argv[1]

RECIPE = """
name: tiny
method: continual
model:
  architecture: {image_size: 8, patch_size: 4, hidden_size: 8, intermediate_size: 12, num_layers: 2, num_heads: 2}
  data_path: others.h5
  train: {steps: 4, batch_size: 8}
images: {path: images.h5}
stream: {increment: 2}
orders: [-1, 1993]
methods: [joint, finetune, seq_lora, simplecil]
train: {steps: STEPS, batch_size: 8, checkpoint_every: 5, log_every: 5}
learners: {seq_lora: {adapter: {rank: 2}}}
workers: {local: 2}
"""
EVERY_METHOD = "methods=[finetune, seq_lora, o_lora, linear_probe, ewc, lwf, er, simplecil, ranpac]"
TEXTS = f"""
name: texts
method: continual
model: {{path: {SOURCE}/recipes/models/tiny-public}}
texts: {{path: texts.h5}}
stream: {{increment: 2, train_per_class: 12, test_per_class: 4}}
train: {{steps: 4, batch_size: 4}}
learners: {{seq_lora: {{adapter: {{type: dora, rank: 2}}}}, ewc: {{samples: 5}}, er: {{buffer_size: 10}}, ranpac: {{features: 20}}}}
workers: {{local: 1}}
"""


class World:
    def __init__(self, directory: Path):
        self.directory = directory
        rng = np.random.default_rng(3)
        for name, classes in (("images", 6), ("others", 3)):
            lines = [[*(rng.integers(0, 120, 36) + 130 * (np.arange(36) // 6 == label)), label] for label in np.arange(30 * classes) % classes]
            (directory / f"{name}.csv.gz").write_bytes(gzip.compress("".join(",".join(map(str, line)) + "\n" for line in lines).encode()))
            subprocess.run([sys.executable, SOURCE / "scripts/prepare_images.py", "--name", name, "--out", directory / f"{name}.h5", "--table",
                            directory / f"{name}.csv.gz", "--shape", "1x6x6", "--test-share", "0.3"], check=True, capture_output=True)
        self.recipe = directory / "recipe.yaml"
        self.recipe.write_text(RECIPE.replace("STEPS", "8"))

    def command(self, run: str, *overrides: str) -> list[str]:
        return [BINARY, "run", str(self.recipe), *overrides, "--run-dir", str(self.directory / run)]

    def run(self, run: str, *overrides: str, expect: int = 0) -> subprocess.CompletedProcess:
        done = subprocess.run(self.command(run, *overrides), capture_output=True, text=True, timeout=300)
        if done.returncode != expect:
            sys.exit(f"exit code {done.returncode}, expected {expect}\n{done.stdout}\n{done.stderr}")
        return done

    def summary(self, run: str) -> dict:
        return json.loads((self.directory / run / "summary.json").read_text())

    def hash(self, run: str) -> str:
        value = self.summary(run)["hash"]
        assert len(value) == 64, value
        return value


def expect_in(text: str, *parts: str) -> None:
    for part in parts:
        assert part in text, f"no {part!r} in:\n{text}"


def workers_and_kills_do_not_change_the_matrices(world: World) -> None:
    world.recipe.write_text(RECIPE.replace("STEPS", "60").replace("[-1, 1993]", "[1993]").replace("[joint, ", "["))
    for workers in (1, 3):
        world.run(f"w{workers}", f"workers.local={workers}")
        world.run(f"every{workers}", f"workers.local={workers}", EVERY_METHOD, "train.steps=8", "learners.ranpac.features=20")
    assert world.hash("w1") == world.hash("w3")
    assert world.hash("every1") == world.hash("every3")
    for number, sign in enumerate((signal.SIGKILL, signal.SIGTERM)):   # in the middle of the chain, each start a little later
        process = subprocess.Popen(world.command("killed"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        started = 0
        for line in process.stderr:
            started += "unit starts: unit=train/" in line
            if started > 2 + number:
                process.send_signal(sign)
                break
        process.stderr.read()
        code = process.wait(timeout=120)
        assert code == (-9 if sign == signal.SIGKILL else 75), code
    world.run("killed")
    assert world.hash("killed") == world.hash("w1")
    world.run("seed", "seeds=[2]")
    assert world.hash("seed") != world.hash("w1")


def texts_are_learnt_like_images(world: World) -> None:
    records = world.directory / "texts.jsonl"
    records.write_text("".join(json.dumps({"t": f"{'abcdef'[i % 6]} number {i}", "l": f"c{i % 6}"}) + "\n" for i in range(240)))
    subprocess.run([sys.executable, SOURCE / "scripts/prepare_examples.py", "classification", "--name", "texts", "--out", world.directory / "texts.h5", "--text", "t",
                    "--label", "l", "--test", "0.3", records], check=True, capture_output=True)
    world.recipe.write_text(TEXTS)
    for workers in (1, 3):
        done = world.run(f"w{workers}", f"workers.local={workers}", EVERY_METHOD)
    expect_in(done.stdout, "ranpac", "linear_probe")
    assert world.hash("w1") == world.hash("w3")
    expect_in(world.run("refused", "model.image_size=8", expect=2).stderr, "reads no images")
    images = ("texts=null", "images.path=images.h5")
    expect_in(world.run("refused", *images, expect=2).stderr, "which reads no images")


def chains_trained_by_groups_equal_one_process(world: World) -> None:
    world.recipe.write_text(RECIPE.replace("STEPS", "8").replace("[-1, 1993]", "[1993]").replace("[joint, ", "["))
    world.run("one")
    world.run("threads", "workers.group_size=2", "workers.local=4")
    same_losses(world.directory / "one", world.directory / "threads")
    if not shutil.which("mpirun"):
        print("skipped: no mpirun")
        sys.exit(77)
    subprocess.run(mpirun(3) + world.command("processes", "workers.group_size=2"), capture_output=True, check=True, timeout=300)
    assert world.hash("processes") == world.hash("threads")


def tables_and_matrices_agree(world: World) -> None:
    done = world.run("run", "metrics=[last_pooled, forgetting_chaudhry, fwt]")
    expect_in(done.stdout, "class-IL", "simplecil", "joint")
    with h5py.File(world.directory / "run" / "metrics.h5") as file:
        matrices = {}
        file.visititems(lambda name, item: matrices.update({name: item[:]}) if isinstance(item, h5py.Dataset) else None)
        streams = json.loads(file.attrs["streams"])
    assert len(matrices) == 4 * 2 * 2, sorted(matrices)
    rows = next(t for t in world.summary("run")["tables"] if t["title"] == "Accuracy, %")["rows"]
    for row in rows:
        last, forgetting = [], []
        for stream in streams:
            images = np.array([task["test"] for task in stream["tasks"]])
            r = matrices[f"{row['method']}/order{stream['order']}/seed1/class_incremental"][1:]
            last.append((r[-1] * images).sum() / images.sum())
            forgetting.append(np.mean([max(r[i][j] for i in range(j, len(r) - 1)) - r[-1][j] for j in range(len(r) - 1)]))
            t = matrices[f"{row['method']}/order{stream['order']}/seed1/task_incremental"][1:]
            seen = ~np.isnan(r)
            assert (seen == np.tril(np.ones_like(r, bool))).all() and (t[seen] >= r[seen]).all()
        assert abs(np.mean(last) - row["last"]) < 1e-9, row           # the same sums in double, in another order
        assert abs(np.mean(forgetting) - row["forgetting"]) < 1e-9, row
    titles = [t["title"] for t in world.summary("run")["tables"]]
    assert "Class-incremental metrics, %" in titles and "Task-incremental metrics, %" in titles, titles
    world.run("fewer", "methods=[simplecil]", "stream.train_per_class=5")
    refused = subprocess.run([BINARY, "compare", world.directory / "run", world.directory / "fewer"], capture_output=True, text=True)
    assert refused.returncode == 2, refused.stdout
    expect_in(refused.stderr, "measured on different data: stream of order -1 is")
    again = world.run("run", "metrics=[last_pooled, bwt]", "--accept-changes")
    assert "unit starts" not in again.stderr, "metrics are made from what is stored"
    (world.directory / "images.h5").unlink()   # a report needs the run directory alone
    subprocess.run([BINARY, "report", str(world.directory / "run")], capture_output=True, check=True)


def bad_recipes_are_refused(world: World) -> None:
    cases = {
        ("stream.tasks=[{classes: [0, 1]}, {classes: [1, 2, 3, 4, 5]}]",): ("class 1 stands twice: in task 0 and in task 1",),
        ("stream.tasks=[{classes: [0, 1, 2]}, {classes: [4, 5]}]",): ("class 3 is in no task",),
        ("metrics=[fwt]", "evaluation.ahead=false"): ("fwt cannot be had from this stream", "evaluation.ahead: true"),
        ("metrics=[forgeting_pycil]",): ("forgetting_pycil",),
        ("lora.rank=3",): ("lora: has moved to learners.seq_lora.adapter",),
        ("methods=[seq_lora]", "learners.seq_lora.adapter.type=lora_sb"): ("learners.seq_lora", "starts from examples"),
        ("methods=[simplecl]",): ("did you mean 'simplecil'",),
        ("images.path=nowhere.h5",): ("nowhere.h5",),
        ("images.path=recipe.yaml",): ("recipe.yaml",),
        ("model.data_path=images.h5",): ("labels of tasks to come",),
        ("model.path=.", "model.architecture=null", "model.train=null", 'model.data_path=""'): ("config.json",),
    }
    for overrides, parts in cases.items():
        done = subprocess.run(world.command("refused", *overrides), capture_output=True, text=True, cwd=world.directory)
        assert done.returncode == 2, f"{overrides}: {done.returncode}\n{done.stderr}"
        expect_in(done.stderr, *parts)
    assert not (world.directory / "refused").exists(), "a refused recipe leaves nothing behind"


def a_published_backbone_can_be_loaded(world: World) -> None:
    world.run("run")
    model = world.directory / "run" / "backbone"
    overrides = (f"model.path={model}", "model.architecture=null", "model.train=null", 'model.data_path=""')
    expect_in(world.run("refused", *overrides, expect=2).stderr, "images are 6 x 6", "takes 8 x 8", "model.image_size")
    expect_in(world.run("refused", *overrides, "model.image_size=10", expect=2).stderr, "10", "patch size 4")
    expect_in(world.run("refused", "model.image_size=8", expect=2).stderr, "image_size goes with path")
    world.run("finer", *overrides, "model.image_size=12", "methods=[simplecil]")
    overrides += ("model.image_size=8",)
    world.run("from_directory", *overrides)
    with h5py.File(world.directory / "run" / "metrics.h5") as one, h5py.File(world.directory / "from_directory" / "metrics.h5") as two:
        for name in ("finetune/order1993/seed1/task_incremental", "simplecil/order-1/seed1/class_incremental"):
            np.testing.assert_array_equal(one[name][:], two[name][:])


def states_can_be_exported(world: World) -> None:
    world.recipe.write_text(RECIPE.replace("STEPS", "8").replace("[-1, 1993]", "[-1]").replace("[joint, ", "[o_lora, linear_probe, ").replace("{rank: 2}}", "{rank: 2}}, o_lora: {adapter: {rank: 2}}"))
    world.run("run")

    def export(name: str, *arguments: str, expect: int = 0) -> str:
        done = subprocess.run([BINARY, "export", world.directory / "run", world.directory / name, *arguments], capture_output=True, text=True)
        assert done.returncode == expect, done.stderr
        return done.stderr

    export("peft", "--to", "peft", "--what", "seq_lora")
    export("early", "--to", "hf", "--what", "seq_lora/order-1/seed1/task0")
    for name in ("seq_lora", "o_lora", "linear_probe", "finetune"):
        export(name, "--to", "hf", "--what", name)
        config = json.loads((world.directory / name / "config.json").read_text())
        assert config["architectures"] == ["ViTForImageClassification"] and len(config["id2label"]) == 6, config
    assert len(json.loads((world.directory / "early" / "config.json").read_text())["id2label"]) == 2
    # The exported model is the backbone and what the exported adapter says.
    before = load_file(world.directory / "run" / "backbone" / "model.safetensors")
    after, factors = load_file(world.directory / "seq_lora" / "model.safetensors"), load_file(world.directory / "peft" / "adapter_model.safetensors")
    pairs = [name for name in factors if name.endswith("lora_A.weight")]
    assert pairs and any(np.abs(factors[a.replace("lora_A", "lora_B")]).max() > 0 for a in pairs)
    config = json.loads((world.directory / "peft" / "adapter_config.json").read_text())
    for a in pairs:
        module = a.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        change = config["lora_alpha"] / config["r"] * factors[a.replace("lora_A", "lora_B")] @ factors[a]
        np.testing.assert_allclose(after[module + ".weight"] - before[module.removeprefix("vit.") + ".weight"], change, atol=1e-6)   # float32 sums of weights below 1
    changed = [n for n, t in load_file(world.directory / "linear_probe" / "model.safetensors").items() if not n.startswith("classifier") and (t != before[n.removeprefix("vit.")]).any()]
    assert not changed, changed
    expect_in(export("no", "--to", "peft", "--what", "o_lora", expect=2), "more than one adapter", "--to hf")
    expect_in(export("no", "--to", "hf", "--what", "simplecil", expect=2), "simplecil is", "moraine cp")
    expect_in(export("no", "--to", "hf", expect=2), "several results", "--what")
    expect_in(export("no", "--to", "hf", "--what", "seq_lra", expect=2), "no result 'seq_lra'")
    assert not (world.directory / "no").exists()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="moraine-continual-") as temporary:
        globals()[sys.argv[2]](World(Path(temporary)))
