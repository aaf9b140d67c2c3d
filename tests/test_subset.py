"""A model that is measured on some of its classes."""

import json
import re

import pytest
import timm
import torch
from pictures import write_pictures
from protocols import run_attack
from timm.data import ImageNetInfo

import evaluate
import timm_hpm
from timm_hpm import PROTOCOLS, AttackReport, PixelModel, find_head
from timm_hpm.evaluation import Budget
from timm_hpm.subset import keep_classes, read_subset

EMBEDDED = "hpm_wrn10_2"


@pytest.mark.parametrize(("name", "mode"), [(EMBEDDED, "fc"), (EMBEDDED, "dataset"), ("test_resnet", None),
                                            ("test_efficientnet", None), ("test_vit", None)])
def test_the_logits_of_a_subset_are_the_model_s(name, mode):
    model = timm.create_model(name, **({"pretrained": True, "inference": mode} if mode else {})).eval()
    pixels = torch.rand(5, *model.pretrained_cfg["input_size"])
    expected = model(pixels)[:, [8, 3, 1]]
    assert keep_classes(model, [8, 3, 1]) is model and model.num_classes == 3
    torch.testing.assert_close(model(pixels), expected)


def test_a_thousand_class_model_is_measured_on_folders_of_synsets(tmp_path):
    torch.manual_seed(0)
    synsets = ImageNetInfo().label_names()
    write_pictures(tmp_path / "val", {synsets[number]: 1 for number in (5, 700, 2)}, (64, 64))
    (tmp_path / "subset.txt").write_text(f"# two of three\n{synsets[700]}\n\n2  # the great white shark\n")
    arguments = ["--model", "test_resnet", "--no-pretrained", "--device", "cpu", "--dataset", "folder", "--img-size",
                 "32", "--data-dir", str(tmp_path), "--num-images", "0",
                 "--attacks", "square", "--budget", "square=1"]
    assert evaluate.main([*arguments, "--class-subset", str(tmp_path / "subset.txt"), "--output",
                          str(tmp_path / "run")]) == 0
    protocol = AttackReport.load(tmp_path / "run" / "report.json").protocol
    assert protocol["num_images"] == protocol["num_classes"] == 2
    assert protocol["class_subset"] == "2 of the model's 1000 classes"
    assert protocol["class_names"] == [synsets[700], synsets[2]]


def test_labels_predictions_and_attacks_are_those_of_the_subset(tmp_path, inside):
    (tmp_path / "subset.txt").write_text("8\n3\n1\n")
    arguments = ["--device", "cpu", "--attacks", "apgd-ce,square", "--budget", "apgd-ce=3", "square=10", "--surrogates",
                 "fc,ste", "--num-images", "20", "-b", "10", "--save-adversarial"]
    evaluate.main([*arguments, "--class-subset", "subset.txt", "--output", "run"])
    report = AttackReport.load("run/report.json")
    model = keep_classes(timm.create_model(EMBEDDED, pretrained=True).eval(), ["8", "3", "1"])
    images, labels = timm_hpm.load_split("digits", "test", class_map=model.class_map).tensors
    assert set(labels.tolist()) == {0, 1, 2} and len(labels) < 120
    again = run_attack(model, images[:20], labels[:20], report.protocol["threat"], batch_size=10,
                       attacks=["apgd-ce", "square"], surrogates=["fc", "ste"],
                       budgets={"apgd-ce": Budget(3), "square": Budget(10)})
    assert (again.correct, again.baseline_correct) == (report.correct, report.baseline_correct)
    assert "--class-subset subset.txt" in (tmp_path / "run/report.md").read_text(encoding="utf-8")
    assert "3 of the model&#x27;s 10 classes" in (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "run/options.json").read_text())["class_subset"] == "subset.txt"
    assert evaluate.main(["--rejudge", "run"]) == 0
    # Of the subset's logits no other class is predicted, clean or attacked.
    with torch.no_grad():
        assert PixelModel(model)(images).shape == (len(images), 3)


@pytest.mark.parametrize("kind", ["timm", "wrapped", "module of pixels"])
def test_the_labels_of_a_data_set_by_name_are_those_of_a_reordered_subset(kind):
    order = [3, 1, 2, 0, *range(4, 10)]  # as many classes, so that their number tells nothing
    network = timm.create_model(EMBEDDED, pretrained=True).eval()
    if kind == "module of pixels":
        classifier = torch.nn.Linear(128, 10)
        classifier.weight, classifier.bias = find_head(network).weight, find_head(network).bias
        network.reset_classifier(0)
        network = torch.nn.Sequential(PixelModel(network), classifier).eval()
        network.num_classes = 10
    model = keep_classes(network, order)
    report = timm_hpm.evaluate(PixelModel(model) if kind == "wrapped" else model, "digits", num_images=20,
                               protocol=PROTOCOLS["fast"].changed(attacks=["square"], budgets={"square": Budget(1)}))
    assert report.clean_accuracy > 0.9


def test_bad_subsets_are_named(tmp_path):
    model = timm.create_model(EMBEDDED, pretrained=True)
    for classes, message in ((["3", "cat"], "the class 'cat', which the model has not; expected numbers from 0 to 9"),
                             ([3, 5, "3"], "the subset has 3 classes, '3' twice")):
        with pytest.raises(ValueError, match=re.escape(message)):
            keep_classes(model, classes)
    assert model.num_classes == 10
    model.pretrained_cfg["label_names"] = ["crane", *"abcdefgh", "crane"]
    with pytest.raises(ValueError, match=r"'crane', and 2 classes of the model have that name; give its number"):
        keep_classes(model, ["a", "crane"])
    del model.pretrained_cfg["label_names"]
    with pytest.raises(ValueError, match=r"cannot read the class subset .*none\.txt.*Expected a text file"):
        read_subset(tmp_path / "none.txt")
    write_pictures(tmp_path, {"test/0": 1, "test/cat": 1})
    keep_classes(model, [0, 3])
    with pytest.raises(ValueError, match=r"1 classes that the model has not \(cat\) and lacks 1 of the subset \(3\)"):
        timm_hpm.load_split("folder", "test", data_dir=tmp_path, input_size=(1, 8, 8), class_map=model.class_map)
