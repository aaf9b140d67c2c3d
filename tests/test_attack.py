"""A single attack by its name, the adversarial images of a report, and models that draw random numbers."""

import pytest
import torch
from protocols import run_attack
from safetensors.torch import load_file
from torch import nn

import timm_hpm
from timm_hpm import PixelModel, ThreatModel, find_head
from timm_hpm.evaluation import ATTACKS
from timm_hpm.evaluation.attacked import AttackedModel

NUM_DIGITS = 12

THREAT = ThreatModel("Linf", 0.15)
TINY = {"apgd-ce": 5, "apgd-pm": 5, "apgd-t": "3x2", "fab-t": "2x2", "square": 20, "apgd-chain": 2, "joint": 3,
        "joint-subset": "3r2", "search": 3, "search-on": 3}


@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_gives_images_in_the_ball_by_its_name(model, digits, name):
    find_head(model).inference = "batch"
    images, labels = digits
    found = timm_hpm.attack(model, images, labels, str(THREAT), name, budget=TINY[name], batch_size=8)
    assert found.shape == images.shape and found.min() >= 0 and found.max() <= 1
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


@pytest.mark.parametrize(("name", "budget", "message"), [
    ("pgd", None, "unknown attack 'pgd'; expected some of apgd-ce"), ("apgd-t", 5, "has no targets"),
    ("joint", None, "needs an HPM head in batch mode"), ("apgd-ce", "5r0", "cannot read the budget '5r0'"),
    ("apgd-ce", None, "have no gradient with respect to the pixels"),
])
def test_a_single_attack_that_cannot_be_run_is_refused(digits, name, budget, message):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    if "gradient" in message:
        class Detached(nn.Module):
            def forward(self, x):
                return model(x.detach())
        with pytest.raises(ValueError, match=message):
            timm_hpm.attack(Detached().eval(), *digits, THREAT, name)
    else:
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


class Noisy(nn.Module):
    """A linear classifier of pixels with noise on its logits."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 10)

    def forward(self, x):
        logits = self.fc(x.flatten(1))
        return logits + 0.5 * torch.randn_like(logits)


def test_draws_average_logits_and_gradients_and_the_flag_becomes_a_statement(digits):
    noisy, options = Noisy().eval(), {"attacks": ["apgd-ce", "square"], "budgets": TINY, "batch_size": 6}
    one, many = (run_attack(PixelModel(noisy, [0.0], [1.0], draws), *digits, "Linf:0.02", **options)
                 for draws in (1, 400))
    assert "random-forward" in [flag.name for flag in one.flags] and one.unreliable
    assert [flag.name for flag in many.flags if "draw" in flag.text] == ["averaged-draws"]
    assert "random-forward" not in [flag.name for flag in many.flags] and many.protocol["eot"] == 400
    assert many.cost["square"]["forward_passes"] % 400 == 0
    # The mean of 400 draws is nearly the classifier without noise.
    x = digits[0].clone().requires_grad_()
    mean = PixelModel(noisy, [0.0], [1.0], 400)(x)
    torch.testing.assert_close(mean, noisy.fc(x.flatten(1)), atol=0.15, rtol=0)
    gradients = [torch.autograd.grad(logits.sum(), x)[0] for logits in (mean, noisy.fc(x.flatten(1)))]
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


class NoisyInput(nn.Module):
    def forward(self, x):
        return x + 0.3 * torch.randn_like(x)


@pytest.mark.parametrize("mode", ["batch", "sample"])
def test_draws_of_an_hpm_model_average_the_logits_of_each_surrogate(model, digits, tmp_path, mode):
    network = nn.Sequential(NoisyInput(), model).eval()
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

def test_draws_below_one_are_refused():
    with pytest.raises(ValueError, match="draws is 0; expected at least 1"):
        PixelModel(Noisy(), [0.0], [1.0], draws=0)
