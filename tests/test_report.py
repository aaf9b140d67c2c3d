"""`AttackReport` in closed form from hand-made verdicts, and the files it and others are written to."""

import copy
import dataclasses
import functools
import html
import json
import math
import os
import random
import re
import resource
import subprocess
from pathlib import Path

import pytest
import timm
import torch
from protocols import PROTOCOL
from safetensors.torch import save_file

from timm_hpm import AttackReport, cards, compare, comparison_markdown, report_markdown, report_page, write_report
from timm_hpm.evaluation import PROTOCOLS
from timm_hpm.evaluation.robustbench import model_info
from timm_hpm.evaluation.sweep import sweep_page
from timm_hpm.files import Parts, new_folder, replacing, save_parts, writable_folder, write_text
from timm_hpm.report import FLAGS, Flag, command, data_digest, make_example, weights_digest
from timm_hpm.report.flags import paragraph
from timm_hpm.training.recovery import Checkpoint, write_checkpoint

ROOT = Path(__file__).parent.parent


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


# Accuracies


def test_accuracies_are_counted_point_by_point(report):
    assert report.num_images == 10
    assert report.clean_accuracy == 0.8
    # Right in all rows: images 1, 2, 4, 7, 8.
    assert report.robust_accuracy == 0.5
    assert report.robust_accuracy_se == pytest.approx(math.sqrt(0.5 * 0.5 / 10))
    assert report.by_surrogate == {
        "fc": {"apgd-ce": 0.8, "square": 0.8, "worst": 0.7},
        "ste": {"apgd-ce": 0.8, "worst": 0.8},
        "true": {"square": 0.8, "worst": 0.8},
    }
    assert report.baseline == {"clean": 1.0, "apgd-ce": 0.8, "square": 0.6, "worst": 0.4}


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


def test_the_worst_case_is_below_every_row(report):
    for row in report.by_surrogate.values():
        assert all(report.robust_accuracy <= row["worst"] <= accuracy for accuracy in row.values())
    assert report.robust_accuracy <= report.clean_accuracy


@pytest.mark.parametrize(("verdicts", "accuracy", "se"), [("1111", 1.0, 0.0), ("0000", 0.0, 0.0), ("1000", 0.25, None)])
def test_the_standard_error_is_the_binomial_one(verdicts, accuracy, se):
    report = plain({"clean": verdicts})
    assert report.robust_accuracy == report.clean_accuracy == accuracy
    assert report.robust_accuracy_se == pytest.approx(math.sqrt(3) / 8 if se is None else se)
    assert report.by_surrogate == {} and report.baseline == {}


@pytest.mark.parametrize(("right", "n"), [(0, 1), (0, 50), (1, 7), (25, 50), (99, 100), (7, 7)])
def test_the_interval_is_wilson_s(right, n):
    report = plain({"clean": "1" * right + "0" * (n - right)})
    p, ends = right / n, report.robust_accuracy_interval
    # Its ends are the accuracies whose own standard error reaches to p, or 0 and 1.
    for end, bound in zip(ends, (0.0, 1.0), strict=True):
        assert end == bound or (p - end) ** 2 == pytest.approx(1.96 ** 2 * end * (1 - end) / n, rel=1e-3)
    assert 0 <= ends[0] <= p <= ends[1] <= 1 and ends[1] - ends[0] > 0.9 / (n + 4)
    text = f"{100 * ends[0]:.1f} to {100 * ends[1]:.1f}"
    assert f"| clean | {100 * p:.1f} | {text} |" in report_markdown(report) and text in report_page(report)


def test_rows_of_different_lengths_are_not_averaged():
    with pytest.raises(ValueError, match="shorter"):
        _ = plain({"clean": "111", "model/square": "11"}).robust_accuracy


# Files


