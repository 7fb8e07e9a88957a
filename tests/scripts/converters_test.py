"""scripts/convert_rxnfp.py on checkpoints made here in torch.save's older format, without PyTorch. One test per claim: CLAIM."""
import collections
import json
import pickle
import struct
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file
from tokenizers import Tokenizer

CONVERTER = Path(__file__).resolve().parents[2] / "scripts" / "convert_rxnfp.py"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "C", "O", ">>", "Cl", "[Na+]", "1"]


def fake_torch() -> None:
    """Modules of PyTorch's names, so that pickles name what its pickles name."""
    torch, internal = types.ModuleType("torch"), types.ModuleType("torch._utils")
    torch.FloatStorage = type("FloatStorage", (), {"__module__": "torch"})

    def _rebuild_tensor_v2(*_):
        raise AssertionError("only named, never called here")
    _rebuild_tensor_v2.__module__ = "torch._utils"
    _rebuild_tensor_v2.__qualname__ = "_rebuild_tensor_v2"
    internal._rebuild_tensor_v2 = _rebuild_tensor_v2
    sys.modules |= {"torch": torch, "torch._utils": internal}


class Storage:
    def __init__(self, key: str, values: np.ndarray):
        self.key, self.values = key, values


class Tensor:
    def __init__(self, storage: Storage, offset: int, shape: tuple, strides: tuple):
        self.parts = (storage, offset, shape, strides, False, collections.OrderedDict())

    def __reduce__(self):
        return sys.modules["torch._utils"]._rebuild_tensor_v2, self.parts


class TensorPickler(pickle.Pickler):
    def persistent_id(self, thing):
        if isinstance(thing, Storage):
            return ("storage", sys.modules["torch"].FloatStorage, thing.key, "cuda:0", len(thing.values), None)
        return None


def write(folder: Path, state: object, storages: list[Storage]) -> None:
    folder.mkdir()
    with open(folder / "pytorch_model.bin", "wb") as file:
        for head in (0x1950a86a20f9469cfc6c, 1001, {"little_endian": True}):
            pickle.dump(head, file, protocol=2)
        TensorPickler(file, protocol=2).dump(state)
        pickle.dump([storage.key for storage in storages], file, protocol=2)
        for storage in storages:
            file.write(struct.pack("<q", len(storage.values)) + storage.values.astype("<f4").tobytes())
    (folder / "config.json").write_text(json.dumps({"hidden_size": 4, "num_labels": 3}))
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")


def convert(source: Path, out: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, CONVERTER, source, out], capture_output=True, text=True)


def older_checkpoints_become_directories(here: Path) -> None:
    storage = Storage("7", np.arange(14))
    write(here / "bert_small", {"bert.x": Tensor(storage, 2, (3, 4), (4, 1)), "classifier.weight": Tensor(storage, 1, (3, 2), (1, 3))}, [storage])
    done = convert(here, here / "out")
    assert done.returncode == 0, done.stderr
    tensors = load_file(here / "out/small/model.safetensors")
    np.testing.assert_array_equal(tensors["bert.x"], np.arange(2, 14).reshape(3, 4))
    np.testing.assert_array_equal(tensors["classifier.weight"], [[1, 4], [2, 5], [3, 6]])   # a transposed view
    config = json.loads((here / "out/small/config.json").read_text())
    assert config["model_type"] == "bert" and len(config["id2label"]) == 3, config
    tokens = Tokenizer.from_file(str(here / "out/small/tokenizer.json")).encode("Cl C1 [Na+]>>ON").tokens
    assert tokens == ["[CLS]", "Cl", "C", "1", "[Na+]", ">>", "O", "[UNK]", "[SEP]"], tokens


def pickles_of_anything_else_are_refused(here: Path) -> None:
    class Call:
        def __reduce__(self):
            return Path.touch, (here / "was_called",)
    write(here / "bert_bad", {"x": Call()}, [])
    done = convert(here, here / "out")
    assert done.returncode == 2 and "no part of a tensor" in done.stderr, done
    assert not (here / "was_called").exists() and not (here / "out").exists()


def damaged_checkpoints_are_refused(here: Path) -> None:
    storage = Storage("0", np.arange(4))
    for name, shape, cut, expected in (("bert_short", (2, 2), 3, "cut off"), ("bert_beyond", (2, 3), 0, "beyond its storage")):
        folder = here / name
        folder.mkdir()
        write(folder / name, {"x": Tensor(storage, 0, shape, (shape[1], 1))}, [storage])
        weights = folder / name / "pytorch_model.bin"
        weights.write_bytes(weights.read_bytes()[:-cut or None])
        done = convert(folder, here / "out")
        assert done.returncode == 2 and expected in done.stderr, done


if __name__ == "__main__":
    fake_torch()
    with tempfile.TemporaryDirectory(prefix="moraine-converters-") as temporary:
        globals()[sys.argv[1]](Path(temporary))
