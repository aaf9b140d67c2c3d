"""The Mixed Surrogate Attack: against problems solved in closed form, and its bookkeeping against the model itself."""

import copy
import itertools
import math
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from protocols import SMALL, run_attack
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from pyautoattack.fab_pt import FABAttack_PT
from pyautoattack.square import SquareAttack
from safetensors.torch import load_file
from torch import nn

import timm_hpm
from timm_hpm import HPMHead, ThreatModel
from timm_hpm.evaluation import ATTACKS, PROTOCOLS
from timm_hpm.evaluation.attacked import AttackedModel
from timm_hpm.evaluation.batch import AttackBatch, Budget
from timm_hpm.surrogates import SURROGATES

NUM_DIGITS, INFERENCE = 24, "batch"

SHAPE = (1, 6, 6)


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


def prototype_distances(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, norm: str) -> torch.Tensor:
    """Returns the distance (N,) to the nearest hyperplane: the gap to each class over the dual norm of its normal."""
    prototypes = model[1].prototypes
    squared = (images.flatten(1).unsqueeze(1) - prototypes).square().sum(dim=-1)
    normals = 2 * (prototypes[labels].unsqueeze(1) - prototypes)
    distances = (squared - squared.gather(1, labels.unsqueeze(1))) / normals.norm(p=1 if norm == "Linf" else 2, dim=-1)
    return distances.scatter(1, labels.unsqueeze(1), math.inf).amin(dim=1).clamp(min=0)


def check_against_closed_form(rows: Iterable[str], distances: torch.Tensor, eps: float) -> None:
    """Every image breakable within 0.99·eps is broken by one of the rows, and none that needs more than 1.01·eps."""
    robust = torch.tensor([set(verdicts) == {"1"} for verdicts in zip(*rows, strict=True)])
    breakable, unbreakable = distances < 0.99 * eps, distances > 1.01 * eps
    assert breakable.sum() >= 10 and unbreakable.sum() >= 10, "the problem tests nothing"
    assert not robust[breakable].any()
    assert robust[unbreakable].all()


@pytest.mark.parametrize(("mode", "norm"), [("dataset", "Linf"), ("dataset", "L2"), ("batch", "Linf")])
def test_prototypes_on_raw_pixels_are_broken_as_the_closed_form_says_under_every_surrogate(mode, norm):
    # In batch mode with mix = 0 the head is the same classifier.
    model, images, labels = prototype_problem(mode)
    model[1].mix = 0.0
    distances = prototype_distances(model, images, labels, norm)
    eps = distances.median().item()
    budgets = {"apgd-ce": Budget(30), "apgd-t": Budget(30, 4), "fab-t": Budget(20, 4), "square": Budget(100)}
    report = run_attack(model, images, labels, ThreatModel(norm, eps), surrogates=list(SURROGATES),
                        surrogates_at_once=5, attacks=list(budgets), budgets=budgets)
    check_against_closed_form(report.correct.values(), distances, eps)


# Every row of the embedded network then has images that are right and images that are not.
THREAT = ThreatModel("Linf", 0.2)


def test_components_find_the_points_of_autoattack(shared_model):
    # From the same random state, on the same arithmetic: rounding alone decides one image in fifteen otherwise.
    norm, eps = "Linf", 0.17
    images, labels = (tensor[:48] for tensor in timm_hpm.load_split("digits", "val").tensors)
    split = AttackedModel(timm_hpm.PixelModel(shared_model), images)

    def logits(pixels):
        return split.logits("fc", split.features(pixels))

    options = {"norm": norm, "eps": eps, "seed": 7, "device": "cpu"}
    theirs = {
        "apgd-ce": APGDAttack(logits, n_iter=10, loss="ce", **options),
        "apgd-t": APGDAttack_targeted(logits, n_iter=10, n_target_classes=3, **options),
        "fab-t": FABAttack_PT(logits, n_iter=10, targeted=True, n_target_classes=3, **options),
        "square": SquareAttack(logits, n_queries=60, p_init=0.8, resc_schedule=False, **options),
    }
    budgets = {"apgd-ce": Budget(10), "apgd-t": Budget(10, 3), "fab-t": Budget(10, 3), "square": Budget(60)}
    assert torch.equal(logits(images).argmax(dim=1), labels)
    for attack in COMPONENTS:
        expected = theirs[attack].perturb(images, labels).detach()
        torch.manual_seed(7)
        batch = AttackBatch(split, ["fc"], images, labels)
        found = ATTACKS[attack].run(batch, ThreatModel(norm, eps), budgets[attack])
        assert ThreatModel(norm, eps).contains(found, images).all(), attack
        broken = logits(expected).argmax(dim=1) != labels
        assert 3 <= broken.sum() <= 45, "the problem tests nothing"
        ours = logits(found).argmax(dim=1) != labels
        if attack == "fab-t":
            # FAB's own points beyond the ball are given up there, and moved to its surface here.
            assert ours[broken].all()
            assert ours.sum() <= broken.sum() + 3
        else:
            assert torch.equal(ours, broken), attack
            assert torch.equal(found[broken], expected[broken]), attack