def test_a_saved_report_is_loaded_equal(report, tmp_path):
    report.save(tmp_path / "report.json")
    loaded = AttackReport.load(tmp_path / "report.json")
    assert loaded == report and loaded.same_results(report)
    data = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert data["robust_accuracy"] == 0.5 and data["by_surrogate"]["fc"]["worst"] == 0.7
    assert data["correct"] == report.correct and data["schema_version"] == 2
    assert data["unreliable"] is True and len(data["flags"]) == 2
    assert data["flags"][0] == {"name": "saturated-softmax", "text": "fc: one-hot at image 4"}
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_a_saved_report_has_a_line_for_each_row(report, tmp_path):
    report.save(tmp_path / "report.json")
    lines = (tmp_path / "report.json").read_text(encoding="utf-8").splitlines()
    assert all(f'  "{name}": "{row}"' in [line.rstrip(",") for line in lines] for name, row in report.correct.items())


def test_a_report_makes_the_folder_it_is_written_into(report, tmp_path):
    report.save(tmp_path / "a" / "b" / "c.json")
    write_report(report, str(tmp_path / "d" / "e"))
    assert AttackReport.load(tmp_path / "a" / "b" / "c.json") == AttackReport.load(tmp_path / "d" / "e" / "report.json")
    assert {path.name for path in (tmp_path / "d" / "e").iterdir()} == {"report.json", "report.md", "report.html"}


def test_a_bare_report_is_loaded_equal(tmp_path):
    report = AttackReport(PROTOCOL | {"num_images": 2}, {"clean": "10"})
    report.save(tmp_path / "report.json")
    assert AttackReport.load(tmp_path / "report.json") == report


def test_same_results_ignores_the_time_and_nothing_else(report):
    def but(**changes) -> AttackReport:
        return dataclasses.replace(report, **changes)

    slower = {name: {**row, "seconds": row["seconds"] + 100} for name, row in report.cost.items()}
    assert report.same_results(but(cost=slower)) and but(cost=slower) != report
    more_passes = {**report.cost, "all": {**report.cost["all"], "forward_passes": 4021}}
    for other in (
        but(cost=more_passes),
        but(protocol={**report.protocol, "seed": 4}),
        but(correct={**report.correct, "clean": "1111111111"}),
        but(baseline_correct={}),
        but(flags=[]),
    ):
        assert not report.same_results(other)
    assert report.cost["all"]["seconds"] == 20.5


@pytest.mark.parametrize("text", ["", "# a table\n", "{", "[]", "3", "null", '"text"', "{}", '{"loss": 1.5}',
                                  '{"schema_version": 2}', '{"schema_version": 2, "protocol": {}}'])
def test_another_file_is_not_loaded(text, tmp_path):
    path = tmp_path / "other.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"other\.json is not a report of timm_hpm .*report\.json that evaluate\.py"):
        AttackReport.load(path)


def test_a_binary_file_is_not_loaded(tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ValueError, match="is not a report of timm_hpm"):
        AttackReport.load(tmp_path / "weights.bin")


NEIGHBOURS = {"batch_size": 4, "mix": 0.9, "kind": "chosen", "targets": 8, "flipped": 2}


