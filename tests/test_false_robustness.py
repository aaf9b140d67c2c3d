"""A zoo of defences that are known to fail: the attack breaks them, or says by name that its number is not reliable."""

import copy
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from nets import Wrapped
from protocols import SMALL, run_attack, unfinished
from safetensors import safe_open
from torch import nn

import timm_hpm
from timm_hpm import AttackReport, HPMHead, NonFiniteLogitsError, ThreatModel, pgd, report_markdown, report_page
from timm_hpm.evaluation import ATTACKS, PROTOCOLS, Budget
from timm_hpm.evaluation.attacked import AttackedModel
from timm_hpm.evaluation.batch import AttackBatch
from timm_hpm.evaluation.checks import batch_flag, check_model, gradient_flag, random_flag, rough_flag, verdict_flag
from timm_hpm.evaluation.judge import predictions
from timm_hpm.report import FLAGS

NUM_DIGITS, SPLIT = 100, "test"

EPS = {"Linf": 0.1, "L2": 0.5}
THREAT = ThreatModel("Linf", EPS["Linf"])
BUDGETS = {"apgd-ce": Budget(20), "apgd-t": Budget(20, targets=3), "fab-t": Budget(10, targets=3),
           "square": Budget(400), "apgd-chain": Budget(5), "joint": Budget(5), "joint-subset": Budget(5, restarts=2)}


