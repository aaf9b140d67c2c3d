"""Attacks by their name, the margin search, `evaluate`, the images of a report, and models that draw random numbers."""

import math
from dataclasses import replace

import pytest
import torch
from nets import Wrapped
from protocols import run_attack
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import TensorDataset

import timm_hpm
from timm_hpm import PixelModel, ThreatModel, find_head
from timm_hpm.attacks import margin_loss, margin_search, probability_margin, repeated_search, target_margin
from timm_hpm.attacks.search import _Search
from timm_hpm.evaluation import ATTACKS
from timm_hpm.evaluation.attacked import AttackedModel

NUM_DIGITS = 12

THREAT = ThreatModel("Linf", 0.15)
TINY = {"apgd-ce": 5, "apgd-pm": 5, "apgd-t": "3x2", "fab-t": "2x2", "square": 20, "apgd-chain": 2, "joint": 3,
        "joint-subset": "3r2", "search": 3, "search-on": 3, "square-on": 20}


@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_gives_images_in_the_ball_by_its_name(model, digits, name):
    find_head(model).inference = "batch"
    images, labels = digits
    found = timm_hpm.attack(model, images, labels, str(THREAT), name, budget=TINY[name], batch_size=8)
    assert THREAT.contains(found, images).all() and not torch.equal(found, images)
    assert torch.equal(found, timm_hpm.attack(model, images, labels, THREAT, name, budget=TINY[name], batch_size=8))


def test_a_single_attack_finds_what_an_evaluation_finds(digits, tmp_path):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    for name in ("apgd-ce", "square"):
        run_attack(model, *digits, THREAT, attacks=[name], budgets={name: 5}, batch_size=5, folder=tmp_path / name,
                   save_adversarial=True, full_grid=True)
        saved = load_file(tmp_path / name / "adversarial.safetensors")[f"model/{name}"]
        assert torch.equal(timm_hpm.attack(model, *digits, THREAT, name, budget=5, batch_size=5), saved)


def test_restarts_of_a_single_attack_keep_the_largest_margin(digits):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Tanh(), nn.Linear(10, 10)).eval()
    labels = model(digits[0]).argmax(dim=1)

    def margins(budget: str) -> torch.Tensor:
        found = timm_hpm.attack(model, digits[0], labels, "Linf:0.001", "square", budget=budget)
        return timm_hpm.attacks.margin_loss(model(found), labels)
    one, four = margins("2"), margins("2r4")
    assert (four >= one).all() and (four > one).any()


