#!/usr/bin/env python3
"""Turns labelled images into one HDF5 file that `moraine` reads: docs/data.md describes the format and every rule.

Examples:
  scripts/prepare_images.py --name pets --out pets.h5 --folder pets/ --size 32x32
  scripts/prepare_images.py --name fashion_mnist --out fashion_mnist.h5 --table fashion-mnist_train.csv --test-table fashion-mnist_test.csv
  scripts/prepare_images.py --name fashion_mnist --out fashion_mnist.h5 \\
      --train train-images-idx3-ubyte.gz train-labels-idx1-ubyte.gz --test t10k-images-idx3-ubyte.gz t10k-labels-idx1-ubyte.gz

--folder reads PNG and JPEG files, one folder per class; --table reads one image per line, its pixels and its label (.csv, .tsv); --train
and --test read MNIST's idx files. Without images for the test split every class is split by --test-share and --seed. Exit codes: 2 bad
input, 3 the disk, a file or a package failed, 130 interrupted.
"""
import argparse
import hashlib
import io
import itertools
import json
import math
import os
import pathlib
import platform
import struct
import sys

try:
    import h5py
    import numpy as np
    from preparation import Missing, Refused, check_name, exit_code_of, hdf5_output, output_file, read_bytes, table_rows, write_attributes
except ImportError as error:
    if __name__ != "__main__":
        raise
    print(f"prepare_images: {error}\n  hint: run scripts/setup once, then .venv/bin/python {sys.argv[0]}", file=sys.stderr)
    sys.exit(3)

FORMAT = "moraine-images"
FORMAT_VERSION = 1
SPLITS = ("train", "test")
CHUNK_BYTES = 1 << 18
WHITE = 255
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg")
OTHER_SPLITS = {"test", "val", "valid", "validation", "dev"}   # folders beside "train" that cannot be classes


# Reading: each reader returns images as uint8 [n, C, H, W] and their labels, numbers or names -------------------------------------------

def read_idx(path):
    """The array of unsigned bytes in an idx file: 0, 0, type 8, number of dimensions, big-endian sizes, values."""
    data = read_bytes(path)
    if len(data) < 4 or data[:3] != b"\x00\x00\x08" or data[3] not in (1, 3, 4):
        raise Refused(f"{path} is not an idx file of unsigned bytes", "name MNIST-type files: images first, then labels")
    shape = struct.unpack_from(f">{data[3]}I", data, 4) if len(data) >= 4 + 4 * data[3] else ()
    start = 4 + 4 * data[3]
    if not shape or len(data) - start != math.prod(shape):
        raise Refused(f"{path} holds {max(0, len(data) - start)} values, its header says {shape}", "fetch the file again")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def read_pair(images_path, labels_path):
    images, labels = read_idx(images_path), read_idx(labels_path)
    if images.ndim not in (3, 4) or labels.ndim != 1 or len(images) != len(labels) or min(images.shape) < 1:
        raise Refused(f"{images_path} has shape {images.shape} and {labels_path} {labels.shape}", "name the images first, then their labels")
    return (images[:, None] if images.ndim == 3 else images), labels.astype(np.int64)


def is_number(text):
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def label_place(path, first, wanted):
    """Where the label stands in a line, and whether the first line names the columns."""
    if wanted in first:
        return first.index(wanted), True
    named = [i for i, field in enumerate(first) if field.strip().lower() in ("label", "class")]
    header = bool(named) or not any(is_number(field) for field in first)
    if wanted in ("first", "last"):
        return (0 if wanted == "first" else len(first) - 1), header
    if wanted or header and len(named) != 1:
        shown = ", ".join(first[:3] + ["..."] * (len(first) > 4) + first[-1:])
        raise Refused(f"{path}: its first line is {shown}, " + (f"there is no column '{wanted}'" if wanted else "which column is the label is not clear"),
                      "name the column of the label with --label-column, or say first or last")
    return (named[0], True) if named else (len(first) - 1, False)


def shape_of(pixels, wanted, path):
    if wanted:
        if math.prod(wanted) != pixels:
            raise Refused(f"{path} has lines of {pixels} pixels and a label, {'x'.join(map(str, wanted))} are {math.prod(wanted)} pixels",
                          "give the shape of one image with --shape CxHxW")
        return wanted
    side = math.isqrt(pixels)
    if pixels < 1 or side * side != pixels:
        raise Refused(f"{path} has lines of {pixels} pixels and a label, which is no square", "give the shape of one image with --shape CxHxW")
    return 1, side, side