# What the protocol "standard" runs on a head in batch mode, beside Square on the true model.
COMPONENTS = tuple(PROTOCOLS["autoattack"].attacks)
ROWS = {f"{s}/{a}" for s in SURROGATES for a in (*COMPONENTS, "apgd-chain")} | {
    f"{s}/{a}" for s in ("soft", "ste") for a in ("joint", *ATTACKS["joint-subset"].rows(2))}
MIDDLE = {"apgd-ce": Budget(10), "apgd-t": Budget(20, 4), "fab-t": Budget(10, 4), "square": Budget(60),
          "apgd-chain": Budget(10), "joint": Budget(20), "joint-subset": Budget(20, restarts=2)}


@pytest.fixture(scope="module")
def attacked(tmp_path_factory) -> SimpleNamespace:
    """A Mixed Surrogate Attack in batches of 25, 25 and 10 images, with what it was given and what it saved."""
    model, images, labels = prototype_problem("batch")
    labels[[10, 55]] = (labels[[10, 55]] + 1) % 5
    threat = ThreatModel("Linf", prototype_distances(model, images, labels, "Linf").quantile(0.5).item())
    path = tmp_path_factory.mktemp("attacked") / "adversarial.safetensors"
    report = run_attack(model, images, labels, threat, batch_size=25, budgets=MIDDLE,
                                    surrogates_at_once=3, folder=path.parent, save_adversarial=True)
    candidates = load_file(path)
    del candidates["labels"]
    return SimpleNamespace(model=model, images=images, labels=labels, report=report, path=path, candidates=candidates)


@torch.no_grad()
def verdicts(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, batch_size: int) -> str:
    """Returns the row of a report that a model's answers in batches come to."""
    answers = [model(images[i:i + batch_size]).argmax(dim=1) for i in range(0, len(images), batch_size)]
    return "".join(str(int(right)) for right in torch.cat(answers) == labels)


def differing(first: str, second: str) -> int:
    """Returns the number of images about which two rows differ."""
    return sum(a != b for a, b in zip(first, second, strict=True))


def test_verdicts_are_the_models_answers_in_whole_batches(attacked):
    rows = attacked.report.verdicts
    assert set(rows) == {"clean", "true/square", "assembled"} | ROWS
    assert set(attacked.candidates) == set(rows) - {"true/square"}
    for name, points in attacked.candidates.items():
        assert set(rows[name]) == {"0", "1"}, name
        assert rows[name] == verdicts(attacked.model, points, attacked.labels, 25), name
    for other in (1, 12, 60):
        assert sum(differing(rows[name], verdicts(attacked.model, points, attacked.labels, other))
                   for name, points in attacked.candidates.items()) >= 20
    assert timm_hpm.rejudge(attacked.model, attacked.path) == {
        name: row for name, row in rows.items() if name != "true/square"}


def test_the_first_broken_images_are_its_examples(attacked):
    rows = attacked.report.correct
    broken = [i for i in range(60) if rows["clean"][i] == "1" and "0" in {row[i] for row in rows.values()}]
    assert [example.image for example in attacked.report.examples] == broken[:8]
    for example in attacked.report.examples:
        first = example.image // 25 * 25
        batch = attacked.candidates[example.found_by][first:first + 25]
        assert example.predicted == int(attacked.model(batch).argmax(dim=1)[example.image - first]) != example.label


def test_the_assembled_batch_holds_the_first_candidate_that_broke_each_image(attacked):
    report, names = attacked.report, list(SURROGATES)
    order = [f"{surrogate}/{attack}" for some in (names[:3], names[3:]) for attack in COMPONENTS for surrogate in some]
    order += [f"{surrogate}/apgd-chain" for surrogate in names]
    order += [f"{surrogate}/{attack}" for attack in ("joint", *ATTACKS["joint-subset"].rows(2))
              for surrogate in ("soft", "ste")]
    standing = attacked.images.clone()
    for i in range(60):
        found_by = next((name for name in ["clean", *order] if report.correct[name][i] == "0"), "clean")
        standing[i] = attacked.candidates[found_by][i]
    assert report.assembled == verdicts(attacked.model, standing, attacked.labels, 25)
    assert report.robust_accuracy < report.assembled_robust_accuracy < report.clean_accuracy


