"""`AttackReport` in closed form from hand-made verdicts, and the files it and others are written to."""

import copy
import dataclasses
import html
import json
import os
import re
import resource
import subprocess

import pytest
import timm
import torch
from protocols import PROTOCOL, run_attack
from safetensors.torch import save_file

from timm_hpm import AttackReport, compare, report_markdown, report_page, write_report
from timm_hpm.evaluation import Budget
from timm_hpm.evaluation.result import measured_convergence
from timm_hpm.evaluation.resume import Step
from timm_hpm.files import Parts, filling, replacing, save_parts, write_text
from timm_hpm.report import Convergence, Flag, data_digest, make_example, weights_digest
from timm_hpm.report.flags import paragraph
from timm_hpm.report.tables import convergence_note, falls
from timm_hpm.training.recovery import Checkpoint, write_checkpoint

NUM_DIGITS, SPLIT = 12, "test"


@pytest.fixture
def report() -> AttackReport:
    """Image 5 is wrong everywhere, 0 falls to ste, 3 to APGD on fc, 6 to Square; image 9 only to the clean verdict."""
    return AttackReport(
        protocol=PROTOCOL | {"threat": "Linf:0.1", "seed": 3, "attacks": {"apgd-ce": {"iterations": 100}}},
        correct={
            "clean": "1111101110",
            "fc/apgd-ce": "1110101111",
            "fc/square": "1111100111",
            "ste/apgd-ce": "0111101111",
            "true/square": "1111100111",
        },
        baseline_correct={"clean": "1111111111", "fc/apgd-ce": "1010111111", "fc/square": "1111110000"},
        cost={"apgd-ce": {"seconds": 12.25, "forward_passes": 2010, "backward_passes": 2000},
              "all": {"seconds": 20.5, "forward_passes": 4020, "backward_passes": 2001}},
        examples=[make_example(3, 7, 1, "fc/apgd-ce", torch.zeros(1, 8, 8), torch.full((1, 8, 8), 0.1))],
        flags=[Flag("saturated-softmax", "fc: one-hot at image 4"), Flag("zero-gradient", "at 9 of 10 images")],
    )


def plain(correct: dict[str, str]) -> AttackReport:
    return AttackReport({"architecture": "Linear"}, correct)


def test_accuracies_are_counted_point_by_point(report):
    assert report.num_images == 10 and report.clean_accuracy == 0.8
    # Right in all rows: images 1, 2, 4, 7, 8.
    assert report.robust_accuracy == 0.5
    assert report.by_surrogate == {
        "fc": {"apgd-ce": 0.8, "square": 0.8, "worst": 0.7}, "ste": {"apgd-ce": 0.8, "worst": 0.8},
        "true": {"square": 0.8, "worst": 0.8}}
    assert report.baseline == {"clean": 1.0, "apgd-ce": 0.8, "square": 0.6, "worst": 0.4}
    assert repr(report) == "<AttackReport: hpm_wrn10_2, 10 images, Linf:0.1, clean 80.0%, robust 50.0%>"


def test_an_untouched_image_that_errs_among_broken_ones_is_not_robust(report):
    report.protocol["data_digest"] = "0" * 16
    report = dataclasses.replace(report, assembled="1111111011")  # images 0, 3, 5, 6 and 9 are right again, 7 errs
    assert report.robust_accuracy == 0.4 and report.assembled_robust_accuracy == 0.9
    assert compare(report, report).rows[1].a == 0.4


def test_one_adversary_realises_the_judged_batch_with_most_errors(report):
    assert report.realised_robust_accuracy == report.robust_accuracy, "no batch mode: all of it at once"
    report.protocol["batch_size"] = 4
    #  clean           1111 1011 10
    #  fc/apgd-ce      1110 1011 11
    #  ste/apgd-ce     0111 1011 11
    #  Square          1111 1001 11
    #  assembled       1110 1011 00
    batches = dataclasses.replace(report, assembled="1110101100")
    assert batches.realised_robust_accuracy == (3 + 2 + 0) / 10
    assert batches.robust_accuracy == 0.4 and batches.assembled_robust_accuracy == 0.6
    assert batches.to_dict()["realised_robust_accuracy"] == 0.5


