"""What the Mixed Surrogate Attack makes of odd precisions, layouts and models, and what it leaves as it was."""

import copy
import random
import threading
from functools import partial

import numpy as np
import pytest
import timm
import torch
from nets import Wrapped, same_tensors
from protocols import SMALL, run_attack
from safetensors.torch import load_file
from torch import nn

import timm_hpm
from timm_hpm import ThreatModel
from timm_hpm.data import as_pixel_model
from timm_hpm.evaluation import Budget
from timm_hpm.training.trunk import PixelTrunk

NUM_DIGITS, INFERENCE = 16, "batch"  # which has every attack

THREAT = ThreatModel("Linf", 0.2)
TINY = {"apgd-ce": Budget(2), "fab-t": Budget(2, targets=1), "square": Budget(20), "joint": Budget(2)}
FEW = {"attacks": list(TINY), "budgets": TINY}


class Colours(nn.Module):
    """A small network of three channels, in any precision."""

    def __init__(self, num_classes: int = 5):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.fc = nn.Linear(8 * 36, num_classes)

    def forward(self, x):
        return self.fc(self.conv(x).relu().flatten(1))


@pytest.fixture
def colours() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    model = Colours().eval()
    images = torch.rand(12, 3, 8, 8)
    return model, images, model(images).argmax(dim=1)


@pytest.mark.parametrize("casting", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_of_another_precision_is_judged_and_attacked_in_it(model, digits, colours, casting, dtype):
    for inner, images, eps in ((*colours[:2], 0.01), *([(model, digits[0], 0.2)] if casting else [])):
        some = inner.to(dtype)
        if casting:
            some = Wrapped(inner, lambda net, x: net(x.to(dtype)).float()).eval()
        labels = some(images if casting else images.to(dtype)).argmax(dim=1)
        report = run_attack(some, images, labels, ThreatModel("Linf", eps), budgets=SMALL)
        assert report.clean_accuracy == 1 > report.robust_accuracy and not report.unreliable
        assert next(inner.parameters()).dtype == dtype
        if not casting:
            assert report.robust_accuracy > 0 and report.protocol["precision"] == str(dtype).removeprefix("torch.")
    assert not casting or {"soft/joint", "ste/joint-subset#2", "ste/apgd-chain"} <= report.correct.keys()


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning",  # of torch.compile's own
                            "ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("wrap", [
    nn.DataParallel, partial(torch.compile, backend="eager"), torch.jit.script],
    ids=["DataParallel", "compile", "script"])
def test_a_wrapped_model_is_the_model(model, digits, colours, wrap, request):
    torchscript = request.node.callspec.id == "script"
    plain, *data = colours if torchscript else (model, *digits)
    eps = 0.01 if torchscript else 0.2
    own, other = (run_attack(some.eval(), *data, ThreatModel("Linf", eps), batch_size=16, **FEW)
                  for some in (plain, wrap(plain)))
    assert own.clean_accuracy == 1 > own.robust_accuracy, "its normalisation belongs to it"
    assert own.correct == other.correct
    if not torchscript:
        assert own.same_results(other) and timm_hpm.find_head(wrap(model)) is timm_hpm.find_head(model)


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # of torch.compile's own
def test_a_compiled_pixel_model_in_double_precision_is_judged_as_it_is():
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 3)).double()
    model, images = timm_hpm.PixelModel(network, [0.3] * 3, [0.5] * 3).eval(), torch.rand(8, 3, 4, 4)
    labels = model(images).argmax(dim=1)
    assert timm_hpm.judge(torch.compile(model, backend="eager"), images, labels, 8).all()


def through_data(x):
    x.data.mul_(0.5)
    return x


#: What a model does to its input first, and the same in a new tensor.
WRITES = {
    "sub": (lambda x: x.sub_(0.3), lambda x: x - 0.3),
    "clamp": (lambda x: x.clamp_(0.2, 0.7), lambda x: x.clamp(0.2, 0.7)),
    "relu": (lambda x: nn.functional.relu(x.sub_(0.5), inplace=True), lambda x: (x - 0.5).relu()),
    "view": (lambda x: x[:, :, ::2].mul_(0.5) * 0 + x[:, :, ::2], lambda x: x[:, :, ::2] * 0.5),
    "data": (through_data, lambda x: x - 0.5 * x.detach()),
}


