"""The committed cards are those that the generator writes, their usage runs, and their figures are the report's."""

import ast
import json
import re
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from pictures import write_pictures
from safetensors.torch import save_file
from torch import nn

import evaluate
import timm_hpm
from timm_hpm import cards
from timm_hpm.evaluation.config import EvaluateConfig
from timm_hpm.evaluation.folder import load_model
from timm_hpm.evaluation.protocols import PROTOCOLS
from timm_hpm.models.saving import write_model
from timm_hpm.report.shell import DOOR, evaluate_command

FOLDER = Path(__file__).parents[1] / "hub_cards"
EMBEDDED = "hpm_wrn10_2.digits_linf"
MEASURED = [file.name.removesuffix(".report.json") for file in sorted(FOLDER.glob("*.report.json"))]


def test_every_card_has_the_metadata_that_the_hub_shows():
    names = timm.list_pretrained("hpm_*")
    assert len(names) > 60
    for name in names:
        card, cfg = ModelCard(cards.tag_card(name, FOLDER)), timm.get_pretrained_cfg(name)
        data = card.data
        assert data.library_name == "timm" and "timm_hpm" in data.tags and data.pipeline_tag == "image-classification"
        assert data.license in ("apache-2.0", "mit") and data.base_model == cfg.hf_hub_id
        assert (data.eval_results is not None) == (name in MEASURED) == ("measured nothing" not in card.text)
        assert f'timm.create_model("{name}", pretrained=True)' in card.text and cfg.origin_url in card.text


HOSTILE = ['a"); import os; os.abort(("', "a\\", "a\n```\n# b", "`a` ``b``", "<script>|", "\u2028\x1b[0m"]


@pytest.mark.parametrize("name", HOSTILE)
def test_no_name_leaves_its_place_in_a_card(name):
    report = timm_hpm.AttackReport.load(FOLDER / f"{EMBEDDED}.report.json")
    report.protocol.update(dataset=name, split=name, versions={name: name}, surrogates=[name], class_names=[name])
    report.flags.append(timm_hpm.report.Flag("zero-gradient", name))
    cfg = timm.get_pretrained_cfg("hpm_wrn10_2").to_dict()
    texts = {}
    for title in ("a", name):
        origin = {"origin_url": title, "hf_hub_id": title, "hf_hub_filename": title, "paper_ids": title}
        texts[title] = ModelCard(cards.model_card(
            title, f"hf-hub:{title}@{title}", cfg | origin | {"architecture": f"hpm_{title}"}, report=report,
            register=True)).text.strip()
    usage, = re.findall(r"```python\n(.*?)```", texts[name], re.DOTALL)
    register, create = [node.value for node in ast.walk(ast.parse(usage))
                        if isinstance(node, ast.Constant) and isinstance(node.value, str)][:2]
    assert (register, create) == (name, f"hf-hub:{name}@{name}")
    lines = {title: [line for line in text.splitlines() if line.startswith(("#", "```", "|---", "- "))]
             for title, text in texts.items()}
    assert len(lines[name]) == len(lines["a"]) and lines[name][1:] != []
    assert "<script>" not in re.sub(r"```.*?```|`.*?`", "", texts[name], flags=re.DOTALL)


def evaluated(text: str) -> timm_hpm.AttackReport:
    """Returns the report of a card's or a report's command, in the words that a shell makes of it."""
    command, = re.findall(r"```+sh\n(.*?)\n```", text, re.DOTALL)
    words = subprocess.run(["sh", "-c", f"printf '%s\\0' {command}"], capture_output=True, text=True, check=True).stdout
    *door, command, options = *words.split("\0")[:4], words.split("\0")[4:-1]
    assert (*door, command) == (*DOOR, "evaluate")
    shutil.rmtree("again", ignore_errors=True)
    assert evaluate.main([*options, "--output", "again"]) == 0
    return timm_hpm.AttackReport.load("again/report.json")


