"""Tests of scripts/prepare_text.py. Test names are claims; docs/data.md states the rules."""
import contextlib
import csv
import gzip
import hashlib
import io
import json
import os
import pathlib
import resource
import signal
import subprocess
import sys
import tempfile
import unittest

import text_fixtures as fixtures
from text_fixtures import prepare_text

import h5py
import numpy as np
import tokenizers


def texts_of(file):
    """The attributes of a file, text as such."""
    return {key: value.decode() if isinstance(value, bytes) else value for key, value in file.attrs.items()}


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
            attributes = texts_of(file)
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
                lines = ["moraine-text-domain 1", "{tokenizer} {vocab_size} {end_of_document}".format(**texts_of(file))]
                for split in ("train", "validation", "test"):
                    self.assertEqual(sorted(file[split]), sorted(names))
                    lines += [f"{split}/{name} " + hashlib.sha256(file[split][name][:].astype("<u4" if name == "tokens" else "<i8")).hexdigest()
                              for name in names]
                self.assertEqual(file.attrs["fingerprint"].decode(), hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest())

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
        self.assertEqual(provenance["documents"], {"read": 35, "not_selected": 0, "exact_duplicates": 3, "too_short": 1, "blank": 1, "unreadable": 0,
                                                   "repaired": 0, "beyond_cap": 0, "near_duplicates": 0})
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
        self.assertIn("b.jsonl:1 has no field 'text' (it has: body, id)", self.refusal(self.write("b.jsonl", '{"body": "x", "id": 3}\n')))

    def records(self, contents):
        """The same documents in every form that holds records, as {file name: bytes}."""
        rows = [{"id": number, "body": content, "kind": "odd" if number % 2 else "even"} for number, content in enumerate(contents)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        tables = {}
        for name, separator in (("t.csv", ","), ("t.tsv", "\t")):
            out = io.StringIO(newline="")
            writer = csv.DictWriter(out, ["id", "body", "kind"], delimiter=separator)
            writer.writeheader()
            writer.writerows(rows)
            tables[name] = out.getvalue().encode()
        return {"a.jsonl": lines.encode(), "b.ndjson": lines.encode(), "C.JSONL": lines.encode(), "lines.json": lines.encode(),
                "list.json": json.dumps(rows, indent=1).encode(), "bom.jsonl": b"\xef\xbb\xbf" + lines.encode(),
                "packed.NDJSON.GZ": gzip.compress(lines.encode()), "packed.csv.gz": gzip.compress(tables["t.csv"]),
                "bom.csv": b"\xef\xbb\xbf" + tables["t.csv"], **tables}

    def test_every_form_of_records_gives_one_document_per_record(self):
        contents = [fixtures.text(seed) + 'with "quotes", commas,\tand\nlines' for seed in range(30)]
        _, as_files = self.prepare(self.write_all("in", contents))
        _, odd = self.prepare(self.write_all("odd", contents[1::2]))
        for name, data in self.records(contents).items():
            path = self.write(f"records/{name}", data)
            _, as_records = self.prepare(path, options=["--field", "body"])
            self.assertEqual(as_records["fingerprint"], as_files["fingerprint"], name)
            _, chosen = self.prepare(path, options=["--field", "body", "--only", "kind=odd"])
            self.assertEqual(chosen["fingerprint"], odd["fingerprint"], name)
        self.assertEqual(json.loads(chosen["provenance"])["documents"]["not_selected"], 15)

    def test_rows_of_parquet_files_are_documents(self):
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            code, output = self.run_tool(self.write("t.parquet", b"PAR1"))
            self.assertEqual(code, 3, output)
            self.assertRegex(output, "No module named 'pyarrow'(.|\n)*hint: install pyarrow")
            return
        contents = [fixtures.text(seed) for seed in range(30)]
        _, as_files = self.prepare(self.write_all("in", contents))
        pyarrow.parquet.write_table(pyarrow.table({"n": range(30), "body": contents}), self.folder / "t.parquet")
        _, as_rows = self.prepare(str(self.folder / "t.parquet"), options=["--field", "body"])
        self.assertEqual(as_rows["fingerprint"], as_files["fingerprint"])
        (self.folder / "d.h5").unlink()
        self.assertIn("has no field 'text' (it has: n, body)", self.refusal(str(self.folder / "t.parquet")))
        self.assertIn("not an intact Parquet", self.refusal(self.write("cut.parquet", (self.folder / "t.parquet").read_bytes()[:-9])))

    def test_markup_of_records_never_becomes_text_unasked(self):
        contents = [fixtures.text(seed) for seed in range(30)]
        for name, data in self.records(contents).items():
            self.assertIn("has no field 'text' (it has: id, body, kind)", self.refusal(self.write(f"records/{name}", data)), name)
        inputs = self.write_all("code", [fixtures.text(seed) for seed in range(30)])
        package = json.dumps({"name": fixtures.text(99)})
        self.write("code/package.json", package)
        self.assertIn("package.json: record 1 has no field 'text'", self.refusal(inputs))
        splits, _ = self.prepare(inputs, options=["--whole-files"])
        self.assertIn(package.encode(), [document for documents in splits.values() for document in documents])

    def test_refuses_records_it_would_misread(self):
        for name, content, part in (("ragged.csv", "text,n\nabc\n", "ragged.csv:2 has 1 fields, the first line names 2"), ("open.csv", 'text\n"abc\n', "open.csv:2: "),
                                    ("twice.csv", "text,text\na,b\n", "names a column twice"), ("number.jsonl", '{"text": 3}\n', "'text' is 3, not text"),
                                    ("null.json", '[{"text": null}]', "'text' is null, not text"), ("bare.jsonl", '"text"\n', "has no field 'text' (it has: str"),
                                    ("deep.jsonl", "[" * 100000 + "\n", "is not JSON")):
            self.assertIn(part, self.refusal(self.write(name, content)), name)

    def test_options_that_do_nothing_are_refused(self):
        inputs = self.write_all("in", [fixtures.text(seed) for seed in range(30)])
        for options in (["--field", "body"], ["--only", "kind=odd"], ["--whole-files"]):
            self.assertIn(f"{options[0]} does not apply", self.refusal(inputs, options=options))
        for options in (["--end-of-document", "</s>"], ["--whole-files", "--field", "body"], ["--only", "kind"], ["--validation", "nan"], ["--max-short", "2"]):
            with self.assertRaises(SystemExit) as ended, contextlib.redirect_stderr(io.StringIO()):
                self.run_tool(inputs, options=options)
            self.assertEqual(ended.exception.code, 2, options)
        lines = self.write("t.jsonl", json.dumps({"text": fixtures.text(1), "kind": "odd"}))
        self.assertIn("'kind' is one of: odd", self.refusal(lines, options=["--only", "kind=even"]))

    def test_refuses_to_drop_most_of_the_text_as_short(self):
        contents = [fixtures.text(seed) for seed in range(30)]
        inputs = self.write_all("in", contents + [f"short message {number}" for number in range(70)] + [""] * 200)
        self.assertIn("70 of 100 documents (70%) are shorter than 200 bytes", self.refusal(inputs))
        _, output = self.run_tool(inputs, options=["--max-short", "0.7"])
        self.assertIn("warning: 70 of 100 documents (70%)", output)
        splits, _ = self.prepare(inputs, options=["--min-document-bytes", "5"])
        self.assertEqual(sum(map(len, splits.values())), 100)

    def test_never_writes_over_what_it_must_not(self):
        text = "".join(json.dumps({"text": fixtures.text(seed)}) + "\n" for seed in range(30))
        source = pathlib.Path(self.write("corpus.jsonl", text))
        fixtures.write_tokenizer(self.folder / "tokenizer.json")
        (self.folder / "soft.h5").symlink_to("corpus.jsonl")
        os.link(source, self.folder / "hard.h5")
        notes = self.write("notes.txt", "mine")
        for out, part in (("corpus.jsonl", "is one of the inputs"), ("soft.h5", "is one of the inputs"), ("hard.h5", "is one of the inputs"),
                          ("tokenizer.json", "is one of the inputs"), ("notes.txt", "is not an HDF5 file"), (".", "is not a regular file"), ("/dev/null", "is not a regular file")):
            code, output = self.run_tool(str(source), options=["--out", str(self.folder / out), "--tokenizer", str(self.folder / "tokenizer.json")])
            self.assertEqual((code, part in output), (2, True), f"{out}: {output}")
        self.assertEqual(source.read_text(), text)
        self.assertEqual(pathlib.Path(notes).read_text(), "mine")
        (self.folder / "elsewhere").mkdir()
        (self.folder / "link.h5").symlink_to("elsewhere/real.h5")
        self.assertEqual(self.run_tool(str(source), options=["--out", str(self.folder / "link.h5")])[0], 0)
        self.assertTrue((self.folder / "link.h5").is_symlink() and (self.folder / "elsewhere/real.h5").is_file())

    def test_names_of_files_are_taken_as_they_are(self):
        inputs = self.write_all("data[1]", [fixtures.text(seed) for seed in range(30)])
        _, in_brackets = self.prepare(inputs)
        os.rename(inputs, self.folder / "plain")
        _, plain = self.prepare(str(self.folder / "plain"))
        self.assertEqual(in_brackets["fingerprint"], plain["fingerprint"])
        os.rename(self.folder / "plain/0.txt", os.fsencode(self.folder / "plain") + b"/\xff.txt")
        one = os.fsdecode(os.fsencode(self.folder / "plain") + b"/\xff.txt")
        _, odd = self.prepare(str(self.folder / "plain"), one)
        self.assertEqual(odd["fingerprint"], plain["fingerprint"])
        json.loads(odd["provenance"])["sources"][0].encode()   # no surrogates, which readers refuse
        self.assertEqual(self.run_tool(inputs, options=["--name", "a\nb"])[0], 2)

    def program(self, *arguments, **options):
        line = [sys.executable, prepare_text.__file__, "--name", "d", "--validation", "0.2", "--test", "0.2", *arguments]
        return subprocess.run(line, capture_output=True, text=True, timeout=100, **options)

    def test_a_file_that_cannot_be_written_ends_with_3_and_leaves_nothing(self):
        inputs = self.write_all("in", [fixtures.text(seed) for seed in range(30)])   # 29,233 bytes; the output has 28,925
        (self.folder / "out").mkdir()
        for limit in (10_000, 28_000):   # neither fits
            def limited(limit=limit):
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            done = self.program("--out", self.folder / "out/d.h5", inputs, preexec_fn=limited)
            self.assertEqual((done.returncode, os.listdir(self.folder / "out")), (3, []), done.stderr)
            self.assertIn("hint:", done.stderr)
        done = self.program("--out", pathlib.Path(self.write("notes.txt", "mine")) / "d.h5", inputs)
        self.assertEqual((done.returncode, "hint:" in done.stderr), (3, True), done.stderr)

    def test_a_signal_ends_it_without_a_half_written_file(self):
        inputs = self.write_all("in", [fixtures.text(seed) for seed in range(30)])
        (self.folder / "out").mkdir()
        script = ("import os, signal, sys; sys.path.insert(0, sys.argv.pop(1)); import prepare_text, preparation\n"
                  "prepare_text.write_split = lambda *_: os.kill(os.getpid(), signal.SIGTERM)\n"
                  "options = prepare_text.parse_options(sys.argv[1:])\n"
                  "sys.exit(preparation.exit_code_of('prepare_text', lambda: prepare_text.prepare(options), options.out, alone=True))")
        done = subprocess.run([sys.executable, "-c", script, pathlib.Path(prepare_text.__file__).parent, "--name", "d", "--out", self.folder / "out/d.h5",
                               "--validation", "0.2", "--test", "0.2", inputs], capture_output=True, text=True, timeout=100)
        self.assertEqual((done.returncode, os.listdir(self.folder / "out")), (130, []), done.stderr)
        self.assertIn("interrupted; nothing was written", done.stderr)

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