def pair_of(write: str, place: str) -> list[nn.Module]:
    """Returns a classifier of pixels that writes into its input, and the one that does the same in a new tensor."""
    pair = []
    for change in WRITES[write]:
        torch.manual_seed(0)
        if place == "module":
            net = nn.Sequential(nn.LazyConv2d(6, 3), nn.Flatten(), nn.LazyLinear(10))
            pair.append(Wrapped(net, lambda net, x, change=change: net(change(x))).eval())
            pair[-1](torch.rand(2, 1, 8, 8))
            continue
        net = timm.create_model("hpm_wrn10_2.digits_linf", pretrained=True, inference="batch").eval()
        inner = {"timm": net, "pixels": timm_hpm.PixelModel(net), "head": timm_hpm.find_head(net)}[place]
        inner.register_forward_pre_hook(lambda module, inputs, change=change: (change(inputs[0]),))
        pair.append(inner if place == "pixels" else net)
    return pair


@pytest.mark.parametrize(("place", "write"), [
    *(("module", write) for write in WRITES), ("timm", "data"), ("pixels", "clamp"), ("head", "clamp")])
def test_a_model_that_writes_into_its_input_is_its_twin_that_does_not(place, write, digits, tmp_path):
    """Nothing of it reaches the caller's tensors, the candidates or a later answer."""
    digits = tuple(part[:8] for part in digits)
    before = digits[0].clone()
    options = {"budgets": SMALL} if place == "module" else {
        "budgets": TINY, "attacks": ["apgd-ce", "fab-t", "joint"], "surrogates": ["soft", "ste"], "neighbours": [4]}
    found = []
    for name, model in zip(("in", "out"), pair_of(write, place), strict=True):
        file = tmp_path / name / "adversarial.safetensors"
        report = run_attack(model, *digits, THREAT, batch_size=4, folder=file.parent, save_adversarial=True,
                                        surrogates_at_once=2, **options)
        assert timm_hpm.rejudge(model, file).items() <= report.verdicts.items()
        judged = [timm_hpm.judge(model, *digits, 8) for _ in range(2)]
        pixel_model = as_pixel_model(model)
        found.append((report, load_file(file), judged, timm_hpm.pgd(pixel_model, *digits, THREAT, random_start=False)))
        assert torch.equal(digits[0], before)
    (report, saved, judged, adversarial), (expected, others, judged_alike, as_adversarial) = found
    assert report.same_results(expected) and report.flags == expected.flags
    assert same_tensors(saved, others)
    assert all(torch.equal(row, judged_alike[0]) for row in [*judged, *judged_alike])
    assert torch.equal(adversarial, as_adversarial) and not torch.equal(adversarial, before)


@pytest.mark.parametrize("place", ["pixels", "head"])
def test_training_and_fitting_do_not_see_that_a_model_writes_into_its_input(place, digits):
    images, labels = timm_hpm.load_split("digits", "val").tensors
    before = images.clone()
    found = []
    for model in pair_of("sub", place):
        torch.manual_seed(0)
        timm_hpm.fit_prototypes(model, [(images, labels)], str(THREAT), attack_steps=2)
        found.append(timm_hpm.find_head(model).prototypes)
        inner = model.model if place == "pixels" else model
        trunk = PixelTrunk(inner)
        features, logits, fc = trunk(images[:8])[0]
        (logits.sum() + fc.square().sum()).backward()
        found[-1] = [found[-1], features, logits, fc, *(parameter.grad for parameter in inner.parameters())]
        assert torch.equal(images, before)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_a_model_that_cannot_be_copied_is_named(colours):
    model, images, labels = colours
    model.lock = threading.Lock()
    with pytest.raises(ValueError, match=r"Colours cannot be copied \(.*lock.*\), and attacks work on a copy"):
        run_attack(model, images, labels, THREAT, budgets=SMALL)


def test_an_hpm_model_in_bf16_or_under_autocast_is_judged_in_it(model, digits, tmp_path):
    whole = run_attack(model, *digits, THREAT, **FEW)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = run_attack(model, *digits, THREAT, neighbours=[4], **FEW)
    model.to(torch.bfloat16)
    half = run_attack(model, *digits, THREAT, **FEW, folder=tmp_path, save_adversarial=True)
    assert [report.protocol["precision"] for report in (whole, autocast, half)] == [
        "float32", "autocast to bfloat16", "bfloat16"]
    for report in (autocast, half):
        assert abs(report.robust_accuracy - whole.robust_accuracy) <= 2 / 16
    assert not autocast.unreliable and autocast.protocol["attacked_scale"] == whole.protocol["attacked_scale"]
    assert timm_hpm.rejudge(model, tmp_path / "adversarial.safetensors") == {
        name: row for name, row in half.verdicts.items() if name != "true/square"}


