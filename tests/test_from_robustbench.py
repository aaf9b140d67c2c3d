"""docs/from_robustbench.md: its example, and the options and tags of its table of ids."""

import argparse
import csv
import json
from pathlib import Path

import pytest
import timm
from timm.utils import ParseKwargs

import timm_hpm

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "from_robustbench.md").read_text(encoding="utf-8")
IDS = list(csv.DictReader((DOCS / "robustbench_ids.csv").read_text(encoding="utf-8").splitlines()))


def test_the_example(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = timm.create_model("hpm_wrn10_2", pretrained=True).eval()
    quick = timm_hpm.PROTOCOLS["fast"].changed(["fc"], ["apgd-ce"], {"apgd-ce": 2})
    other = timm_hpm.evaluate(model, "digits", "Linf:0.1", num_images=10, inference="fc", protocol=quick)
    timm_hpm.write_report(other, tmp_path / "other")
    example = PAGE.split("```python\n")[1].split("```")[0]
    for theirs, mine in (("hpm_wrn28_10.wang2023_cifar10_linf", "digits_linf"), ("torch/cifar10", "digits"),
                         ("Linf:8/255", "Linf:0.1"), ("num_images=1000", "num_images=10, protocol=quick")):
        assert theirs in example
        example = example.replace(theirs, mine)
    names = {"quick": quick}
    exec(example, names)
    info = json.loads(Path("model_info.json").read_text(encoding="utf-8"))
    assert info["name"] == "A title" and float(info["clean_acc"]) == 100 * names["report"].clean_accuracy


@pytest.mark.parametrize("options", sorted({row["convert"] for row in IDS if row["convert"]}))
def test_options_of_the_table_name_a_network_of_its_classes_and_channels(options):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("model", "num-classes"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs)
    for name in ("mean", "std"):
        parser.add_argument(f"--{name}", nargs="+", type=float)
    args = parser.parse_args(options.split())
    kwargs = args.model_kwargs | ({"num_classes": int(args.num_classes)} if args.num_classes else {})
    model = timm.create_model(args.model, device="meta", **kwargs)
    assert len(args.mean) == len(args.std) == model.pretrained_cfg["input_size"][0] == 3


def test_an_id_has_a_tag_that_exists_or_options_and_a_file():
    tags = [row["tag"] for row in IDS if row["tag"]]
    assert len(tags) == 20 and set(tags) <= set(timm.list_pretrained("hpm_*"))
    assert all(bool(row["convert"]) == bool(row["file"]) != bool(row["tag"]) for row in IDS)
    assert len({(row["dataset"], row["norm"], row["robustbench"]) for row in IDS}) == len(IDS) == 124
