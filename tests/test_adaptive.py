"""Attacks on what is special about an HPM head: known answers on raw pixels, the judge's word on a real network."""

import copy
import math

import pytest
import torch
from nets import same_tensors
from protocols import run_attack
from torch import nn

import timm_hpm
from timm_hpm import HPMHead, ThreatModel
from timm_hpm.evaluation import ATTACKS, Budget, joint
from timm_hpm.evaluation.attacked import AttackedModel
from timm_hpm.evaluation.batch import AttackBatch
from timm_hpm.evaluation.neighbours import measure_neighbours
from timm_hpm.surrogates import SURROGATES, soft_logits, ste_logits

NUM_DIGITS, INFERENCE = 40, "batch"

THREAT = ThreatModel("Linf", 0.15)


@torch.no_grad()
def wrong(split: AttackedModel, points: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return split.logits("ste", split.features(points)).argmax(dim=1) != labels


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_the_joint_attack_breaks_more_of_one_batch_than_it_starts_from(model, digits, norm):
    threat = ThreatModel(norm, 0.15 if norm == "Linf" else 0.7)
    images, labels = digits
    split = AttackedModel(timm_hpm.PixelModel(model), images)
    strong = ATTACKS["apgd-ce"].run(AttackBatch(split, ["ste"], images, labels), threat, Budget(20))
    # From anywhere it breaks more; from a strong start, in one step, at least no fewer.
    for start, steps, more in ((threat.random_start(images), 20, 4), (strong, 1, 0)):
        batch = AttackBatch(split, ["soft", "ste"], images, labels, start=start)
        for points in ATTACKS["joint"].run(batch, threat, Budget(steps)).split(40):
            assert wrong(split, points, labels).sum() >= wrong(split, start, labels).sum() + more
            assert threat.contains(points, images).all()


def test_the_attack_on_a_subset_breaks_images_that_nothing_broke(model, digits):
    images, labels = digits
    split = AttackedModel(timm_hpm.PixelModel(model), images)
    first = ATTACKS["joint"].run(AttackBatch(split, ["soft", "ste"], images, labels), THREAT, Budget(20))
    victims = ~torch.stack([wrong(split, points, labels) for points in first.split(40)]).any(dim=0)

    def found(start: torch.Tensor, victims: torch.Tensor, steps: int = 5) -> torch.Tensor:
        batch = AttackBatch(split, ["soft", "ste"], images, labels, start=start, victims=victims)
        torch.manual_seed(0)
        return ATTACKS["joint-subset"].run(batch, THREAT, Budget(steps))

    points = found(0.9 * images, victims, steps=40)
    assert victims.sum() > 10 and any((wrong(split, each, labels) & victims).any() for each in points.split(40))
    assert THREAT.contains(points, images.repeat(2, 1, 1, 1)).all()
    assert (points != images.repeat(2, 1, 1, 1)).flatten(1).any(dim=1).all(), "all others help to flip the victims"
    nobody = torch.zeros_like(victims)
    assert torch.equal(found(0.9 * images, nobody), (0.9 * images).repeat(2, 1, 1, 1))
    # A round depends on its victims, and not on the points that earlier attacks found.
    assert torch.equal(found(images, victims), found(0.9 * images, victims))
    assert not torch.equal(found(images, victims), found(images, ~victims))


def moved_otherwise(one: torch.Tensor, other: torch.Tensor) -> float:
    """The part of the pixels that stand elsewhere; a few do where rounding turns the sign of a gradient."""
    return float(((one - other).abs() > 1e-4).float().mean())


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_an_ascent_does_not_depend_on_the_scale_of_the_logits(model, digits, factor):
    images, labels = digits
    ends = []
    for some in (1.0, factor):
        split = AttackedModel(timm_hpm.PixelModel(model), images)
        split.head.log_scale.add_(math.log(some))
        batch = AttackBatch(split, ["soft", "ste"], images, labels)
        ends.append(ATTACKS["joint"].run(batch, THREAT, Budget(10)))
    assert moved_otherwise(images.repeat(2, 1, 1, 1), ends[0]) > 0.5 and moved_otherwise(*ends) < 0.02


def test_surrogates_side_by_side_ascend_as_each_does_alone(model, digits):
    images, labels = digits
    split = AttackedModel(timm_hpm.PixelModel(model), images)

    def found(*surrogates: str) -> torch.Tensor:
        return ATTACKS["joint"].run(AttackBatch(split, surrogates, images, labels), THREAT, Budget(10))

    soft, ste = found("soft", "ste").split(40)
    assert moved_otherwise(soft, found("soft")) < 0.02 and moved_otherwise(ste, found("ste")) < 0.02
    assert moved_otherwise(soft, ste) > 0.1


def test_softened_errors_are_those_of_the_sigmoid_and_keep_a_gradient_far_away():
    margins, victims = torch.tensor([[-2.0, 0.5, 3.0], [1.0, -1.0, 0.0]]), torch.tensor([[1, 1, 0], [0, 1, 1]]).bool()
    number = (margins.sigmoid() * victims).sum(dim=1)
    assert torch.allclose(joint.softened_errors(margins, victims), number.log())
    far = torch.tensor([[-900.0, -901.0, 5.0]], requires_grad=True)
    joint.softened_errors(far, torch.tensor([[True, True, False]])).sum().backward()
    assert torch.allclose(far.grad, torch.tensor([[math.e, 1.0, 0.0]]) / (math.e + 1), atol=1e-3)


def test_a_round_is_for_a_few_of_those_that_are_nearest_to_an_error():
    victims, margin = torch.arange(50) % 5 > 0, -torch.arange(50.0)
    nearest = set(victims.nonzero().squeeze(1)[:20].tolist())
    drawn = [set(joint.choose_victims(victims, margin).nonzero().squeeze(1).tolist()) for _ in range(50)]
    assert all(len(some) == 4 and some <= nearest for some in drawn)
    assert set.union(*drawn) == nearest, "in the long run each of them"
    one = torch.zeros(50, dtype=torch.bool).index_fill(0, torch.tensor([7]), True)
    assert torch.equal(joint.choose_victims(one, margin), one)


def test_the_soft_assignment_becomes_the_head_s_own_as_it_cools(model, digits):
    split = AttackedModel(timm_hpm.PixelModel(model), digits[0])
    with torch.no_grad():
        features = split.features(digits[0])
        own = ste_logits(split.head, features)
        distances = [float((soft_logits(split.head, features, t) - own).abs().max()) for t in (1.0, 0.1, 1e-3)]
    assert distances[0] > distances[1] > distances[2] and distances[2] < 1e-3
    assert torch.equal(soft_logits(split.head, features, 1.0), SURROGATES["soft"].logits(split.head, features))


def test_each_surrogate_of_the_chain_starts_where_the_last_one_ended(model, digits):
    images, labels = digits
    split = AttackedModel(timm_hpm.PixelModel(model), images)
    batch = AttackBatch(split, ["fc", "dataset"], images, labels)
    torch.manual_seed(3)
    found = ATTACKS["apgd-chain"].run(batch, THREAT, Budget(5)).split(40)
    torch.manual_seed(3)
    alone = ATTACKS["apgd-ce"].run(AttackBatch(split, ["fc"], images, labels), THREAT, Budget(5))
    assert torch.equal(found[0], alone)
    with torch.no_grad():
        logits = [split.logits("dataset", split.features(points)) for points in found]
    loss = [nn.functional.cross_entropy(part, labels, reduction="none") for part in logits]
    fooled = logits[1].argmax(dim=1) != labels
    assert (fooled | (loss[1] >= loss[0] - 1e-6)).all() and loss[1].mean() > loss[0].mean()
    assert fooled.sum() >= (logits[0].argmax(dim=1) != labels).sum()


@pytest.mark.parametrize(("mode", "attacks"), [("sample", ["joint"]), ("fc", ["joint", "apgd-chain"])])
def test_attacks_that_do_not_apply_are_left_out_and_refused_alone(model, digits, mode, attacks):
    with timm_hpm.head_mode(model, mode):
        report = run_attack(model, *digits, THREAT, attacks=["apgd-ce", *attacks], budgets={"apgd-ce": Budget(1)})
        assert list(report.protocol["attacks"]) == ["apgd-ce"] and not report.assembled
        assert report.assembled_robust_accuracy == report.robust_accuracy
        with pytest.raises(ValueError, match=rf"{', '.join(attacks)} needs an HPM head in batch mode"):
            run_attack(model, *digits, THREAT, attacks=attacks)


def two_classes(mix: float) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """Returns a head on one pixel, prototypes at 0.2 and 0.8, FC boundary at 0.5, and images along the line."""
    head = HPMHead(1, 2, mix=mix, inference="batch").eval()
    with torch.no_grad():
        head.set_prototypes(torch.tensor([[0.2], [0.8]]))
        head.weight.copy_(torch.tensor([[-10.0], [10.0]]))
        head.bias.copy_(torch.tensor([5.0, -5.0]))
    images = torch.cat([torch.full((8,), 0.01), torch.full((8,), 0.45), torch.full((8,), 0.55)]).view(-1, 1, 1, 1)
    return nn.Sequential(nn.Flatten(), head).eval(), images, torch.tensor([0] * 16 + [1] * 8)


def test_neighbours_flip_the_targets_of_the_closed_form():
    # A target at 0.45 of class 0: with neighbours at 0.01 its class's mean is near 0.01 + 0.44/n, and with one at 0.55
    # the other's is 0.55. Mixed half and half with 0.2 and 0.8: 0.11 + 0.22/n and 0.675, and 0.45 is nearer to the
    # second.
    model, images, labels = two_classes(0.5)
    rows = measure_neighbours(model, images, labels, ThreatModel("Linf", 0.01), batch_sizes=(6,), num_targets=0)
    assert [row["kind"] for row in rows] == ["reshuffled", "chosen", "adversarial"]
    assert rows[0]["targets"] == 24 and rows[1]["targets"] >= 16 and 8 <= rows[1]["flipped"] <= rows[2]["flipped"]
    # Without the batch's means nobody has a say.
    model, images, labels = two_classes(0.0)
    rows = measure_neighbours(model, images, labels, ThreatModel("Linf", 0.01), batch_sizes=(6,), num_targets=4)
    assert all(row["flipped"] == 0 and row["mix"] == 0.0 for row in rows)


def test_the_judge_confirms_each_flip_and_the_model_is_left_as_it_was(model, digits):
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    rows = measure_neighbours(model, *digits, THREAT, batch_sizes=(10, 40), num_targets=8)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(rows) == 2 * 3 and {row["batch_size"] for row in rows} == {10, 40}
    assert all(0 <= row["flipped"] <= row["targets"] for row in rows)
    assert same_tensors(model.state_dict(), before)
    assert measure_neighbours(model, *digits, THREAT, batch_sizes=(40,), num_targets=8) == rows[-3:]


def test_neighbours_are_measured_without_a_change_of_the_models_state():
    def count(module: nn.Module, _: object) -> None:
        module.calls += 1

    model, images, labels = two_classes(0.5)
    model.register_buffer("calls", torch.zeros(()))
    model.register_forward_pre_hook(count)
    measure_neighbours(model, images, labels, ThreatModel("Linf", 0.01), batch_sizes=(6,), num_targets=1)
    assert model.calls == 0


def test_a_report_holds_the_neighbours_in_a_section_of_its_own(model, digits, tmp_path):
    options = {"attacks": ["apgd-ce"], "surrogates": ["fc"], "budgets": {"apgd-ce": Budget(1)}}
    few, asked = tuple(part[:8] for part in digits), {"neighbours": (4,)}
    plain = run_attack(model, *few, THREAT, **options)
    report = run_attack(model, *few, THREAT, **options, **asked, folder=tmp_path)
    assert [row["kind"] for row in report.neighbours] == ["reshuffled", "chosen", "adversarial"]
    assert report.correct == plain.correct and not plain.neighbours
    assert report.protocol["neighbours"] == [4]
    assert timm_hpm.AttackReport.load(tmp_path / "report.json") == report
    with pytest.raises(ValueError, match=r"of another run \(neighbours: \[4\] there, \[6\] now\)"):
        run_attack(model, *few, THREAT, **options, neighbours=(6,), folder=tmp_path)
    assert run_attack(model, *few, THREAT, **options, **asked, folder=tmp_path) == report
    with timm_hpm.head_mode(model, "sample"):
        assert not run_attack(model, *few, THREAT, **options, neighbours=(4,)).neighbours


@pytest.mark.parametrize(("mode", "options", "message"), [
    ("batch", {"batch_sizes": (41,)}, "a batch size is 41; expected 2 to the number of images, 40"),
    ("sample", {}, "expected a fitted HPM head in batch mode"),
    ("batch", {"batch_sizes": ()}, r"the batch sizes are \(\); expected a list of at least one"),
    ("batch", {"labels": torch.full((40,), 10)}, "label 10 of image 0 is out of range"),
])
def test_neighbours_that_cannot_be_are_refused(model, digits, mode, options, message):
    with timm_hpm.head_mode(model, mode), pytest.raises(ValueError, match=message):
        measure_neighbours(model, **{"images": digits[0], "labels": digits[1], "threat": THREAT, "batch_sizes": (10,)}
                           | options)