@pytest.mark.parametrize(("field", "value", "message"), [
    ("protocol", None, "protocol is None, expected an object"),
    ("protocol", ["threat"], r"protocol is \['threat'\], expected an object"),
    ("protocol", {}, "the protocol's architecture is None, expected a text; it is missing"),
    ("protocol", PROTOCOL | {"num_images": 9}, "the protocol's num_images is 9, expected 10, the number of verdicts"),
    ("protocol", PROTOCOL | {"threat": "8/255"}, "the protocol's threat is '8/255', expected a threat model"),
    ("protocol", PROTOCOL | {"a": {"a": [[[[[[[[1]]]]]]]]}}, "the protocol's a is .*, expected at most 8 levels"),
    ("clean_accuracy", 0.9, "clean_accuracy is 0.9, expected 0.8, by its verdicts"),
    ("correct", "1010", "correct is '1010', expected an object"),
    ("correct", {"fc/square": "10"}, r"correct is \['fc/square'\], expected the row clean among"),
    ("correct", {"clean": ""}, r"the row clean \(0 characters\) is '', expected a text with a 0 or 1 for each image"),
    ("correct", {"clean": 7}, r"the row clean \(1 characters\) is 7, expected a text"),
    ("correct", {"clean": "10", "fc/square": "1"}, r"the row fc/square \(1 characters\) is '1', expected a text"),
    ("correct", {"clean": "10", "fc/square": "1x"}, "the row fc/square .* is '1x'"),
    ("baseline_correct", {"fc/square": "1" * 10}, "baseline_correct is .* expected the row clean among"),
    ("baseline_correct", {"clean": "1"}, "the row clean .* is '1', expected a text with"),
    ("assembled", "1", "the row assembled .* is '1'"),
    ("assembled", None, "the row assembled .* is None"),
    ("examples", {}, r"examples is \{\}, expected an array"),
    ("examples", [{"image": "<b>", "label": 1, "predicted": 2, "amplification": 1.5}],
     "row 0 of examples: its image is '<b>', expected"),
    ("cost", [1], "cost is .*, expected an object"),
    ("cost", {"square": 3}, "the cost of square is 3, expected an object with seconds, forw"),
    ("cost", {"square": {"seconds": 1.5}}, "the cost of square: its forward_passes is None, .*; it is missing"),
    ("neighbours", None, "neighbours is None, expected an array"),
    ("neighbours", [3], "row 0 of neighbours is 3"),
    ("neighbours", [NEIGHBOURS, {"a": 1}], "row 1 of neighbours: its batch_size is None"),
    ("neighbours", [NEIGHBOURS | {"targets": 0}], "its targets is 0, expected a whole number above 0"),
    ("neighbours", [{name: NEIGHBOURS[name] for name in NEIGHBOURS if name != "kind"}], "its kind is None"),
])
def test_a_damaged_report_is_not_loaded(report, field, value, message, tmp_path):
    (tmp_path / "report.json").write_text(json.dumps(report.to_dict() | {field: value}), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"report\.json is not a report of timm_hpm .*{message}"):
        AttackReport.load(tmp_path / "report.json")