def test_the_baseline_is_the_fc_classifier_under_the_attacks_on_it(attacked):
    report = attacked.report
    assert list(report.baseline_correct) == ["clean", *[f"fc/{attack}" for attack in COMPONENTS]]
    with timm_hpm.head_mode(attacked.model, "fc"):
        for name, row in report.baseline_correct.items():
            assert row == verdicts(attacked.model, attacked.candidates[name], attacked.labels, 25)
            assert set(row) == {"0", "1"} and differing(row, report.correct[name]) >= 5, name


def test_candidates_lie_in_the_ball_and_are_never_the_clean_image(shared_model, digits, tmp_path):
    report = run_attack(shared_model, *digits, THREAT, batch_size=10, budgets=SMALL, surrogates_at_once=5,
                        folder=tmp_path, save_adversarial=True)
    saved = load_file(tmp_path / "adversarial.safetensors")
    assert set(saved) == {"clean", "labels", "assembled"} | ROWS
    assert torch.equal(saved.pop("clean"), digits[0]) and torch.equal(saved.pop("labels"), digits[1])
    for name, points in saved.items():
        assert THREAT.contains(points, digits[0]).all(), name
        # What is broken already need not move in the joint attack, which may break all of a batch.
        assert name == "assembled" or ("0" in report.correct[name] and ("1" in report.correct[name] or "joint" in name))
        assert "joint" in name or name == "assembled" or THREAT.distance(points, digits[0]).min() > 0.5 * THREAT.eps


@pytest.mark.parametrize(("mode", "surrogates"), [
    ("batch", ["fc", "dataset", "soft", "ste", "mixed"]),
    ("sample", ["fc", "dataset", "soft", "ste", "mixed"]),
    ("dataset", ["fc", "dataset", "mixed"]),
    ("fc", ["fc"]),
])
def test_each_mode_attacks_its_own_surrogates_and_is_rejudged_alike(tmp_path, mode, surrogates):
    model, images, labels = prototype_problem("batch")
    path = tmp_path / "adversarial.safetensors"
    with timm_hpm.head_mode(model, mode):
        # The FC classifier is right about few of these labels.
        labels = model(images).argmax(dim=1)
        labels[7] = (labels[7] + 1) % 5
        report = run_attack(model, images, labels, ThreatModel("Linf", 0.05), batch_size=25,
                                        budgets=SMALL, surrogates_at_once=5, folder=path.parent, save_adversarial=True)
    assert list(report.by_surrogate) == [*surrogates, "true"]
    assert report.protocol["inference"] == mode
    assert set(report.protocol["versions"]) == {"torch", "timm", "timm-hpm", "python"}
    assert report.cost["all"]["forward_passes"] > report.cost["apgd-t"]["forward_passes"] > 0
    judged = timm_hpm.rejudge(model, path)
    assert judged == {name: row for name, row in report.verdicts.items() if not name.startswith("true/")}
    assert all(set(row) == {"0", "1"} for row in judged.values())
    assert model[1].inference == "batch"
    with pytest.raises(ValueError, match=r"train mode \(at its top\).*call model.eval\(\)"):
        timm_hpm.rejudge(copy.deepcopy(model).train(), path)
    others = [timm_hpm.INFERENCE_MODES[i] for i in range(4) if timm_hpm.INFERENCE_MODES[i] != mode]
    for other in others:
        with timm_hpm.head_mode(model, other):
            points = load_file(path)
            assert any(verdicts(model, points[name], labels, 25) != row for name, row in judged.items()), other


def test_one_seed_gives_one_report_and_another_seed_another(tmp_path):
    model, images, labels = prototype_problem("batch")
    images, labels = images[:30], labels[:30]
    reports, candidates = [], []
    for run, seed in enumerate((3, 3, 4)):
        torch.manual_seed(run)
        path = tmp_path / str(run) / "adversarial.safetensors"
        reports.append(run_attack(model, images, labels, ThreatModel("Linf", 0.05), batch_size=15,
                                  surrogates=["fc", "ste"], budgets=SMALL, seed=seed, folder=path.parent,
                                  save_adversarial=True))
        candidates.append(load_file(path))
    assert reports[0].same_results(reports[1]) and reports[0].correct != reports[2].correct
    for name, points in candidates[0].items():
        assert torch.equal(points, candidates[1][name])
        assert torch.equal(points, candidates[2][name]) == (name in ("clean", "labels")), name