def test_square_goes_on_after_a_tie_that_the_label_wins():
    # Logits 0 and round(10·(mean − 0.5)): equal for half of the ball, and class 0 wins.
    def answer(_: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return (torch.tensor([0.0, 10.0]) * (x.flatten(1).mean(dim=1, keepdim=True) - 0.5)).round()
    model, images, labels = Wrapped(nn.Identity(), answer).eval(), torch.full((8, 1, 8, 8), 0.5), torch.zeros(8).long()
    assert (model(images).argmax(dim=1) == 0).all()
    found = timm_hpm.attack(model, images, labels, "Linf:0.1", "square", budget=30)
    assert (model(found).argmax(dim=1) == 1).all()


@pytest.mark.parametrize(("name", "budget", "message"), [
    ("pgd", None, "unknown attack 'pgd'; expected some of apgd-ce"), ("apgd-t", 5, "has no targets"),
    ("joint", None, "needs an HPM head in batch mode"), ("apgd-ce", "5r0", "cannot read the budget '5r0'"),
    ("apgd-ce", None, "have no gradient with respect to the pixels"),
])
def test_a_single_attack_that_cannot_be_run_is_refused(digits, name, budget, message):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    if "gradient" in message:
        model = Wrapped(model, lambda net, x: net(x.detach())).eval()
    with pytest.raises(ValueError, match=message):
        timm_hpm.attack(model, *digits, THREAT, name, budget=budget)


@pytest.mark.parametrize("mode", ["batch", "sample"])
def test_a_report_gives_the_images_that_broke_the_model(model, digits, mode, tmp_path):
    timm_hpm.find_head(model).inference = mode
    report = run_attack(model, *digits, THREAT, attacks=["apgd-ce", "square"], budgets=TINY, batch_size=6,
                        surrogates=["fc", "ste"], folder=tmp_path, save_adversarial=True)
    found = report.adversarial_images(tmp_path)
    assert THREAT.contains(found, digits[0]).all()
    moved = (found != digits[0]).flatten(1).any(dim=1).tolist()
    assert moved == ["/" in name for name in report.fell_to] and 0 < sum(moved) < 12
    assert [name == "" for name in report.fell_to] == report.robust
    if mode == "sample":
        assert timm_hpm.judge(model, found, digits[1], 12).tolist() == report.robust
    with pytest.raises(ValueError, match="expected the folder of its run with save_adversarial"):
        run_attack(model, *digits, THREAT, attacks=["square"], budgets=TINY).adversarial_images(tmp_path)


def test_draws_average_logits_and_gradients_and_the_flag_becomes_a_statement(digits):
    linear = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    noisy = Wrapped(linear, lambda net, x: net(x) + 0.5 * torch.randn(len(x), 10)).eval()
    options = {"attacks": ["apgd-ce", "square"], "budgets": TINY, "batch_size": 6}
    one, many = (run_attack(PixelModel(noisy, [0.0], [1.0], draws), *digits, "Linf:0.02", **options)
                 for draws in (1, 400))
    assert "random-forward" in [flag.name for flag in one.flags] and one.unreliable
    assert [flag.name for flag in many.flags if "draw" in flag.text] == ["averaged-draws"]
    assert "random-forward" not in [flag.name for flag in many.flags] and many.protocol["eot"] == 400
    assert many.cost["square"]["forward_passes"] % 400 == 0
    # The mean of 400 draws is nearly the classifier without noise.
    x = digits[0].clone().requires_grad_()
    mean = PixelModel(noisy, [0.0], [1.0], 400)(x)
    torch.testing.assert_close(mean, linear(x), atol=0.15, rtol=0)
    gradients = [torch.autograd.grad(logits.sum(), x)[0] for logits in (mean, linear(x))]
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


def test_the_cost_counts_every_draw_of_attacks_checks_and_verdicts(digits):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    labels = model(digits[0]).argmax(dim=1)
    one, three = (run_attack(PixelModel(model, [0.0], [1.0], draws), digits[0], labels, "Linf:0.01",
                             attacks=["apgd-ce", "square"], budgets=TINY, batch_size=6).cost for draws in (1, 3))
    for name in ("apgd-ce", "square", "all"):
        for passes in ("forward_passes", "backward_passes"):
            assert three[name][passes] == 3 * one[name][passes], (name, passes)


@pytest.mark.parametrize("mode", ["batch", "sample"])
def test_draws_of_an_hpm_model_average_the_logits_of_each_surrogate(model, digits, tmp_path, mode):
    network = Wrapped(model, lambda net, x: net(x + 0.3 * torch.randn_like(x))).eval()
    find_head(model).inference = mode
    whole = PixelModel(network, model.pretrained_cfg["mean"], model.pretrained_cfg["std"], draws=3)
    one = PixelModel(network, model.pretrained_cfg["mean"], model.pretrained_cfg["std"])
    attacked, single = (AttackedModel(pixel_model, digits[0]) for pixel_model in (whole, one))
    for copy in (attacked, single):  # which moderates the scale
        copy.head.log_scale.data.copy_(find_head(model).log_scale)
    x = digits[0].clone().requires_grad_()
    exact = attacked.exact_surrogate()
    found = []
    for logits in (lambda: whole(x), lambda: attacked.logits(exact, attacked.features(x))):
        torch.manual_seed(7)
        found.append(logits())
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)
    # The gradient is the mean of those of three single draws.
    gradient, = torch.autograd.grad(found[1].sum(), x)
    torch.manual_seed(7)
    alone = [torch.autograd.grad(single.logits(exact, single.features(x)).sum(), x)[0] for _ in range(3)]
    torch.testing.assert_close(gradient, torch.stack(alone).mean(dim=0), atol=1e-4, rtol=1e-4)
    report = run_attack(whole, *digits, THREAT, attacks=["apgd-ce", "square"], budgets=TINY, batch_size=6)
    assert "averaged-draws" in [flag.name for flag in report.flags] and report.protocol["eot"] == 3
    assert report.cost["apgd-ce"]["forward_passes"] % 3 == 0
    if mode == "batch":
        with pytest.raises(ValueError, match="neighbours are chosen by the features of one draw, and the model av"):
            run_attack(whole, *digits, THREAT, attacks=["apgd-ce"], budgets=TINY, batch_size=6, neighbours=(4,),
                       folder=tmp_path)
        assert not any(tmp_path.iterdir()), "before any attack"


