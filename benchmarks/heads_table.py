"""docs/results.md, made of the reports of heads.py and of the sensitivity studies."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Final

from timm_hpm import AttackReport
from timm_hpm.report.compare import paired
from timm_hpm.report.metrics import most_errors_accuracy, right_in_all
from timm_hpm.sensitivity import Sensitivity

HERE: Final = Path(__file__).parent
REPORTS: Final = HERE / "reports" / "heads"
STUDIES: Final = HERE / "reports" / "sensitivity"
TEXT: Final = HERE / "heads_text.md"
NAMES: Final = {"fc": "FC", "dataset": "ℓ2 (dataset)", "sample": "HPM, sample", "batch": "HPM, batch"}
# Points that a head may lose and still count as no worse.
MARGIN: Final = 0.4

_PLACE: Final = r"^\{(.+)\}$"

#: The trained and the judged mode, to a report for each seed.
Heads = dict[tuple[str, str], dict[int, AttackReport]]


@dataclass(frozen=True)
class Difference:
    """A difference of two accuracies in points: its mean over seeds, and its standard error.

    That is the larger one of two: over the images, of each image's mean over the seeds, and over the seeds.
    """

    mean: float
    error: float
    one_seed: bool = False

    def __str__(self) -> str:
        return f"{self.mean:+.1f} ± {self.error:.1f}".replace("-", "−") + (" (1 seed)" if self.one_seed else "")

    def verdict(self, claim: str) -> str:
        """Returns whether the difference confirms that it is `"above"` or `"below"` 0, or `"not below"` −`MARGIN`."""
        low, high = self.mean - 2 * self.error, self.mean + 2 * self.error
        if claim == "below":
            low, high = -high, -low
        bound = -MARGIN if claim == "not below" else 0
        if low > bound:
            return "confirmed"
        return "refuted" if high < bound else "undecided"


def difference(pairs: Sequence[tuple[Sequence[bool], Sequence[bool]]]) -> Difference:
    """Returns the difference of verdicts of the same images, a pair (of b, then of a) for each seed: a less b."""
    by_seed = [[int(a) - int(b) for b, a in zip(*pair, strict=True)] for pair in pairs]
    errors = [_error([mean(image) for image in zip(*by_seed, strict=True)])]
    if len(by_seed) > 1:
        errors.append(_error([mean(seed) for seed in by_seed]))
    return Difference(100 * mean(map(mean, by_seed)), 100 * max(errors), len(by_seed) == 1)


def _error(values: Sequence[float]) -> float:
    return stdev(values) / len(values) ** 0.5


def clean(report: AttackReport) -> list[bool]:
    """Returns whether each image is right without an attack."""
    return right_in_all([report.correct["clean"]])


def worst(report: AttackReport) -> list[bool]:
    """Returns whether each image is right under every candidate."""
    return right_in_all(report.verdicts.values())


def realised(report: AttackReport) -> list[bool]:
    """Returns whether each image is right in the version of its batch that has the most errors."""
    if not report.assembled:
        return worst(report)
    size, rows = report.protocol["batch_size"], list(report.verdicts.values())
    found = "".join(min((row[first:first + size] for row in rows), key=lambda part: part.count("1"))
                    for first in range(0, report.num_images, size))
    assert found.count("1") / len(found) == most_errors_accuracy(rows, size)
    return right_in_all([found])


def claimed(report: AttackReport) -> list[bool]:
    """Returns whether each image is right under AutoAttack's attacks on the FC classifier alone."""
    return right_in_all(report.correct[name] for name in ("clean", "fc/apgd-ce", "fc/apgd-t", "fc/square"))


def read_heads(place: Path = REPORTS) -> tuple[dict[str, Heads], dict[str, Heads]]:
    """Returns the reports of a folder by base, and those of the attacks on the FC classifier alone."""
    found: tuple[dict[str, Heads], dict[str, Heads]] = ({}, {})
    for folder, reports in zip((place, place / "fc-alone"), found, strict=True):
        for file in sorted(folder.glob("*.json")):
            name, mode, judged, seed = file.stem.rsplit("-", 3)
            reports.setdefault(name, {}).setdefault((mode, judged), {})[int(seed)] = AttackReport.load(file)
    return found


