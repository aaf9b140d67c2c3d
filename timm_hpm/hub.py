"""Pushes models to the Hugging Face Hub, with a card, and pulls them.

A push is timm's own format (`model.safetensors`, `config.json`): after `import timm_hpm`, timm itself loads it by
`timm.create_model("hf-hub:org/name", pretrained=True)`. From a shell: `python -m timm_hpm push|pull`.
"""

import errno
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final
from urllib.parse import quote

import huggingface_hub as hf
import timm
import torch
from huggingface_hub import errors as hf_errors
from safetensors import SafetensorError, safe_open
from torch import nn

from . import __version__
from .cards import model_card
from .data import PixelModel, in_eval_mode, normalisation_of
from .files import filling, replacing, writable_folder, write_text
from .guards import shortened, without_tokens
from .head import find_head, head_name, own_mode
from .models import saving
from .models.constructors import describe
from .models.create import class_names, create_model
from .models.hpm_timm import BASES
from .models.saving import CONFIG, WEIGHTS
from .report import AttackReport, weights_digest

CARD: Final = "README.md"
REPORT: Final = "report.json"

_LIBRARY: Final[dict[str, Any]] = {"library_name": "timm_hpm", "library_version": __version__}


class HubError(OSError):
    """A push or pull failed; the message names the repository, the cause and the remedy."""


def push(
        model: nn.Module,
        repo_id: str,
        *,
        private: bool = False,
        revision: str | None = None,
        token: str | None = None,
        commit_message: str = "Push a model of timm_hpm",
        **card: Any,
) -> str:
    """Uploads a model with its card to the Hub, in one commit, and returns its URL.

    The saved files are loaded first: a model that cannot be pulled is not pushed. A missing repository or branch is
    made. A second push replaces all files; without `report` it removes the report of the first.

    Arguments:
        model, **card: see `save`: report, license, base_model, notes and training.
        repo_id: "organisation/name", or "name" in the account of the token.
        private: whether a new repository is private; refused for a public one.
        revision: branch; None for `main`.
        token: None for that of `hf auth login` or HF_TOKEN.

    Raises:
        ValueError: if the report is of another model, or the token is malformed.
        HubError: in all other cases. The Hub is unchanged then, but for a new and empty repository or branch.
    """
    token = _usable_token(token)
    doing = f"cannot push to {repo_id}"
    with _explained(doing, token):
        hf.utils.validate_repo_id(repo_id)
        if "/" not in repo_id:
            repo_id = f"{hf.HfApi(token=token).whoami()['name']}/{repo_id}"
    with TemporaryDirectory(prefix="timm_hpm-") as temporary:
        save(model, temporary, repo_id=repo_id if revision is None else f"{repo_id}@{revision}", **card)
        with _explained(doing, token):
            return _upload(Path(temporary), repo_id, private, revision, token, commit_message)


def pull(
        repo_id: str,
        *,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | os.PathLike | None = None,
        output: str | os.PathLike | None = None,
) -> Any:
    """Returns the model of a repository on the Hub, in eval mode; it is downloaded once and then read from the cache.

    Other than `timm.create_model("hf-hub:...", pretrained=True)` it takes a token, names the repository in every error,
    and registers `hpm_{base}` if `add_hpm_head` made the model.

    Arguments:
        repo_id: "organisation/name".
        revision: branch, tag or commit; None for `main`.
        token: None for that of `hf auth login` or HF_TOKEN.
        cache_dir: folder of the downloads; None for the Hub client's own.
        output: folder that gets a copy of weights, config, card and report, once they load.

    Raises:
        ValueError: if the token is malformed.
        HubError: if the repository cannot be reached or read, or holds no model of timm's.
    """
    source = repo_id if revision is None else f"{repo_id}@{revision}"
    token = _usable_token(token)
    place = None if output is None else writable_folder(output)
    names = (CONFIG, WEIGHTS) if place is None else (CONFIG, WEIGHTS, CARD, REPORT)
    with _explained(f"cannot pull {source}", token):
        folder = Path(hf.snapshot_download(
            repo_id, revision=revision, token=token, cache_dir=None if cache_dir is None else Path(cache_dir),
            allow_patterns=list(names), **_LIBRARY))
    model = _load(folder, source).eval()
    model.pretrained_cfg.pop("file", None)
    model.pretrained_cfg.update(source="hf-hub", hf_hub_id=source)
    if place is not None:
        with _explained(f"cannot write {source} into {place}", token):
            for name in names:
                if (folder / name).is_file():
                    with replacing(place / name) as path:
                        shutil.copyfile(folder / name, path)
                else:
                    (place / name).unlink(missing_ok=True)  # of an earlier model in this folder
    return model


