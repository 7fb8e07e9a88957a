#!/usr/bin/env python3
"""A network exported from PyTorch to ONNX as a Hugging Face directory: convert_onnx.py {dinov2,bert} FILE.onnx DIRECTORY [TOKENIZER.json]

The exporter kept the names of parameters but for linear weights, whose products still name their module. dinov2: DINOv2 under
`backbone.`, with the head under `decoder.` written to saliency_head.safetensors. bert: a sentence encoder under `model.0.auto_model.`,
with the tokeniser given. Needs numpy, safetensors and onnx. Exit codes: 2 the file holds no such network.
"""
import json
import pathlib
import shutil
import sys

import numpy as np
import onnx
from onnx import numpy_helper
from safetensors.numpy import save_file

PREFIXES = {"dinov2": "backbone.", "bert": "model.0.auto_model."}
HEAD = {"dinov2": 64, "bert": 32}   # width of a head in every DINOv2 and every MiniLM; an ONNX file does not say


class NotConvertible(Exception):
    pass


def parameters_of(graph, prefix):
    """All parameters under `prefix`, by their names behind it."""
    initial = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    named = {name.removeprefix(prefix): value for name, value in initial.items() if name.startswith(prefix)}
    for node in graph.node:
        if node.op_type != "MatMul":
            continue
        for source in node.input:
            if source in initial:   # a product's right side, [in, out]
                named[module_of(node, prefix) + ".weight"] = initial[source].T
    return named, initial


def module_of(node, prefix):
    """"/backbone/encoder/layer.0/mlp/fc1/MatMul" -> "encoder.layer.0.mlp.fc1". Exports of BERT name the path in several ways."""
    path = node.name.strip("/").removesuffix("/MatMul").replace("/", ".")
    return path[path.index("encoder.layer"):] if "encoder.layer" in path else path.removeprefix(prefix)


def shape_of(named, name):
    if name not in named:
        raise NotConvertible(f"it has no '{name}'")
    return named[name].shape


def layers_of(named):
    return 1 + max(int(name.split(".")[2]) for name in named if name.startswith("encoder.layer."))


def dinov2(named, initial):
    """Positions are a constant of their own, cut behind the CLS token's."""
    parts = [value for name, value in initial.items() if name.startswith("onnx::") and value.ndim == 3]
    named["embeddings.position_embeddings"] = np.concatenate(parts, 1)
    width, channels, patch, _ = shape_of(named, "embeddings.patch_embeddings.projection.weight")
    places = named["embeddings.position_embeddings"].shape[1] - 1
    side = round(places ** 0.5)
    if side * side != places:
        raise NotConvertible(f"its positions are no square grid: {places}")
    return {"architectures": ["Dinov2Model"], "model_type": "dinov2", "hidden_size": width, "num_hidden_layers": layers_of(named),
            "num_attention_heads": width // HEAD["dinov2"], "mlp_ratio": shape_of(named, "encoder.layer.0.mlp.fc1.weight")[0] // width,
            "image_size": side * patch, "patch_size": patch, "num_channels": channels, "hidden_act": "gelu", "layer_norm_eps": 1e-6,
            "qkv_bias": True, "layerscale_value": 1.0, "use_swiglu_ffn": False, "use_mask_token": False, "torch_dtype": "float32"}


def bert(named, _):
    vocabulary, width = shape_of(named, "embeddings.word_embeddings.weight")
    return {"architectures": ["BertModel"], "model_type": "bert", "hidden_size": width, "num_hidden_layers": layers_of(named),
            "num_attention_heads": width // HEAD["bert"], "intermediate_size": shape_of(named, "encoder.layer.0.intermediate.dense.weight")[0],
            "vocab_size": vocabulary, "max_position_embeddings": shape_of(named, "embeddings.position_embeddings.weight")[0],
            "type_vocab_size": shape_of(named, "embeddings.token_type_embeddings.weight")[0], "hidden_act": "gelu",
            "layer_norm_eps": 1e-12, "pad_token_id": 0, "torch_dtype": "float32"}


def save(tensors, path):
    save_file({name: np.ascontiguousarray(tensor.astype(np.float32)) for name, tensor in tensors.items()}, path, {"format": "pt"})


def main(kind, source, out, tokenizer=None):
    graph, out = onnx.load(source).graph, pathlib.Path(out)
    named, initial = parameters_of(graph, PREFIXES[kind])
    try:
        config = {"dinov2": dinov2, "bert": bert}[kind](named, initial)
    except NotConvertible as reason:
        print(f"convert_onnx: {source} holds no {kind} as expected: {reason}", file=sys.stderr)
        return 2
    if kind == "bert":
        named = {name: value for name, value in named.items() if value.dtype == np.float32}   # no buffer of position numbers
    out.mkdir(parents=True)
    save(named, out / "model.safetensors")
    head = {name.removeprefix("decoder."): value for name, value in initial.items() if name.startswith("decoder.")}
    if head:
        save(head, out / "saliency_head.safetensors")
    if tokenizer:
        shutil.copy(tokenizer, out / "tokenizer.json")
    (out / "config.json").write_text(json.dumps(config, indent=1))
    print(f"{sum(value.size for value in named.values())} parameters, {len(named)} tensors")
    return 0


if __name__ == "__main__":
    if len(sys.argv) not in (4, 5) or sys.argv[1] not in PREFIXES:
        raise SystemExit(__doc__)
    sys.exit(main(*sys.argv[1:]))
