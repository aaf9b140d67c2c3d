"""Hostile inputs, drawn at random: each is refused by one named error, or changes nothing that it should not.

FUZZ_SEED draws others.
"""

import copy
import json
import os
import re
import shutil
import struct
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from html_page import Page
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

import timm_hpm
from timm_hpm import report_markdown, report_page
from timm_hpm.cards import model_card
from timm_hpm.checkpoints import CheckpointError
from timm_hpm.evaluation import Budget
from timm_hpm.evaluation.config import EvaluateConfig, resumed
from timm_hpm.evaluation.robustbench import model_info
from timm_hpm.evaluation.sweep import parse_radii
from timm_hpm.models.create import create_model
from timm_hpm.models.saving import write_model
from timm_hpm.options import read_options
from timm_hpm.training.config import TrainConfig

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
NAMED = (ValueError, OSError, CheckpointError)

TEXTS = st.one_of(
    st.text(max_size=20), st.from_regex(r"[a-zA-Z]{1,5}:[0-9./eE+-]{1,12}", fullmatch=True),
    st.sampled_from(["<script>alert(1)</script>", "a|b", "`", "# x\n\n## y", "\u202e", "../../x", "$(id)", "'; x",
                     "1e999", "nan", "-1", "0x10", "8/0", "\ud800", "\x00"]))
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-3, 3), st.integers(), st.floats(), TEXTS)
VALUES = st.recursive(SCALARS, lambda parts: st.one_of(st.lists(parts, max_size=3),
                                                       st.dictionaries(TEXTS, parts, max_size=3)), max_leaves=6)


def fuzz(inputs: int, strategy: st.SearchStrategy, check: Callable[[Any], str]) -> Counter[str]:
    """Counts the inputs with each outcome that `check` names."""
    found: Counter[str] = Counter()

    @seed(int(os.environ.get("FUZZ_SEED", 0)))
    @settings(max_examples=inputs, database=None, deadline=None, phases=[Phase.generate, Phase.shrink],
              suppress_health_check=list(HealthCheck))
    @given(strategy)
    def run(value: Any) -> None:
        found[check(value)] += 1

    run()
    return found


