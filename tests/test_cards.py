"""The committed cards are those that the generator writes, their usage runs, and their figures are the report's."""

import re
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import ModelCard

import timm_hpm
from timm_hpm import cards

FOLDER = Path(__file__).parents[1] / "hub_cards"
EMBEDDED = "hpm_wrn10_2.digits_linf"


def committed(name: str) -> str:
    return (FOLDER / f"{name}.md").read_text(encoding="utf-8")


def test_every_committed_card_is_what_the_generator_writes():
    written = dict(cards.tag_cards(FOLDER))
    hand_written = {path.name for path in FOLDER.glob("*.notes.md")}
    assert {f"{name}.md" for name in written} == {path.name for path in FOLDER.glob("*.md")} - hand_written
    for name, text in written.items():
        # As data and text: the Hub's client may lay out YAML otherwise tomorrow.
        old, new = ModelCard(committed(name)), ModelCard(text)
        assert old.text == new.text, f"{name}: run python -m timm_hpm.cards hub_cards"
        assert old.data.to_dict() == new.data.to_dict()


def test_every_card_has_what_the_hub_shows():
    for name, _ in cards.tag_cards(FOLDER):
        data = ModelCard(committed(name)).data
        assert data.library_name == "timm" and "timm_hpm" in data.tags and data.pipeline_tag == "image-classification"
        assert data.license in ("apache-2.0", "mit")
        cfg = timm.get_pretrained_cfg(name)
        assert data.base_model == cfg.hf_hub_id
        assert (data.eval_results is not None) == (FOLDER / f"{name}.report.json").is_file()


def test_the_embedded_cards_figures_are_the_reports():
    report = timm_hpm.AttackReport.load(FOLDER / f"{EMBEDDED}.report.json")
    card = ModelCard(committed(EMBEDDED))
    clean, robust = card.data.eval_results
    assert (clean.metric_value, robust.metric_value) == (100 * report.clean_accuracy, 100 * report.robust_accuracy)
    assert robust.dataset_split == "test" and "Linf:0.1, mode batch" in robust.metric_name
    for surrogate, row in report.by_surrogate.items():
        line = re.search(rf"^\| {surrogate} \|.*$", card.text, re.MULTILINE)
        assert line is not None
        assert [float(cell) for cell in line[0].split("|")[2:] if cell.strip()] == pytest.approx(
            [100 * accuracy for accuracy in row.values()], abs=0.05)
    right, baseline = (round(accuracy * report.num_images)
                       for accuracy in (report.robust_accuracy, report.baseline["worst"]))
    text = " ".join(card.text.split())
    assert f"classified {right} correctly throughout, its own FC classifier {baseline}: a difference beyond" in text
    # Square on the straight-through surrogate is Square on the true model: one set, in two rows.
    sets, baseline_sets = len(report.correct) - 2, len(report.baseline_correct) - 1
    assert f"faced {sets} sets of candidates, the FC classifier {baseline_sets}" in text


def test_the_embedded_cards_usage_runs():
    usage, = re.findall(r"```python\n(.*?)```", committed(EMBEDDED), re.DOTALL)
    space: dict = {}
    exec(usage, space)
    assert space["pixel_model"](torch.rand(2, 1, 8, 8)).shape == (2, 10)


def test_a_card_of_a_plain_report_claims_no_more_than_the_report():
    report = timm_hpm.AttackReport.load(FOLDER / f"{EMBEDDED}.report.json")
    for key in ("dataset", "split", "model", "weights"):
        del report.protocol[key]
    report.baseline_correct.clear()
    report.flags.append(timm_hpm.report.Flag("zero-gradient", "at image 4"))
    cfg = timm.get_pretrained_cfg("hpm_wrn10_2").to_dict()
    card = ModelCard(cards.model_card("org/name", "hf-hub:org/name", cfg, report=report, license="MIT"))
    assert card.data.license == "mit" and card.data.datasets is None
    assert "| images | 100, chosen by the caller, in batches of 100 |" in card.text
    assert "FC classifier of the same network" not in card.text and "its own FC classifier" not in card.text
    assert "- zero-gradient: at image 4" in card.text and "unreliable" in card.text


def test_notes_by_hand_open_the_card_and_follow_the_usage():
    cfg = timm.get_pretrained_cfg("hpm_wrn10_2.untrained").to_dict()
    text = cards.model_card("a", "a", cfg, notes="My words.\n\n## Training\n\nLong.\n")
    order = r"# a\n\nMy words\.\n\n## Usage.*No prototypes yet.*## Training\n\nLong\.\n\n## Evaluation"
    assert re.search(order, text, re.DOTALL)
    only_sections = cards.model_card("a", "a", cfg, notes="## Training\n\nLong.")
    assert "# a\n\n`hpm_wrn10_2` with an HPM head that has no prototypes yet" in only_sections


@pytest.mark.parametrize("name", ["hpm_wrn10_2.untrained", "hpm_wrn10_2.nonsense", "nonsense"])
def test_a_tag_without_weights_has_no_card(name):
    with pytest.raises(ValueError, match=r"is no tag with weights; expected one of timm\.list_pretrained"):
        cards.tag_card(name)


def test_a_folder_s_report_is_of_the_weights_in_it(tmp_path):
    model, report = timm.create_model(EMBEDDED, pretrained=True), FOLDER / f"{EMBEDDED}.report.json"
    timm_hpm.hub.save(model, tmp_path / "model", report=report)
    assert (tmp_path / "model" / "report.json").is_file()
    with torch.no_grad():
        model.stages[0][0].conv1.weight.mul_(1.5)
    with pytest.raises(ValueError, match=r"was measured with weights_digest '[0-9a-f]{16}', the model has"):
        timm_hpm.hub.save(model, tmp_path / "other", report=report)
    assert not (tmp_path / "other").exists()
    # Saved over the first, without a report of its own.
    timm_hpm.hub.save(model, tmp_path / "model")
    assert {path.name for path in (tmp_path / "model").iterdir()} == {"README.md", "config.json", "model.safetensors"}
    assert "Robust accuracy" not in (tmp_path / "model" / "README.md").read_text(encoding="utf-8")


def test_a_card_in_the_current_folder_has_that_folder_s_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    timm_hpm.hub.save(timm.create_model(EMBEDDED, pretrained=True), ".", report=FOLDER / f"{EMBEDDED}.report.json")
    card = ModelCard.load("README.md")
    assert f"\n# {tmp_path.name}\n" in card.text and card.data.model_name == tmp_path.name
