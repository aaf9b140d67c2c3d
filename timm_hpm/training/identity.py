"""What a checkpoint remembers of a run's network and images, which its options do not name."""

from collections.abc import Mapping
from typing import Any, Final

import torch

from ..data import PixelModel, first_images
from ..head import find_head, head_name, mode_if_any
from ..report import data_digest
from ..seeding import seeded
from .setup import Data

# Images of each split that are kept by their numbers, and how far rounding takes these apart, relative to the largest.
_IMAGES: Final = 8
_ROUNDING: Final = 1e-2


def identity(model: Any, data: Data, extra: str | None) -> dict[str, Any]:
    """Returns what tells a run's network and images from others, in JSON's types.

    That is a digest of all labels, that of the extra data, the head's arguments, and of the first training and
    validation images the mean pixels and the FC logits of their labels. The model ends in eval mode.
    """
    labels = torch.cat([data.train.labels, data.val.labels])
    pairs = [first_images(split, min(_IMAGES, len(split))) for split in (data.plain_train, data.val)]
    images, truth = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    device = next(model.parameters()).device
    with torch.no_grad(), seeded(device, 0, "identity"), mode_if_any(model, "fc"):
        logits = PixelModel(model.eval())(images.to(device)).cpu()
    return {"labels": data_digest(torch.empty(0), labels), "extra": extra,
            "head": None if head_name(model) is None else find_head(model).config(),
            "pixels": images.mean(dim=(1, 2, 3)).tolist(),
            "logits": logits.gather(1, truth.unsqueeze(1)).squeeze(1).tolist()}


def check_identity(found: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises a ValueError that says what differs if a checkpoint's `identity` is not the present one.

    The weights must be the checkpoint's.
    """
    advice = "give the run what it had, or start another in another --output"
    if found.keys() != now.keys():
        raise ValueError(f"the checkpoint knows its network and images by {', '.join(found) or 'nothing'}; expected "
                         f"{', '.join(now)}. Resume it with the version of timm_hpm that wrote it, or {advice}")
    if found["labels"] != now["labels"]:
        raise ValueError(f"the run was begun with other images: their labels, in order, are others now; {advice}")
    if found["extra"] != now["extra"]:
        raise ValueError("the run was begun with other extra data (--extra-data): their images or labels are others "
                         f"now; {advice}")
    if found["head"] != now["head"]:
        raise ValueError(f"the run's HPM head has {found['head']}, and the model's {now['head']}; {advice}")
    for name, cause in (("pixels", "the images"), ("logits", "the network's code or arguments")):
        before, after = torch.tensor(found[name]), torch.tensor(now[name])
        apart = (before - after).abs().max().item()
        if apart > _ROUNDING * before.abs().max().item():
            raise ValueError(f"{cause} have changed since the run began: {name} of the first images differ by up to "
                             f"{apart:.2g}; {advice}")
