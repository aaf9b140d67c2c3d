"""Folders of images, for tests."""

from pathlib import Path

import numpy as np
from PIL import Image


def write_pictures(folder: Path, counts: dict[str, int], size: tuple[int, int] = (8, 8), mode: str = "RGB",
                   seed: int = 0) -> None:
    """Writes so many PNGs of noise into each class's folder below `folder`, `size` being height and width.

    The classes differ in their brightness, too, so that a network can tell them apart.
    """
    rng = np.random.default_rng(seed)
    for number, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = 40 * number % 200 + rng.integers(0, 56, (*size, 3), dtype=np.uint8)
            Image.fromarray(pixels.astype(np.uint8)).convert(mode).save(folder / name / f"{i}.png")
