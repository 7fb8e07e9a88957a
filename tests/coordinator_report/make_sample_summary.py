#!/usr/bin/env python3
"""Writes sample_summary.json, the report tests' fixture: every part of format 1, with invented numbers of a realistic size.

usage: make_sample_summary.py > sample_summary.json
"""
import json
import math
import random

random.seed(7)
DOMAINS = ["german", "french", "python", "c_headers"]
BASE = {"german": 5.37, "french": 4.78, "python": 3.25, "c_headers": 4.38, "public": 2.61}
FULL = {"german": 2.81, "french": 2.93, "python": 2.36, "c_headers": 2.92}
RANKS = {"german": 64, "french": 64, "python": 16, "c_headers": 16}
BY_RANK = {"german": (4.21, 3.28, 2.83), "french": (3.90, 3.28, 2.95), "python": (2.90, 2.54, 2.36), "c_headers": (3.71, 3.11, 2.93)}


def results():
    columns = [{"key": "domain", "label": "domain"}]
    for key, label in [("base", "base"), ("own", "own expert"), ("mixture", "mixture"), ("full", "full-size mixture"), ("soup", "weight soup")]:
        columns.append({"key": key, "label": label, "unit": "bits per byte", "better": "lower", "digits": 3})
    rows = []
    for d in DOMAINS:
        own = BY_RANK[d][2 if RANKS[d] == 64 else 1]
        rows.append({"domain": d, "base": BASE[d], "own": own, "mixture": own + 0.031, "full": FULL[d] + 0.018, "soup": 0.55 * BASE[d] + 0.45 * own})
    rows.append({"domain": "public", "base": 2.610, "own": None, "mixture": 2.644, "full": 2.652, "soup": 2.93})
    return {"title": "Held-out text, every method on every domain", "columns": columns, "rows": rows, "highlight": True,
            "notes": ["Ranks were chosen on validation text: german 64, french 64, python 16, c_headers 16."]}


def costs():
    columns = [{"key": "method", "label": "method"}, {"key": "total", "label": "parameters", "better": "lower"},
               {"key": "added", "label": "added parameters", "better": "lower"},
               {"key": "shipped", "label": "shipped per site", "unit": "MB", "better": "lower", "digits": 2},
               {"key": "mean", "label": "mean over domains", "unit": "bits per byte", "better": "lower", "digits": 3},
               {"key": "accuracy", "label": "next byte right", "unit": "%", "better": "higher", "digits": 1}]
    rows = [
        {"method": "base", "total": 901248, "added": 0, "shipped": None, "mean": 4.445, "accuracy": 38.4},
        {"method": "own expert", "total": 1269888, "added": 368640, "shipped": 0.74, "mean": 2.968, "accuracy": 56.2},
        {"method": "mixture", "total": 1832448, "added": 931200, "shipped": 0.74, "mean": 2.999, "accuracy": 55.7},
        {"method": "full-size mixture", "total": 3066368, "added": 2165120, "shipped": 2.16, "mean": 2.773, "accuracy": 58.9},
        {"method": "weight soup", "total": 901248, "added": 0, "shipped": 2.16, "mean": 3.781, "accuracy": 44.0}]
    return {"title": "What each method costs", "columns": columns, "rows": rows, "notes": []}


def experts():
    columns = [{"key": "expert", "label": "expert"}, {"key": "rank", "label": "rank", "digits": 0},
               {"key": "parameters", "label": "parameters"}, {"key": "erank", "label": "effective rank", "digits": 1},
               {"key": "kept", "label": "energy kept", "unit": "%", "digits": 1}]
    rows = [{"expert": d, "rank": RANKS[d], "parameters": RANKS[d] * 5760, "erank": 40 + 9.3 * i, "kept": 97.1 - 4.2 * i} for i, d in enumerate(DOMAINS)]
    return {"title": "Experts", "columns": columns, "rows": rows, "notes": []}


def curves():
    losses = []
    for i, d in enumerate(DOMAINS):
        start, end = 0.69 * BASE[d], 0.69 * FULL[d]
        points = [[s, round(end + (start - end) * math.exp(-s / 38) + 0.03 * random.gauss(0, 1), 4)] for s in range(10, 151, 5)]
        losses.append({"name": d, "points": points})
    base = [[s, round(1.75 + 3.8 * math.exp(-s / 60) + 0.03 * random.gauss(0, 1), 4)] for s in range(10, 501, 10)]
    spectra = []
    for i, d in enumerate(DOMAINS):
        spectra.append({"name": d, "points": [[k, round((3.1 - 0.4 * i) * math.exp(-k / (18 + 7 * i)) + 0.012 * (1 + i), 5)] for k in range(1, 129)]})
    by_rank = [{"name": d, "points": [[r, v] for r, v in zip((4, 16, 64), BY_RANK[d])] + [[128, FULL[d]]]} for d in DOMAINS]
    return [
        {"title": "Training loss of the full-size experts", "x_label": "step", "y_label": "nats per byte", "series": losses, "notes": []},
        {"title": "Training loss of the public base", "x_label": "step", "y_label": "nats per byte", "series": [{"name": "base", "points": base}]},
        {"title": "Singular values of what each expert changed", "x_label": "index", "y_label": "singular value", "log_y": True, "series": spectra,
         "notes": ["Mean over the 12 FFN matrices of an expert (4 layers of gate, up and down)."]},
        {"title": "Score against rank", "x_label": "rank", "y_label": "bits per byte", "log_x": True, "series": by_rank,
         "notes": ["Rank 128 is the full-size expert. Held-out text of the expert's own domain."]}]


