"""What all families but SqueezeNet share: a 64-d feature and a linear head; most take 32x32.

Shapes: B batch, C classes, D = 64 the feature.
"""

from __future__ import annotations

from torch import Tensor, nn

from common.errors import ModelError

FEATURE_DIM = 64
INPUT_SIZE = 32


class FeatureClassifier(nn.Module):
    """A model that ends in a feature (B, 64) and `head`, a Linear(64, C).

    A family fills in `features`; `forward` is head(features(images)). Baselines that share the
    body and keep the head personal rely on these two names.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes

    head: nn.Linear

    def features(self, images: Tensor) -> Tensor:
        """Map images (B, channels, 32, 32), float32, or other inputs, to features (B, 64)."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """Map the same to logits (B, C)."""
        logits: Tensor = self.head(self.features(images))
        return logits


def require_input_size(images: Tensor, model: str) -> None:
    """Raise ModelError unless images are 32x32: the published parameter counts hold for that."""
    if images.ndim != 4:
        raise ModelError(
            f"{model} takes pictures (B, channels, H, W), got {tuple(images.shape)}. Tables want "
            "perceptron, series and volumes conv1d, conv2d, conv3d, texts tokens, or your own."
        )
    if tuple(images.shape[-2:]) != (INPUT_SIZE, INPUT_SIZE):
        height, width = images.shape[-2:]
        raise ModelError(
            f"{model} takes {INPUT_SIZE}x{INPUT_SIZE} images, got {height}x{width}. Set "
            f"image-size = {INPUT_SIZE}, or use a ResNet, a SqueezeNet or a model of your own."
        )
