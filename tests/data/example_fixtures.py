"""Small records for the tests of scripts/prepare_examples.py and of its reader.

As a program: example_fixtures.py FOLDER writes TASK_bytes.h5 and TASK_hf.h5 there with prepare_examples.py, and expected.json with what
they must hold, computed here from the rules in docs/data.md. Exit code 77: a Python package is missing.
"""
import hashlib
import json
import pathlib
import sys

from text_fixtures import END, side, text, write_tokenizer

import prepare_examples
import tokenizers

CLASSES = ["cold", "warm"]


def rows():
    """60 records that serve every task."""
    return [{"q": text(seed, words=6).strip(), "label": CLASSES[seed % 2], "a": text(1000 + seed, words=2).strip(),
             "choices": [text(2000 + 10 * seed + k, words=1).strip() for k in range(2 + seed % 3)], "right": seed % 2} for seed in range(60)]


OPTIONS = {"classification": ["--text", "q", "--label", "label"], "completion": ["--prompt", "q", "--completion", "a", "--separator", " "],
           "choice": ["--prompt", "q", "--choices", "choices", "--answer", "right", "--separator", " "]}


def expected_examples(task, split, encode, end):
    chosen = sorted((r for r in rows() if side(r["q"].encode(), 0.2, 0.2) == split), key=lambda r: hashlib.sha256(r["q"].encode()).digest())
    examples = []
    for group, row in enumerate(chosen):
        prompt = encode(row["q"])
        if task == "classification":
            examples.append({"tokens": prompt, "prompt": len(prompt), "label": CLASSES.index(row["label"]), "group": -1, "bytes": 0})
            continue
        for place, told in enumerate(row["choices"] if task == "choice" else [row["a"]]):
            examples.append({"tokens": prompt + encode(" " + told) + [end], "prompt": len(prompt),
                             "label": int(place == row["right"]) if task == "choice" else -1, "group": group if task == "choice" else -1,
                             "bytes": len(told.encode()) + 1})
    return examples


def main(folder):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in reversed(rows())))
    write_tokenizer(folder / "tokenizer.json")
    bpe = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    bpe.no_truncation()
    bpe.no_padding()
    identity = "hf:" + hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    kinds = {"bytes": ("bytes-v1", lambda t: list(t.encode()), 256), "hf": (identity, lambda t: bpe.encode(t).ids, bpe.token_to_id(END))}
    expected = {}
    for task, options in OPTIONS.items():
        for kind, (tokenizer, encode, end) in kinds.items():
            name = f"{task}_{kind}"
            code = prepare_examples.main([task, "--name", name, "--out", str(folder / f"{name}.h5"), "--validation", "0.2", "--test", "0.2", "--max-tokens", "4096",
                                          *options, *(["--tokenizer", str(folder / "tokenizer.json")] if kind == "hf" else []), str(folder / "rows.jsonl")])
            if code:
                sys.exit(code)
            expected[name] = {"task": task, "tokenizer": tokenizer, "class_names": CLASSES if task == "classification" else [],
                              "splits": {split: expected_examples(task, split, encode, end) for split in ("train", "validation", "test")}}
    (folder / "expected.json").write_text(json.dumps(expected))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
