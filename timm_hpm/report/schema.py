"""`AttackReport`: the verdicts of an evaluation, image by image, with its protocol."""

import hashlib
import io
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..files import tensor_bytes, writable_folder, write_text
from .examples import Example
from .flags import Flag
from .metrics import attack_of, most_errors_accuracy, right_in_all, wilson_interval, worst_accuracy
from .well_formed import check_report

#: Version of report.json that this package writes and reads.
SCHEMA_VERSION: Final = 2

# Entries of a file besides the fields of a report.
_COMPUTED: Final = ("unreliable", "num_images", "clean_accuracy", "robust_accuracy", "robust_accuracy_interval",
                    "assembled_robust_accuracy", "realised_robust_accuracy", "fell_to", "by_surrogate", "baseline")

# Fields that older reports of this version lack.
_NEW: Final = ("date", "convergence")

#: The row of attacks on the true model itself, without a surrogate.
TRUE_MODEL: Final = "true"

#: The row of the batches that are assembled from the first successful candidate of each image.
ASSEMBLED: Final = "assembled"


@dataclass(frozen=True)
class Convergence:
    """When each image fell, and how near the others are to a boundary."""

    # For each image the passes, forward and backward, until it fell: 0 if misclassified when clean, None if robust.
    fell_after: list[float | None]
    spent: float  # passes on an image that did not fall; the largest number of all batches
    margins: list[float]  # for each image the smallest lead of the right logit under attack; 0 if it fell
    clean_margin: float | None  # the median lead on clean images that are classified correctly

    @property
    def fell_lately(self) -> int:
        """Number of images that fell in the last doubling of the passes."""
        return sum(passes is not None and passes > self.spent / 2 for passes in self.fell_after)

    @property
    def survivors(self) -> list[float]:
        """The margins of the robust images, in ascending order."""
        return sorted(margin for margin, passes in zip(self.margins, self.fell_after, strict=True) if passes is None)