SHORT = timm_hpm.Protocol("short", {"apgd-ce": 3})
OPTIONS = {"protocol": SHORT, "batch_size": 5, "inference": "sample"}


@pytest.fixture(scope="module")
def by_name(shared_model) -> timm_hpm.AttackReport:
    return timm_hpm.evaluate(shared_model, "digits", num_images=10, split="val", **OPTIONS)


def test_a_data_set_by_name_is_the_attack_on_its_first_images(model, by_name):
    images, labels = (part[:10] for part in timm_hpm.load_split("digits", "val").tensors)
    with timm_hpm.head_mode(model, "sample"):
        expected = timm_hpm.mixed_surrogate_attack(model, images, labels, "Linf:0.1", protocol=SHORT, batch_size=5)
    assert by_name.correct == expected.correct
    assert by_name.protocol["dataset"] == "digits" and by_name.protocol["inference"] == "sample"
    assert by_name.protocol["threat"] == "Linf:0.1"
    assert model.fc.inference == "dataset"


@pytest.mark.parametrize("wrap", [tuple, list, lambda parts: TensorDataset(*parts)], ids=["tuple", "list", "dataset"])
def test_tensors_and_data_sets_give_the_same(model, by_name, wrap):
    data = wrap(timm_hpm.load_split("digits", "val").tensors)
    report = timm_hpm.evaluate(model, data, "Linf:0.1", num_images=10, **OPTIONS)
    assert report.correct == by_name.correct


def test_a_network_of_ones_own_and_its_normalisation():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    report = timm_hpm.evaluate(net, "digits", num_images=10, mean=[0.3], std=[0.4], protocol=SHORT)
    assert report.protocol["normalisation"]["mean"] == pytest.approx([0.3])
    assert set(report.correct) == {"clean", "model/apgd-ce"}
    assert not report.baseline


@pytest.mark.parametrize(("data", "change", "message"), [
    ("digitz", {}, "digitz"),
    ((torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.long)), {"threat": None}, "threat is None"),
    ([(torch.rand(1, 8, 8), 0), (torch.rand(1, 4, 4), 0)], {}, "one size"),
    ([1, 2, 3], {}, "image, label"), ([(torch.rand(1, 8, 8), 3.7)], {}, "labels as integers"),
    ((torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.long)), {"num_images": 5}, "0 to 4"),
])
def test_malformed_data_are_named(model, data, change, message):
    with pytest.raises(ValueError, match=message):
        timm_hpm.evaluate(model, data, **{"threat": "Linf:0.1", "protocol": SHORT} | change)


def test_the_margin_of_a_target_is_a_difference_and_that_of_the_probabilities_of_two_classes_a_hyperbolic_tangent():
    logits = torch.tensor([[3.0, 1.0, -2.0], [0.5, 0.0, 4.0]])
    loss = target_margin(torch.tensor([0, 2]), torch.tensor([2, 1]))
    assert loss(logits).tolist() == [-5.0, -4.0]
    found = probability_margin(torch.tensor([0, 0]))(torch.tensor([[0.0, 1.5], [2.0, -1.0]]))
    assert found.tolist() == pytest.approx([math.tanh(0.75), math.tanh(-1.5)])


