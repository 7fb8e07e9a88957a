"""Reads and writes Moraine's file formats with the reference libraries, for tests/core.

    peer_formats.py read-safetensors PATH    one line per tensor: name dtype shape sha256, then the metadata
    peer_formats.py write-safetensors PATH   the tensors that safetensors_test.cpp expects
    peer_formats.py read-hdf5 PATH           one line per dataset: name dtype shape sum, then the attributes
    peer_formats.py write-hdf5 PATH          what hdf5_test.cpp expects
    peer_formats.py write-huge-hdf5 PATH     datasets of 10^12 and 2^66 values in less than two kilobytes
"""
import hashlib
import json
import sys

import numpy as np


def read_safetensors(path):
    import safetensors

    with open(path, "rb") as file:
        tensors = safetensors.deserialize(file.read())
    for name, tensor in sorted(tensors):
        digest = hashlib.sha256(bytes(tensor["data"])).hexdigest()
        print(name, tensor["dtype"], json.dumps(tensor["shape"]), digest)
    with safetensors.safe_open(path, framework="numpy") as file:
        print(json.dumps(file.metadata(), sort_keys=True))


def write_safetensors(path):
    import safetensors

    tensors = {
        "ramp": np.arange(6, dtype=np.float32).reshape(2, 3),
        "ids": np.array([-1, 2**40], dtype=np.int64),
        "half": np.array([0.5, -2.0], dtype=np.float16),
        "flags": np.array([True, False, True]),
        "empty": np.zeros((0, 4), dtype=np.float64),
        "scalar": np.array(7, dtype=np.int32),
    }
    raw = {n: {"dtype": str(t.dtype), "shape": list(t.shape), "data": t.tobytes()} for n, t in tensors.items()}
    raw["brain"] = {"dtype": "bfloat16", "shape": [2], "data": bytes.fromhex("803f40c0")}  # 1.0, -3.0
    with open(path, "wb") as file:
        file.write(safetensors.serialize(raw, {"format": "pt", "note": "gr\u00fc\u00df"}))


def read_hdf5(path):
    import h5py

    with h5py.File(path, "r") as file:
        def show(name, item):
            if isinstance(item, h5py.Dataset):
                print(name, item.dtype, list(item.shape), float(np.sum(item[()], dtype=np.float64)), item.compression)
        file.visititems(show)
        for name in sorted(file.attrs):
            value = file.attrs[name]
            print(name, type(value).__name__, value)


def write_hdf5(path):
    import h5py

    with h5py.File(path, "w") as file:
        file.create_dataset("train/tokens", data=np.arange(10000, dtype=np.uint16), chunks=True, compression="gzip")
        file["train"].create_dataset("wide", data=np.array([1, 70000], dtype=np.int64))
        file["matrix"] = np.arange(6, dtype=np.float32).reshape(3, 2)
        file["big_endian"] = np.array([1, 2, 3], dtype=">i4")
        file["scalar"] = 2.5
        file["words"] = ["a", "b"]
        file.attrs["name"] = "gr\u00fc\u00df"
        file.attrs["fixed"] = np.bytes_("fixed")
        file.attrs["count"] = 42
        file.attrs["ratio"] = 0.25
        file.attrs["several"] = [1, 2]


def write_huge_hdf5(path):
    import h5py

    with h5py.File(path, "w") as file:
        file.create_dataset("never_written", shape=(10**12,), dtype="<i8", chunks=(1 << 16,))
        file.create_dataset("overflow", shape=(1 << 33, 1 << 33), dtype="<i8", chunks=(1 << 8, 1 << 8))


if __name__ == "__main__":
    {"read-safetensors": read_safetensors, "write-safetensors": write_safetensors,
     "read-hdf5": read_hdf5, "write-hdf5": write_hdf5, "write-huge-hdf5": write_huge_hdf5}[sys.argv[1]](sys.argv[2])
