"""Train, judge and time a small vision transformer, on the digits of scikit-learn: 1,797 images, 8 x 8."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from torch.optim.lr_scheduler import OneCycleLR
from transformers import ViTConfig, ViTForImageClassification

from src.errors import ConfigError
from src.models.costs import counting
from src.training.progress import track

SIDE, PATCH = 8, 2
"""Pixels of a side of an image, and of a patch: 16 patches."""
COLUMNS = SIDE // PATCH
TRAINED, BATCH = 1297, 64
"""Images that are trained on, the others are held out; and images of a step."""
RATE, TUNING_RATE = 3e-3, 1e-3
ALPHA, TEMPERATURE = 1.0, 20.0
"""Weight and temperature of the distillation while fine-tuning, the paper's."""


class Digits(NamedTuple):
    """Images ``[B, 1, 8, 8]``, from 0 to 1, and the digits ``[B]`` that they show."""

    images: Tensor
    labels: Tensor

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """Return the images and labels of all steps of an epoch, in order."""
        return [*zip(self.images.split(BATCH), self.labels.split(BATCH), strict=True)]


def digits() -> tuple[Digits, Digits]:
    """Return the images to train on and the held-out ones, always the same.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as e:
        raise ConfigError(
            "vision: scikit-learn is not installed: pip install -c constraints.txt -e '.[vision]'"
        ) from e
    found = load_digits()
    order = torch.randperm(len(found.images), generator=torch.Generator().manual_seed(0))
    images, labels = (
        torch.from_numpy(found.images)[order, None].float() / 16,
        torch.from_numpy(found.target)[order],
    )
    return Digits(images[:TRAINED], labels[:TRAINED]), Digits(images[TRAINED:], labels[TRAINED:])


def classifier(seed: int) -> ViTForImageClassification:
    """Return an untrained classifier, five blocks of 48 channels, with weights of that seed."""
    torch.manual_seed(seed)
    config = ViTConfig(
        image_size=SIDE, patch_size=PATCH, num_channels=1, num_hidden_layers=5,
        hidden_size=48, intermediate_size=192, num_attention_heads=4,
    )  # fmt: skip
    config.num_labels = 10
    return ViTForImageClassification(config)


def train(
    model: ViTForImageClassification,
    data: Digits,
    epochs: int,
    seed: int,
    teacher: ViTForImageClassification | None = None,
) -> ViTForImageClassification:
    """Train a classifier, and return it.

    Args:
        model: the classifier, which is changed.
        data: what it reads.
        epochs: how often; at 0 nothing changes.
        seed: seed of the order.
        teacher: where one is given, the model is fine-tuned: it learns from labels and teacher alike.
    """
    if not epochs:
        return model
    order, rate = torch.Generator().manual_seed(seed), TUNING_RATE if teacher else RATE
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    schedule = OneCycleLR(optimizer, rate, epochs=epochs, steps_per_epoch=len(data.batches()))
    for _ in track(range(epochs), "epochs"):
        for index_B in torch.randperm(len(data.labels), generator=order).split(BATCH):
            images, labels = data.images[index_B], data.labels[index_B]
            logits = model(images).logits
            loss = cross_entropy(logits, labels) + (distilled(logits, teacher, images) if teacher else 0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model


def distilled(logits: Tensor, teacher: ViTForImageClassification, images: Tensor) -> Tensor:
    """Return the weighted divergence from a teacher at a temperature, whose square keeps the gradient."""
    with torch.no_grad():
        theirs = teacher(images).logits
    own, theirs = ((each / TEMPERATURE).log_softmax(-1) for each in (logits, theirs))
    return ALPHA * TEMPERATURE**2 * kl_div(own, theirs, log_target=True, reduction="batchmean")


@torch.inference_mode()
def accuracy(model: ViTForImageClassification, data: Digits) -> float:
    """Return the share of images whose digit a classifier finds."""
    return float((model(data.images).logits.argmax(-1) == data.labels).float().mean())


@torch.inference_mode()
def speed(
    models: Sequence[ViTForImageClassification], images: Tensor, repeats: int
) -> tuple[Tensor, list[float]]:
    """Return the milliseconds ``[models, repeats]`` of the processor, and the operations of each model.

    Processor time does not count what else the machine does. The models take turns, in the order ABBA.
    """
    work = list[float]()
    for model in models:  # warm them up too
        with counting() as counted:
            model(images)
        work.append(counted.get_total_flops())
    ms = torch.zeros(len(models), repeats, dtype=torch.float64)
    for repeat in track(range(repeats), "repeats"):
        for at in sorted(range(len(models)), reverse=repeat % 2 == 1):
            began = time.process_time()
            models[at](images)
            ms[at, repeat] = 1e3 * (time.process_time() - began)
    return ms, work
