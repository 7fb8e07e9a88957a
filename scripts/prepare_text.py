#!/usr/bin/env python3
"""Turns text into one HDF5 file per domain that `moraine` trains on: docs/data.md describes the format and every rule.

Examples:
  scripts/prepare_text.py --name german --out german.h5 corpus/de/ 'extra/**/*.txt.gz'
  scripts/prepare_text.py --name law --out law.h5 --field body --tokenizer model/tokenizer.json cases.jsonl.gz
  scripts/prepare_text.py --name sport --out sport.h5 --field article --only topic=sport news.csv

A file is one document, unless it holds records: .jsonl, .ndjson, .json, .csv, .tsv and .parquet (.gz or not) give one document per
record. Documents are split into train, validation and test by a hash of their content; near-duplicates stay on one side. The result
does not depend on the order or the names of the files. Exit codes: 2 bad input, 3 the disk, a file or a package failed, 130 interrupted.
"""
import argparse
import hashlib
import json
import os
import pathlib
import platform
import sys
import tempfile

try:
    import h5py
    import numpy as np
    from preparation import (CHUNK, END_OF_DOCUMENT_NAMES, RECORDS, SPLITS, ByteEncoder, GrowingDataset, HuggingFaceEncoder, Refused, as_text, check_name, decode, ending,
                             exit_code_of, find_files, hdf5_output, output_file, read_bytes, readable, shortened, split_of, write_attributes)
except ImportError as error:
    if __name__ != "__main__":
        raise
    print(f"prepare_text: {error}\n  hint: run scripts/setup once, then .venv/bin/python {sys.argv[0]}", file=sys.stderr)
    sys.exit(3)

FORMAT = "moraine-text-domain"
FORMAT_VERSION = 1
BATCH_BYTES = 4 << 20         # text tokenised at a time
MAX_SHORT = 0.5               # share of documents that may be dropped as too short; --max-short sets another
WARN_SHORT = 0.2              # from which a warning says so

SHINGLE = 32                  # bytes; a power of two
BANDS, ROWS = 32, 3           # pairs at the similarity limit become candidates with probability 0.986
SIMILAR = 0.5                 # estimated Jaccard similarity of shingle sets from which documents are near-duplicates
BUCKET_HEADS = 64             # members of a bucket are compared with its first so many
MASK = (1 << 64) - 1


# Reading ---------------------------------------------------------------------------------------------------------

class Reader:
    """Documents of files, under the options that concern reading."""

    def __init__(self, options, counts):
        self.field, self.whole_files, self.skip_unreadable = options.field or "text", options.whole_files, options.skip_unreadable
        self.column, _, self.value = (options.only or "").partition("=")
        self.others = set()      # values of the column that --only passed over
        self.counts = counts

    def reader_of(self, path):
        return None if self.whole_files else RECORDS.get(ending(path))

    def documents(self, files):
        """UTF-8 bytes of every document of the files."""
        for path in files:
            reader, data = self.reader_of(path), read_bytes(path)
            contents = self.chosen_texts(reader, data, path) if reader else [(data, path)]
            for content, origin in contents:
                self.counts["read"] += 1
                try:
                    yield decode(content, origin, self.counts).encode("utf-8")
                except Refused as refusal:
                    if not self.skip_unreadable:
                        raise
                    self.counts["unreadable"] += 1
                    print(f"skipped: {str(refusal).splitlines()[0]}", file=sys.stderr)

    def chosen_texts(self, reader, data, path):
        columns = [self.field] + [self.column] * (self.column not in ("", self.field))
        for origin, record in reader(data, path, columns):
            if self.column:
                value = as_text(self.member(record, self.column, origin, "--only"))
                if value != self.value:
                    self.counts["not_selected"] += 1
                    self.others.add(value)
                    continue
            text = self.member(record, self.field, origin, "--field")
            if not isinstance(text, str):
                raise Refused(f"{origin}: '{self.field}' is {shortened(as_text(text))}, not text", "name another field with --field, or leave the record out")
            yield text.encode("utf-8", "surrogatepass"), origin

    def member(self, record, name, origin, option):
        if not isinstance(record, dict) or name not in record:
            keys = ", ".join(record) if isinstance(record, dict) else f"{type(record).__name__}, not named fields"
            raise Refused(f"{origin} has no field '{name}' (it has: {shortened(keys)})",
                          f"name the field with {option}, or take files as they are with --whole-files")
        return record[name]

    def check_options(self, options, files):
        """Refuses options that would do nothing."""
        has_records = any(ending(path) in RECORDS for path in files)
        for option in ("field", "only", "whole_files"):
            if getattr(options, option) and not has_records:
                raise Refused(f"--{option.replace('_', '-')} does not apply: no input is a file of records ({' '.join(RECORDS)})",
                              "leave it out, or give the files the ending that says what they hold")


