"""Tests of scripts/prepare_images.py. Test names are claims; docs/data.md states the rules. Exit code 77: a package is missing."""
import contextlib
import gzip
import hashlib
import io
import pathlib
import struct
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


class PrepareImages(unittest.TestCase):
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
            self.assertEqual(file.attrs["fingerprint"], hashlib.sha256(lines.encode()).hexdigest())
            self.assertEqual(file.attrs["class_names"], '["a", "b", "c"]')

    def test_a_table_is_split_by_content_with_equal_images_on_one_side(self):
        rng = np.random.default_rng(2)
        rows = [[*rng.integers(0, 17, 4), n % 2] for n in range(200)]
        code, output = self.run_tool("--table", self.table(rows + rows[:50]), "--shape", "1x2x2", "--largest", 16)
        self.assertEqual(code, 0, output)
        with h5py.File(self.folder / "d.h5") as file:
            train, test = ({image.tobytes() for image in file[s]["images"][:]} for s in ("train", "test"))
            self.assertEqual(len(file["train/labels"]) + len(file["test/labels"]), 250)
            self.assertIn(file["train/images"][:].max(), (255,))
        self.assertFalse(train & test)
        first = (self.folder / "d.h5").read_bytes()
        self.run_tool("--table", self.table(rows + rows[:50]), "--shape", "1x2x2", "--largest", 16)
        self.assertEqual(len(first), len((self.folder / "d.h5").read_bytes()))

    def test_bad_input_is_refused_and_leaves_no_file(self):
        for build, part in ((lambda: [*self.pair("train"), "--test", self.folder / "train-labels", self.folder / "train-images.gz"], "images first"),
                            (lambda: [*self.pair("train", labels=self.labels["train"][:-1]), *self.pair("test")], "shape"),
                            (lambda: [*self.pair("train"), *self.pair("test", labels=self.labels["test"] * 0)], "no image of"),
                            (lambda: [*self.pair("train"), *self.pair("test"), "--classes", "a,b"], "there are 2 classes"),
                            (lambda: [*self.pair("train"), *self.pair("test", images=self.images["test"][:, :2])], "one shape"),
                            (lambda: ["--table", self.table([[1, 2, 3, 0], [1, 2, 0]]), "--shape", "1x1x3"], "numbers"),
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


if __name__ == "__main__":
    unittest.main()
