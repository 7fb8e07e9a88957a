#!/usr/bin/env python3
"""Merges adapters of finetune runs as a user would: merge_test.py BINARY CLAIM."""
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy
from safetensors.numpy import load_file

from finetune_test import Finetuning, prepare, tiny_bert
from run_test import BINARY, SOURCE, expect_in

MODEL = SOURCE / "recipes/models/tiny-public"


class Merging(Finetuning):
    def merge(self, out: str, *arguments, expect: int = 0, **fields) -> subprocess.CompletedProcess:
        config = self.directory / "merge.yaml"
        config.write_text(json.dumps(fields))   # JSON is YAML
        done = subprocess.run([BINARY, "merge", config, self.directory / out, *map(str, arguments)], capture_output=True, text=True, timeout=300)
        assert done.returncode == expect, f"exit code {done.returncode}, expected {expect}\n{done.stdout}\n{done.stderr}"
        assert expect == 0 or not (self.directory / out).exists() or out == "taken"
        return done

    def peft(self, name: str, task: str) -> Path:
        return self.directory / f"run/adapters/{name}/{task}/seed1"

    def train(self) -> None:
        self.run("run", "seeds=[1]", "adapters=[{name: small, adapter: {rank: 2, alpha: 4}}, {name: wide, adapter: {rank: 3, alpha: 3, target_modules: [q_proj]}}, "
                 "{name: dora, adapter: {type: dora, rank: 2, alpha: 4, target_modules: [q_proj, up_proj]}}]")


def changes(directory: Path) -> dict[str, numpy.ndarray]:
    """Of a PEFT directory, dense, by module."""
    config, factors = (json.loads((directory / "adapter_config.json").read_text()), load_file(directory / "adapter_model.safetensors"))
    dense = {}
    for name, a in factors.items():
        if name.endswith(".lora_A.weight"):
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            rank, alpha = (config[f"{key}_pattern"].get(module, config[r]) for key, r in (("rank", "r"), ("alpha", "lora_alpha")))
            assert a.shape[0] == rank, (module, a.shape, rank)
            dense[module] = factors[name.replace("lora_A", "lora_B")].astype(float) @ a.astype(float) * alpha / rank
    return dense


