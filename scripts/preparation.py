"""What scripts/prepare_*.py share: how they refuse input, read files and tables, and let an output file appear whole or not at all."""
import contextlib
import csv
import glob
import gzip
import hashlib
import io
import json
import os
import pathlib
import signal
import stat
import sys
import traceback
import zlib

import h5py
import numpy as np

SPLITS = ("train", "validation", "test")
CHUNK = 16384                 # tokens per HDF5 chunk: what the reader decompresses to get at one sequence
MAX_BAD_SHARE = 0.001         # undecodable sequences per byte up to which a document is repaired instead of refused
END_OF_DOCUMENT_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"


class Refused(Exception):
    """Input or options the user has to change. Message and hint as everywhere in Moraine; exit code 2."""

    def __init__(self, message, hint):
        super().__init__(f"{message}\n  hint: {hint}")


class Missing(Exception):
    """Something that is not installed. Exit code 3."""

    def __init__(self, message, hint):
        super().__init__(f"{message}\n  hint: {hint}")


# Reading ---------------------------------------------------------------------------------------------------------

def plain_name(path):
    """The name without .gz: its ending says what the content is, in whatever case."""
    name = os.path.basename(path)
    return name[:-3] if name.lower().endswith(".gz") else name


def ending(path):
    """".csv" for a.csv, A.CSV and a.csv.gz."""
    return os.path.splitext(plain_name(path))[1].lower()


def read_bytes(path):
    data = pathlib.Path(path).read_bytes()
    if not str(path).lower().endswith(".gz"):
        return data
    try:
        return gzip.decompress(data)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise Refused(f"{path} is not an intact gzip file: {error}", "fetch the file again") from error


def table_rows(data, path):
    """Lines of comma-separated (.tsv: tab-separated) values as (line number, fields); fields may be quoted with ". Blank lines are passed
    over. A byte that is not UTF-8 becomes a surrogate, as in os.fsdecode."""
    csv.field_size_limit(sys.maxsize)
    text = io.TextIOWrapper(io.BytesIO(data), "utf-8-sig", "surrogateescape", newline="")
    reader = csv.reader(text, delimiter="\t" if ending(path) == ".tsv" else ",", strict=True)
    try:
        for row in reader:
            if any(row):
                yield reader.line_num, row
    except csv.Error as error:
        raise Refused(f"{path}:{reader.line_num}: {error}", "quote fields with \" and write \"\" for a quote inside") from error


def find_files(patterns):
    """Every file the patterns name, each once, sorted. A pattern is a file, a folder or a glob (** recurses)."""
    files = set()
    for pattern in patterns:
        if os.path.isfile(pattern):
            found = {pattern}
        else:
            match = os.path.join(glob.escape(pattern), "**", "*") if os.path.isdir(pattern) else pattern
            found = {path for path in glob.glob(match, recursive=True) if os.path.isfile(path)}
        if not found:
            raise Refused(f"no file matches '{pattern}'", "check the path; quote globs so that ** recurses")
        files |= found
    return sorted(files)


def decode(data, origin, counts):
    """UTF-8 text of one document. Refuses binary data; repairs a few stray bytes and counts the document."""
    hint = "leave the file out, convert it to UTF-8 (iconv), or pass --skip-unreadable"
    if b"\0" in data:
        raise Refused(f"{origin} is binary: NUL byte at offset {data.index(0)}", hint)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        text = data.decode("utf-8", errors="replace")
        bad = text.count("\ufffd")
        if bad > MAX_BAD_SHARE * len(data):
            raise Refused(f"{origin} is not UTF-8 text: {bad} undecodable places in {len(data)} bytes, "
                          f"the first at offset {error.start}", hint) from error
        counts["repaired"] += 1
        return text


def json_value(data, origin):
    try:
        return json.loads(data.decode("utf-8-sig", "surrogateescape"))
    except (ValueError, RecursionError) as error:
        raise Refused(f"{origin} is not JSON: {error}", "one JSON object per line; prepare_text.py takes the file as text with --whole-files") from error


def json_lines(data, path, _):
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            yield f"{path}:{number}", json_value(line, f"{path}:{number}")


def json_document(data, path, columns):
    """A list of records, one record, or records line by line: what is called .json is any of these."""
    try:
        value = json_value(data, path)
    except Refused:
        yield from json_lines(data, path, columns)
        return
    for number, record in enumerate(value if isinstance(value, list) else [value], 1):
        yield f"{path}: record {number}", record


def table(data, path, _):
    rows = table_rows(data, path)
    _, names = next(rows, (0, []))
    if len(set(names)) < len(names):
        raise Refused(f"{path}: its first line names a column twice: {shortened(', '.join(names))}", "the first line must name the columns")
    for line, fields in rows:
        if len(fields) != len(names):
            raise Refused(f"{path}:{line} has {len(fields)} fields, the first line names {len(names)} columns",
                          "quote fields that hold a separator; prepare_text.py takes the file as text with --whole-files")
        yield f"{path}:{line}", dict(zip(names, fields))