def weights_digest(model: nn.Module) -> str:
    """Returns 16 hexadecimal digits that identify a model's parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        if isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized:
            digest.update(f" {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(tensor_bytes(value))
        else:  # such as a module's extra state, which can be any object
            file = io.BytesIO()
            torch.save(value, file)
            digest.update(file.getvalue())
    return digest.hexdigest()[:16]


def data_digest(images: Tensor, labels: Tensor) -> str:
    """Returns 16 hexadecimal digits that identify images (N, ...) and labels (N,) in their order."""
    digest = hashlib.sha256(f"{tuple(images.shape)}\n".encode())
    digest.update(tensor_bytes(images.float()))
    digest.update(tensor_bytes(labels.long()))
    return digest.hexdigest()[:16]


@dataclass(frozen=True, repr=False)
class AttackReport:
    """The result of `mixed_surrogate_attack`. Every accuracy is a fraction in [0, 1], of the true model.

    Verdicts are a text with one character per image: `1` if it is classified correctly, judged in its whole batch.
    """

    # Everything that determines the numbers: threat model, images, batch size, inference mode, surrogates, attacks with
    # their budgets, seed, device, versions.
    protocol: dict[str, Any]
    # The verdicts for "clean" and each candidate set "<surrogate>/<attack>", in the order of the attacks.
    correct: dict[str, str]
    # The same of the FC classifier of the same network, under the attacks on it; empty without an HPM head.
    baseline_correct: dict[str, str] = field(default_factory=dict)
    # Seconds, and images that passed forward and backward through the backbone, for each attack and in all.
    cost: dict[str, dict[str, float]] = field(default_factory=dict)
    flags: list[Flag] = field(default_factory=list)  # of the model and of the attacks
    examples: list[Example] = field(default_factory=list)  # the first few misclassified images
    # In batch mode, verdicts on batches of each image's first successful candidate, or of the clean image without one.
    assembled: str = ""
    neighbours: list[dict[str, Any]] = field(default_factory=list)  # of `measure_neighbours`; they enter no accuracy
    date: str = ""  # day of the measurement in UTC, such as "2026-11-28"; empty in older reports
    convergence: Convergence | None = None  # None in older and in merged reports

    def __repr__(self) -> str:
        return (f"<AttackReport: {self.name}, {self.num_images} images, {self.protocol['threat']}, "
                f"clean {self.clean_accuracy:.1%}, robust {self.robust_accuracy:.1%}>")

    @property
    def name(self) -> str:
        """The model's name; that of its architecture if it has none."""
        return self.protocol.get("model", self.protocol["architecture"])

    @property
    def num_images(self) -> int:
        """Number of images judged."""
        return len(self.correct["clean"])

    @property
    def clean_accuracy(self) -> float:
        """Accuracy on the clean images."""
        return worst_accuracy([self.correct["clean"]])

    @property
    def verdicts(self) -> dict[str, str]:
        """Verdicts of the model on every batch that it judged: `correct`, and in batch mode `"assembled"`."""
        return self.correct | ({ASSEMBLED: self.assembled} if self.assembled else {})

    @property
    def robust_accuracy(self) -> float:
        """Fraction of the images that no judged batch misclassifies (point-wise worst case)."""
        return worst_accuracy(self.verdicts.values())

    @property
    def robust(self) -> list[bool]:
        """Whether each image is classified correctly in every judged batch (point-wise worst case)."""
        return right_in_all(self.verdicts.values())

    @property
    def fell_to(self) -> list[str]:
        """The candidate set that broke each image first, such as `"fc/apgd-ce"` or `"clean"`; `""` if it is robust."""
        rows = self.verdicts
        return [next((name for name, verdict in zip(rows, verdicts, strict=True) if verdict == "0"), "")
                for verdicts in zip(*rows.values(), strict=True)]

    def adversarial_images(self, folder: str | os.PathLike) -> Tensor:
        """Returns the first successful candidate of each image, (N, channels, H, W), from the run's `folder`.

        An image that no attack broke, or that is misclassified without one, is the clean image.

        Raises:
            ValueError: if the folder's adversarial.safetensors is damaged or of another report.
            OSError: if there is none: the attack was run without `save_adversarial`.
        """
        path = Path(folder) / "adversarial.safetensors"
        try:
            with safe_open(path, "pt") as file:
                if json.loads((file.metadata() or {}).get("protocol", "null")) != self.protocol:
                    raise ValueError("it is of another run")
                images, fell_to = file.get_tensor("clean"), self.fell_to
                for name in {name for name in fell_to if name not in ("", "clean")}:
                    rows = [i for i, fell in enumerate(fell_to) if fell == name]
                    images[rows] = file.get_tensor(name)[rows]
                return images
        except (SafetensorError, ValueError, LookupError, RecursionError) as error:
            raise ValueError(f"{path} does not hold the candidates of this report ({error}); expected the folder of "
                             "its run with save_adversarial") from error

    @property
    def assembled_robust_accuracy(self) -> float:
        """Accuracy on the assembled batches; outside batch mode equal to `robust_accuracy`."""
        return worst_accuracy([self.assembled]) if self.assembled else self.robust_accuracy

    @property
    def realised_robust_accuracy(self) -> float:
        """Accuracy if each batch is scored by its most damaging version; outside batch mode `robust_accuracy`."""
        rows = self.verdicts.values()
        return most_errors_accuracy(rows, self.protocol["batch_size"]) if self.assembled else self.robust_accuracy

    @property
    def robust_accuracy_interval(self) -> tuple[float, float]:
        """The 95 % Wilson interval of `robust_accuracy`, which has a width at 0 and 1, too."""
        return wilson_interval(self.robust_accuracy, self.num_images)

    @property
    def by_surrogate(self) -> dict[str, dict[str, float]]:
        """Accuracy under each attack on each surrogate, and `"worst"`, point-wise over that surrogate's attacks."""
        surrogates = dict.fromkeys(name.partition("/")[0] for name in self.correct if "/" in name)
        return {surrogate: _by_attack({name: row for name, row in self.correct.items()
                                       if name.startswith(f"{surrogate}/")}) for surrogate in surrogates}

    @property
    def baseline(self) -> dict[str, float]:
        """Accuracy of the FC classifier: `"clean"`, each attack, and `"worst"`; empty without an HPM head."""
        return _by_attack(self.baseline_correct) if self.baseline_correct else {}

    @property
    def unreliable(self) -> bool:
        """Whether a flag makes the robust accuracy unreliable."""
        return any(flag.unreliable for flag in self.flags)

    def same_results(self, other: "AttackReport") -> bool:
        """Returns whether protocol, verdicts, passes and flags are equal: all but seconds, date and convergence."""
        return _without_time(self) == _without_time(other)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields and the computed accuracies in JSON's types."""
        computed = {name: getattr(self, name) for name in _COMPUTED}
        computed["robust_accuracy_interval"] = list(self.robust_accuracy_interval)
        return {"schema_version": SCHEMA_VERSION, **computed} | {
            name: value for name, value in asdict(self).items() if value or name not in _NEW}

    def save(self, path: str | os.PathLike) -> None:
        """Writes the report as JSON, whole or not at all; makes the folder if it is missing."""
        writable_folder(Path(path).parent)
        write_text(path, f"{json.dumps(self.to_dict(), indent=1)}\n")

    @classmethod
    def load(cls, path: str | os.PathLike) -> "AttackReport":
        """Returns the report that `save` wrote; raises a ValueError for any other file."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            version = data["schema_version"]
            if type(version) is int and version == SCHEMA_VERSION:
                values = {name: data[name] for name in cls.__dataclass_fields__ if name not in _NEW or name in data}
                check_report(values, data)
                found = values.get("convergence")
                return cls(**values | {"flags": [Flag(**flag) for flag in values["flags"]],
                                       "examples": [Example(**example) for example in values["examples"]],
                                       "convergence": found and Convergence(**found)})
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{path} is not a report of timm_hpm ({type(error).__name__}: {error}); "
                             "expected the report.json that evaluate.py wrote") from error
        raise ValueError(f"{path} has the schema version {version!r}; this timm_hpm reads {SCHEMA_VERSION}. "
                         "Evaluate again, or install the version that wrote it")


def _by_attack(rows: dict[str, str]) -> dict[str, float]:
    """Returns the accuracy under each attack, and `"worst"`."""
    by_attack: dict[str, list[str]] = {}
    for name, row in rows.items():
        by_attack.setdefault(attack_of(name), []).append(row)
    return {attack: worst_accuracy(some) for attack, some in by_attack.items()} | {
        "worst": worst_accuracy(rows.values())}


def _without_time(report: AttackReport) -> dict[str, Any]:
    data = asdict(report) | dict.fromkeys(_NEW)
    for row in data["cost"].values():
        row.pop("seconds")
    return data
