"""The Mixed Surrogate Attack: against problems solved in closed form, and its bookkeeping against the model itself."""

import copy
import json
import math

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

import timm_hpm
from timm_hpm import AttackReport, HPMHead, NonFiniteLogitsError, ThreatModel, mixed_surrogate_attack
from timm_hpm.attacks.components import COMPONENTS, AttackBatch, Budget, Notes
from timm_hpm.attacks.surrogates import SURROGATES, SplitModel

SHAPE = (1, 6, 6)
# Enough for small problems; the standard budgets are the slow tests'.
SMALL = {"apgd-ce": Budget(10), "apgd-t": Budget(10, targets=2), "fab-t": Budget(5, targets=2), "square": Budget(20)}


def linear_problem(num_classes: int, num_images: int = 60) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """Returns a linear classifier of 6×6 pixels and images far from the edges of [0, 1]; some labels are wrong."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(SHAPE), num_classes)).eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(model[1].weight.shape, generator=generator))
        images = 0.4 + 0.2 * torch.rand(num_images, *SHAPE, generator=generator)
        model[1].bias.copy_(-model[1].weight @ images.flatten(1).mean(dim=0))
        labels = model(images).argmax(dim=1)
    labels[:3] = (labels[:3] + 1) % num_classes
    return model, images, labels


def prototype_problem(mode: str, num_classes: int = 5) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """Returns an HPM head on raw pixels and images around its prototypes, some near a boundary."""
    generator = torch.Generator().manual_seed(1)
    model = nn.Sequential(nn.Flatten(), HPMHead(math.prod(SHAPE), num_classes, inference=mode)).eval()
    prototypes = 0.35 + 0.3 * torch.rand(num_classes, math.prod(SHAPE), generator=generator)
    with torch.no_grad():
        model[1].set_prototypes(prototypes)
        model[1].log_scale.fill_(2.0)
        # An FC classifier of the same kind, a little off: the surrogates then disagree.
        model[1].weight.copy_(20 * prototypes + torch.randn(prototypes.shape, generator=generator))
        model[1].bias.copy_(-10 * prototypes.square().sum(dim=1))
        pairs = torch.randint(num_classes, (2, 60), generator=generator)
        weight = 0.5 * torch.rand(60, 1, generator=generator)
        flat = prototypes[pairs[0]].lerp(prototypes[pairs[1]], weight)
        images = (flat + 0.03 * torch.randn(flat.shape, generator=generator)).view(-1, *SHAPE)
        labels = model(images).argmax(dim=1)
    return model, images, labels


def smallest_perturbation(normals: torch.Tensor, gaps: torch.Tensor, labels: torch.Tensor, norm: str) -> torch.Tensor:
    """Returns the distance (N,) to the nearest hyperplane: gaps (N, C) to each class over the dual norm (N, C)."""
    dual = normals.abs().sum(dim=-1) if norm == "Linf" else normals.norm(dim=-1)
    distances = gaps / dual
    return distances.scatter(1, labels.unsqueeze(1), math.inf).amin(dim=1).clamp(min=0)


def linear_distances(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, norm: str) -> torch.Tensor:
    with torch.no_grad():
        logits = model(images)
    weight = model[1].weight.detach()
    return smallest_perturbation(weight[labels].unsqueeze(1) - weight, logits.gather(1, labels.unsqueeze(1)) - logits,
                                 labels, norm)


def prototype_distances(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, norm: str) -> torch.Tensor:
    prototypes = model[1].prototypes
    squared = (images.flatten(1).unsqueeze(1) - prototypes).square().sum(dim=-1)
    return smallest_perturbation(2 * (prototypes[labels].unsqueeze(1) - prototypes),
                                 squared - squared.gather(1, labels.unsqueeze(1)), labels, norm)


def check_against_closed_form(report: AttackReport, distances: torch.Tensor, eps: float) -> None:
    """Every image breakable within 0.99·eps is broken, and none that needs more than 1.01·eps."""
    rows = list(report.correct.values())
    robust = torch.tensor([all(row[i] == "1" for row in rows) for i in range(len(distances))])
    breakable, unbreakable = distances < 0.99 * eps, distances > 1.01 * eps
    assert breakable.sum() >= 10 and unbreakable.sum() >= 10, "the problem tests nothing"
    assert not robust[breakable].any()
    assert robust[unbreakable].all()


@pytest.mark.parametrize("num_classes", [2, 3, 5, 11])
@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_linear_classifier_in_closed_form(norm, num_classes):
    model, images, labels = linear_problem(num_classes)
    distances = linear_distances(model, images, labels, norm)
    eps = distances[distances > 0].median().item()
    report = mixed_surrogate_attack(model, images, labels, ThreatModel(norm, eps), batch_size=40,
                                    budgets={"square": Budget(100)})
    assert list(report.by_surrogate) == ["model"]
    check_against_closed_form(report, distances, eps)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_dataset_mode_on_raw_pixels_in_closed_form(norm):
    model, images, labels = prototype_problem("dataset")
    distances = prototype_distances(model, images, labels, norm)
    eps = distances.median().item()
    report = mixed_surrogate_attack(model, images, labels, ThreatModel(norm, eps), batch_size=40, surrogates_at_once=3,
                                    budgets={"square": Budget(100)})
    assert list(report.by_surrogate) == ["fc", "dataset", "mixed", "true"]
    check_against_closed_form(report, distances, eps)


@pytest.mark.parametrize("mode", ["dataset", "batch"])
def test_no_attack_breaks_more_than_the_closed_form_allows_under_any_surrogate(mode):
    # The unbreakable images of the dataset mode stay so whatever surrogate the candidate came from; in batch mode
    # with mix = 0 the head is the same classifier.
    model, images, labels = prototype_problem(mode)
    model[1].mix = 0.0
    distances = prototype_distances(model, images, labels, "Linf")
    eps = distances.median().item()
    report = mixed_surrogate_attack(model, images, labels, ThreatModel("Linf", eps), surrogates=list(SURROGATES),
                                    surrogates_at_once=5, budgets={"fab-t": Budget(20, 4), "square": Budget(100)})
    check_against_closed_form(report, distances, eps)


@pytest.fixture(scope="module")
def digits_model() -> nn.Module:
    """A tiny real model: random features, fitted prototypes, an FC classifier that agrees with them now and then."""
    torch.manual_seed(0)
    model = timm.create_model("hpm_wrn10_2.digits_linf", pretrained=True).eval()
    return model


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = timm_hpm.load_split("digits", "val").tensors
    return images[:24], labels[:24]


THREAT = ThreatModel("Linf", 0.1)


def test_candidates_lie_in_the_ball_and_are_never_the_clean_image(digits_model, digits, tmp_path):
    path = tmp_path / "adversarial.safetensors"
    mixed_surrogate_attack(digits_model, *digits, THREAT, batch_size=10, budgets=SMALL, surrogates_at_once=5,
                           save_adversarial=path)
    saved = load_file(path)
    assert set(saved) == {"clean", "labels"} | {f"{s}/{a}" for s in SURROGATES for a in COMPONENTS}
    assert torch.equal(saved.pop("clean"), digits[0]) and torch.equal(saved.pop("labels"), digits[1])
    for name, points in saved.items():
        assert points.min() >= 0 and points.max() <= 1, name
        distances = THREAT.distance(points, digits[0])
        assert distances.max() <= THREAT.eps + 1e-6, name
        assert distances.min() > 0, name


@pytest.mark.parametrize("mode", timm_hpm.INFERENCE_MODES)
def test_rejudging_saved_candidates_reproduces_the_report(digits_model, digits, tmp_path, mode):
    path = tmp_path / "adversarial.safetensors"
    with timm_hpm.inference_mode(digits_model, mode):
        report = mixed_surrogate_attack(digits_model, *digits, THREAT, batch_size=12, budgets=SMALL,
                                        surrogates_at_once=5, save_adversarial=path)
    verdicts = timm_hpm.rejudge(digits_model, path)
    assert len(verdicts) >= 5
    assert verdicts == {name: row for name, row in report.correct.items() if not name.startswith("true/")}
    assert digits_model.fc.inference == "batch"


def test_one_seed_gives_one_report_and_another_seed_another(digits_model, digits, tmp_path):
    reports, candidates = [], []
    for run, seed in enumerate((3, 3, 4)):
        torch.manual_seed(run)
        path = tmp_path / f"{run}.safetensors"
        reports.append(mixed_surrogate_attack(digits_model, *digits, THREAT, batch_size=12, budgets=SMALL, seed=seed,
                                              surrogates_at_once=5, save_adversarial=path))
        candidates.append(load_file(path))
    assert reports[0].same_results(reports[1])
    assert all(torch.equal(candidates[0][name], candidates[1][name]) for name in candidates[0])
    assert not torch.equal(candidates[0]["fc/apgd-ce"], candidates[2]["fc/apgd-ce"])


def test_the_model_the_random_state_and_the_gradients_are_left_alone(digits_model, digits):
    model = copy.deepcopy(digits_model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    mixed_surrogate_attack(model, *digits, THREAT, budgets=SMALL, surrogates_at_once=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_worst_case_is_at_most_every_row(digits_model, digits):
    report = mixed_surrogate_attack(digits_model, *digits, THREAT, batch_size=12, budgets=SMALL, surrogates_at_once=2)
    table = report.by_surrogate
    assert list(table) == [*SURROGATES, "true"]
    assert report.robust_accuracy <= min(row["worst"] for row in table.values())
    assert all(row["worst"] <= min(row.values()) for row in table.values())
    assert table["true"]["square"] == table["ste"]["square"]
    assert report.robust_accuracy <= report.clean_accuracy == sum(map(int, report.correct["clean"])) / 24
    assert set(report.baseline) == {"clean", *COMPONENTS, "worst"}


def test_true_model_is_searched_even_where_its_twin_is_not_a_surrogate(digits_model, digits):
    report = mixed_surrogate_attack(digits_model, *digits, THREAT, budgets=SMALL, surrogates=["fc"])
    assert list(report.by_surrogate) == ["fc", "true"]
    assert set(report.by_surrogate["true"]) == {"square", "worst"}


@pytest.mark.parametrize(("mode", "expected"), [
    ("batch", ["fc", "dataset", "soft", "ste", "mixed", "true"]),
    ("sample", ["fc", "dataset", "soft", "ste", "mixed", "true"]),
    ("dataset", ["fc", "dataset", "mixed", "true"]),
    ("fc", ["fc", "true"]),
])
def test_every_mode_attacks_the_surrogates_that_differ_in_it(digits_model, digits, mode, expected):
    with timm_hpm.inference_mode(digits_model, mode):
        report = mixed_surrogate_attack(digits_model, *digits, THREAT, budgets=SMALL, surrogates_at_once=5)
    assert list(report.by_surrogate) == expected
    assert report.protocol["inference"] == mode


def test_a_head_without_prototypes_is_attacked_as_its_fc_classifier(digits):
    torch.manual_seed(0)
    model = timm.create_model("hpm_wrn10_2.digits_linf", pretrained=False).eval()
    report = mixed_surrogate_attack(model, *digits, THREAT, budgets=SMALL)
    assert report.protocol["surrogates"] == ["fc"] and report.protocol["prototypes_fitted"] is False
    assert report.correct["fc/square"] == report.baseline_correct["fc/square"]


@pytest.mark.parametrize("surrogate", list(SURROGATES))
def test_queried_rows_answer_as_in_their_whole_batch(digits_model, digits, surrogate):
    pixel_model = timm_hpm.PixelModel(digits_model)
    split = SplitModel(pixel_model, digits[0])
    batch = AttackBatch(split, ["fc", surrogate], *digits)
    moved = (digits[0] + 0.2 * torch.rand_like(digits[0])).clamp(0, 1)
    # Rows 24 and up belong to the second surrogate; row 3 stands at its new point when the others are asked.
    batch.place(torch.tensor([24 + 3]), moved[3:4])
    rows = torch.tensor([1, 24 + 0, 24 + 5, 24 + 23])
    logits = batch.query(rows, moved[rows % 24])
    whole = digits[0].clone()
    whole[[0, 3, 5, 23]] = moved[[0, 3, 5, 23]]
    with torch.no_grad():
        expected = SURROGATES[surrogate].logits(split.head, split.features(whole))[[0, 5, 23]]
        expected_fc = digits_model.fc.fc_logits(split.features(moved[1:2]))
    torch.testing.assert_close(logits[1:], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits[:1], expected_fc, rtol=1e-4, atol=1e-4)
    if surrogate == "ste":
        torch.testing.assert_close(logits[1:], pixel_model(whole)[[0, 5, 23]], rtol=1e-4, atol=1e-4)


def test_passes_of_an_unbreakable_point_are_what_the_components_cost():
    model, images, labels = linear_problem(5, num_images=4)
    labels = model(images).argmax(dim=1)
    split = SplitModel(model, images)
    costs = {}
    for name, component in COMPONENTS.items():
        before = split.forward_passes, split.backward_passes
        batch = AttackBatch(split, ["model"], images, labels)
        component(batch, ThreatModel("Linf", 1e-5), Budget(50, targets=2), Notes())
        costs[name] = ((split.forward_passes - before[0]) / 4, (split.backward_passes - before[1]) / 4)
    assert costs["apgd-ce"] == (1 + 51, 51)
    # A target's best point is placed where its loss is the largest so far.
    assert costs["apgd-t"][1] == 2 * 51
    assert 1 + 2 * 51 + 1 <= costs["apgd-t"][0] <= 1 + 2 * 51 + 2
    assert costs["square"] == (1 + 51, 0)
    assert costs["fab-t"][1] == 1 + 2 * 50
    assert costs["fab-t"][0] <= 1 + 2 + 2 * (2 * 50 + 4)


def test_plain_classifier_is_broken_at_least_as_often_as_by_autoattack(digits_model):
    from pyautoattack import AutoAttack

    images, labels = timm_hpm.load_split("digits", "val").tensors
    images, labels = images[:24], labels[:24]
    plain = timm_hpm.PixelModel(copy.deepcopy(digits_model))
    plain.model.fc.inference = "fc"
    plain.eval()
    attacks = ["apgd-t"]
    state = torch.get_rng_state()
    x_adv, _ = AutoAttack(plain, eps=0.15, version="custom", attacks=attacks, seed=0).run_standard_evaluation(
        images, labels)
    torch.set_rng_state(state)
    theirs = timm_hpm.judge(plain, x_adv, labels, 24)
    report = mixed_surrogate_attack(plain, images, labels, ThreatModel("Linf", 0.15), attacks=attacks)
    assert 0 < report.robust_accuracy < report.clean_accuracy
    # Other random starts: one image may fall either way.
    assert report.robust_accuracy <= theirs.float().mean().item() + 1 / 24 + 1e-6


class Poisoned(nn.Module):
    """Answers NaN for images whose first pixel is above a threshold."""

    def __init__(self, threshold: float):
        super().__init__()
        self.fc = nn.Linear(64, 10)
        self.threshold = threshold

    def forward(self, x):
        return self.fc(x.flatten(1)) + torch.where(x[:, 0, 0, :1] > self.threshold, math.nan, 0.0)


def test_nan_logits_are_an_error_that_names_the_first_bad_image(digits):
    images = digits[0] * 0.5
    images[[5, 9], 0, 0, 0] = 0.9
    with pytest.raises(NonFiniteLogitsError, match=r"image 5 .*not finite"):
        mixed_surrogate_attack(Poisoned(0.8).eval(), images, digits[1], THREAT, batch_size=4)


def test_nan_logits_under_attack_are_an_error_too(digits):
    images = digits[0] * 0
    with pytest.raises(NonFiniteLogitsError, match=r"image \d+ \(surrogate model\).*not finite"):
        mixed_surrogate_attack(Poisoned(0.05).eval(), images, digits[1], THREAT, batch_size=4)


class Infinite(nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, :10] / x[:, 0, 0, 0].unsqueeze(1)


def test_infinite_logits_are_an_error(digits):
    images = digits[0] * 0.5 + 0.25
    images[7, 0, 0, 0] = 0
    with pytest.raises(NonFiniteLogitsError, match="image 7 "):
        mixed_surrogate_attack(Infinite().eval(), images, digits[1], THREAT)


@pytest.mark.parametrize(("change", "message"), [
    ({"images": "bright"}, r"image 2 has values .*expected pixels in \[0, 1\]"),
    ({"images": "nan"}, r"image 2 has values .*expected pixels in \[0, 1\]"),
    ({"images": "flat"}, r"expected \(N, channels, height, width\)"),
    ({"labels": "short"}, r"labels have the shape \(23,\).*expected \(24,\)"),
    ({"labels": "large"}, r"label 10 of image 4 is out of range; the model has the classes 0 to 9"),
    ({"labels": "negative"}, r"label -1 of image 4 is out of range"),
    ({"labels": "float"}, r"class indices"),
    ({"batch_size": 0}, r"batch_size is 0; expected at least 1"),
    ({"surrogates": ["fc", "hard"]}, r"unknown surrogate 'hard'; this model has fc, dataset, soft, ste, mixed"),
    ({"attacks": ["pgd"]}, r"unknown attack 'pgd'; expected some of apgd-ce, apgd-t, fab-t, square"),
    ({"surrogates_at_once": 0}, r"surrogates_at_once is 0"),
])
def test_bad_input_is_refused_before_any_attack(digits_model, digits, change, message):
    images, labels = digits[0].clone(), digits[1].clone()
    wrong = {"bright": lambda: images.index_fill(0, torch.tensor(2), 1.5),
             "nan": lambda: images.index_fill(0, torch.tensor(2), math.nan),
             "flat": lambda: images.flatten(1), "short": lambda: labels[:23],
             "large": lambda: labels.index_fill(0, torch.tensor(4), 10),
             "negative": lambda: labels.index_fill(0, torch.tensor(4), -1), "float": lambda: labels.float()}
    arguments = {"images": images, "labels": labels}
    arguments |= {name: wrong[value]() if isinstance(value, str) else value for name, value in change.items()}
    with pytest.raises(ValueError, match=message):
        mixed_surrogate_attack(digits_model, threat=THREAT, **arguments)


def test_a_model_in_train_mode_is_refused(digits_model, digits):
    with pytest.raises(ValueError, match=r"train mode.*call model.eval\(\)"):
        mixed_surrogate_attack(copy.deepcopy(digits_model).train(), *digits, THREAT)


def test_a_head_that_is_not_last_is_refused(digits):
    torch.manual_seed(0)
    head = HPMHead(64, 10)
    head.set_prototypes(torch.rand(10, 64))
    model = nn.Sequential(nn.Flatten(), head, nn.Linear(10, 10)).eval()
    with pytest.raises(ValueError, match="something follows the head"):
        mixed_surrogate_attack(model, *digits, THREAT)


def test_rejudge_refuses_another_file(digits_model, tmp_path):
    from safetensors.torch import save_file

    save_file({"clean": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="holds no adversarial images"):
        timm_hpm.rejudge(digits_model, tmp_path / "x.safetensors")


def test_the_report_names_its_whole_protocol(digits_model, digits, tmp_path):
    report = mixed_surrogate_attack(digits_model, *digits, THREAT, batch_size=7, budgets=SMALL, seed=5,
                                    attacks=["apgd-t"], about={"dataset": "digits"})
    report.save(tmp_path / "report.json")
    protocol = json.loads((tmp_path / "report.json").read_text())["protocol"]
    assert protocol["dataset"] == "digits" and protocol["architecture"] == "hpm_wrn10_2"
    assert protocol["threat"] == "Linf:0.1" and protocol["seed"] == 5 and protocol["batch_size"] == 7
    assert protocol["num_images"] == 24 and protocol["num_classes"] == 10 and protocol["inference"] == "batch"
    assert protocol["attacks"] == {"apgd-t": {"iterations": 10, "targets": 2}}
    assert {"torch", "timm", "timm-hpm", "pyautoattack", "python"} == set(protocol["versions"])
    assert AttackReport.load(tmp_path / "report.json").same_results(report)
    assert report.cost["all"]["forward_passes"] > report.cost["apgd-t"]["forward_passes"] > 0