def read_table(path, options):
    """Lines of a label and pixels from 0 to --largest, which are scaled to 0..255."""
    rows = table_rows(read_bytes(path), path)
    line, first = next(rows, (0, None))
    if first is None:
        raise Refused(f"{path} is empty", "name a table with one image per line")
    place, header = label_place(path, first, options.label_column)
    columns = len(first)
    shape = shape_of(columns - 1, options.shape, path)
    largest = options.largest or WHITE
    images, labels, brightest, fractions = [], [], 0, False
    for line, fields in rows if header else itertools.chain([(line, first)], rows):
        if len(fields) != columns:
            raise Refused(f"{path}:{line} has {len(fields)} fields, the first line has {columns}", "every line must hold the numbers of one image")
        labels.append(fields.pop(place))
        try:
            pixels = np.array(fields, np.float64)
        except ValueError as error:
            raise Refused(f"{path}:{line}: {error}", "every pixel must be a number") from error
        low, high = pixels.min(), pixels.max()
        if not (low >= 0 and high <= largest):   # NaN is neither
            raise Refused(f"{path}:{line}: pixels lie in {low:g}..{high:g}, not in 0..{largest:g}", "give the largest pixel with --largest")
        brightest, fractions = max(brightest, high), fractions or bool((pixels != np.rint(pixels)).any())
        images.append(np.rint(pixels * (WHITE / largest)).astype(np.uint8))
    if not images:
        raise Refused(f"{path} holds no image", "name a table with one image per line")
    if options.largest is None and (fractions or brightest <= WHITE // 2):
        raise Refused(f"{path}: the brightest pixel is {brightest:g}{', and pixels are fractions' if fractions else ''}", "say which value stands for white with --largest")
    return np.stack(images).reshape(-1, *shape), as_labels(labels, path)


def as_labels(fields, path):
    """Numbers where all labels are numbers, else names."""
    if not all(is_number(field) for field in fields):
        return np.array([field.strip() for field in fields])
    values = np.array(fields, np.float64)
    if (values != np.rint(values)).any() or abs(values).max() > len(values) + 1e6:
        raise Refused(f"{path}: labels lie in {values.min():g}..{values.max():g} and must be integers", "labels are 0, 1, ... or names")
    return values.astype(np.int64)


# Folders of pictures ----------------------------------------------------------------------------------------------

def pillow():
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise Missing(f"--folder: {error}", "run scripts/setup, or install Pillow (Debian's python3-pil)") from error
    return Image, ImageOps


def entries(folder):
    """Names in a folder that are not hidden, sorted: (folders, files)."""
    found = sorted(entry.name for entry in os.scandir(folder) if not entry.name.startswith("."))
    return [n for n in found if os.path.isdir(os.path.join(folder, n))], [n for n in found if not os.path.isdir(os.path.join(folder, n))]


def split_folders(folder, test_folder):
    """The folders of the splits; without one for the test split None."""
    if not os.path.isdir(folder):
        raise Refused(f"{folder} is not a folder", "name the folder that holds one folder of images per class")
    names = {name.lower(): name for name in entries(folder)[0]}
    if test_folder or "train" not in names or not set(names) <= {"train"} | OTHER_SPLITS or len(names) < 2:
        return folder, test_folder
    if set(names) != {"train", "test"}:
        raise Refused(f"{folder} holds {', '.join(sorted(names.values()))}: which of them is the test split is not clear",
                      f"name both splits: --folder {folder}/{names['train']} --test-folder {folder}/...")
    return os.path.join(folder, names["train"]), os.path.join(folder, names["test"])


def pictures(folder):
    """(class, path) of every file below the folders of classes, sorted."""
    if not os.path.isdir(folder):
        raise Refused(f"{folder} is not a folder", "name the folder that holds one folder of images per class")
    classes, files = entries(folder)
    if files or not classes:
        raise Refused(f"{os.path.join(folder, files[0])} lies in no folder of a class" if files else f"{folder} holds no folders of classes",
                      "put the images of each class into a folder of its name")
    for name in classes:
        if not name.isprintable():   # bytes that are not UTF-8 are not
            raise Refused(f"the folder {name!r} has no name in UTF-8", "rename it: it is the name of a class")
        for place, folders, files in os.walk(os.path.join(folder, name)):
            folders[:] = sorted(f for f in folders if not f.startswith("."))
            yield from ((name, os.path.join(place, file)) for file in sorted(files) if not file.startswith("."))


def read_picture(data, path, options):
    """uint8 [C, H, W]: one channel if the picture is grey, else three. Refuses what does not fit without a loss."""
    Image, ImageOps = pillow()
    try:
        if not path.lower().endswith(IMAGE_ENDINGS):
            raise ValueError("its name ends in none of " + " ".join(IMAGE_ENDINGS))
        picture = Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "MPO"))
        if picture.format == "PNG" and getattr(picture, "is_animated", False):
            raise ValueError("it is an animation")
        picture.load()
        if picture.mode.startswith(("I", "F")):
            raise ValueError(f"its pixels have more than 8 bits ({picture.mode})")
        picture = ImageOps.exif_transpose(picture)
        grey = picture.mode in ("1", "L", "LA", "La")
        if picture.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in picture.info:
            if picture.convert("RGBA").getchannel("A").getextrema() != (WHITE, WHITE):
                raise ValueError("it is transparent in places, and what shines through is not known")
            picture = picture.convert("RGBA")
        channels = options.channels or (1 if grey else 3)
        picture = picture.convert("L" if channels == 1 else "RGB")
        if options.size:
            picture = ImageOps.fit(picture, options.size[::-1], Image.Resampling.BILINEAR)
    except MemoryError:
        raise
    except Exception as error:   # decoders throw what they like
        raise Refused(f"{path} cannot be read as PNG or JPEG: {error}", "leave it out of the folder, convert it, or pass --skip-unreadable") from error
    return np.asarray(picture, np.uint8).reshape(picture.height, picture.width, channels).transpose(2, 0, 1)


