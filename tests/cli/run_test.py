#!/usr/bin/env python3
"""Runs the moraine binary as a user would, on two small domains: run_test.py BINARY CLAIM. Exit code 77 = skipped."""
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[2]
BINARY = sys.argv[1]

RECIPE = """
name: tiny
method: flexmore
model:
  architecture: {vocab_size: 264, hidden_size: 16, intermediate_size: 24, num_layers: 2, num_heads: 2, max_position_embeddings: 64}
  train: {steps: 6, batch_size: 4, checkpoint_every: 2}
public_path: public.h5
domains:
  - {name: left, path: left.h5}
  - {name: right, path: right.h5, rank: 4, train: direct}
seq_len: 32
train: {steps: STEPS, batch_size: 4, checkpoint_every: 5, log_every: 5}
router: {embedding_sequences: 4}
ranks: {candidates: [2, 4], budget: 0.9}
evaluation: {sequences: 4, validation_sequences: 4, batch_size: 4}
workers: {local: 2}
"""


def mpirun(processes: int) -> list[str]:
    line = ["mpirun", "-n", str(processes), "--oversubscribe", "--bind-to", "none"]
    return line + (["--allow-run-as-root"] if os.geteuid() == 0 else [])


class World:
    """A temporary directory with prepared text and a recipe."""

    def __init__(self, directory: Path, steps: int = 8):
        self.directory = directory
        for name, alphabet in (("public", "etaoin shrdlu"), ("left", "abcdefg "), ("right", "uvwxyz.; ")):
            rng = random.Random(name)
            text = directory / f"{name}.jsonl"
            with text.open("w") as out:
                for _ in range(60):
                    out.write(json.dumps({"text": "".join(rng.choice(alphabet) for _ in range(400))}) + "\n")
            subprocess.run([sys.executable, SOURCE / "scripts/prepare_text.py", "--name", name, "--out", directory / f"{name}.h5",
                            "--validation", "0.2", "--test", "0.2", text], check=True, capture_output=True)
        self.recipe = directory / "recipe.yaml"
        self.recipe.write_text(RECIPE.replace("STEPS", str(steps)))

    def command(self, run: str, *overrides: str, processes: int = 0) -> list[str]:
        line = [BINARY, "run", str(self.recipe), *overrides, "--run-dir", str(self.directory / run)]
        return mpirun(processes) + line if processes else line

    def run(self, run: str, *overrides: str, processes: int = 0, expect: int = 0, env: dict | None = None,
            largest_file: int = resource.RLIM_INFINITY) -> subprocess.CompletedProcess:
        limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
        done = subprocess.run(self.command(run, *overrides, processes=processes), capture_output=True, text=True, timeout=300,
                              env={**os.environ, **(env or {})}, preexec_fn=limit)
        if done.returncode != expect:
            sys.exit(f"exit code {done.returncode}, expected {expect}\n{done.stdout}\n{done.stderr}")
        return done

    def hash(self, run: str) -> str:
        value = json.loads((self.directory / run / "summary.json").read_text())["hash"]
        assert len(value) == 64, value
        return value

    def units_done(self, run: str) -> int:
        listing = subprocess.run([BINARY, "ls", str(self.directory / run), "--format", "json"], capture_output=True, text=True, check=True)
        return sum(row["state"] == "done" for row in json.loads(listing.stdout))


def expect_in(text: str, *parts: str) -> None:
    for part in parts:
        assert part in text, f"no {part!r} in:\n{text}"


def workers_do_not_change_the_merged_hash(world: World) -> None:
    for workers in (1, 2, 4):
        world.run(f"w{workers}", f"workers.local={workers}")
    assert world.hash("w1") == world.hash("w2") == world.hash("w4")
    world.run("seed", "seed=2")
    assert world.hash("seed") != world.hash("w1"), "another seed must give another mixture"


def mpi_equals_local(world: World) -> None:
    if not shutil.which("mpirun"):
        print("skipped: no mpirun")
        sys.exit(77)
    world.run("local")
    world.run("mpi", processes=3)
    assert world.hash("local") == world.hash("mpi")
    world.run("crowd", processes=8)   # more processes than units can use
    assert world.hash("crowd") == world.hash("local")
    done = world.run("one", processes=1, expect=2)
    expect_in(done.stderr, "nobody works")
    done = world.run("bad", "trian.steps=3", processes=3, expect=2)
    assert done.stderr.count("trian: unknown key") == 1, done.stderr


