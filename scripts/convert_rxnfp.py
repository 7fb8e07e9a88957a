#!/usr/bin/env python3
"""BERT encoders of reaction SMILES as Hugging Face directories: convert_rxnfp.py PACKAGE/models/transformers DIRECTORY

For every bert_NAME below the first: DIRECTORY/NAME with config.json, model.safetensors (all tensors, as stored) and a tokenizer.json
made of vocab.txt and the package's regular expression (rxnfp/tokenization.py). pytorch_model.bin is read without PyTorch, by an
unpickler that makes tensors and nothing else. Needs numpy, safetensors and tokenizers. Exit codes: 2 a file is not as expected.
"""
import collections
import json
import pathlib
import pickle
import sys

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

# Atoms in brackets, two-letter atoms, bonds, rings and the arrow of a reaction; what is none of them is passed over.
SMILES = (r"(\%\([0-9]{3}\)|\[[^\]]+]|Br?|Cl?|N|O|S|P|F|I|b|c|n|o|s|p|\||\(|\)|\.|=|#|-|\+|\\|\/|:|~|@|\?|>>?|\*|\$|"
          r"\%[0-9]{2}|[0-9])")
MAGIC = 0x1950a86a20f9469cfc6c   # opens the files that torch.save wrote before 1.6
ELEMENTS = {"FloatStorage": np.dtype("<f4"), "LongStorage": np.dtype("<i8")}


class Stored:
    """A storage whose bytes stand behind the pickles, by key."""

    def __init__(self, kind, key, size):
        self.dtype, self.key, self.size, self.values = ELEMENTS[kind], key, size, None


class Tensor:
    def __init__(self, storage, offset, shape, strides, *_):
        self.storage, self.offset, self.shape, self.strides = storage, offset, shape, strides

    def array(self):
        size = self.storage.dtype.itemsize
        last = self.offset + sum((side - 1) * stride for side, stride in zip(self.shape, self.strides))
        if last >= self.storage.size or min(self.offset, *self.strides) < 0:
            raise pickle.UnpicklingError("a tensor reaches beyond its storage")
        return np.lib.stride_tricks.as_strided(self.storage.values[self.offset:], self.shape, [stride * size for stride in self.strides]).copy()


class TensorUnpickler(pickle.Unpickler):
    def __init__(self, file):
        super().__init__(file)
        self.storages = {}

    def find_class(self, module, name):
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return Tensor
        if module == "torch" and name in ELEMENTS:
            return name
        raise pickle.UnpicklingError(f"{module}.{name} is no part of a tensor")

    def persistent_load(self, key):
        _, kind, name, _, size, view = key
        if view is not None:
            raise pickle.UnpicklingError("views of storages are not read")
        return self.storages.setdefault(name, Stored(kind, name, size))


def read_tensors(path):
    """Name -> array out of a state dict of torch.save's older format."""
    with open(path, "rb") as file:
        if TensorUnpickler(file).load() != MAGIC:
            raise pickle.UnpicklingError("it is not of torch.save's older format")
        TensorUnpickler(file).load()   # version of the format
        TensorUnpickler(file).load()   # sizes of C types
        unpickler = TensorUnpickler(file)
        tensors = unpickler.load()
        for key in TensorUnpickler(file).load():
            storage = unpickler.storages[key]
            count = int.from_bytes(file.read(8), "little")
            data = file.read(count * storage.dtype.itemsize)
            if count != storage.size or len(data) != count * storage.dtype.itemsize:
                raise pickle.UnpicklingError(f"storage {key} is cut off")
            storage.values = np.frombuffer(data, storage.dtype)
    return {name: tensor.array() for name, tensor in tensors.items()}


def tokenizer_of(vocabulary):
    words = {word: number for number, word in enumerate(vocabulary.read_text().splitlines())}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(SMILES), "removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[(word, words[word]) for word in ("[CLS]", "[SEP]")])
    tokenizer.add_special_tokens([word for word in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")])
    return tokenizer


def convert(source, out):
    tensors = read_tensors(source / "pytorch_model.bin")
    config = json.loads((source / "config.json").read_text()) | {"model_type": "bert"}
    if "classifier.weight" in tensors:   # the package's own lists two labels of its fifty
        labels = [f"LABEL_{label}" for label in range(len(tensors["classifier.weight"]))]
        config |= {"id2label": dict(enumerate(labels)), "label2id": {label: number for number, label in enumerate(labels)}}
        config.pop("num_labels", None)
    else:
        config["architectures"] = ["BertForPreTraining" if "cls.predictions.bias" in tensors else "BertModel"]
    out.mkdir(parents=True)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    tokenizer_of(source / "vocab.txt").save(str(out / "tokenizer.json"))
    (out / "config.json").write_text(json.dumps(config, indent=1))
    print(f"{out.name}: {sum(tensor.size for tensor in tensors.values())} parameters, {len(tensors)} tensors")


def main(source, out):
    for folder in sorted(pathlib.Path(source).glob("bert_*")):
        try:
            convert(folder, pathlib.Path(out) / folder.name.removeprefix("bert_"))
        except (pickle.UnpicklingError, KeyError, EOFError) as error:
            print(f"convert_rxnfp: {folder / 'pytorch_model.bin'}: {error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    sys.exit(main(*sys.argv[1:]))