def places(value, place=()):
    """Yields the path of every entry of JSON's values, of long arrays and objects of the first and the last."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    for key in keys if len(keys) < 40 else [*keys[:3], *keys[-3:]]:
        yield (*place, key)
        yield from places(value[key], (*place, key))


STRANGE = [None, True, -1, 0, 2.5, 10 ** 400, math.nan, math.inf, "", "<b>|`", "8/255", [], [None], {}, {"a": {"b": 1}}]


def test_a_report_with_a_damaged_entry_is_refused_by_name_or_can_be_shown_and_published(tmp_path):
    file = tmp_path / "report.json"
    whole = json.loads((ROOT / "hub_cards" / "hpm_wrn10_2.digits_linf.report.json").read_text(encoding="utf-8"))
    whole["flags"], whole["examples"] = [{"name": "rough-gradient", "text": "at 3"}], whole["examples"][:1]
    whole["neighbours"] = whole["neighbours"][:1]
    whole["correct"] = {name: whole["correct"][name] for name in ("clean", "ste/apgd-ce", "ste/joint-subset#1")}
    rng, cfg, loaded, refused = random.Random(0), timm.get_pretrained_cfg("hpm_wrn10_2").to_dict(), 0, 0
    file.write_text(json.dumps(whole), encoding="utf-8")
    other = AttackReport.load(file)
    for place in places(whole):
        for value in ["(deleted)", rng.choice(STRANGE)]:
            data = copy.deepcopy(whole)
            *outer, last = place
            holder = functools.reduce(lambda found, key: found[key], outer, data)
            if value == "(deleted)":
                del holder[last]
            else:
                holder[last] = value
            file.write_text(json.dumps(data), encoding="utf-8")
            try:
                report = AttackReport.load(file)
            except ValueError as error:
                assert str(error).startswith(str(file)), (place, value, error)
                refused += 1
                continue
            loaded += 1
            assert report_markdown(report) and report_page(report) and model_info(report)
            assert json.dumps(report.to_dict())
            assert cards.model_card("a", "a", cfg, report=report) and comparison_markdown(compare(report, other))
            assert sweep_page([report]) and isinstance(command.evaluate_command(report.protocol), list)
    assert refused > 150 and loaded > 50


@pytest.mark.parametrize("path", [
    *(path for path in sorted(ROOT.glob("benchmarks/reports/*/*.json")) if path.stem in PROTOCOLS),  # not the naive one
    *sorted(ROOT.glob("hub_cards/*.report.json")),
], ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_the_committed_reports_are_whole(path):
    report = AttackReport.load(path)
    assert report.num_images == report.protocol["num_images"]
    assert report.to_dict() == json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("version", [0, 1, 3, "1", 2.0, True])
def test_another_schema_version_is_named(report, version, tmp_path):
    data = report.to_dict() | {"schema_version": version}
    (tmp_path / "report.json").write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ValueError, match=f"has the schema version {version!r}; this timm_hpm reads 2"):
        AttackReport.load(tmp_path / "report.json")


def test_an_unknown_flag_is_refused(report, tmp_path):
    with pytest.raises(ValueError, match="unknown flag 'odd'; expected one of clean-near-chance"):
        Flag("odd", "")
    data = report.to_dict()
    data["flags"][0]["name"] = "odd"
    (tmp_path / "report.json").write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ValueError, match=r"is not a report of timm_hpm .*unknown flag 'odd'"):
        AttackReport.load(tmp_path / "report.json")


@pytest.mark.parametrize(("name", "unreliable"), FLAGS.items())
def test_each_flag_has_its_paragraph(name, unreliable):
    assert len(paragraph(name)) > 200 and paragraph(name).startswith("**Unreliable.** ") == unreliable


def test_the_data_digest_tells_images_labels_and_their_order_apart():
    images, labels = torch.rand(3, 1, 4, 4), torch.tensor([0, 1, 2])
    digest = data_digest(images, labels)
    assert re.fullmatch("[0-9a-f]{16}", digest) and data_digest(images.clone(), labels.int()) == digest
    assert data_digest(images.to(memory_format=torch.channels_last), labels) == digest
    changed = images.clone()
    changed[2, 0, 3, 3] += 0.01
    others = [(changed, labels), (images, labels.flip(0)), (images.flip(0), labels), (images.view(3, 1, 2, 8), labels)]
    assert len({digest, *(data_digest(*other) for other in others)}) == 5


def test_a_missing_report_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        AttackReport.load(tmp_path / "report.json")


# Markdown


def table_row(markdown: str, name: str) -> list[str]:
    """Returns the cells of the first table row that begins with `name`."""
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in markdown.splitlines()
            if line.startswith("|")]
    return next(row[1:] for row in rows if row[0] == name)


def test_markdown_holds_the_numbers(report):
    markdown = report_markdown(report)
    assert markdown.startswith("# Mixed Surrogate Attack: hpm_wrn10_2\n")
    assert table_row(markdown, "surrogate") == ["apgd-ce", "square", "worst"]
    assert table_row(markdown, "fc") == ["80.0", "80.0", "70.0"]
    assert table_row(markdown, "ste") == ["80.0", "", "80.0"]
    assert table_row(markdown, "true") == ["", "80.0", "80.0"]
    assert table_row(markdown, "clean") == ["80.0", "49.0 to 94.3"]
    assert table_row(markdown, "**robust, worst case over all rows**") == ["50.0", "23.7 to 76.3"]
    assert table_row(markdown, "FC classifier of the same network, clean") == ["100.0", "72.2 to 100.0"]
    assert table_row(markdown, "FC classifier of the same network, under AutoAttack's components") == [
        "40.0", "16.8 to 68.7"]
    assert table_row(markdown, "threat") == ["Linf:0.1"]
    assert table_row(markdown, "surrogates") == ["fc, ste"]
    assert table_row(markdown, "attacks") == ["apgd-ce iterations 100"]
    assert table_row(markdown, "apgd-ce") == ["12.2", "2,010", "2,000"]
    assert table_row(markdown, "all") == ["20.5", "4,020", "2,001"]
    assert "\n- [saturated-softmax](#saturated-softmax): fc: one-hot at image 4\n" in markdown
    assert "\n**Unreliable**: " in markdown and "[zero-gradient](#zero-gradient): at 9 of" in markdown
    for name in ("saturated-softmax", "zero-gradient"):
        assert f"\n### {name}\n\n{paragraph(name)}\n" in markdown


def test_markdown_of_a_plain_classifier_has_no_baseline_and_no_warnings():
    markdown = report_markdown(plain({"clean": "11", "model/square": "10"}))
    assert table_row(markdown, "model") == ["50.0", "50.0"]
    assert "FC classifier" not in markdown and "Warnings" not in markdown


def test_every_table_of_the_markdown_has_rows_of_one_width(report):
    tables = [block.splitlines() for block in report_markdown(report).split("\n\n") if block.startswith("|")]
    assert len(tables) == 4
    for table in tables:
        assert len({line.count("|") for line in table}) == 1


HOSTILE = ["<script>alert(1)</script>", "a | b", "a\n\n# A heading\n- a list", "`code` ``` ```", "[a](javascript:b)",
           "**bold** _it_ ~~gone~~ $x$", "&lt;b&gt; \\", "\x1b[31mred\u202e", "<!-- ", "| --- |\r\n| x |", "\udcff"]


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
    assert closing and re.match(b"python\nevaluate.py\n--model[\n=]" + re.escape(os.fsencode(text)) + b"\n", words)
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


# Files that appear whole or not at all


def test_replacing_puts_the_new_file_in_place(tmp_path):
    path = tmp_path / "report.json"
    path.write_text("old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old" and temporary.parent == tmp_path
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("written", [True, False])
def test_replacing_leaves_the_old_file_and_no_other_when_the_block_raises(tmp_path, written):
    path = tmp_path / "report.json"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        if written:
            temporary.write_text("half of the n")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


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


def test_write_text_writes_utf_8(tmp_path):
    write_text(tmp_path / "a.md", "ℓ2 – ε")
    assert (tmp_path / "a.md").read_bytes() == "ℓ2 – ε".encode()
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("write", [
    lambda path: write_text(path, "x" * 50_000),
    lambda path: _replaced(path, lambda new: save_file({"a": torch.ones(50_000)}, new)),
    lambda path: save_parts({"a": Parts(torch.ones(50_000), iter([torch.ones(50_000)]))}, path, {}),
    lambda path: _in_new_folder(path, lambda new: save_file({"a": torch.ones(50_000)}, new / "a")),
    lambda path: write_checkpoint(path, Checkpoint({"a": torch.ones(50_000)}, None, {}, PROGRESS, {}), 1),
    lambda path: write_checkpoint(path, Checkpoint({}, None, {"a": torch.ones(50_000)}, PROGRESS, {}), 1),
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


PROGRESS = {"epoch": 0, "batches": 0}


def _replaced(path, write):
    with replacing(path) as temporary:
        write(temporary)


def _in_new_folder(path, write):
    with new_folder(path) as temporary:
        write(temporary)


def test_writable_folder_makes_it_and_leaves_it_empty(tmp_path):
    folder = writable_folder(tmp_path / "runs" / "one")
    assert folder == tmp_path / "runs" / "one" and list(folder.iterdir()) == []
    (folder / "kept").touch()
    assert list(writable_folder(str(folder)).iterdir()) == [folder / "kept"]


@pytest.mark.parametrize("below", ["", "run"])
def test_writable_folder_names_the_folder_that_a_file_stands_in_the_way_of(tmp_path, below):
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / below
    with pytest.raises(OSError, match=r"Choose another \(--output\)") as error:
        writable_folder(folder)
    assert str(error.value).startswith(f"cannot write into the output folder {folder}: ")


def test_a_long_list_of_the_protocol_is_shown_by_its_first_entries_and_its_length(report):
    names = [f"class-{i}" for i in range(1000)]
    for number, expected in ((20, ", ".join(names[:20])), (1000, f"{', '.join(names[:10])}, ... (1000 in all)")):
        text = dataclasses.replace(report, protocol=report.protocol | {"class_names": names[:number]})
        assert f"| class_names | {expected} |" in report_markdown(text) and expected in report_page(text)