@pytest.mark.parametrize(("right", "n"), [(0, 50), (1, 7), (25, 50), (7, 7)])
def test_the_interval_is_wilson_s(right, n):
    report = plain({"clean": "1" * right + "0" * (n - right)})
    p, ends = right / n, report.robust_accuracy_interval
    # Its ends are the accuracies whose own standard error reaches to p, or 0 and 1.
    for end, bound in zip(ends, (0.0, 1.0), strict=True):
        assert end == bound or (p - end) ** 2 == pytest.approx(1.96 ** 2 * end * (1 - end) / n, rel=1e-3)
    assert 0 <= ends[0] <= p <= ends[1] <= 1 and ends[1] - ends[0] > 0.9 / (n + 4)
    text = f"{100 * ends[0]:.1f} to {100 * ends[1]:.1f}"
    assert f"| clean | {100 * p:.1f} | {text} |" in report_markdown(report) and text in report_page(report)


def test_a_saved_report_is_loaded_equal_and_makes_its_folder(report, tmp_path):
    report.save(tmp_path / "a" / "b" / "c.json")
    write_report(report, str(tmp_path / "d"))
    assert {path.name for path in (tmp_path / "d").iterdir()} == {"report.json", "report.md", "report.html"}
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["c.json"]
    loaded = AttackReport.load(tmp_path / "a" / "b" / "c.json")
    assert loaded == report == AttackReport.load(tmp_path / "d" / "report.json") and loaded.same_results(report)
    data = json.loads((tmp_path / "d" / "report.json").read_text(encoding="utf-8"))
    assert data["robust_accuracy"] == 0.5 and data["by_surrogate"]["fc"]["worst"] == 0.7
    assert data["correct"] == report.correct and data["schema_version"] == 2
    assert data["unreliable"] is True and data["flags"][0] == {"name": "saturated-softmax",
                                                               "text": "fc: one-hot at image 4"}


def test_same_results_ignores_the_time_and_nothing_else(report):
    slower = {name: {**row, "seconds": row["seconds"] + 100} for name, row in report.cost.items()}
    assert report.same_results(dataclasses.replace(report, cost=slower))
    for change in ({"cost": {**report.cost, "all": {**report.cost["all"], "forward_passes": 4021}}},
                   {"protocol": {**report.protocol, "seed": 4}}, {"baseline_correct": {}}, {"flags": []},
                   {"correct": {**report.correct, "clean": "1111111111"}}):
        assert not report.same_results(dataclasses.replace(report, **change))


@pytest.mark.parametrize("content", [
    b"", b"# a table\n", b"{", b"[]", b"3", b"null", b'"text"', b"{}", b'{"loss": 1.5}', b'{"schema_version": 2}',
    b'{"schema_version": 2, "protocol": {}}', b"\xff\xfe\x00\x80"])