@pytest.fixture
def problem() -> tuple[nn.Module, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A linear model of grey images that no perturbation of size 0.1 takes out of [0, 1], and all wrong classes."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 4)).double()
    images = 0.4 + 0.2 * torch.rand(12, 1, 4, 4, dtype=torch.float64)
    labels = model(images).argmax(dim=1)
    return model, images, labels, torch.stack([(labels + k) % 4 for k in (1, 2, 3)], dim=1)


def largest_margins(model, images, labels, threat) -> torch.Tensor:
    """The largest margins (B,) within the threat model of a linear model: margin + eps · dual norm of the weights."""
    weight = model[1].weight
    differences = weight.unsqueeze(0) - weight[labels].unsqueeze(1)
    logits = model(images)
    margins = logits - logits.gather(1, labels.unsqueeze(1)) + threat.eps * differences.norm(
        p=1 if threat.norm == "Linf" else 2, dim=2)
    return margins.scatter(1, labels.unsqueeze(1), -math.inf).amax(dim=1)


@pytest.mark.parametrize("threat", [ThreatModel("Linf", 0.02), ThreatModel("L2", 0.08)], ids=str)
def test_of_a_linear_model_the_nearest_boundary_is_found(problem, threat):
    model, images, labels, targets = problem
    found = margin_search(lambda rows, pixels: model(pixels), torch.arange(12), images, labels, targets, threat, 200)
    expected = largest_margins(model, images, labels, threat)
    margins = margin_loss(model(found), labels)
    assert threat.contains(found, images).all()
    assert 2 <= (expected > 0).sum() <= 10, "the problem tests nothing"
    assert torch.equal(margins > 0, expected > 0)
    assert margins[expected <= 0].tolist() == pytest.approx(expected[expected <= 0].tolist(), abs=2e-3)


def counted(search, problem, threat, steps):
    model, images, labels, targets = problem
    count = 0

    def logits(rows, pixels):
        nonlocal count
        count += len(rows)
        return model(pixels)

    search(logits, torch.arange(12), images, labels, targets, threat, steps)
    return count / 12


def test_the_steps_are_those_of_the_budget_and_a_repeated_search_without_success_ends_early(problem):
    robust = ThreatModel("Linf", 1e-4)
    # A round serves at least one of the 12 images.
    assert 600 <= counted(margin_search, problem, robust, 600) <= 950
    assert 6 * 400 <= counted(repeated_search, problem, robust, 100_000) <= 6 * 600


def test_a_point_that_only_a_local_search_reaches_is_found():
    """Each pixel has a shallow slope to the wrong side: an ascent from a random point gets one pixel in two right."""
    class Wells(nn.Module):
        def forward(self, pixels):
            delta = 40 * (pixels.flatten(1) - 0.5)
            margin = torch.where(delta > 0, delta, 0.8 * -delta).sum(dim=1) - 0.93 * delta.shape[1]
            return torch.stack([-margin, margin], dim=1)

    images, labels = torch.full((8, 1, 6, 6), 0.5), torch.zeros(8, dtype=torch.long)
    targets, threat = torch.ones(8, 1, dtype=torch.long), ThreatModel("Linf", 1 / 40)
    model = Wells()
    breaks = {steps: (margin_loss(model(margin_search(lambda rows, pixels: model(pixels), torch.arange(8), images,
                                                      labels, targets, threat, steps)), labels) > 0).sum()
              for steps in (10, 400)}
    assert breaks[10] < 4 and breaks[400] == 8


def test_under_l2_the_pixels_drawn_anew_are_two_radii_from_the_clean_image():
    images, labels = torch.zeros(50, 1, 28, 28), torch.zeros(50, dtype=torch.long)
    for eps in (1.0, 2.0):
        search = _Search(lambda rows, pixels: pixels, labels, images, labels, labels.unsqueeze(1),
                         ThreatModel("L2", eps))
        start = search.near_best(torch.arange(50))
        assert search.threat.contains(start, images).all()
        # A pixel uniform in [0, 1] has a mean square of 1/3.
        assert (start > 0).sum().item() / 50 == pytest.approx((2 * eps) ** 2 * 3, rel=0.15)


@pytest.mark.parametrize("name", ["fast", "standard", "thorough"])
def test_a_plain_classifier_is_searched(name):
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 3)).eval()
    images = torch.rand(6, 3, 4, 4)
    labels = model(images).argmax(dim=1)
    # Within so large a ball little is left for the long searches.
    threat = ThreatModel("Linf", 0.01 if name == "fast" else 0.5)
    report = timm_hpm.mixed_surrogate_attack(model, images, labels, threat, protocol=name)
    further = {"fast": set(), "standard": {"apgd-t", "square-on"}, "thorough": {"apgd-t", "square-on", "search-on"}}
    assert report.by_surrogate["model"].keys() == {"apgd-ce", "search", "square", "worst"} | further[name]
    assert report.protocol["protocol"] == name and not report.protocol["full_grid"]
    found = timm_hpm.attack(model, images, labels, "Linf:0.01", "search-on", budget=200)
    assert ThreatModel("Linf", 0.01).contains(found, images).all()


