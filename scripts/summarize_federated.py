#!/usr/bin/env python3
"""Scores and traffic of federated runs side by side: summarize_federated.py DIRECTORY_OF_RUNS [RUN ...]."""
import json
import sys
from pathlib import Path

RUNS = ("fedit", "fedavgm", "fedadam", "fedadam-eta-0.01", "ffa_lora", "flora", "fedex_lora", "flexlora", "hetlora")


def main(directory: Path, runs: tuple[str, ...]) -> None:
    summaries = {name: json.loads((directory / name / "summary.json").read_text()) for name in runs}
    if unfinished := [name for name, summary in summaries.items() if not summary["complete"]]:
        sys.exit(f"not complete: {', '.join(unfinished)}")
    first = {row["domain"]: row for row in summaries[runs[0]]["tables"][0]["rows"]}
    print("Bits per byte on test documents after the last round, and what travelled in all rounds.\n")
    print("| | " + " | ".join(first) + " | mean | bytes up | bytes down |")
    print("|---" * (len(first) + 4) + "|")

    def line(name: str, scores: list[float], up: object = "", down: object = "") -> None:
        numbers = [f"{score:.3f}" for score in scores] + [f"{sum(scores) / len(scores):.3f}"]
        print(f"| {name} | " + " | ".join(numbers) + f" | {up:,} | {down:,} |" if up != "" else f"| {name} | " + " | ".join(numbers) + " | | |")

    for key, label in (("base", "base model"), ("alone", "no federation (clients alone, mean)")):
        if all(key in row for row in first.values()):
            line(label, [row[key] for row in first.values()])
    for name, summary in summaries.items():
        traffic = next(table for table in summary["tables"] if table["title"] == "Bytes up and down")["rows"][-1]
        line(name, [row["federated"] for row in summary["tables"][0]["rows"]], traffic["up"], traffic["down"])
    if all("centralised" in row for row in first.values()):
        line("centralised", [row["centralised"] for row in first.values()])
    print("\nClients hold one domain each (recipes/federated/fedit.yaml); settings are the recipes' own, none was chosen on these documents.")


if __name__ == "__main__":
    main(Path(sys.argv[1]), tuple(sys.argv[2:]) or RUNS)
