#!/usr/bin/env python3
"""Time per training step in groups: measure_groups.py BINARY DIRECTORY ROUNDS [key=value ...]; called by scripts/evidence groups.

Every round runs every configuration once, one after the other: the first steps of the quickstart's public model. Time
per step comes from tokens_per_s of metrics.jsonl, without the first logged interval (start-up); the best of all rounds counts. CPU seconds
per wall second of the whole machine during a run, less the run's own, show what else was going on.
"""
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

binary, directory, rounds, settings = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
RECIPE = Path("recipes/flexmore/public_base.yaml")
SHORT = ["model.train.steps=24", "model.train.log_every=4", "model.train.warmup_steps=4", "evaluation.sequences=1", "workers.threads=1"]
BATCH_TOKENS = 16 * 256   # of the recipe: sequences times their length
LAUNCH = ["mpirun", "--oversubscribe", "--bind-to", "none"] + (["--allow-run-as-root"] if os.geteuid() == 0 else [])
CASES = {   # name: (processes under mpirun or 0, settings)
    "1 process, 1 thread": (0, ["workers.local=1"]),
    "group of 2 threads": (0, ["workers.local=2", "workers.group_size=2"]),
    "group of 2 threads, no overlap": (0, ["workers.local=2", "workers.group_size=2", "workers.overlap=false"]),
    "group of 2 processes": (3, ["workers.group_size=2"]),
    "group of 2 processes, no overlap": (3, ["workers.group_size=2", "workers.overlap=false"]),
    "group of 2 processes, each tensor alone": (3, ["workers.group_size=2", "workers.bucket_mib=0"]),
    "group of 2 processes, 64 MiB buckets": (3, ["workers.group_size=2", "workers.bucket_mib=64"]),
}


def machine_busy() -> float:
    user, nice, system, idle, *_ = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:6])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


def run(name: str, number: int) -> tuple[float, float, str]:
    processes, own = CASES[name]
    target = directory / f"{number}-{name.replace(' ', '_').replace(',', '')}"
    line = [binary, "run", str(RECIPE), *SHORT, *settings, *own, "--run-dir", str(target)]
    busy, times, start = machine_busy(), os.times(), time.monotonic()
    done = subprocess.run(([*LAUNCH, "-n", str(processes)] if processes else []) + line, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(done.stderr)
    after = os.times()
    ours = after.children_user + after.children_system - times.children_user - times.children_system
    others = (machine_busy() - busy - ours) / (time.monotonic() - start)
    speeds = [r["value"] for r in map(json.loads, (target / "metrics.jsonl").open())
              if r["key"] == "tokens_per_s" and r["unit"] == "train/public"][1:]
    return BATCH_TOKENS / statistics.median(speeds), others, hashlib.sha256((target / "public_model" / "model.safetensors").read_bytes()).hexdigest()


times: dict[str, list[float]] = {name: [] for name in CASES}
others: list[float] = []
hashes: dict[str, set] = {name: set() for name in CASES}
for number in range(rounds):
    for name in CASES:
        seconds, busy, digest = run(name, number)
        times[name].append(seconds * 1000)
        others.append(busy)
        hashes[name].add(digest)
alone = min(times["1 process, 1 thread"])
print("Training the quickstart's public model (0.9 M parameters, 3.6 MB of gradients), 16 x 256 bytes a step, one thread per member, "
      f"24 steps, {rounds} rounds of all configurations in turn; settings: {' '.join(settings) or 'none'}.")
print(f"Other programs used {min(others):.1f} to {max(others):.1f} of the {os.cpu_count()} processors meanwhile.\n")
print("| | ms per step, best | all rounds | speed against one process |\n|---|---|---|---|")
for name, values in times.items():
    print(f"| {name} | {min(values):.0f} | {' '.join(f'{v:.0f}' for v in values)} | {alone / min(values):.2f} |")
groups = set().union(*(digests for name, digests in hashes.items() if "group" in name))
print(f"\nAll {sum(len(times[name]) for name in CASES if 'group' in name)} runs in groups end with the same model, bit for bit: "
      f"{'yes' if len(groups) == 1 else 'NO'}; so do those of one process: {'yes' if len(hashes['1 process, 1 thread']) == 1 else 'NO'}.")
if len(groups) != 1:
    sys.exit("groups differ")