def load_matrix(sharpness):
    names = ["public"] + DOMAINS
    out = []
    for i, _ in enumerate(names):
        row = [math.exp((sharpness if i == j else 0) + 0.35 * random.gauss(0, 1) + (0.8 if j == 0 else 0)) for j in range(5)]
        out.append([round(v / sum(row), 4) for v in row])
    return out


def heatmaps():
    names = ["public"] + DOMAINS
    maps = [{"title": "Router load, mean over layers", "row_label": "domain", "column_label": "expert", "rows": names, "columns": names,
             "values": load_matrix(1.9), "digits": 2, "notes": ["Share of router probability, test text; rows sum to 1."]}]
    for layer in range(4):
        maps.append({"title": f"Router load, layer {layer}", "row_label": "domain", "column_label": "expert", "rows": names, "columns": names,
                     "values": load_matrix(0.9 + 0.5 * layer), "digits": 2})
    scores = [[round(FULL[e] if e == d else min(BASE[d] * (0.92 + 0.05 * random.random()), 5.4), 3) for e in DOMAINS] for d in DOMAINS]
    maps.append({"title": "Each expert on every domain (bits per byte)", "row_label": "domain", "column_label": "expert", "rows": DOMAINS,
                 "columns": DOMAINS, "values": scores, "notes": []})
    return maps


def timeline():
    units, clock = [], {"worker 1": 0.8, "worker 2": 0.8, "coordinator": 0.0}

    def add(label, kind, seconds, worker=None, after=0.0, status="done", attempt=1):
        worker = worker or min(("worker 1", "worker 2"), key=lambda w: clock[w])
        start = max(clock[worker], after)
        units.append({"label": label, "kind": kind, "worker": worker, "start_s": round(start, 2), "end_s": round(start + seconds, 2),
                      "attempt": attempt, "status": status})
        clock[worker] = start + seconds + 0.05
        return clock[worker]

    for d in DOMAINS:
        add(f"data/{d}", "fingerprint", 0, "coordinator", status="reused")
    ready = add("train/base", "train_base", 161)
    for d in ["german", "french"]:
        add(f"train/{d}", "train_expert", 43 + 3 * random.random(), after=ready)
    add("train/python", "train_expert", 17, status="failed")
    restart = max(clock.values()) + 1.5
    for worker in clock:
        clock[worker] = restart
    add("train/python", "train_expert", 42, attempt=2)
    add("train/c_headers", "train_expert", 44.5)
    ready = max(clock.values())
    for d in DOMAINS:
        for rank in (4, 16, 64):
            add(f"extract/{d}/r{rank}", "extract", 1.4 + random.random(), after=ready if d == "c_headers" else 0)
    for d in DOMAINS:
        for rank in (4, 16, 64):
            add(f"validate/{d}/r{rank}", "evaluate", 3.0 + random.random())
    ready = max(clock.values())
    for name in ("mixture", "full", "soup"):
        ready = add(f"merge/{name}", "merge", 1.1, "coordinator", after=ready)
    for method in ("base", "own", "mixture", "full", "soup"):
        for d in DOMAINS + ["public"]:
            add(f"evaluate/{method}/{d}", "evaluate", 3.4 + 4 * random.random() * (method in ("mixture", "full")), after=ready)
    return {"title": "Units over workers", "units": units, "restarts": [round(restart, 2)],
            "notes": ["The run was stopped once; the time in which nothing ran is cut out."]}


RECIPE = [("name", "sample", "quickstart.yaml:3:1"), ("method", "flexmore", "quickstart.yaml:4:1"), ("seed", "17", "command line"),
          ("model.hidden_size", "128", "quickstart.yaml:8:3"), ("model.num_layers", "4", "quickstart.yaml:9:3"),
          ("model.intermediate_size", "352", "quickstart.yaml:10:3"), ("train.steps", "150", "quickstart.yaml:14:3"),
          ("train.batch_size", "16", "default"), ("train.learning_rate", "0.001", "default"), ("train.schedule", "cosine", "default"),
          ("train.clip_norm", "1", "default"), ("experts.0.name", "german", "quickstart.yaml:20:5"), ("experts.0.rank", "64", "environment MORAINE_EXPERTS__0__RANK")]

summary = {
    "format": 1, "name": "sample (invented numbers)", "method": "flexmore", "complete": True,
    "headline": "The mixture of four experts (ranks 64, 64, 16, 16) beats the base on all four domains, with 43 % of the parameters that full-size experts add.",
    "tables": [results(), costs(), experts()], "curves": curves(), "heatmaps": heatmaps(), "timeline": timeline(),
    "recipe": [{"path": p, "value": v, "origin": o} for p, v, o in RECIPE],
    "versions": {"moraine": "0.1.0", "libtorch": "2.11.0", "compiler": "g++ 12.2.0", "mpi": "Open MPI 4.1.4", "host": "example, 2 cores"},
    "timing": [{"label": "train the public base", "seconds": 161.0}, {"label": "train experts", "seconds": 192.6}, {"label": "extract and merge", "seconds": 26.4},
               {"label": "evaluate", "seconds": 158.2}],
    "hash": "9f2c4e6a8b0d1f3357799bbddff0022446688aaccee1133557799bbddff00224"}


def compact(value, depth=0):
    """One line per table row, series, unit: diffs stay readable and the file stays small."""
    flat = json.dumps(value, ensure_ascii=False)
    if len(flat) < 150 or depth >= 4:
        return flat
    inner = "  " * (depth + 1)
    if isinstance(value, dict):
        return "{\n" + ",\n".join(f"{inner}{json.dumps(k)}: {compact(v, depth + 1)}" for k, v in value.items()) + "\n" + "  " * depth + "}"
    if isinstance(value, list):
        return "[\n" + ",\n".join(inner + compact(v, depth + 1) for v in value) + "\n" + "  " * depth + "]"
    return flat


print(compact(summary))
