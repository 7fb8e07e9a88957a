#!/usr/bin/env python3
"""Mean and spread of the score tables of several runs: summarize_seeds.py RUN RUN ..."""
import json
import statistics
import sys


def main(runs: list[str]) -> None:
    summaries = [json.load(open(f"{run}/summary.json", encoding="utf-8")) for run in runs]
    if any(not s["complete"] for s in summaries):
        sys.exit("a run is not complete: run it again")
    print(f"{len(runs)} seeds; each cell: mean (smallest .. largest).\n")
    for index, table in enumerate(summaries[0]["tables"][:2]):
        columns = [c for c in table["columns"] if "better" in c]
        print(f"## {table['title']}\n")
        print("| domain | chosen ranks | " + " | ".join(c["label"] for c in columns) + " |")
        print("|---" * (len(columns) + 2) + "|")
        for r, row in enumerate(table["rows"]):
            rows = [s["tables"][index]["rows"][r] for s in summaries]
            ranks = ", ".join(str(x["rank"] or "–") for x in rows)
            cells = []
            for column in columns:
                values = [x[column["key"]] for x in rows]
                digits = column.get("digits", 3)
                cells.append("–" if values[0] is None else
                             f"{statistics.mean(values):.{digits}f} ({min(values):.{digits}f} .. {max(values):.{digits}f})")
            print(f"| {row['domain']} | {ranks} | " + " | ".join(cells) + " |")
        print()
    print("## Added parameters\n")
    for run, summary in zip(runs, summaries):
        rows = {row["what"]: row["parameters"] for table in summary["tables"] for row in table["rows"] if "what" in row}
        chosen, full = rows["mixture, chosen ranks: added"], rows["mixture, full-size: added"]
        print(f"* {run}: {chosen:,} of {full:,} ({100 * chosen / full:.1f} %). {summary['headline']}")


if __name__ == "__main__":
    main(sys.argv[1:])