def adapters_of_runs_and_directories_become_one(world: Merging) -> None:
    world.train()
    run = world.directory / "run"
    three = [{"run": str(run), "adapter": "small/left/seed1", "weight": 0.5}, {"path": str(world.peft("small", "right")), "weight": -0.25},
             {"run": str(run), "adapter": "train/wide/left/seed1"}]
    expect_in(world.merge("sum", adapters=three, how={"type": "concat"}).stdout, "concat: 28 modules, ranks 4 to 7", "0.5 x ")
    parts = [changes(world.peft(*which)) for which in (("small", "left"), ("small", "right"), ("wide", "left"))]
    merged = changes(world.directory / "sum")
    for module, change in merged.items():
        expected = sum(weight * part[module] for weight, part in zip((0.5, -0.25, 1), parts) if module in part)
        numpy.testing.assert_allclose(change, expected, atol=1e-6 * numpy.abs(expected).max())   # float32 factors
    config = json.loads((world.directory / "sum/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(MODEL) and config["r"] == config["lora_alpha"] == 4, config
    world.merge("cut", adapters=three, how={"type": "svd", "rank": 3})
    for module, change in changes(world.directory / "cut").items():
        u, s, v = numpy.linalg.svd(merged[module])
        numpy.testing.assert_allclose(change, u[:, :3] * s[:3] @ v[:3], atol=2e-6 * s[0])
    # One adapter alone is itself, for `eval` too; as an artefact out of the run it is the same.
    alone = world.score(MODEL, "--adapter", world.peft("small", "left"))
    subprocess.run([BINARY, "cp", run, "train/small/left/seed1", world.directory / "small.safetensors"], check=True, capture_output=True)
    for name, source in (("one", {"path": str(world.peft("small", "left"))}), ("two", {"path": str(world.directory / "small.safetensors")})):
        world.merge(name, adapters=[source], how={"type": "svd"}, base=str(MODEL))
        assert abs(world.score(MODEL, "--adapter", world.directory / name) - alone) < 1e-5 * alone
    assert abs(world.score(MODEL, "--adapter", world.directory / "sum") - alone) > 1e-4


def the_order_of_the_list_does_not_matter(world: Merging) -> None:
    world.train()
    entries = [{"path": str(world.peft("small", "left")), "weight": 0.5}, {"path": str(world.peft("small", "right")), "weight": 0.5}]
    for how in ({"type": "dare_ties", "density": 0.5, "seed": 3}, {"type": "concat"}, {"type": "knots", "density": 0.5, "rank": 2}, {"type": "ties_svd", "density": 0.2}):
        written = []
        for number, adapters in enumerate((entries, entries[::-1])):
            out = f"{how['type']}{number}"
            world.merge(out, adapters=adapters, how=how)
            written.append((world.directory / out / "adapter_model.safetensors").read_bytes())
        assert written[0] == written[1], how


def merged_models_are_written_whole(world: Merging) -> None:
    world.train()
    dora = [{"run": str(world.directory / "run"), "adapter": "dora/left/seed1"}]
    world.merge("model", "--to", "hf", adapters=dora, how={"type": "concat"})
    exported = world.directory / "exported"
    subprocess.run([BINARY, "export", world.directory / "run", exported, "--to", "hf", "--what", "dora/left/seed1"], check=True, capture_output=True)
    assert abs(world.score(world.directory / "model") - world.score(exported)) < 1e-3
    assert {file.name for file in (world.directory / "model").iterdir()} == {file.name for file in exported.iterdir()}
    both = dora + [{"path": str(world.peft("small", "right"))}]
    world.merge("dense", "--to", "hf", adapters=both, how={"type": "ties_dense", "density": 0.5})
    world.merge("low", adapters=both, how={"type": "ties_svd", "density": 0.5, "rank": 4})
    assert changes(world.directory / "low")["model.layers.0.self_attn.q_proj"].shape == (128, 128)
    expect_in(world.merge("no", adapters=both, how={"type": "linear"}, expect=2).stderr, "works on factors", "dora/left/seed1", "svd")
    expect_in(world.merge("no", adapters=both, how={"type": "concat"}, expect=2).stderr, "is dense", "--to hf")


def classifiers_are_left_out_only_when_asked(world: Merging) -> None:
    tiny_bert(world.directory / "bert")
    rng = numpy.random.default_rng(3)
    for name in ("one", "two"):
        texts = [{"text": "".join(rng.choice(list(letters), 12)), "label": letters} for letters in ("abcd", "efgh") for _ in range(30)]
        (world.directory / f"{name}.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
        prepare("prepare_examples", "classification", "--name", name, "--out", world.directory / f"{name}.h5", world.directory / f"{name}.jsonl")
    tasks = ", ".join(f"{{name: {name}, path: {world.directory / name}.h5}}" for name in ("one", "two"))
    world.run("run", f"model.path={world.directory / 'bert'}", f"tasks=[{tasks}]", "adapters=[{name: lora, adapter: {rank: 2, alpha: 4}}]", "seeds=[1]", "train.steps=2")
    adapters = [{"run": str(world.directory / "run"), "adapter": f"lora/{name}/seed1"} for name in ("one", "two")]
    expect_in(world.merge("no", adapters=adapters, how={"type": "svd"}, expect=2).stderr, "lora/one/seed1 has a classifier", "heads: leave_out")
    world.merge("merged", adapters=adapters, how={"type": "svd"}, heads="leave_out")
    names = load_file(world.directory / "merged/adapter_model.safetensors")
    assert names and not any("classifier" in name for name in names), list(names)
    directories = [{"path": str(world.directory / f"run/adapters/lora/{name}/seed1")} for name in ("one", "two")]
    expect_in(world.merge("no", adapters=directories, how={"type": "svd"}, expect=2).stderr, "has a classifier", "heads: leave_out")
    world.merge("of_directories", adapters=directories, how={"type": "svd"}, heads="leave_out")
    assert load_file(world.directory / "of_directories/adapter_model.safetensors").keys() == names.keys()


def bad_merges_are_refused(world: Merging) -> None:
    world.train()
    small, run = {"path": str(world.peft("small", "left"))}, str(world.directory / "run")
    refused = lambda *parts, adapters=(small,), how=None, **more: expect_in(
        world.merge("no", adapters=list(adapters), how={"type": "concat"} if how is None else how, expect=2, **more).stderr, *parts)
    refused("no adapter at", "nowhere", adapters=[{"path": str(world.directory / "nowhere")}])
    refused("either path, or run and adapter", adapters=[{"run": run}])
    refused("weight: 0 contributes nothing", adapters=[small | {"weight": 0}])
    refused("weights: unknown key", "weight", adapters=[small | {"weights": 1}])
    refused("adapters must not be empty", adapters=[])
    refused("train/small/left/seed1", adapters=[{"run": run, "adapter": "smal/left/seed1"}])
    refused("is no adapter of a finetune run", adapters=[{"run": run, "adapter": "test/base/left"}])
    refused("how.type", "'tise'", "ties", how={"type": "tise"})
    refused("how.rank", how={"type": "svd", "rank": 0})
    for density in (0, 1.5, -1):
        refused("how.density", how={"type": "ties", "density": density})
    refused("density: type ties needs it", how={"type": "ties"})
    refused("rank: type concat has no such option", how={"type": "concat", "rank": 2})
    refused("needs equal ranks", "has 2", "3", adapters=[small, {"path": str(world.peft("wide", "left"))}], how={"type": "linear"})
    # Another model of the same shapes is told apart where the adapter says which one it is of; other shapes always are.
    other = world.directory / "other"
    other.mkdir()
    for file in MODEL.iterdir():
        if file.is_file():
            (other / file.name).write_bytes(file.read_bytes())
    weights = other / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    if (other / "SHA256SUMS").exists():
        (other / "SHA256SUMS").unlink()
    refused("was trained on another model", adapters=[{"run": run, "adapter": "small/left/seed1"}], base=str(other))
    tiny_bert(world.directory / "bert")
    refused("does not fit", "left over", base=str(world.directory / "bert"))
    refused("nowhere", base=str(world.directory / "nowhere"))
    (world.directory / "taken").mkdir()
    (world.directory / "taken/file").write_text("")
    expect_in(world.merge("taken", adapters=[small], how={"type": "concat"}, expect=2).stderr, "not empty")
    experts = [{"artefact": str(world.directory / "x.safetensors")}]
    expect_in(world.merge("no", "--to", "hf", base=str(MODEL), experts=experts, expect=2).stderr, "--to has no meaning")


def main() -> None:
    claims = {f.__name__: f for f in (adapters_of_runs_and_directories_become_one, the_order_of_the_list_does_not_matter, merged_models_are_written_whole,
                                      classifiers_are_left_out_only_when_asked, bad_merges_are_refused)}
    with tempfile.TemporaryDirectory() as directory:
        claims[sys.argv[2]](Merging(Path(directory)))
    print("ok")


if __name__ == "__main__":
    main()