def parquet(data, path, columns):
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise Missing(f"{path} is a Parquet file, and {error}", f"install pyarrow ({sys.executable} -m pip install pyarrow), or convert the file to .jsonl") from error
    try:
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(data))
        if not set(columns) <= set(file.schema_arrow.names):
            yield path, dict.fromkeys(file.schema_arrow.names)
            return
        row = 0
        for batch in file.iter_batches(columns=columns):
            for record in batch.to_pylist():
                row += 1
                yield f"{path}: row {row}", record
    except (pyarrow.ArrowException, OSError) as error:   # the bytes are in memory: what cannot be read is their fault
        raise Refused(f"{path} is not an intact Parquet file: {error}", "fetch the file again") from error


# How files of records are read: reader(data, path, columns) yields (origin, record).
RECORDS = {".jsonl": json_lines, ".ndjson": json_lines, ".json": json_document, ".csv": table, ".tsv": table, ".parquet": parquet}


def readable(texts):
    """Sorted, with escapes for what is not UTF-8."""
    return sorted(text.encode("utf-8", "backslashreplace").decode() for text in texts)


def shortened(text):
    return text if len(text) <= 200 else text[:200] + "..."


def as_text(value):
    return value if isinstance(value, str) else json.dumps(value, default=str)


# Splitting -------------------------------------------------------------------------------------------------------

def split_of(digest, validation, test):
    """The side of a cluster, from the smallest content hash in it. Hashed again: the cap keeps the smallest hashes."""
    place = int.from_bytes(hashlib.sha256(b"moraine-split-v1" + digest).digest()[:8], "big") / 2**64
    return "test" if place < test else "validation" if place < test + validation else "train"


# Tokenising ------------------------------------------------------------------------------------------------------

class ByteEncoder:
    name, vocab_size, end_of_document = "bytes-v1", 257, 256
    stores_bytes = False      # every token is a byte, the end of a document none: nothing to store

    def encode(self, texts):
        """Per document: tokens with the end of document, and how many bytes of text each stands for."""
        for data in texts:
            tokens = np.append(np.frombuffer(data, np.uint8).astype(np.uint32), np.uint32(self.end_of_document))
            yield tokens, (tokens != self.end_of_document).astype(np.int64)


class HuggingFaceEncoder:
    stores_bytes = True

    def __init__(self, path, end_of_document):
        try:
            import tokenizers   # here: text as bytes does not need it
        except ImportError as error:
            raise Missing(f"--tokenizer: {error}", "run scripts/setup, or pip install tokenizers") from error

        content = pathlib.Path(path).read_bytes()
        try:
            self.tokenizer = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
        except Exception as error:   # tokenizers raises bare Exception
            raise Refused(f"{path} is not a tokenizer.json: {error}", "pass the file of a Hugging Face model") from error
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = True   # "<s>" inside a document is text
        self.name = "hf:" + hashlib.sha256(content).hexdigest()
        self.vocab_size = self.tokenizer.get_vocab_size(with_added_tokens=True)
        names = (end_of_document,) if end_of_document else END_OF_DOCUMENT_NAMES
        ids = [i for i in map(self.tokenizer.token_to_id, names) if i is not None]
        if not ids:
            raise Refused(f"{path} has no token {' or '.join(names)} to end a document with",
                          "name one of its tokens with --end-of-document")
        self.end_of_document = ids[0]

    def encode(self, texts):
        texts = [data.decode("utf-8") for data in texts]
        for text, encoding in zip(texts, self.tokenizer.encode_batch(texts, add_special_tokens=False)):
            points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
            byte_at = np.concatenate([[0], np.cumsum(1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000))])
            # A token stands for the bytes between the furthest end so far and its own; the last takes what is left.
            # So the sum is the document's size, even where a normaliser drops text or a character spans two tokens.
            ends = np.maximum.accumulate(byte_at[[end for _, end in encoding.offsets]]) if len(encoding) else np.zeros(0, np.int64)
            if len(ends):
                ends[-1] = byte_at[-1]
            tokens = np.append(np.array(encoding.ids, np.uint32), np.uint32(self.end_of_document))
            yield tokens, np.append(np.diff(ends, prepend=0), 0).astype(np.int64)


# Writing ---------------------------------------------------------------------------------------------------------

def output_file(path, inputs):
    """Where `--out PATH` goes, links followed. Refuses a place where writing would destroy something: an input, a directory, a device or a
    file that no preparation wrote."""
    path = pathlib.Path(os.path.realpath(path))
    if not path.exists():
        return path
    for source in inputs:
        if os.path.exists(source) and os.path.samefile(path, source):
            raise Refused(f"--out {path} is one of the inputs: {source}", "name another file")
    if not stat.S_ISREG(path.stat().st_mode):
        raise Refused(f"--out {path} is not a regular file", "name the HDF5 file to write")
    with open(path, "rb") as file:
        if file.read(len(HDF5_SIGNATURE)) not in (b"", HDF5_SIGNATURE):
            raise Refused(f"--out {path} exists and is not an HDF5 file", "name another file, or remove that one first")
    return path