def test_another_file_is_not_loaded(content, tmp_path):
    (tmp_path / "other.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"other\.json is not a report of timm_hpm .*report\.json that evaluate\.py"):
        AttackReport.load(tmp_path / "other.json")


CONVERGENCE = {"fell_after": [None] * 10, "spent": 9.0, "margins": [0.5] * 10, "clean_margin": 1.0}
NEIGHBOURS = {"batch_size": 4, "mix": 0.9, "kind": "chosen", "targets": 8, "flipped": 2}


@pytest.mark.parametrize(("field", "value", "message"), [
    ("protocol", {}, "protocol is {}, expected an object with architecture"),
    ("protocol", PROTOCOL | {"num_images": 9}, "protocol.num_images is 9, expected 10, by its verdicts"),
    ("protocol", PROTOCOL | {"a": {"a": [[[[[[[[1]]]]]]]]}}, "protocol.a is .*, expected at most 8 levels"),
    ("clean_accuracy", 0.9, "clean_accuracy is 0.9, expected 0.8, by its verdicts"),
    ("correct", {"fc/square": "10"}, r"correct is \{'fc/square': '10'\}, expected an object with clean"),
    ("correct", {"clean": "10", "fc/square": "1"}, "the row fc/square is .1., expected 2 verdicts"),
    ("examples", [{"image": "<b>", "label": 1, "predicted": 2, "amplification": 1.5}],
     r"examples\[0\] is .*, expected an object with image, label, predicted, found_by"),
    ("cost", {"square": {"seconds": 1.5}}, "cost.square is .*, expected an object with seconds, forward_passes"),
    ("neighbours", [NEIGHBOURS | {"targets": 0}], r"neighbours\[0\].targets is 0, expected a whole number above 0"),
    ("flags", [{"name": "odd", "text": ""}], "unknown flag 'odd'; expected one of clean-near-chance"),
    *(("schema_version", version, f"has the schema version {version!r}; this timm_hpm reads 2")
      for version in (1, 3, True)),
    *(("convergence", CONVERGENCE | change, f"convergence.{message}") for change, message in (
        ({"margins": [1.0]}, r"margins is \[1.0\], expected 10 entries, one for each image"),
        ({"fell_after": ["a"] * 10}, r"fell_after\[0\] is 'a', "))),
])
def test_a_damaged_report_is_not_loaded(report, field, value, message, tmp_path):
    (tmp_path / "report.json").write_text(json.dumps(report.to_dict() | {field: value}), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"report\.json (is not a report of timm_hpm .*)?{message}"):
        AttackReport.load(tmp_path / "report.json")


def test_the_data_digest_tells_images_labels_and_their_order_apart():
    images, labels = torch.rand(3, 1, 4, 4), torch.tensor([0, 1, 2])
    digest = data_digest(images, labels)
    assert re.fullmatch("[0-9a-f]{16}", digest) and data_digest(images.clone(), labels.int()) == digest
    assert data_digest(images.to(memory_format=torch.channels_last), labels) == digest
    changed = images.clone()
    changed[2, 0, 3, 3] += 0.01
    others = [(changed, labels), (images, labels.flip(0)), (images.flip(0), labels), (images.view(3, 1, 2, 8), labels)]
    assert len({digest, *(data_digest(*other) for other in others)}) == 5


def table_row(markdown: str, name: str) -> list[str]:
    """Returns the cells of the first table row that begins with `name`."""
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in markdown.splitlines()
            if line.startswith("|")]
    return next(row[1:] for row in rows if row[0] == name)


def test_markdown_holds_the_numbers(report):
    markdown = report_markdown(report)
    assert markdown.startswith("# Mixed Surrogate Attack: hpm_wrn10_2\n")
    for name, cells in (
            ("surrogate", "apgd-ce square worst"), ("fc", "80.0 80.0 70.0"), ("ste", "80.0  80.0"),
            ("true", " 80.0 80.0"), ("threat", "Linf:0.1"), ("apgd-ce", "12.2 2,010 2,000 2"),
            ("all", "20.5 4,020 2,001 3")):
        assert table_row(markdown, name) == cells.split(" ")
    for name, value, interval in (
            ("clean", "80.0", "49.0 to 94.3"), ("**robust, worst case over all rows**", "50.0", "23.7 to 76.3"),
            ("FC classifier of the same network, clean", "100.0", "72.2 to 100.0"),
            ("FC classifier of the same network, under the attacks on it", "40.0", "16.8 to 68.7")):
        assert table_row(markdown, name) == [value, interval]
    assert "\n- [saturated-softmax](#saturated-softmax): fc: one-hot at image 4\n" in markdown
    assert "\n**Unreliable**: " in markdown and "[zero-gradient](#zero-gradient): at 9 of" in markdown
    for name in ("saturated-softmax", "zero-gradient"):
        assert f"\n### {name}\n\n{paragraph(name)}\n" in markdown
    for block in markdown.split("\n\n"):
        if block.startswith("|"):
            assert len({line.count("|") for line in block.splitlines()}) == 1
    assert "FC classifier" not in report_markdown(plain({"clean": "11", "model/square": "10"}))


