"""Tests of scripts/prepare_examples.py. Test names are claims; docs/data.md states the rules."""
import contextlib
import csv
import hashlib
import io
import json
import pathlib
import random
import tempfile
import unittest

import example_fixtures as fixtures
from example_fixtures import prepare_examples
from text_fixtures import side

import h5py
import tokenizers

CLASSIFICATION = ("classification", "--text", "q", "--label", "label")
COMPLETION = ("completion", "--prompt", "q", "--completion", "a")
CHOICE = ("choice", "--prompt", "q", "--choices", "choices", "--answer", "right")


def bert_tokenizer(path):
    """One token per character, [CLS] before and [SEP] behind a text."""
    vocabulary = {token: number for number, token in enumerate(["[UNK]", "[CLS]", "[SEP]"] + [chr(c) for c in range(32, 127)])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer.add_special_tokens(["[UNK]", "[CLS]", "[SEP]"])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    tokenizer.save(str(path))
    return vocabulary


class PrepareExamples(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)

    def write(self, rows, name="rows.jsonl"):
        path = self.folder / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    def run_tool(self, task, *arguments):
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            code = prepare_examples.main([*task, "--name", "e", "--out", str(self.folder / "e.h5"), *arguments])
        return code, output.getvalue()

    def prepare(self, task, *arguments):
        """{split: [(tokens, prompt, label)]}, the attributes and the counts."""
        code, output = self.run_tool(task, *arguments)
        self.assertEqual(code, 0, output)
        splits = {}
        with h5py.File(self.folder / "e.h5") as file:
            attributes = {key: value.decode() if isinstance(value, bytes) else value for key, value in file.attrs.items()}
            for split in prepare_examples.SPLITS:
                tokens, starts = file[split]["tokens"][:].tolist(), file[split]["examples"][:].tolist()
                splits[split] = [(tokens[a:b], p, label) for a, b, p, label in
                                 zip(starts, starts[1:], file[split]["prompts"][:].tolist(), file[split]["labels"][:].tolist())]
        return splits, attributes, json.loads(attributes["provenance"])["records"]

    def refusal(self, task, *arguments):
        code, output = self.run_tool(task, *arguments)
        self.assertEqual(code, 2, output)
        self.assertIn("hint:", output)
        self.assertFalse((self.folder / "e.h5").exists())
        return output

    def test_does_not_depend_on_order_or_packaging_of_the_records(self):
        rows = fixtures.rows()
        for task in (CLASSIFICATION, COMPLETION, CHOICE):
            _, first, _ = self.prepare(task, self.write(rows))
            shuffled = random.Random(1).sample(rows, len(rows))
            table = self.folder / "part.csv"
            with open(table, "w", newline="") as out:
                writer = csv.DictWriter(out, list(rows[0]))
                writer.writeheader()
                writer.writerows({**row, "choices": json.dumps(row["choices"])} for row in shuffled[:20])
            _, second, _ = self.prepare(task, str(table), self.write(shuffled[20:], "rest.jsonl"))
            self.assertEqual(first["fingerprint"], second["fingerprint"], task[0])

    def test_the_fingerprint_is_the_documented_hash(self):
        for task in (CLASSIFICATION, CHOICE):
            _, attributes, _ = self.prepare(task, self.write(fixtures.rows()))
            names = ["tokens", "examples", "prompts", "labels"] + ["groups"] * (task == CHOICE) + ["bytes"]
            lines = ["moraine-text-examples 1", f"{task[0]} {hashlib.sha256(attributes['class_names'].encode()).hexdigest()}", "bytes-v1 257 256"]
            with h5py.File(self.folder / "e.h5") as file:
                for split in ("train", "validation", "test"):
                    self.assertEqual(sorted(file[split]), sorted(names))
                    lines += [f"{split}/{n} " + hashlib.sha256(file[split][n][:].astype("<u4" if n == "tokens" else "<i8").tobytes()).hexdigest() for n in names]
            self.assertEqual(attributes["fingerprint"], hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest())

    def test_special_tokens_surround_a_text_and_only_precede_a_prompt(self):
        ids = bert_tokenizer(self.folder / "tokenizer.json")
        rows = self.write([{"q": f"{n:03d}", "label": n % 2, "a": "x"} for n in range(60)])
        splits, _, _ = self.prepare(CLASSIFICATION, "--tokenizer", str(self.folder / "tokenizer.json"), rows)
        expected = {(1, *(ids[c] for c in f"{n:03d}"), 2): n % 2 for n in range(60)}
        self.assertEqual({tuple(tokens): label for part in splits.values() for tokens, _, label in part}, expected)
        splits, _, _ = self.prepare(COMPLETION, "--tokenizer", str(self.folder / "tokenizer.json"), rows)
        for tokens, prompt, _ in splits["train"]:
            self.assertEqual((tokens[0], prompt, tokens[4:]), (1, 4, [ids["x"], 2]))

    def test_what_is_too_long_is_cut_for_classification_and_dropped_otherwise(self):
        ids = bert_tokenizer(self.folder / "tokenizer.json")
        rows = self.write([{"q": f"{n:03d}" + "y" * (10 * (n % 3 == 0)), "label": n % 2, "a": "x"} for n in range(90)])
        splits, _, counts = self.prepare(CLASSIFICATION, "--tokenizer", str(self.folder / "tokenizer.json"), "--max-tokens", "6", rows)
        self.assertEqual(counts["truncated"], 30)
        self.assertEqual(sum(tokens[-2:] == [ids["y"], 2] and len(tokens) == 6 for part in splits.values() for tokens, _, _ in part), 30)
        splits, _, counts = self.prepare(COMPLETION, "--max-tokens", "6", rows)
        self.assertEqual((counts["too_long"], sum(map(len, splits.values()))), (30, 60))

    def test_equal_texts_stay_on_one_side(self):
        rows = [{"q": f"prompt {n}", "a": f"{k}"} for n in range(40) for k in range(3)]
        splits, _, counts = self.prepare(COMPLETION, "--validation", "0.2", "--test", "0.2", self.write(rows + rows[:5]))
        self.assertEqual(counts["exact_duplicates"], 5)
        for split, part in splits.items():
            self.assertEqual({bytes(tokens[:prompt]).decode() for tokens, prompt, _ in part}, {r["q"] for r in rows if side(r["q"].encode(), 0.2, 0.2) == split})
            self.assertEqual(len(part) % 3, 0)

    def test_a_text_of_a_given_test_split_is_held_out_of_the_others(self):
        rows = [{"q": f"prompt {n}", "a": "x"} for n in range(40)]
        splits, _, counts = self.prepare(COMPLETION, "--test-file", self.write(rows[:10], "test.jsonl"), self.write(rows[5:]))
        self.assertEqual((len(splits["test"]), counts["held_out"], sum(map(len, splits.values()))), (10, 5, 40))
        named = self.write([{**row, "part": ("train", "dev", "test")[n % 3]} for n, row in enumerate(rows)])
        splits, _, _ = self.prepare(COMPLETION, "--split-column", "part", named)
        self.assertEqual([len(splits[split]) for split in prepare_examples.SPLITS], [14, 13, 13])

    def test_a_text_with_two_labels_is_refused_or_left_out(self):
        rows = self.write([{"q": f"text {n}", "label": n % 2} for n in range(60)] + [{"q": "text 3", "label": 0}])
        self.assertIn("the same text has several labels: '0'", self.refusal(CLASSIFICATION, rows))
        splits, _, counts = self.prepare(CLASSIFICATION, "--drop-conflicts", rows)
        self.assertEqual((counts["conflicting"], sum(map(len, splits.values()))), (2, 59))

    def test_an_answer_is_a_choice_or_its_place(self):
        rows = [{"q": f"q{n}", "choices": ["1", "0", "two"], "right": ("0", "two", 0, "2")[n % 4]} for n in range(80)]
        splits, _, _ = self.prepare(CHOICE, self.write(rows))
        right = {bytes(tokens[:prompt]).decode(): bytes(tokens[prompt:-1]).decode() for part in splits.values() for tokens, prompt, label in part if label}
        self.assertEqual(right, {f"q{n}": ("0", "two", "1", "two")[n % 4] for n in range(80)})

    def test_a_cap_keeps_the_smallest_hashes(self):
        rows = fixtures.rows()
        splits, _, counts = self.prepare(COMPLETION, "--max-examples", "40", self.write(rows))
        kept = sorted((r["q"] for r in rows), key=lambda q: hashlib.sha256(q.encode()).digest())[:40]
        self.assertEqual({bytes(tokens[:prompt]).decode() for part in splits.values() for tokens, prompt, _ in part}, set(kept))
        self.assertEqual(counts["beyond_cap"], 20)

    def test_refuses_by_place_what_it_cannot_use(self):
        good = {"q": "q", "label": "l", "a": "a", "choices": ["a", "b"], "right": 0}
        for task, change, message in ((CLASSIFICATION, {"label": None}, "rows.jsonl:1: the label is null"),
                                      (CLASSIFICATION, {"q": 3}, "rows.jsonl:1: --text is 3, not text"),
                                      (CLASSIFICATION, {"q": "a\0"}, "is binary"),
                                      (CLASSIFICATION, {}, "a single class"),
                                      (COMPLETION, {"a": ["x"]}, 'rows.jsonl:1: --completion is ["x"], not text'),
                                      (CHOICE, {"choices": ["a"]}, "no list of two or more"),
                                      (CHOICE, {"choices": ["a", "a"]}, "two choices are the same"),
                                      (CHOICE, {"choices": "a, b"}, "not a JSON list"),
                                      (CHOICE, {"right": 2}, "the answer 2 is none of the 2 choices"),
                                      (CHOICE, {"right": True}, "the answer true is none"),
                                      (COMPLETION, {}, "falls into the")):
            self.assertIn(message, self.refusal(task, self.write([{**good, **change}])))
        self.assertIn("has no field 'q' (it has: body)", self.refusal(COMPLETION, self.write([{"body": ""}])))
        self.assertIn("is no file of records", self.refusal(COMPLETION, self.write([good], "rows.txt")))
        self.assertIn("is no split", self.refusal((*COMPLETION, "--split-column", "a"), self.write([good])))


if __name__ == "__main__":
    unittest.main()
