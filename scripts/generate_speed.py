#!/usr/bin/env python3
"""Greedy decoding by moraine and by transformers with its cache, in turns: generate_speed.py MODEL_DIRECTORY [--prompt TEXT]
[--new-tokens 64] [--threads 2] [--rounds 3] [--dtype float32] [--moraine build/moraine].

One JSON line: tokens per second (those after the first) of both in every round, time to the first token, and whether the
continuations are equal. Needs torch, transformers and tokenizers."""
import argparse
import json
import re
import subprocess
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer
from tokenizers import Tokenizer

PROMPT = "The water cycle begins when the sun warms the surface of the sea. Water then"


class Clock(BaseStreamer):
    """Notes when tokens arrive; the first call brings the prompt."""

    def __init__(self):
        self.times = []

    def put(self, value):
        self.times.append(time.perf_counter())

    def end(self):
        pass


def by_transformers(model, ids, options):
    clock, start = Clock(), time.perf_counter()
    output = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), do_sample=False,
                            max_new_tokens=options.new_tokens, use_cache=True, streamer=clock, pad_token_id=0)
    first, last = clock.times[1], clock.times[-1]
    return output[0, len(ids):].tolist(), (len(clock.times) - 2) / (last - first), first - start


def by_moraine(options):
    line = [options.moraine, "eval", options.model, "--prompt", options.prompt, "--generate", str(options.new_tokens),
            "--threads", str(options.threads), "--dtype", options.dtype, "--format", "json"]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    log = dict(re.findall(r"(\w+)=(\S+)", done.stderr))
    answer = json.loads(done.stdout)
    return answer["tokens"], answer["prompt_tokens"], float(log["tokens_per_s"]), float(log["first_token_ms"]) / 1e3


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompt", default=PROMPT)
    for name, default in (("new-tokens", 64), ("threads", 2), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--moraine", default=Path(__file__).resolve().parent.parent / "build/moraine")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype)).eval()
    ids = Tokenizer.from_file(str(options.model / "tokenizer.json")).encode(options.prompt).ids
    by_transformers(model, ids, options)   # the first one is slower
    result = {"threads": options.threads, "dtype": options.dtype, "prompt_tokens": len(ids)}
    rows = {"moraine": [], "transformers": []}
    for _ in range(options.rounds):
        ours, our_ids, speed, first = by_moraine(options)
        theirs, *their_times = by_transformers(model, ids, options)
        assert our_ids == ids, "tokenisers differ"
        rows["moraine"].append((speed, first))
        rows["transformers"].append(tuple(their_times))
    for name, times in rows.items():
        result[name] = {"tokens_per_s": [round(speed, 1) for speed, _ in times], "first_token_s": [round(first, 3) for _, first in times]}
    result["equal"] = ours == theirs[:len(ours)]
    print(json.dumps(result))


if __name__ == "__main__":
    main()
