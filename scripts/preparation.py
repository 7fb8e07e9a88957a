"""What scripts/prepare_*.py share: how they refuse input, read files and tables, and let an output file appear whole or not at all."""
import contextlib
import csv
import gzip
import io
import os
import pathlib
import signal
import stat
import sys
import traceback
import zlib

import h5py
import numpy as np

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