def outcome(call: Callable[[], Any], unchanged: Callable[[Any], bool] = lambda _: True) -> str:
    """Returns `"refused"` for one named error of readable length, else asserts that the result is as it should be."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            result = call()
        except NAMED as error:
            assert 10 < len(str(error)) < 5_000
            return "refused"
    assert unchanged(result) or warned, "a silent change"
    return "accepted" if unchanged(result) else "accepted with a warning"


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Returns the paths of all entries in a value of JSON's types."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(each for key, part in inside for each in places(part, (*path, key)))]


def mutated(document: Any) -> st.SearchStrategy:
    """Draws the document with one entry replaced, removed or given another name."""
    paths = places(document)[1:]

    @st.composite
    def draw_one(draw: Any) -> Any:
        changed = copy.deepcopy(document)
        *parents, last = draw(st.sampled_from(paths))
        at = changed
        for key in parents:
            at = at[key]
        kind = draw(st.sampled_from(["replace", "remove", "rename"]))
        if kind == "replace" or isinstance(at, list):
            at[last] = draw(VALUES)
        else:
            value = at.pop(last)
            if kind == "rename":
                at[draw(TEXTS)] = value
        return changed
    return draw_one()


def damages(first: int, last: int) -> st.SearchStrategy:
    """Draws where to flip which bit between two places (most), or the length to cut a file to."""
    flips = st.tuples(st.integers(first, last - 1), st.integers(0, 7))
    return st.one_of(flips, flips, flips, st.tuples(st.integers(0, last - 1), st.none()))


def damaged(content: bytes, damage: tuple[int, int | None]) -> bytes:
    """Returns the content with one bit flipped, or cut short."""
    place, bit = damage
    if bit is None:
        return content[:place]
    return content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1:]


@pytest.fixture(scope="module")
def saved(shared_model, tmp_path_factory):
    """A folder of the embedded model."""
    folder = tmp_path_factory.mktemp("saved")
    write_model(shared_model, folder)
    return folder


IMAGES = torch.linspace(0, 1, 2 * 64).view(2, 1, 8, 8)


def test_reports(tmp_path, shared_model):
    document = json.loads((ROOT / "hub_cards" / "hpm_wrn10_2.digits_linf.report.json").read_text(encoding="utf-8"))
    document["examples"] = document["examples"][:1]
    document["assembled"] = document["correct"]["clean"]
    document["neighbours"] = [{"batch_size": 10, "mix": 0.5, "kind": "chosen", "targets": 50, "flipped": 1}]

    def check(value: Any) -> str:
        (tmp_path / "report.json").write_text(json.dumps(value))

        def rendered() -> None:
            report = timm_hpm.AttackReport.load(tmp_path / "report.json")
            lines = report_markdown(report).splitlines()
            assert not any(re.match(r"\s*<script", line) for line in lines)
            Page(report_page(report))
            model_card("org/name", "hf-hub:org/name", shared_model.pretrained_cfg, report=report)
            json.dumps(model_info(report))
        return outcome(rendered)
    fuzz(2000, mutated(document), check)


def test_configs_of_saved_models(tmp_path, saved, shared_model):
    document = json.loads((saved / "config.json").read_text(encoding="utf-8"))
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    expected = shared_model(IMAGES)

    def check(value: Any) -> str:
        (folder / "config.json").write_text(json.dumps(value))
        return outcome(lambda: create_model(f"local-dir:{folder}", pretrained=True).eval()(IMAGES),
                       lambda logits: torch.equal(logits, expected))
    fuzz(1000, mutated(document), check)


def test_headers_of_weights(tmp_path, saved):
    content, file = (saved / "model.safetensors").read_bytes(), tmp_path / "damaged.safetensors"

    def check(damage: Any) -> str:
        file.write_bytes(damaged(content, damage))
        # A changed digit of a mean is as little to be seen as one of a weight.
        return outcome(lambda: create_model("hpm_wrn10_2", pretrained=False, checkpoint=str(file)).eval()(IMAGES),
                       lambda logits: logits.shape == (2, 10))
    header = 8 + struct.unpack("<Q", content[:8])[0]
    assert fuzz(1000, damages(0, header), check)["refused"] > 500


def test_options_of_evaluations(tmp_path):
    document = EvaluateConfig().to_saved()

    def check(value: Any) -> str:
        (tmp_path / "options.json").write_text(json.dumps(value))
        return outcome(lambda: resumed(tmp_path, {}), lambda config: not config.dataset_download)
    fuzz(1000, mutated(document), check)


@pytest.mark.parametrize("parse", [timm_hpm.ThreatModel.of, Budget.parse, parse_radii],
                         ids=lambda each: each.__qualname__)
def test_texts_of_options(parse):
    texts = st.one_of(TEXTS, st.text("0123456789.:/xeLinf2- ", max_size=16))
    fuzz(400, texts, lambda text: outcome(lambda: parse(text)))


def test_configurations_of_training(tmp_path):
    document = TrainConfig().to_dict()

    def check(value: Any) -> str:
        (tmp_path / "args.yaml").write_text(yaml.safe_dump(value), encoding="utf-8", errors="surrogateescape")
        return outcome(lambda: TrainConfig(**read_options(tmp_path / "args.yaml", TrainConfig)))
    fuzz(700, mutated(document), check)


def test_arguments_of_the_attack(shared_model):
    images, labels = timm_hpm.load_split("digits", "val").tensors
    of_the_protocol = ["surrogates", "attacks", "budgets", "full_grid", "surrogates_at_once"]
    arguments = st.sampled_from(["threat", "protocol", "batch_size", "seed", "about", *of_the_protocol])

    def check(drawn: tuple[str, Any]) -> str:
        name, value = drawn
        usual = {"attacks": ["apgd-ce"], "surrogates": ["fc"], "budgets": {"apgd-ce": 1}}

        def attack() -> None:
            changes = usual | ({name: value} if name in of_the_protocol else {})
            options = {"threat": "Linf:0.1", "protocol": timm_hpm.PROTOCOLS["fast"].changed(**changes)}
            if name not in of_the_protocol:
                options[name] = value
            timm_hpm.mixed_surrogate_attack(shared_model, images[:2], labels[:2], **options)
        return outcome(attack)
    fuzz(500, st.tuples(arguments, VALUES), check)
