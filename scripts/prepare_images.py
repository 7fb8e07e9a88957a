#!/usr/bin/env python3
"""Turns labelled images into one HDF5 file that `moraine` reads: docs/data.md describes the format and every rule.

Examples:
  scripts/prepare_images.py --name fashion_mnist --out fashion_mnist.h5 \\
      --train train-images-idx3-ubyte.gz train-labels-idx1-ubyte.gz --test t10k-images-idx3-ubyte.gz t10k-labels-idx1-ubyte.gz
  scripts/prepare_images.py --name digits --out digits.h5 --table digits.csv.gz --shape 1x8x8 --largest 16 --test-share 0.25

--train and --test read MNIST's idx files (.gz or not). --table reads one image per line: its pixels, then its label; such
images are split by a hash of their pixels. Exit codes: 2 bad input, 3 the disk or a file failed.
"""
import argparse
import gzip
import hashlib
import json
import os
import pathlib
import platform
import struct
import sys
import zlib

try:
    import h5py
    import numpy as np
except ImportError as error:
    if __name__ != "__main__":
        raise
    print(f"prepare_images: {error}\n  hint: run scripts/setup once, then .venv/bin/python {sys.argv[0]}", file=sys.stderr)
    sys.exit(3)

FORMAT = "moraine-images"
FORMAT_VERSION = 1
SPLITS = ("train", "test")
CHUNK_BYTES = 1 << 18


class Refused(Exception):
    """Input the user has to change. Message and hint as everywhere in Moraine."""

    def __init__(self, message, hint):
        super().__init__(f"prepare_images: {message}\n  hint: {hint}")


def read_bytes(path):
    data = pathlib.Path(path).read_bytes()
    if not str(path).endswith(".gz"):
        return data
    try:
        return gzip.decompress(data)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise Refused(f"{path} is not an intact gzip file: {error}", "fetch the file again") from error


def read_idx(path):
    """The array of unsigned bytes in an idx file: 0, 0, type 8, number of dimensions, big-endian sizes, values."""
    data = read_bytes(path)
    if len(data) < 4 or data[:3] != b"\x00\x00\x08":
        raise Refused(f"{path} is not an idx file of unsigned bytes", "name MNIST-type files: images first, then labels")
    shape = struct.unpack_from(f">{data[3]}I", data, 4) if len(data) >= 4 + 4 * data[3] else ()
    start = 4 + 4 * data[3]
    if len(data) - start != int(np.prod(shape)):
        raise Refused(f"{path} holds {len(data) - start} values, its header says {shape}", "fetch the file again")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def read_pair(images_path, labels_path):
    images, labels = read_idx(images_path), read_idx(labels_path)
    if images.ndim not in (3, 4) or labels.ndim != 1 or len(images) != len(labels):
        raise Refused(f"{images_path} has shape {images.shape} and {labels_path} {labels.shape}", "name the images first, then their labels")
    return (images[:, None] if images.ndim == 3 else images), labels.astype(np.int64)


def read_table(path, shape, largest):
    """Lines of pixels 0..largest and a label; pixels are scaled to 0..255."""
    lines = [line for line in read_bytes(path).decode("ascii", "replace").splitlines() if line.strip()]
    pixels = int(np.prod(shape))
    try:
        values = np.array([[float(x) for x in line.split(",")] for line in lines])
    except ValueError as error:
        raise Refused(f"{path}: {error}", "every line must hold numbers, separated by commas") from error
    if values.ndim != 2 or values.shape[1] != pixels + 1:
        raise Refused(f"{path} has lines of {values.shape[-1] if values.ndim == 2 else 'different'} length, {pixels} pixels and a label are {pixels + 1}",
                      "give the shape of one image with --shape CxHxW")
    images, labels = values[:, :-1], values[:, -1]
    if images.min() < 0 or images.max() > largest or (labels != labels.astype(np.int64)).any():
        raise Refused(f"{path}: pixels lie in {images.min():g}..{images.max():g}, labels must be integers", "give the largest pixel with --largest")
    return np.rint(images * (255 / largest)).astype(np.uint8).reshape(-1, *shape), labels.astype(np.int64)


def split_by_content(images, labels, test_share):
    """An image is a test image if the first 8 bytes of SHA-256("moraine-image-split-v1" + pixels), as a big-endian fraction, are below the
    share: equal images stand on one side, and an image keeps its side when others are added."""
    chance = np.array([int.from_bytes(hashlib.sha256(b"moraine-image-split-v1" + image.tobytes()).digest()[:8], "big") / 2**64 for image in images])
    test = chance < test_share
    return {"train": (images[~test], labels[~test]), "test": (images[test], labels[test])}