def save(
        model: nn.Module,
        folder: str | os.PathLike,
        *,
        repo_id: str | None = None,
        report: AttackReport | str | os.PathLike | None = None,
        license: str | None = None,
        base_model: str | None = None,
        notes: str = "",
        training: dict[str, Any] | None = None,
) -> None:
    """Writes the files of a push into `folder`, for `timm.create_model("local-dir:folder", pretrained=True)`.

    Arguments:
        model: a classifier with an HPM head or without; the network in a `PixelModel` with the normalisation of that.
            If `timm.create_model` did not make it, its files name its constructor or class, which whoever loads it
            must have.
        folder: made if it is missing.
        repo_id: the repository in the card's usage, "org/name" or "org/name@revision"; None for the folder.
        report: the result of `mixed_surrogate_attack` on this very model, or its file.
        license: the Hub's name of a licence, such as "mit"; None for that of the weights' pretrained cfg, if any.
        base_model: Hub id of the model that this one was trained from.
        notes: Markdown for the card: the text before the first `## ` opens it, the rest follows the usage.
        training: options and metrics as train.py writes them into `config.json`; None for those of the weights' file,
            if the model still has its weights.

    Raises:
        ValueError: if the report is of another model.
        HubError: if the model cannot be saved, or the saved files give another model.
    """
    folder = Path(folder)
    model = saving.saved_network(model)
    if not (getattr(model, "pretrained_cfg", None) or {}).get("architecture"):
        describe(model)
    if report is not None:
        report = report if isinstance(report, AttackReport) else AttackReport.load(report)
        _check_report(report, model)
    weights = saving.weights_path(model)
    if not training and (own := saving.saved_training(weights)) and _holds_weights(weights, model):
        training = own
    try:
        with filling(folder, first=WEIGHTS) as built:  # whose metadata hold the config
            config = saving.write_model(model, built, training=training, license=license)
            base = config["architecture"].removeprefix("hpm_")
            write_text(built / CARD, model_card(
                (repo_id or folder.resolve().name).partition("@")[0],
                f"local-dir:{folder}" if repo_id is None else f"hf-hub:{repo_id}",
                config["pretrained_cfg"] | {"label_names": class_names(model)} | {
                    name: config[name] for name in ("architecture", "constructor") if name in config},
                model=model, report=report, license=license, base_model=base_model, notes=notes, training=training,
                register=head_name(model) is not None and timm.is_model(base) and base not in BASES))
            if report is not None:
                report.save(built / REPORT)
            _check_restores(model, built, repo_id or str(folder))
        if report is None:
            (folder / REPORT).unlink(missing_ok=True)  # of an earlier model in this folder
    except HubError:
        raise
    except (OSError, SafetensorError) as error:
        raise _explanation(error, f"cannot save {type(model).__name__} into {folder}", None) from error


def _holds_weights(file: Path, model: nn.Module) -> bool:
    with safe_open(file, "pt") as weights:
        state = model.state_dict()
        return set(weights.keys()) == state.keys() and all(
            torch.equal(weights.get_tensor(name), tensor.cpu()) for name, tensor in state.items())


def _check_report(report: AttackReport, model: Any) -> None:
    """Raises a ValueError if a report is not of this model in its present state."""
    head = None if head_name(model) is None else find_head(model)
    now: dict[str, Any] = {
        "architecture": model.pretrained_cfg.get("architecture"), "num_classes": model.num_classes,
        "prototypes_fitted": head and head.is_fitted(), "inference": own_mode(model), "mix": head and head.mix,
        "weights_digest": weights_digest(model),
        "normalisation": saving.in_float32(normalisation_of(PixelModel(model)))}
    measured = {**now, **report.protocol}
    # A caller's own module was measured without a normalisation, and under the name of its class.
    measured["normalisation"] = saving.in_float32(measured["normalisation"]) or now["normalisation"]
    if measured["architecture"] in (f"hpm_{now['architecture']}", type(model).__name__):
        measured["architecture"] = now["architecture"]
    for name, value in now.items():
        if measured[name] != value:
            raise ValueError(f"the report was measured with {name} {measured[name]!r}, the model has {value!r}. A card "
                             "may only quote the report of its own model: push the model as it was measured (for "
                             "instance find_head(model).inference = 'sample'), or measure this one")


