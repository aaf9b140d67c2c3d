"""Texts and tables of a report that Markdown and HTML share."""

from collections import Counter
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from .metrics import attack_of, wilson_interval
from .schema import AttackReport
from .svg import Step

#: The name of the robust accuracy among the `accuracies`.
ROBUST: Final = "robust, worst case over all rows"

#: The name of the interval beside an accuracy.
INTERVAL: Final = "95 % Wilson interval"

#: The first sentence if a flag makes the numbers unreliable.
UNRELIABLE: Final = "these numbers should not be quoted; the warnings say why."

#: A sentence on each attack and each surrogate that the package has.
WORDS: Final = {
    "apgd-ce": "AutoPGD on the cross-entropy (AutoAttack)",
    "apgd-pm": "AutoPGD on the probability margin (PMA)",
    "apgd-t": "AutoPGD on the targeted DLR loss, one target class after another (AutoAttack)",
    "fab-t": "FAB, which looks for the nearest boundary to each target class (AutoAttack)",
    "search": "ascents on the margin of the nearest class, most of them for the images nearest to an error",
    "search-on": "the same search, repeated until it breaks no more images",
    "square": "a random search without gradients (AutoAttack)",
    "square-on": "more of that search, for the images nearest to an error",
    "apgd-chain": "AutoPGD through one surrogate after another",
    "joint": "moves all images of a batch for the number of its errors",
    "joint-subset": "moves all images of a batch against a few victims, in rounds",
    "worst": "point-wise worst case of the attacks in its row",
    "model": "the classifier itself",
    "fc": "the FC classifier of the network",
    "dataset": "ℓ2 distance to the prototypes of the data set",
    "soft": "the head with a softmax in place of its one-hot assignment",
    "ste": "the head itself, with its straight-through gradient",
    "mixed": "mean of the log-softmax of fc, dataset and soft",
    "true": "the true model itself, without gradients",
    "FC classifier": "the FC classifier of the same network, judged under the attacks on it",
}


class Accuracy(NamedTuple):
    """An accuracy of a report, a fraction in [0, 1], and its meaning."""

    value: float
    meaning: str


class Table(NamedTuple):
    """A table with its title and introduction; its columns from `numbers_from` on are numbers."""

    title: str
    note: str
    head: list[str]
    rows: list[list[str]]
    numbers_from: int = 1


def accuracies(report: AttackReport) -> dict[str, Accuracy]:
    """Returns the accuracies of a report by name."""
    found = {"clean": Accuracy(report.clean_accuracy, "Classified correctly without an attack."),
             ROBUST: Accuracy(report.robust_accuracy, "Classified correctly when clean and under every attack.")}
    if report.assembled:
        found["robust, in the judged batches with most errors"] = Accuracy(
            report.realised_robust_accuracy,
            "Each batch is scored by its most damaging version: one adversary can cause so many errors at once.")
        found["robust, in batches assembled of what broke each image"] = Accuracy(
            report.assembled_robust_accuracy,
            "Batches of the first successful candidate of each image; some of them undo each other.")
    if report.baseline:
        found["FC classifier of the same network, clean"] = Accuracy(
            report.baseline["clean"], "The same network without its HPM head.")
        found["FC classifier of the same network, under the attacks on it"] = Accuracy(
            report.baseline["worst"], "The same network without its HPM head, under the attacks through its surrogate.")
    return found


def accuracy_table(report: AttackReport) -> Table:
    """Returns the table of the `accuracies`."""
    return Table("", "", ["accuracy", "%", INTERVAL], [
        [name, percent(accuracy.value), interval_text(accuracy.value, report.num_images)]
        for name, accuracy in accuracies(report).items()])


def attack_table(report: AttackReport) -> Table:
    """Returns the table of the accuracies by surrogate and attack."""
    attacks = [*dict.fromkeys(
        attack for row in report.by_surrogate.values() for attack in row if attack != "worst"), "worst"]
    note = "Accuracy of the true model in %, on the candidates of each attack on each surrogate."
    if not report.protocol.get("full_grid", True):
        note += (" A misclassified image is attacked no more: in later rows it keeps the candidate that broke it, so "
                 "that rows do not compare attacks.")
    return Table("Accuracy under each attack", note, ["surrogate", *attacks], [
        [surrogate, *(percent(row[attack]) if attack in row else "" for attack in attacks)]
        for surrogate, row in report.by_surrogate.items()])


