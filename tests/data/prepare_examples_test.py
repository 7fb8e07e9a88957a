"""Tests of scripts/prepare_examples.py. Test names are claims; docs/data.md states the rules. Exit code 77: a package is missing."""
import contextlib
import hashlib
import io
import json
import pathlib
import sys
import tempfile
import unittest

try:
    import h5py
    import numpy as np
    import tokenizers
except ImportError as error:
    print(f"skipped: {error}: run scripts/setup")
    sys.exit(77)

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "scripts"))
import prepare_examples

SPLITS = ("train", "validation", "test")


class ExamplesCase(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)

    def write(self, name, records):
        path = self.folder / name
        path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
        return path

    def run_tool(self, task, *arguments):
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            code = prepare_examples.main([task, "--name", "d", "--out", str(self.folder / "d.h5"), *map(str, arguments)])
        return code, output.getvalue()

    def prepared(self, task, *arguments):
        code, output = self.run_tool(task, *arguments)
        self.assertEqual(code, 0, output)
        with h5py.File(self.folder / "d.h5") as file:
            return {split: {name: data[:] for name, data in file[split].items()} for split in file}, dict(file.attrs)

    def refused(self, parts, task, *arguments):
        code, output = self.run_tool(task, *arguments)
        self.assertEqual(code, 2, output)
        for part in (*parts, "hint:"):
            self.assertIn(part, output)
        self.assertFalse((self.folder / "d.h5").exists())

    def tokenizer(self):
        """A word is a token; [CLS] and [SEP] stand around a text."""
        words = ["[UNK]", "[CLS]", "[SEP]", *"abcdefgh"]
        tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        tokenizer.add_special_tokens(words[:3])
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
        path = self.folder / "tokenizer.json"
        tokenizer.save(str(path))
        return path


def examples(split):
    """(tokens, label, prompt) of a split."""
    bounds = split["examples"]
    return [(tuple(split["tokens"][a:b].tolist()), int(label), int(prompt)) for a, b, label, prompt in zip(bounds, bounds[1:], split["labels"], split["prompts"])]


class Classification(ExamplesCase):
    records = [{"text": f"text number {i}", "label": ("odd" if i % 2 else "even")} for i in range(200)]

    def test_every_text_stands_once_with_its_class(self):
        splits, attributes = self.prepared("classification", self.write("a.jsonl", self.records))
        self.assertEqual(json.loads(attributes["class_names"]), ["even", "odd"])
        found = [example for split in SPLITS for example in examples(splits[split])]
        self.assertEqual(sorted(found), sorted((tuple(r["text"].encode()), int(r["label"] == "odd"), len(r["text"])) for r in self.records))
        for split in ("validation", "test"):
            self.assertTrue(5 < len(examples(splits[split])) < 40)   # 20 expected, deviation 4.2

    def test_files_their_order_and_copies_do_not_matter(self):
        one = self.prepared("classification", self.write("a.jsonl", self.records))
        halves = self.write("b.jsonl", self.records[100:] + self.records[:7]), self.write("c.jsonl", self.records[:100][::-1])
        two = self.prepared("classification", *halves)
        self.assertEqual(one[1]["fingerprint"], two[1]["fingerprint"])

    def test_the_fingerprint_is_the_documented_one(self):
        splits, attributes = self.prepared("classification", self.write("a.jsonl", self.records))
        text = 'moraine-text-examples 1\nclassification\nbytes-v1 257\n["even","odd"]\n'
        for split in SPLITS:
            for name in ("tokens", "examples", "prompts", "labels", "bytes"):
                values = splits[split][name].astype("<u4" if name == "tokens" else "<i8")
                text += f"{split}/{name} {hashlib.sha256(values.tobytes()).hexdigest()}\n"
        self.assertEqual(attributes["fingerprint"].decode() if isinstance(attributes["fingerprint"], bytes) else attributes["fingerprint"],
                         hashlib.sha256(text.encode()).hexdigest())

    def test_special_tokens_are_the_tokenizers_and_long_texts_keep_them(self):
        records = [{"text": " ".join("abcdefgh"[(i + j) % 8] for j in range(2 + i % 5)), "label": str(i % 2)} for i in range(60)]
        splits, _ = self.prepared("classification", "--tokenizer", self.tokenizer(), "--max-tokens", 5, self.write("a.jsonl", records))
        for tokens, _, prompt in (example for split in SPLITS for example in examples(splits[split])):
            self.assertEqual((tokens[0], tokens[-1], prompt), (1, 2, len(tokens)))
            self.assertLessEqual(len(tokens), 5)

    def test_classes_can_be_the_most_frequent_and_capped(self):
        records = [{"text": f"{name} {i}", "label": name} for name, count in (("a", 90), ("b", 60), ("c", 30)) for i in range(count)]
        splits, attributes = self.prepared("classification", "--top-classes", 2, "--max-per-class", 50, self.write("a.jsonl", records))
        self.assertEqual(json.loads(attributes["class_names"]), ["a", "b"])
        labels = np.concatenate([splits[split]["labels"] for split in SPLITS])
        self.assertEqual(np.bincount(labels).tolist(), [50, 50])

    def test_bad_input_is_refused(self):
        path = self.write("a.jsonl", self.records)
        self.refused(("no field 'intent'", "it has: text, label", "--label"), "classification", "--label", "intent", path)
        self.refused(("only the class odd",), "classification", self.write("b.jsonl", self.records[1::2]))
        self.refused(("the text is empty",), "classification", self.write("c.jsonl", [*self.records, {"text": " ", "label": "odd"}]))
        self.refused(("holds no records",), "classification", self.write("d.txt", self.records))
        self.refused(("is one of the inputs",), "classification", "--out", path, path)
        rare = [*self.records, *({"text": f"rare {i}", "label": "rare"} for i in range(1))]
        code, output = self.run_tool("classification", "--validation", 0.45, "--test", 0.45, self.write("e.jsonl", rare))
        self.assertTrue(code == 0 or (code == 2 and "no example in the training split" in output), output)


