"""docs/results.md, made of the reports of heads.py and of the sensitivity studies."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Final

import yaml

from timm_hpm import AttackReport
from timm_hpm.report.compare import paired
from timm_hpm.report.metrics import most_errors_accuracy, right_in_all
from timm_hpm.sensitivity import Sensitivity

HERE: Final = Path(__file__).parent
REPORTS: Final = HERE / "reports" / "heads"
STUDIES: Final = HERE / "reports" / "sensitivity"
TEXT: Final = HERE / "heads_text.md"
CONFIGS: Final = HERE / "heads.yaml"
NAMES: Final = {"fc": "FC", "dataset": "ℓ2", "sample": "sample", "batch": "HPM"}
MARKS: Final = {"confirmed": " ✓", "refuted": " ✗", "undecided": ""}
# Points that a head may lose and still count as no worse.
MARGIN: Final = 0.4

_PLACE: Final = r"^\{(.+)\}$"

#: The trained and the judged mode, to a report for each seed.
Heads = dict[tuple[str, str], dict[int, AttackReport]]


@dataclass(frozen=True)
class Difference:
    """A difference of two accuracies in points: its mean over seeds, and its standard error.

    That is the larger one of two: over the images, of each image's mean over the seeds, and over the seeds. One seed
    lacks the latter, and is marked.
    """

    mean: float
    error: float
    one_seed: bool = False

    def __str__(self) -> str:
        return f"{self.mean:+.1f} ± {self.error:.1f}".replace("-", "−") + "¹" * self.one_seed

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


def bases_table(bases: Mapping[str, Heads]) -> list[str]:
    """Returns a row for each base: its origin, images and seeds, and the options of the command that measured it."""
    configs = yaml.safe_load(CONFIGS.read_text(encoding="utf-8"))
    rows = [["base", "weights", "test images", "threat", "batches", "seeds", "options"]]
    for name, heads in bases.items():
        first = next(iter(next(iter(heads.values())).values()))
        rows.append([name, configs[name]["about"], f"{first.num_images:,}", f"{first.protocol['threat']}",
                     f"{first.protocol['batch_size']}", ", ".join(map(str, sorted(set().union(*heads.values())))),
                     f"`{configs[name]['options']}`"])
    return _table(rows, left=2)


def accuracies(bases: Mapping[str, Heads], alone: Mapping[str, Heads]) -> list[str]:
    """Returns the accuracies of all bases."""
    rows = [["base, head", "clean", "worst case", "realised", "p against FC", "attacks on FC alone", "flipped"]]
    for name, heads in bases.items():
        for (mode, judged), reports in _ordered(heads):
            claim, claims = (worst, reports) if judged == "fc" else (
                claimed, alone.get(name, {}).get((mode, judged), {}))
            rows.append([f"{name}, {_title(mode, judged)}",
                         *(spread([rule(report) for report in reports.values()]) for rule in _rules(judged)),
                         *[""] * (judged != "batch"),
                         _p_values(heads.get(FC, {}), reports, _rules(judged)[-1]) if mode == judged != "fc" else "",
                         spread([claim(report) for report in claims.values()]) if claims else "",
                         neighbours(list(reports.values()))])
    return _table(rows)


def _p_values(fc: Mapping[int, AttackReport], reports: Mapping[int, AttackReport],
              rule: Callable[[AttackReport], list[bool]]) -> str:
    """Returns the p-values of McNemar's test against FC's worst case, by seed."""
    rows = (paired("", *(["".join(map(str, map(int, row)))] for row in (worst(fc[seed]), rule(reports[seed]))))
            for seed in sorted(reports.keys() & fc.keys()))
    return ", ".join("<0.001" if row.p_value < 0.001 else f"{row.p_value:.3f}" for row in rows)


def _rules(judged: str) -> tuple[Callable[[AttackReport], list[bool]], ...]:
    """Returns the rules by which a mode is counted: all but `realised` if no image depends on another."""
    return (clean, worst, realised) if judged == "batch" else (clean, worst)


def _table(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Returns a table of Markdown, its head first; the columns behind the first `left` are of numbers."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [lines[0], "|" + "---|" * left + "---:|" * (len(rows[0]) - left), *lines[1:]]


def neighbours(reports: Sequence[AttackReport]) -> str:
    """Returns how many correctly classified images flip in batches of 50, in %."""
    rows = [row for report in reports for row in report.neighbours or () if row["batch_size"] == 50]
    if not rows:
        return ""
    chosen, perturbed = (mean(100 * row["flipped"] / row["targets"] for row in rows if row["kind"] == kind)
                         for kind in ("chosen", "adversarial"))
    return f"{chosen:.0f} ({perturbed:.0f})"


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
    Claim("ℓ2 is more robust than FC (worst case)", L2, FC, worst, "above"),
    Claim("ℓ2 is less accurate than FC (clean)", L2, FC, clean, "below"),
    Claim("HPM is more robust than FC (realised)", BATCH, FC, realised, "above"),
    Claim("HPM is more robust than FC (worst case)", BATCH, FC, worst, "above"),
    Claim(f"HPM is at most {MARGIN} less accurate than FC (clean)", BATCH, FC, clean, "not below"),
    Claim(f"HPM is at most {MARGIN} less robust than ℓ2 (realised)", BATCH, L2, realised, "not below"),
    Claim("HPM is more accurate than ℓ2 (clean)", BATCH, L2, clean, "above"),
    Claim("fine-tuning makes HPM more robust (realised)", BATCH, ("fc", "batch"), realised, "above"),
    Claim("attacks on FC alone overstate HPM (realised)", ("batch", "alone"), BATCH, claimed, "above", realised),
    Claim("attacks on FC alone overstate ℓ2 (worst case)", ("dataset", "alone"), L2, claimed, "above", worst),
)


def claims(bases: Mapping[str, Heads], studies: Mapping[str, Sequence[Sensitivity]]) -> list[str]:
    """Returns a row for each claim: the difference in points and the verdict on each base, and the verdict of all."""
    rows = [["claim (measure)", *bases, "verdict"]]
    measured = [(claim.text, {name: (found, claim.expected) for name, heads in bases.items()
                              if (found := claim.measure(heads))}) for claim in CLAIMS]
    for text, found in [("FC is more sensitive than ℓ2 (% of the margin)", {
            name: (sensitivity_gap(some[-1]), "above") for name, some in studies.items()}), *measured]:
        verdicts = {name: gap.verdict(expected) for name, (gap, expected) in found.items()}
        rows.append([text, *(f"{found[name][0]}{MARKS[verdicts[name]]}" if name in found else "" for name in bases),
                     f"**{total_verdict(list(verdicts.values()))}**"])
    return _table(rows)


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


def sensitivities(studies: Mapping[str, Sequence[Sensitivity]]) -> list[str]:
    """Returns each network's accuracies by head at the radius of `training_eps`, the naive ones, and sensitivities."""
    rows = [["network", *NAMES.values()]]
    for name, some in studies.items():
        for kind, study in zip(("normally trained", "robust"), some, strict=True):
            at = {row.head: row.overall for row in study.rows if row.eps == training_eps(study)}
            rows.append([f"{name}, {kind}", *(
                f"{100 * at[head].accuracy:.1f} ({100 * at[head].naive_accuracy:.1f}), {at[head].sensitivity:.2f}"
                if head in at else "" for head in NAMES)])
    return _table(rows)


def page() -> str:
    """Returns docs/results.md: the text of heads_text.md with the tables that it names in braces."""
    (bases, alone), studies = read_heads(), read_studies()
    judged = {name: heads | {(mode, "alone"): alone.get(name, {}).get((mode, mode), {})
                             for mode in ("batch", "dataset")} for name, heads in bases.items()}
    return filled(TEXT.read_text(encoding="utf-8"), {
        "claims": claims(judged, studies), "bases": bases_table(bases),
        "accuracies": accuracies(bases, alone),
        "sensitivities": sensitivities(studies)})


def filled(text: str, tables: Mapping[str, Sequence[str]]) -> str:
    """Returns a text with each table in the place of its name, a line `{NAME}`.

    Raises:
        ValueError: if the text does not name each table once, and no other.
    """
    if sorted(places := re.findall(_PLACE, text, re.MULTILINE)) != sorted(tables):
        raise ValueError(f"{TEXT} has the places {', '.join(places)}; expected one line {{NAME}} for each of "
                         f"{', '.join(tables)}")
    return re.sub(_PLACE, lambda place: "\n".join(tables[place[1]]), text, flags=re.MULTILINE)