class Spool:
    """The distinct documents, on disk; in memory only hash, place and length of each."""

    def __init__(self, folder):
        self.file = tempfile.TemporaryFile(dir=folder)
        self.places = {}      # SHA-256 of the content -> (offset, bytes)

    def add(self, data):
        """False if the same content is there already."""
        digest = hashlib.sha256(data).digest()
        if digest in self.places:
            return False
        self.places[digest] = (self.file.tell(), len(data))
        self.file.write(data)
        return True

    def read(self, digest):
        offset, length = self.places[digest]
        self.file.seek(offset)
        return self.file.read(length)


# Near-duplicates -------------------------------------------------------------------------------------------------

def mix(value):
    """splitmix64's finaliser, on numpy arrays of uint64."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def signature(data):
    """MinHash of the set of all SHINGLE-byte windows: BANDS * ROWS minima under as many hash functions, uint64."""
    window = np.frombuffer(data.ljust(SHINGLE, b"\0"), np.uint8).astype(np.uint64) + np.uint64(1)
    base, width = 0x9E3779B97F4A7C15, 1
    while width < SHINGLE:    # the hash of 2w bytes from two hashes of w bytes
        window = window[:-width] * np.uint64(pow(base, width, 1 << 64)) + window[width:]
        width *= 2
    window = mix(window)
    multiplier = mix(np.arange(1, BANDS * ROWS + 1, dtype=np.uint64) * np.uint64(base)) | np.uint64(1)
    minima = np.full(BANDS * ROWS, MASK, np.uint64)
    for first in range(0, len(window), CHUNK):
        block = window[None, first:first + CHUNK] * multiplier[:, None]
        # The low bits of a product are weak; the minimum is decided by the high ones.
        minima = np.minimum(minima, block.min(axis=1))
    return minima


def near_duplicate_clusters(signatures):
    """For each document the index of the first document of its cluster (single linkage over similar pairs)."""
    root = np.arange(len(signatures))

    def find(index):
        while root[index] != index:
            root[index] = root[root[index]]
            index = root[index]
        return index

    for band in range(BANDS):
        rows = signatures[:, band * ROWS:(band + 1) * ROWS]
        order = np.lexsort(rows.T)
        borders = np.flatnonzero((rows[order][1:] != rows[order][:-1]).any(axis=1)) + 1
        for bucket in np.split(order, borders):
            if len(bucket) < 2:
                continue
            bucket = np.sort(bucket)
            for position, head in enumerate(bucket[:BUCKET_HEADS]):
                rest = bucket[position + 1:]
                for other in rest[(signatures[rest] == signatures[head]).mean(axis=1) >= SIMILAR]:
                    a, b = sorted((find(head), find(other)))
                    root[b] = a
    return np.array([find(index) for index in range(len(root))], dtype=np.int64)


# Writing ---------------------------------------------------------------------------------------------------------

def write_split(group, digests, spool, encoder, check):
    """Writes the documents in order; check() throws when the disk took no more. Returns the counts of the split and its lines of the fingerprint."""
    tokens_out = GrowingDataset(group, "tokens", "<u2" if encoder.vocab_size <= 1 << 16 else "<u4", "<u4")
    offsets_out = GrowingDataset(group, "byte_offsets", "<i8", "<i8") if encoder.stores_bytes else None
    if offsets_out:
        offsets_out.append([0])
    bounds, num_bytes, start = [0], 0, 0
    while start < len(digests):
        texts = []
        while start < len(digests) and sum(map(len, texts)) < BATCH_BYTES:
            texts.append(spool.read(digests[start]))
            start += 1
        encoded = list(encoder.encode(texts))
        bounds.extend((bounds[-1] + np.cumsum([len(tokens) for tokens, _ in encoded])).tolist())
        tokens_out.append(np.concatenate([tokens for tokens, _ in encoded]))
        offsets = num_bytes + np.cumsum(np.concatenate([sizes for _, sizes in encoded]))
        num_bytes = int(offsets[-1])
        if offsets_out:
            offsets_out.append(offsets)
        check()
    bounds_out = GrowingDataset(group, "documents", "<i8", "<i8")
    bounds_out.append(bounds)
    lines = "".join(out.fingerprint_line() for out in (tokens_out, offsets_out, bounds_out) if out)
    return {"documents": len(digests), "tokens": bounds[-1], "bytes": num_bytes}, lines


def write_domain(path, name, splits, spool, encoder, provenance):
    fingerprint = hashlib.sha256(f"{FORMAT} {FORMAT_VERSION}\n{encoder.name} {encoder.vocab_size} {encoder.end_of_document}\n".encode())
    with hdf5_output(path) as (file, stream):
        for split in SPLITS:
            provenance["splits"][split], lines = write_split(file.create_group(split), splits[split], spool, encoder, stream.check)
            fingerprint.update(lines.encode())
        write_attributes(file, {"format": FORMAT, "format_version": FORMAT_VERSION, "name": name, "tokenizer": encoder.name,
                                "vocab_size": encoder.vocab_size, "end_of_document": encoder.end_of_document,
                                "fingerprint": fingerprint.hexdigest(), "provenance": json.dumps(provenance, sort_keys=True)})
    return fingerprint.hexdigest()


def refuse_short_text(counts, options):
    """Says how much was too short; refuses when it is more than the share that is allowed."""
    holding_text = counts["read"] - counts["unreadable"] - counts["blank"]
    share = counts["too_short"] / max(1, holding_text)
    what = f"{counts['too_short']} of {holding_text} documents ({share:.0%}) are shorter than {options.min_document_bytes} bytes"
    if share > options.max_short:
        raise Refused(f"{what}; at most {options.max_short:.0%} may be dropped for it", "keep them with a lower --min-document-bytes, or allow it with --max-short 1")
    if share > WARN_SHORT:
        print(f"prepare_text: warning: {what} and were dropped; --min-document-bytes sets the limit", file=sys.stderr)


def read_all(options, files, counts):
    """The documents that are long enough, each once, in a temporary file beside the output."""
    reader = Reader(options, counts)
    reader.check_options(options, files)
    spool = Spool(options.out.parent)
    for data in reader.documents(files):
        if not data.strip():
            counts["blank"] += 1
        elif len(data) < options.min_document_bytes:
            counts["too_short"] += 1
        elif not spool.add(data):
            counts["exact_duplicates"] += 1
    if options.only and not counts["read"]:
        raise Refused(f"no record has {options.only}; '{reader.column}' is one of: {shortened(', '.join(sorted(reader.others)))}", "give one of these to --only")
    return spool


def prepare(options):
    counts = dict.fromkeys(("read", "not_selected", "unreadable", "repaired", "blank", "too_short", "exact_duplicates", "beyond_cap"), 0)
    check_name(options.name)
    files = find_files(options.inputs)
    options.out = output_file(options.out, files + [options.tokenizer] * bool(options.tokenizer))
    encoder = HuggingFaceEncoder(options.tokenizer, options.end_of_document) if options.tokenizer else ByteEncoder()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    spool = read_all(options, files, counts)

    # In the order of their content's hash: a cap takes a random sample that names and file order have no part in.
    digests, total = [], 0
    for digest in sorted(spool.places):
        total += spool.places[digest][1]
        if options.max_bytes and total > options.max_bytes:
            break
        digests.append(digest)
    counts["beyond_cap"] = len(spool.places) - len(digests)
    if not digests:
        raise Refused(f"no text left for '{options.name}': {counts['read']} documents read, {counts['blank']} blank, "
                      f"{counts['too_short']} shorter than {options.min_document_bytes} bytes, {counts['beyond_cap']} beyond the cap",
                      "name more text, lower --min-document-bytes or raise --max-bytes")
    refuse_short_text(counts, options)

    roots = near_duplicate_clusters(np.stack([signature(spool.read(digest)) for digest in digests]))
    splits = {split: [] for split in SPLITS}
    for digest, root in zip(digests, roots):
        splits[split_of(digests[root], options.validation, options.test)].append(digest)
    for split, share in (("train", 1), ("validation", options.validation), ("test", options.test)):
        if share and not splits[split]:
            raise Refused(f"no document of '{options.name}' falls into the {split} split: {len(digests)} documents in "
                          f"{len(set(roots.tolist()))} groups of near-duplicates", f"name more documents, or set --{split} 0 / a larger share")

    counts["near_duplicates"] = int((roots != np.arange(len(roots))).sum())
    provenance = {"sources": readable(options.inputs), "notes": readable(options.note), "documents": counts, "splits": {},
                  "options": {key: getattr(options, key) for key in ("field", "only", "whole_files", "min_document_bytes", "max_short", "max_bytes", "validation", "test")},
                  "versions": {"python": platform.python_version(), "numpy": np.__version__, "h5py": h5py.__version__}}
    fingerprint = write_domain(options.out, options.name, splits, spool, encoder, provenance)
    sizes = ", ".join(f"{split} {s['documents']} documents / {s['bytes']} bytes / {s['tokens']} tokens" for split, s in provenance["splits"].items())
    print(f"{options.out}: {sizes}; dropped {counts['exact_duplicates']} exact duplicates, {counts['too_short']} short, {counts['blank']} blank, {counts['beyond_cap']} beyond "
          f"the cap, {counts['unreadable']} unreadable; {counts['near_duplicates']} near-duplicates kept with their like; fingerprint {fingerprint[:12]}")


def parse_options(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="file, folder or glob; .gz is unpacked; %s hold one document per record" % " ".join(RECORDS))
    parser.add_argument("--name", required=True, help="name of the domain")
    parser.add_argument("--out", required=True, type=pathlib.Path, help="HDF5 file to write")
    parser.add_argument("--tokenizer", help="tokenizer.json of a Hugging Face model (default: bytes)")
    parser.add_argument("--end-of-document", help="token of --tokenizer that ends a document (default: the first it has of %s)" %
                        " ".join(END_OF_DOCUMENT_NAMES))
    parser.add_argument("--field", help="field or column of records that holds the text (default: text)")
    parser.add_argument("--only", metavar="FIELD=VALUE", help="take only the records whose field has this value, e.g. label=3")
    parser.add_argument("--whole-files", action="store_true", help="every file is one document, whatever its ending")
    parser.add_argument("--min-document-bytes", type=int, default=200, help="drop shorter documents (default: 200)")
    parser.add_argument("--max-short", type=float, default=MAX_SHORT,
                        help="refuse when more than this share of the documents is shorter (default: %(default)s; 1 allows any)")
    parser.add_argument("--max-bytes", type=int, default=0, help="keep a random sample of documents of at most this size (default: all)")
    parser.add_argument("--validation", type=float, default=0.05, help="share of documents (default: 0.05)")
    parser.add_argument("--test", type=float, default=0.05, help="share of documents (default: 0.05)")
    parser.add_argument("--skip-unreadable", action="store_true", help="skip binary files and other encodings instead of refusing")
    parser.add_argument("--note", action="append", default=[], help="provenance to record, e.g. 'manpages-de 4.18.1-1'; may be repeated")
    options = parser.parse_args(arguments)
    if not (options.validation >= 0 and options.test >= 0 and options.validation + options.test < 1):
        parser.error(f"--validation and --test must be shares whose sum is below 1: {options.validation} and {options.test}")
    if min(options.min_document_bytes, options.max_bytes) < 0:
        parser.error("--min-document-bytes and --max-bytes must not be negative")
    if not 0 <= options.max_short <= 1:
        parser.error(f"--max-short must be a share from 0 to 1: {options.max_short}")
    if options.end_of_document and not options.tokenizer:
        parser.error("--end-of-document names a token of --tokenizer; text as bytes has its own")
    if options.whole_files and (options.field or options.only):
        parser.error("--whole-files takes no records, so there is no --field or --only")
    if options.only is not None and not options.only.partition("=")[1]:
        parser.error(f"--only must be FIELD=VALUE: {options.only}")
    return options


def main(arguments=None):
    options = parse_options(arguments)
    return exit_code_of("prepare_text", lambda: prepare(options), options.out, alone=__name__ == "__main__")


if __name__ == "__main__":
    sys.exit(main())
