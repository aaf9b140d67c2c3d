"""Checks of a saved model's config, which may come from a stranger."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from .. import rules
from ..rules import Rule

# Largest size and depth of a config; timm's own are below 3 MB and four levels.
_MOST_BYTES: Final = 64 * 2**20
_MOST_LEVELS: Final = 20

_TEXTS: Final = Rule(lambda value: rules.STRING.holds(value) or rules.array(rules.STRING).holds(value),
                     "a text or an array of texts")
# Fields of a pretrained cfg, of which each may be null.
_FIELDS: Final[dict[str, Rule]] = {
    "num_classes": Rule(lambda value: rules.COUNT.holds(value) or (value in (0, -1) and rules.NUMBER.holds(value)),
                        "a whole number from 0"),
    "mean": rules.array(rules.NUMBER),
    "std": rules.array(rules.POSITIVE),
    **dict.fromkeys(("input_size", "test_input_size", "min_input_size"), rules.array(rules.COUNT, 3)),
    **dict.fromkeys(("pool_size", "test_pool_size"), rules.array(rules.COUNT, 2)),
    **dict.fromkeys(("crop_pct", "test_crop_pct"), rules.POSITIVE),
    **dict.fromkeys(("interpolation", "crop_mode", "tag", "license", "origin_url", "paper_name", "description"),
                    rules.STRING),
    **dict.fromkeys(("first_conv", "classifier", "notes", "paper_ids"), _TEXTS),
    "fixed_input_size": rules.TRUTH,
    "label_names": rules.array(rules.STRING),
    "label_descriptions": Rule(lambda value: isinstance(value, dict | list | tuple), "an object of texts"),
}


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
        if not isinstance(config, dict):
            raise ValueError("expected an object with the architecture's name")
        # In the older form the fields of the pretrained cfg are beside the architecture.
        config = {"pretrained_cfg": config, "model_args": {}, **config}
        rules.check_entries("", config, {"architecture": rules.STRING, "pretrained_cfg": rules.OBJECT,
                                         "model_args": rules.OBJECT})
        rules.expect(rules.is_shallow(config, _MOST_LEVELS), "it", config, f"at most {_MOST_LEVELS} levels")
        check_cfg({name: config[name] for name in ("num_classes", "label_names") if name in config})
        check_cfg(config["pretrained_cfg"])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is damaged or not timm's ({str(error)[:300]}); expected what timm or timm_hpm "
                         "saved") from None
    return config


def check_cfg(cfg: Mapping[str, Any]) -> None:
    """Raises a ValueError for the first field of a pretrained cfg that has another type than timm's."""
    given = {name: value for name, value in cfg.items() if value is not None}
    rules.check_entries("", given, {name: rule for name, rule in _FIELDS.items() if name in given})