class Drawing(Colours):
    """Draws from all global random states whenever it is asked."""

    def forward(self, x):
        noise = random.gauss(0, 1) + np.random.randn(*x.shape[-2:]) + torch.randn(x.shape[-2:]).numpy()
        return super().forward(x + 0.05 * torch.from_numpy(noise).float())


class DrawingBackbone(Drawing):
    """The same in front of an HPM head in batch mode."""

    def __init__(self):
        super().__init__()
        self.fc = timm_hpm.HPMHead(8 * 36, 5, inference="batch")
        self.fc.set_prototypes(torch.randn(5, 8 * 36))


@pytest.mark.parametrize("network", [Drawing, DrawingBackbone])
def test_a_model_that_draws_leaves_the_caller_s_random_states_and_repeats_its_report(network):
    torch.manual_seed(0)
    model, images = network().eval(), torch.rand(12, 3, 8, 8)
    labels = model(images).argmax(dim=1)
    reports = []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        before = random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist()
        reports.append(run_attack(model, images, labels, THREAT, attacks=["apgd-ce", "square"],
                                              budgets=SMALL, batch_size=6))
        assert (random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist()) == before
    assert reports[0].same_results(reports[1])
    assert bool(reports[0].assembled) == (network is DrawingBackbone)


@pytest.mark.parametrize("num_classes", [2, 3])
@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_few_classes_have_all_attacks_all_their_targets_and_neighbours(num_classes, norm):
    model, images = Colours(), torch.rand(8, 3, 8, 8)
    model.fc = timm_hpm.HPMHead(8 * 36, num_classes, inference="batch")
    model.fc.set_prototypes(torch.randn(num_classes, 8 * 36))
    labels = model.eval()(images).argmax(dim=1)
    budgets = SMALL | {"apgd-t": Budget(5, 9), "fab-t": Budget(3, 9)}
    report = run_attack(model, images, labels, ThreatModel(norm, 0.2), budgets=budgets, neighbours=[4])
    targets = {name: budget["targets"] for name, budget in report.protocol["attacks"].items() if "targets" in budget}
    assert targets == {"apgd-t": num_classes - 1, "fab-t": num_classes - 1}
    assert report.by_surrogate["ste"].keys() == {*SMALL, "worst"} and report.clean_accuracy == 1
    assert {row["kind"] for row in report.neighbours} == {"reshuffled", "chosen", "adversarial"}


def test_a_caller_in_inference_mode_gets_the_same_report(model, digits):
    images, labels = digits
    options = {"batch_size": 16, "neighbours": (4,), **FEW}
    expected = run_attack(model, images, labels, THREAT, **options)
    with torch.inference_mode():
        found = run_attack(model, images.clone(), labels.clone(), THREAT, **options)
        assert torch.is_inference_mode_enabled()
    assert found.same_results(expected) and "apgd-ce" in expected.by_surrogate["fc"]


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_the_caller_s_default_dtype_does_not_matter(model, digits, norm):
    images, labels = (part[:4] for part in digits)
    torch.set_default_dtype(torch.float64)
    try:
        report = run_attack(model, images, labels, ThreatModel(norm, 0.1), budgets=SMALL, surrogates=["ste"])
    finally:
        torch.set_default_dtype(torch.float32)
    assert {"fab-t", "square", "joint", "joint-subset"} <= report.by_surrogate["ste"].keys()


def answering(answer) -> nn.Module:
    """Returns a network whose logits (B, 10) a function turns into something else."""
    return Wrapped(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), lambda net, x: answer(net(x))).eval()


def ended_by(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Flatten(), *layers).eval()


def made_in_inference_mode(model: nn.Module) -> nn.Module:
    with torch.inference_mode():
        return ended_by(timm_hpm.HPMHead(64, 10))


def partly_training(model: nn.Module) -> nn.Module:
    model.stages[0][0].bn1.train()
    return model


def of_colours(model: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 3, 3), nn.Flatten(), nn.Linear(108, 10)).eval()


def channels_last(images: torch.Tensor) -> torch.Tensor:
    return images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1)


