#!/usr/bin/env python3
"""Turns records into one HDF5 file of tokenised examples that `moraine` fine-tunes on: docs/data.md describes the format and every rule.

Examples:
  scripts/prepare_examples.py classification --name intents --out intents.h5 --label intent --tokenizer model/tokenizer.json intents.jsonl
  scripts/prepare_examples.py completion --name sums --out sums.h5 --prompt 'Question: {question} Answer:' --completion ' {answer}' sums.csv
  scripts/prepare_examples.py choice --name quiz --out quiz.h5 --prompt '{question}' --choices choices --answer answer quiz.jsonl

Files hold records: .jsonl, .ndjson, .json, .csv, .tsv and .parquet (.gz or not). --text, --prompt and --completion are the name of a field, or text
with fields in braces. The result does not depend on the order or the names of the files. Exit codes: 2 bad input, 3 the disk, a file or a
package failed, 130 interrupted.
"""
import argparse
import hashlib
import json
import pathlib
import platform
import string
import sys
from collections import Counter

try:
    import h5py
    import numpy as np
    from preparation import Refused, check_name, ending, exit_code_of, hdf5_output, output_file, read_bytes, write_attributes
    from prepare_text import RECORDS, SPLITS, ByteEncoder, GrowingDataset, HuggingFaceEncoder, as_text, find_files, readable, shortened, split_of
except ImportError as error:
    if __name__ != "__main__":
        raise
    print(f"prepare_examples: {error}\n  hint: run scripts/setup once, then .venv/bin/python {sys.argv[0]}", file=sys.stderr)
    sys.exit(3)

FORMAT = "moraine-text-examples"
FORMAT_VERSION = 1
BATCH = 4096      # texts tokenised at a time
WIDTHS = {"tokens": "<u4", "examples": "<i8", "prompts": "<i8", "labels": "<i8", "groups": "<i8", "bytes": "<i8"}   # as the fingerprint takes them


# Reading ---------------------------------------------------------------------------------------------------------

class Template:
    """A field's text, or text with fields in braces."""

    def __init__(self, option, text):
        self.option, self.text = option, text
        try:
            self.fields = [name for _, name, _, _ in string.Formatter().parse(text) if name is not None]
        except ValueError as error:
            raise Refused(f"--{option} {text!r}: {error}", "write {{ and }} for braces that are text") from error
        self.plain = not self.fields
        if self.plain:
            self.fields = [text]
        if not all(self.fields):
            raise Refused(f"--{option} {text!r} has braces without a name", "name a field: {question}")

    def of(self, record, origin):
        values = {name: as_text(member(record, name, origin, self.option)) for name in self.fields}
        return values[self.text] if self.plain else self.text.format_map(values)


def member(record, name, origin, option):
    if not isinstance(record, dict) or name not in record:
        keys = ", ".join(map(str, record)) if isinstance(record, dict) else f"{type(record).__name__}, not named fields"
        raise Refused(f"{origin} has no field '{name}' (it has: {shortened(keys)})", f"name the field with --{option}")
    return record[name]


def records_of(files, columns):
    for path in files:
        reader = RECORDS.get(ending(path))
        if reader is None:
            raise Refused(f"{path} holds no records", "give files that end in " + " ".join(RECORDS))
        yield from reader(read_bytes(path), path, columns)


def clean(text, origin, what):
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Refused(f"{origin}: {what} is not UTF-8 text", "convert the file to UTF-8 (iconv)") from error
    if not text.strip():
        raise Refused(f"{origin}: {what} is empty", "leave the record out")
    return text


def list_of_choices(value, origin):
    if isinstance(value, str):   # of a table
        try:
            value = json.loads(value)
        except ValueError as error:
            raise Refused(f"{origin}: choices are no JSON list: {shortened(value)}", "write them as [\"...\", \"...\"]") from error
    if not isinstance(value, list) or len(value) < 2:
        raise Refused(f"{origin}: choices are no list of two or more: {shortened(as_text(value))}", "leave the record out")
    return [clean(as_text(choice), origin, "a choice") for choice in value]


