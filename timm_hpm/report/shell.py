"""Commands that a user can copy: the evaluation that repeats a measurement, quoted for a shell."""

import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np

#: Digests of the named protocols for both kinds of classifier, which the evaluation's protocols fill in.
NAMED_PROTOCOLS: Final[dict[str, set[str]]] = {}

#: The words that run this package in any folder.
DOOR: Final = ("python", "-m", "timm_hpm")

#: Options of an evaluation that open the model, and those that open the images; a protocol keeps them as `options`.
MODEL_OPTIONS: Final = ("checkpoint", "pretrained", "num_classes", "in_chans", "model_kwargs", "channels_last")
DATA_OPTIONS: Final = ("data_dir", "dataset_download", "img_size", "crop_pct", "interpolation", "class_map",
                       "class_subset", "val_fraction")

#: The precision in a protocol of a model that is judged in autocast, before the data type.
AUTOCAST: Final = "autocast to "

_WIDTH: Final = 110


def evaluate_command(protocol: Mapping[str, Any]) -> list[str]:
    """Returns the words of the command that repeats an evaluation; none unless evaluate.py made it, or can.

    Arguments:
        protocol: a report's, or some of its entries. Without `model`, `dataset` and `options`, a dict by the names in
            `MODEL_OPTIONS` and `DATA_OPTIONS`, or after a merge of several `seeds`, there is no command; other missing
            entries are left to the defaults of evaluate.py.
    """
    if not {"model", "dataset", "options"} <= protocol.keys() or "seeds" in protocol:
        return []
    given = protocol["options"] or {}
    opened = {name: given[name] for name in (*MODEL_OPTIONS, *DATA_OPTIONS) if given.get(name) not in (None, False, {})}
    if given.get("pretrained") is False and "checkpoint" not in opened:
        return []  # random weights
    options: dict[str, Any] = {"model": protocol["model"], "dataset": protocol["dataset"]} | opened
    # The shortest text of a float32: 0.3053 for 0.3052999973297119.
    options |= {name: [str(np.float32(number)) for number in numbers]
                for name, numbers in (protocol.get("normalisation") or {}).items() if name in ("mean", "std")}
    options |= {name: protocol[name] for name in ("split", "num_images", "threat", "batch_size") if name in protocol}
    if protocol.get("inference", "none") != "none":
        options["inference"] = protocol["inference"]
    if protocol.get("eot", 1) > 1:
        options["eot"] = protocol["eot"]
    options |= _attack_options(protocol)
    precision = protocol.get("precision", "float32")
    if precision.startswith(AUTOCAST):
        options |= {"amp": True, "amp_dtype": precision.removeprefix(AUTOCAST)}
    elif precision != "float32":
        return []  # evaluate.py has no option for it
    options |= {name: protocol[name] for name in ("surrogates_at_once", "seed", "device", "threads")
                if name in protocol}
    return [*DOOR, "evaluate", *(word for name, value in options.items() for word in _words(name, value))]


def shell_line(words: Iterable[str]) -> str:
    """Returns words as one line for a POSIX shell; for Bash and its like if a word cannot be printed."""
    return " ".join(map(_quoted, words))


def shell_lines(words: Sequence[str]) -> str:
    """Returns words as `shell_line` does, in lines that end in a backslash; an option stays with its value."""
    lines, line = [], ""
    for i, word in enumerate(words):
        following = words[i + 1:i + 2] if word.startswith("--") else []
        if line and len(line) + len(shell_line([word, *following])) >= _WIDTH:
            lines.append(line)
            line = "   "
        line += f"{' ' if line else ''}{_quoted(word)}"
    return " \\\n".join([*lines, line])


def _quoted(word: str) -> str:
    if word.isprintable():
        return shlex.quote(word)
    # Raw, a line break would leave a list or a terminal's line, and a control character would reach the terminal.
    return "$'" + "".join(f"\\x{byte:02x}" for byte in os.fsencode(word)) + "'"


def _attack_options(protocol: Mapping[str, Any]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    name = protocol.get("protocol", "")
    # A definition may have changed since the measurement.
    if name in NAMED_PROTOCOLS and protocol.get("protocol_digest") in {None, *NAMED_PROTOCOLS[name]}:
        options["protocol"] = name
    elif "attacks" in protocol:
        surrogates = protocol.get("surrogates") or []
        options = {
            # A plain classifier is its own only surrogate, which has no name among the options.
            "surrogates": "" if surrogates == ["model"] else ",".join(surrogates),
            "attacks": ",".join(protocol["attacks"]),
            "budget": [f"{name}={_budget(budget)}" for name, budget in protocol["attacks"].items()],
            "full_grid": protocol.get("full_grid", False),
        }
    if options:
        options["neighbours"] = ",".join(map(str, protocol.get("neighbours") or ["none"]))
    return options


def _budget(budget: Mapping[str, int]) -> str:
    return f"{budget['iterations']}" + "".join(
        f"{letter}{budget[name]}" for letter, name in (("x", "targets"), ("r", "restarts")) if name in budget)


def _words(name: str, value: Any) -> list[str]:
    option = f"--{name.replace('_', '-')}"
    if value is True:
        return [option]
    if value is False or value in ("", [], None):
        return []
    if isinstance(value, Mapping):
        value = [f"{key}={part if isinstance(part, str) else repr(part)}" for key, part in value.items()]
    words = [str(part) for part in value] if isinstance(value, list | tuple) else [str(value)]
    # A value that begins with a dash would be read as an option.
    return [f"{option}={words[0]}"] if len(words) == 1 and words[0].startswith("-") else [option, *words]