def spread(rows: Sequence[Sequence[bool]]) -> str:
    """Returns the mean ± standard error over seeds of accuracies, in %."""
    values = [100 * mean(row) for row in rows]
    return f"{mean(values):.1f}" + (f" ± {_error(values):.1f}" if len(values) > 1 else "")


def accuracies(heads: Heads, alone: Heads) -> list[str]:
    """Returns the table of a base's accuracies."""
    lines = ["| head | clean | worst case | realised | attacks on FC alone claim | flipped by chosen (perturbed) "
             "neighbours |", "|---|---:|---:|---:|---:|---:|"]
    for (mode, judged), reports in _ordered(heads):
        rows = list(reports.values())
        sources = reports if judged == "fc" else alone.get((mode, judged), {})
        lines.append("| " + " | ".join([
            _title(mode, judged), *(spread([rule(report) for report in rows]) for rule in (clean, worst)),
            spread([realised(report) for report in rows]) if judged == "batch" else "=",
            spread([claimed(report) for report in sources.values()]) if sources else "", neighbours(rows)]) + " |")
    return lines


def reruns(bases: Mapping[str, Heads], again: Mapping[str, Heads]) -> list[str]:
    """Returns each accuracy of further seeds less the mean of the first, beside the standard error of that."""
    lines = ["| head, seed | clean | worst case | realised |", "|---|---:|---:|---:|"]
    for name, heads in again.items():
        for (mode, judged), reports in _ordered(heads):
            for seed, report in sorted(reports.items()):
                first = bases[name][mode, judged].values()
                cells = [rerun(rule(report), [rule(other) for other in first]) for rule in (clean, worst, realised)]
                lines.append(f"| {NAMES[judged]}, {seed} | {' | '.join(cells[:3 if judged == 'batch' else 2])} |"
                             + ("" if judged == "batch" else " = |"))
    return lines


def rerun(new: Sequence[bool], first: Sequence[Sequence[bool]]) -> str:
    """Returns the accuracy of a new seed in %, and its difference from the mean of the first ± its standard error."""
    values = [100 * mean(row) for row in first]
    error = stdev(values) * (1 + 1 / len(values)) ** 0.5
    return f"{100 * mean(new):.1f} ({Difference(100 * mean(new) - mean(values), error)})"


def neighbours(reports: Sequence[AttackReport]) -> str:
    """Returns how many correctly classified images flip in batches of 50, in %."""
    rows = [row for report in reports for row in report.neighbours or () if row["batch_size"] == 50]
    if not rows:
        return ""
    chosen, perturbed = (mean(100 * row["flipped"] / row["targets"] for row in rows if row["kind"] == kind)
                         for kind in ("chosen", "adversarial"))
    return f"{chosen:.0f} ({perturbed:.0f})"


def differences(heads: Heads) -> list[str]:
    """Returns the table of the differences from the FC classifier fine-tuned alike, with their tests."""
    fc = heads["fc", "fc"]
    lines = ["| head less FC | clean | worst case | p | realised | p |", "|---|---:|---:|---|---:|---|"]
    for (mode, judged), reports in _ordered(heads):
        seeds = sorted(reports.keys() & fc.keys())
        if mode != judged or judged == "fc" or not seeds:
            continue
        cells = [str(difference([(clean(fc[seed]), clean(reports[seed])) for seed in seeds]))]
        for rule in (worst, realised) if judged == "batch" else (worst,):
            pairs = [(rule(fc[seed]), rule(reports[seed])) for seed in seeds]
            cells += [str(difference(pairs)), _p_values(pairs)]
        cells += ["=", ""] if judged != "batch" else []
        lines.append("| " + " | ".join([NAMES[judged], *cells]) + " |")
    return lines


def _p_values(pairs: Sequence[tuple[Sequence[bool], Sequence[bool]]]) -> str:
    """Returns the p-value of McNemar's test of each pair."""
    rows = (paired("", ["".join(map(str, map(int, b)))], ["".join(map(str, map(int, a)))]) for b, a in pairs)
    return ", ".join("<0.001" if row.p_value < 0.001 else f"{row.p_value:.3f}" for row in rows)