# Names, budgets, a folder, a checkpoint, L2, modes, seeds and batches: nothing of it is evaluate.py's default.
RUNS = {
    "train": ["--split", "train", "--num-images", "8", "--attacks", "square,apgd-ce", "--budget", "square=20",
              "apgd-ce=3", "--full-grid", "--surrogates-at-once", "1", "--model-kwargs", "mix=0.3",
              "--inference", "sample"],
    "folder": ["--dataset", "folder", "--data-dir", "my 'data' $x", "--checkpoint", "w `e`.safetensors",
               "--num-classes", "4", "--threat", "L2:0.5", "--attacks", "apgd-t,joint-subset", "--inference", "batch",
               "--budget", "apgd-t=3x2", "joint-subset=2r3", "--num-images", "0", "-b", "5", "--seed", "7",
               "--neighbours", "4", "--mean", "-0.1", "--std", "0.7"],
}


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_the_command_of_a_report_and_of_a_card_gives_the_same_numbers(tmp_path, inside, options):
    classes = {f"{split}/class {i}": 4 for split in ("train", "test") for i in range(4)}
    write_pictures(tmp_path / "my 'data' $x", classes, mode="L")
    torch.manual_seed(0)
    model = timm.create_model("hpm_wrn10_2", num_classes=4)
    timm_hpm.find_head(model).update_prototypes(torch.rand(8, model.num_features), torch.arange(8) % 4)
    save_file(model.state_dict(), "w `e`.safetensors")
    assert evaluate.main([*options, "--device", "cpu", "--output", "run"]) == 0
    report = timm_hpm.AttackReport.load("run/report.json")
    again = evaluated(Path("run/report.md").read_text(encoding="utf-8"))
    assert (again.correct, again.baseline_correct, again.assembled, again.neighbours) == (
        report.correct, report.baseline_correct, report.assembled, report.neighbours)
    model = load_model(EvaluateConfig(**evaluate.parse_args([*options, "--device", "cpu"])[1]))
    timm_hpm.find_head(model).inference = report.protocol["inference"]
    if "--mean" in options:  # which other users of these weights must know, too
        model.pretrained_cfg.update(mean=(0.1,))
        with pytest.raises(ValueError, match=r"the report was measured with normalisation .*, the model has"):
            timm_hpm.hub.save(model, "a 'model'", report=report)
        model.pretrained_cfg.update(mean=(-0.1,))
    timm_hpm.hub.save(model, "a 'model'", report=report)
    again = evaluated(Path("a 'model'/README.md").read_text(encoding="utf-8"))
    assert (again.correct, again.neighbours) == (report.correct, report.neighbours)


def test_training_settings_and_class_names_stay_with_weights_and_nobody_else_s_licence_does(tmp_path):
    names = [f"class {i}" for i in range(3)]
    model = timm.create_model("hpm_wrn10_2", num_classes=3).eval()
    model.pretrained_cfg.update(label_names=names, num_classes=3)
    timm_hpm.find_head(model).set_prototypes(torch.rand(3, model.num_features))
    training = {"options": {"model": "hpm_wrn10_2", "threat": "L2:0.5"}, "kept": {"epoch": 3}}
    (tmp_path / "run").mkdir()
    write_model(model, tmp_path / "run", training=training)
    again = timm.create_model(f"local-dir:{tmp_path / 'run'}", pretrained=True).eval()
    timm_hpm.hub.save(again, tmp_path / "a", repo_id="org/name")
    config = json.loads((tmp_path / "a" / "config.json").read_text(encoding="utf-8"))
    card = ModelCard.load(tmp_path / "a" / "README.md")
    assert config["training"] == training and "threat: L2:0.5" in card.text
    assert "0 class 0, 1 class 1, 2 class 2" in card.text
    assert not {"license", "origin_url", "paper_ids"} & config["pretrained_cfg"].keys()
    assert card.data.license == "unknown" and "origin:" not in card.text and "papers:" not in card.text
    timm_hpm.hub.save(timm.create_model(EMBEDDED, pretrained=True), tmp_path / "b")
    assert ModelCard.load(tmp_path / "b" / "README.md").data.license == "apache-2.0"
    # What the owner says stays; other weights have other settings.
    with torch.no_grad():
        again.conv1.weight.mul_(2)
    timm_hpm.hub.save(again, tmp_path / "b", license="MIT")
    timm_hpm.hub.save(timm.create_model(f"local-dir:{tmp_path / 'b'}", pretrained=True), tmp_path / "c")
    card = ModelCard.load(tmp_path / "c" / "README.md")
    assert card.data.license == "mit" and "Training settings" not in card.text


