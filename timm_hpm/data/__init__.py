"""Data sets as pixels in [0, 1], and the boundary between pixels and a model's normalised inputs."""

from .pixels import (
    PixelModel,
    as_pixel_model,
    ask,
    check_eval_mode,
    check_logits,
    check_pixels,
    check_range,
    check_weights,
    checked_integer,
    class_indices,
    for_gradients,
    head_logits,
    in_eval_mode,
    normalisation_of,
    random_flip,
    random_shift,
    unwrapped,
)
from .sources import DATASETS, DataSource, data_source
from .splits import SPLITS, ImageSplit, check_every_class, first_images, hold_out, load_split, open_split

__all__ = [
    "DATASETS", "SPLITS", "DataSource", "ImageSplit", "PixelModel", "as_pixel_model", "ask", "check_eval_mode",
    "check_every_class", "check_logits", "check_pixels", "check_range", "check_weights", "checked_integer",
    "class_indices", "data_source", "first_images", "for_gradients", "head_logits", "hold_out", "in_eval_mode",
    "load_split", "normalisation_of", "open_split", "random_flip", "random_shift", "unwrapped",
]
