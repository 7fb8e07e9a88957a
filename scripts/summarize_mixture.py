#!/usr/bin/env python3
"""Prints bench_mixture's JSON as a Markdown table: the kernels against the ATen reference, forward and training."""

import json
import sys

with open(sys.argv[1]) as file:
    layers = json.load(file)["layers"]
print("| d, h | rank | k | forward auto, ms | reference, ms | ratio | training auto, ms | reference, ms | ratio |")
print("|---|---|---|---|---|---|---|---|---|")
for r in layers:
    print(f"| {r['d']}, {r['h']} | {r['rank']} | {r['top_k']} | {r['factored_ms']:.1f} | {r['reference_ms']:.1f} | "
          f"{r['reference_ms'] / r['factored_ms']:.2f} | {r['train_ms']:.1f} | {r['train_reference_ms']:.1f} | "
          f"{r['train_reference_ms'] / r['train_ms']:.2f} |")
