#!/usr/bin/env python3
"""Tables and heat maps of a finished run as Markdown: summarize_tables.py RUN [WORD ...]; only titles that contain a word, without those by layer."""
import json
import sys


def text(value, digits):
    if value is None:
        return "–"
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def print_table(title, labels, rows, notes):
    print(f"## {title}\n")
    print("| " + " | ".join(labels) + " |")
    print("|---" * len(labels) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print("".join(f"\n* {note}" for note in notes) + "\n")


def main(run, words):
    with open(f"{run}/summary.json", encoding="utf-8") as file:
        summary = json.load(file)
    if not summary["complete"]:
        sys.exit(f"{run} is not complete: run it again")
    wanted = [p for p in summary["tables"] + summary["heatmaps"] if not p["title"].endswith(", by layer") and (not words or any(word in p["title"] for word in words))]
    recipe = {entry["path"]: entry["value"] for entry in summary["recipe"]}
    keys = ["seed", "train.steps", "train.batch_size", "seq_len", "evaluation.sequences", "evaluation.validation_sequences", "router.init", "router.train"]
    seeds = str(recipe.get("seeds", "")).strip("[]")
    print((f"Seeds {seeds}. " if "," in seeds else "One seed. ") + ", ".join(f"{key} {recipe[key]}" for key in keys if key in recipe) + f". Merged artefact {summary['hash'][:8]}.\n")
    for part in wanted:
        notes = part.get("notes", [])
        if "values" in part:
            rows = [[name] + [text(v, part.get("digits", 3)) for v in line] for name, line in zip(part["rows"], part["values"])]
            print_table(part["title"], [f"{part['row_label']} \\ {part['column_label']}"] + part["columns"], rows, notes)
        else:
            columns = part["columns"]
            rows = [[text(row.get(c["key"]), c.get("digits", 3)) for c in columns] for row in part["rows"]]
            print_table(part["title"], [c["label"] for c in columns], rows, notes)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2:])