def falls(report: AttackReport) -> list[Step]:
    """Returns the robust accuracy after so many forward and backward passes for each image; [] if unknown."""
    found = report.convergence
    if found is None or found.spent <= 0:
        return []
    attacks = {passes: attack_of(name) for passes, name in zip(found.fell_after, report.fell_to, strict=True) if passes}
    steps = []
    for end in sorted({*attacks, found.spent}):
        robust = sum(passes is None or passes > end for passes in found.fell_after) / report.num_images
        attack = attacks.get(end, "the end")
        steps.append(Step(end, robust, attack, f"after {attack}, {end:,.0f} passes: {percent(robust)} %"))
    return steps


def convergence_note(report: AttackReport) -> str:
    """Returns sentences on the last doubling of the passes and on the nearest survivors; empty if unknown."""
    found = report.convergence
    if found is None or found.spent <= 0:
        return ""
    lately, survivors = found.fell_lately, found.survivors
    text = (f"{lately or 'No'} image{'s' if lately > 1 else ''} of {report.num_images} fell in the last doubling of "
            f"the budget, from {found.spent / 2:,.0f} to {found.spent:,.0f} passes for each image"
            + (": more attacks may break more." if lately else "."))
    if not survivors or not found.clean_margin:
        return text
    near = sum(margin < found.clean_margin / 10 for margin in survivors)
    nearest = ", ".join(f"{margin:.3g}" for margin in survivors[:3])
    return (f"{text} Under attack the right logit of the nearest survivors leads by {nearest}; of clean images it "
            f"leads by {found.clean_margin:.3g} (median). {near or 'None'} of {len(survivors)} survivors leads by "
            "less than a tenth of that.")


def neighbours_table(report: AttackReport) -> Table:
    """Returns the table of the neighbours in a batch, whose rows are empty if none were measured."""
    note = ("How often a correctly classified clean image flips if an adversary controls the rest of its batch, and "
            "how often a prediction changes if all images are reshuffled. None of this enters the accuracies above.")
    return Table("Neighbours in the batch", note, ["batch size", "mix", "neighbours", "flipped", "of", "%"], [
        [*(str(row[name]) for name in ("batch_size", "mix", "kind", "flipped", "targets")),
         percent(row["flipped"] / row["targets"])] for row in report.neighbours], 0)


def protocol_table(report: AttackReport) -> Table:
    """Returns the table of the protocol."""
    return Table("Protocol", "", ["", ""], [[name, cell(value)] for name, value in report.protocol.items()], 2)


def cost_table(report: AttackReport) -> Table:
    """Returns the table of the cost of each attack, and of the images that it broke first."""
    fallen = Counter(attack_of(name) for name in report.fell_to if "/" in name)
    fallen["all"] = fallen.total()
    return Table("Cost", "", ["attack", "seconds", "images forward", "images backward", "images broken first"], [
        [name, f"{row['seconds']:,.1f}", f"{row['forward_passes']:,.0f}", f"{row['backward_passes']:,.0f}",
         str(fallen[name])] for name, row in report.cost.items()])


def pixels_note(protocol: Mapping[str, Any]) -> str:
    """Returns a sentence on the normalisation of a report's model; empty if the protocol has no entry for it."""
    normalisation = protocol.get("normalisation", "")
    if normalisation is None:
        return "Pixels go to the model as they are, in [0, 1]: it is a module without normalisation of its own."
    if not isinstance(normalisation, Mapping):
        return ""
    mean, std = (", ".join(f"{x:.4g}" if isinstance(x, float) else str(x) for x in value)
                 if isinstance(value, list) else str(value) for value in map(normalisation.get, ("mean", "std")))
    return (f"Pixels in [0, 1] are normalised by mean ({mean}) and std ({std}); source: "
            f"{normalisation.get('source', 'the report does not say')}.")


def percent(fraction: float) -> str:
    """Returns a fraction in %, with one decimal."""
    return f"{100 * fraction:.1f}"


def interval_text(accuracy: float, num_images: int) -> str:
    """Returns the `INTERVAL` of an accuracy, in %."""
    return " to ".join(map(percent, wilson_interval(accuracy, num_images)))


def cell(value: Any) -> str:
    """Returns a protocol's value in words; of a long list, such as 1,000 class names, the first ones and the number."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {cell(part)}" for name, part in value.items()) or "none"
    if not isinstance(value, list | tuple):
        return f"{value:.6g}" if isinstance(value, float) else str(value)
    rest = f", ... ({len(value)} in all)" if len(value) > 20 else ""
    return ", ".join(map(cell, value[:10] if rest else value)) + rest
