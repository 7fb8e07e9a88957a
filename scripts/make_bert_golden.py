#!/usr/bin/env python3
"""Writes tests/models/golden/bert*.safetensors: small random encoders and what transformers makes of them, and what the
published all-MiniLM-L6-v2 makes of a few texts.

Needs torch, safetensors, tokenizers, transformers==4.57.6 and sentence-transformers; the second argument is the encoder's
directory (scripts/fetch_encoder):
    python scripts/make_bert_golden.py tests/models/golden .cache/encoders/all-minilm-l6-v2

bert.safetensors, bert_classifier.safetensors: `weight/<name>`, `tokens` and `mask` [B, T], `hidden` [B, T, d], `pooled` [B, d],
`embedding` [B, d]; the classifier's file also `logits`, `loss` (mean over `labels`) and `gradient/<name>`. bert_minilm.safetensors:
`tokens`, `mask` and sentence-transformers' `embedding` of the texts in its metadata. Everything is float32.
"""
import json
import pathlib
import sys

import torch
import transformers
from safetensors.torch import save_file

SIZES = dict(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24,
             max_position_embeddings=12, type_vocab_size=2, attn_implementation="eager")
TEXTS = ["The router sends every token to two experts.", "Der Router schickt jedes Token zu zwei Experten.",
         "int main(void) { return 0; }", "router", "a " * 120]


def save(path, out, metadata):
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in out.items()}, path, metadata=metadata)
    print(f"{path}: {path.stat().st_size} bytes")


def make(name, family, seed, folder, **options):
    config = transformers.BertConfig(**SIZES, **options)
    model = getattr(transformers, family)(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    for key, weight in model.named_parameters():
        centre = 1.0 if key.endswith("LayerNorm.weight") else 0.0
        weight.data = centre + torch.randn(weight.shape, generator=generator) * (0.2 if "LayerNorm" in key else 0.35)
    tokens = torch.randint(0, config.vocab_size, (3, 9), generator=generator)
    mask = torch.arange(9)[None] < torch.tensor([9, 4, 1])[:, None]
    out = {"tokens": tokens, "mask": mask}
    encoder = model.bert if hasattr(model, "bert") else model
    states = encoder(input_ids=tokens, attention_mask=mask.long())
    real = mask[:, :, None].float()
    mean = (states.last_hidden_state * real).sum(1) / real.sum(1)
    out |= {"hidden": states.last_hidden_state, "pooled": states.pooler_output, "embedding": torch.nn.functional.normalize(mean, dim=1)}
    if encoder is not model:
        labels = torch.tensor([0, 2, 1])
        result = model(input_ids=tokens, attention_mask=mask.long(), labels=labels)
        result.loss.backward()
        out |= {"labels": labels, "logits": result.logits, "loss": result.loss}
        out |= {"gradient/" + key: weight.grad for key, weight in model.named_parameters()}
    out |= {"weight/" + key: weight for key, weight in model.named_parameters()}
    text = json.dumps(json.loads(config.to_json_string()), sort_keys=True)
    save(folder / f"{name}.safetensors", out, {"config": text, "transformers": transformers.__version__})


def make_minilm(directory, folder):
    import sentence_transformers
    model = sentence_transformers.SentenceTransformer(str(directory), device="cpu")
    features = model.tokenize(TEXTS)
    out = {"tokens": features["input_ids"].to(torch.int32), "mask": features["attention_mask"].bool(),
           "embedding": model.encode(TEXTS, batch_size=len(TEXTS), convert_to_tensor=True)}
    save(folder / "bert_minilm.safetensors", out, {"texts": json.dumps(TEXTS), "sentence-transformers": sentence_transformers.__version__})


if __name__ == "__main__":
    if len(sys.argv) != 3 or transformers.__version__ != "4.57.6":
        raise SystemExit(__doc__ + f"\nfound transformers {transformers.__version__}")
    target = pathlib.Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    make("bert", "BertModel", 7, target)
    make("bert_classifier", "BertForSequenceClassification", 8, target, num_labels=3)
    make_minilm(pathlib.Path(sys.argv[2]).resolve(), target)