class UnfailingFile(io.FileIO):
    """A new file that HDF5 writes to. HDF5 crashes when it lets go of a file it could not write, so an error is kept here for check() and
    HDF5 is told that all went well."""

    def __init__(self, path, shown):
        super().__init__(path, "x+")
        self.shown, self.error = shown, None

    def attempt(self, work):
        if self.error is None:
            try:
                work()
            except OSError as error:
                self.error = error

    def write(self, data):
        rest, start = memoryview(data).cast("B"), self.tell()

        def write_all():
            written = 0
            while written < len(rest):
                written += super(UnfailingFile, self).write(rest[written:])

        self.attempt(write_all)
        self.seek(start + len(rest))
        return len(rest)

    def truncate(self, size=None):
        self.attempt(lambda: super(UnfailingFile, self).truncate(size))
        return size

    def check(self):
        """Throws what went wrong so far."""
        if self.error is not None:
            raise OSError(self.error.errno, self.error.strerror, str(self.shown))


@contextlib.contextmanager
def hdf5_output(path):
    """Yields a new HDF5 file and its stream, to check() now and then. The file appears at `path` when the block ends without an error; until
    then, and for ever otherwise, nothing changes there."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.unlink(missing_ok=True)   # of a process that was killed and had our number
    try:
        with UnfailingFile(partial, path) as stream:
            # Checksums over its structure: HDF5 1.10 crashes on damaged files of the older form.
            with h5py.File(stream, "w", libver=("v108", "v108")) as file:
                yield file, stream
            stream.attempt(lambda: os.fsync(stream.fileno()))
            stream.check()
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_attributes(file, attributes):
    """Text of a length of its own and integers of 64 bits. Text of variable length would lie where HDF5 keeps no checksum."""
    for key, value in attributes.items():
        if isinstance(value, int):
            file.attrs[key] = np.int64(value)
        else:
            text = value.encode()
            file.attrs.create(key, text, dtype=h5py.string_dtype("utf-8", max(1, len(text))))


class GrowingDataset:
    """A chunked dataset written piece by piece, and the SHA-256 of its values as `hashed` (a numpy type)."""

    def __init__(self, group, name, stored, hashed):
        self.dataset = group.create_dataset(name, shape=(0,), maxshape=(None,), chunks=(CHUNK,), dtype=stored,
                                            compression="gzip", compression_opts=4, shuffle=True, fletcher32=True)
        self.hashed, self.digest = hashed, hashlib.sha256()

    def append(self, values):
        self.dataset.resize(self.dataset.shape[0] + len(values), axis=0)
        self.dataset[-len(values):] = values
        self.digest.update(np.asarray(values).astype(self.hashed).tobytes())

    def fingerprint_line(self):
        return f"{self.dataset.name[1:]} {self.digest.hexdigest()}\n"


def check_name(name):
    """The name of a data set is text on one line."""
    if not name.strip() or not name.isprintable():   # a surrogate, from bytes that are not UTF-8, is not printable
        raise Refused(f"--name {name!r} is not a name", "give a word in UTF-8 without control characters")


# Ending ----------------------------------------------------------------------------------------------------------

def exit_code_of(tool, work, out, alone):
    """Runs `work()` and returns the exit code: 0; 2 refused, 3 disk, file or package failed, 70 a bug of ours, 130 interrupted. Messages
    go to standard error. alone: this process does nothing else, so SIGTERM and standard output are its own."""
    def failed(code, text, hint=""):
        print(f"{tool}: {text}" + (f"\n  hint: {hint}" if hint else ""), file=sys.stderr, flush=True)
        return code

    def interrupt(*_):
        raise KeyboardInterrupt

    if alone:
        signal.signal(signal.SIGTERM, interrupt)
        sys.stdout.reconfigure(errors="backslashreplace")   # paths need not be UTF-8
    try:
        work()
        sys.stdout.flush()
        return 0
    except Refused as refusal:
        return failed(2, refusal)
    except Missing as missing:
        return failed(3, missing)
    except OSError as error:
        return failed(3, f"{error.filename or out}: {os.strerror(error.errno) if error.errno else error}", "check the path, its permissions and the free disk space")
    except MemoryError:
        return failed(3, "the memory does not hold this input", "prepare less of it, or use a machine with more memory")
    except KeyboardInterrupt:
        return failed(130, "interrupted; nothing was written")
    except Exception:
        traceback.print_exc()
        return failed(70, "this is a bug of ours", "please report it with the lines above and the command")