@pytest.mark.parametrize("own", [True, False])
def test_a_network_in_a_pixel_model_is_saved_with_its_normalisation(own, tmp_path):
    network = timm.create_model(EMBEDDED, pretrained=True).eval() if own else nn.Sequential(
        nn.Flatten(), nn.Linear(64, 10)).eval()
    model = timm_hpm.PixelModel(network, (0.25,), (0.5,))
    protocol = PROTOCOLS["fast"].changed(attacks=["apgd-ce"], budgets={"apgd-ce": 1})
    report = timm_hpm.evaluate(model, (torch.rand(4, 1, 8, 8), torch.arange(4)), "Linf:0.1", protocol=protocol)
    timm_hpm.hub.save(model, tmp_path, report=report)
    for keep in (partial(timm_hpm.hub.save, folder=tmp_path), partial(timm_hpm.train, output=tmp_path)):
        with pytest.raises(ValueError, match=r"averages 2 draws.*evaluate with --eot 2"):
            keep(timm_hpm.PixelModel(network, (0.25,), (0.5,), draws=2))
    assert getattr(network, "pretrained_cfg", {}).get("mean") != [0.25]
    cfg = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["pretrained_cfg"]
    assert (cfg["mean"], cfg["std"]) == ([0.25], [0.5])
    if own:
        again = timm_hpm.PixelModel(timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval())
        images = torch.rand(4, 1, 8, 8)
        assert torch.equal(again(images), model(images))


def test_a_run_that_no_command_can_repeat_has_no_command_and_a_card_of_merged_reports_their_seeds():
    report = timm_hpm.AttackReport.load(FOLDER / f"{EMBEDDED}.report.json")
    assert evaluate_command(report.protocol)[:5] == [*DOOR, "evaluate", "--model"]
    for odd in ({"precision": "bfloat16"}, {"options": {"pretrained": False}}):
        assert evaluate_command(report.protocol | odd) == []
    assert evaluate_command({name: value for name, value in report.protocol.items() if name != "options"}) == []
    report.protocol.update(seeds=[0, 3], precision="autocast to bfloat16", eot=4)
    card = cards.model_card("org/name", EMBEDDED, timm.get_pretrained_cfg("hpm_wrn10_2").to_dict(), report=report)
    assert "| seeds | 0, 3 |" in card and "Measured from Python" not in card and "of several seeds" in card
    assert "| precision | autocast to bfloat16 |" in card and "| eot | 4 |" in card


def test_a_card_of_a_plain_report_claims_no_more_than_the_report():
    report = timm_hpm.AttackReport.load(FOLDER / f"{EMBEDDED}.report.json")
    for key in ("dataset", "split", "model", "weights"):
        del report.protocol[key]
    report.baseline_correct.clear()
    report.flags.append(timm_hpm.report.Flag("zero-gradient", "at image 4"))
    cfg = timm.get_pretrained_cfg("hpm_wrn10_2").to_dict()
    card = ModelCard(cards.model_card("org/name", "hf-hub:org/name", cfg, report=report, license="MIT"))
    assert card.data.license == "mit" and card.data.datasets is None
    assert "| num_images | 100 |" in card.text
    assert "FC classifier of the same network" not in card.text and "its own FC classifier" not in card.text
    assert "- zero-gradient: at image 4" in card.text and "unreliable" in card.text


def test_a_folder_s_report_is_of_the_model_in_it(tmp_path, inside):
    model, report = timm.create_model(EMBEDDED, pretrained=True), FOLDER / f"{EMBEDDED}.report.json"
    timm_hpm.hub.save(model, ".", report=report)
    assert (tmp_path / "report.json").is_file()
    card = ModelCard.load("README.md")
    assert f"\n# {tmp_path.name}\n" in card.text and card.data.model_name == tmp_path.name
    others = {name: timm.create_model(EMBEDDED, pretrained=True, **{name: value}) for name, value in (
        ("inference", "sample"), ("mix", 0.25))}
    others |= {"weights_digest": timm.create_model(EMBEDDED, pretrained=True),
               "prototypes_fitted": timm.create_model(EMBEDDED), "architecture": timm.create_model("hpm_wrn16_4")}
    others["weights_digest"].conv1.weight.data.mul_(1.5)
    for name, other in others.items():
        with pytest.raises(ValueError, match=rf"the report was measured with {name} .*, the model has"):
            timm_hpm.hub.save(other, tmp_path / "other", report=report)
        assert not (tmp_path / "other").exists()
    # Saved over the first, without a report of its own.
    timm_hpm.hub.save(model, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    assert "Robust accuracy" not in (tmp_path / "README.md").read_text(encoding="utf-8")