def same_losses(one: Path, group: Path) -> None:
    """Every training loss of two runs, one of them by groups: a mean of float32 losses summed in another order."""
    losses = []
    for run in (one, group):
        with (run / "metrics.jsonl").open() as lines:
            records = [json.loads(line) for line in lines]
        losses.append({(r["unit"], r["step"]): r["value"] for r in records if r["key"] == "train_loss"})
    assert losses[0].keys() == losses[1].keys() and losses[0], losses
    for key, loss in losses[0].items():
        assert abs(losses[1][key] - loss) < 1e-4 * loss, (key, loss, losses[1][key])


def a_group_of_threads_equals_a_group_of_processes(world: World) -> None:
    world.run("threads", "workers.group_size=2")                # workers.local: 2, so one worker of two members
    world.run("again", "workers.group_size=2", "workers.local=4", "workers.overlap=false", "workers.bucket_mib=0")
    assert world.hash("again") == world.hash("threads"), "two workers, other pieces: the same bits"
    world.run("one")
    same_losses(world.directory / "one", world.directory / "threads")
    assert world.units_done("threads") == world.units_done("one")
    done = world.run("threads", "workers.group_size=1", expect=2)
    expect_in(done.stderr, "workers.group_size: 2 -> 1", "--accept-changes")
    done = world.run("refused", "workers.group_size=2", "workers.local=3", expect=2)
    expect_in(done.stderr, "3 working processes cannot be divided into groups of 2", "hint: ")
    if not shutil.which("mpirun"):
        print("skipped: no mpirun")
        sys.exit(77)
    world.run("processes", "workers.group_size=2", processes=5)
    assert world.hash("processes") == world.hash("threads")
    done = world.run("refused", "workers.group_size=2", processes=4, expect=2)
    assert done.stderr.count("3 working processes cannot be divided into groups of 2") == 1, done.stderr
    expect_in(done.stderr, "mpirun -n 3 or 5")
    assert not (world.directory / "refused").exists(), "a refused recipe leaves nothing behind"


def a_stopped_or_killed_group_continues_to_the_same_hash(world: World) -> None:
    world.recipe.write_text(RECIPE.replace("STEPS", "150") + "\n")
    world.run("whole", "workers.group_size=2")
    done = world.run("failing", "workers.group_size=2", env={"MORAINE_FAULT": "throw@train/left:1,nan@train/right:1"})
    expect_in(done.stderr, "attempt=2")
    assert world.hash("failing") == world.hash("whole")
    if not shutil.which("mpirun"):
        print("skipped: no mpirun")
        sys.exit(77)
    done = subprocess.run(world.command("killed", "workers.group_size=2", processes=3), capture_output=True, text=True, timeout=300,
                          env={**os.environ, "MORAINE_FAULT": "member@train/left:60"})
    assert done.returncode != 0, "a member died"
    assert "train/left" in done.stderr
    done = world.run("killed", "workers.group_size=2", processes=3)
    expect_in(done.stderr, "training resumed: unit=train/left")
    assert world.hash("killed") == world.hash("whole")


def several_hosts_equal_one(world: World) -> None:
    world.run("local", "workers.group_size=2")
    line = [str(SOURCE / "scripts/namespace_hosts"), "3", "1", *world.command("hosts", "workers.group_size=2")]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300)
    if done.returncode == 77 or not shutil.which("mpirun"):
        print(done.stdout)
        sys.exit(77)
    assert done.returncode == 0, done.stderr
    assert world.hash("hosts") == world.hash("local"), "a group whose members sit on two hosts"


