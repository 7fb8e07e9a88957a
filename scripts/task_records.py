#!/usr/bin/env python3
"""Turns published files into records for scripts/prepare_examples.py (see scripts/fetch_tasks):
  task_records.py sections OUT <Packages          Debian's package index: short description -> section
  task_records.py reviews OUT FILE.parquet        reviews of clothes, a file for each of six labels; needs pyarrow
  task_records.py quiz OUT FOLDER                 the question files of bsdgames: four choices, one of them right
Files appear in the folder OUT as NAME.jsonl: sections, quiz, reviews_rating, ...
Every result is a pure function of the input."""
import collections
import hashlib
import json
import pathlib
import sys

SECTIONS = 16
CHOICES = 4
MIN_CLASS = 100    # reviews of a class from which it is kept
REVIEW_LABELS = {"rating": "Rating", "recommended": "Recommended IND", "division": "Division Name", "department": "Department Name", "class": "Class Name"}


def sections(_):
    """The most frequent sections, of packages whose description names one section only."""
    found = collections.defaultdict(set)
    for stanza in sys.stdin.read().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in stanza.split("\n") if ": " in line and not line.startswith(" "))
        if "Section" in fields and fields.get("Description", "").strip():
            found[fields["Description"].strip()].add(fields["Section"].split("/")[-1])
    labelled = {text: min(names) for text, names in found.items() if len(names) == 1}
    sizes = collections.Counter(labelled.values())
    chosen = sorted(sizes, key=lambda name: (-sizes[name], name))[:SECTIONS]
    return {"sections": [{"text": text, "label": name} for text, name in sorted(labelled.items()) if name in chosen]}


def reviews(path):
    """A set for each of REVIEW_LABELS, without its rare classes, and one for whether anybody found the review helpful."""
    import pyarrow.parquet   # here: the other tasks do not need it
    rows = [row for row in pyarrow.parquet.read_table(path).to_pylist() if (row["Review Text"] or "").strip()]
    labels = {task: [row[column] for row in rows] for task, column in REVIEW_LABELS.items()}
    labels["helpful"] = ["yes" if row["Positive Feedback Count"] else "no" for row in rows]
    out = {}
    for task, values in labels.items():
        sizes = collections.Counter(values)
        out[f"reviews_{task}"] = [{"text": row["Review Text"].strip(), "label": str(value)} for row, value in zip(rows, values)
                                  if value not in (None, "") and sizes[value] >= MIN_CLASS]
    return out


def spellings(pattern, end=""):
    """All texts that a pattern of quiz(6) stands for, the usual one first, and what follows `end`: a|b alternatives, [..] a group, {..} may be left out."""
    alternatives, current = [], [""]
    while pattern and pattern[0] != end:
        head, pattern = pattern[0], pattern[1:]
        if head == "|":
            alternatives, current = alternatives + current, [""]
            continue
        if head in "[{":
            parts, pattern = spellings(pattern, "]" if head == "[" else "}")
            parts = parts + [""] * (head == "{")
        else:
            parts = [head]
        current = [left + right for left in current for right in parts]
    return alternatives + current, pattern[1:]


def usual(pattern):
    return spellings(pattern)[0][0].strip()


def key_of(*texts):
    return hashlib.sha256("\n".join(texts).encode()).digest()


def topic_questions(kinds, lines):
    """Questions from the first to the second column of a topic. Wrong choices are right answers to other questions of the topic."""
    rows = [fields for fields in (line.split(":") for line in lines) if len(fields) >= 2 and usual(fields[0]) and usual(fields[1])]
    accepted = collections.defaultdict(set)
    for fields in rows:
        accepted[usual(fields[0])] |= {text.strip().lower() for text in spellings(fields[1])[0]}
    answers = sorted({usual(fields[1]) for fields in rows})
    for fields in rows:
        question, right = usual(fields[0]), usual(fields[1])
        prompt = f"{usual(kinds[0])}: {question}\n{usual(kinds[1])}:"
        wrong = {text.lower(): text for text in answers if text.lower() not in accepted[question]}.values()
        wrong = sorted(wrong, key=lambda text: key_of("wrong", prompt, text))[:CHOICES - 1]
        if len(wrong) == CHOICES - 1:
            yield {"prompt": prompt, "choices": sorted([right, *wrong], key=lambda text: key_of("order", prompt, text)), "answer": right}


def quiz(folder):
    def lines_of(name):
        return (pathlib.Path(folder) / name).read_text("latin-1").replace("\\\n", "").splitlines()

    out = []
    for line in lines_of("index"):
        path, *kinds = line.split(":")
        out += [{"topic": pathlib.Path(path).name, **record} for record in topic_questions(kinds, lines_of(pathlib.Path(path).name))]
    return {"quiz": out}


def main():
    makers = {"sections": sections, "reviews": reviews, "quiz": quiz}
    if len(sys.argv) not in (3, 4) or sys.argv[1] not in makers:
        print(__doc__, file=sys.stderr)
        return 2
    for name, records in makers[sys.argv[1]](sys.argv[3] if len(sys.argv) == 4 else None).items():
        if not records:
            print(f"task_records: no record of {name} in the input\n  hint: the published file may have changed", file=sys.stderr)
            return 2
        pathlib.Path(sys.argv[2], f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return 0


if __name__ == "__main__":
    sys.exit(main())
