"""The benchmarks: independent attackers find what there is to find; docs/results.md is made of the reports; trials."""

import importlib
import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from protocols import run_attack
from torch import nn

import timm_hpm
from timm_hpm import AttackReport, HPMHead, ThreatModel, functional
from timm_hpm.evaluation import Budget

ROOT = Path(__file__).parent.parent
THREAT = ThreatModel("Linf", 0.3)


@pytest.fixture(scope="module")
def benchmark():
    """Returns a function that imports a script of benchmarks/ by its name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield importlib.import_module


@pytest.fixture(scope="module")
def independent(benchmark):
    script = benchmark("independent")
    try:
        script.import_attacks()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    return script


def forged_report(model: nn.Module) -> AttackReport:
    """A report of 8 digits in two batches, all robust, though the ball is so large that each can be broken."""
    images, labels = (part[:8] for part in timm_hpm.load_split("digits", "test").tensors)
    with timm_hpm.head_mode(model, "batch"):
        report = run_attack(model, images, labels, THREAT, batch_size=4, surrogates=["fc"],
                            attacks=["apgd-ce"], budgets={"apgd-ce": Budget(1)})
    assert report.correct["clean"] == "1" * 8
    return replace(report, correct=dict.fromkeys(report.correct, "1" * 8), assembled="")


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_every_attacker_breaks_a_linear_classifier_where_that_is_possible(independent, norm):
    # Far from the pixels' bounds the best margin in the ball is known: the clean one and eps times the dual norm.
    weight, images = torch.randn(5, 64), 0.5 + 0.1 * torch.rand(32, 1, 8, 8)
    threat = ThreatModel(norm, {"Linf": 0.015, "L2": 0.09}[norm])
    clean = images.flatten(1) @ weight.t()
    labels = clean.argmax(dim=1)
    dual = (weight[:, None] - weight).norm(p=1 if norm == "Linf" else 2, dim=2)
    margins = clean - clean.gather(1, labels[:, None]) + threat.eps * dual[labels]
    best = margins.scatter(1, labels[:, None], -math.inf).amax(dim=1)
    assert 4 < (best > 0).sum() < 28
    clear = best.abs() > 0.5 * best.abs().mean()
    runs = independent.attackers(threat, 5, independent.Budgets().scaled(0.3))
    assert list(runs) == {"Linf": ["pgd", "apgd-ce", "apgd-dlr", "apgd-t", "fab-t", "square"],
                          "L2": ["apgd-ce", "apgd-dlr", "apgd-t", "fab-t"]}[norm]
    for name, functions in runs.items():
        logits = independent.Watched(lambda x: x.flatten(1) @ weight.t(), images, labels, threat)
        functions[0](logits, images, labels)
        found = logits.candidates()
        assert threat.distance(found, images).max() <= threat.eps + 1e-6
        broken = (found.flatten(1) @ weight.t()).argmax(dim=1) != labels
        assert torch.equal(broken[clear], best[clear] > 0), name


def test_images_wrongly_called_robust_are_reported_as_missed_and_no_others(independent, shared_model):
    images, labels = (part[:8] for part in timm_hpm.load_split("digits", "test").tensors)
    report = forged_report(shared_model)
    report.correct["fc/apgd-ce"] = "10111101"
    budgets = independent.Budgets(pgd_steps=5, pgd_restarts=1, apgd_steps=5, apgd_restarts=2, apgd_t_steps=3,
                                  fab_t_steps=2, square_queries=20)
    missed = independent.find_missed(shared_model, images, labels, report, budgets)
    assert list(missed) == ["true", "fc", "dataset", "soft", "mixed"]
    assert independent.found_by(missed) == [0, 2, 3, 4, 5, 7]
    assert missed["true"]["apgd-t"] == [0, 2, 3, 4, 5, 7]
    assert independent.to_markdown(missed, report).endswith(
        "robust accuracy by MSA custom: 75.0 %, with these attackers: 0.0 %\n"
        "missed by MSA: 6 of 8 images, 75.0 points")


def test_a_report_is_attacked_again_unless_it_is_of_something_else(independent, shared_model, tmp_path, capsys):
    path, output = tmp_path / "report.json", tmp_path / "out"
    report = forged_report(shared_model)
    report.protocol.update(threat="Linf:0.001", model="hpm_wrn10_2", dataset="digits", split="test")
    report.save(path)
    options = [str(path), "--device", "cpu", "--output", str(output)]
    assert independent.main([*options, "--budget-scale", "0.005"]) == 0
    assert capsys.readouterr().out.endswith("missed by MSA: 0 of 8 images, 0.0 points\n")
    written = json.loads((output / "independent.json").read_text())
    assert written["missed_in_all"] == [] and written["protocol"] == report.protocol
    replace(report, protocol=report.protocol | {"weights_digest": "0" * 16}).save(path)
    with pytest.raises(ValueError, match=r"the weights have the digest .*, those of"):
        independent.main(options)


def test_results_of_autoattack_on_other_images_are_refused(benchmark, tmp_path):
    public_nets = benchmark("public_nets")
    path = tmp_path / "network.json"
    path.write_text(json.dumps({"clean": {"robust": "110"}, "autoattack": {"robust": "100"}}))
    assert public_nets.reference(path, "110") == {"robust": "100"}
    with pytest.raises(SystemExit, match=r"of 3 images instead of 2; give the --num-images of that run"):
        public_nets.reference(path, "11")


@pytest.fixture(scope="module")
def table(benchmark):
    return benchmark("heads_table")


def report(correct: dict[str, str], assembled: str = "") -> AttackReport:
    return AttackReport(protocol={"batch_size": 2}, correct=correct, assembled=assembled)


def test_a_verdict_is_given_only_at_two_standard_errors(table):
    gap = table.Difference(1.0, 0.49)
    assert [gap.verdict(claim) for claim in ("above", "below", "not below")] == ["confirmed", "refuted", "confirmed"]
    gap = table.Difference(-0.3, 0.2)
    assert [gap.verdict(claim) for claim in ("above", "below", "not below")] == ["undecided"] * 3
    assert table.Difference(-0.3, 0.04).verdict("not below") == "confirmed"
    assert table.Difference(-1.0, 0.4).verdict("not below") == "undecided"  # perhaps less so by 0.2 only
    assert table.Difference(-1.0, 0.2).verdict("not below") == "refuted"
    for verdicts, total in (("cc", "confirmed"), ("cu", "confirmed in part"), ("ur", "refuted"), ("rc", "mixed"),
                            ("uu", "undecided"), ("", "undecided")):
        words = [{"c": "confirmed", "r": "refuted", "u": "undecided"}[letter] for letter in verdicts]
        assert table.total_verdict(words) == total


def test_the_error_of_a_difference_is_the_larger_of_those_over_images_and_over_seeds(table):
    right, wrong = [True] * 4, [True, True, True, False]
    same = table.difference([(right, wrong)] * 3)  # no seed differs, the images do
    assert (same.mean, same.error) == (-25.0, pytest.approx(100 * 0.5 / math.sqrt(4)))
    apart = table.difference([(right, right), (right, [False] * 4)])  # no image differs, the seeds do
    assert (apart.mean, apart.error) == (-50.0, pytest.approx(100 * math.sqrt(0.5) / math.sqrt(2)))
    assert str(same) == "−25.0 ± 25.0" and str(table.difference([(right, wrong)])) == "−25.0 ± 25.0¹"


def test_realised_takes_each_batch_in_its_worst_version_and_a_claim_only_attacks_on_the_fc_classifier(table):
    rows = {"clean": "11111", "fc/apgd-ce": "01111", "fc/apgd-t": "01111", "fc/square": "11111", "soft/joint": "10001",
            "fc/apgd-chain": "11110"}
    batch = report(rows, assembled="11111")
    assert table.worst(batch) == [False, False, False, False, False]
    assert table.realised(batch) == [False, True, False, False, False]
    assert table.claimed(batch) == [False, True, True, True, True]
    assert table.realised(report(rows)) == table.worst(report(rows))


@pytest.fixture(scope="module")
def trials(benchmark):
    return benchmark("trials")


def head_of(kind: type[HPMHead], **options) -> HPMHead:
    torch.manual_seed(0)
    head = kind(4, 3, **options)
    head.set_prototypes(torch.randn(3, 4))
    return head


@pytest.mark.parametrize(("form", "paper"), [("batch", "batch"), ("sample", "dataset"), ("fc", "fc")])
def test_a_form_without_options_is_a_head_of_the_package(trials, form, paper):
    features = torch.randn(12, 4)
    own, ours = head_of(trials.Form, inference=form), head_of(HPMHead, inference=paper)
    torch.testing.assert_close(own(features), ours(features))


def test_prototypes_without_an_image_are_those_of_the_batch_without_it(trials):
    features = torch.randn(12, 4)
    whole = head_of(trials.Form, inference="batch", leave_one_out=True)
    head = head_of(trials.Form, inference="batch")
    for temperature, assign, present in ((None, functional.straight_through_assignment, functional.hard_presence),
                                         (1.0, partial(torch.softmax, dim=1), functional.soft_presence)):
        found = whole.squared_distances(features, temperature)
        for i in range(12):
            rest = torch.cat([features[:i], features[i + 1:]])
            a = assign(head.fc_logits(rest))
            means = functional.batch_prototypes(rest, a)
            mixed = functional.mix_prototypes(head.prototypes, means, present(a), head.mix)
            torch.testing.assert_close(found[i:i + 1], functional.squared_distances(features[i:i + 1], mixed))


def test_a_sum_lies_between_its_parts_and_an_attack_that_lowers_the_scale_does_not_change_it(trials):
    features, head = torch.randn(12, 4), head_of(trials.Form, inference="sample", fc_share=0.25)
    l2 = functional.l2_logits(features, head.prototypes, torch.ones(()))
    expected = 0.25 * head.fc_logits(features) + 0.75 * l2
    torch.testing.assert_close(head(features), expected)
    head.log_scale.data.sub_(5)
    torch.testing.assert_close(head(features), expected)
    # Nor does a feature's length if features and prototypes have unit length.
    head = head_of(trials.Form, inference="sample", unit=True)
    torch.testing.assert_close(head(3 * features), head(features))


@pytest.mark.parametrize("unit", [True, False])
def test_an_untrained_classifier_becomes_the_linear_layer_that_predicts_as_the_form(trials, unit):
    features, head = torch.randn(200, 4), head_of(trials.Form, inference="sample", unit=unit, learning=True)
    head.shift.data.normal_()
    before = head(features)
    head.finish(fc_is_trained=False)
    torch.testing.assert_close(head(features), before)
    assert (head.fc_logits(features).argmax(dim=1) == before.argmax(dim=1)).all()


def test_surrogates_of_the_form_predict_as_the_form(trials):
    features = torch.randn(12, 4)
    for options in ({"inference": "batch", "leave_one_out": True}, {"inference": "sample", "fc_share": 0.5}):
        head = head_of(trials.Form, **options)
        head.own_log_scale.data.fill_(4.0)  # so that the logits lead by far
        logits = trials.softened(head, features, None)
        assert (logits.argmax(dim=1) == head(features).argmax(dim=1)).all()
        best = logits.topk(2, dim=1).values
        assert (best[:, 0] - best[:, 1]).quantile(0.95) <= trials.LEAD + 1e-3