def _ordered(heads: Heads) -> list[tuple[tuple[str, str], dict[int, AttackReport]]]:
    order = list(NAMES)
    return sorted(heads.items(), key=lambda item: (item[0][0] != item[0][1], order.index(item[0][1])))


def _title(mode: str, judged: str) -> str:
    return NAMES[judged] if mode == judged else f"{NAMES[judged]}, not trained"


@dataclass(frozen=True)
class Claim:
    """A claim of the paper about two heads: that `rule` of a is `"above"`, `"below"` or `"not below"` that of b."""

    text: str
    a: tuple[str, str]
    b: tuple[str, str]
    rule: Callable[[AttackReport], list[bool]]
    expected: str
    against: Callable[[AttackReport], list[bool]] | None = None

    def measure(self, heads: Heads) -> Difference | None:
        """Returns a less b over the seeds that both have, or None if there is none."""
        a, b = heads.get(self.a, {}), heads.get(self.b, {})
        seeds = sorted(a.keys() & b.keys())
        return difference([((self.against or self.rule)(b[seed]), self.rule(a[seed])) for seed in seeds]) \
            if seeds else None


FC, L2, BATCH = ("fc", "fc"), ("dataset", "dataset"), ("batch", "batch")
CLAIMS: Final = (
    Claim("ℓ2 is more robust than FC: worst case", L2, FC, worst, "above"),
    Claim("ℓ2 is less accurate than FC: clean", L2, FC, clean, "below"),
    Claim("HPM (batch) is more robust than FC: realised by one adversary", BATCH, FC, realised, "above"),
    Claim("HPM (batch) is more robust than FC: worst case", BATCH, FC, worst, "above"),
    Claim(f"HPM (batch) is as accurate as FC, or less so by at most {MARGIN} points: clean", BATCH, FC, clean,
          "not below"),
    Claim(f"HPM (batch) is as robust as ℓ2, or less so by at most {MARGIN} points: realised", BATCH, L2, realised,
          "not below"),
    Claim("HPM (batch) is more accurate than ℓ2: clean", BATCH, L2, clean, "above"),
    Claim("A little fine-tuning through it makes HPM (batch) more robust: realised", BATCH, ("fc", "batch"), realised,
          "above"),
    Claim("An attack on the FC classifier alone overstates HPM (batch): its claim less the realised accuracy",
          ("batch", "alone"), BATCH, claimed, "above", realised),
    Claim("An attack on the FC classifier alone overstates ℓ2: its claim less the accuracy", ("dataset", "alone"), L2,
          claimed, "above", worst),
)


def claims(bases: Mapping[str, Heads], studies: Mapping[str, Sequence[Sensitivity]]) -> list[str]:
    """Returns a row for each claim: the difference in points and the verdict on each base, and the verdict of all."""
    lines = ["| claim: measure | " + " | ".join(bases) + " | verdict |", "|---|" + "---:|" * len(bases) + "---|"]
    rows = [(claim.text, {name: (found, claim.expected) for name, heads in bases.items()
                          if (found := claim.measure(heads))}) for claim in CLAIMS]
    rows.insert(0, ("FC is more sensitive than ℓ2: part of the margin lost per unit of feature shift, in %, on the "
                    "robust network", {name: (sensitivity_gap(some[-1]), "above") for name, some in studies.items()}))
    for text, found in rows:
        verdicts = {name: gap.verdict(expected) for name, (gap, expected) in found.items()}
        cells = [f"{found[name][0]}: {verdicts[name]}" if name in found else "" for name in bases]
        lines.append("| " + " | ".join([text, *cells, f"**{total_verdict(list(verdicts.values()))}**"]) + " |")
    return lines


def total_verdict(verdicts: Sequence[str]) -> str:
    """Returns the verdict on a claim over all bases: one base can refute it, all must confirm it."""
    decided = set(verdicts) - {"undecided"}
    if len(decided) == 2:
        return "mixed"
    if decided == {"confirmed"} and "undecided" in verdicts:
        return "confirmed in part"
    return decided.pop() if decided else "undecided"


