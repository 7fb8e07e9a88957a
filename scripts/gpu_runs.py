#!/usr/bin/env python3
"""Whole runs on a GPU: gpu_runs.py MORAINE OUT [NAME ...], every recipe on CUDA twice and on the CPU once.

A row per recipe: exit codes, whether the second CUDA run has the first one's hash, the largest relative difference between the
numbers of the CUDA run's tables and the CPU run's (columns of times, memory and bytes left out), seconds of each. Needs the
prepared data that the recipes name. Writes OUT/<name>-{cuda,again,cpu}/ and prints Markdown. Exit code 1: a run failed, or was not repeated bit for bit.
"""
import json
import os
import subprocess
import sys
import time

RUNS = {
    "finetune": ["recipes/finetune/domains.yaml", "train.steps=20", "evaluation.sequences=16"],
    "flexmore": ["recipes/quickstart.yaml", "train.steps=20", "evaluation.sequences=16", "evaluation.validation_sequences=16"],
    "fedit": ["recipes/federated/fedit.yaml", "train.steps=5", "rounds=2", "evaluation.sequences=16", "comparisons=[]"],
    "fedex_lora": ["recipes/federated/fedex_lora.yaml", "train.steps=5", "rounds=2", "evaluation.sequences=16", "comparisons=[]"],
    "continual": ["recipes/continual/digits.yaml", 'model.data_path=""', "model.train=null", "train.steps=20", "orders=[-1]", "seeds=[1]"],
    "finetune_bert": ["recipes/finetune/sections.yaml", "train.steps=50", "seeds=[1]"],
}
# What differs between devices by its nature, by the words of a column's label or key.
MEASURED = ("second", "mib", "memory", "tokens/s", "time", "bytes sent", "flop")


def run(moraine, recipe, directory, device):
    begin = time.time()
    done = subprocess.run([moraine, "run", *recipe, f"workers.device={device}", "workers.local=1", f"workers.threads={8 if device == 'cpu' else 1}", "--run-dir", directory], capture_output=True, text=True)
    with open(directory + ".log", "w", encoding="utf-8") as log:
        log.write(done.stdout + done.stderr)
    if done.returncode != 0:
        print(f"{directory}: exit {done.returncode}\n" + "\n".join(done.stderr.splitlines()[-12:]), file=sys.stderr, flush=True)
        return done.returncode, None, time.time() - begin
    with open(os.path.join(directory, "summary.json"), encoding="utf-8") as file:
        return 0, json.load(file), time.time() - begin


def numbers(summary):
    for table in summary["tables"]:
        for column in table["columns"]:
            name = (column["key"] + " " + column["label"] + " " + table["title"]).lower()
            if any(word in name for word in MEASURED):
                continue
            for at, row in enumerate(table["rows"]):
                if isinstance(row.get(column["key"]), float):
                    yield (table["title"], column["label"], at), row[column["key"]]


def difference(a, b):
    worst, where = 0.0, "equal"
    theirs = dict(numbers(b))
    for key, value in numbers(a):
        other = theirs.get(key)
        if other is None:
            return float("inf"), f"only on CUDA: {key}"
        relative = abs(value - other) / max(abs(value), abs(other), 1e-12)
        if relative > worst:
            worst, where = relative, f"{key[0]}, {key[1]}, row {key[2] + 1}: {value:.6g} / {other:.6g}"
    return worst, where


def main(moraine, out, names):
    os.makedirs(out, exist_ok=True)
    failed = False
    print("| run | exit codes CUDA, again, CPU | CUDA repeated | largest difference CUDA / CPU | s on CUDA, again, CPU (8 threads) |\n|---|---|---|---|---|", flush=True)
    for name in names or RUNS:
        results = [run(moraine, RUNS[name], os.path.join(out, f"{name}-{label}"), "cpu" if label == "cpu" else "cuda") for label in ("cuda", "again", "cpu")]
        codes = [code for code, _, _ in results]
        equal, apart = "–", "–"
        if codes[0] == codes[1] == 0:
            equal = "equal" if results[0][1]["hash"] == results[1][1]["hash"] else "DIFFERS"
        if codes[0] == codes[2] == 0:
            worst, where = difference(results[0][1], results[2][1])
            apart = f"{worst:.1e} ({where})"
        failed = failed or any(codes) or equal == "DIFFERS"
        print(f"| {name} | {', '.join(map(str, codes))} | {equal} | {apart} | {', '.join(f'{s:.0f}' for _, _, s in results)} |", flush=True)
    return failed


if __name__ == "__main__":
    if len(sys.argv) < 3 or any(name not in RUNS for name in sys.argv[3:]):
        sys.exit(__doc__ + "names: " + ", ".join(RUNS))
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