def read_folder(folder, options, counts):
    images, labels, first = [], [], None
    for name, path in pictures(folder):
        try:
            image = read_picture(read_bytes(path), path, options)
        except Refused as refusal:
            if not options.skip_unreadable:
                raise
            counts["unreadable"] += 1
            print(f"skipped: {str(refusal).splitlines()[0]}", file=sys.stderr)
            continue
        first = first or (path, image.shape[1:])
        if image.shape[1:] != first[1]:
            raise Refused(f"{path} has {image.shape[1]}x{image.shape[2]} pixels, {first[0]} has {first[1][0]}x{first[1][1]}",
                          "all images need one size: --size HEIGHTxWIDTH scales and cuts them")
        images.append(image)
        labels.append(name)
    empty = [name for name in entries(folder)[0] if name not in set(labels)]
    if empty:
        raise Refused(f"{folder} has no image for the class {', '.join(empty)}", "remove the empty folder, or add images")
    return images, labels


def read_folders(options, counts):
    """Both splits, or one to be split. Grey images get three channels if any has; the order is that of the pixels' hashes, so that names of
    files play no part."""
    folders = [folder for folder in split_folders(options.folder, options.test_folder) if folder]
    read = [read_folder(folder, options, counts) for folder in folders]
    channels = max(len(image) for images, _ in read for image in images)
    parts = []
    for images, labels in read:
        images = [image if len(image) == channels else np.repeat(image, channels, axis=0) for image in images]
        order = sorted(range(len(images)), key=lambda i: (hashlib.sha256(np.ascontiguousarray(images[i]).data).digest(), labels[i]))
        parts.append((np.stack([images[i] for i in order]), np.array([labels[i] for i in order])))
    return parts


# Splitting --------------------------------------------------------------------------------------------------------

def split_by_content(images, labels, test_share):
    """An image is a test image if the first 8 bytes of SHA-256("moraine-image-split-v1" + pixels), as a big-endian fraction, are below the
    share: equal images stand on one side, and an image keeps its side when others are added."""
    chance = np.array([int.from_bytes(hashlib.sha256(b"moraine-image-split-v1" + image.tobytes()).digest()[:8], "big") / 2**64 for image in images])
    return chance < test_share


def split_by_class(images, labels, test_share, seed, class_names):
    """Of every class the share of its distinct images whose SHA-256("moraine-image-split-v2 SEED\\n" + pixels) is smallest, rounded, at
    least one and not all. Equal images stand on one side; those with several labels count for the smallest."""
    key = f"moraine-image-split-v2 {seed}\n".encode()
    hashes = [hashlib.sha256(key + image.tobytes()).digest() for image in images]
    owner = {}
    for digest, label in zip(hashes, labels):
        owner[digest] = min(label, owner.get(digest, label))
    test = set()
    for label, name in enumerate(class_names):
        distinct = sorted(digest for digest, owned_by in owner.items() if owned_by == label)
        if len(distinct) < 2:
            raise Refused(f"class {name} has {len(distinct)} distinct images, and both splits need one", "add images, or leave the class out")
        test.update(distinct[:min(max(1, math.floor(test_share * len(distinct) + 0.5)), len(distinct) - 1)])
    return np.array([digest in test for digest in hashes])