def index_of_answer(answer, choices, origin):
    """By its number from 0, or by its text."""
    if isinstance(answer, str) and answer in choices:
        return choices.index(answer)
    try:
        index = int(answer)
    except (TypeError, ValueError):
        index = -1
    if isinstance(answer, bool) or not 0 <= index < len(choices):
        raise Refused(f"{origin}: the answer {shortened(as_text(answer))} is none of its {len(choices)} choices", "give the choice's text, or its number from 0")
    return index


def read_classification(options, files):
    text = Template("text", options.text)
    for origin, record in records_of(files, text.fields + [options.label]):
        yield origin, clean(text.of(record, origin), origin, "the text"), as_text(member(record, options.label, origin, "label"))


def read_completion(options, files):
    prompt, completion = Template("prompt", options.prompt), Template("completion", options.completion)
    for origin, record in records_of(files, prompt.fields + completion.fields):
        yield origin, clean(prompt.of(record, origin), origin, "the prompt"), clean(completion.of(record, origin), origin, "the completion")


def read_choice(options, files):
    prompt = Template("prompt", options.prompt)
    for origin, record in records_of(files, prompt.fields + [options.choices, options.answer]):
        choices = list_of_choices(member(record, options.choices, origin, "choices"), origin)
        answer = index_of_answer(member(record, options.answer, origin, "answer"), choices, origin)
        yield origin, clean(prompt.of(record, origin), origin, "the prompt"), (tuple(options.before + choice for choice in choices), answer)


# Choosing --------------------------------------------------------------------------------------------------------

def distinct(examples, counts):
    """(digest of the text, text, rest) once each, in the order of their content's hash."""
    found = {}
    for _, text, rest in examples:
        counts["read"] += 1
        key = hashlib.sha256(json.dumps([text, rest], ensure_ascii=True).encode()).digest()
        if key in found:
            counts["exact_duplicates"] += 1
        found[key] = (hashlib.sha256(text.encode("utf-8")).digest(), text, rest)
    return [found[key] for key in sorted(found)]


def choose_classes(examples, options, counts):
    """The most frequent classes, each with at most so many examples: a random sample that file order has no part in."""
    sizes = Counter(label for _, _, label in examples)
    names = sorted(sizes, key=lambda name: (-sizes[name], name))[:options.top_classes or None]
    kept, taken = [], Counter()
    for example in examples:
        if example[2] not in names or (options.max_per_class and taken[example[2]] >= options.max_per_class):
            counts["not_selected"] += 1
            continue
        taken[example[2]] += 1
        kept.append(example)
    if len(names) < 2:
        raise Refused(f"only the class {', '.join(names) or '(none)'} is there", "a classification needs two classes or more")
    return kept, sorted(names)


# Tokenising ------------------------------------------------------------------------------------------------------

class Bytes(ByteEncoder):
    def texts(self, texts, most):
        return [np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.uint32)[:most] for text in texts]

    prompts = completions = lambda self, texts: [np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.uint32) for text in texts]


class HuggingFace(HuggingFaceEncoder):
    def texts(self, texts, most):
        """With the special tokens of the file's own post-processor, cut to `most` with them in place."""
        self.tokenizer.enable_truncation(most)
        ids = [np.array(encoding.ids, np.uint32) for encoding in self.tokenizer.encode_batch(texts, add_special_tokens=True)]
        self.tokenizer.no_truncation()
        return ids

    def prompts(self, texts):
        """With the special tokens that begin a text, without those that end one."""
        out = []
        for encoding in self.tokenizer.encode_batch(texts, add_special_tokens=True):
            last = len(encoding.ids)
            while last and encoding.special_tokens_mask[last - 1]:
                last -= 1
            out.append(np.array(encoding.ids[:last], np.uint32))
        return out

    def completions(self, texts):
        return [np.array(encoding.ids, np.uint32) for encoding in self.tokenizer.encode_batch(texts, add_special_tokens=False)]