@pytest.mark.parametrize("full_grid", [False, True])
def test_square_goes_on_with_the_images_nearest_to_an_error_only(tmp_path, full_grid):
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 3)).eval()
    images = torch.rand(60, 3, 4, 4)
    labels = model(images).argmax(dim=1)
    before, after = (run_attack(model, images, labels, "Linf:0.02", attacks=["apgd-ce", *more], folder=tmp_path / name,
                                budgets={"apgd-ce": 1, "square-on": 30}, batch_size=60, save_adversarial=True,
                                full_grid=full_grid)
                     for name, more in (("before", []), ("after", ["square-on"])))
    left = [number for number, robust in enumerate(before.robust) if robust]
    nearest = sorted(left, key=before.convergence.margins.__getitem__)[:math.ceil(len(left) / 16)]
    found = load_file(tmp_path / "after" / "adversarial.safetensors")["model/square-on"]
    moved = (found != images).flatten(1).any(dim=1)
    # In a full grid the candidates of other attacks are no part of the set.
    broken = [] if full_grid else sorted({*range(60)} - {*left})
    assert len(left) > 32 and moved.nonzero().squeeze(1).tolist() == sorted(nearest + broken)
    assert after.cost["square-on"]["forward_passes"] <= len(nearest) * 31 + 60 * full_grid
    # The passes count over all images that were left.
    spent = after.convergence.spent - before.convergence.spent
    assert spent == pytest.approx(after.cost["square-on"]["forward_passes"] / (60 if full_grid else len(left)))


def test_attacks_that_are_given_hold_for_every_classifier_and_those_of_plain_ones_for_them_only():
    standard = timm_hpm.PROTOCOLS["standard"]
    assert standard.changed().for_classifier(plain=True).attacks.keys() == {
        "apgd-ce", "search", "apgd-t", "square", "square-on"}
    assert standard.changed(budgets={"apgd-ce": 3}).for_classifier(plain=True).attacks["apgd-ce"].iterations == 3
    assert "fab-t" in standard.changed(budgets={"apgd-ce": 3}).for_classifier(plain=True).attacks
    fast = timm_hpm.PROTOCOLS["fast"]
    digests = [[protocol.for_classifier(plain).digest() for plain in (False, True)]
               for protocol in (fast, replace(fast, plain={"search": 1}))]
    assert digests[0][0] == digests[1][0] and digests[0][1] != digests[1][1]