class Completion(ExamplesCase):
    records = [{"q": f"{i}+1=", "a": str(i + 1)} for i in range(80)]

    def test_prompt_and_completion_meet_where_they_should(self):
        splits, _ = self.prepared("completion", "--prompt", "Q {q}", "--completion", "a", self.write("a.jsonl", self.records))
        found = [example for split in SPLITS for example in examples(splits[split])]
        wanted = [((*f"Q {r['q']}{r['a']}".encode(), 256), -1, len(f"Q {r['q']}")) for r in self.records]
        self.assertEqual(sorted(found), sorted(wanted))
        self.assertEqual(sorted(np.concatenate([splits[split]["bytes"] for split in SPLITS])), sorted(len(r["a"]) for r in self.records))

    def test_a_prompt_keeps_what_begins_a_text_and_not_what_ends_it(self):
        records = [{"q": " ".join(pair), "a": "h"} for pair in ((x, y) for x in "abcdefg" for y in "abcdefg")]
        splits, _ = self.prepared("completion", "--tokenizer", self.tokenizer(), "--prompt", "q", "--completion", "a", self.write("a.jsonl", records))
        for tokens, _, prompt in (example for split in SPLITS for example in examples(splits[split])):
            self.assertEqual((tokens[0], prompt, tokens[3:]), (1, 3, (10, 2)))   # [CLS] x y | h [SEP]

    def test_long_ones_are_dropped_and_counted(self):
        code, output = self.run_tool("completion", "--prompt", "q", "--completion", "a", "--max-tokens", 6, self.write("a.jsonl", self.records))
        self.assertEqual(code, 0, output)
        self.assertIn("71 too long", output)   # 9 of "0+1=" to "8+1=" and the end are 6 tokens

    def test_bad_templates_are_refused(self):
        path = self.write("a.jsonl", self.records)
        self.refused(("--prompt", "write {{ and }}"), "completion", "--prompt", "{q", "--completion", "a", path)
        self.refused(("braces without a name",), "completion", "--prompt", "{}", "--completion", "a", path)
        self.refused(("no field 'x'", "--completion"), "completion", "--prompt", "q", "--completion", "{x}", path)


class Choice(ExamplesCase):
    records = [{"question": f"twice {i} is", "choices": [str(2 * i), str(i + 100), "none"], "answer": str(2 * i) if i % 2 else 0} for i in range(60)]

    def test_choices_of_a_question_follow_each_other_and_one_is_right(self):
        splits, _ = self.prepared("choice", self.write("a.jsonl", self.records))
        seen = 0
        for split in SPLITS:
            rows = examples(splits[split])
            self.assertEqual(splits[split]["groups"].tolist(), [i // 3 for i in range(len(rows))])
            for first in range(0, len(rows), 3):
                tokens, _, prompt = rows[first]
                number = int(bytes(tokens[6:prompt]).split()[0])
                self.assertEqual([bytes(row[0][row[2]:-1]).decode() for row in rows[first:first + 3]], [f" {2 * number}", f" {number + 100}", " none"])
                self.assertEqual([row[1] for row in rows[first:first + 3]], [1, 0, 0])
                seen += 1
        self.assertEqual(seen, 60)

    def test_bad_questions_are_refused(self):
        for change, parts in (({"choices": ["x"]}, ("no list of two",)), ({"answer": "other"}, ("none of its 3 choices",)), ({"answer": 3}, ("none of its 3 choices",)),
                              ({"answer": True}, ("none of its 3 choices",)), ({"choices": "[1,"}, ("no JSON list",))):
            self.refused(parts, "choice", self.write("a.jsonl", [*self.records, {**self.records[0], **change}]))


if __name__ == "__main__":
    unittest.main()
