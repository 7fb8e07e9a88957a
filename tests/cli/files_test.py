#!/usr/bin/env python3
"""Commands that look into runs and files: files_test.py BINARY CLAIM. Exit code 77 = skipped."""
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import h5py
import numpy
from safetensors.numpy import load_file, save_file

from run_test import BINARY, SOURCE, World, expect_in


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
        assert data["type"] == "hdf5" and data["metadata"]["fingerprint"] == file.attrs["fingerprint"].decode()
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


def exporting_and_importing(world: World) -> None:
    world.run("run", "domains.1.rank=full", "domains.1.train=full")
    run, here = world.directory / "run", world.directory
    moraine("export", run, here / "lora", "--to", "peft", "--experts", "left")
    config = json.loads((here / "lora/left/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(run / "public_model"), config
    assert config["peft_type"] == "LORA" and config["lora_alpha"] == config["r"] == 2, config
    factors = load_file(here / "lora/left/adapter_model.safetensors")
    assert len(factors) == 12 and all(name.startswith("base_model.model.model.layers.") for name in factors), list(factors)
    moraine("export", run, here / "dense", "--to", "flexolmo")
    moraine("export", run / "mixture", here / "dense2", "--to", "flexolmo")
    assert sha256(here / "dense/model.safetensors") == sha256(here / "dense2/model.safetensors")
    dense, factored = load_file(here / "dense/model.safetensors"), load_file(run / "mixture/model.safetensors")
    path = "model.layers.1.mlp.experts.{}.up_proj"
    low = factored[path.format(1) + "_b.weight"] @ factored[path.format(1) + "_a.weight"] + factored[path.format(0) + ".weight"]
    assert numpy.abs(dense[path.format(1) + ".weight"] - low).max() < 1e-6   # the product in float32 here, rounded once there
    assert json.loads((here / "dense/config.json").read_text())["architectures"] == ["FlexOlmoForCausalLM"]
    evaluate = lambda model, *more: as_json("eval", model, "--data", here / "left.h5", "--seq-len", 32, *more)[0]
    assert abs(evaluate(run)["loss"] - evaluate(here / "dense")["loss"]) < 1e-6
    alone, adapted = evaluate(run / "public_model"), evaluate(run / "public_model", "--adapter", here / "lora/left")
    assert abs(alone["loss"] - adapted["loss"]) > 1e-6

    moraine("export", run, here / "full", "--to", "flexolmo", "--what", "full_mixture")
    moraine("import", here / "full", here / "parts")
    (here / "merge.yaml").write_text("base: parts/public_model\ntop_k: 2\nexperts: [{artefact: parts/left.safetensors}, {artefact: parts/right.safetensors}]\n")
    moraine("merge", here / "merge.yaml", here / "again")
    moraine("export", here / "again", here / "back", "--to", "flexolmo")
    assert sha256(here / "full/model.safetensors") == sha256(here / "back/model.safetensors")
    # OLMo-core's keys: experts of a layer stacked and transposed, the router flat.
    moraine("export", run, here / "core", "--to", "olmo_core", "--what", "full_mixture")
    named, core = load_file(here / "full/model.safetensors"), load_file(here / "core/model.safetensors")
    assert set(core) >= {"embeddings.weight", "blocks.0.attention.w_out.weight", "lm_head.norm.weight", "lm_head.w_out.weight"}, sorted(core)
    for ours, theirs in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
        for layer in (0, 1):
            stacked = numpy.concatenate([named[f"model.layers.{layer}.mlp.experts.{e}.{theirs}_proj.weight"].T for e in range(3)])
            numpy.testing.assert_array_equal(core[f"blocks.{layer}.feed_forward_moe.experts.mlp.{ours}"], stacked)
    numpy.testing.assert_array_equal(core["blocks.1.feed_forward_moe.router.weight"], named["model.layers.1.mlp.gate.weight"].reshape(-1))
    numpy.testing.assert_array_equal(core["blocks.1.attention_norm.weight"], named["model.layers.1.post_attention_layernorm.weight"])
    moraine("export", here / "core", here / "from_core", "--to", "flexolmo")
    assert sha256(here / "from_core/model.safetensors") == sha256(here / "full/model.safetensors")
    assert evaluate(here / "core")["loss"] == evaluate(here / "full")["loss"]
    for name, tensor, parts in (("blocks.0.feed_forward_moe.router.expert_bias", numpy.ones((2, 1), numpy.float32), ("expert_bias", "not zero")),
                                ("blocks.0.feed_forward_moe.experts.mlp.w1", numpy.ones((7, 3), numpy.float32), ("mlp.w1", "[7, 3]", "[E d, h]")),
                                ("blocks.0.feed_forward_moe.router.weight", numpy.ones((3, 128), numpy.float32), ("router.weight", "[E d]"))):
        (here / "odd").mkdir(exist_ok=True)
        (here / "odd/config.json").write_text((here / "core/config.json").read_text())
        save_file({**core, name: tensor}, here / "odd/model.safetensors")
        expect_in(moraine("export", here / "odd", here / "no", "--to", "flexolmo", expect=2).stderr, *parts)

    moraine("import", here / "lora/left", here / "left.safetensors", "--base", run / "public_model")
    moraine("export", here / "left.safetensors", here / "lora2", "--to", "peft")
    assert sha256(here / "lora2/adapter_model.safetensors") == sha256(here / "lora/left/adapter_model.safetensors")
    moraine("cp", run, "extract/left", here / "expert.safetensors")
    moraine("export", here / "expert.safetensors", here / "lora4", "--to", "peft", "--base-model", "somewhere")
    assert json.loads((here / "lora4/adapter_config.json").read_text())["base_model_name_or_path"] == "somewhere"

    moraine("export", run, here / "lora_unit", "--to", "peft", "--what", "extract/left")
    assert sha256(here / "lora_unit/adapter_model.safetensors") == sha256(here / "lora4/adapter_model.safetensors")
    expect_in(moraine("export", run, here / "no", "--to", "peft", expect=2).stderr, "'right' is full-size", "--experts")
    expect_in(moraine("export", run, here / "no", "--to", "hf", "--what", "extract/left", expect=2).stderr, "only be exported as peft")
    expect_in(moraine("export", run, here / "no", "--to", "peft", "--what", "test/base/left", expect=2).stderr, "no LoRA adapter", "evaluation")
    expect_in(moraine("export", run, here / "no", "--to", "hf", "--what", "soup", expect=2).stderr, "no result 'soup'", "full_mixture")
    expect_in(moraine("export", run, here / "dense", "--to", "hf", expect=2).stderr, "not empty")
    expect_in(moraine("export", run / "public_model", here / "no", "--to", "flexolmo", expect=2).stderr, "is no mixture")
    moraine("cp", run, "test/base/left", here / "score.safetensors")
    expect_in(moraine("export", here / "score.safetensors", here / "no", "--to", "peft", expect=2).stderr, "no LoRA adapter", "evaluation")
    for key, value, parts in (("peft_type", "IA3", ("type ia3", "only plain LoRA")), ("target_modules", ["lm"], ("match no slot", "gate_proj"))):
        shutil.copytree(here / "lora/left", here / "bad", dirs_exist_ok=True)
        (here / "bad/adapter_config.json").write_text(json.dumps({**config, key: value}))
        expect_in(moraine("import", here / "bad", here / "no.safetensors", expect=2).stderr, *parts)
    expect_in(moraine("import", here / "lora/left", here / "left.safetensors", expect=2).stderr, "exists")
    expect_in(moraine("import", here / "none", here / "no", expect=2).stderr, "none")
    assert not (here / "no").exists() and not (here / "no.safetensors").exists()


def merging(world: World) -> None:
    world.run("one")
    base = ("model.architecture=null", "model.train=null", f"model.path={world.directory / 'one/public_model'}")
    world.run("two", *base, "seed=5")
    world.run("other", "seed=9")
    here = world.directory

    def merge(out: str, text: str, *overrides, expect: int = 0):
        (here / "merge.yaml").write_text(text)
        return moraine("merge", here / "merge.yaml", here / out, *overrides, expect=expect)

    expect_in(merge("same", "experts: [{run: one, expert: right}, {run: one, expert: left, rank: 2}]\n").stdout, world.hash("one"), "rank 2")
    assert sha256(here / "same/model.safetensors") == sha256(here / "one/mixture/model.safetensors")
    merge("across", "base: one\nexperts: [{run: one, expert: left}, {run: two, expert: right, rank: 2}]\ntop_k: 3\n")
    config = json.loads((here / "across/config.json").read_text())
    assert config["expert_ranks"] == [0, 0, 2] and config["num_experts_per_tok"] == 3, config
    merge("left", "experts: [{run: one, expert: left, rank: 2}, {run: two, expert: right}]\nleave_out: [right]\n")
    left = as_json("eval", here / "left", "--data", here / "left.h5", "--seq-len", 32)[0]
    assert abs(left["loss"] - as_json("eval", here / "one", "--data", here / "left.h5", "--seq-len", 32, "--experts", "left")[0]["loss"]) < 1e-9

    refused = merge("no", "experts: [{run: one, expert: left}, {run: other, expert: right}]\n", expect=2).stderr
    expect_in(refused, "'right' was trained against another public model", "model.embed_tokens.weight")
    expect_in(merge("no", "experts: [{run: one, expert: lfet}]\n", expect=2).stderr, "no expert 'lfet'", "did you mean 'left'")
    expect_in(merge("no", "experts: [{run: one, expert: left}]\n", "top_k=5", expect=2).stderr, "top_k 5", "2 experts")
    expect_in(merge("no", "experts: [{run: one, expert: left}, {run: two, expert: left}]\n", expect=2).stderr, "two experts are named 'left'")
    expect_in(merge("no", "experts: [{run: one}]\n", expect=2).stderr, "either run and expert, or artefact")
    expect_in(merge("no", "experts: [{run: one, expert: test/base/left}]\n", expect=2).stderr, "no trained expert")
    expect_in(merge("no", "expert: []\n", expect=2).stderr, "expert: unknown key", "experts")
    assert not (here / "no").exists()


def evaluating(world: World) -> None:
    world.run("run", "evaluation.sequences=0")
    run, here = world.directory / "run", world.directory
    for model, unit in ((run, "test/mixture/left"), (run / "public_model", "test/base/left")):
        ours = as_json("eval", model, "--data", here / "left.h5", "--seq-len", 32, "--batch-size", 4)[0]
        theirs = as_json("cat", run, unit)
        for key, value in theirs["scores"].items():
            assert abs(ours[key] - value) < 1e-9, (model, key, ours, value)   # the same batches in the same order
        assert ours["tokens"] == theirs["metadata"]["result"]["tokens"]
    moraine("eval", run, "--data", here / "left.h5", "--seq-len", 32, "--sequences", 2, "--logits", here / "logits.safetensors")
    tensors = load_file(here / "logits.safetensors")
    assert tensors["tokens"].shape == (2, 33) and tensors["logits"].shape == (2, 32, 264)
    expect_in(moraine("eval", run, "--data", f"{here}/left.h5,{here}/right.h5", "--seq-len", 32).stdout, "left", "right", "bits_per_byte")
    expect_in(moraine("eval", run, "--data", here / "none.h5", expect=2).stderr, "none.h5")
    expect_in(moraine("eval", run, "--data", here / "left.h5", "--seq-len", 65, expect=2).stderr, "65", "64 positions")
    expect_in(moraine("eval", run, "--data", here / "left.h5", "--experts", "middle", expect=2).stderr, "no expert 'middle'")
    expect_in(moraine("eval", here, "--data", here / "left.h5", expect=2).stderr, "config.json")


def score_by_hand(logits: numpy.ndarray, tokens: numpy.ndarray) -> float:
    """Mean nats of tokens[1:] under logits[:-1], in float64."""
    logits = logits.astype(float)
    top = logits.max(-1, keepdims=True)
    return float(numpy.mean((top + numpy.log(numpy.exp(logits - top).sum(-1, keepdims=True)))[:, 0] - logits[numpy.arange(len(tokens) - 1), tokens[1:]]))


def prompting(world: World) -> None:
    world.run("run")
    run, here = world.directory / "run", world.directory
    moraine("export", run, here / "lora", "--to", "peft", "--experts", "left")
    for model in ((run,), (run / "public_model",), (run / "public_model", "--adapter", here / "lora/left")):
        moraine("eval", *model, "--data", here / "left.h5", "--seq-len", 32, "--sequences", 1, "--logits", here / "logits.safetensors")
        stored = load_file(here / "logits.safetensors")
        tokens, logits = stored["tokens"][0], stored["logits"][0]
        text = bytes(tokens.astype(numpy.uint8)).decode()
        score = as_json("eval", *model, "--prompt", text)
        assert score["prompt"] == text and score["prompt_tokens"] == tokens.tolist() and score["tokens"] == score["bytes"] == 32, score
        assert abs(score["loss"] - score_by_hand(logits, tokens)) < 1e-5 and abs(score["bits_per_byte"] - score["loss"] / numpy.log(2)) < 1e-9, score
        first = as_json("eval", *model, "--prompt", text[:-1], "--generate", 1)
        assert first["tokens"] == [logits[-1].argmax()] or first["stopped"] == "end_of_text", first   # 256 is the end of a document
    expect_in(moraine("eval", run, "--prompt", text).stdout, "bits_per_byte", "32")

    base = run / "public_model"
    written = as_json("eval", base, "--prompt", "abc def", "--generate", 20)
    assert written["stopped"] == "max_new_tokens" and len(written["tokens"]) == 20 and written["prompt_tokens"] == list(b"abc def"), written
    spelt = lambda answer: b"".join(bytes([token]) if token < 256 else "\ufffd".encode() for token in answer["tokens"])
    done = subprocess.run([BINARY, "eval", base, "--prompt", "abc def", "--generate", "20"], capture_output=True, check=True)
    assert done.stdout == spelt(written) + b"\n", (done.stdout, written)
    expect_in(done.stderr.decode(), "stopped=max_new_tokens", "tokens_per_s=")
    # Whatever bytes a hot model writes, JSON stays JSON and plain output carries them.
    draw = lambda *more: as_json("eval", base, "--prompt", "abc def", "--generate", 50, "--temperature", 50, *more)
    hot = draw()
    done = subprocess.run([BINARY, "eval", base, "--prompt", "abc def", "--generate", "50", "--temperature", "50"], capture_output=True, check=True)
    assert any(token > 127 for token in hot["tokens"]) and "\ufffd" in hot["text"], hot
    assert done.stdout == spelt(hot) + b"\n", (done.stdout, hot)
    assert hot == draw() == draw("--seed", 0) and hot["tokens"] != draw("--seed", 1)["tokens"]
    assert draw("--top-k", 1)["tokens"][:20] == draw("--top-p", 1e-9)["tokens"][:20] == written["tokens"]

    latin = subprocess.run([BINARY, "eval", base, "--prompt", b"gr\xfcn", "--format", "json"], capture_output=True, check=True)
    assert json.loads(latin.stdout)["prompt_tokens"] == list(b"gr\xfcn"), latin

    full = as_json("eval", base, "--prompt", "a" * 60, "--generate")   # 64 positions
    assert full["stopped"] in ("context", "end_of_text") and len(full["tokens"]) <= 4, full
    refused = lambda *line: moraine("eval", *line, expect=2).stderr
    expect_in(refused(base, "--prompt", "a" * 64, "--generate", 1), "context of 64")
    expect_in(refused(base, "--prompt", "a" * 65), "65 tokens", "64")
    expect_in(refused(base, "--prompt", ""), "prompt is empty")
    expect_in(refused(base, "--prompt", "", "--generate", 3), "prompt is empty")
    expect_in(refused(base, "--prompt", "a"), "first token", "--generate")
    expect_in(refused(base), "--data", "--prompt")
    expect_in(refused(base, "--data", here / "left.h5", "--prompt", "a"), "--data", "--prompt")
    expect_in(refused(base, "--prompt", "ab", "--seq-len", 32), "--seq-len")
    expect_in(refused(base, "--prompt", "ab", "--generate", 0), "--generate")
    expect_in(refused(base, "--prompt", "ab", "--temperature", 1), "--generate")
    expect_in(refused(base, "--prompt", "ab", "--generate", 3, "--top-k", 3), "--temperature")
    expect_in(refused(base, "--prompt", "ab", "--generate", 3, "--temperature", "nan"), "temperature")
    expect_in(refused(base, "--prompt", "ab", "--generate", 3, "--temperature", 1, "--top-p", 0), "top_p")


def prompts_in_the_models_own_tokens(world: World) -> None:
    """A model of 512 tokens with random embeddings beside a tokenizer.json of the golden files."""
    world.run("run")
    run, here, golden = world.directory / "run", world.directory, SOURCE / "tests/data/golden"
    model = here / "model"
    shutil.copytree(run / "public_model", model)
    (model / "SHA256SUMS").unlink()
    tensors, rng = load_file(model / "model.safetensors"), numpy.random.default_rng(1)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = rng.normal(size=(512, 16)).astype(numpy.float32)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "vocab_size": 600}))
    expect_in(moraine("eval", model, "--prompt", "ab", expect=2).stderr, "no tokenizer.json", "600")
    (model / "config.json").write_text(json.dumps({**config, "vocab_size": 512}))
    stored = json.loads((golden / "strings.json").read_text())
    for variant in ("llama3", "smollm2"):
        shutil.copy(golden / f"{variant}.json", model / "tokenizer.json")
        expected = stored["variants"][variant]
        for text in ("It's 12 o'clock.", "a<|endoftext|>b", "\U0001f468\u200d\U0001f469\u200d\U0001f467"):
            i = stored["strings"].index(text)
            score = as_json("eval", model, "--prompt", text)
            assert score["prompt_tokens"] == expected["prefix"] + expected["recognised"][i], text
            # Every token but the first is predicted: after a prefix that is the whole text.
            assert score["tokens"] == len(score["prompt_tokens"]) - 1 and (score["bytes"] == len(text.encode())) == bool(expected["prefix"]), score
            assert as_json("eval", model, "--prompt", text, "--special-tokens", "text")["prompt_tokens"] == expected["prefix"] + expected["text"][i], text
    written = as_json("eval", model, "--prompt", "a b", "--generate", 30)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [511, written["tokens"][7]]}))
    ended = as_json("eval", model, "--prompt", "a b", "--generate", 30)
    at = written["tokens"].index(written["tokens"][7])
    assert ended["stopped"] == "end_of_text" and ended["tokens"] == written["tokens"][:at], (ended, written)
    expect_in(subprocess.run([BINARY, "eval", model, "--prompt", b"gr\xfcn"], capture_output=True).stderr.decode(), "not UTF-8")
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": "end"}))
    expect_in(moraine("eval", model, "--prompt", "ab", expect=2).stderr, "generation_config.json", "eos_token_id")
    (model / "generation_config.json").unlink()
    shutil.copy(golden / "qwen2.json", run / "public_model/tokenizer.json")
    expect_in(moraine("eval", run / "public_model", "--prompt", "ab", expect=2).stderr, "token ids", "264")
    (model / "tokenizer.json").write_text(json.dumps({"model": {"type": "Unigram", "vocab": []}}))
    expect_in(moraine("eval", model, "--prompt", "ab", expect=2).stderr, "tokenizer.json", "Unigram")


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)


