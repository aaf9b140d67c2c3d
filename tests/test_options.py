"""One dataclass makes a script's command line, reads its files and checks the values."""

import argparse
import json
import re
from dataclasses import dataclass
from typing import Any

import pytest
import yaml

from timm_hpm.options import add_arguments, as_dict, check, free_names, option, read_options


@dataclass(frozen=True)
class Cake:
    name: str = option("plain", "taste", "name of the cake", "-n")
    layers: int = option(2, "shape", "number of layers", least=1, below=9)
    sugar: float = option(0.5, "taste", "mass fraction of sugar", above=0, most=1, free=True)
    tops: tuple[str, ...] | None = option(None, "taste", "toppings", choices=("nuts", "plums", "none of it"))
    cuts: tuple[int, ...] = option((), "shape", "slices of each layer", least=0)
    warm: bool = option(False, "taste", "served at 30 % above the room's temperature")
    extra: dict[str, Any] | None = option(None, "shape", "further properties")

    def __post_init__(self) -> None:
        check(self)


def parsed(*words: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_arguments(parser, Cake)
    return vars(parser.parse_args(words))


@pytest.mark.parametrize(("words", "expected"), [
    ([], {}),
    (["-n", "rum", "--no-warm"], {"name": "rum", "warm": False}),
    (["--sugar", "1/4", "--warm"], {"sugar": 0.25, "warm": True}),
    (["--tops", "nuts,plums"], {"tops": ("nuts", "plums")}),
    (["--tops", "nuts", "plums"], {"tops": ("nuts", "plums")}),
    (["--tops", "none", "--cuts", "3,4", "5"], {"tops": (), "cuts": (3, 4, 5)}),
    (["--extra", "a=1", "b=x"], {"extra": {"a": 1, "b": "x"}}),
])
def test_the_command_line_and_both_kinds_of_files_give_the_same_options(words, expected, tmp_path):
    given = parsed(*words)
    assert given == expected  # nothing but the options that are given
    cake = Cake(**given)
    for name, text in (("cake.yaml", yaml.safe_dump(as_dict(cake))), ("cake.json", json.dumps(as_dict(cake)))):
        (tmp_path / name).write_text(text)
        assert Cake(**read_options(tmp_path / name, Cake)) == cake


@pytest.mark.parametrize(("changes", "message"), [
    ({"layers": 0}, "layers is 0; expected at least 1"), ({"layers": 9}, "layers is 9; expected below 9"),
    ({"sugar": 0}, "sugar is 0.0; expected above 0"), ({"sugar": 1.5}, "sugar is 1.5; expected at most 1"),
    ({"sugar": float("nan")}, "sugar is nan; expected a finite number"), ({"sugar": "0.5"}, "sugar is '0.5', a str"),
    ({"cuts": [3, -1]}, "cuts is -1; expected at least 0"), ({"cuts": [True]}, "cuts is True, a bool; expected int"),
    ({"tops": "nuts"}, "tops is 'nuts', a str; expected tuple or null"),
    ({"tops": ["figs"]}, "tops is 'figs'; expected one of nuts, plums"), ({"warm": None}, "warm is None, a NoneType"),
    ({"extra": {1: 2}}, "extra is {1: 2}, a dict; expected dict or null"), ({"name": 3}, "name is 3, a int"),
])
def test_a_value_of_another_type_or_range_is_named(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Cake(**changes)


@pytest.mark.parametrize("words", [["--cuts", "3,x"], ["--sugar", "sweet"], ["--layers", "1.5"]])
def test_a_word_that_is_no_value_is_a_mistake_of_the_command_line(words):
    with pytest.raises(argparse.ArgumentError, match=words[0]):
        parsed(*words)


@pytest.mark.parametrize(("name", "text", "message"), [
    ("cake.yaml", "layer: 3\n", "unknown option 'layer'; did you mean layers?"),
    ("cake.json", '{"layer": 3}', "unknown option 'layer'; did you mean layers?"),
    ("cake.json", "name: rum", "cannot read the configuration"), ("cake.json", "[" * 100_000, "cannot read"),
    ("cake.yaml", "[1]", "holds a list; expected lines such as"), ("none.yaml", None, "cannot read"),
])
def test_a_file_of_something_else_is_named(name, text, message, tmp_path):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_options(tmp_path / name, Cake)


def test_the_help_shows_units_and_defaults_in_groups_and_resumed_runs_may_change_some():
    parser = argparse.ArgumentParser(prog="cake")
    add_arguments(parser, Cake)
    text = " ".join(parser.format_help().split())
    assert "mass fraction of sugar (0.5)" in text and "at 30 % above" in text
    assert text.index("taste:") < text.index("shape:") and "(None)" not in text and "(())" not in text
    assert free_names(Cake) == ("sugar",)
