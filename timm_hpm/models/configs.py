"""Checks of a saved model's config, which may come from a stranger."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from .. import rules
from ..rules import COUNT, NUMBER, POSITIVE, STRING, Rule

# Largest size and depth of a config; timm's own are below 3 MB and four levels.
_MOST_BYTES: Final = 64 * 2**20
_SHALLOW: Final = rules.shallow(20)

_TEXTS: Final = Rule(lambda value: isinstance(value, str) or (isinstance(value, list | tuple) and all(
    isinstance(part, str) for part in value)), "a text or an array of texts")
_SIZE: Final = Rule(lambda value: isinstance(value, list | tuple) and len(value) == 3 and all(map(COUNT.holds, value)),
                    "channels, height and width, whole numbers above 0")
# Fields of a pretrained cfg, of which each may be null.
_FIELDS: Final = {f"{name}?": (pattern,) for name, pattern in {
    "num_classes": Rule(lambda value: COUNT.holds(value) or (value in (0, -1) and NUMBER.holds(value)),
                        "a whole number from 0"),
    "mean": [NUMBER],
    "std": [POSITIVE],
    **dict.fromkeys(("input_size", "test_input_size", "min_input_size"), _SIZE),
    **dict.fromkeys(("crop_pct", "test_crop_pct"), POSITIVE),
    **dict.fromkeys(("interpolation", "crop_mode", "tag", "license", "origin_url", "paper_name"), STRING),
    **dict.fromkeys(("first_conv", "classifier", "notes", "paper_ids"), _TEXTS),
    "fixed_input_size": rules.TRUTH,
    "label_names": [STRING],
}.items()} | {"*": rules.ANYTHING}
_CONFIG: Final = {
    "architecture": STRING, "pretrained_cfg": {"*": _SHALLOW}, "model_args": {"*": _SHALLOW}, "*": _SHALLOW,
    **{f"{name}?": _FIELDS[f"{name}?"] for name in ("num_classes", "label_names")}}


def read_config(path: str | Path) -> dict[str, Any]:
    """Returns the config of a saved model in the file `path`; raises as `checked_config` and `open` do."""
    try:
        with open(path, "rb") as file:
            return checked_config(file.read(_MOST_BYTES + 1), path)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist; expected the folder of a saved model. A training run writes "
                                "it after its first epoch") from None


def checked_config(text: str | bytes, place: str | Path) -> dict[str, Any]:
    """Returns the config in a JSON text, in timm's newer form, with the objects `pretrained_cfg` and `model_args`."""
    try:
        if len(text) > _MOST_BYTES:
            raise ValueError(f"it has more than {_MOST_BYTES} bytes")
        config = json.loads(text)
        if isinstance(config, dict):
            # In the older form the fields of the pretrained cfg are beside the architecture.
            config = {"pretrained_cfg": config, "model_args": {}, **config}
        rules.check("", config, _CONFIG)
        check_cfg(config["pretrained_cfg"])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is damaged or not timm's ({str(error)[:300]}); expected what timm or timm_hpm "
                         "saved") from None
    return config


def check_cfg(cfg: Mapping[str, Any]) -> None:
    """Raises a ValueError for the first field of a pretrained cfg that has another type than timm's."""
    rules.check("", dict(cfg), _FIELDS)