def check(splits, class_names):
    for split, (images, labels) in splits.items():
        if labels.size == 0 or labels.min() < 0 or labels.max() >= len(class_names):
            found = f"labels {labels.min()}..{labels.max()}" if labels.size else "no image"
            raise Refused(f"the {split} split has {found}, there are {len(class_names)} classes", "labels are 0, 1, ...; name all classes with --classes")
        missing = [name for c, name in enumerate(class_names) if not (labels == c).any()]
        if missing:
            raise Refused(f"the {split} split has no image of {', '.join(missing)}", "add images, or choose another --test-share")
    if splits["train"][0].shape[1:] != splits["test"][0].shape[1:]:
        raise Refused(f"training images are {splits['train'][0].shape[1:]}, test images {splits['test'][0].shape[1:]}", "all images need one shape")


def fingerprint_of(splits, class_names):
    shape = splits["train"][0].shape[1:]
    lines = [f"{FORMAT} {FORMAT_VERSION}", " ".join(str(x) for x in (*shape, len(class_names)))]
    for split in SPLITS:
        images, labels = splits[split]
        lines.append(f"{split}/images {hashlib.sha256(images.tobytes()).hexdigest()}")
        lines.append(f"{split}/labels {hashlib.sha256(labels.astype('<i8').tobytes()).hexdigest()}")
    return hashlib.sha256("".join(line + "\n" for line in lines).encode()).hexdigest()


def write(path, name, splits, class_names, provenance):
    partial = path.with_name(path.name + ".partial")
    fingerprint = fingerprint_of(splits, class_names)
    try:
        with h5py.File(partial, "w") as file:
            file.attrs.update({"format": FORMAT, "format_version": FORMAT_VERSION, "name": name, "fingerprint": fingerprint,
                               "class_names": json.dumps(class_names), "provenance": json.dumps(provenance, sort_keys=True)})
            for split, (images, labels) in splits.items():
                rows = max(1, CHUNK_BYTES // int(np.prod(images.shape[1:])))
                file.create_dataset(f"{split}/images", data=images, chunks=(min(rows, len(images)), *images.shape[1:]), compression="gzip",
                                    compression_opts=4, fletcher32=True)
                file.create_dataset(f"{split}/labels", data=labels, chunks=(len(labels),), compression="gzip", fletcher32=True)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return fingerprint


def prepare(options):
    if options.table:
        images, labels = read_table(options.table, options.shape, options.largest)
        splits = split_by_content(images, labels, options.test_share)
    else:
        splits = {"train": read_pair(*options.train), "test": read_pair(*options.test)}
    count = 1 + max((int(labels.max()) for _, labels in splits.values() if labels.size), default=0)
    class_names = options.classes.split(",") if options.classes else [str(c) for c in range(count)]
    check(splits, class_names)
    provenance = {"sources": [str(s) for s in [options.table] if s] + [str(s) for s in (options.train or []) + (options.test or [])],
                  "notes": sorted(options.note), "images": {split: len(labels) for split, (_, labels) in splits.items()},
                  "options": {"test_share": options.test_share if options.table else None, "largest": options.largest if options.table else None},
                  "versions": {"python": platform.python_version(), "numpy": np.__version__, "h5py": h5py.__version__}}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    fingerprint = write(options.out, options.name, splits, class_names, provenance)
    sizes = ", ".join(f"{len(labels)} {split}" for split, (_, labels) in splits.items())
    print(f"{options.out}: {sizes} images of {'x'.join(str(x) for x in splits['train'][0].shape[1:])} in {len(class_names)} classes; fingerprint {fingerprint[:12]}")


def parse_options(arguments):
    def shape(text):
        sizes = tuple(int(x) for x in text.split("x"))
        if len(sizes) != 3 or min(sizes) < 1:
            raise ValueError(text)
        return sizes

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="name of the data set")
    parser.add_argument("--out", required=True, type=pathlib.Path, help="HDF5 file to write")
    parser.add_argument("--train", nargs=2, metavar=("IMAGES", "LABELS"), help="idx files of the training split")
    parser.add_argument("--test", nargs=2, metavar=("IMAGES", "LABELS"), help="idx files of the test split")
    parser.add_argument("--table", help="text file with one image per line instead of --train and --test")
    parser.add_argument("--shape", type=shape, default=(1, 8, 8), help="--table: channels x height x width of one image (default: 1x8x8)")
    parser.add_argument("--largest", type=float, default=255, help="--table: the value that stands for white (default: 255)")
    parser.add_argument("--test-share", type=float, default=0.2, help="--table: share of test images (default: 0.2)")
    parser.add_argument("--classes", help="names of the classes, separated by commas (default: 0,1,...)")
    parser.add_argument("--note", action="append", default=[], help="provenance to record, e.g. a package's version; may be repeated")
    options = parser.parse_args(arguments)
    if bool(options.table) == bool(options.train or options.test) or bool(options.train) != bool(options.test):
        parser.error("give either --train and --test, or --table")
    if options.largest <= 0 or not 0 < options.test_share < 1:
        parser.error("--largest must be positive and --test-share between 0 and 1")
    return options


def main(arguments=None):
    options = parse_options(arguments)
    try:
        prepare(options)
    except Refused as refusal:
        print(refusal, file=sys.stderr)
        return 2
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error
        print(f"prepare_images: {error.filename or options.out}: {reason}\n  hint: check the path, its permissions and the free disk space", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