def rows_of(task, examples, encoder, options, names, counts):
    """(tokens, prompt, label, question or None, bytes) of every example; choices of a question follow each other."""
    if task == "classification":
        for (_, text, label), tokens, uncut in zip(examples, encoder.texts([text for _, text, _ in examples], options.max_tokens),
                                                   encoder.texts([text for _, text, _ in examples], options.max_tokens + 1)):
            counts["cut"] += len(uncut) > options.max_tokens
            yield tokens, len(tokens), names.index(label), None, 0
        return
    answers = [(rest,) if task == "completion" else rest[0] for _, _, rest in examples]
    prompts = encoder.prompts([text for _, text, _ in examples])
    encoded = iter(encoder.completions([answer for each in answers for answer in each]))
    question = 0
    for (_, text, rest), prompt, each in zip(examples, prompts, answers):
        rows = []
        for number, answer in enumerate(each):
            tokens = np.concatenate([prompt, next(encoded), np.array([encoder.end_of_document], np.uint32)])
            rows.append((tokens, len(prompt), -1 if task == "completion" else int(number == rest[1]), None if task == "completion" else question, len(answer.encode("utf-8"))))
        if not len(prompt) or any(len(tokens) > options.max_tokens for tokens, *_ in rows):
            counts["too_long"] += 1
            continue
        question += 1
        yield from rows


# Writing ---------------------------------------------------------------------------------------------------------

def write_split(group, task, rows, wide, check):
    names = [name for name in WIDTHS if name != "groups" or task == "choice"]
    columns = {name: [] for name in names}
    columns["examples"].append(0)
    for tokens, prompt, label, question, size in rows:
        columns["tokens"].append(tokens)
        columns["examples"].append(columns["examples"][-1] + len(tokens))
        for name, value in (("prompts", prompt), ("labels", label), ("groups", question), ("bytes", size)):
            if name in columns:
                columns[name].append(value)
    lines = ""
    for name in names:
        values = np.concatenate(columns[name]) if name == "tokens" else np.array(columns[name], np.int64)
        out = GrowingDataset(group, name, ("<u4" if wide else "<u2") if name == "tokens" else "<i8", WIDTHS[name])
        out.append(values)
        lines += out.fingerprint_line()
        check()
    return {"examples": len(columns["labels"]), "tokens": columns["examples"][-1]}, lines


def write_examples(options, splits, encoder, names, provenance):
    class_names = json.dumps(names, separators=(",", ":"), ensure_ascii=False)
    head = f"{FORMAT} {FORMAT_VERSION}\n{options.task}\n{encoder.name} {encoder.vocab_size}\n{class_names}\n"
    fingerprint = hashlib.sha256(head.encode("utf-8"))
    with hdf5_output(options.out) as (file, stream):
        for split in SPLITS:
            if splits[split]:
                provenance["splits"][split], lines = write_split(file.create_group(split), options.task, splits[split], encoder.vocab_size > 1 << 16, stream.check)
                fingerprint.update(lines.encode())
        write_attributes(file, {"format": FORMAT, "format_version": FORMAT_VERSION, "name": options.name, "task": options.task, "class_names": class_names,
                                "tokenizer": encoder.name, "vocab_size": encoder.vocab_size, "end_of_document": encoder.end_of_document,
                                "fingerprint": fingerprint.hexdigest(), "provenance": json.dumps(provenance, sort_keys=True)})
    return fingerprint.hexdigest()


def prepare(options):
    counts = dict.fromkeys(("read", "exact_duplicates", "not_selected", "cut", "too_long"), 0)
    check_name(options.name)
    files = find_files(options.inputs)
    options.out = output_file(options.out, files + [options.tokenizer] * bool(options.tokenizer))
    encoder = HuggingFace(options.tokenizer, options.end_of_document) if options.tokenizer else Bytes()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    read = {"classification": read_classification, "completion": read_completion, "choice": read_choice}[options.task]
    examples, names = distinct(read(options, files), counts), []
    if options.task == "classification":
        examples, names = choose_classes(examples, options, counts)
    parts = {split: [] for split in SPLITS}
    for example in examples:
        parts[split_of(example[0], options.validation, options.test)].append(example)
    splits = {split: list(rows_of(options.task, parts[split], encoder, options, names, counts)) for split in SPLITS}
    for split, share in (("train", 1), ("validation", options.validation), ("test", options.test)):
        if share and not splits[split]:
            raise Refused(f"no example of '{options.name}' is left for the {split} split: {counts['read']} read, {counts['too_long']} of more than {options.max_tokens} tokens",
                          f"name more examples, raise --max-tokens, or set --{split} 0 / a larger share")
    missing = set(range(len(names))) - {label for _, _, label, _, _ in splits["train"]}
    if missing:
        raise Refused(f"the class '{names[min(missing)]}' has no example in the training split", "leave rare classes out with --top-classes")
    provenance = {"sources": readable(options.inputs), "notes": readable(options.note), "examples": counts, "splits": {},
                  "options": {key: getattr(options, key) for key in sorted(vars(options)) if key not in ("inputs", "out", "note", "name", "tokenizer")},
                  "versions": {"python": platform.python_version(), "numpy": np.__version__, "h5py": h5py.__version__}}
    fingerprint = write_examples(options, splits, encoder, names, provenance)
    sizes = ", ".join(f"{split} {s['examples']} examples / {s['tokens']} tokens" for split, s in provenance["splits"].items())
    print(f"{options.out}: {sizes}; {len(names)} classes; {counts['exact_duplicates']} exact duplicates, {counts['not_selected']} not selected, "
          f"{counts['cut']} cut, {counts['too_long']} too long; fingerprint {fingerprint[:12]}")