ODD_ANSWERS = ((lambda z: (z, z), "returns a tuple"), (lambda z: z[:-1], r"16 images the shape \(15, 10\)"),
               (lambda z: z.to_sparse(), "sparse"))
# The model, images and labels made of the embedded model and digits, the functions that refuse them, and the message.
REFUSED = [
    *((None, images, None, "evaluate judge pgd fit", "^images (is|have)") for images in (
        lambda x: x.to("meta"), lambda x: x.to_sparse(), lambda x: x.byte(), lambda x: x.numpy())),
    *((None, None, labels, "evaluate judge pgd fit", "^labels (is|have)") for labels in (
        lambda y: y > 0, lambda y: y.float(), lambda y: y[:3])),
    (None, None, lambda y: torch.full_like(y.byte(), 200), "evaluate", "label 200 of image 0 is out of range"),
    *((model, channels_last, None, "evaluate judge pgd", r"the shape .*8, 8, .*give images.permute\(0, 3, 1, 2\)")
      for model in (of_colours, lambda model: timm_hpm.PixelModel(of_colours(model), [0.5] * 3, [0.5] * 3))),
    *((lambda model, answer=answer: answering(answer), None, None, "evaluate judge", message)
      for answer, message in ODD_ANSWERS),
    *((lambda model, answer=answer: timm_hpm.PixelModel(answering(answer), [0.5], [0.5]), None, None, "evaluate judge",
       message) for answer, message in ODD_ANSWERS),
    *((lambda model, answer=answer: answering(answer), None, None, "evaluate attack", "fails on a batch of one image")
      for answer in (lambda z: z.squeeze(), lambda z: z - z[:2].reshape(2, -1).mean(dim=0))),
    (lambda model: lambda x: x.flatten(1), None, None, "evaluate judge fit find add wrap",
     r"model is a function; expected an nn.Module: wrap a function in a module"),
    (lambda model: nn.Flatten, None, None, "evaluate judge fit find add wrap",
     r"model is the class Flatten; expected an nn.Module: make one of it"),
    (made_in_inference_mode, None, None, "evaluate judge pgd", r"1.weight was made inside torch.inference_mode\(\)"),
    (lambda model: ended_by(nn.Linear(64, 10, device="meta")), None, None, "evaluate judge pgd",
     r"1.weight is on the device meta"),
    (lambda model: ended_by(timm_hpm.HPMHead(64, 10), nn.Linear(10, 10)), None, None, "evaluate",
     "another layer follows the head"),
    *((change, None, None, "evaluate judge", rf"train mode \(at {place}\).*call model.eval\(\)")
      for change, place in ((nn.Module.train, "its top"), (partly_training, "stages.0.0.bn1"))),
]


@pytest.mark.parametrize(("change", "images", "labels", "functions", "message"), REFUSED)
def test_what_cannot_be_measured_is_named_by_every_function_and_left_alone(
        model, digits, change, images, labels, functions, message):
    given = change(model) if change else model
    x, y = images(digits[0]) if images else digits[0], labels(digits[1]) if labels else digits[1]
    before = copy.deepcopy(model.state_dict())
    calls = {name: partial(function, given, x, y, THREAT) for name, function in (
        ("evaluate", run_attack), ("attack", timm_hpm.attack), ("pgd", timm_hpm.pgd))}
    calls |= {name: partial(function, given) for name, function in (
        ("find", timm_hpm.find_head), ("add", timm_hpm.add_hpm_head), ("wrap", timm_hpm.PixelModel))}
    calls |= {"judge": partial(timm_hpm.judge, given, x, y, 16),
              "fit": partial(timm_hpm.fit_prototypes, given, [(x, y)], THREAT)}
    for name in functions.split():
        with pytest.raises(ValueError, match=message):
            calls[name]()
    assert same_tensors(model.state_dict(), before)


@pytest.mark.parametrize("option", [
    {"full_grid": 1}, {"mean": 0.5}, {"mean": [None]}, {"mean": []}, {"mean": [127]}, {"mean": [float("nan")]},
    {"std": [0.5, 0.5, 0.5]}, {"std": [0.0]}, {"draws": 0}, {"attacks": 1}, {"surrogates": "fc"}])
def test_options_of_other_types_are_named(model, digits, option):
    with pytest.raises(ValueError, match=f"^{next(iter(option))} is "):
        if option.keys() <= {"mean", "std", "draws"}:
            timm_hpm.PixelModel(model, **option)
        else:
            run_attack(model, *digits, THREAT, budgets=SMALL, **option)
