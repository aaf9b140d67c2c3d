"""docs/robustbench_ids.csv: the options and tags of RobustBench's ids."""

import argparse
import csv
from pathlib import Path

import pytest
import timm
from timm.utils import ParseKwargs

import timm_hpm  # noqa: F401  (registers the networks)

TABLE = Path(__file__).parents[1] / "docs" / "robustbench_ids.csv"
IDS = list(csv.DictReader(TABLE.read_text(encoding="utf-8").splitlines()))


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
