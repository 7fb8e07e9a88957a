#!/usr/bin/env python3
"""Handwritten characters for continual streams: .venv/bin/python scripts/prepare_omniglot.py images_background_small1.zip DIRECTORY

The archive is Omniglot's own (Lake et al. 2015; 5 alphabets, 136 characters of 20 drawers). Writes DIRECTORY/omniglot.h5, the 100 characters of
Korean, Greek, Early Aramaic and of Balinese from the 11th on, and DIRECTORY/omniglot_base.h5, Latin and the first 10 of Balinese, each turned
by 0, 90, 180 and 270 degrees as a class of its own (144 classes), for a backbone that knows no class of the stream. 28 x 28 grey
images; of every class 15 drawers are trained on and 5 tested, and of a base class 18 and 2. Exit codes as of prepare_images.py.
"""
import io
import pathlib
import sys
import tempfile
import zipfile
import zlib

try:
    import prepare_images
    from preparation import Missing, Refused, exit_code_of
except ImportError as error:
    print(f"prepare_omniglot: {error}\n  hint: run scripts/setup once, then .venv/bin/python {sys.argv[0]}", file=sys.stderr)
    sys.exit(3)

SIDE = 28
BASE = [("Latin", n) for n in range(1, 27)] + [("Balinese", n) for n in range(1, 11)]
STREAM = ([("Korean", n) for n in range(1, 41)] + [("Greek", n) for n in range(1, 25)] + [("Early_Aramaic", n) for n in range(1, 23)] +
          [("Balinese", n) for n in range(11, 25)])


def drawings(archive, alphabet, number):
    """(name, picture as 28 x 28 grey values) of one character."""
    Image, _ = prepare_images.pillow()
    folder = f"images_background_small1/{alphabet}/character{number:02}/"
    names = sorted(n for n in archive.namelist() if n.startswith(folder) and n.endswith(".png"))
    if len(names) != 20:
        raise Refused(f"{archive.filename} has {len(names)} drawings in {folder}, not 20", "take Omniglot's images_background_small1.zip")
    for name in names:
        try:
            picture = Image.open(io.BytesIO(archive.read(name)), formats=("PNG",)).convert("L")
        except (zipfile.BadZipFile, zlib.error, OSError) as error:
            raise Refused(f"{archive.filename} is damaged at {name}", "fetch it again") from error
        yield pathlib.Path(name).name, picture.resize((SIDE, SIDE), Image.Resampling.BILINEAR)


def lay_out(archive, characters, quarters, folder):
    """One folder of pictures for each class."""
    for alphabet, number in characters:
        for name, picture in drawings(archive, alphabet, number):
            for quarter in range(quarters):
                place = folder / f"{alphabet}_{number:02}{f'_{90 * quarter}' if quarters > 1 else ''}"
                place.mkdir(parents=True, exist_ok=True)
                picture.rotate(90 * quarter).save(place / name)


def prepare(source, directory):
    with open(source, "rb") as file:
        if not zipfile.is_zipfile(file):
            raise Refused(f"{source} is no zip archive", "give Omniglot's images_background_small1.zip")
    directory.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(source) as archive:
        for name, characters, quarters, share in (("omniglot", STREAM, 1, "0.25"), ("omniglot_base", BASE, 4, "0.1")):
            with tempfile.TemporaryDirectory(dir=directory) as folder:
                lay_out(archive, characters, quarters, pathlib.Path(folder))
                code = prepare_images.main(["--name", name, "--out", str(directory / f"{name}.h5"), "--folder", folder, "--test-share", share,
                                            "--note", f"of {pathlib.Path(source).name}"])
            if code:
                raise Missing(f"{directory / name}.h5 was not written", "see above")


def main():
    if len(sys.argv) != 3:
        print(__doc__, file=sys.stderr)
        return 2
    source, directory = sys.argv[1], pathlib.Path(sys.argv[2])
    return exit_code_of("prepare_omniglot", lambda: prepare(source, directory), directory, alone=True)


if __name__ == "__main__":
    sys.exit(main())