def sensitivity_gap(study: Sensitivity) -> Difference:
    """Returns FC's sensitivity less that of ℓ2 at the radius nearest to the threat model's, over the classes, in %.

    A class counts in parts of its head's mean margin over all images: its own may be negative.
    """
    eps = training_eps(study)
    fc, l2 = ({label: at.margin_lost / row.overall.margin / at.feature_shift for label, at in row.by_class.items()}
              for head in ("fc", "dataset") for row in study.rows if row.head == head and row.eps == eps)
    gaps = [100 * (fc[label] - l2[label]) for label in fc]
    return Difference(mean(gaps), _error(gaps))


def training_eps(study: Sensitivity) -> float:
    """Returns the radius of the study that is nearest to 0.1, for which its networks were trained."""
    return min((row.eps for row in study.rows), key=lambda eps: abs(eps - 0.1))


def read_studies() -> dict[str, list[Sensitivity]]:
    """Returns the studies by base: of the normally trained network, then of the robust one."""
    return {folder.name: [Sensitivity.load(folder / f"{name}.json") for name in ("normal", "robust")]
            for folder in sorted(STUDIES.iterdir())} if STUDIES.exists() else {}


def study_table(study: Sensitivity) -> list[str]:
    """Returns the accuracy of each head against every second eps, in brackets the naive one, and its sensitivity."""
    radii = sorted({row.eps for row in study.rows})[1::2]
    eps = training_eps(study)
    lines = ["| head | " + " | ".join(f"eps {radius:.3g}" for radius in [0, *radii])
             + " | feature shift | sensitivity |", "|---|" + "---:|" * (len(radii) + 3)]
    for head, right in study.clean.items():
        rows = {row.eps: row.overall for row in study.rows if row.head == head}
        cells = [f"{100 * right:.1f}", *(f"{100 * rows[radius].accuracy:.1f} ({100 * rows[radius].naive_accuracy:.1f})"
                                         for radius in radii)]
        at = rows[eps]
        cells += [f"{at.feature_shift:.2f}", f"{at.sensitivity:.2f}"]
        lines.append("| " + " | ".join([NAMES[head], *cells]) + " |")
    return lines


def page() -> str:
    """Returns docs/results.md: the text of heads_text.md with the tables that it names in braces."""
    bases, alone = read_heads()
    studies = read_studies()
    tables = {"claims": claims({name: heads | {(mode, "alone"): alone.get(name, {}).get((mode, mode), {})
                                               for mode in ("batch", "dataset")}
                                for name, heads in bases.items()}, studies)}
    for name, heads in bases.items():
        first = next(iter(heads["fc", "fc"].values()))
        about = (f"{first.num_images:,} test images, {first.protocol['threat']}, protocol "
                 f"`{first.protocol['protocol']}`, batches of {first.protocol['batch_size']}, "
                 f"seeds: {', '.join(map(str, sorted(heads['fc', 'fc'])))}.")
        tables[name] = [about, "", *accuracies(heads, alone.get(name, {})), "", *differences(heads)]
    if again := read_heads(REPORTS / "rerun")[0]:
        tables["rerun"] = reruns(bases, again)
    for name, some in studies.items():
        for kind, study in zip(("normal", "robust"), some, strict=True):
            tables[f"{name}, {kind}"] = study_table(study)
    return filled(TEXT.read_text(encoding="utf-8"), tables)


def filled(text: str, tables: Mapping[str, Sequence[str]]) -> str:
    """Returns a text with each table in the place of its name in braces, without the sections of tables not there.

    Raises:
        ValueError: if the text names a table never or more than once.
    """
    if wrong := [name for name in tables if text.count(f"{{{name}}}") != 1]:
        raise ValueError(f"{TEXT} has not one place, a line {{NAME}}, for each of {', '.join(wrong)}")
    sections = re.split(r"^(?=## )", text, flags=re.MULTILINE)
    kept = [section for section in sections if set(re.findall(_PLACE, section, re.MULTILINE)) <= tables.keys()]
    return re.sub(_PLACE, lambda place: "\n".join(tables[place[1]]), "".join(kept), flags=re.MULTILINE).rstrip() + "\n"
