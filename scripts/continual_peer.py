#!/usr/bin/env python3
"""A class-incremental stream in plain PyTorch, one process, as one JSON line of seconds and accuracies: continual_peer.py BACKBONE IMAGES.h5
[--increment 10] [--steps 100] [--batch 32] [--threads 2] [--mean 0.5] [--deviation 0.5] [--validation 5]. BACKBONE is RUN/backbone of a
run. Learners as in recipes/continual: finetune and seq_lora (logits of all classes seen, AdamW, cosine), simplecil; after every task all test
images of all tasks are scored, as there. Needs torch, transformers, peft and h5py."""
import argparse
import copy
import json
import time

import h5py
import torch
from peft import LoraConfig, get_peft_model
from transformers import ViTModel


def scaled(images, options, size):
    images = (torch.from_numpy(images).float() / 255 - options.mean) / options.deviation
    return torch.nn.functional.interpolate(images, size=(size, size), mode="bilinear", antialias=True) if images.shape[-1] != size else images


class Stream:
    def __init__(self, options, size):
        with h5py.File(options.images) as file:
            self.train_x, self.test_x = (scaled(file[f"{split}/images"][:], options, size) for split in ("train", "test"))
            self.train_y, self.test_y = (torch.from_numpy(file[f"{split}/labels"][:]).long() for split in ("train", "test"))
        kept = torch.zeros(len(self.train_y), dtype=bool)
        for label in self.train_y.unique():
            kept[(self.train_y == label).nonzero()[options.validation:]] = True
        self.train_x, self.train_y = self.train_x[kept], self.train_y[kept]
        self.classes = int(self.train_y.max()) + 1
        self.tasks = [range(first, first + options.increment) for first in range(0, self.classes, options.increment)]

    def of_task(self, task):
        rows = torch.isin(self.train_y, torch.tensor(list(task)))
        return self.train_x[rows], self.train_y[rows]


def features(model, images):
    return model(images).last_hidden_state[:, 0]


@torch.no_grad()
def last_accuracy(score, stream, seen):
    """Pooled over the classes seen; all tasks are scored for task-incremental cells."""
    right = total = 0
    for start in range(0, len(stream.test_y), 100):
        labels = stream.test_y[start:start + 100]
        found = score(stream.test_x[start:start + 100])[:, :seen].argmax(1)
        right += int((found == labels)[labels < seen].sum())
        total += int((labels < seen).sum())
    return 100 * right / total


def trained(model, parameters, stream, options, rate):
    head = torch.nn.Linear(model.config.hidden_size, stream.classes)
    for task in stream.tasks:
        images, labels = stream.of_task(task)
        seen = task[-1] + 1
        optimizer = torch.optim.AdamW([*parameters, *head.parameters()], lr=rate, weight_decay=0, betas=(0.9, 0.95), fused=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps, eta_min=0.1 * rate)
        for _ in range(options.steps):
            rows = torch.randint(len(labels), (options.batch,))
            loss = torch.nn.functional.cross_entropy(head(features(model, images[rows]))[:, :seen], labels[rows])
            loss.backward()
            torch.nn.utils.clip_grad_norm_([*parameters, *head.parameters()], 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        accuracy = last_accuracy(lambda x: head(features(model, x)), stream, seen)
    return accuracy


@torch.no_grad()
def simplecil(model, stream):
    means = torch.zeros(stream.classes, model.config.hidden_size)
    for task in stream.tasks:
        images, labels = stream.of_task(task)
        for label in task:
            means[label] = features(model, images[labels == label]).mean(0)
        unit = torch.nn.functional.normalize(means, dim=1)
        accuracy = last_accuracy(lambda x: torch.nn.functional.normalize(features(model, x), dim=1) @ unit.t(), stream, task[-1] + 1)
    return accuracy


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("backbone")
    parser.add_argument("images")
    for name, default in (("increment", 10), ("steps", 100), ("batch", 32), ("threads", 2), ("validation", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name in ("mean", "deviation"):
        parser.add_argument(f"--{name}", type=float, default=0.5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(1)
    backbone = ViTModel.from_pretrained(options.backbone, add_pooling_layer=False).eval()
    stream = Stream(options, backbone.config.image_size)
    lora = get_peft_model(copy.deepcopy(backbone), LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    full = copy.deepcopy(backbone)
    runs = {"finetune": lambda: trained(full, list(full.parameters()), stream, options, 1e-3),
            "seq_lora": lambda: trained(lora, [p for p in lora.parameters() if p.requires_grad], stream, options, 3e-3),
            "simplecil": lambda: simplecil(backbone, stream)}
    out = {}
    for name, run in runs.items():
        start = time.perf_counter()
        accuracy = run()
        out[name] = {"seconds": round(time.perf_counter() - start, 1), "last": round(accuracy, 1)}
    print(json.dumps(out))


if __name__ == "__main__":
    main()
