#!/usr/bin/env python3
"""Turns records into one HDF5 file of tokenised examples: docs/data.md describes the format and every rule.

Examples:
  scripts/prepare_examples.py classification --name intents --out intents.h5 --text text --label intent --tokenizer model/tokenizer.json intents.jsonl
  scripts/prepare_examples.py completion --name gsm8k --out gsm8k.h5 --prompt question --completion answer --test-file test.jsonl train.jsonl
  scripts/prepare_examples.py choice --name quiz --out quiz.h5 --prompt question --choices choices --answer answer quiz.jsonl

Files hold records: .jsonl, .ndjson, .json, .csv, .tsv and .parquet (.gz or not). The result does not depend on the order or the names of
the files, nor on the order of their records. Exit codes: 2 bad input, 3 the disk, a file or a package failed, 130 interrupted.
"""
import argparse
import collections
import hashlib
import json
import pathlib
import platform
import sys

try:
    import h5py
    import numpy as np
    from preparation import (RECORDS, SPLITS, ByteEncoder, GrowingDataset, HuggingFaceEncoder, Refused, as_text, check_name, decode, ending,
                             exit_code_of, find_files, hdf5_output, output_file, read_bytes, readable, shortened, split_of, write_attributes)
except ImportError as error:
    if __name__ != "__main__":
        raise
    print(f"prepare_examples: {error}\n  hint: run scripts/setup once, then .venv/bin/python {sys.argv[0]}", file=sys.stderr)
    sys.exit(3)

FORMAT = "moraine-text-examples"
FORMAT_VERSION = 1
MAX_TOKENS = {"classification": 128, "completion": 512, "choice": 512}
SPLIT_NAMES = {"train": "train", "validation": "validation", "val": "validation", "dev": "validation", "test": "test"}
COUNTS = ("read", "unreadable", "repaired", "blank", "exact_duplicates", "conflicting", "held_out", "beyond_cap", "truncated", "too_long")

# What a record says: given text, what is to be told of it (a class; a completion; (choices, place of the right one)), the split it names.
Record = collections.namedtuple("Record", "given told split origin")
# Tokens of one example, as data/example_dataset.h has them.
Encoded = collections.namedtuple("Encoded", "tokens prompt label bytes")


# Reading ---------------------------------------------------------------------------------------------------------

