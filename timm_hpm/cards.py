"""Model cards for the Hub: of a model with a report, and of public checkpoints. `python -m timm_hpm card NAME`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from timm.models import get_pretrained_cfg, split_model_name_tag
from torch import nn

from .head import HPMHead, find_head, head_name
from .models.constructors import is_constructor
from .models.create import create_model
from .models.saving import WEIGHTS
from .report import TRUE_MODEL, AttackReport
from .report.compare import paired
from .report.markdown import escaped, fenced, results, table
from .report.shell import DATA_OPTIONS, evaluate_command, shell_lines
from .report.tables import cell, protocol_table

TAGS: Final = ("image-classification", "timm", "timm_hpm", "adversarial-robustness")

# The Hub's ids of data sets.
_DATASETS: Final = {
    "digits": "sklearn-digits", "cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100",
    "svhn": "ufldl-stanford/svhn", "tiny_imagenet": "zh-plus/tiny-imagenet", "imagenet": "ILSVRC/imagenet-1k",
}
# A card lists so many classes.
_MOST_CLASSES: Final = 100
# Entries of a protocol that a card shows.
_PROTOCOL: Final = (
    "dataset", "split", "num_images", "class_subset", "normalisation", "threat", "batch_size", "inference", "mix",
    "eot", "surrogates", "attacks", "precision", "seed", "seeds", "device", "versions")

_UNFITTED: Final = """\
**No prototypes yet.** Until they are fitted, the head predicts exactly as the weights' own FC classifier.
`timm_hpm.fit_prototypes(model, loader, threat)` fits them, with a loader of pixels in [0, 1] and labels;
`docs/models.md` of timm_hpm goes from there to measured weights."""


def model_card(
        title: str,
        name: str,
        cfg: Mapping[str, Any],
        *,
        model: nn.Module | None = None,
        report: AttackReport | None = None,
        license: str | None = None,
        base_model: str | None = None,
        notes: str = "",
        register: bool = False,
        training: Mapping[str, Any] | None = None,
) -> str:
    """Returns the text of a card, README.md on the Hub.

    Arguments:
        title: its heading, such as "org/name" or a tag.
        name: the argument of `timm.create_model`.
        cfg: the pretrained cfg, with the `constructor` of a network that timm does not make.
        model: None for a public checkpoint, which has no prototypes.
        report, license, base_model, notes, training: see `timm_hpm.hub.save`.
        register: whether the loader must register the architecture first.
    """
    head = None if model is None or head_name(model) is None else find_head(model)
    plain = model is not None and head is None
    opening, _, sections = f"\n{notes.strip()}".partition("\n## ")
    fitted = head is not None and head.is_fitted()
    others = "\n".join(f"- {note}" for note in cfg.get("notes") or ())
    unmeasured = "timm_hpm has measured nothing of these weights."
    parts = {
        "title": escaped(title),
        "opening": opening.strip() or _opening(cfg, "" if plain else " with an HPM head" if fitted else
                                               " with an HPM head that has no prototypes yet"),
        "usage": _usage(name, cfg, register),
        "classes": _classes(cfg, report),
        "unfitted": "" if fitted or plain else _UNFITTED,
        "sections": sections and f"## {sections}",
        "training": _training(training),
        "evaluation": _evaluation(cfg.get("constructor", name), report) if report else (
            f"{unmeasured} Others say of them:\n\n{others}" if others else unmeasured),
        "mode": _mode_sentence(head),
        "figures": "so is every figure above, and none the paper's" if report else "no figure here is the paper's",
        "origin": _origin(cfg),
    }
    data = _data(title, cfg, report, license, base_model)
    template = Path(__file__).with_name("card.md").read_text(encoding="utf-8").strip()
    if plain:
        template = f"{template.partition('## Inference modes')[0]}{{origin}}"
    text = "\n\n".join(part.format(**parts) for part in template.split("\n\n") if part.format(**parts))
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n"))


def tag_card(name: str, folder: str | Path | None = None) -> str:
    """Returns the card of a registered tag, such as "hpm_wrn10_2.digits_linf", without loading a public checkpoint.

    `folder` may have `<name>.report.json`, and notes by hand, `<name>.notes.md`.
    """
    architecture, _ = split_model_name_tag(name)
    try:
        cfg = get_pretrained_cfg(name)
    except RuntimeError:  # an unknown tag
        cfg = None
    if cfg is None or not cfg.has_weights:
        raise ValueError(f"{name!r} is no tag with weights; expected one of timm.list_pretrained('hpm_*')")
    name = f"{architecture}.{cfg.tag}"
    model = create_model(name, pretrained=True) if cfg.file and Path(cfg.file).is_file() else None
    report, notes = (Path(folder or "") / f"{name}.{ending}" for ending in ("report.json", "notes.md"))
    return model_card(
        name, name, cfg.to_dict(), model=model,
        report=AttackReport.load(report) if folder and report.is_file() else None,
        notes=notes.read_text(encoding="utf-8") if folder and notes.is_file() else "", base_model=cfg.hf_hub_id)


def _opening(cfg: Mapping[str, Any], head: str) -> str:
    shape = "×".join(map(str, cfg["input_size"]))
    return (f"{_code(cfg['architecture'])}{head}, for images of {shape} and {cfg['num_classes']} classes: an "
            "adversarially robust classifier for timm.")


def _usage(name: str, cfg: Mapping[str, Any], register: bool) -> str:
    shape, classes = ", ".join(map(str, cfg["input_size"])), cfg["num_classes"]
    lines = ["import timm, timm_hpm"]
    if register:
        base = _literal(str(cfg["architecture"]).removeprefix("hpm_"))
        lines.append(f"timm_hpm.register_hpm({base})        # this architecture has no hpm_ name until then")
    if "constructor" in cfg:
        lines = ["import timm_hpm", "# The network's own constructor, whose code these files do not hold.",
                 f"model = timm_hpm.create_model({_literal(cfg['constructor'])}, checkpoint='{WEIGHTS}').eval()"]
    else:
        lines.append(f"model = timm.create_model({_literal(name)}, pretrained=True).eval()")
    lines.append(f"pixel_model = timm_hpm.PixelModel(model)      # (B, {shape}), pixels in [0, 1], to logits "
                 f"(B, {classes})")
    text = fenced("\n".join(lines), "python")
    if name.startswith("hf-hub:") and "constructor" not in cfg:
        repo_id, _, revision = name.removeprefix("hf-hub:").partition("@")
        arguments = _literal(repo_id) + (f", revision={_literal(revision)}" if revision else "")
        text += f"\n\n{_code(f'timm_hpm.hub.pull({arguments})')} does the same, with a token if one is needed."
    return text


def _classes(cfg: Mapping[str, Any], report: AttackReport | None) -> str:
    names = cfg.get("label_names") or (report.protocol.get("class_names") if report else None) or ()
    shown = ", ".join(f"{i} {escaped(name)}" for i, name in enumerate(names[:_MOST_CLASSES]))
    more = f", and {len(names) - _MOST_CLASSES} more in `config.json`" if len(names) > _MOST_CLASSES else ""
    return f"## Classes\n\n{shown}{more}" if names else ""


def _mode_sentence(head: HPMHead | None) -> str:
    if head is None:
        return "A new HPM head has mix 0.5 and the mode `dataset`; without prototypes every mode is `fc`."
    rest = "" if head.is_fitted() else "; without prototypes every mode is `fc`"
    return f"This head has mix {head.mix}, EMA decay {head.ema_decay} and the mode `{head.inference}`{rest}."


def _training(training: Mapping[str, Any] | None) -> str:
    if not training:
        return ""
    text = yaml.safe_dump(dict(training), sort_keys=False, allow_unicode=True).rstrip()
    return ("## Training settings\n\nThe `options` of `train.py --config`, and `kept`, the metrics of the epoch that "
            f"these weights are of, on the validation split.\n\n{fenced(text, 'yaml')}")


def _evaluation(name: str, report: AttackReport) -> str:
    options = report.protocol.get("options")
    there: dict[str, Any] = {"model": name}
    if options is not None:
        there["options"] = {option: options.get(option) for option in DATA_OPTIONS}
        if is_constructor(name):
            there["options"]["checkpoint"] = WEIGHTS
    command = evaluate_command(report.protocol | there)
    merged = "The worst case of several seeds, of which each is a measurement of its own."
    parts = [fenced(shell_lines(command), "sh") if command else merged if "seeds" in report.protocol else
             "Measured from Python by `timm_hpm.mixed_surrogate_attack`: no command line repeats it.",
             "\n".join(results(report))]
    if report.baseline:
        parts.append(_head_against_fc(report))
    rows = [row for row in protocol_table(report).rows if row[0] in _PROTOCOL]
    parts += ["\n".join(table(["protocol", ""], rows, numbers_from=2)),
              "Another machine or number of threads rounds otherwise, and an image near a boundary may be classified "
              "otherwise."]
    if report.flags:
        title = "Flags, which make these numbers unreliable:" if report.unreliable else "Flags of the attacks:"
        parts.append(f"{title}\n\n" + "\n".join(f"- {flag.name}: {escaped(flag.text)}" for flag in report.flags))
    return "\n\n".join(parts)


def _head_against_fc(report: AttackReport) -> str:
    row = paired("robust", report.verdicts.values(), report.baseline_correct.values())
    low, high = row.difference_interval
    apart = "a difference beyond" if low > 0 or high < 0 else "no difference beyond"
    # Square on the true model repeats Square on one of the surrogates.
    sets = sum("/" in name and not name.startswith(f"{TRUE_MODEL}/") for name in report.correct)
    total = report.num_images
    return (
        f"Of these {total} images the head classified {round(row.a * total)} correctly throughout, its own FC "
        f"classifier {round(row.b * total)}: {apart} chance (Newcombe's paired 95 % interval of FC classifier minus "
        f"head: {100 * low:+.1f} to {100 * high:+.1f} points). The head faced {sets} sets of candidates, the FC "
        f"classifier {len(report.baseline_correct) - 1}.")


def _origin(cfg: Mapping[str, Any]) -> str:
    lines = []
    if cfg.get("hf_hub_id"):
        file = f", file {_code(cfg['hf_hub_filename'])}" if cfg.get("hf_hub_filename") else ""
        lines.append(f"- weights: https://huggingface.co/{escaped(cfg['hf_hub_id'])}{file}")
    elif cfg.get("url"):
        lines.append(f"- weights: {escaped(cfg['url'])}")
    if cfg.get("origin_url"):
        lines.append(f"- origin: {escaped(cfg['origin_url'])}")
    papers = cfg.get("paper_ids") or ()
    if papers:
        lines.append("- papers: " + escaped(cell([papers] if isinstance(papers, str) else papers)))
    if cfg.get("mean") and cfg.get("std"):
        lines.append(f"- pixels in [0, 1] are normalised by mean {_numbers(cfg['mean'])} and std {_numbers(cfg['std'])}"
                     "; `PixelModel` does it")
    return "\n".join(["## Origin", "", *lines]) if lines else ""


def _data(title: str, cfg: Mapping[str, Any], report: AttackReport | None, license: str | None,
          base_model: str | None) -> ModelCardData:
    dataset, results = "", []
    if report is not None:
        dataset = report.protocol.get("dataset", "").removeprefix("torch/") or "unknown"
        under = f", Mixed Surrogate Attack, {report.protocol['threat']}, mode {report.protocol['inference']}"
        accuracies = (("Clean", report.clean_accuracy, ""), ("Robust", report.robust_accuracy, under))
        results = [EvalResult(
            task_type="image-classification", dataset_type=_DATASETS.get(dataset, dataset), dataset_name=dataset,
            dataset_split=report.protocol.get("split"), metric_type="accuracy", metric_value=round(100 * value, 2),
            metric_name=f"{kind} accuracy of {report.num_images} images{under}")
            for kind, value, under in accuracies]
    return ModelCardData(
        license=(license or cfg.get("license") or "unknown").lower(),
        library_name="timm",
        pipeline_tag="image-classification",
        tags=list(TAGS),
        datasets=[_DATASETS[dataset]] if dataset in _DATASETS else None,
        base_model=base_model,
        metrics=["accuracy"],
        model_name=title if results else None,
        eval_results=results or None,
    )


def _literal(text: str) -> str:
    """Returns a text as a literal of Python, on one line."""
    return json.dumps(text, ensure_ascii=False).replace("`", "\\x60")  # no end of a block of code


def _code(text: str) -> str:
    """Returns a text as code, on one line; as plain text if it holds the mark of code."""
    return escaped(text) if "`" in text else f"`{' '.join(text.split())}`"


def _numbers(values: Any) -> str:
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"
