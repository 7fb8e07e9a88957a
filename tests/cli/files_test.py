#!/usr/bin/env python3
"""Commands that look into runs and files: files_test.py BINARY CLAIM. Exit code 77 = skipped."""
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import h5py
import numpy
from safetensors.numpy import load_file

from run_test import BINARY, World, expect_in


def moraine(*arguments, expect: int = 0, **options) -> subprocess.CompletedProcess:
    done = subprocess.run([BINARY, *map(str, arguments)], capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == expect, f"{arguments}: exit code {done.returncode}, expected {expect}\n{done.stdout}\n{done.stderr}"
    return done


def as_json(*arguments):
    return json.loads(moraine(*arguments, "--format", "json").stdout)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def inspecting_and_copying(world: World) -> None:
    world.run("run")
    run, here = world.directory / "run", world.directory
    copied = here / "expert.safetensors"
    moraine("cp", run, "extract/left", copied)
    facts = as_json("inspect", copied, "--spectra")
    assert facts["type"] == "artefact" and facts["sha256"] == sha256(copied) and facts["bytes"] == copied.stat().st_size
    tensors = load_file(copied)
    assert {t["name"]: tuple(t["shape"]) for t in facts["tensors"]} == {name: value.shape for name, value in tensors.items()}
    assert facts["parameters"] == sum(value.size for value in tensors.values())
    assert len(facts["low_rank"]) == 6
    for pair in facts["low_rank"]:
        dense = numpy.linalg.svd(tensors[pair["b"]].astype(float) @ tensors[pair["a"]].astype(float), compute_uv=False)
        assert pair["rank"] == 4 and numpy.allclose(pair["spectrum"], dense[:4], rtol=1e-9), pair   # float64 on both sides
    same = as_json("inspect", run, "extract/left")
    assert same["sha256"] == facts["sha256"]
    assert as_json("inspect", run, facts["sha256"][:8])["sha256"] == facts["sha256"]
    whole = as_json("inspect", run)
    assert whole["type"] == "run" and {kind["kind"] for kind in whole["artefacts"]} == {"base", "embedding", "evaluation", "expert", "mixture"}
    model = as_json("inspect", run / "mixture")
    assert model["metadata"]["model_type"] == "flexmore" and model["files"]["model.safetensors"] == sha256(run / "mixture" / "model.safetensors")
    with h5py.File(here / "left.h5") as file:
        data = as_json("inspect", here / "left.h5")
        assert data["type"] == "hdf5" and data["metadata"]["fingerprint"] == file.attrs["fingerprint"]
        assert next(t for t in data["tensors"] if t["name"] == "train/tokens")["shape"] == list(file["train/tokens"].shape)
    expect_in(moraine("inspect", here / "left.h5").stdout, "train/tokens", "uint16")
    expect_in(moraine("inspect", run, "extract/left", "--spectra").stdout, "singular values")

    evaluation = as_json("cat", run, "test/mixture/left")
    nats, size = (evaluation["metadata"]["result"][key] for key in ("nats", "bytes"))
    assert abs(evaluation["scores"]["bits_per_byte"] - nats / numpy.log(2) / size) < 1e-12
    row = json.loads(moraine("cat", run, "train/left", "--tensor", "model.layers.0.mlp.gate.weight").stdout)
    moraine("cp", run, "train/left", here)
    assert numpy.array_equal(numpy.float32(row), load_file(here / "train-left.safetensors")["model.layers.0.mlp.gate.weight"])
    moraine("cp", run, "mixture", here / "copied")
    assert sha256(here / "copied" / "model.safetensors") == sha256(run / "mixture" / "model.safetensors")

    expect_in(moraine("cp", run, "mixture", here / "copied", expect=2).stderr, "not empty", "--force")
    expect_in(moraine("cp", run, "train/left", copied, expect=2).stderr, "exists")
    expect_in(moraine("cat", run, "test/mixture/lfet", expect=2).stderr, "did you mean 'test/mixture/left'")
    expect_in(moraine("cat", here, "x", expect=2).stderr, "no run directory")
    expect_in(moraine("inspect", here / "absent", expect=2).stderr, "absent")
    expect_in(moraine("inspect", here, expect=2).stderr, "neither a run nor a model directory")
    (here / "text.safetensors").write_text("no header at all")
    expect_in(moraine("inspect", here / "text.safetensors", expect=2).stderr, "text.safetensors")


def comparing(world: World) -> None:
    world.run("one")
    world.run("two", "seed=2")
    shutil.copytree(world.directory / "one", world.directory / "again")
    facts = as_json("compare", world.directory / "one", world.directory / "two")
    assert [row["key"] for row in facts["recipe"]] == ["recipe.seed"] and facts["recipe"][0]["two"] == "2", facts["recipe"]
    assert facts["hashes"] == [world.hash("one"), world.hash("two")]
    row = next(r for r in facts["results"] if r["row"] == "left")
    assert abs(row["two"] - row["one"] - row["difference"]) < 1e-12
    text = moraine("compare", world.directory / "one", world.directory / "again").stdout
    expect_in(text, "Recipes and inputs are equal", "No number in the tables differs", "equal, bit for bit", world.hash("one"))
    expect_in(moraine("compare", world.directory / "one", world.directory / "none", expect=2).stderr, "none", "no run directory")


def schema_and_completion(world: World) -> None:
    schema = json.loads(moraine("config-schema", "flexmore").stdout)
    values = json.loads(moraine("validate", world.recipe, "--schema-only", "--format", "json").stdout)
    for value in values:   # every resolved key stands in the schema
        assert value["key"].split(".")[0] in schema["properties"], value["key"]
    whole = json.loads(moraine("config-schema").stdout)
    assert "flexmore" in whole["properties"]["method"]["enum"]
    expect_in(moraine("config-schema", "flexmore", "--format", "markdown").stdout, "train.steps")
    expect_in(moraine("config-schema", "flexmoer", expect=2).stderr, "did you mean 'flexmore'")

    script = world.directory / "moraine.bash"
    script.write_text(moraine("completion", "bash").stdout)
    complete = lambda *words: subprocess.run(
        ["bash", "-c", 'source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _moraine; echo "${COMPREPLY[@]}"', "bash", script, *words],
        capture_output=True, text=True, check=True).stdout.split()
    assert complete("moraine", "val") == ["validate"]
    assert complete("moraine", "run", "--acc") == ["--accept-changes"]
    assert complete("moraine", "report", "--format", "m") == ["markdown"]
    assert complete("moraine", "completion", "") == ["bash", "zsh", "fish"]
    assert complete("moraine", "run", "recipes/") == []   # bash then completes file names
    for shell in ("zsh", "fish"):
        expect_in(moraine("completion", shell).stdout, "moraine", "accept-changes")
    expect_in(moraine("completion", "tcsh", expect=2).stderr, "tcsh")
    for command in ("inspect", "cat", "cp", "compare", "config-schema", "completion"):
        expect_in(moraine(command, "--help").stdout, "Example")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="moraine-cli-") as temporary:
        globals()[sys.argv[2]](World(Path(temporary)))