class Reader:
    def __init__(self, options, counts):
        self.options, self.counts = options, counts
        self.columns = [c for c in (options.given, getattr(options, "label", None), getattr(options, "completion", None), getattr(options, "choices", None),
                                    getattr(options, "answer", None), options.split_column) if c]

    def records(self, files, split):
        for path in files:
            if ending(path) not in RECORDS:
                raise Refused(f"{path} is no file of records", f"give it the ending that says what it holds: {' '.join(RECORDS)}")
            for origin, row in RECORDS[ending(path)](read_bytes(path), path, self.columns):
                self.counts["read"] += 1
                try:
                    record = self.record(row, origin, split)
                except UnicodeRefused as refusal:
                    if not self.options.skip_unreadable:
                        raise
                    self.counts["unreadable"] += 1
                    print(f"skipped: {str(refusal).splitlines()[0]}", file=sys.stderr)
                    continue
                texts = [record.given, *self.told_texts(record)]
                if all(text.strip() for text in texts):
                    yield record
                else:
                    self.counts["blank"] += 1

    def record(self, row, origin, split):
        given = self.text(row, self.options.given, origin, "--" + self.options.given_option)
        told = {"classification": self.label, "completion": self.completion, "choice": self.choice}[self.options.task](row, origin)
        if self.options.split_column:
            named = as_text(self.member(row, self.options.split_column, origin, "--split-column"))
            if named not in SPLIT_NAMES:
                raise Refused(f"{origin}: '{shortened(named)}' is no split", f"a split is one of: {', '.join(SPLIT_NAMES)}")
            split = SPLIT_NAMES[named]
        return Record(given, told, split, origin)

    def told_texts(self, record):
        return record.told[0] if self.options.task == "choice" else [record.told]

    def member(self, row, name, origin, option):
        if not isinstance(row, dict) or name not in row:
            keys = ", ".join(row) if isinstance(row, dict) else f"{type(row).__name__}, not named fields"
            raise Refused(f"{origin} has no field '{name}' (it has: {shortened(keys)})", f"name the field with {option}")
        return row[name]

    def intact(self, text, origin, option):
        if not isinstance(text, str):
            raise Refused(f"{origin}: {option} is {shortened(as_text(text))}, not text", f"name another field with {option}, or leave the record out")
        try:
            return decode(text.encode("utf-8", "surrogatepass"), origin, self.counts)
        except Refused as refusal:
            raise UnicodeRefused(*str(refusal).split("\n  hint: ")) from refusal

    def text(self, row, name, origin, option):
        return self.intact(self.member(row, name, origin, option), origin, option)

    def label(self, row, origin):
        value = self.member(row, self.options.label, origin, "--label")
        if value is None or isinstance(value, (dict, list, float)):
            raise Refused(f"{origin}: the label is {shortened(as_text(value))}", "a label is text, a whole number or true/false")
        return self.intact(as_text(value), origin, "--label")

    def completion(self, row, origin):
        return self.text(row, self.options.completion, origin, "--completion")

    def choice(self, row, origin):
        choices = self.member(row, self.options.choices, origin, "--choices")
        if isinstance(choices, str):   # a table holds text only
            try:
                choices = json.loads(choices)
            except ValueError as error:
                raise Refused(f"{origin}: the choices are not a JSON list: {shortened(choices)}", 'write them as ["one", "two"]') from error
        if not isinstance(choices, list) or len(choices) < 2:
            raise Refused(f"{origin}: the choices are no list of two or more: {shortened(as_text(choices))}", "a question needs a right and a wrong choice")
        choices = tuple(self.intact(choice, origin, "--choices") for choice in choices)
        if len(set(choices)) < len(choices):
            raise Refused(f"{origin}: two choices are the same: {shortened(as_text(list(choices)))}", "leave one of them out")
        return choices, self.right_choice(choices, self.member(row, self.options.answer, origin, "--answer"), origin)

    def right_choice(self, choices, answer, origin):
        """Text that is one of the choices means that one; else a place, counted from 0."""
        if isinstance(answer, str) and answer in choices:
            return choices.index(answer)
        place = int(answer) if isinstance(answer, str) and answer.isascii() and answer.isdigit() else answer
        if type(place) is not int or not 0 <= place < len(choices):
            raise Refused(f"{origin}: the answer {shortened(as_text(answer))} is none of the {len(choices)} choices", "give the text of a choice, or its place from 0")
        return place


class UnicodeRefused(Refused):
    """Text that is not readable: what --skip-unreadable passes over."""


# Choosing --------------------------------------------------------------------------------------------------------

def digest(record):
    return hashlib.sha256(record.given.encode()).digest()


def distinct(records, options, counts):
    """Each record once, in the order of the hash of its text, then of the hash of all of it; a text stands in one split only: test before
    validation before train."""
    by_text = collections.defaultdict(dict)
    for record in records:
        by_text[digest(record)].setdefault(record.told, []).append(record)
    kept = []
    for text in sorted(by_text):
        same = by_text[text]
        everywhere = [r for group in same.values() for r in group]
        if options.task == "classification" and len(same) > 1:
            if not options.drop_conflicts:
                raise Refused(f"the same text has several labels: {' and '.join(f'{shortened(told)!r} ({same[told][0].origin})' for told in sorted(same)[:2])}",
                              "mend the data, or leave all such texts out with --drop-conflicts")
            counts["conflicting"] += len(everywhere)
            continue
        split = max((r.split for r in everywhere), key=lambda s: -1 if s is None else SPLITS.index(s))
        for told in sorted(same, key=lambda told: hashlib.sha256(json.dumps(told).encode()).digest()):
            here = [r for r in same[told] if r.split == split]
            counts["held_out"] += len(same[told]) - len(here)
            counts["exact_duplicates"] += max(0, len(here) - 1)
            kept += here[:1]
    if options.max_examples and len(kept) > options.max_examples:
        counts["beyond_cap"] = len(kept) - options.max_examples
        kept = kept[:options.max_examples]
    if not kept:
        raise Refused(f"no example left for '{options.name}': {counts['read']} read, {counts['blank']} blank, {counts['conflicting']} conflicting", "name more records")
    return kept


