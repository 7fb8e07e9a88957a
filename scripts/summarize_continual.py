#!/usr/bin/env python3
"""Tables of a continual run, and its evaluations beside its training: summarize_continual.py RUN, or --timeline RUN."""
import json
import sys


def load(run):
    with open(f"{run}/summary.json", encoding="utf-8") as file:
        summary = json.load(file)
    if not summary["complete"]:
        sys.exit(f"{run} is not complete: run it again")
    return summary


def print_table(header, rows):
    print("| " + " | ".join(header) + " |\n" + "|---" * len(header) + "|")
    for row in rows:
        print("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |")
    print()


def tables(run):
    summary = load(run)
    by_title = {table["title"]: table for table in summary["tables"]}
    spread = lambda row, key: f"{row[key]:.1f} ± {row[key + '_spread']:.1f}"
    rows = by_title["Accuracy, %"]["rows"]
    print("## Accuracy in %, mean ± sample standard deviation over the runs\n")
    print_table(["method", "runs", "class-IL average, pooled", "class-IL last, pooled", "class-IL forgetting, Chaudhry", "task-IL last, task mean"],
                [[r["method"], r["runs"], *(spread(r, key) for key in ("average", "last", "forgetting", "task_last"))] for r in rows])
    print(summary["headline"] + "\n")
    for title in ("Class-incremental metrics, %", "Task-incremental metrics, %"):
        table = by_title[title]
        methods = [c["key"] for c in table["columns"] if c["key"] not in ("metric", "convention")]
        print(f"## {title}\n")
        print_table(["metric", *methods], [[r["metric"], *(r[m] or "–" for m in methods)] for r in table["rows"]])
    print("## Accuracy matrices: class-incremental, mean over the runs, %\n")
    for heatmap in summary["heatmaps"]:
        if "class-incremental" not in heatmap["title"]:
            continue
        print_table([heatmap["title"].split(":")[0], *heatmap["columns"]],
                    [[name, *("" if v is None else f"{v:.1f}" for v in values)] for name, values in zip(heatmap["rows"], heatmap["values"])])
    kinds = {}
    for unit in summary["timeline"]["units"]:
        kinds.setdefault(unit["kind"], []).append(unit["end_s"] - unit["start_s"])
    print("## Units\n")
    print_table(["kind", "units", "seconds in all"], [[kind, len(times), f"{sum(times):.0f}"] for kind, times in sorted(kinds.items())])


def timeline(run):
    units = sorted((u for u in load(run)["timeline"]["units"] if u["status"] == "done"), key=lambda u: u["start_s"])
    print_table(["unit", "worker", "start, s", "end, s"], [[u["label"], u["worker"], f"{u['start_s']:.1f}", f"{u['end_s']:.1f}"] for u in units])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--timeline"]:
        timeline(sys.argv[2])
    else:
        tables(sys.argv[1])
