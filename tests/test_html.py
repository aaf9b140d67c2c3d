"""The HTML report: what is in it, that it asks for nothing from elsewhere, and that a real browser shows all of it."""

import base64
import dataclasses
import json
import re
import shutil
import subprocess
from html import unescape
from io import BytesIO
from pathlib import Path

import pytest
import torch
from html_page import Page
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from timm_hpm import AttackReport, report_page
from timm_hpm.report import FLAGS, Convergence, Flag, make_example, svg
from timm_hpm.report.sweep_page import sweep_page

ROOT = Path(__file__).parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def report() -> AttackReport:
    """The embedded model's report in batch mode, with neighbours, odd examples and all flags."""
    committed = AttackReport.load(ROOT / "benchmarks" / "reports" / "digits" / "standard.json")
    examples = [make_example(i, 3, 8, "soft/fab-t", clean, (clean + 0.03 * torch.randn_like(clean)).clamp(0, 1))
                for i, clean in enumerate([torch.rand(1, 8, 8), torch.rand(3, 32, 32), torch.rand(3, 300, 200),
                                           torch.rand(5, 9, 9)])]
    flags = [Flag(name, f"seen at <{i}> images & more") for i, name in enumerate(FLAGS)]
    neighbours = [{"batch_size": 10, "mix": 0.9, "kind": kind, "targets": 48, "flipped": flipped}
                  for kind, flipped in (("reshuffled", 2.4), ("adversarial", 31))]
    convergence = Convergence([None if robust else 50.0 for robust in committed.robust], 80.0, [0.5] * 360, 1.0)
    return dataclasses.replace(committed, examples=examples, flags=flags, neighbours=neighbours,
                               convergence=convergence, protocol=committed.protocol | {"options": {}})


def test_the_page_holds_the_report_s_numbers(report):
    page = Page(report_page(report))
    assert "Mixed Surrogate Attack: hpm_wrn10_2" in page.text
    for value, name in ((report.clean_accuracy, "clean"), (report.robust_accuracy, "robust accuracy under Linf:0.1"),
                        (report.realised_robust_accuracy, "robust, in the judged batches with most errors"),
                        (report.assembled_robust_accuracy, "robust, in batches assembled of what broke each"),
                        (report.baseline["worst"], "FC classifier of the same network, under")):
        assert re.search(rf"{100 * value:.1f} %{name}.*? \(\d+\.\d to \d+\.\d\)", page.text)
    for surrogate, row in report.by_surrogate.items():
        for attack, value in row.items():
            assert re.search(rf"{surrogate}, {attack}: {100 * value:.1f} % \(\d+\.\d to \d+\.\d\)", page.text)
    assert report.protocol["weights_digest"] in page.text and "Unreliable." in page.text


def test_the_accuracy_falls_with_the_passes_in_the_order_in_which_the_attacks_ran():
    fell_after = [10.0, 10.0, None, 80.0, 80.0, 80.0, None, None, None, 0.0]
    report = AttackReport(
        {"architecture": "Linear"},
        {"clean": "1111111110", "a/apgd-ce": "0111111111", "a/square": "1110001111", "b/apgd-ce": "1011111111"},
        convergence=Convergence(fell_after, 80.0, [0.5] * 10, 1.0))
    html = report_page(report)
    assert [unescape(title) for title in re.findall(r"<title>(after .*?)</title>", html)] == [
        "after apgd-ce, 10 passes: 70.0 %", "after square, 80 passes: 40.0 %"]
    plot = re.search(r"passes spent'.*?</svg>", html)[0]
    x, y = zip(*[map(float, point.split(",")) for point in re.search(r"points='(.*?)'", plot)[1].split()], strict=True)
    left, right = svg._LEFT - 70, svg._WIDTH - svg._RIGHT
    middle = left + (right - left) / 4  # from 5 to 80 passes, four doublings
    assert x == pytest.approx([left, middle, middle, right, right], abs=0.1)
    # A horizontal line, and down by 20 points and then by 30.
    assert y[0] == y[1] and y[2] == y[3] and (y[2] - y[1]) / (y[4] - y[3]) == pytest.approx(2 / 3, abs=0.01)
    shade = re.search(r"<rect x='(.*?)'", plot)[1]
    assert float(shade) == pytest.approx(right - (right - left) / 4, abs=0.1)
    assert "passes spent" not in report_page(dataclasses.replace(report, convergence=None))


def test_the_page_asks_for_nothing_from_elsewhere(report):
    html = report_page(report)
    page = Page(html)
    assert not page.all("script") and "http" not in html and "url(" not in html
    assert all(tag["src"].startswith("data:image/png;base64,") for tag in page.all("img"))
    # Large pictures are made small, others are kept.
    assert [tuple(picture(example.adversarial).shape) for example in report.examples] == [
        (1, 8, 8), (3, 32, 32), (3, 100, 67), (1, 9, 9)]
    assert len(page.all("img")) == 3 * len(report.examples) and all(tag["alt"] for tag in page.all("img"))
    assert [tag["href"] for tag in page.all("link")] == ["data:,"]