def damage_is_noticed(world: World) -> None:
    world.run("run")
    run, here = world.directory / "run", world.directory
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=run / "mixture", check=True)
    evaluate = ("--data", here / "left.h5", "--seq-len", 32, "--sequences", 2)
    moraine("eval", run, *evaluate)
    flip_last_byte(run / "mixture/model.safetensors")
    for command in (("eval", run, *evaluate), ("export", run / "mixture", here / "no", "--to", "flexolmo"), ("import", run / "mixture", here / "no")):
        expect_in(moraine(*command, expect=2).stderr, "model.safetensors", "damaged or changed", "SHA256SUMS")
    assert not (here / "no").exists()
    facts = json.loads(moraine("inspect", run / "mixture", "--format", "json", expect=2).stdout)
    assert list(facts["damaged"]) == ["model.safetensors"], facts.get("damaged")

    artefact = Path(as_json("inspect", run, "train/left")["path"])
    flip_last_byte(artefact)
    facts = json.loads(moraine("inspect", artefact, "--format", "json", expect=2).stdout)
    assert facts["damaged"].endswith(artefact.parent.name + artefact.stem) and facts["sha256"] == sha256(artefact), facts["damaged"]
    expect_in(moraine("inspect", run, "train/left", expect=2).stdout, "damaged", artefact.parent.name + artefact.stem)
    assert "damaged" not in json.loads(moraine("inspect", artefact, "--no-hash", "--format", "json").stdout)

    (here / "model.bin").write_bytes(b"PK\x03\x04" + bytes(60))
    expect_in(moraine("inspect", here / "model.bin", expect=2).stderr, "no safetensors file", "zip archive")
    os.mkfifo(here / "pipe")
    for command in (("inspect", here / "pipe"), ("eval", run / "public_model", "--data", here / "pipe"), ("export", here / "pipe", here / "no", "--to", "peft")):
        expect_in(moraine(*command, expect=2).stderr, "pipe")