def test_a_head_without_prototypes_is_attacked_as_its_fc_classifier(digits):
    torch.manual_seed(0)
    model = timm.create_model("hpm_wrn10_2.digits_linf", pretrained=False).eval()
    labels = timm_hpm.PixelModel(model)(digits[0]).argmax(dim=1)
    report = run_attack(model, digits[0], labels, ThreatModel("Linf", 0.05), budgets=SMALL)
    assert set(report.correct["fc/square"]) == {"0", "1"}
    assert report.protocol["surrogates"] == ["fc"] and report.protocol["prototypes_fitted"] is False
    assert report.correct["fc/square"] == report.baseline_correct["fc/square"]


@pytest.mark.parametrize("surrogate", list(SURROGATES))
def test_queried_rows_answer_as_in_their_whole_batch(shared_model, digits, surrogate):
    split = AttackedModel(timm_hpm.PixelModel(shared_model), digits[0])
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
        expected_fc = shared_model.fc.fc_logits(split.features(moved[1:2]))
    torch.testing.assert_close(logits, torch.cat([expected_fc, expected]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("change", "message"), [
    ({"surrogates": ["fc", "hard"]}, r"unknown surrogate 'hard'; expected some of fc, dataset, soft, ste, mixed"),
    ({"budgets": {"apgd_ce": Budget(1)}}, r"unknown attack 'apgd_ce'; expected some of apgd-ce, "),
    ({"budgets": {"fab-t": Budget(5)}}, r"the budget of fab-t has no targets.*Budget\(5, targets=9\)"),
    ({"budgets": {"apgd-ce": Budget(3, targets=2)}}, r"budget of apgd-ce has 2 targets; only apgd-t, fab-t"),
    ({"folder": Path("/dev/null/x")}, r"cannot write into the output folder /dev/null"),
    ({"batch_size": 2.5}, r"batch_size is 2.5, of the type float"),
    ({"seed": -1}, r"seed is -1; expected at least 0"),
    ({"protocol": None}, r"unknown protocol None; expected some of standard, fast"),
    ({"neighbours": 10}, r"the batch sizes are 10; expected a list"),
    ({"about": {"x": {1}}}, "about cannot be written as JSON"),
    ({"threat": 0.3}, "cannot read the threat model 0.3; expected NORM:EPS .*or a ThreatModel"),
])
def test_bad_input_is_refused_before_any_attack(shared_model, digits, change, message):
    with pytest.raises((ValueError, OSError), match=message):
        run_attack(shared_model, *digits, **{"threat": THREAT} | change)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint64])
def test_labels_of_any_integer_dtype_and_a_threat_as_text_give_the_same_report(digits, shared_model, dtype):
    images, labels = digits
    for call in (lambda labels: timm_hpm.judge(shared_model, images, labels, 8),
                 lambda labels: timm_hpm.pgd(shared_model, images, labels, THREAT, random_start=False)):
        assert torch.equal(call(labels), call(labels.to(dtype)))
    options = {"attacks": ["apgd-ce"], "budgets": {"apgd-ce": 2}, "surrogates": ["fc"]}
    assert run_attack(shared_model, *digits, THREAT, **options).same_results(
        run_attack(shared_model, images, labels.to(dtype), str(THREAT), **options))


def test_a_restart_begins_at_other_points_and_the_first_one_is_that_of_a_single_start(tmp_path):
    model, images = nn.Sequential(nn.Flatten(), nn.Linear(64, 5)).eval(), 0.4 + 0.2 * torch.rand(20, 1, 8, 8)
    nn.init.normal_(model[1].weight)
    labels = model(images).argmax(dim=1)
    candidates, reports = [], []
    for restarts in (1, 3):
        reports.append(run_attack(model, images, labels, ThreatModel("Linf", 0.02), attacks=["apgd-ce"], batch_size=10,
                                  full_grid=True, budgets={"apgd-ce": Budget(1, restarts=restarts)},
                                  folder=tmp_path / str(restarts), save_adversarial=True))
        candidates.append(load_file(tmp_path / str(restarts) / "adversarial.safetensors"))
    rows = [f"model/apgd-ce#{i}" for i in (1, 2, 3)]
    assert list(reports[1].correct) == ["clean", *rows]
    assert reports[0].correct["model/apgd-ce"] == reports[1].correct[rows[0]]
    assert torch.equal(candidates[0]["model/apgd-ce"], candidates[1][rows[0]])
    for one, other in itertools.pairwise(rows):
        assert (candidates[1][one] != candidates[1][other]).flatten(1).any(dim=1).sum() >= 5
    assert reports[1].by_surrogate["model"]["apgd-ce"] == reports[1].robust_accuracy
