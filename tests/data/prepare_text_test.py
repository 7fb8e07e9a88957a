"""Tests of scripts/prepare_text.py. Test names are claims; docs/data.md states the rules."""
import contextlib
import gzip
import hashlib
import io
import json
import pathlib
import tempfile
import unittest

import text_fixtures as fixtures
from text_fixtures import prepare_text

import h5py
import numpy as np
import tokenizers


class PrepareText(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)

    def write(self, name, content):
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    def write_all(self, folder, contents):
        for number, content in enumerate(contents):
            self.write(f"{folder}/{number}.txt", content)
        return str(self.folder / folder)

    def run_tool(self, *inputs, options=()):
        """Exit code and what was printed."""
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            code = prepare_text.main(["--name", "d", "--out", str(self.folder / "d.h5"), "--validation", "0.2", "--test", "0.2", *options, *inputs])
        return code, output.getvalue()

    def prepare(self, *inputs, options=()):
        """{split: set of documents} and the attributes."""
        code, output = self.run_tool(*inputs, options=options)
        self.assertEqual(code, 0, output)
        with h5py.File(self.folder / "d.h5") as file:
            attributes = dict(file.attrs)
            splits = {}
            for split in prepare_text.SPLITS:
                tokens, bounds = file[split]["tokens"][:], file[split]["documents"][:]
                self.assertTrue((tokens[bounds[1:] - 1] == attributes["end_of_document"]).all())
                splits[split] = [tokens[a:b - 1].astype(np.uint8).tobytes() for a, b in zip(bounds, bounds[1:])]
        return splits, attributes

    def refusal(self, *inputs, options=()):
        code, output = self.run_tool(*inputs, options=options)
        self.assertEqual(code, 2, output)
        self.assertIn("hint:", output)
        self.assertEqual([p.name for p in self.folder.iterdir() if "h5" in p.name], [], "a refused run left a file")
        return output

    def test_splits_each_document_by_the_hash_of_its_content(self):
        contents = [fixtures.text(seed).encode() for seed in range(60)]
        splits, _ = self.prepare(self.write_all("in", contents))
        for split, documents in splits.items():
            self.assertEqual(set(documents), {c for c in contents if fixtures.side(c) == split})

    def test_does_not_depend_on_names_order_or_packaging_of_the_files(self):
        contents = [fixtures.text(seed) for seed in range(30)]
        _, as_files = self.prepare(self.write_all("in", contents))
        packed = [self.write(f"other/{100 - i}.gz", gzip.compress(c.encode(), mtime=i)) for i, c in enumerate(contents[:10])]
        lines = self.write("rest.jsonl.gz", gzip.compress("\n".join(json.dumps({"body": c}) for c in reversed(contents[10:])).encode()))
        _, as_mixture = self.prepare(lines, *reversed(packed), options=["--field", "body"])
        self.assertEqual(as_mixture["fingerprint"], as_files["fingerprint"])
        _, changed = self.prepare(self.write_all("in", [contents[0] + "!"] + contents[1:]))
        self.assertNotEqual(changed["fingerprint"], as_files["fingerprint"])

    def test_the_fingerprint_is_the_documented_hash_of_the_datasets(self):
        fixtures.write_tokenizer(self.folder / "tokenizer.json")
        inputs = self.write_all("in", [fixtures.text(seed) for seed in range(30)])
        for options, names in (((), ("tokens", "documents")),
                               (("--tokenizer", str(self.folder / "tokenizer.json")), ("tokens", "byte_offsets", "documents"))):
            code, output = self.run_tool(inputs, options=options)
            self.assertEqual(code, 0, output)
            with h5py.File(self.folder / "d.h5") as file:
                lines = ["moraine-text-domain 1", "{tokenizer} {vocab_size} {end_of_document}".format(**file.attrs)]
                for split in ("train", "validation", "test"):
                    self.assertEqual(sorted(file[split]), sorted(names))
                    lines += [f"{split}/{name} " + hashlib.sha256(file[split][name][:].astype("<u4" if name == "tokens" else "<i8")).hexdigest()
                              for name in names]
                self.assertEqual(file.attrs["fingerprint"], hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest())

    def test_writes_the_same_bytes_again(self):
        inputs = self.write_all("in", [fixtures.text(seed) for seed in range(30)])
        self.prepare(inputs)
        first = (self.folder / "d.h5").read_bytes()
        self.prepare(inputs)
        self.assertEqual((self.folder / "d.h5").read_bytes(), first)

    def test_documents_keep_their_side_when_others_are_added(self):
        before, _ = self.prepare(self.write_all("in", [fixtures.text(seed) for seed in range(40)]))
        after, _ = self.prepare(self.write_all("in", [fixtures.text(seed) for seed in range(90)]))
        for split in prepare_text.SPLITS:
            self.assertLessEqual(set(before[split]), set(after[split]))
            self.assertLess(len(before[split]), len(after[split]))

    def test_near_duplicates_stay_on_one_side(self):
        families = [[fixtures.text(seed) + f"changed ending {copy}" for copy in range(4)] for seed in range(25)]
        sides = [{fixtures.side(document.encode()) for document in family} for family in families]
        self.assertTrue(any(len(s) > 1 for s in sides), "the fixture needs families that plain hashing would tear apart")
        splits, attributes = self.prepare(self.write_all("in", [d for family in families for d in family]))
        for family in families:
            self.assertEqual(len({split for split, documents in splits.items() for d in family if d.encode() in documents}), 1)
        self.assertEqual(json.loads(attributes["provenance"])["documents"]["near_duplicates"], 75)

    def test_signatures_estimate_the_similarity_of_the_shingle_sets(self):
        def shingles(data):
            return {data[i:i + prepare_text.SHINGLE] for i in range(len(data) - prepare_text.SHINGLE + 1)}

        one, two = (fixtures.text(seed, words=400).encode() for seed in (1, 2))
        for share in (0.0, 0.3, 0.6, 0.9, 1.0):
            mixed = one[:int(share * len(one))] + two[int(share * len(two)):]
            exact = len(shingles(one) & shingles(mixed)) / len(shingles(one) | shingles(mixed))
            estimate = (prepare_text.signature(one) == prepare_text.signature(mixed)).mean()
            # Mean of 96 coin flips: standard deviation at most 0.051; four of them.
            self.assertAlmostEqual(estimate, exact, delta=0.21, msg=f"share {share}")

    def test_counts_what_it_drops(self):
        contents = [fixtures.text(seed) for seed in range(30)]
        splits, attributes = self.prepare(self.write_all("in", contents + contents[:3] + ["short", " \n" * 500]), options=["--note", "pkg 1.0"])
        provenance = json.loads(attributes["provenance"])
        self.assertEqual(sum(map(len, splits.values())), 30)
        self.assertEqual(provenance["documents"], {"read": 35, "exact_duplicates": 3, "too_short": 2, "unreadable": 0, "repaired": 0,
                                                        "beyond_cap": 0, "near_duplicates": 0})
        self.assertEqual(provenance["notes"], ["pkg 1.0"])
        self.assertEqual(provenance["splits"]["test"]["bytes"], sum(map(len, splits["test"])))

    def test_a_cap_keeps_a_sample_that_names_have_no_part_in(self):
        contents = [fixtures.text(seed) for seed in range(60)]
        cap = sum(len(c.encode()) for c in contents) // 2
        splits, attributes = self.prepare(self.write_all("in", contents), options=["--max-bytes", str(cap)])
        renamed, _ = self.prepare(self.write_all("renamed", reversed(contents)), options=["--max-bytes", str(cap)])
        self.assertEqual(splits, renamed)
        total = sum(len(d) for documents in splits.values() for d in documents)
        self.assertLessEqual(total, cap)
        self.assertGreater(total, cap - 2000)   # at most one document of about 1,000 bytes did not fit
        self.assertGreater(json.loads(attributes["provenance"])["documents"]["beyond_cap"], 20)

    def test_refuses_binary_and_other_encodings_by_name(self):
        inputs = self.write_all("in", [fixtures.text(seed) for seed in range(30)])
        self.write("in/program", fixtures.text(99).encode() + b"\0more")
        self.assertRegex(self.refusal(inputs), r"in/program is binary: NUL byte at offset \d+")
        self.write("in/program", fixtures.text(98).encode("latin-1", "ignore"))
        self.assertRegex(self.refusal(inputs), r"in/program is not UTF-8 text: \d+ undecodable places")
        splits, attributes = self.prepare(inputs, options=["--skip-unreadable"])
        self.assertEqual(sum(map(len, splits.values())), 30)
        self.assertEqual(json.loads(attributes["provenance"])["documents"]["unreadable"], 1)

    def test_repairs_a_stray_byte_in_a_long_text(self):
        inputs = self.write_all("in", [fixtures.text(seed) for seed in range(30)] + [fixtures.text(99, words=600).encode() + b"\xff end"])
        splits, attributes = self.prepare(inputs)
        self.assertEqual(json.loads(attributes["provenance"])["documents"]["repaired"], 1)
        self.assertEqual(sum(d.endswith("\ufffd end".encode()) for documents in splits.values() for d in documents), 1)

    def test_refuses_input_without_text(self):
        self.assertIn("no file matches", self.refusal(str(self.folder / "none" / "*.txt")))
        self.assertIn("no text left", self.refusal(self.write("empty.txt", "")))
        self.assertIn("falls into the", self.refusal(self.write("one.txt", fixtures.text(1))))
        self.assertIn("not an intact gzip", self.refusal(self.write("cut.gz", gzip.compress(fixtures.text(1).encode())[:-9])))

    def test_refuses_json_lines_it_cannot_read_by_line(self):
        self.assertIn("a.jsonl:2 is not JSON", self.refusal(self.write("a.jsonl", '{"text": "x"}\n{"text": \n')))
        self.assertIn("b.jsonl:1 has no text field 'text' (it has: body, id)", self.refusal(self.write("b.jsonl", '{"body": "x", "id": 3}\n')))

    def test_bytes_of_tokens_are_exact_per_document(self):
        fixtures.write_tokenizer(self.folder / "tokenizer.json")
        bpe = tokenizers.Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        contents = [fixtures.text(seed) for seed in range(20)] + [f"literal {fixtures.END} and <s> in text, no special token " * 9]
        encoder = prepare_text.HuggingFaceEncoder(self.folder / "tokenizer.json", None)
        for content, (tokens, sizes) in zip(contents, encoder.encode([c.encode() for c in contents])):
            self.assertEqual(tokens[-1], bpe.token_to_id(fixtures.END))
            self.assertNotIn(bpe.token_to_id(fixtures.END), tokens[:-1])
            self.assertEqual(sizes.sum(), len(content.encode()))
            # A byte-level token writes each of its bytes as one character, so its length is the answer wherever
            # tokens do not share a character of the text.
            lengths = np.array([len(bpe.id_to_token(t)) for t in tokens[:-1]] + [0])
            if content.isascii():
                np.testing.assert_array_equal(sizes, lengths)
            self.assertLess(np.abs(np.cumsum(sizes) - np.cumsum(lengths)).max(), 4)

    def test_asks_for_the_end_of_document_a_tokenizer_does_not_name(self):
        fixtures.write_tokenizer(self.folder / "tokenizer.json", end_of_document="<stop>")
        inputs = self.write_all("in", [fixtures.text(seed) for seed in range(30)])
        options = ["--tokenizer", str(self.folder / "tokenizer.json")]
        self.assertIn("--end-of-document", self.refusal(inputs, options=options))
        _, attributes = self.prepare(inputs, options=[*options, "--end-of-document", "<stop>"])
        self.assertRegex(attributes["tokenizer"], "^hf:[0-9a-f]{64}$")
        self.assertIn("is not a tokenizer.json", self.run_tool(inputs, options=["--tokenizer", self.write("t.json", "{}")])[1])


if __name__ == "__main__":
    unittest.main()