HOSTILE = ["<script>|", "a\n\n# A heading\n- a list", "`code` ``` ```", "[a](javascript:b) **bold** _it_ ~~gone~~ $x$",
           "&lt;b&gt; \\", "\x1b[31mred\u202e", "| --- |\r\n| x |", "\udcff"]


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_from_elsewhere_is_markup_in_the_markdown(report, text):
    plain_lines = report_markdown(report).splitlines()
    odd = dataclasses.replace(
        report, protocol=report.protocol | {"model": text, "weights": text, "versions": {"torch": text}, text: [text],
                                            "dataset": "digits", "options": {}},
        correct=report.correct | {f"{text}/{text}": "1" * 10}, cost=report.cost | {text: report.cost["all"]},
        flags=[*report.flags, Flag("zero-gradient", text)])
    markdown = report_markdown(odd)
    fence, = re.findall(r"^(`{3,})sh$", markdown, re.MULTILINE)
    before, _, after = markdown.partition(f"{fence}sh\n")
    code, closing, after = after.partition(f"\n{fence}\n")
    words = subprocess.run(["bash", "-c", f"printf '%s\\n' {code}"], capture_output=True, check=True).stdout
    call = b"python\n-m\ntimm_hpm\nevaluate\n--model[\n=]"
    assert closing and re.match(call + re.escape(os.fsencode(text)) + b"\n", words)
    assert all(line.isprintable() for line in code.splitlines())
    outside = before + after
    assert not set("<>\\~$\x1b\x00\u202e\r\udcff") & set(outside) and "**bold" not in outside
    headings = [line for line in plain_lines if line.startswith("#")]
    assert [line for line in outside.splitlines() if line.startswith("#") and "Attack: " not in line
            and line != "## Command"] == headings[1:]
    for block in outside.split("\n\n"):
        if block.startswith("|"):
            assert len({line.count("|") for line in block.splitlines()}) == 1
    visible = " ".join("".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.split())).split())
    assert visible in html.unescape(next(line for line in outside.splitlines() if line.startswith("| weights |")))
    assert not re.search(r"[`*]|\]\(", next(line for line in outside.splitlines() if line.startswith("| weights |")))


