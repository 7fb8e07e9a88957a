#!/usr/bin/env python3
"""Tests of scripts/task_records.py, on inputs of the published files' form. Test names are claims."""
import contextlib
import io
import json
import pathlib
import sys
import tempfile
import unittest
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "scripts"))
sys.dont_write_bytecode = True
import task_records


class TaskRecords(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)

    def make(self, task, *source, stdin=""):
        errors = io.StringIO()
        with mock.patch.object(sys, "argv", ["task_records.py", task, str(self.folder), *source]), mock.patch.object(sys, "stdin", io.StringIO(stdin)), \
                contextlib.redirect_stderr(errors):
            return task_records.main(), errors.getvalue()

    def records(self, name):
        return [json.loads(line) for line in (self.folder / f"{name}.jsonl").read_text().splitlines()]

    def test_a_pattern_of_quiz_gives_its_spellings_the_usual_one_first(self):
        for pattern, texts in (("a|b", ["a", "b"]), ("cap{ital}", ["capital", "cap"]), ("{I }[injure|thwart]", ["I injure", "I thwart", "injure", "thwart"]),
                               ("x[a|b{c}]y|z", ["xay", "xbcy", "xby", "z"]), ("", [""])):
            self.assertEqual(task_records.spellings(pattern)[0], texts, pattern)

    def test_wrong_choices_are_other_answers_of_the_topic(self):
        (self.folder / "index").write_text("/some/where/young:young:old{er}\n")
        (self.folder / "young").write_text("cub:lion|bear\nkitten:cat\ngosling:goose\ncalf:cow\nkid:goat\ncub:\\\nfox\n")
        self.assertEqual(self.make("quiz", str(self.folder))[0], 0)
        records = self.records("quiz")
        right = {"cub": {"lion", "fox"}, "kitten": {"cat"}, "gosling": {"goose"}, "calf": {"cow"}, "kid": {"goat"}}
        self.assertEqual([r["answer"] for r in records], ["lion", "cat", "goose", "cow", "goat", "fox"])
        for record in records:
            name = record["prompt"].removeprefix("young: ").removesuffix("\nolder:")
            wrong = set(record["choices"]) - {record["answer"]}
            self.assertEqual((record["topic"], len(record["choices"]), len(wrong)), ("young", 4, 3))
            self.assertFalse(wrong & right[name], "a second right choice")
            self.assertLessEqual(wrong, {"lion", "cat", "goose", "cow", "goat", "fox"})

    def test_sections_are_the_most_frequent_ones_of_descriptions_with_one_section(self):
        def package(text, section):
            return f"Package: p\nSection: {section}\nDescription: {text}\nOther: x\n"

        stanzas = [package(f"text {n} of {s}", f"s{s:02}") for s in range(20) for n in range(25 - s)]
        stanzas += [package("text 0 of 3", "contrib/s03"), package("text 1 of 3", "s04"), package("text 1 of 4", "s05")]
        self.assertEqual(self.make("sections", stdin="\n".join(stanzas))[0], 0)
        labels = [r["label"] for r in self.records("sections")]
        # The texts "1 of 3" and "1 of 4" bear two sections; the four smallest sections are left out.
        self.assertEqual({s: labels.count(s) for s in set(labels)}, {f"s{s:02}": 25 - s - (s in (3, 4)) for s in range(16)})

    def test_input_without_records_is_refused(self):
        code, errors = self.make("sections", stdin="nothing\n")
        self.assertEqual(code, 2)
        self.assertIn("no record of sections", errors)
        self.assertFalse((self.folder / "sections.jsonl").exists())


if __name__ == "__main__":
    unittest.main()
