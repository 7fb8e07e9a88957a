#!/usr/bin/env python3
"""Writes tests/models/golden/fetched_models.safetensors: what transformers makes of the models that scripts/fetch_model gets.

Needs torch, safetensors, tokenizers, transformers==4.57.6 and the models in .cache/models:
    scripts/fetch_model bert-tiny minilm rxnfp dinov2-small && python scripts/make_fetched_golden.py tests/models/golden

Encoders: `MODEL/tokens` and `MODEL/mask` [B, T], `MODEL/embedding` [B, d] (mean over real tokens, of length one), with a classifier also
`MODEL/logits`. dinov2-small: `images` [2, 3, 42, 42] (three patches a side, so positions are interpolated) and `features` [2, d].
"""
import pathlib
import sys

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

MODELS = pathlib.Path(".cache/models")
TEXTS = ["A cat sits on the mat.", "A kitten rests on a rug.", "Stock markets fell sharply today."]
REACTIONS = ["CC(=O)O.OCC>>CC(=O)OCC.O", "Cl.[Na+].[OH-].c1ccccc1Br>>c1ccc([C@H](N)C)cc1"]


def encoder(name, texts):
    tokenizer = Tokenizer.from_file(str(MODELS / name / "tokenizer.json"))
    tokenizer.enable_padding()
    encoded = tokenizer.encode_batch(texts)
    tokens, mask = (torch.tensor([getattr(text, key) for text in encoded]) for key in ("ids", "attention_mask"))
    family = transformers.BertForSequenceClassification if name.endswith("ft_10k_25s") else transformers.BertModel
    model = family.from_pretrained(MODELS / name, **({} if "Sequence" in family.__name__ else {"add_pooling_layer": False})).eval()
    bert = getattr(model, "bert", model)
    states, real = bert(input_ids=tokens, attention_mask=mask).last_hidden_state, mask[:, :, None].float()
    out = {"tokens": tokens, "mask": mask.bool(), "embedding": torch.nn.functional.normalize((states * real).sum(1) / real.sum(1), dim=1)}
    if bert is not model:
        out["logits"] = model(input_ids=tokens, attention_mask=mask).logits
    return {f"{name}/{key}": tensor for key, tensor in out.items()}


def vision(name):
    model = transformers.Dinov2Model.from_pretrained(MODELS / name).eval()
    images = torch.randn((2, 3, 42, 42), generator=torch.Generator().manual_seed(230))
    return {f"{name}/images": images, f"{name}/features": model(pixel_values=images).last_hidden_state[:, 0]}


def main(folder):
    out = {}
    with torch.no_grad():
        for name in ("bert-tiny", "minilm"):
            out |= encoder(name, TEXTS)
        for name in ("pretrained", "ft", "ft_10k_25s"):
            out |= encoder(f"rxnfp/{name}", REACTIONS)
        out |= vision("dinov2-small")
    path = pathlib.Path(folder) / "fetched_models.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in out.items()}, path, {"transformers": transformers.__version__})
    print(f"{path}: {path.stat().st_size} bytes, {len(load_file(path))} tensors")


if __name__ == "__main__":
    if len(sys.argv) != 2 or transformers.__version__ != "4.57.6":
        raise SystemExit(__doc__ + f"\nfound transformers {transformers.__version__}")
    main(sys.argv[1])