def test_every_warning_leads_to_its_paragraph(report):
    page = Page(report_page(report))
    links = [tag["href"] for tag in page.all("a")]
    assert links == [f"#{flag.name}" for flag in report.flags]
    assert {tag["id"] for tag in page.all("dt")} == set(FLAGS)
    assert "`" not in page.text and "](" not in page.text
    assert "seen at <3> images & more" in page.text


def test_a_bare_report_is_a_whole_page():
    page = Page(report_page(AttackReport({"architecture": "<b>Linear</b>"}, {"clean": "10"})))
    assert "<b>Linear</b>" in page.text and "50.0 %robust accuracy (9.5 to 90.5)" in page.text
    assert "Warnings" not in page.text and not page.all("img")


def picture(png: str) -> torch.Tensor:
    return pil_to_tensor(Image.open(BytesIO(base64.b64decode(png))))


def test_an_example_s_pictures_are_what_they_say():
    clean = torch.full((3, 4, 4), 100 / 255)
    adversarial = clean.clone()
    adversarial[:, 0, 0] += 10 / 255
    adversarial[:, 3, 3] -= 10 / 255
    example = make_example(5, 1, 2, "fc/square", clean, adversarial)
    pictures = [picture(data) for data in (example.clean, example.perturbation, example.adversarial)]
    assert torch.equal(pictures[0], torch.full((3, 4, 4), 100, dtype=torch.uint8))
    assert example.amplification == pytest.approx(12.75)
    assert (pictures[1][0, 0, 0], pictures[1][0, 1, 1], pictures[1][0, 3, 3]) == (255, 128, 0)
    assert (pictures[2][0, 0, 0], pictures[2][0, 3, 3]) == (110, 90)


def test_dots_and_error_bars_stand_where_their_values_are():
    points = {"a": svg.Point(0, 0.5, 0.4, 0.6), "b": svg.Point(0, 1.0)}
    plot = svg.dots({"fc": points}, ["a", "b"], {"clean": 1.0}, "a plot")
    places = [float(x) for x in re.findall(r"<g>.*?<circle cx='([\d.]+)'", plot)]
    # The axis begins at 30 %, the tenth below the error bar's end.
    left, right = svg._LEFT, svg._WIDTH - svg._RIGHT
    assert places == pytest.approx([left + (right - left) * 2 / 7, right], abs=0.1)
    bar = re.search(r"<g><title>.*?<line x1='(.+?)' y1='.+?' x2='(.+?)'", plot)
    assert float(bar[2]) - float(bar[1]) == pytest.approx(0.2 * (right - left) / 0.7, abs=0.1)


def test_a_curve_of_one_point_and_a_flat_one_are_drawn():
    plot = svg.curves({"batch": [svg.Point(0.1, 0.0)], "fc": [svg.Point(0.1, 1.0, 0.9, 1.0)]}, "eps", "a plot")
    assert plot.count("<polyline") == 2 and "nan" not in plot
    assert "nan" not in svg.stairs(1.0, [svg.Step(1e-9, 1.0, "square", "")], "passes", "a plot")


def browse(html: str, folder: Path, width: int = 900) -> list:
    """Returns what a browser sees: images, those shown, plots shown, cut texts, whether the page fits; and its log."""
    # The page itself has no script: this one is the test's, and writes down what it sees.
    probe = """<script>addEventListener("load", () => {
        const images = [...document.images], plots = [...document.querySelectorAll("svg")];
        document.title = JSON.stringify([images.length, images.filter(i => i.complete && i.naturalWidth > 0).length,
            plots.filter(p => p.getBoundingClientRect().height > 50).length,
            [...document.querySelectorAll("svg text")].filter(t => {
                const box = t.getBoundingClientRect(), plot = t.closest("svg").getBoundingClientRect();
                return box.left < plot.left - 1 || box.right > plot.right + 1 || box.bottom > plot.bottom + 1;
            }).map(t => t.textContent),
            document.documentElement.scrollWidth <= innerWidth]); })</script>"""
    (folder / "page.html").write_text(html.replace("</head>", probe + "</head>"), encoding="utf-8")
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         f"--user-data-dir={folder / 'profile'}", f"--window-size={width},900", "--enable-logging=stderr", "--v=0",
         "--dump-dom", f"file://{folder / 'page.html'}"],
        capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    log = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return [*json.loads(unescape(re.search(r"<title>(.*?)</title>", done.stdout)[1])), log]


needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to look at the page with")


@needs_browser
@pytest.mark.parametrize("width", [1300, 400])
def test_a_browser_shows_every_picture_and_reports_no_error(report, tmp_path, width):
    assert browse(report_page(report), tmp_path, width) == [12, 12, 2, [], True, []]


@needs_browser
def test_a_browser_shows_a_sweep(report, tmp_path):
    reports = [dataclasses.replace(report, protocol=report.protocol | {"threat": f"Linf:{i}/255", "inference": mode})
               for mode in ("batch", "sample") for i in range(1, 30)]
    assert browse(sweep_page(reports), tmp_path) == [0, 0, 1, [], True, []]
