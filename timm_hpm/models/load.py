"""`load_model`: a public robust network by its tag, or by its data set and threat model."""

import re
from typing import Any

import timm
from timm.models import get_pretrained_cfg

from ..names import did_you_mean
from ..threat import ThreatModel
from .create import create_model

# Parts of the names of tags for data sets with other names elsewhere.
_DATA_SETS = {"tiny-imagenet": "tiny", "tiny_imagenet": "tiny", "tinyimagenet": "tiny", "image_folder": "imagenet"}


def load_model(
        name: str | None = None,
        *,
        dataset: str | None = None,
        threat: ThreatModel | str | None = None,
        **model_args: Any,
) -> Any:
    """Returns a public robust network with its weights, in eval mode: the only one that fits.

    Arguments:
        name: a tag such as `"wang2023_cifar10_linf"`, a name such as `"hpm_wrn28_10.wang2023_cifar10_linf"`, an
            architecture such as `"hpm_wrn28_10"` or a part of any of them; None takes all.
        dataset: the training set, such as `"cifar10"`, `"imagenet"` or `"torch/cifar100"`.
        threat: the threat model of the training, such as `"Linf:8/255"`.
        model_args: arguments of `timm.create_model`, such as `inference`.

    Raises:
        ValueError: if no network or more than one fits; the message lists the candidates, or the nearest names.
    """
    threat = ThreatModel.of(threat) if threat else None
    cfgs = {full: get_pretrained_cfg(full) for full in timm.list_pretrained("hpm_*")}
    known = {full: cfg.notes for full, cfg in cfgs.items() if cfg and cfg.notes}
    fitting = [full for full, notes in known.items() if _fits(full, notes, dataset, threat)]
    if name is not None:
        exact = [full for full in fitting if name in (full, full.partition(".")[2])]
        fitting = exact or [full for full in fitting if name in full]
    if len(fitting) != 1:
        wanted = (("name", name), ("dataset", dataset), ("threat", threat))
        asked = ", ".join(f"{key}={str(value)!r}" for key, value in wanted if value) or "nothing"
        if not fitting:
            near = did_you_mean(name, [*known, *(full.partition(".")[2] for full in known)])
            raise ValueError(f"no network fits {asked}{near}; the known ones are in timm.list_pretrained('hpm_*') and "
                             "docs/models.md")
        lines = "".join(f"\n    {full}: {'; '.join(known[full])}" for full in fitting)
        raise ValueError(f"{len(fitting)} networks fit {asked}; expected one. They are:{lines}")
    return create_model(fitting[0], pretrained=True, **model_args).eval()


def _fits(full: str, notes: tuple[str, ...], dataset: str | None, threat: ThreatModel | None) -> bool:
    part = (dataset or "").lower().rpartition("/")[2].replace("cifar-", "cifar")
    # A tag is the authors and the year, if any, the data set and the norm.
    tag = re.sub(r"^[a-z]+\d{4}_|_(linf|l2)(_.*)?$", "", full.partition(".")[2])
    return (not part or _DATA_SETS.get(part, part) == tag) and (
        threat is None or ThreatModel.of(notes[0].partition(": ")[2]) == threat)
