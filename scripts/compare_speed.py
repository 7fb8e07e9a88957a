#!/usr/bin/env python3
"""Speed against named peers, interleaved in one run: training tokens/s of the quickstart model here and in PyTorch
(`transformers`, same torch, same threads), factored against per-expert mixtures, two workers against one. Prints Markdown."""
import argparse
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time

PEER = r"""
import json, sys, time, torch
from transformers import Olmo2Config, Olmo2ForCausalLM
threads, steps = int(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(threads)
torch.manual_seed(1)
model = Olmo2ForCausalLM(Olmo2Config(vocab_size=264, hidden_size=128, intermediate_size=352, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=256, rms_norm_eps=1e-6, rope_theta=10000.0,
    pad_token_id=None, attn_implementation="sdpa", use_cache=False))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
batch = torch.randint(0, 257, (16, 257))
def step():
    loss = model(batch[:, :-1], labels=batch[:, :-1], shift_labels=batch[:, 1:].contiguous()).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()
for _ in range(3): step()
start = time.perf_counter()
for _ in range(steps): step()
print(json.dumps({"tokens_per_s": steps * 16 * 256 / (time.perf_counter() - start)}))
"""


def run_json(command: list[str], threads: int) -> dict:
    env = dict(os.environ, OMP_NUM_THREADS=str(threads), MORAINE_LOG="error")
    return json.loads(subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def training(args: argparse.Namespace) -> None:
    print("## Training the quickstart model (0.9 M parameters, 16 x 256 bytes a step, fp32, AdamW, clipping), tokens/s\n")
    print("| threads | Moraine | transformers | ratio | rounds: Moraine / transformers |\n|---|---|---|---|---|")
    for threads in (1, 2):
        ours, theirs = [], []
        for _ in range(args.rounds):
            ours.append(run_json([args.bench, "--training", "--threads", str(threads), "--steps", str(args.steps)], threads)["tokens_per_s"])
            theirs.append(run_json([args.peer, "-c", PEER, str(threads), str(args.steps)], threads)["tokens_per_s"])
        a, b = statistics.median(ours), statistics.median(theirs)
        rounds = " ".join(f"{x:.0f}/{y:.0f}" for x, y in zip(ours, theirs))
        print(f"| {threads} | {a:.0f} | {b:.0f} | {a / b:.2f} | {rounds} |", flush=True)


def layers(args: argparse.Namespace) -> None:
    result = run_json([args.bench, "--threads", "1"], 1)
    print("\n## One mixture layer forward, 4096 tokens, 7 experts, one thread, fp32; median of 7 interleaved rounds\n")
    print(f"Large matrix product in the same process: {result['peak_gflops']:.0f} GFLOP/s.\n")
    print("| d, h | rank | k | factored, ms | per expert, ms | ratio | factored, % of peak |\n|---|---|---|---|---|---|---|")
    for r in result["layers"]:
        d, h = r["d"], r["h"]
        flops = 4096 * (6 * d * h + r["top_k"] * 6 * r["rank"] * (d + h))
        share = flops / (r["factored_ms"] * 1e-3) / (result["peak_gflops"] * 1e9)
        print(f"| {d}, {h} | {r['rank']} | {r['top_k']} | {r['factored_ms']:.1f} | {r['per_expert_ms']:.1f} | "
              f"{r['per_expert_ms'] / r['factored_ms']:.2f} | {100 * share:.0f} |")


def workers(args: argparse.Namespace) -> None:
    launch = ["mpirun", "--oversubscribe", "--bind-to", "none"] + (["--allow-run-as-root"] if os.geteuid() == 0 else [])
    times: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(2):
        for count in (1, 2):
            directory = tempfile.mkdtemp()
            shutil.rmtree(directory)
            start = time.perf_counter()
            subprocess.run([*launch, "-n", str(count + 1), args.moraine, "run", "recipes/quickstart.yaml", "train.steps=20",
                            "evaluation.sequences=16", "evaluation.validation_sequences=8", "--run-dir", directory],
                           check=True, capture_output=True)
            times[count].append(time.perf_counter() - start)
            shutil.rmtree(directory)
    one, two = min(times[1]), min(times[2])
    print(f"\n## Two workers against one, one thread each: four equal experts and their evaluations\n\n"
          f"One worker {one:.1f} s, two workers {two:.1f} s: {one / two:.2f} times as fast (whole runs, best of two, start-up included).")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bench", default="build/bench_mixture")
    parser.add_argument("--moraine", default="build/moraine")
    parser.add_argument("--peer", default=".cache/peers/bin/python", help="a Python with torch and transformers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=15)
    arguments = parser.parse_args()
    training(arguments)
    layers(arguments)
    workers(arguments)