def text_and_model_are_compared(world: World) -> None:
    world.run("run")
    run, here = world.directory / "run", world.directory
    shutil.copytree(run / "public_model", here / "model")
    (here / "model/tokenizer.json").write_text(json.dumps({"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}))
    own = "hf:" + sha256(here / "model/tokenizer.json")
    expect_in(moraine("eval", here / "model", "--data", here / "left.h5", "--seq-len", 32, expect=2).stderr, "'bytes-v1'", own, "--tokenizer")
    federated = here / "federated.yaml"
    federated.write_text("name: t\nmethod: fedit\nmodel: {path: model}\ndomains: [{name: left, path: left.h5}]\nclients: {count: 1}\nrounds: 1\n"
                         "seq_len: 32\ntrain: {steps: 1, batch_size: 2}\n")
    expect_in(moraine("validate", federated, expect=2).stderr, "domains.0.path", own)
    (here / "model/tokenizer.json").write_text("{}")   # no tokeniser: nothing to compare, but it goes along
    moraine("validate", federated)
    world.run("two", "model.architecture=null", "model.train=null", f"model.path={here / 'model'}")
    assert (here / "two/mixture/tokenizer.json").read_text() == "{}"
    moraine("export", here / "two", here / "dense", "--to", "flexolmo")
    assert (here / "dense/tokenizer.json").read_text() == "{}"

    shutil.copy(here / "left.h5", here / "edited.h5")
    with h5py.File(here / "edited.h5", "r+") as file:   # other tokens under the old fingerprint
        file["train/tokens"][0] = 7
    expect_in(moraine("eval", run, "--data", here / "edited.h5", "--seq-len", 32, expect=2).stderr, "edited.h5", "not what its fingerprint says")
    expect_in(moraine("validate", world.recipe, f"domains.0.path={here / 'edited.h5'}", expect=2).stderr, "edited.h5", "not what its fingerprint says")


def event_frames(data: bytes):
    """Messages of a TensorBoard event file; both checksums are compared bit by bit."""
    def masked(part: bytes) -> int:
        crc = 0xFFFFFFFF
        for byte in part:
            crc ^= byte
            for _ in range(8):
                crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
        crc ^= 0xFFFFFFFF
        return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF

    while data:
        (length,), stored = struct.unpack("<Q", data[:8]), struct.unpack("<I", data[8:12])[0]
        message, end = data[12:12 + length], struct.unpack("<I", data[12 + length:16 + length])[0]
        assert stored == masked(data[:8]) and end == masked(message)
        yield message
        data = data[16 + length:]


def fields(message: bytes) -> dict:
    """The fields of a protobuf message, by number."""
    def varint():
        nonlocal message
        value = shift = 0
        while True:
            byte, message = message[0], message[1:]
            value, shift = value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    out = {}
    while message:
        key = varint()
        size = {1: 8, 5: 4}.get(key & 7)
        if key & 7 == 0:
            out[key >> 3] = varint()
            continue
        size = varint() if size is None else size
        out[key >> 3], message = message[:size], message[size:]
    return out


def tensorboard_files(world: World) -> None:
    world.run("run")
    found, root = {}, world.directory / "run" / "tensorboard"
    for file in root.rglob("events.out.tfevents.*"):
        first, *rest = (fields(message) for message in event_frames(file.read_bytes()))
        assert first[3] == b"brain.Event:2"
        for event in rest:
            value = fields(fields(event[5])[1])
            assert abs(struct.unpack("<d", event[1])[0] - file.stat().st_mtime) < 3600
            found[str(file.parent.relative_to(root)), value[1].decode(), event.get(2, 0)] = struct.unpack("<f", value[2])[0]
    lines = [json.loads(line) for line in (world.directory / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines and found == {(line["unit"], line["key"], line["step"]): float(numpy.float32(line["value"])) for line in lines}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="moraine-cli-") as temporary:
        globals()[sys.argv[2]](World(Path(temporary)))
