#!/usr/bin/env python3
"""Training speed and memory of PEFT, as one JSON line: peft_speed.py MODEL_DIRECTORY [--type lora|dora] [--rank 8] [--steps 5] [--batch 4]
[--length 256] [--threads 2] [--dtype float32] [--device cpu|cuda]. Needs torch, transformers and peft. The first step is not counted."""
import argparse
import json
import resource
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--type", default="lora", choices=["lora", "dora"])
    for name, default in (("rank", 8), ("steps", 5), ("batch", 4), ("length", 256), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype)).to(options.device)
    config = LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear", use_dora=options.type == "dora")
    model = get_peft_model(model, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True)
    tokens = torch.randint(3, model.config.vocab_size, (options.batch, options.length + 1), generator=torch.Generator().manual_seed(1)).to(options.device)
    seconds = []
    for _ in range(options.steps + 1):
        start = time.perf_counter()
        logits = model(tokens[:, :-1]).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        if options.device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    spent = sum(seconds[1:])
    peak = torch.cuda.max_memory_allocated() >> 20 if options.device == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(json.dumps({"type": options.type, "rank": options.rank, "dtype": options.dtype,
                      "tokens_per_s": round(options.steps * options.batch * options.length / spent, 1),
                      "peak_mib": peak}))


if __name__ == "__main__":
    main()
