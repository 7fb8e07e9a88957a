"""Tests of scripts/prepare_images.py. Test names are claims; docs/data.md states the rules. Exit code 77: a package is missing."""
import contextlib
import gzip
import hashlib
import importlib.util
import io
import json
import os
import pathlib
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import unittest

try:
    import h5py
    import numpy as np
except ImportError as error:
    print(f"skipped: {error}: run scripts/setup")
    sys.exit(77)

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "scripts"))
import prepare_images


def idx(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


class ImagesCase(unittest.TestCase):
    """A temporary folder and the tool."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)
        rng = np.random.default_rng(1)
        self.images = {"train": rng.integers(0, 256, (12, 3, 4)), "test": rng.integers(0, 256, (6, 3, 4))}
        self.labels = {split: np.arange(len(images)) % 3 for split, images in self.images.items()}

    def run_tool(self, *arguments):
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            code = prepare_images.main(["--name", "d", "--out", str(self.folder / "d.h5"), *map(str, arguments)])
        return code, output.getvalue()

    def pair(self, split, images=None, labels=None):
        paths = [self.folder / f"{split}-images.gz", self.folder / f"{split}-labels"]
        paths[0].write_bytes(gzip.compress(idx(self.images[split] if images is None else images)))
        paths[1].write_bytes(idx(self.labels[split] if labels is None else labels))
        return [f"--{split}", *paths]

    def table(self, rows):
        path = self.folder / "table.csv"
        path.write_text("".join(",".join(map(str, row)) + "\n" for row in rows))
        return path

    def read(self):
        """{split: (images, labels)} and the class names of the output."""
        with h5py.File(self.folder / "d.h5") as file:
            return {s: (file[s]["images"][:], file[s]["labels"][:]) for s in ("train", "test")}, json.loads(file.attrs["class_names"])

    def prepare(self, *arguments):
        code, output = self.run_tool(*arguments)
        self.assertEqual(code, 0, output)
        return self.read()

    def refusal(self, *arguments):
        code, output = self.run_tool(*arguments)
        self.assertEqual((code, "hint:" in output, (self.folder / "d.h5").exists()), (2, True, False), output)
        return output


class PrepareImages(ImagesCase):
    def test_idx_files_become_the_documented_file(self):
        code, output = self.run_tool(*self.pair("train"), *self.pair("test"), "--classes", "a,b,c")
        self.assertEqual(code, 0, output)
        lines = "moraine-images 1\n1 3 4 3\n"
        with h5py.File(self.folder / "d.h5") as file:
            for split in ("train", "test"):
                images, labels = file[split]["images"][:], file[split]["labels"][:]
                np.testing.assert_array_equal(images[:, 0], self.images[split])
                np.testing.assert_array_equal(labels, self.labels[split])
                lines += f"{split}/images {hashlib.sha256(self.images[split].astype(np.uint8).tobytes()).hexdigest()}\n"
                lines += f"{split}/labels {hashlib.sha256(self.labels[split].astype('<i8').tobytes()).hexdigest()}\n"
            self.assertEqual(file.attrs["fingerprint"].decode(), hashlib.sha256(lines.encode()).hexdigest())
            self.assertEqual(file.attrs["class_names"].decode(), '["a", "b", "c"]')

    def test_every_class_is_split_by_its_share_with_equal_images_on_one_side(self):
        rng = np.random.default_rng(3)
        sizes = {0: 100, 1: 41, 2: 2}
        rows = [[*rng.integers(0, 256, 4), label] for label, size in sizes.items() for _ in range(size)]
        copies = rows[:30] + [[*row[:-1], 1] for row in rows[:30]]   # copies, and copies with another label
        splits, _ = self.prepare("--table", self.table(rows + copies), "--test-share", 0.25)
        contents = {split: {image.tobytes() for image in images} for split, (images, _) in splits.items()}
        self.assertFalse(contents["train"] & contents["test"])
        distinct = {split: [len({image.tobytes() for image in images[labels == label]} - (set() if label != 1 else {bytes(map(int, row[:-1])) for row in rows[:30]}))
                            for label in sizes] for split, (images, labels) in splits.items()}
        self.assertEqual(distinct, {"train": [75, 31, 1], "test": [25, 10, 1]})
        shuffled = [rows[i] for i in rng.permutation(len(rows))]
        test_of = lambda rows, seed: {i.tobytes() for i in self.prepare("--table", self.table(rows), "--seed", seed)[0]["test"][0]}
        self.assertEqual(test_of(rows, 0), test_of(shuffled, 0))
        self.assertNotEqual(test_of(rows, 0), test_of(rows, 1))
        # The documented rule, for one class.
        key = lambda image: hashlib.sha256(b"moraine-image-split-v2 1\n" + image).digest()
        first = sorted((bytes(map(int, row[:-1])) for row in rows if row[-1] == 0), key=key)
        self.assertEqual(test_of(rows, 1) & set(first), set(first[:20]))

    def test_tables_of_other_tools_are_read_as_they_are(self):
        images, labels = self.images["train"].reshape(12, 12), self.labels["train"]
        expected, _ = self.prepare(*self.pair("train"), *self.pair("test"))
        rows = lambda split, join: [join(str(label), list(map(str, image.ravel()))) for image, label in zip(self.images[split], self.labels[split])]
        first, last = (lambda label, pixels: [label, *pixels]), (lambda label, pixels: [*pixels, label])
        names = [f"pixel{number}" for number in range(12)]
        for head, join, options in ((["label", *names], first, []), (["Class", *range(12)], first, []), ([*names, "digit"], last, ["--label-column", "digit"]),
                                    (None, first, ["--label-column", "first"]), (None, last, []), ([*names, "digit"], last, ["--label-column", "last"])):
            paths = []
            for split in ("train", "test"):
                content = "".join(",".join(map(str, row)) + "\n" for row in ([head] if head else []) + rows(split, join))
                paths.append(self.folder / f"{split}.csv.gz")
                paths[-1].write_bytes(gzip.compress(content.encode()))
            found, classes = self.prepare("--table", paths[0], "--test-table", paths[1], "--shape", "1x3x4", *options)
            for split in expected:
                np.testing.assert_array_equal(found[split][0], expected[split][0])
                np.testing.assert_array_equal(found[split][1], expected[split][1])
        (self.folder / "d.h5").unlink()
        self.assertIn("which column is the label", self.refusal("--table", self.table([[*names, "digit"], *rows("train", last)]), "--shape", "1x3x4"))
        self.assertIn("no column 'kind'", self.refusal("--table", self.table(rows("train", last)), "--label-column", "kind"))
        self.assertIn("which is no square", self.refusal("--table", self.table(rows("train", last))))
        words = [[*image, "cat dog emu".split()[label]] for image, label in zip(images, labels)]
        found, classes = self.prepare("--table", self.table(words), "--shape", "1x3x4", "--classes", "emu,dog,cat")
        self.assertEqual(classes, ["emu", "dog", "cat"])
        by_image = {row[:12].astype(np.uint8).tobytes(): 2 - label for row, label in zip(images, labels)}
        for images, labels in found.values():
            self.assertEqual([by_image[image.tobytes()] for image in images], list(labels))

    def test_a_table_can_be_split_by_content_with_equal_images_on_one_side(self):
        rng = np.random.default_rng(2)
        rows = [[*rng.integers(0, 17, 4), n % 2] for n in range(200)]
        code, output = self.run_tool("--table", self.table(rows + rows[:50]), "--shape", "1x2x2", "--largest", 16, "--split", "content")
        self.assertEqual(code, 0, output)
        with h5py.File(self.folder / "d.h5") as file:
            train, test = ({image.tobytes() for image in file[s]["images"][:]} for s in ("train", "test"))
            self.assertEqual(len(file["train/labels"]) + len(file["test/labels"]), 250)
            self.assertIn(file["train/images"][:].max(), (255,))
        self.assertFalse(train & test)
        first = (self.folder / "d.h5").read_bytes()
        self.run_tool("--table", self.table(rows + rows[:50]), "--shape", "1x2x2", "--largest", 16, "--split", "content")
        self.assertEqual(len(first), len((self.folder / "d.h5").read_bytes()))

    def test_bad_input_is_refused_and_leaves_no_file(self):
        for build, part in ((lambda: [*self.pair("train"), "--test", self.folder / "train-labels", self.folder / "train-images.gz"], "images first"),
                            (lambda: [*self.pair("train", labels=self.labels["train"][:-1]), *self.pair("test")], "shape"),
                            (lambda: [*self.pair("train"), *self.pair("test", labels=self.labels["test"] * 0)], "no image of"),
                            (lambda: [*self.pair("train"), *self.pair("test"), "--classes", "a,b"], "there are 2 classes"),
                            (lambda: [*self.pair("train"), *self.pair("test", images=self.images["test"][:, :2])], "one shape"),
                            (lambda: ["--table", self.table([[1, 2, 3, 0], [1, 2, 0]]), "--shape", "1x1x3"], "table.csv:2 has 3 fields"),
                            (lambda: ["--table", self.table([[1, 2, "x", 0], [1, 2, 3, 0]]), "--shape", "1x1x3"], "table.csv:1: could not convert"),
                            (lambda: ["--table", self.table([[1, 2, "nan", 0], [1, 2, 3, 0]]), "--shape", "1x1x3"], "pixels lie in"),
                            (lambda: ["--table", self.table([[1, 2, 3, 1e9], [1, 2, 250, 0]]), "--shape", "1x1x3"], "labels lie in"),
                            (lambda: ["--table", self.table([[1, 2, 3, 900], [1, 2, 250, 0]]), "--shape", "1x1x3"], "2 images cannot have 901 classes"),
                            (lambda: ["--table", self.table([[1, 2, 16, 0], [1, 2, 3, 1]]), "--shape", "1x1x3"], "say which value stands for white"),
                            (lambda: ["--table", self.table([[1, 2, 0.5, 0], [1, 2, 200, 1]]), "--shape", "1x1x3"], "pixels are fractions"),
                            (lambda: ["--table", self.table([[1, 2, 0], [1, 2, 1]]), "--shape", "1x1x3"], "--shape"),
                            (lambda: ["--table", self.table([[1, 2, 300, 0], [1, 2, 3, 1]]), "--shape", "1x1x3"], "--largest")):
            code, output = self.run_tool(*build())
            self.assertEqual(code, 2, output)
            self.assertIn(part, output)
            self.assertIn("hint:", output)
            self.assertFalse((self.folder / "d.h5").exists(), "a refused run left a file")
        whole = self.pair("train")
        whole[1].write_bytes(whole[1].read_bytes()[:-5])
        code, output = self.run_tool(*whole, *self.pair("test"))
        self.assertEqual((code, "intact" in output), (2, True), output)
        self.assertEqual(self.run_tool("--train", self.folder / "none", self.folder / "none", *self.pair("test"))[0], 3)

    def test_options_that_do_nothing_are_refused(self):
        train, pair = self.pair("train"), [*self.pair("train"), *self.pair("test")]
        table = ["--table", self.table([[200, 0], [1, 0], [3, 1], [4, 1]])]
        for arguments, part in ((["--seed", 3, *pair], "--seed does not apply"), (["--split", "class", *pair], "--split does not apply"),
                                (["--test-share", 0.1, *pair], "--test-share does not apply"), (["--shape", "1x3x4", *pair], "--shape does not apply to --train"),
                                (["--size", "3x4", *table], "--size does not apply to --table"), (["--largest", 16, *pair], "--largest does not apply"),
                                (["--label-column", "last", *train], "--label-column does not apply"), (["--skip-unreadable", *table], "--skip-unreadable does not apply"),
                                ([*table, *train], "2 kinds of input"), (self.pair("test"), "0 kinds of input"), (["--test-table", "x", *train], "--test-table does not apply"),
                                (["--seed", 1, "--split", "content", *table], "--seed does not apply"), (["--classes", "a,a", *table], "a name twice")):
            self.assertIn(part, self.refusal(*arguments))
        self.assertEqual(self.run_tool(*train)[0], 0)   # one pair alone is split
        self.assertEqual({split: len(labels) for split, (_, labels) in self.read()[0].items()}, {"train": 9, "test": 3})

    def test_never_writes_over_what_it_must_not(self):
        pair = [*self.pair("train"), *self.pair("test")]
        before = (self.folder / "train-labels").read_bytes()
        (self.folder / "soft.h5").symlink_to("train-labels")
        (self.folder / "notes.txt").write_text("mine")
        for out, part in (("train-labels", "is one of the inputs"), ("soft.h5", "is one of the inputs"), ("notes.txt", "is not an HDF5 file"), (".", "not a regular file")):
            code, output = self.run_tool(*pair, "--out", self.folder / out)
            self.assertEqual((code, part in output), (2, True), output)
        self.assertEqual(((self.folder / "train-labels").read_bytes(), (self.folder / "notes.txt").read_text()), (before, "mine"))

    def test_a_file_that_cannot_be_written_ends_with_3_and_leaves_nothing(self):
        pair = [*self.pair("train", images=np.random.default_rng(1).integers(0, 256, (12, 40, 40))), *self.pair("test", images=np.zeros((6, 40, 40)))]
        (self.folder / "out").mkdir()
        line = [sys.executable, prepare_images.__file__, "--name", "d", "--out", self.folder / "out/d.h5", *pair]
        for limit in (1, 9_000, 22_000):   # 24,000 are needed

            def limited(limit=limit):
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            done = subprocess.run(line, capture_output=True, text=True, timeout=100, preexec_fn=limited)
            self.assertEqual((done.returncode, os.listdir(self.folder / "out")), (3, []), f"{limit}: {done.stderr}")
            self.assertIn("hint:", done.stderr)


@unittest.skipUnless(importlib.util.find_spec("PIL"), "Pillow is missing: run scripts/setup")
class PrepareFolders(ImagesCase):
    """Folders of PNG and JPEG files."""

    def save(self, path, image, **options):
        from PIL import Image

        path = self.folder / path
        path.parent.mkdir(parents=True, exist_ok=True)
        image = image if hasattr(image, "save") else Image.fromarray(np.asarray(image, np.uint8))
        image.save(path, **options)
        return path

    def folder_of(self, root, classes=("cat", "dog"), count=5, seed=1, shape=(6, 8)):
        rng = np.random.default_rng(seed)
        saved = {name: [rng.integers(0, 256, shape) for _ in range(count)] for name in classes}
        for name, images in saved.items():
            for number, image in enumerate(images):
                self.save(f"{root}/{name}/{number}.png", image)
        return {name: {image.astype(np.uint8).tobytes() for image in images} for name, images in saved.items()}

    def test_a_folder_per_class_becomes_images_and_labels(self):
        saved = self.folder_of("pets")
        splits, classes = self.prepare("--folder", self.folder / "pets")
        self.assertEqual(classes, ["cat", "dog"])
        for label, name in enumerate(classes):
            of_class = {split: {image.tobytes() for image in images[labels == label]} for split, (images, labels) in splits.items()}
            self.assertEqual(of_class["train"] | of_class["test"], saved[name])
            self.assertEqual((len(of_class["train"]), len(of_class["test"])), (4, 1))
        first = (self.folder / "d.h5").read_bytes()
        os.rename(self.folder / "pets/cat/0.png", self.folder / "pets/cat/zzz.PNG")
        (self.folder / "pets/.DS_Store").write_text("hidden")
        self.prepare("--folder", self.folder / "pets")
        self.assertEqual((self.folder / "d.h5").read_bytes(), first)   # names of files play no part

    def test_folders_of_the_splits_are_kept(self):
        saved = {split: self.folder_of(f"pets/{split}", seed=seed) for split, seed in (("train", 1), ("test", 2))}
        for arguments in (["--folder", self.folder / "pets"], ["--folder", self.folder / "pets/train", "--test-folder", self.folder / "pets/test"]):
            splits, classes = self.prepare(*arguments)
            for split, (images, labels) in splits.items():
                for label, name in enumerate(classes):
                    self.assertEqual({image.tobytes() for image in images[labels == label]}, saved[split][name])
        (self.folder / "d.h5").unlink()
        self.assertIn("--seed does not apply", self.refusal("--folder", self.folder / "pets", "--seed", 1))
        os.rename(self.folder / "pets/test", self.folder / "pets/val")
        self.assertIn("which of them is the test split", self.refusal("--folder", self.folder / "pets"))
        self.folder_of("vehicles", classes=("bus", "train"))
        self.assertEqual(self.prepare("--folder", self.folder / "vehicles")[1], ["bus", "train"])

    def test_folders_named_by_number_keep_their_numbers(self):
        self.folder_of("digits", classes=[str(n) for n in range(11)], count=2)
        self.assertEqual(self.prepare("--folder", self.folder / "digits")[1], [str(n) for n in range(11)])
        self.folder_of("pets")
        self.assertEqual(self.prepare("--folder", self.folder / "pets", "--classes", "dog,cat")[1], ["dog", "cat"])

    def test_modes_of_pictures_become_grey_or_colour_without_loss(self):
        from PIL import Image

        grey = np.arange(48).reshape(6, 8) * 5
        colour = np.stack([grey, 255 - grey, grey // 2], axis=2)
        opaque = np.concatenate([colour, np.full((6, 8, 1), 255)], axis=2)
        for number in range(2):
            self.save(f"pets/cat/{number}.png", grey + number)
            self.save(f"pets/dog/{number}.png", opaque + np.array([number, 0, 0, 0]))
        splits, _ = self.prepare("--folder", self.folder / "pets")
        found = {image.tobytes() for images, _ in splits.values() for image in images}
        self.assertEqual(found, {np.stack([grey + n] * 3).astype(np.uint8).tobytes() for n in range(2)} |
                         {(colour + [n, 0, 0]).astype(np.uint8).transpose(2, 0, 1).tobytes() for n in range(2)})
        self.assertEqual(self.prepare("--folder", self.folder / "pets", "--channels", 1)[0]["train"][0].shape, (2, 1, 6, 8))
        (self.folder / "d.h5").unlink()
        deep = Image.fromarray(grey.astype(np.uint16) * 100)
        odd = self.save("pets/dog/odd.png", deep)
        self.assertIn("more than 8 bits", self.refusal("--folder", self.folder / "pets"))
        self.save("pets/dog/odd.png", np.concatenate([colour, np.full((6, 8, 1), 99)], axis=2))
        self.assertIn("transparent in places", self.refusal("--folder", self.folder / "pets"))
        whole = self.save("pets/dog/odd.png", colour).read_bytes()
        odd.write_bytes(whole[:60])
        self.assertIn("odd.png cannot be read", self.refusal("--folder", self.folder / "pets"))
        odd.rename(self.folder / "pets/dog/odd.txt")
        self.assertIn("odd.txt cannot be read", self.refusal("--folder", self.folder / "pets"))
        self.assertEqual(self.run_tool("--folder", self.folder / "pets", "--skip-unreadable")[0], 0)

    def test_pictures_of_several_sizes_need_a_size(self):
        self.folder_of("pets")
        wide = np.zeros((20, 60), np.uint8)
        wide[:, 20:40] = 200   # the middle square is plain, so scaling keeps it
        self.save("pets/dog/wide.jpg", np.stack([wide] * 3, axis=2), quality=100, subsampling=0)
        self.assertIn("--size HEIGHTxWIDTH", self.refusal("--folder", self.folder / "pets"))
        splits, _ = self.prepare("--folder", self.folder / "pets", "--size", "5x5")
        images = np.concatenate([images for images, _ in splits.values()])
        self.assertEqual(images.shape, (11, 3, 5, 5))
        self.assertTrue(any((abs(image[:, 1:-1, 1:-1].astype(int) - 200) <= 2).all() for image in images))   # JPEG keeps a plain area to 2 levels

    def test_folders_that_are_no_classes_are_refused(self):
        self.folder_of("pets")
        stray = self.save("pets/stray.png", np.zeros((6, 8)))
        self.assertIn("lies in no folder of a class", self.refusal("--folder", self.folder / "pets"))
        stray.unlink()
        (self.folder / "pets/empty").mkdir()
        self.assertIn("no image for the class empty", self.refusal("--folder", self.folder / "pets"))
        self.assertIn("no folders of classes", self.refusal("--folder", self.folder / "pets/empty"))
        self.assertIn("is not a folder", self.refusal("--folder", self.folder / "none"))
        self.folder_of("one", count=1)
        self.assertIn("class cat has 1 distinct images", self.refusal("--folder", self.folder / "one"))


if __name__ == "__main__":
    unittest.main()