def add_common(parser, most):
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="file, folder or glob of records (%s)" % " ".join(RECORDS))
    parser.add_argument("--name", required=True, help="name of the set")
    parser.add_argument("--out", required=True, type=pathlib.Path, help="HDF5 file to write")
    parser.add_argument("--tokenizer", help="tokenizer.json of a Hugging Face model (default: bytes)")
    parser.add_argument("--end-of-document", help="token of --tokenizer that ends a completion (default: as scripts/prepare_text.py)")
    parser.add_argument("--max-tokens", type=int, default=most, help=f"longest example, special tokens included (default: {most})")
    parser.add_argument("--validation", type=float, default=0.1, help="share of examples (default: 0.1)")
    parser.add_argument("--test", type=float, default=0.1, help="share of examples (default: 0.1)")
    parser.add_argument("--note", action="append", default=[], help="provenance to record; may be repeated")


def parse_options(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    classes = tasks.add_parser("classification", help="a text and its class; longer texts are cut")
    add_common(classes, 128)
    classes.add_argument("--text", default="text", help="field, or text with {fields} (default: text)")
    classes.add_argument("--label", default="label", help="field of the class (default: label)")
    classes.add_argument("--top-classes", type=int, default=0, help="keep the most frequent classes (default: all)")
    classes.add_argument("--max-per-class", type=int, default=0, help="keep a random sample of so many of each class (default: all)")
    completion = tasks.add_parser("completion", help="a prompt and what follows it; longer ones are dropped")
    add_common(completion, 512)
    completion.add_argument("--prompt", default="prompt", help="field, or text with {fields} (default: prompt)")
    completion.add_argument("--completion", default="completion", help="field, or text with {fields} (default: completion)")
    choice = tasks.add_parser("choice", help="a prompt and several completions, one of them right; longer ones are dropped")
    add_common(choice, 512)
    choice.add_argument("--prompt", default="question", help="field, or text with {fields} (default: question)")
    choice.add_argument("--choices", default="choices", help="field that holds a list, in tables as JSON (default: choices)")
    choice.add_argument("--answer", default="answer", help="field of the right choice: its text, or its number from 0 (default: answer)")
    choice.add_argument("--before", default=" ", help="text between prompt and choice (default: one space)")
    options = parser.parse_args(arguments)
    if not (options.validation >= 0 and options.test >= 0 and options.validation + options.test < 1):
        parser.error(f"--validation and --test must be shares whose sum is below 1: {options.validation} and {options.test}")
    if options.max_tokens < 2 or min(getattr(options, "top_classes", 0), getattr(options, "max_per_class", 0)) < 0:
        parser.error("--max-tokens must be at least 2, --top-classes and --max-per-class must not be negative")
    if options.end_of_document and not options.tokenizer:
        parser.error("--end-of-document names a token of --tokenizer; text as bytes has its own")
    return options


def main(arguments=None):
    options = parse_options(arguments)
    return exit_code_of("prepare_examples", lambda: prepare(options), options.out, alone=__name__ == "__main__")


if __name__ == "__main__":
    sys.exit(main())