@pytest.mark.parametrize("written", [True, False])
def test_replacing_leaves_the_old_file_and_no_other_if_the_block_raises(tmp_path, written):
    path = tmp_path / "report.json"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        if written:
            temporary.write_text("half of the n")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with replacing(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_the_digest_tells_weights_apart_and_nothing_else():
    model = timm.create_model("hpm_wrn10_2", pretrained=True)
    digest = weights_digest(model)
    assert re.fullmatch("[0-9a-f]{16}", digest) and weights_digest(copy.deepcopy(model).eval()) == digest
    assert weights_digest(copy.deepcopy(model).to(memory_format=torch.channels_last)) == digest
    for name in model.state_dict():
        changed = copy.deepcopy(model)
        changed.state_dict()[name].view(-1)[0] += 1
        assert weights_digest(changed) != digest, name
    assert weights_digest(model.bfloat16()) != digest


def in_place(make, write):
    """Returns a function that writes into what `make`, a context manager of a path, yields."""
    def call(path):
        with make(path) as temporary:
            write(temporary)
    return call


PROGRESS = {"epoch": 0, "batches": 0}
LARGE = torch.ones(50_000)


@pytest.mark.parametrize("write", [
    lambda path: write_text(path, "x" * 50_000),
    in_place(replacing, lambda new: save_file({"a": LARGE}, new)),
    in_place(lambda path: filling(path, "a"), lambda new: save_file({"a": LARGE}, new / "a")),
    lambda path: save_parts({"a": Parts(LARGE, iter([LARGE]))}, path, {}),
    lambda path: write_checkpoint(path, Checkpoint({"a": LARGE}, None, {}, PROGRESS, {}), 1),
    lambda path: write_checkpoint(path, Checkpoint({}, None, {}, PROGRESS | {"rows": ["x" * 50_000]}, {}), 1),
])
def test_a_file_beyond_the_limit_of_the_system_is_named_and_leaves_nothing(write, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    path = tmp_path / "file"
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        with pytest.raises(OSError, match=re.escape(f"cannot write {path}")):
            write(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not [found for found in tmp_path.rglob("*") if found != path] and not path.is_file()


def step(attack: str, margins: list[float], passes: int = 0, attacked: int = 0) -> Step:
    row = "".join("1" if margin else "0" for margin in margins)
    cost = {"seconds": 1.0, "forward_passes": passes, "backward_passes": passes}
    return Step(attack, {attack: row}, {}, cost, [], [], torch.empty(0), torch.empty(0), margins=margins,
                attacked=attacked)


# Two batches, of three images and of one: image 1 errs when clean, 0 falls to a, 3 to b; 2 is left.
STEPS = [
    step("clean", [4.0, 0.0, 2.0]), step("a", [0.0, 0.0, 1.0], 30, 2), step("b", [0.0, 0.0, 0.1234567], 40, 1),
    step("clean", [6.0]), step("a", [3.0], 20, 1), step("b", [0.0], 100, 1),
]


def test_passes_and_margins_are_those_of_the_steps_of_each_batch():
    assert measured_convergence(STEPS) == Convergence(
        fell_after=[30.0, 0.0, None, 240.0], spent=110.0, margins=[0.0, 0.0, 0.123457, 0.0], clean_margin=4.0)
    assert measured_convergence(STEPS[3:]).spent == 240.0  # nobody is left


@pytest.fixture(scope="module")
def measured(shared_model, digits) -> AttackReport:
    return run_attack(shared_model, *digits, "Linf:0.2", batch_size=6, attacks=["apgd-ce", "square"],
                      surrogates=["fc", "ste"], budgets={"apgd-ce": Budget(3), "square": Budget(20)})


def test_a_run_has_the_passes_of_each_image_and_the_margins_of_its_survivors(measured):
    report, found = measured, measured.convergence
    robust = [passes is None for passes in found.fell_after]
    assert sum(robust) / 12 == report.robust_accuracy < report.clean_accuracy
    assert [passes == 0 for passes in found.fell_after] == [verdict == "0" for verdict in report.correct["clean"]]
    assert [margin > 0 for margin in found.margins] == robust
    # Two surrogates at once: every image costs at least both searches.
    assert found.spent >= 2 * 3 * 2 and max(passes or 0 for passes in found.fell_after) <= found.spent
    assert falls(report)[-1].y == report.robust_accuracy


def test_a_report_keeps_it_and_says_it_in_words(measured, tmp_path):
    found = Convergence([10.0, 0.0, None, 60.0, None, 100.0], 100.0, [0.0, 0.0, 0.5, 0.0, 0.015, 0.0], 5.0)
    report = AttackReport(measured.protocol | {"num_images": 6}, {"clean": "101111", "fc/apgd-ce": "001011"} | {
        "fc/square": "001010", "ste/square": "001010"}, convergence=found)
    report.save(tmp_path / "a.json")
    assert AttackReport.load(tmp_path / "a.json") == report
    note = ("2 images of 6 fell in the last doubling of the budget, from 50 to 100 passes for each image: more attacks "
            "may break more. Under attack the right logit of the nearest survivors leads by 0.015, 0.5; of clean "
            "images it leads by 5 (median). 1 of 2 survivors leads by less than a tenth of that.")
    assert convergence_note(report) == note and note in report_markdown(report) and note in report_page(report)
    assert [(fall.x, fall.y) for fall in falls(report)] == [(10.0, 4 / 6), (60.0, 3 / 6), (100.0, 2 / 6)]
    assert "No image of 6 fell" in convergence_note(dataclasses.replace(
        report, convergence=dataclasses.replace(found, spent=500.0)))