def class_names_of(records):
    """0, 1, ... keep their number; other names are sorted."""
    names = {record.told for record in records}
    numbers = [str(number) for number in range(len(names))]
    if len(names) < 2:
        raise Refused(f"a single class: {', '.join(names)}", "name another field with --label")
    return numbers if names == set(numbers) else sorted(names)


def by_split(records, options):
    """{split: records}. Where a split is given by a file or column, its share is not drawn."""
    given = options.split_column is not None
    validation = 0 if given or options.validation_file else options.validation
    test = 0 if given or options.test_file else options.test
    splits = {split: [] for split in SPLITS}
    for record in records:
        splits[record.split or split_of(digest(record), validation, test)].append(record)
    expected = {"train": True, "validation": bool(validation or options.validation_file), "test": bool(test or options.test_file)}
    for split in SPLITS:
        if expected[split] and not splits[split]:
            raise Refused(f"no example of '{options.name}' falls into the {split} split: {len(records)} in all",
                          f"name more records, or give the {split} split a file" + ("" if split == "train" else f" or --{split} another share"))
    return splits


# Tokenising ------------------------------------------------------------------------------------------------------

class Tokens:
    """Texts as tokens, with or without what the tokeniser's post-processor puts around them."""

    def __init__(self, encoder):
        self.encoder = encoder
        self.tokenizer = getattr(encoder, "tokenizer", None)

    def plain(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids if self.tokenizer else list(text.encode())

    def prompt(self, text):
        """With special tokens before it, without those behind it: the text goes on."""
        if not self.tokenizer:
            return self.plain(text)
        encoding = self.tokenizer.encode(text)
        end = len(encoding.ids)
        while end and encoding.special_tokens_mask[end - 1]:
            end -= 1
        return encoding.ids[:end]

    def whole(self, text, limit):
        """All special tokens, the text cut off so that no more than `limit` tokens are left; and whether it was."""
        ids = self.tokenizer.encode(text).ids if self.tokenizer else self.plain(text)
        if len(ids) <= limit:
            return ids, False
        if not self.tokenizer:
            return ids[:limit], True
        added = self.tokenizer.num_special_tokens_to_add(False)
        if limit <= added:
            raise Refused(f"--max-tokens {limit} leaves no room for text: the tokenizer adds {added} special tokens", "raise --max-tokens")
        self.tokenizer.enable_truncation(limit)
        ids = self.tokenizer.encode(text).ids
        self.tokenizer.no_truncation()
        return ids, True


def encode(record, tokens, options, classes, counts):
    """The examples of a record: one, or one per choice; none if it is too long."""
    if options.task == "classification":
        ids, cut = tokens.whole(record.given, options.max_tokens)
        if not ids:
            raise Refused(f"{record.origin}: the tokenizer leaves no token of the text", "leave the record out")
        counts["truncated"] += cut
        return [Encoded(ids, len(ids), classes[record.told], 0)]
    prompt = tokens.prompt(record.given)
    if not prompt:
        raise Refused(f"{record.origin}: the tokenizer leaves no token of the prompt", "leave the record out")
    completions, right = record.told if options.task == "choice" else ([record.told], None)
    examples = []
    for place, completion in enumerate(completions):
        predicted = options.separator + completion
        ids = prompt + tokens.plain(predicted) + [tokens.encoder.end_of_document]
        examples.append(Encoded(ids, len(prompt), -1 if right is None else int(place == right), len(predicted.encode())))
    if max(len(example.tokens) for example in examples) > options.max_tokens:
        counts["too_long"] += 1
        return []
    return examples


# Writing ---------------------------------------------------------------------------------------------------------

def write_split(group, questions, task, vocab_size):
    """Writes lists of examples, one list per record. Returns the counts of the split and its lines of the fingerprint."""
    examples = [example for question in questions for example in question]
    columns = {"tokens": [token for example in examples for token in example.tokens],
               "examples": np.cumsum([0] + [len(example.tokens) for example in examples]),
               "prompts": [example.prompt for example in examples], "labels": [example.label for example in examples]}
    if task == "choice":
        columns["groups"] = [number for number, question in enumerate(questions) for _ in question]
    columns["bytes"] = [example.bytes for example in examples]
    lines = ""
    for name, values in columns.items():
        stored, hashed = ("<u2" if vocab_size <= 1 << 16 else "<u4", "<u4") if name == "tokens" else ("<i8", "<i8")
        out = GrowingDataset(group, name, stored, hashed)
        if len(values):
            out.append(np.asarray(values, np.int64))
        lines += out.fingerprint_line()
    return {"records": len(questions), "examples": len(examples), "tokens": len(columns["tokens"]), "bytes": sum(columns["bytes"])}, lines


def write_examples(options, splits, encoder, class_names, provenance):
    names = json.dumps(class_names)
    fingerprint = hashlib.sha256(f"{FORMAT} {FORMAT_VERSION}\n{options.task} {hashlib.sha256(names.encode()).hexdigest()}\n"
                                 f"{encoder.name} {encoder.vocab_size} {encoder.end_of_document}\n".encode())
    with hdf5_output(options.out) as (file, stream):
        for split in SPLITS:
            provenance["splits"][split], lines = write_split(file.create_group(split), splits[split], options.task, encoder.vocab_size)
            fingerprint.update(lines.encode())
            stream.check()
        write_attributes(file, {"format": FORMAT, "format_version": FORMAT_VERSION, "name": options.name, "task": options.task, "class_names": names,
                                "tokenizer": encoder.name, "vocab_size": encoder.vocab_size, "end_of_document": encoder.end_of_document,
                                "fingerprint": fingerprint.hexdigest(), "provenance": json.dumps(provenance, sort_keys=True)})
    return fingerprint.hexdigest()


def read_records(options, counts):
    sources = {None: options.inputs, "validation": options.validation_file, "test": options.test_file}
    files = {split: find_files(patterns) for split, patterns in sources.items() if patterns}
    inputs = [path for paths in files.values() for path in paths]
    options.out = output_file(options.out, inputs + [options.tokenizer] * bool(options.tokenizer))
    reader = Reader(options, counts)
    return [record for split, paths in files.items() for record in reader.records(paths, split)]


def prepare(options):
    counts = dict.fromkeys(COUNTS, 0)
    check_name(options.name)
    records = distinct(read_records(options, counts), options, counts)
    encoder = HuggingFaceEncoder(options.tokenizer, options.end_of_document) if options.tokenizer else ByteEncoder()
    class_names = class_names_of(records) if options.task == "classification" else []
    classes, tokens = {name: label for label, name in enumerate(class_names)}, Tokens(encoder)
    splits = {}
    for split, chosen in by_split(records, options).items():
        encoded = [encode(record, tokens, options, classes, counts) for record in chosen]
        splits[split] = [examples for examples in encoded if examples]
        if chosen and not splits[split]:
            raise Refused(f"all {len(chosen)} examples of the {split} split are longer than {options.max_tokens} tokens", "raise --max-tokens")
    missing = set(range(len(class_names))) - {examples[0].label for examples in splits["train"]}
    if missing and class_names:
        raise Refused(f"no training example of class '{shortened(class_names[min(missing)])}'", "name more records of it, or leave it out")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    shown = ("given", "label", "completion", "choices", "answer", "split_column", "separator", "max_tokens", "max_examples", "drop_conflicts", "validation", "test")
    provenance = {"sources": readable(options.inputs + options.validation_file + options.test_file), "notes": readable(options.note), "records": counts, "splits": {},
                  "options": {key: getattr(options, key, None) for key in shown},
                  "versions": {"python": platform.python_version(), "numpy": np.__version__, "h5py": h5py.__version__}}
    fingerprint = write_examples(options, splits, encoder, class_names, provenance)
    sizes = ", ".join(f"{split} {s['examples']} examples / {s['tokens']} tokens" for split, s in provenance["splits"].items())
    dropped = ", ".join(f"{count} {what.replace('_', ' ')}" for what, count in counts.items() if count)
    print(f"{options.out}: {sizes}; {dropped}; fingerprint {fingerprint[:12]}")


def add_common(parser, task):
    parser.set_defaults(task=task)
    parser.add_argument("inputs", nargs="+", metavar="FILES", help="files, folders or globs of records")
    parser.add_argument("--name", required=True, help="name of the set")
    parser.add_argument("--out", required=True, type=pathlib.Path, help="HDF5 file to write")
    parser.add_argument("--tokenizer", help="tokenizer.json of a Hugging Face model (default: bytes)")
    parser.add_argument("--end-of-document", help="token of --tokenizer that ends a text")
    parser.add_argument("--max-tokens", type=int, default=MAX_TOKENS[task], help="longest example (default: %(default)s)")
    parser.add_argument("--max-examples", type=int, default=0, help="keep a random sample of so many records (default: all)")
    parser.add_argument("--validation", type=float, default=0.1, help="share of the texts (default: %(default)s)")
    parser.add_argument("--test", type=float, default=0.1, help="share of the texts (default: %(default)s)")
    parser.add_argument("--validation-file", action="append", default=[], help="records of the validation split; may be repeated")
    parser.add_argument("--test-file", action="append", default=[], help="records of the test split; may be repeated")
    parser.add_argument("--split-column", help="field that names the split: train, validation (val, dev) or test")
    parser.add_argument("--skip-unreadable", action="store_true", help="skip records with binary or undecodable text instead of refusing")
    parser.add_argument("--note", action="append", default=[], help="provenance to record; may be repeated")


def parse_options(arguments):
    parser = argparse.ArgumentParser(prog="prepare_examples.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = parser.add_subparsers(dest="task", required=True)
    for task in MAX_TOKENS:
        one = tasks.add_parser(task)
        add_common(one, task)
        if task == "classification":
            one.add_argument("--text", dest="given", default="text", help="field with the text (default: text)")
            one.add_argument("--label", default="label", help="field with the class (default: label)")
            one.add_argument("--drop-conflicts", action="store_true", help="leave out texts that bear several labels instead of refusing")
        else:
            one.add_argument("--prompt", dest="given", default="prompt", help="field with what is given (default: prompt)")
            one.add_argument("--separator", default="", help="text between prompt and what is predicted, part of the latter (default: none)")
        if task == "completion":
            one.add_argument("--completion", default="completion", help="field with the text to predict (default: completion)")
        if task == "choice":
            one.add_argument("--choices", default="choices", help="field with the list of choices (default: choices)")
            one.add_argument("--answer", default="answer", help="field with the right choice: its text, or its place from 0 (default: answer)")
    options = parser.parse_args(arguments)
    options.given_option = "text" if options.task == "classification" else "prompt"
    if not (options.validation >= 0 and options.test >= 0 and options.validation + options.test < 1):
        parser.error(f"--validation and --test must be shares whose sum is below 1: {options.validation} and {options.test}")
    if options.max_tokens < 1 or options.max_examples < 0:
        parser.error("--max-tokens must be positive and --max-examples not negative")
    if options.end_of_document and not options.tokenizer:
        parser.error("--end-of-document names a token of --tokenizer; text as bytes has its own")
    if options.split_column and (options.validation_file or options.test_file):
        parser.error("--split-column and --validation-file or --test-file both give the splits: use one of them")
    return options


def main(arguments=None):
    options = parse_options(arguments)
    return exit_code_of("prepare_examples", lambda: prepare(options), options.out, alone=__name__ == "__main__")


if __name__ == "__main__":
    sys.exit(main())