@pytest.fixture(scope="module")
def net() -> nn.Module:
    """A small classifier of pixels, trained for a second or two against one step of PGD."""
    torch.manual_seed(0)
    images, labels = timm_hpm.load_split("digits", "train").tensors
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(),
                          nn.Linear(128, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(40):
        for rows in torch.randperm(len(images)).split(128):
            x = pgd(model, images[rows], labels[rows], THREAT, steps=1)
            optimizer.zero_grad()
            F.cross_entropy(model(x), labels[rows]).backward()
            optimizer.step()
    return model.eval()


def attack(model: nn.Module, digits: tuple[torch.Tensor, torch.Tensor], batch_size: int = 100) -> AttackReport:
    return run_attack(model.eval(), *digits, THREAT, batch_size=batch_size, budgets=BUDGETS)


@pytest.fixture(scope="module")
def undefended(net, digits) -> AttackReport:
    report = attack(net, digits)
    # There is something to lose, and something to claim.
    assert report.clean_accuracy > 0.9 and 0.3 < report.robust_accuracy < 0.85
    assert report.flags == []
    return report


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Eight grey levels in a smooth form: there is a gradient, and it leads astray."""
    return ((8 * x).floor() + torch.sigmoid(60 * (8 * x - (8 * x).floor() - 0.5))) / 8


def batch_mean(net: nn.Module, mean: torch.Tensor) -> nn.Module:
    """Subtracts the batch's mean image, and adds the one that the net was trained with."""
    return Wrapped(net, lambda net, x: net(x - x.mean(dim=0, keepdim=True) + mean))


class HiddenTraining(nn.Module):
    """A batch normalisation that goes on with its running statistics in eval mode."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net
        self.register_buffer("running_mean", torch.zeros(1))
        self.register_buffer("running_var", torch.ones(1))

    def forward(self, x):
        return self.net(0.3 + 0.37 * F.batch_norm(x, self.running_mean, self.running_var, training=True))


def on_grid(x: torch.Tensor) -> torch.Tensor:
    return ((16 * x).round() == 16 * x).flatten(1)


class Tired(nn.Module):
    """Gives up after 80 calls, which only its attacked copy gets; its counter is in no state dict."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net, self.calls = net, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.net(x if self.calls <= 80 else 0.3 + 0 * x)


DEFENCES = {
    "saturated": partial(Wrapped, answer=lambda net, x: 1e4 * net(x)),
    # Eight grey levels: the step has no gradient.
    "rounding": partial(Wrapped, answer=lambda net, x: net((8 * x).round() / 8)),
    "steep rounding": partial(Wrapped, answer=lambda net, x: net(rounded(x))),
    # A ripple too small to matter, with a gradient far larger than the net's.
    "shattered": partial(Wrapped, answer=lambda net, x: net(x + 0.02 * torch.sin(2_000 * x))),
    # Right answers, but the root of zero has no finite derivative.
    "nan gradient": partial(Wrapped, answer=lambda net, x: net(x) + 0 * (x - x).abs().sqrt().flatten(1)[:, :1]),
    "detached": partial(Wrapped, answer=torch.no_grad()(lambda net, x: net(x))),
    # Through NumPy, where PyTorch's graph ends.
    "through NumPy": partial(Wrapped, answer=lambda net, x: net(torch.from_numpy(x.detach().numpy().copy()))),
    "noise": partial(Wrapped, answer=lambda net, x: net(x + 0.1 * torch.randn_like(x))),
    "hidden training": HiddenTraining, "tired": Tired,
    # A batch normalisation without running statistics, so that `eval()` changes nothing.
    "batch statistics": partial(Wrapped, answer=lambda net, x: net(0.3 + 0.37 * F.batch_norm(x, None, None,
                                                                                           training=True))),
    # For images off the grid of grey levels that clean ones lie on; or for the whole batch of one, and no graph.
    "nan under attack": partial(Wrapped, answer=lambda net, x: torch.where(
        on_grid(x).all(dim=1, keepdim=True), net(x), torch.nan)),
    "nan without a graph": partial(Wrapped, answer=lambda net, x: net(x) if on_grid(x).all() else torch.full(
        (len(x), 10), torch.nan)),
    "batch mean": lambda net: batch_mean(net, timm_hpm.load_split("digits", "train").tensors[0].mean(dim=0)),
}


@pytest.mark.parametrize(("name", "flags"), [
    ("saturated", []),
    ("rounding", ["zero-gradient"]),
    ("steep rounding", ["rough-gradient"]),
    ("shattered", ["black-box-stronger", "rough-gradient"]),
    ("noise", ["random-forward"]),
    ("batch mean", ["batch-dependent"]),
    ("batch statistics", ["batch-dependent"]),
    ("hidden training", ["changes-state"]),
    ("tired", ["changes-state"]),
    ("nan gradient", ["zero-gradient"]),
    ("nan under attack", ["non-finite-logits"]),
    ("nan without a graph", ["non-finite-logits"]),
    ("detached", ["no-gradient"]),
    ("through NumPy", ["no-gradient"]),
])
def test_a_defence_that_fails_is_broken_or_called_unreliable(name, flags, net, digits, undefended):
    report = attack(DEFENCES[name](net), digits)
    assert report.unreliable or report.robust_accuracy <= undefended.robust_accuracy + 0.02
    for flag in flags:
        assert flag in [found.name for found in report.flags] and report.unreliable and FLAGS[flag]
        assert f"\n### {flag}\n" in report_markdown(report)
    if name == "detached":
        assert list(report.protocol["attacks"]) == ["square"] and list(report.correct) == ["clean", "model/square"]
        with pytest.raises(ValueError, match=r"have no gradient .* which apgd-ce, fab-t need; look for a detach\(\)"):
            run_attack(DEFENCES[name](net).eval(), *digits, THREAT, attacks=["apgd-ce", "fab-t"])


def nan_of_some(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """NaN where the first column of a marked image is not black."""
    lost = (x[:, 0, 7, 7] > 0.3) & (x[:, 0, :, 0].sum(dim=1) > 0.1)
    return torch.where(lost.unsqueeze(1), torch.nan, net(x))


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("name", PROTOCOLS["autoattack"].attacks)
def test_nan_answers_of_some_images_do_not_stop_the_attack_on_the_others(name, norm, net, digits):
    images, labels = digits[0][:40].clone(), digits[1][:40]
    images[:, 0, :, 0] = 0
    images[::2, 0, 7, 7] = 1
    threat = ThreatModel(norm, EPS[norm])

    def found_on(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        batch = AttackBatch(AttackedModel(model.eval(), images), ["model"], images, labels)
        torch.manual_seed(0)
        points = ATTACKS[name].run(batch, threat, BUDGETS[name])
        return points, sorted(batch.not_finite)

    found, lost = found_on(Wrapped(net, nan_of_some))
    # FAB looks beyond the ball, too.
    assert len(lost) >= 5 and (name == "fab-t" or not any(row % 2 for row in lost))
    assert found.isfinite().all() and (threat.distance(found, images) <= threat.eps + 1e-5).all()
    answers, _ = predictions(Wrapped(net, nan_of_some).eval(), found, 40, allow_non_finite=True)
    assert name == "fab-t" or ((answers[lost] < 0).all() and (answers < 0).sum() == len(lost))
    if name == "apgd-ce":
        undisturbed, none = found_on(net)
        others = [row for row in range(40) if row not in lost]
        assert not none and torch.equal(found[others], undisturbed[others])


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_a_gradient_of_nan_makes_no_pixels_of_nan(norm, net, digits, tmp_path):
    few = tuple(part[:20] for part in digits)
    threat = ThreatModel(norm, 0.3)
    report = run_attack(DEFENCES["nan gradient"](net).eval(), *few, threat, budgets=BUDGETS,
                        attacks=["apgd-ce", "apgd-t", "fab-t"], folder=tmp_path, save_adversarial=True)
    assert {flag.name for flag in report.flags} == {"zero-gradient"}
    with safe_open(tmp_path / "adversarial.safetensors", "pt") as file:
        assert all(file.get_tensor(name).isfinite().all() for name in file.keys())  # noqa: SIM118  (it is no dict)


class GuardedHead(HPMHead):
    """Knows the features of clean images, and answers others with NaN."""

    lost = "answers"

    def others(self, features: torch.Tensor) -> torch.Tensor:
        distance = torch.cdist(features.float(), self.known).amin(dim=1, keepdim=True)
        return distance > 0.02 * self.known.norm(dim=1).mean()

    def forward(self, features):
        others = self.others(features)
        if self.lost == "features":  # those of a batch share their means, so that its answers are lost together
            features = features.masked_fill(others, torch.nan)
        logits = super().forward(features)
        return logits.masked_fill(others, torch.nan) if self.lost == "answers" else logits

    def fc_logits(self, features):
        logits = super().fc_logits(features)
        return logits.masked_fill(self.others(features), torch.inf) if self.lost == "fc" else logits


def guarded(lost: str, mode: str, images: torch.Tensor) -> nn.Module:
    model = timm.create_model("hpm_wrn10_2", pretrained=True).eval()
    head = timm_hpm.find_head(model)
    features = []
    with head.register_forward_pre_hook(lambda module, inputs: features.append(inputs[0])), torch.no_grad():
        timm_hpm.PixelModel(model)(images)
    head.__class__, head.lost, head.inference = GuardedHead, lost, mode
    head.register_buffer("known", features[0].clone())
    return model


@pytest.mark.parametrize("lost", ["answers", "features"])
def test_a_head_that_answers_nan_under_attack_is_no_defence(lost, digits, tmp_path):
    few = tuple(part[:7] for part in digits)
    model = guarded(lost, "batch", few[0])
    arguments = {"batch_size": 4, "budgets": SMALL,
                 "attacks": ["apgd-ce", "square", "apgd-chain", "joint", "joint-subset"],
                 "neighbours": [4], "save_adversarial": True, "folder": tmp_path}
    report = (unfinished if lost == "features" else run_attack)(model, *few, THREAT, **arguments)
    assert report.clean_accuracy > 0.7 and report.robust_accuracy == 0 == report.assembled_robust_accuracy
    assert {flag.name for flag in report.flags} - {"zero-loss-gradient"} == {"non-finite-logits"} and report.unreliable
    texts = " ".join(flag.text for flag in report.flags)
    assert "fc/apgd-ce: on the candidates, the true model's logits are not finite for 7 images" in texts
    assert "ste/apgd-ce: in the search, the surrogate's logits are not finite for 7 " in texts
    assert timm_hpm.rejudge(model, tmp_path / "adversarial.safetensors").items() <= report.verdicts.items()
    # What adversarial neighbours do to an image that is not touched.
    flipped = {row["kind"]: (row["flipped"], row["targets"]) for row in report.neighbours}["adversarial"]
    assert lost == "answers" or flipped[0] == flipped[1] > 0
    assert {example.predicted for example in report.examples} == {-1}
    assert "predicted not finite; found by" in report_page(report)
    if lost == "answers":
        return
    # Resumed it is the same, from the steps on disk.
    for path in sorted((tmp_path / "progress").glob("batch*"))[::2]:
        path.unlink()
    again = run_attack(model, *few, THREAT, **arguments)
    assert again.same_results(report) and again.flags == report.flags and again.examples == report.examples


class Fragile(nn.Module):
    """An HPM model of pixels in batch mode, whose features are not finite if the first pixel is bright."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor):
        super().__init__()
        self.fc = HPMHead(64, 10, inference="batch")
        self.fc.set_prototypes(torch.stack([images[labels == c].flatten(1).mean(dim=0) for c in range(10)]))

    def forward(self, x):
        x = x.flatten(1)
        return self.fc(torch.where(x[:, :1] > 0.9, x / 0, x))


def test_one_image_that_spoils_its_batch_is_named_and_flagged(digits, tmp_path):
    """If it does so clean, in whatever batch, nothing is attacked."""
    images, labels = digits[0][:12].clone(), digits[1][:12]
    model = Fragile(*digits).eval()
    images[5, 0, 0, 0] = 0.85
    options = {"attacks": ["apgd-ce", "square"], "budgets": SMALL, "batch_size": 6, "surrogates": ["fc", "ste"]}
    report = run_attack(model, images, labels, THREAT, **options)
    texts = [flag.text for flag in report.flags if flag.name == "batch-not-finite"]
    assert texts and all("of 6 candidates with logits that are not finite, 5 have them only because of" in text
                         for text in texts) and report.unreliable
    for mode in ("sample", "dataset"):
        with timm_hpm.head_mode(model, mode):
            flags = run_attack(model, images, labels, THREAT, **options | {"surrogates": None}).flags
        assert "batch-not-finite" not in [flag.name for flag in flags]
    images[5, 0, 0, 0] = 0.95
    for call in (lambda: run_attack(model, images, labels, THREAT, **options),
                 lambda: run_attack(model, images, labels, THREAT, **options | {"batch_size": 2}, folder=tmp_path),
                 lambda: timm_hpm.judge(model, images, labels, 12)):
        with pytest.raises(NonFiniteLogitsError, match="the logits of image 5 are not finite"):
            call()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("last", "flagged"), [(nn.Softmax(dim=1), True), (nn.LogSoftmax(dim=1), False)])
def test_a_network_that_ends_in_a_softmax_is_flagged(last, flagged, net, digits):
    few = tuple(part[:8] for part in digits)
    for dtype in (torch.float32, torch.bfloat16):
        model = nn.Sequential(copy.deepcopy(net), last).eval().to(dtype)
        flags = run_attack(model, *few, THREAT, attacks=["apgd-ce"], budgets=SMALL).flags
        assert ("probabilities" in [flag.name for flag in flags]) == flagged


def test_a_model_that_has_lost_its_hpm_head_is_flagged():
    images, labels = torch.rand(4, 3, 64, 64), torch.arange(4)
    model = timm.create_model(timm_hpm.register_hpm("test_resnet"), num_classes=10).eval()
    pooled = timm.layers.TestTimePoolHead(copy.deepcopy(model), original_pool=2).eval()
    headless = copy.deepcopy(model)
    headless.reset_classifier(0)
    plain = timm_hpm.remove_hpm_head(copy.deepcopy(model))
    for some, flagged in ((model, False), (plain, False), (pooled, True),
                          (nn.Sequential(headless, nn.Linear(model.num_features, 10)), True),
                          (timm_hpm.PixelModel(pooled, [0.5] * 3, [0.5] * 3), True)):
        flags = run_attack(some.eval(), images, labels, THREAT, attacks=["square"], budgets=SMALL).flags
        assert [flag.text for flag in flags if flag.name == "lost-head"] == flagged * [
            f"{type(some).__name__} holds HPMResNet without the HPM head, and predicts by another layer"]


def test_a_surrogate_that_overflows_ends_no_evaluation(digits):
    few = tuple(part[:8] for part in digits)
    model = guarded("fc", "dataset", few[0])
    report = run_attack(model, *few, THREAT, budgets=SMALL)
    assert report.unreliable and report.clean_accuracy > 0.7
    texts = [flag.text for flag in report.flags if flag.name == "non-finite-logits"]
    assert texts.pop().startswith("at random points of the ball around 8 images that no attack broke, the logits of 8 ")
    assert all("in the search, the surrogate's" in text for text in texts)
    assert {text.partition("/")[0] for text in texts} == {"fc", "mixed"}
    # What was found through the other surrogate is what it is without this one.
    alone = run_attack(model, *few, THREAT, budgets=SMALL, surrogates=["dataset"])
    assert [flag.text for flag in alone.flags] == [report.flags[-1].text]
    assert alone.robust_accuracy == report.by_surrogate["dataset"]["worst"]
    assert report.baseline["clean"] > 0.7 and report.baseline["worst"] == 0


@pytest.mark.parametrize("mode", timm_hpm.INFERENCE_MODES)
def test_an_honest_model_raises_no_flag(mode, digits):
    model = timm.create_model("hpm_wrn10_2", pretrained=True).eval()
    with timm_hpm.head_mode(model, mode):
        assert check_model(timm_hpm.PixelModel(model), *digits, 100) == []
        half = timm_hpm.PixelModel(model.bfloat16())
        assert check_model(half, *digits, 100) == []


def test_of_a_batch_mode_head_the_network_below_is_checked(digits):
    model = timm.create_model("hpm_wrn10_2", pretrained=True, inference="batch").eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = module.running_var = None
    pixel_model = timm_hpm.PixelModel(model)
    assert timm_hpm.find_head(model).inference == "batch"
    assert [flag.name for flag in check_model(pixel_model, *digits, 100)] == ["batch-dependent"]
    assert timm_hpm.find_head(model).inference == "batch"


def test_a_check_leaves_the_model_as_it_was(net, digits):
    model = HiddenTraining(net).eval()
    flags = check_model(model, *digits, 100)
    assert [flag.name for flag in flags] == ["batch-dependent", "changes-state"]
    assert "running_mean, running_var" in flags[1].text
    assert model.running_mean.item() == 0 and model.running_var.item() == 1


def test_a_model_that_changes_later_is_seen_at_the_end(net, digits):
    calls = iter(range(10))
    # By a number that is in no state dict.
    turning = Wrapped(net, lambda net, x: net(x) if next(calls, None) is not None else -net(x))
    flags = attack(turning, tuple(part[:10] for part in digits)).flags
    assert "changes-state" in [flag.name for flag in flags]
    assert "after the evaluation the logits of 10 images are others than before it: logits differ" in flags[-1].text


def test_a_few_dead_images_are_no_flag_and_many_are(net, digits):
    def partly_dead(number: int) -> nn.Module:
        return Wrapped(net, lambda net, x: net(torch.cat([x[:number].detach(), x[number:]])))

    assert gradient_flag(partly_dead(5), *digits, 100) is None
    assert "zero or not finite at 6 of 100" in gradient_flag(partly_dead(6), *digits, 100).text


def test_noise_below_rounding_is_no_flag_and_above_it_is(net, digits):
    for size, name in ((1e-5, None), (1e-2, "random-forward")):
        model = Wrapped(net, lambda net, x, size=size: net(x) + size * net(x).abs().max() * torch.randn(len(x), 10))
        assert getattr(random_flag(model, digits[0]), "name", None) == name
        # What differs by itself says nothing of the batch.
        assert batch_flag(model, digits[0]) is None


@pytest.mark.parametrize("number", [1, 90])
@pytest.mark.parametrize(("defence", "flag"), [("noise", "random-forward"), ("batch mean", "batch-dependent")])
def test_classes_that_are_never_predicted_hide_no_flag(defence, flag, number, net, digits):
    """As of a head that is larger than the data set: whatever the largest logit, its rounding is not theirs."""
    def masked(model: nn.Module) -> nn.Module:
        return Wrapped(model, lambda model, x: F.pad(model(x), [0, number], value=-1e4)).eval()

    model, some = masked(DEFENCES[defence](net)), digits[0][:50]
    assert [found.name for found in (random_flag(model, some), batch_flag(model, some)) if found] == [flag]
    assert check_model(masked(net), *digits, 100) == []


def test_images_that_only_square_broke_are_counted():
    rows = {"clean": "1" * 96 + "0" * 4, "fc/apgd-ce": "0" * 10 + "1" * 90, "fc/square": "1" * 9 + "0" * 4 + "1" * 87}
    # Images 10 to 12 fell to Square only.
    flag = verdict_flag(rows)
    assert flag.name == "black-box-stronger"
    assert "(on fc) broke 3 of the 86 images that the attacks with gradients left" in flag.text
    assert verdict_flag(rows | {"fc/square-on": rows["fc/square"]}) == flag
    assert verdict_flag(rows | {"ste/apgd-t": "1" * 12 + "0" + "1" * 87}) is None
    # In these rows an image may stand where Square has brought it.
    for ours in ("ste/joint", "ste/joint-subset#2"):
        assert verdict_flag(rows | {ours: "0" * 100}) == flag
    assert verdict_flag(rows | {"ste/apgd-chain": "0" * 100}) is None
    assert verdict_flag({name: row for name, row in rows.items() if "apgd" not in name}) is None
    assert verdict_flag({name: row for name, row in rows.items() if "square" not in name}) is None


def test_a_smooth_loss_is_not_flagged_as_rough(digits):
    images, labels = digits

    def linear(x):
        return x.flatten(1) @ torch.linspace(-1, 1, 64 * 10).view(64, 10)

    def ripples(x):
        return torch.sin(3_000 * x).flatten(1)[:, :10]

    assert rough_flag(linear, images, labels, THREAT, 30) is None
    flag = rough_flag(lambda x: linear(x) + ripples(x), images, labels, THREAT, 30)
    assert flag.name == "rough-gradient" and "of 100 images" in flag.text
    assert rough_flag(ripples, images[:7], labels[:7], THREAT, 30) is None
    flag = rough_flag(lambda x: linear(x) + torch.where(x[:, 0, 0, :1] > 0.05, torch.nan, 0.0), images, labels, THREAT,
                      30)
    assert flag.name == "non-finite-logits" and "around 100 images" in flag.text
