#!/usr/bin/env python3
"""Runs federated recipes as a user would and checks every aggregation against NumPy in float64: federated_test.py BINARY
CLAIM. The oracle reads the contributions out of the run directory and follows the papers' equations."""
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file
from safetensors import safe_open

from run_test import BINARY, SOURCE, World, expect_in, same_losses

RECIPE = f"""
name: tiny
method: fedit
model: {{path: {SOURCE}/recipes/models/tiny-public}}
domains:
  - {{name: left, path: left.h5}}
  - {{name: right, path: right.h5}}
seq_len: 32
clients: {{count: 5, partition: dirichlet, alpha: 2.0, per_round: 4}}
rounds: 3
lora: {{rank: 4, alpha: 8, target_modules: [q_proj, down_proj]}}
train: {{steps: 3, batch_size: 2, learning_rate: 1e-2, schedule: constant, log_every: 3}}
evaluation: {{sequences: 2, batch_size: 2}}
workers: {{local: 2}}
"""
SCALE = 2.0


class Federation(World):
    def __init__(self, directory: Path):
        super().__init__(directory)
        self.recipe.write_text(RECIPE)

    def artefacts(self, run: str) -> list[tuple[dict, dict[str, np.ndarray]]]:
        found = []
        for path in sorted((self.directory / run / "artefacts").rglob("*.safetensors")):
            with safe_open(path, "numpy") as file:
                meta = json.loads(file.metadata()["moraine"])
            found.append((meta, {name: tensor.astype(np.float64) for name, tensor in load_file(path).items()}))
        return found

    def rounds(self, run: str):
        """Per round: the contributions in the order of the clients' names and the state they became."""
        found = self.artefacts(run)
        states = {meta["round"]: (meta, tensors) for meta, tensors in found if meta["kind"] == "adapter" and "weights" in meta}
        for number in sorted(states):
            updates = sorted(((meta, tensors) for meta, tensors in found if meta["kind"] == "update" and meta["round"] == number),
                             key=lambda update: update[0]["client"])
            yield updates, *states[number]


