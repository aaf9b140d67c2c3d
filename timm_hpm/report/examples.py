"""`Example`: a misclassified image under attack, in small pictures for a report."""

import base64
from dataclasses import dataclass
from io import BytesIO
from typing import Final

import torch
from PIL import Image
from torch import Tensor

#: A report shows at most so many images.
NUM_EXAMPLES: Final = 8

# Pixels along the longer side.
_LARGEST: Final = 128


@dataclass(frozen=True)
class Example:
    """An image that the true model classifies correctly when clean and not under attack. Pictures: PNG in base64."""

    image: int  # index in the evaluation
    label: int
    predicted: int  # by the true model for the adversarial image in its whole batch; −1 for NaN or infinity
    found_by: str  # the first successful candidate set, "<surrogate>/<attack>"
    amplification: float  # factor of the perturbation in its picture, around a mid grey
    clean: str
    perturbation: str
    adversarial: str


def make_example(image: int, label: int, predicted: int, found_by: str, clean: Tensor, adversarial: Tensor) -> Example:
    """Returns the example of a `clean` and an `adversarial` image, both (channels, H, W) with pixels in [0, 1]."""
    clean, adversarial = _small(clean), _small(adversarial)
    delta = adversarial - clean
    amplification = 0.5 / max(float(delta.abs().max()), 1 / 255)
    return Example(image, label, predicted, found_by, amplification,
                   _png(clean), _png(0.5 + amplification * delta), _png(adversarial))


def _small(picture: Tensor) -> Tensor:
    """Returns every n-th pixel, in one channel or three."""
    stride = -(-max(picture.shape[-2:]) // _LARGEST)
    picture = picture.detach().float().cpu()[:, ::stride, ::stride]
    return picture if len(picture) in (1, 3) else picture.mean(dim=0, keepdim=True)


def _png(picture: Tensor) -> str:
    levels = (255 * picture).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).squeeze(2).numpy()
    file = BytesIO()
    Image.fromarray(levels).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
