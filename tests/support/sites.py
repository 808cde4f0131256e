"""What three participants bring: files as each would write them, which import nothing of ours.

Pictures are digits of scikit-learn in colours, and in grey without two of the classes; the table is
breast-cancer, as a CSV with a column that says which part a row is of.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_breast_cancer, load_digits
from torch import nn
from torchvision.models import resnet18

PRETRAINED = '''
"""A ResNet18 that was trained elsewhere: all but its last layer stays as it is, and at home."""

from pathlib import Path

import torch
from torch import nn
from torchvision.models import resnet18


def frozen(*, in_channels, num_classes):
    model = resnet18(num_classes=5)
    weights = Path(__file__).with_name("resnet18.pt")
    model.load_state_dict(torch.load(weights, weights_only=True))
    model.requires_grad_(False)
    model.fc = nn.Linear(model.fc.in_features, num_classes)
    return model
'''

TABLE = '''
"""A table: thirty columns, scaled by those that are trained on, and a part for each row."""

from pathlib import Path

import numpy as np
from torch import nn


def mlp(*, in_channels, num_classes):
    hidden = HIDDEN
    return nn.Sequential(nn.Linear(in_channels, hidden), nn.ReLU(), nn.Linear(hidden, num_classes))


def load_rows():
    rows = np.genfromtxt(Path(__file__).with_name("patients.csv"), delimiter=",", names=True,
                         dtype=None, encoding="utf-8")
    columns = [name for name in rows.dtype.names if name not in ("part", "label")]
    inputs = np.stack([rows[name] for name in columns], 1).astype(np.float32)
    train = rows["part"] == "train"
    inputs = (inputs - inputs[train].mean(0)) / inputs[train].std(0)
    labels = rows["label"].astype(np.int64)
    return {part: (inputs[rows["part"] == part], labels[rows["part"] == part])
            for part in ("train", "validation", "test")}
'''


def digits(start: int, stop: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return digits as grey pictures uint8 (N, 32, 32), and their classes (N,)."""
    found = load_digits()
    pictures = (found.images[start:stop] * (255 / 16)).astype(np.uint8)
    return np.kron(pictures, np.ones((1, 4, 4), np.uint8)), found.target[start:stop]


def coloured(pictures: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Return pictures (N, H, W, 3), each in a colour of its own."""
    colours = rng.uniform(0.5, 1.0, (len(pictures), 1, 1, 3))
    return (pictures[..., None] * colours).astype(np.uint8)


def write_folders(
    folder: Path, pictures: NDArray[np.uint8], labels: NDArray[np.int64], most: int = 10
) -> None:
    """Write a folder of pictures for each class below `most`."""
    for number, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        if label < most:
            (folder / f"digit-{label}").mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(folder / f"digit-{label}" / f"{number}.png")


def write_pretrained(folder: Path, epochs: int = 3) -> None:
    """Train a ResNet18 to tell five pairs of digits apart, and leave what it has learned."""
    torch.manual_seed(0)
    pictures, labels = digits(1200, 1790)
    pictures = coloured(pictures, np.random.default_rng(0))
    inputs = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    model = resnet18(num_classes=5)
    steps = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for _ in range(epochs):
        for rows in torch.randperm(len(inputs)).split(32):
            steps.zero_grad()
            outputs = model(inputs[rows])
            nn.functional.cross_entropy(outputs, torch.from_numpy(labels)[rows] // 2).backward()
            steps.step()
    torch.save(model.state_dict(), folder / "resnet18.pt")
    (folder / "radiology.py").write_text(PRETRAINED.lstrip())


def write_table(folder: Path, start: int, *, hidden: int) -> None:
    """Write every second patient as a CSV, and what reads it."""
    found = load_breast_cancer()
    parts = np.array(["train", "train", "validation", "test"])
    names = [name.replace(" ", "_") for name in found.feature_names]
    lines = [",".join([*names, "label", "part"])]
    for number, row in enumerate(range(start, len(found.target), 2)):
        values = [f"{value:g}" for value in found.data[row]]
        lines.append(",".join([*values, str(found.target[row]), parts[number % 4]]))
    (folder / "patients.csv").write_text("\n".join(lines))
    (folder / "clinic.py").write_text(TABLE.lstrip().replace("HIDDEN", str(hidden)))