def load_any(path: Path) -> dict[str, np.ndarray]:
    """Float64 tensors of a safetensors file of float32 or bfloat16, which NumPy does not know."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    tensors = {}
    for name, view in json.loads(data[8:start]).items():
        if name == "__metadata__":
            continue
        raw = data[start + view["data_offsets"][0]:start + view["data_offsets"][1]]
        values = np.frombuffer(raw, np.float32) if view["dtype"] == "F32" else (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32)
        tensors[name] = values.reshape(view["shape"]).astype(np.float64)
    return tensors


def is_start(path: Path) -> bool:
    with safe_open(path, "numpy") as file:
        meta = json.loads(file.metadata()["moraine"])
    return meta["kind"] == "adapter" and "round" not in meta


def close(actual: np.ndarray, expected: np.ndarray, what: str) -> None:
    # States are float32: one rounding of the sum, a few of the factors of a stack or a residual.
    np.testing.assert_allclose(actual, expected, rtol=3e-7, atol=3e-7 * np.abs(expected).max() + 1e-30, err_msg=what)


def sample_weights(updates) -> np.ndarray:
    samples = np.array([meta["samples"] for meta, _ in updates], dtype=np.float64)
    return samples / samples.sum()


def slots(tensors) -> list[str]:
    return sorted({name.rsplit(".", 2)[0] if ".lora_" in name else name.rsplit(".", 1)[0] for name in tensors if name.startswith("model.")})


def aggregates_equal_numpy(world: Federation) -> None:
    for method in ("fedit", "ffa_lora"):
        world.run(method, f"method={method}")
        for updates, meta, state in world.rounds(method):
            assert len(updates) == 4
            close(np.array(meta["weights"]), sample_weights(updates), "weights")
            factors = ("lora_A.weight", "lora_B.weight") if method == "fedit" else ("lora_B.weight",)
            names = [f"{slot}.{factor}" for slot in slots(state) for factor in factors]
            assert sorted(state) == sorted(names), "what is not trained is not sent"
            for _, sent in updates:
                assert sorted(sent) == sorted(names), "what is not trained is not sent"
            for name in names:
                close(state[name], sum(p * sent[name] for p, (_, sent) in zip(sample_weights(updates), updates)), name)

    # FLoRA: ranks differ, the stack's product is the exact mean of the products, in any order of the clients.
    world.run("flora", "method=flora", "clients.ranks=[4, 2]")
    for updates, meta, state in world.rounds("flora"):
        for slot in slots(state):
            expected = sum(p * SCALE * sent[f"{slot}.lora_B.weight"] @ sent[f"{slot}.lora_A.weight"] for p, (_, sent) in zip(sample_weights(updates), updates))
            assert state[f"{slot}.base_A"].shape[0] == sum(meta["rank"] for meta, _ in updates)
            close(state[f"{slot}.base_B"] @ state[f"{slot}.base_A"], expected, slot)

    # FedEx: the mean of the products is what base change and averaged factors give together; the residual's rank is at most (K - 1) r.
    world.run("fedex", "method=fedex_lora", "clients.weighting=uniform", "clients.per_round=2")
    for updates, meta, state in world.rounds("fedex"):
        close(np.array(meta["weights"]), np.full(2, 0.5), "weights")
        for slot in slots(state):
            product = sum(0.5 * sent[f"{slot}.lora_B.weight"] @ sent[f"{slot}.lora_A.weight"] for _, sent in updates)
            residual = state[f"{slot}.base_B"] @ state[f"{slot}.base_A"]
            close(residual + SCALE * state[f"{slot}.lora_B.weight"] @ state[f"{slot}.lora_A.weight"], SCALE * product, slot)
            (_, one), (_, two) = updates
            bias = 0.25 * SCALE * (one[f"{slot}.lora_B.weight"] - two[f"{slot}.lora_B.weight"]) @ (one[f"{slot}.lora_A.weight"] - two[f"{slot}.lora_A.weight"])
            close(residual, bias, slot)   # K = 2: p1 p2 (B1 - B2)(A1 - A2)
            singular = np.linalg.svd(residual, compute_uv=False)
            assert (singular[4:] <= 1e-6 * singular[0]).all(), singular[:8]

    # FlexLoRA: the best approximation of the mean change, of every rank; a client starts from that of its own.
    world.run("flex", "method=flexlora", "clients.ranks=[4, 2]")
    for updates, meta, state in world.rounds("flex"):
        for slot in slots(state):
            a, b = state[f"{slot}.lora_A.weight"], state[f"{slot}.lora_B.weight"]
            mean = sum(p * sent[f"{slot}.lora_B.weight"] @ sent[f"{slot}.lora_A.weight"] for p, (_, sent) in zip(sample_weights(updates), updates))
            u, s, vt = np.linalg.svd(mean, full_matrices=False)
            np.testing.assert_allclose(a @ a.T, np.eye(4), atol=1e-6)
            for rank in (1, 2, 4):
                close(b[:, :rank] @ a[:rank], u[:, :rank] * s[:rank] @ vt[:rank], f"{slot} {rank}")
    sent_to_two = [tensors for meta, tensors in world.artefacts("flex") if meta["kind"] == "adapter" and meta["rank"] == 2]
    assert sent_to_two and all(tensor.shape[0 if "lora_A" in name else 1] == 2 for tensors in sent_to_two for name, tensor in tensors.items())

    # HetLoRA: weights by the norm of the update, zeros where a client has no direction, ranks that never grow.
    world.run("het", "method=hetlora", "clients.ranks=[4, 3]", "pruning.gamma=0.5", "pruning.lambda=0.5")
    ranks: dict[str, int] = {}
    shrunk = False
    for updates, meta, state in world.rounds("het"):
        names = [name for name in state if name.startswith("model.")]
        norms = np.array([np.sqrt(sum(np.linalg.norm(sent[f"{slot}.lora_B.weight"] @ sent[f"{slot}.lora_A.weight"]) ** 2 for slot in slots(sent))) for _, sent in updates])
        weights = norms / norms.sum()
        for name in names:
            padded = np.zeros_like(state[name])
            for p, (_, sent) in zip(weights, updates):
                rows, columns = sent[name].shape
                padded[:rows, :columns] += p * sent[name]
            close(state[name], padded, name)
        for meta_of_client, sent in updates:
            rank = meta_of_client["rank"]
            before = ranks.get(meta_of_client["client"], 4)
            assert rank <= before, "ranks never grow"
            shrunk |= rank < before
            ranks[meta_of_client["client"]] = rank
            assert all(tensor.shape[0 if "lora_A" in name else 1] == rank for name, tensor in sent.items())
    assert shrunk, "half the rank under a strong penalty must be cut for somebody"


def server_optimisers_equal_numpy(world: Federation) -> None:
    b1, b2, eta, tau = 0.9, 0.99, 0.01, 1e-3
    for optimizer in ("fedavgm", "fedadam"):
        world.run(optimizer, f"server.optimizer={optimizer}", f"server.learning_rate={eta}")
        before: dict[str, np.ndarray] = {}
        for updates, _, state in world.rounds(optimizer):
            for name in (name for name in state if name.startswith("model.")):
                x = before.get(name, np.zeros_like(state[name]) if "lora_B" in name else None)
                if x is None:
                    continue   # A of the first round follows from the seed, which the oracle does not know
                change = sum(p * sent[name] for p, (_, sent) in zip(sample_weights(updates), updates)) - x
                if optimizer == "fedavgm":
                    velocity = b1 * before["m." + name] + (1 - b1) * change if before else change
                    expected = x + velocity
                else:
                    mean = b1 * before.get("m." + name, 0 * x) + (1 - b1) * change
                    square = b2 * before.get("v." + name, 0 * x + tau**2) + (1 - b2) * change**2
                    expected = x + eta * mean / (np.sqrt(square) + tau)
                # The average is rounded to float32 before the step: 6e-8 of it enters the change.
                np.testing.assert_allclose(state[name], expected, rtol=1e-5, atol=1e-7, err_msg=name)
            before = state


def results_do_not_depend_on_workers_or_kills(world: Federation) -> None:
    for method in ("fedex_lora", "hetlora"):
        ranks = ["clients.ranks=[4, 2]"] if method == "hetlora" else []
        for workers in (1, 2, 4):
            world.run(f"{method}{workers}", f"method={method}", f"workers.local={workers}", *ranks)
        assert len({world.hash(f"{method}{workers}") for workers in (1, 2, 4)}) == 1
    for sign in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        process = subprocess.Popen(world.command("killed", "method=fedex_lora"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        trained = 0
        for line in process.stderr:           # in the middle of a round
            trained += "unit finished" in line and "train/" in line
            if trained == 3:
                process.send_signal(sign)
                break
        process.stderr.read()
        process.wait(timeout=120)
    world.run("killed", "method=fedex_lora")
    assert world.hash("killed") == world.hash("fedex_lora2")


ADAPTERS = {
    "dora": ["lora.type=dora"],
    "vera": ["lora.type=vera", "lora.rank=8"],
    "pissa": ["lora.init=pissa"],
    "adaptertune": ["lora.type=adaptertune", "lora.target_modules=[all-linear]"],
}


def adapters_of_any_type_travel(world: Federation) -> None:
    shorter = ["rounds=2", "clients.count=3", "clients.per_round=0", "evaluation.sequences=1", "lora.alpha=8"]
    for name, keys in ADAPTERS.items():
        for workers in (1, 3):
            world.run(f"{name}{workers}", *shorter, *keys, f"workers.local={workers}")
        assert world.hash(f"{name}1") == world.hash(f"{name}3"), name
        sent = {key for updates, _, _ in world.rounds(f"{name}1") for _, tensors in updates for key in tensors}
        for updates, _, state in world.rounds(f"{name}1"):
            assert set(state) == sent, "a state is what clients train"
            for key in state:
                close(state[key], sum(p * tensors[key] for p, (_, tensors) in zip(sample_weights(updates), updates)), key)
    # What follows from the base's weights is made once and sent once to every client.
    starts = [tensors for meta, tensors in world.artefacts("pissa1") if meta["kind"] == "adapter" and "round" not in meta]
    assert len(starts) == 1 and any(".lora_A0" in name for name in starts[0]), list(starts[0])[:4]
    tables = json.loads((world.directory / "pissa1" / "summary.json").read_text())["tables"]
    down = [row["down"] for row in next(table for table in tables if table["title"] == "Bytes up and down")["rows"]]
    start, = {path.stat().st_size for path in (world.directory / "pissa1" / "artefacts").rglob("*.safetensors") if is_start(path)}
    assert down[0] == 3 * start and 0 < down[1] < down[0], (down, start)

    # Killed in the middle of a round and run again.
    process = subprocess.Popen(world.command("killed", *shorter, *ADAPTERS["dora"]), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if "unit finished" in line and "train/2/" in line:
            process.kill()
            break
    process.stderr.read()
    process.wait(timeout=120)
    world.run("killed", *shorter, *ADAPTERS["dora"])
    assert world.hash("killed") == world.hash("dora1")

    # The global adapter in the forms it has.
    for name, peft, hf in (("dora", "LORA", True), ("vera", "VERA", True), ("pissa", "LORA", True), ("adaptertune", None, False)):
        for form, has in (("peft", peft is not None), ("hf", hf)):
            out = world.directory / f"{name}.{form}"
            done = subprocess.run([BINARY, "export", str(world.directory / f"{name}1"), str(out), "--to", form], capture_output=True, text=True)
            assert done.returncode == (0 if has else 2), done.stderr
            if not has:
                expect_in(done.stderr, "adaptertune", "PEFT knows no adapter" if form == "peft" else "no change of weights")
        if peft:
            config = json.loads((world.directory / f"{name}.peft" / "adapter_config.json").read_text())
            assert config["peft_type"] == peft and config.get("use_dora", False) == (name == "dora"), config
    merged, base = load_any(world.directory / "pissa.hf" / "model.safetensors"), load_any(SOURCE / "recipes/models/tiny-public/model.safetensors")
    adapter = load_file(world.directory / "pissa.peft" / "adapter_model.safetensors")
    slot = "model.layers.0.self_attn.q_proj"
    a, b = (adapter[f"base_model.model.{slot}.lora_{factor}.weight"].astype(np.float64) for factor in "AB")
    assert a.shape[0] == 8, "a PiSSA is a LoRA of twice its rank"
    assert merged.keys() == base.keys()
    change = 2.0 * b @ a
    step = np.abs(base[f"{slot}.weight"]).max() * 2**-8   # the model is bfloat16
    np.testing.assert_allclose(merged[f"{slot}.weight"], base[f"{slot}.weight"] + change, atol=step)


def clients_trained_by_groups_equal_one_process(world: Federation) -> None:
    world.run("one", "rounds=2")
    world.run("threads", "rounds=2", "workers.group_size=2", "workers.local=4")
    same_losses(world.directory / "one", world.directory / "threads")
    if not shutil.which("mpirun"):
        print("skipped: no mpirun")
        sys.exit(77)
    world.run("processes", "rounds=2", "workers.group_size=2", processes=3)
    assert world.hash("processes") == world.hash("threads")


def bad_federations_are_refused(world: Federation) -> None:
    cases = {
        ("clients.count=400", "clients.alpha=0.01", "clients.per_round=0"): ("clients have no data", "clients.alpha"),
        ("clients.per_round=9",): ("per_round 9 is more than the 5 clients",),
        ("clients.ranks=[4, 2]",): ("clients.ranks", "flexlora, flora or hetlora"),
        ("method=flora", "server.optimizer=fedadam"): ("server.optimizer", "fedavg"),
        ("method=fedti",): ("no method 'fedti'", "fedit"),
        ("lora.target_modules=[q_porj]",): ("q_porj",),
        ("lora.rank=4000",): ("rank 4000 does not fit",),
        ("model.path=nowhere",): ("nowhere",),
        ("comparisons=[central]",): ("comparisons", "centralised"),
        ("lora.type=lora_sb", "lora.alpha=4"): ("lora.type", "lora_sb starts from examples", "would tell of its data"),
        ("method=flora", "lora.type=dora"): ("type dora is no product of factors", "method: fedit"),
        ("method=ffa_lora", "lora.type=lora_xs"): ("all that type lora_xs trains averages exactly", "method: fedit"),
        ("lora.type=ia3", "lora.rank=8", "lora.alpha=8", "lora.options={feedforward_modules: [up_proj]}"): ("up_proj",),
        ("clients.partition=domain", "clients.count=1", "clients.per_round=0"): ("at least one client per domain",),
    }
    for overrides, parts in cases.items():
        expect_in(world.run("refused", *overrides, expect=2).stderr, *parts)
    assert not (world.directory / "refused").exists()


def clients_that_fail_end_the_round_or_are_left_out(world: Federation) -> None:
    fault = {"MORAINE_FAULT": "nan@train/2/client-3:9"}
    world.run("all", "clients.per_round=0", "rounds=2")
    done = world.run("failed", "clients.per_round=0", "rounds=2", env=fault, expect=4)
    expect_in(done.stderr, "train/2/client-3", "loss is nan")
    kept = world.units_done("failed")
    assert kept >= 9, f"a round and four clients are kept: {kept}"
    world.run("failed", "clients.per_round=0", "rounds=2")
    assert world.hash("failed") == world.hash("all")
    done = world.run("tolerant", "clients.per_round=0", "rounds=2", "clients.min_per_round=4", env=fault)
    expect_in(done.stderr, "left out of the round")
    tables = json.loads((world.directory / "tolerant" / "summary.json").read_text())["tables"]
    left_out = next(table for table in tables if table["title"] == "Contributions left out")
    assert [(row["round"], row["client"]) for row in left_out["rows"]] == [(2, "client-3")], left_out
    assert world.hash("tolerant") != world.hash("all")
    # A client that fails in the middle of a round for another reason than its numbers is tried again.
    done = world.run("retried", "clients.per_round=0", "rounds=2", env={"MORAINE_FAULT": "throw@train/2/client-1:1"})
    expect_in(done.stderr, "train/2/client-1", "attempt=2")
    assert world.hash("retried") == world.hash("all")


def main() -> None:
    claims = {f.__name__: f for f in (aggregates_equal_numpy, server_optimisers_equal_numpy, adapters_of_any_type_travel, results_do_not_depend_on_workers_or_kills,
                                      clients_trained_by_groups_equal_one_process, bad_federations_are_refused, clients_that_fail_end_the_round_or_are_left_out)}
    with tempfile.TemporaryDirectory() as directory:
        claims[sys.argv[2]](Federation(Path(directory)))
    print("ok")


if __name__ == "__main__":
    main()
