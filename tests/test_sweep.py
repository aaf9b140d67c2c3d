"""Sweeps over inference modes and radii: the radii of a text, the reports of a tiny run, the page made of them."""

import re

import pytest
import torch
from html_page import Page
from protocols import run_attack

import timm_hpm
from timm_hpm import AttackReport, Protocol, ThreatModel
from timm_hpm.evaluation import Budget
from timm_hpm.evaluation.sweep import parse_radii, sweep
from timm_hpm.report import Flag
from timm_hpm.report.sweep_page import curves, sweep_markdown, sweep_page


@pytest.mark.parametrize(("text", "radii"), [
    ("0:0.2:0.05", [0, 0.05, 0.1, 0.15, 0.2]), ("2/255:8/255:3/255", [2 / 255, 5 / 255, 8 / 255]),
    ("0:1.5/255:0.5/255", [0, 0.5 / 255, 1 / 255, 1.5 / 255]), ("0.5:0.5:1", [0.5]), ("0:1:0.4", [0, 0.4, 0.8]),
    ("0.00:1e-1:.05", [0, 0.05, 0.1])])
def test_radii_end_where_they_should(text, radii):
    assert parse_radii(text) == radii


@pytest.mark.parametrize("text", [
    "0.1", "a:b:c", "0:8/0:1", "0:1:0", "1:0:0.1", "0:1:0.0001", "0:nan:1",
    # At once, whatever their size.
    "0:1e99999999:1", "0:1:1e-99999999", "0:" + "1" * 100_000 + ":1"])
def test_texts_that_are_no_radii_are_refused_in_a_few_words(text):
    with pytest.raises(ValueError, match="the radii") as caught:
        parse_radii(text)
    assert len(str(caught.value)) < 1000


NUM_DIGITS = 10
SHORT = Protocol("short", {"apgd-ce": Budget(3)}, ("fc", "dataset"))
OPTIONS = {"batch_size": 10, "protocol": SHORT}


@pytest.fixture(scope="module")
def reports(shared_model, digits) -> list[AttackReport]:
    return list(sweep(shared_model, *digits, "Linf", [0, 0.1, 0.3], ["batch", "dataset"], **OPTIONS))


def test_each_report_is_that_of_its_mode_and_radius(reports, shared_model, digits):
    assert [(report.protocol["inference"], report.protocol["threat"]) for report in reports] == [
        ("batch", "Linf:0.1"), ("batch", "Linf:0.3"), ("dataset", "Linf:0.1"), ("dataset", "Linf:0.3")]
    with timm_hpm.head_mode(shared_model, "dataset"):
        alone = run_attack(shared_model, *digits, ThreatModel("Linf", 0.3), **OPTIONS)
    assert alone.same_results(reports[3])
    one_by_one = sweep(shared_model, *digits, "Linf", [0.1, 0.2], ["fc"], batch_size=10, protocol=SHORT.changed(["fc"]))
    assert next(one_by_one).protocol["inference"] == "fc"
    assert timm_hpm.find_head(shared_model).inference == "dataset", "the caller's, also between two reports"


def test_a_model_without_an_hpm_head_has_one_curve(digits):
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)).eval()
    found = list(sweep(net, *digits, "L2", [0.5], batch_size=10, protocol=Protocol("short", {"apgd-ce": Budget(3)})))
    assert list(curves(found)) == ["model"]
    with pytest.raises(ValueError, match="has no HPM head"):
        sweep(net, *digits, "L2", [0.5], ["batch"])


@pytest.mark.parametrize(("arguments", "options", "message"), [
    (([0],), {}, r"radii are \[0\]; expected at least one above 0"), (([0.1, 2],), {}, r"eps is 2\.0 for Linf"),
    (([0.1],), {"save_adversarial": True}, "save_adversarial needs a folder"),
    (([0.1, 0.10000001],), {"folder": "nosuch"}, "2 reports would share 1 folders, named by six digits of the radius"),
    (([0.1], ["batch", "hard"]), {}, "unknown inference mode 'hard'")])
def test_bad_arguments_of_a_sweep_are_refused_before_any_attack(shared_model, digits, arguments, options, message):
    with pytest.raises(ValueError, match=message):
        sweep(shared_model, *digits, "Linf", *arguments, **options)


def test_curves_begin_clean_and_hold_the_robust_accuracies(reports):
    found = curves(reports)
    assert list(found) == ["batch", "dataset", "FC classifier"]
    assert [(point.x, point.y) for point in found["batch"]] == [
        (0.0, reports[0].clean_accuracy), (0.1, reports[0].robust_accuracy), (0.3, reports[1].robust_accuracy)]
    assert [point.y for point in found["FC classifier"]] == [
        reports[0].baseline["clean"], reports[0].baseline["worst"], reports[1].baseline["worst"]]
    assert found["batch"][1].ends == reports[0].robust_accuracy_interval


def test_the_page_and_the_table_hold_every_number(reports):
    reports[2].flags.append(Flag("zero-gradient", "at 3 of 10 images"))
    page = Page(sweep_page(reports, [f"{i}/report.html" for i in range(4)]))
    markdown = sweep_markdown(reports)
    assert "\n\n| eps | batch | dataset | FC classifier |\n" in markdown
    row = next(line for line in markdown.splitlines() if line.startswith("| 0.1 |"))
    dataset = f"{100 * reports[2].robust_accuracy:.1f}†"
    assert row.split("|")[2:4] == [f" {100 * reports[0].robust_accuracy:.1f} ", f" {dataset} "]
    assert dataset in page.text and "Unreliable" in page.text and "dataset, Linf:0.1: at 3 of 10 images" in page.text
    assert [tag["href"] for tag in page.all("a")] == [
        "#zero-gradient", *(f"{i}/report.html" for i in range(4))]
    assert len(page.all("polyline")) == 3 and not page.all("script")
    for report in reports:
        assert re.search(rf"{report.protocol['inference']} at {report.protocol['threat'][5:]}: "
                         rf"{100 * report.robust_accuracy:.1f} % \(", page.text)
    assert "Reports" not in Page(sweep_page(reports)).text
