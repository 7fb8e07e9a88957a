#!/usr/bin/env python3
"""What merging two LoRAs keeps of either: measure_merging.py MORAINE RUNS [key=value ...]; settings are of the fine-tuning recipe.

One LoRA for each of three texts and one for the texts of each pair together, with the steps of both; then every rule of `moraine merge` on each
pair, at weights of 1/2 and of 1. Density, rank and seed are the same for all rules and were set before anything was seen.
"""
import json
import subprocess
import sys
from pathlib import Path

import h5py

ROOT = Path(__file__).resolve().parent.parent
MODEL, RECIPE = ROOT / "recipes/models/tiny-public", ROOT / "recipes/finetune/domains.yaml"
PAIRS = [("python", "c_headers"), ("german", "python")]
LORA = "adapters=[{name: lora, adapter: {type: lora, rank: 8, alpha: 16}}]"
STEPS, SEQUENCES = 100, 64   # the recipe's
CUT, KEEP = {"rank": 8}, {"density": 0.5}
RULES = {"concat": {}, "svd": CUT, "linear": {}, "magnitude_prune": KEEP, "ties": KEEP, "dare_linear": KEEP, "dare_ties": KEEP,
         "magnitude_prune_svd": CUT | KEEP, "ties_svd": CUT | KEEP, "dare_linear_svd": CUT | KEEP, "dare_ties_svd": CUT | KEEP,
         "ties_dense": KEEP, "dare_ties_dense": KEEP, "knots": KEEP}


class Measurement:
    def __init__(self, moraine, runs, settings):
        self.moraine, self.runs, self.settings = moraine, Path(runs).resolve(), settings
        (self.runs / "merged").mkdir(parents=True, exist_ok=True)

    def command(self, *arguments):
        done = subprocess.run([self.moraine, *map(str, arguments)], capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr)
        return done.stdout

    def data(self, name):
        return ROOT / f".cache/data/{name}.h5"

    def sources(self, name):
        with h5py.File(self.data(name)) as file:
            return json.loads(file.attrs["provenance"])["sources"]

    def train(self, run, *overrides):
        self.command("run", RECIPE, LORA, "evaluation.every_task=false", *overrides, *self.settings, "--run-dir", self.runs / run)

    def joint(self, pair):
        """Both texts in one file: a document is held out here as it is in its own file, by the hash of its content."""
        name = "-".join(pair)
        file = self.runs / f"{name}.h5"
        if not file.exists():
            sources = [source for part in pair for source in self.sources(part)]
            subprocess.run([sys.executable, ROOT / "scripts/prepare_text.py", "--name", "joint", "--out", file, "--max-bytes", "12000000",
                            "--validation", "0.1", "--test", "0.1", *sources], check=True, capture_output=True, cwd=ROOT)
        self.train(name, f"tasks=[{{name: joint, path: {file}}}]", f"train.steps={2 * STEPS}")
        return self.runs / name / "adapters/lora/joint/seed1"

    def scores(self, pair, model, *adapter):
        rows = json.loads(self.command("eval", model, *adapter, "--data", ",".join(str(self.data(name)) for name in pair), "--seq-len", 256,
                                       "--sequences", SEQUENCES, "--threads", 2, "--format", "json"))
        return [row["bits_per_byte"] for row in rows]

    def merged(self, pair, rule, weight):
        out = self.runs / f"merged/{'-'.join(pair)}-{rule}-{weight}"
        config = out.with_name(out.name + ".json")   # JSON is YAML
        adapters = [{"run": str(self.runs / "own"), "adapter": f"lora/{part}/seed1", "weight": weight} for part in pair]
        config.write_text(json.dumps({"adapters": adapters, "how": {"type": rule} | RULES[rule]}))
        dense = rule.endswith("_dense")
        if not out.exists():
            self.command("merge", config, out, "--to", "hf" if dense else "peft")
        return self.scores(pair, out) if dense else self.scores(pair, MODEL, "--adapter", out)

    def table(self, pair):
        own = {name: self.runs / f"own/adapters/lora/{name}/seed1" for name in pair}
        rows = [("the model alone", "", self.scores(pair, MODEL))]
        rows += [(f"LoRA of {name}", "", self.scores(pair, MODEL, "--adapter", own[name])) for name in pair]
        rows += [("one LoRA of both texts", "", self.scores(pair, MODEL, "--adapter", self.joint(pair)))]
        rows += [(f"`{rule}`", str(weight), self.merged(pair, rule, weight)) for rule in RULES for weight in (0.5, 1)]
        print(f"## {pair[0]} and {pair[1]}\n\n| | weight of each | {pair[0]} | {pair[1]} | mean |\n|---|---|---|---|---|")
        for name, weight, (left, right) in rows:
            print(f"| {name} | {weight} | {left:.3f} | {right:.3f} | {(left + right) / 2:.3f} |")
        print()


def main(moraine, runs, *settings):
    measurement = Measurement(moraine, runs, settings)
    measurement.train("own")
    print(f"Bits per byte on held-out text, {SEQUENCES} sequences of 256 tokens. LoRA of rank 8 on every linear of `recipes/models/tiny-public`, {STEPS} steps "
          f"for each text, {2 * STEPS} for both; one seed. Rules: density {KEEP['density']}, rank {CUT['rank']} where they cut, seed 0.\n")
    for pair in PAIRS:
        measurement.table(pair)


if __name__ == "__main__":
    main(*sys.argv[1:])