def killed_runs_continue_to_the_same_hash(world: World) -> None:
    world.recipe.write_text(RECIPE.replace("STEPS", "400"))
    world.run("whole")
    for number, sign in enumerate((signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGKILL)):
        process = subprocess.Popen(world.command("killed"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        started = 0
        for line in process.stderr:           # kill when a unit beyond those of the last start is under way
            started += "unit starts" in line
            if started > number:
                for _ in range(2 if sign == signal.SIGTERM else 1):   # as launchers do: once to the process, once to its group
                    process.send_signal(sign)
                break
        rest = process.stderr.read()
        code = process.wait(timeout=120)
        if code == 0:
            break                             # finished before the signal came
        assert code == (-9 if sign == signal.SIGKILL else 75), f"{code}\n{rest}"
    world.run("killed")
    assert world.hash("killed") == world.hash("whole")


def failed_units_are_retried_then_end_the_run(world: World) -> None:
    world.run("whole")
    done = world.run("once", env={"MORAINE_FAULT": "throw@train/left:1"})
    expect_in(done.stderr, "train/left", "attempt=2")
    assert world.hash("once") == world.hash("whole")
    units = json.loads((world.directory / "once" / "summary.json").read_text())["timeline"]["units"]
    failed = next(unit for unit in units if unit["status"] == "failed")
    assert failed["kind"] == "train_expert" and failed["start_s"] <= failed["end_s"], failed
    done = world.run("nan", env={"MORAINE_FAULT": "nan@train/left:3"}, expect=4)
    expect_in(done.stderr, "train/left", "step")
    kept = world.units_done("nan")
    assert kept > 0, "what finished must be kept"
    (world.directory / "nan" / "report.html").unlink()
    (world.directory / "nan" / "report.html").mkdir()   # a report that cannot be written hides neither this exit code
    done = world.run("nan", env={"MORAINE_FAULT": "nan@train/left:3"}, expect=4)
    expect_in(done.stderr, "the report was not written")
    world.run("nan", expect=3)   # nor itself
    (world.directory / "nan" / "report.html").rmdir()
    world.run("nan")
    assert world.hash("nan") == world.hash("whole")


def a_full_disk_ends_the_run_and_loses_nothing(world: World) -> None:
    world.run("origin")
    base = ("model.architecture=null", "model.train=null", f"model.path={world.directory / 'origin' / 'public_model'}")
    world.run("whole", *base)
    largest = max(p.stat().st_size for p in (world.directory / "whole" / "artefacts").rglob("*.safetensors"))
    done = world.run("full", *base, expect=3, largest_file=largest - 1)   # the largest artefact no longer fits
    expect_in(done.stderr, "moraine: ", "File too large", "hint: ")
    assert not list((world.directory / "full").rglob("*.tmp")), "a failed write leaves no piece behind"
    kept = world.units_done("full")
    assert kept > 0, "what finished must be kept"
    done = world.run("full", *base)
    assert world.hash("full") == world.hash("whole")
    assert done.stderr.count("coordinator unit starts") == world.units_done("whole") - kept, done.stderr


def second_run_reuses_everything(world: World) -> None:
    world.run("run")
    before = world.hash("run")
    done = world.run("run")
    assert "unit starts" not in done.stderr, done.stderr
    assert world.hash("run") == before
    done = world.run("run", "top_k=3", "--accept-changes")
    assert "train/" not in done.stderr and "test/mixture" in done.stderr, done.stderr


def bad_recipes_are_refused(world: World) -> None:
    cases = {
        ("train.stesp=3",): ("train.stesp", "unknown key", "did you mean 'steps'"),
        ("train.steps=many",): ("train.steps", "many"),
        ("train.steps=0",): ("train.steps", "0"),
        ("domains.1.rank=-4",): ("rank must be positive: -4",),
        ("domains.1.rank=0",): ("rank must be positive: 0",),
        ("domains.1.rank=17",): ("rank 17 is above 16",),
        ("top_k=9",): ("top_k 9 is more than the 3 experts",),
        ("public_path=nowhere.h5",): ("nowhere.h5",),
        ("tokenizer=hf:other",): ("tokeni",),
        ("workers.device=cuda",): ("CUDA",),
        ("seq_len=65",): ("seq_len", "64"),
    }
    for overrides, parts in cases.items():
        done = world.run("refused", *overrides, expect=2)
        expect_in(done.stderr, *parts)
    world.recipe.write_text(RECIPE.replace("STEPS", "8") + "seq_len: 16\n")
    expect_in(world.run("refused", expect=2).stderr, "seq_len", "twice")
    expect_in(subprocess.run([BINARY, "run", "no/such.yaml"], capture_output=True, text=True).stderr, "no/such.yaml")
    (world.directory / "binary.txt").write_bytes(bytes(range(256)) * 40)
    (world.directory / "empty.txt").write_text("")
    for name, part in (("binary", "binary"), ("empty", "empty")):
        done = subprocess.run([sys.executable, SOURCE / "scripts/prepare_text.py", "--name", name, "--out", world.directory / f"{name}.h5",
                               world.directory / f"{name}.txt"], capture_output=True, text=True)
        assert done.returncode == 2 and not (world.directory / f"{name}.h5").exists(), f"{done.returncode} {done.stderr}"
        expect_in(done.stderr, part)
    assert not (world.directory / "refused").exists(), "a refused recipe leaves nothing behind"


def run_directories_are_protected(world: World) -> None:
    world.run("run")
    expect_in(world.run("run", "train.steps=9", expect=2).stderr, "train.steps: 8 -> 9", "--accept-changes")
    (world.directory / "other").mkdir()
    (world.directory / "other" / "thesis.txt").write_text("mine")
    expect_in(world.run("other", expect=2).stderr, "thesis.txt")
    world.recipe.write_text(RECIPE.replace("STEPS", "2000"))
    first = subprocess.Popen(world.command("busy"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    for line in first.stderr:
        if "unit starts" in line:
            break
    refused = world.run("busy", expect=2).stderr
    expect_in(refused, "in use by process", str(first.pid))
    assert "worker lost" not in refused, refused   # one error, one message
    first.kill()
    first.communicate()


def damaged_files_are_named(world: World) -> None:
    world.run("run")
    before = world.hash("run")
    victim = max((world.directory / "run" / "artefacts").rglob("*.safetensors"), key=lambda p: p.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-7])
    expect_in(world.run("run").stderr, "unit starts")   # made again
    assert world.hash("run") == before
    model = world.directory / "run" / "public_model"
    base = ("model.architecture=null", "model.train=null", f"model.path={model}")
    world.run("from_directory", *base)
    weights = model / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    expect_in(world.run("refused", *base, expect=2).stderr, "model.safetensors", "truncated")
    weights.unlink()
    expect_in(world.run("refused", *base, expect=2).stderr, "model.safetensors")


def listings_and_reports(world: World) -> None:
    world.run("run")
    resolved = world.directory / "resolved.yaml"   # a recipe of its own: every value, next to the same data
    shutil.copy(world.directory / "run" / "resolved.yaml", resolved)
    subprocess.run([BINARY, "run", resolved, "--run-dir", world.directory / "again"], capture_output=True, check=True)
    assert world.hash("again") == world.hash("run")
    run = str(world.directory / "run")
    summary = json.loads(subprocess.run([BINARY, "report", run, "--format", "json"], capture_output=True, text=True, check=True).stdout)
    assert summary["complete"] and len(summary["tables"]) >= 2
    bits = {row["domain"]: row for row in summary["tables"][0]["rows"]}
    assert 0 < bits["left"]["base"] < 12
    assert (world.directory / "run" / "report.html").stat().st_size > 10_000
    assert (world.directory / "run" / "mixture" / "config.json").exists()
    for format_ in ("text", "markdown", "csv"):
        text = subprocess.run([BINARY, "report", run, "--format", format_], capture_output=True, text=True, check=True).stdout
        expect_in(text, "left", "right")
    (world.directory / "left.h5").unlink()   # a report needs the run directory alone
    subprocess.run([BINARY, "report", run], capture_output=True, text=True, check=True)
    values = json.loads(subprocess.run([BINARY, "validate", str(world.recipe), "train.steps=5", "--schema-only", "--format", "json"],
                                       capture_output=True, text=True, check=True).stdout)
    steps = next(v for v in values if v["key"] == "train.steps")
    assert steps["value"] == "5" and "command line" in steps["origin"], steps
    for command in ("run", "validate", "params", "report", "ls", "env"):
        expect_in(subprocess.run([BINARY, command, "--help"], capture_output=True, text=True, check=True).stdout, "Example")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="moraine-cli-") as temporary:
        globals()[sys.argv[2]](World(Path(temporary)))
