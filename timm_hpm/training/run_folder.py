"""The folder of a training run and its files, each of which appears whole or not at all."""

import csv
import filecmp
import io
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import yaml

from ..data import data_source, open_split
from ..files import remove, remove_unfinished, replacing, write_text, writing
from ..models.constructors import is_constructor
from ..models.saving import CONFIG, WEIGHTS, write_model
from ..options import read_options
from ..report import svg
from ..report.shell import evaluate_command, shell_line
from .config import TrainConfig, differing
from .recovery import BEST, Checkpoint, write_checkpoint

OPTIONS: Final = "args.yaml"
CHECKPOINTS: Final = "checkpoints"


class RunFolder:
    """Writes a run's files into the folder `path`, by the main process; to `resume`, options must be the same."""

    def __init__(self, path: Path, config: TrainConfig, resume: bool):
        self.path, self.config = path, config
        # Folder of the best epoch's files: in a checkpoint, or made for the next one.
        self._best: Path | None = None
        if resume:
            saved, given = saved_options(path).to_dict(), config.to_dict()
            different = [f"{name} ({saved[name]!r} there, {given[name]!r} given)" for name in differing(saved, given)]
            if different:
                raise ValueError(f"the run in {path} has other options: {', '.join(different)}. Resume it with its own "
                                 "(--resume alone), or start another in another --output")
        elif any((path / name).exists() for name in (OPTIONS, WEIGHTS, CONFIG)):
            raise ValueError(f"{path} holds another run; go on with it by --resume {path}, or choose another --output")

    def begin(self) -> None:
        """Writes the options, and removes the unfinished files of an interrupted process."""
        for folder in (self.path, self.path / CHECKPOINTS):
            remove_unfinished(folder)
        write_text(self.path / OPTIONS, yaml.safe_dump(self.config.to_dict(), sort_keys=False))

    def write_best(self, model: Any, row: dict[str, Any]) -> None:
        """Makes the files of the best epoch so far, whose row of metrics is `row`, as timm's `local-dir:` reads them.

        The next checkpoint holds them, and only then they appear in the run's folder: whatever stops a run, they can
        be checked against the checkpoint that it resumes from, and written again.
        """
        self._best = self.path / f".best.{os.getpid()}.tmp"
        remove(self._best)
        self._best.mkdir()
        with writing(self.path / WEIGHTS):
            write_model(model, self._best, training={"options": self.config.to_dict(), "kept": row})

    def publish_best(self, best: Path) -> None:
        """Writes the files of the best epoch if they are not as a checkpoint has them, in its folder `best`."""
        self._best = best
        # The weights first: they hold their config, which goes before the file's.
        for name in (WEIGHTS, CONFIG):
            file, kept = self.path / name, best / name
            if not file.is_file() or not filecmp.cmp(file, kept, shallow=False):
                with replacing(file) as target:
                    shutil.copyfile(kept, target)

    def write_metrics(self, rows: Sequence[dict[str, Any]]) -> None:
        """Writes `metrics.csv` and `curve.svg`."""
        text = io.StringIO()
        writer = csv.DictWriter(text, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.path / "metrics.csv", text.getvalue())
        write_text(self.path / "curve.svg", _curve(rows))

    def write_warnings(self, texts: Iterable[str]) -> None:
        """Writes `warnings.txt`, a line each; removes it if there are none."""
        text, file = "".join(f"{text}\n" for text in texts), self.path / "warnings.txt"
        if text:
            write_text(file, text)
        else:
            remove(file)

    def write_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Writes a checkpoint below `checkpoints/`, and then the files of a best epoch that is new."""
        staged = checkpoint.best = self._best
        path = write_checkpoint(self.path / CHECKPOINTS, checkpoint, self.config.checkpoint_hist)
        if staged is not None and staged.parent == self.path:
            self.publish_best(path / BEST)
            remove(staged)
        elif staged is not None:
            self._best = path / BEST


def saved_options(path: Path) -> TrainConfig:
    """Returns the options of the run in a folder."""
    file = path / OPTIONS
    if not file.is_file():
        raise ValueError(f"{path} holds no run to resume ({OPTIONS} is missing); start one with --output {path}")
    return TrainConfig(**read_options(file, TrainConfig))


def measuring_command(path: Path) -> str:
    """Returns the command that measures the kept model of a run, under the threat that it was trained for.

    On the first 100 test images, or as many as there are; on validation images if the data set has no test images.
    """
    config, split = saved_options(path), "test"
    encoded = data_source(config.dataset).image_size is None
    data: dict[str, Any] = {"data_dir": config.data_dir, "class_map": config.class_map}
    opened = partial(open_split, config.dataset, input_size=(3, 32, 32) if encoded else None)
    try:
        available = len(opened(split, **data))
    except (ValueError, OSError):
        split, data = "val", data | {"val_fraction": config.val_fraction}
        available = len(opened(split, **data))
    model = {"model": f"local-dir:{path}", "options": data}
    if is_constructor(config.model):
        model = {"model": config.model, "options": data | {"checkpoint": str(path / WEIGHTS)}}
    return shell_line(evaluate_command({
        **model, "dataset": config.dataset, "split": split, "threat": config.threat,
        "num_images": min(100, available)} | ({"device": config.device} if config.device else {})))


def _curve(rows: Sequence[Mapping[str, Any]]) -> str:
    highest = max([*(row["loss"] for row in rows), 1e-9])
    names = {"val_clean": "clean, validation", "val_robust": "robust (PGD), validation",
             "loss": f"training loss, % of {highest:.3g} nats"}
    plot = svg.curves({
        name: [svg.Point(row["epoch"], row[key] / (highest if key == "loss" else 1)) for row in rows]
        for key, name in names.items()}, "epoch", "validation accuracies and training loss over the epochs")
    return plot.replace("<svg ", "<svg xmlns='http://www.w3.org/2000/svg' ", 1)
