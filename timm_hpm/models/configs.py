"""Checks of a saved model's config, which may come from a stranger."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

# Largest size and depth of a config; timm's own are below 3 MB and four levels.
_MOST_BYTES: Final = 64 * 2**20
_MOST_LEVELS: Final = 20


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
        if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
            raise ValueError("expected an object with the architecture's name")
        # In the older form the fields of the pretrained cfg are beside the architecture.
        config = {"pretrained_cfg": config, "model_args": {}, **config}
        for name in ("pretrained_cfg", "model_args"):
            if not isinstance(config[name], dict):
                raise ValueError(f"{name} is no object")
        _check_levels(config, _MOST_LEVELS)
        check_cfg({name: config[name] for name in ("num_classes", "label_names") if name in config})
        check_cfg(config["pretrained_cfg"])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is damaged or not timm's ({str(error)[:300]}); expected what timm or timm_hpm "
                         "saved") from None
    return config


def check_cfg(cfg: Mapping[str, Any]) -> None:
    """Raises a ValueError for the first field of a pretrained cfg that has another type than timm's."""
    for name, (fits, expected) in _FIELDS.items():
        if cfg.get(name) is not None and not fits(cfg[name]):
            raise ValueError(f"{name} is {str(cfg[name])[:60]!r}; expected {expected}")


def _check_levels(value: Any, levels: int) -> None:
    """Raises a ValueError if objects and lists in `value` are deeper than `levels`."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for part in inner:
        if levels == 0:
            raise ValueError(f"its values lie deeper than {_MOST_LEVELS} levels")
        _check_levels(part, levels - 1)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _list_of(fits: Callable[[Any], bool], *lengths: int) -> Callable[[Any], bool]:
    """Returns the test for a sequence whose entries pass the test `fits`, of one of the `lengths` if any are given."""
    return lambda value: isinstance(value, list | tuple) and all(map(fits, value)) and (
        not lengths or len(value) in lengths)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_text_or_texts(value: Any) -> bool:
    return _is_text(value) or _list_of(_is_text)(value)


_SIZES: Final = (_list_of(_is_size, 3), "three whole numbers above 0")
_TEXT: Final = (_is_text, "a text")
_TEXTS: Final = (_is_text_or_texts, "a text or a list of texts")
# Fields of a pretrained cfg, the test of a value that is not null, and the expected one for a message.
_FIELDS: Final[dict[str, tuple[Callable[[Any], bool], str]]] = {
    "num_classes": (lambda value: _is_size(value) or value in (0, -1), "a whole number from 0"),
    "mean": (_list_of(_is_number), "a list of finite numbers"),
    "std": (_list_of(lambda value: _is_number(value) and value > 0), "a list of finite numbers above 0"),
    **dict.fromkeys(("input_size", "test_input_size", "min_input_size"), _SIZES),
    **dict.fromkeys(("pool_size", "test_pool_size"), (_list_of(_is_size, 2), "two whole numbers above 0")),
    **dict.fromkeys(("crop_pct", "test_crop_pct"),
                    (lambda value: _is_number(value) and value > 0, "a finite number above 0")),
    **dict.fromkeys(("interpolation", "crop_mode", "tag", "license", "origin_url", "paper_name", "description"), _TEXT),
    **dict.fromkeys(("first_conv", "classifier", "notes", "paper_ids"), _TEXTS),
    "fixed_input_size": (lambda value: isinstance(value, bool), "true or false"),
    "label_names": (_list_of(_is_text), "a list of texts"),
    "label_descriptions": (lambda value: isinstance(value, dict | list | tuple), "an object of texts"),
}
