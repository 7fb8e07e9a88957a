#!/usr/bin/env python3
"""Writes tests/models/golden/{vit,dinov2}*.safetensors: small random vision transformers with what transformers and timm make of them.

Needs torch, safetensors, transformers==4.57.6 and, for vit_timm, timm==1.0.31:
    python scripts/make_vit_golden.py tests/models/golden [CASE ...]

A file holds `weight/<name>`, `images` [B, C, H, W], `labels` [B], `features` [B, d] (CLS after the last norm), `logits` [B, n] and
`loss` [] (mean cross entropy); the transformers cases also `gradient/<name>` of the loss. The DINOv2 cases also hold
`SIZE/{images,features,logits}` for images of other sizes than the config's. Metadata `config` is the config.json.
"""
import json
import pathlib
import sys

import torch
import transformers
from safetensors.torch import save_file

SIZES = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24, image_size=12, patch_size=4)
CASES = {
    "vit": dict(num_channels=3, num_labels=5),
    "vit_no_qkv_bias": dict(num_channels=1, num_labels=3, qkv_bias=False, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-5),
}
DINOV2_CASES = {
    "dinov2": dict(num_channels=3, num_labels=5),
    "dinov2_swiglu": dict(num_channels=1, num_labels=3, qkv_bias=False, use_swiglu_ffn=True, layer_norm_eps=1e-5),
}
OTHER_SIZES = (8, 28)   # the config's is 12: a coarser and a finer grid of patches


def randomise(model, generator):
    """Larger than an initialisation, so that every branch matters; norms differ from one."""
    for name, weight in model.named_parameters():
        norm = "norm" in name and name.endswith("weight")
        weight.data = torch.randn(weight.shape, generator=generator) * (0.2 if norm else 0.35) + (1.0 if norm else 0.0)


def save(case, folder, out, config, **versions):
    out = {name: tensor.detach().clone().contiguous() for name, tensor in out.items()}
    path = folder / f"{case}.safetensors"
    save_file(out, path, metadata={"config": json.dumps(config, sort_keys=True), **versions})
    print(f"{path}: {path.stat().st_size} bytes, logits up to {out['logits'].abs().max().item():.2f}")


def from_transformers(case, options, seed, folder):
    generator = torch.Generator().manual_seed(seed)
    if case in CASES:
        config = transformers.ViTConfig(**SIZES, **options, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, attn_implementation="eager")
        model = transformers.ViTForImageClassification(config).float().eval()
    else:
        sizes = {key: value for key, value in SIZES.items() if key != "intermediate_size"}
        config = transformers.Dinov2Config(**sizes, **options, mlp_ratio=2, attn_implementation="eager")
        model = transformers.Dinov2ForImageClassification(config).float().eval()
    backbone = getattr(model, model.base_model_prefix)
    randomise(model, generator)
    images = torch.randn((4, config.num_channels, config.image_size, config.image_size), generator=generator)
    labels = torch.randint(0, config.num_labels, (4,), generator=generator)
    logits = model(pixel_values=images).logits
    loss = torch.nn.functional.cross_entropy(logits, labels)
    loss.backward()
    out = {"images": images, "labels": labels, "features": backbone(pixel_values=images).last_hidden_state[:, 0], "logits": logits, "loss": loss}
    for name, weight in model.named_parameters():
        out["weight/" + name] = weight
        if weight.grad is not None:   # the mask token has none
            out["gradient/" + name] = weight.grad
    for size in OTHER_SIZES if case in DINOV2_CASES else ():
        images = torch.randn((4, config.num_channels, size, size), generator=generator)
        out.update({f"{size}/images": images, f"{size}/features": backbone(pixel_values=images).last_hidden_state[:, 0],
                    f"{size}/logits": model(pixel_values=images).logits})
    save(case, folder, out, json.loads(config.to_json_string()), transformers=transformers.__version__)


def from_timm(case, seed, folder):
    import timm
    from timm.models.vision_transformer import VisionTransformer
    if timm.__version__ != "1.0.31":
        raise SystemExit(__doc__ + f"\nfound timm {timm.__version__}")
    generator = torch.Generator().manual_seed(seed)
    model = VisionTransformer(img_size=12, patch_size=4, in_chans=3, num_classes=5, embed_dim=16, depth=2, num_heads=4, mlp_ratio=1.5).float().eval()
    randomise(model, generator)
    images = torch.randn((4, 3, 12, 12), generator=generator)
    labels = torch.randint(0, 5, (4,), generator=generator)
    logits = model(images)
    out = {"images": images, "labels": labels, "features": model.forward_features(images)[:, 0], "logits": logits,
           "loss": torch.nn.functional.cross_entropy(logits, labels)}
    out.update({"weight/" + name: tensor for name, tensor in model.state_dict().items()})
    save(case, folder, out, {"architecture": "vit_small_patch4_12", "num_classes": 5, "num_features": 16, "global_pool": "token",
                             "model_args": {"num_heads": 4}, "pretrained_cfg": {"input_size": [3, 12, 12]}}, timm=timm.__version__)


def main(arguments):
    seeds = {name: 200 + i for i, name in enumerate(CASES)} | {"vit_timm": 210} | {name: 220 + i for i, name in enumerate(DINOV2_CASES)}
    wanted = arguments[1:] or list(seeds)
    if not arguments or not seeds.keys() >= set(wanted) or transformers.__version__ != "4.57.6":
        raise SystemExit(__doc__ + f"\ncases: {', '.join(seeds)}; found transformers {transformers.__version__}")
    target = pathlib.Path(arguments[0])
    target.mkdir(parents=True, exist_ok=True)
    for case in wanted:
        if case == "vit_timm":
            from_timm(case, seeds[case], target)
        else:
            from_transformers(case, (CASES | DINOV2_CASES)[case], seeds[case], target)


if __name__ == "__main__":
    main(sys.argv[1:])