def number_labels(parts, wanted):
    """Class names by label, and the parts with labels as numbers. Names are sorted, or as in --classes; folders named 0, 1, ... keep
    their numbers."""
    wanted = wanted.split(",") if wanted else None
    if wanted and (len(set(wanted)) < len(wanted) or not all(wanted)):
        raise Refused(f"--classes has a name twice or none: {','.join(wanted)}", "give every class a name of its own")
    if all(labels.dtype == np.int64 for _, labels in parts):
        count, largest = sum(len(labels) for _, labels in parts), max(int(labels.max()) for _, labels in parts if labels.size)
        if largest >= count:
            raise Refused(f"{count} images cannot have {largest + 1} classes, and there is a label {largest}", "labels are 0, 1, ...")
        return wanted or [str(c) for c in range(largest + 1)], parts
    found = sorted({str(label) for _, labels in parts for label in labels})
    if set(found) == {str(number) for number in range(len(found))}:
        found.sort(key=int)
    if wanted and set(wanted) != set(found):
        raise Refused(f"--classes names {', '.join(wanted)}, the images have {', '.join(found)}", "name the same classes in the order of their labels")
    names = wanted or found
    number_of = {name: number for number, name in enumerate(names)}
    return names, [(images, np.array([number_of[str(label)] for label in labels], np.int64)) for images, labels in parts]


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
    fingerprint = fingerprint_of(splits, class_names)
    with hdf5_output(path) as (file, stream):
        write_attributes(file, {"format": FORMAT, "format_version": FORMAT_VERSION, "name": name, "fingerprint": fingerprint,
                                "class_names": json.dumps(class_names), "provenance": json.dumps(provenance, sort_keys=True)})
        for split, (images, labels) in splits.items():
            rows = max(1, CHUNK_BYTES // math.prod(images.shape[1:]))
            file.create_dataset(f"{split}/images", data=images, chunks=(min(rows, len(images)), *images.shape[1:]), compression="gzip",
                                compression_opts=4, fletcher32=True)
            file.create_dataset(f"{split}/labels", data=labels, chunks=(len(labels),), compression="gzip", fletcher32=True)
            stream.check()
    return fingerprint


def sources(options):
    given = (*(options.train or ()), *(options.test or ()), options.table, options.test_table, options.folder, options.test_folder)
    return [os.fspath(source) for source in given if source]


def input_files(options):
    for source in sources(options):
        yield from (os.path.join(place, file) for place, _, files in os.walk(source) for file in files) if os.path.isdir(source) else [source]


def read_parts(options, counts):
    if options.folder:
        return read_folders(options, counts)
    if options.table:
        return [read_table(path, options) for path in (options.table, options.test_table) if path]
    return [read_pair(*pair) for pair in (options.train, options.test) if pair]


def prepare(options):
    check_name(options.name)
    options.out = output_file(options.out, input_files(options))
    counts = {"unreadable": 0}
    class_names, parts = number_labels(read_parts(options, counts), options.classes)
    how = None
    if len(parts) == 2:
        refuse_split_options(options, "the input has a test split")
        splits = dict(zip(SPLITS, parts))
    else:
        how = {"rule": options.split or "class", "test_share": options.test_share or TEST_SHARE, "seed": options.seed or 0}
        images, labels = parts[0]
        test = split_by_content(images, labels, how["test_share"]) if how["rule"] == "content" else split_by_class(
            images, labels, how["test_share"], how["seed"], class_names)
        splits = {"train": (images[~test], labels[~test]), "test": (images[test], labels[test])}
    check(splits, class_names)
    provenance = {"sources": [source.encode("utf-8", "backslashreplace").decode() for source in sources(options)], "notes": sorted(options.note),
                  "images": {**{split: len(labels) for split, (_, labels) in splits.items()}, **counts},
                  "options": {"split": how, "largest": options.largest, "size": options.size, "channels": options.channels},
                  "versions": {"python": platform.python_version(), "numpy": np.__version__, "h5py": h5py.__version__, **picture_version(options)}}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    fingerprint = write(options.out, options.name, splits, class_names, provenance)
    sizes = ", ".join(f"{len(labels)} {split}" for split, (_, labels) in splits.items())
    shape = "x".join(str(x) for x in splits["train"][0].shape[1:])
    rule = "" if how is None else f"; split by {how['rule']}, share {how['test_share']:g}, seed {how['seed']}"
    print(f"{options.out}: {sizes} images of {shape} in {len(class_names)} classes{rule}; skipped {counts['unreadable']}; fingerprint {fingerprint[:12]}")


def picture_version(options):
    if not options.folder:
        return {}
    import PIL
    return {"pillow": PIL.__version__}


# Options ----------------------------------------------------------------------------------------------------------

TEST_SHARE = 0.2


def sizes_of(count):
    """A parser of "3x16x16"."""
    def parse(text):
        sizes = tuple(int(x) for x in text.split("x"))
        if len(sizes) != count or min(sizes) < 1:
            raise argparse.ArgumentTypeError(f"{text} is not {'x'.join('CHW'[-count:])}, {count} numbers from 1")
        return sizes
    return parse


def refuse_split_options(options, why):
    for option in ("test_share", "seed", "split"):
        if getattr(options, option) is not None:
            raise Refused(f"--{option.replace('_', '-')} does not apply: {why}", "leave it out")


def refuse_what_does_not_apply(options):
    """Every option belongs to some kinds of input."""
    kinds = [kind for kind in ("train", "table", "folder") if getattr(options, kind)]
    if len(kinds) != 1:
        raise Refused(f"{len(kinds)} kinds of input are given", "give one of --folder, --table, or --train (and --test)")
    belongs = {"test": "train", "test_table": "table", "shape": "table", "largest": "table", "label_column": "table", "test_folder": "folder",
               "size": "folder", "channels": "folder", "skip_unreadable": "folder"}
    for option, kind in belongs.items():
        if getattr(options, option) and kind != kinds[0]:
            raise Refused(f"--{option.replace('_', '-')} does not apply to --{kinds[0]}", f"it belongs to --{kind}")
    if options.test or options.test_table or options.test_folder:
        refuse_split_options(options, "the test split is given")
    if options.split == "content" and options.seed is not None:
        raise Refused("--seed does not apply to --split content", "leave it out")


def parse_options(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="name of the data set")
    parser.add_argument("--out", required=True, type=pathlib.Path, help="HDF5 file to write")
    parser.add_argument("--folder", help="folder with a folder of PNG and JPEG files per class, or with train/ and test/ of that kind")
    parser.add_argument("--test-folder", help="the same for the test split; --folder is then the training split")
    parser.add_argument("--size", type=sizes_of(2), metavar="HxW", help="--folder: scale images to cover this size and cut off what hangs over")
    parser.add_argument("--channels", type=int, choices=(1, 3), help="--folder: make images grey or colour (default: grey if all are)")
    parser.add_argument("--skip-unreadable", action="store_true", help="--folder: skip files that are no 8-bit PNG or JPEG instead of refusing")
    parser.add_argument("--table", help=".csv or .tsv file with one image per line")
    parser.add_argument("--test-table", help="the same for the test split; --table is then the training split")
    parser.add_argument("--label-column", metavar="NAME", help="--table: column of the label in the first line, or first or last (default: label or "
                        "class in the first line, else last)")
    parser.add_argument("--shape", type=sizes_of(3), metavar="CxHxW", help="--table: channels, height and width of one image (default: a grey square)")
    parser.add_argument("--largest", type=float, help="--table: the value that stands for white (default: 255)")
    parser.add_argument("--train", nargs=2, metavar=("IMAGES", "LABELS"), help="idx files of the training split")
    parser.add_argument("--test", nargs=2, metavar=("IMAGES", "LABELS"), help="idx files of the test split")
    parser.add_argument("--test-share", type=float, help=f"share of test images where no test split is given (default: {TEST_SHARE})")
    parser.add_argument("--seed", type=int, help="which images of a class become test images (default: 0)")
    parser.add_argument("--split", choices=("class", "content"), help="class: the share of every class; content: each image by its own hash (default: class)")
    parser.add_argument("--classes", help="names of the classes in the order of their labels, separated by commas")
    parser.add_argument("--note", action="append", default=[], help="provenance to record, e.g. a package's version; may be repeated")
    options = parser.parse_args(arguments)
    if options.largest is not None and not 0 < options.largest < math.inf:
        parser.error("--largest must be positive")
    if options.test_share is not None and not 0 < options.test_share < 1:
        parser.error("--test-share must lie between 0 and 1")
    return options


def main(arguments=None):
    options = parse_options(arguments)

    def work():
        refuse_what_does_not_apply(options)
        prepare(options)

    return exit_code_of("prepare_images", work, options.out, alone=__name__ == "__main__")


if __name__ == "__main__":
    sys.exit(main())
