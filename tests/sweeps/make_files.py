#!/usr/bin/env python3
"""Prepares what the recipes of the sweeps name: make_files.py DIRECTORY makes text/, images/ and examples/, and encoder/tokenizer.json with
the same text prepared by that tokeniser, encoded/."""
import gzip
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(SOURCE / "tests/cli"))
directory = Path(sys.argv[1])
sys.argv[1:] = ["no binary is needed"]

import continual_test
import run_test
import tokenizers

for name, world in (("text", run_test.World), ("images", continual_test.World)):
    (directory / name).mkdir()
    world(directory / name)

# A third set of images, in which no label means what it means in the others.
with gzip.open(directory / "images/images.csv.gz", "rt") as table:
    rows = [line.strip().split(",") for line in table]
with gzip.open(directory / "images/strangers.csv.gz", "wt") as table:
    table.writelines(",".join([*row[-2::-1], row[-1]]) + "\n" for row in rows)
subprocess.run([sys.executable, SOURCE / "scripts/prepare_images.py", "--name", "strangers", "--out", directory / "images/strangers.h5", "--table",
                directory / "images/strangers.csv.gz", "--shape", "1x6x6", "--test-share", "0.3"], check=True, capture_output=True)

# Prompts with what follows them.
(directory / "examples").mkdir()
for name, shift in (("completion", 1), ("others", 2)):
    records = directory / f"examples/{name}.jsonl"
    records.write_text("".join('{"q": "%d to ", "a": "%d"}\n' % (i, i + shift) for i in range(60)))
    subprocess.run([sys.executable, SOURCE / "scripts/prepare_examples.py", "completion", "--name", name, "--out", directory / f"examples/{name}.h5", "--prompt", "q",
                    "--completion", "a", records], check=True, capture_output=True)

# Texts with classes.
for name, classes in (("labelled", 6), ("relabelled", 4)):
    records = directory / f"examples/{name}.jsonl"
    records.write_text("".join('{"t": "number %d", "l": "%d"}\n' % (i, i % classes) for i in range(120)))
    subprocess.run([sys.executable, SOURCE / "scripts/prepare_examples.py", "classification", "--name", name, "--out", directory / f"examples/{name}.h5", "--text", "t",
                    "--label", "l", "--test", "0.3", records], check=True, capture_output=True)

# A token for every letter: the texts are of single bytes.
letters = [chr(code) for code in range(32, 127)] + ["\n"]
special = ["[UNK]", "[CLS]", "[SEP]"]
vocabulary = {token: number for number, token in enumerate(special + letters)}
tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
tokenizer.add_special_tokens(special)
(directory / "encoder").mkdir()
tokenizer.save(str(directory / "encoder/tokenizer.json"))
(directory / "encoded").mkdir()
for name in ("public", "left", "right"):
    subprocess.run([sys.executable, SOURCE / "scripts/prepare_text.py", "--name", name, "--out", directory / f"encoded/{name}.h5", "--tokenizer",
                    directory / "encoder/tokenizer.json", "--validation", "0.2", "--test", "0.2", directory / f"text/{name}.jsonl"],
                   check=True, capture_output=True)