def _check_restores(model: nn.Module, folder: Path, repo_id: str) -> None:
    """Raises a HubError if the model in the saved folder has other weights or logits."""
    if "constructor" in saving.read_config(folder / CONFIG):  # which only its caller may run
        if not _holds_weights(folder / WEIGHTS, model):
            raise HubError(f"cannot save a model for {repo_id}: its {WEIGHTS} has other weights. Nothing was uploaded")
        return
    parameter = next(model.parameters())
    # The caller's random state must not depend on this check.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        back = _load(folder, repo_id).to(parameter.device, parameter.dtype).eval()
        size = timm.data.resolve_model_data_config(back)["input_size"][1:]
        images = torch.randn(2, saving.in_chans(model), *size, generator=torch.Generator().manual_seed(0)).to(parameter)
    with torch.no_grad(), in_eval_mode(model):
        expected, got = model(images), back(images)
    # timm resizes weights that were made for another image size, and the logits hardly change.
    same_shapes = {name: tensor.shape for name, tensor in model.state_dict().items()} == {
        name: tensor.shape for name, tensor in back.state_dict().items()}
    if not same_shapes or got.shape != expected.shape or not torch.allclose(
            got, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()), equal_nan=True):
        difference = "gives other logits" if same_shapes else "has weights of other shapes"
        raise HubError(f"cannot save a model for {repo_id}: loaded again from {CONFIG} and {WEIGHTS} it {difference}. "
                       "The model was changed after timm.create_model, or this version of timm does not record one of "
                       "its arguments. Make the model by timm.create_model with those arguments, or update timm. "
                       "Nothing was uploaded")


def _upload(folder: Path, repo_id: str, private: bool, revision: str | None, token: str | None, message: str) -> str:
    api = hf.HfApi(token=token, **_LIBRARY)
    api.create_repo(repo_id, private=private, exist_ok=True)
    if private and not api.model_info(repo_id).private:
        raise HubError(f"cannot push to {repo_id} with private=True: it exists and is public. Make it private in its "
                       "settings on the Hub first, or push with private=False. Nothing was uploaded")
    if revision is not None and not api.revision_exists(repo_id, revision):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    operations: list[Any] = [hf.CommitOperationAdd(file.name, file) for file in sorted(folder.iterdir())]
    if not (folder / REPORT).exists() and api.file_exists(repo_id, REPORT, revision=revision):
        operations.append(hf.CommitOperationDelete(REPORT))
    api.create_commit(repo_id, operations, commit_message=message, revision=revision)
    url = f"{api.endpoint}/{repo_id}"
    return url if revision is None else f"{url}/tree/{quote(revision, safe='')}"


def _load(folder: Path, source: str) -> Any:
    """Returns the model in a folder of timm's format; `source` is its repository, for the errors."""
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise HubError(f"cannot load {source}: it has no {name}, so it is no model that timm_hpm or timm pushed "
                           "with safetensors (pickled weights are not read). Check the name and the revision")
    try:
        return create_model(f"local-dir:{folder}", pretrained=True)
    except (ValueError, OSError, SafetensorError) as error:
        raise HubError(f"cannot load {source}: {shortened(str(error), 600)}. Remove {folder} to download it again; if "
                       "the error stays, update timm and timm_hpm, or pull another revision") from None


@contextmanager
def _explained(doing: str, token: str | None) -> Iterator[None]:
    """Turns every error of the block into a HubError, without its cause: a server's text may quote the token."""
    try:
        yield
    except HubError:
        raise
    except Exception as error:
        raise _explanation(error, doing, token) from None


def _explanation(error: BaseException, doing: str, token: str | None) -> HubError:
    # The client wraps the error of an upload, and looks into the cache after a failed download.
    while error.__cause__ is not None and (
            not isinstance(error, OSError) or isinstance(error, hf_errors.LocalEntryNotFoundError)):
        error = error.__cause__
    status = getattr(getattr(error, "response", None), "status_code", None)
    text = shortened(without_tokens(f"{type(error).__name__}: {' '.join(str(error).split())}", token), 400)
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in text:
        advice = ("the disk is full. Free space, or choose another place by cache_dir= or HF_HOME (downloads) or "
                  "TMPDIR (uploads)")
    elif isinstance(error, hf_errors.HFValidationError):
        advice = "that is no name of a repository. Expected 'organisation/name'"
    elif isinstance(error, hf_errors.RevisionNotFoundError):
        advice = "it has no such revision. Expected a branch, tag or commit; see 'Files and versions' on its page"
    elif status in (401, 403, 404):
        advice = (f"HTTP {status}: there is no such repository, or this login may not do that. Check the name. "
                  "Log in with `hf auth login`, set HF_TOKEN, or pass token=; a push needs write access, and a gated "
                  "repository its owner's leave")
    elif hf.constants.HF_HUB_OFFLINE:
        advice = ("HF_HUB_OFFLINE is set and the cache does not hold it. Unset it, or pull once with a network and the "
                  "same cache_dir and HF_HOME")
    else:
        advice = f"check the connection to {hf.constants.ENDPOINT}, and repeat it"
    return HubError(f"{doing}: {advice} ({text})")


def _usable_token(token: str | None) -> str | None:
    """Returns a token without the line break of its file."""
    if token is None:
        return None
    token = token.strip()
    if not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError("the token holds spaces, line breaks or letters that are not ASCII; expected the one line "
                         "that the Hub shows, such as hf_...")
    return token
