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
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final
from urllib.parse import quote

import huggingface_hub as hf
import timm
import torch
from huggingface_hub import errors as hf_errors
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from . import __version__
from .cards import model_card
from .data import PixelModel, normalisation_of
from .files import replacing, writable_folder, write_text
from .guards import shortened, without_tokens
from .head import HPMHead, find_head, head_name
from .models.configs import read_config
from .models.constructors import describe
from .models.create import class_names, create_model
from .models.hpm_timm import register_saved
from .models.saving import CONFIG, WEIGHTS, in_chans, in_float32, saved_config, saved_network, write_model
from .report import AttackReport, weights_digest

CARD: Final = "README.md"
REPORT: Final = "report.json"

_LIBRARY: Final[dict[str, Any]] = {"library_name": "timm_hpm", "library_version": __version__}
_LOG_IN: Final = "Log in with `hf auth login`, set HF_TOKEN, or pass token="
# The packages below huggingface_hub that raise if the connection fails; it has used several.
_TRANSPORTS: Final = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")


class HubError(OSError):
    """A push or pull failed; the message names the repository, the cause and the remedy."""


def push(
        model: nn.Module,
        repo_id: str,
        *,
        report: AttackReport | str | os.PathLike | None = None,
        private: bool = False,
        revision: str | None = None,
        token: str | None = None,
        commit_message: str = "Push a model of timm_hpm",
        license: str | None = None,
        base_model: str | None = None,
        notes: str = "",
        training: dict[str, Any] | None = None,
) -> str:
    """Uploads a model with its card to the Hub, in one commit, and returns its URL.

    The saved files are loaded first: a model that cannot be pulled is not pushed. A missing repository or branch is
    made. A second push replaces all files; without `report` it removes the report of the first.

    Arguments:
        model: a classifier with an HPM head or without; the network in a `PixelModel` with the normalisation of that.
            If `timm.create_model` did not make it, its files name its constructor or class, which whoever pulls it
            must have.
        repo_id: "organisation/name", or "name" in the account of the token.
        report: the result of `mixed_surrogate_attack` on this very model, or its file.
        private: whether a new repository is private; refused for a public one.
        revision: branch; None for `main`.
        token: None for that of `hf auth login` or HF_TOKEN.
        commit_message: first line of the commit.
        license: the Hub's name of a licence, such as "mit"; None for that of the weights' pretrained cfg, if any.
        base_model: Hub id of the model that this one was trained from.
        notes: Markdown for the card: the text before the first `## ` opens it, the rest follows the usage.
        training: options and metrics as train.py writes them into `config.json`; None for those of the weights' file,
            if the model still has its weights.

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
        save(model, temporary, repo_id=repo_id if revision is None else f"{repo_id}@{revision}", report=report,
             license=license, base_model=base_model, notes=notes, training=training)
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
        output: folder that gets a copy of weights, config, card and report, once they load; None for no copy.

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
        model, report, license, base_model, notes, training: see `push`.
        folder: made if it is missing.
        repo_id: the repository in the card's usage, "org/name" or "org/name@revision"; None for the folder.

    Raises:
        ValueError: if the report is of another model.
        HubError: if the model cannot be saved, or the saved files give another model.
    """
    folder = Path(folder)
    model = saved_network(model)
    if not (getattr(model, "pretrained_cfg", None) or {}).get("architecture"):
        describe(model)
    head = None if head_name(model) is None else find_head(model)
    if report is not None and not isinstance(report, AttackReport):
        report = AttackReport.load(report)
    if report is not None:
        _check_report(report, model, head)
    training = training or _training_of(model)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".timm_hpm-", dir=folder) as temporary:
            built = Path(temporary)
            config = write_model(model, built, training=training, license=license)
            write_text(built / CARD, model_card(
                (repo_id or folder.resolve().name).partition("@")[0],
                f"local-dir:{folder}" if repo_id is None else f"hf-hub:{repo_id}",
                config["pretrained_cfg"] | {"label_names": class_names(model)} | {
                    name: config[name] for name in ("architecture", "constructor") if name in config},
                model=model, report=report, license=license, base_model=base_model, notes=notes, training=training,
                register=head is not None and config["architecture"] not in _registered_at_import()))
            if report is not None:
                report.save(built / REPORT)
            _check_restores(model, built, repo_id or str(folder))
            # The weights first: their metadata hold the config, which goes before the file's.
            for file in sorted(built.iterdir(), key=lambda file: file.name != WEIGHTS):
                with replacing(folder / file.name) as path:
                    file.rename(path)
            if report is None:
                (folder / REPORT).unlink(missing_ok=True)  # of an earlier model in this folder
    except HubError:
        raise
    except (OSError, SafetensorError) as error:
        raise _explanation(error, f"cannot save {type(model).__name__} into {folder}", None) from error


def _training_of(model: Any) -> dict[str, Any] | None:
    """Returns the training in the file of a model's weights; None without one, or if the model has other weights."""
    file = Path((model.pretrained_cfg or {}).get("file") or "")
    file = file / WEIGHTS if file.is_dir() else file  # timm names a folder
    if file.suffix != ".safetensors" or not file.is_file():
        return None
    training = saved_config(file).get("training")
    if not isinstance(training, dict):
        return None
    with safe_open(file, "pt") as weights:
        names, state = set(weights.keys()), model.state_dict()
        same = names == state.keys() and all(torch.equal(weights.get_tensor(name), state[name].cpu()) for name in names)
    return training if same else None


def _check_report(report: AttackReport, model: Any, head: HPMHead | None) -> None:
    """Raises a ValueError if a report is not of this model in its present state."""
    now: dict[str, Any] = {
        "architecture": model.pretrained_cfg.get("architecture"), "num_classes": model.num_classes,
        "prototypes_fitted": head and head.is_fitted(), "inference": head.inference if head else "none",
        "mix": head and head.mix,
        "weights_digest": weights_digest(model), "normalisation": in_float32(normalisation_of(PixelModel(model)))}
    measured = {**now, **report.protocol}
    # None: of a caller's own module.
    measured["normalisation"] = in_float32(measured["normalisation"]) or now["normalisation"]
    # A caller's own module was measured under the name of its class.
    if measured["architecture"] in (f"hpm_{now['architecture']}", type(model).__name__):
        measured["architecture"] = now["architecture"]
    for name, value in now.items():
        if measured[name] != value:
            raise ValueError(f"the report was measured with {name} {measured[name]!r}, the model has {value!r}. A card "
                             "may only quote the report of its own model: push the model as it was measured (for "
                             "instance find_head(model).inference = 'sample'), or measure this one")


def _check_restores(model: nn.Module, folder: Path, repo_id: str) -> None:
    """Raises a HubError if the model in the saved folder has other weights or logits."""
    if "constructor" in read_config(folder / CONFIG):  # which only its caller may run
        saved, own = load_file(folder / WEIGHTS), model.state_dict()
        if saved.keys() != own.keys() or not all(torch.equal(saved[name], own[name].cpu()) for name in own):
            raise HubError(f"cannot save a model for {repo_id}: its {WEIGHTS} has other weights. Nothing was uploaded")
        return
    parameter = next(model.parameters())
    # The caller's random state must not depend on this check.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        back = _load(folder, repo_id).to(parameter.device, parameter.dtype).eval()
        size = timm.data.resolve_model_data_config(back)["input_size"][1:]
        images = torch.randn(2, in_chans(model), *size, generator=torch.Generator().manual_seed(0)).to(parameter)
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            expected, got = model.eval()(images), back(images)
    finally:
        for module, training in modes.items():
            module.training = training
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


def _registered_at_import() -> set[str]:
    """Returns the models that `import timm_hpm` registers; `register_hpm` at run time adds none."""
    from .models import hpm_preact_resnet, hpm_timm, hpm_wrn

    return {*(f"hpm_{base}" for base in hpm_timm._BASES), *hpm_preact_resnet.default_cfgs, *hpm_wrn.default_cfgs}


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
    fault = f"its {CONFIG} is damaged or not timm's"
    try:
        architecture = read_config(folder / CONFIG)["architecture"]
        fault = (f"its architecture {architecture!r} is unknown here: update timm and timm_hpm, or register its base "
                 "with timm")
        register_saved(architecture)
        fault = f"{WEIGHTS} is damaged"
        with safe_open(folder / WEIGHTS, "pt"):
            pass
        fault = f"{WEIGHTS} and {CONFIG} do not give a model of the architecture {architecture!r}"
        return create_model(f"local-dir:{folder}", pretrained=True)
    except (ValueError, OSError, SafetensorError) as error:
        raise HubError(f"cannot load {source}: {fault} ({shortened(str(error), 600)}). Remove {folder} to download it "
                       "again; if the error stays, pull another revision, or have the model pushed again") from None


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
    cause = _telling(error)
    status = getattr(getattr(cause, "response", None), "status_code", None)
    text, is_a = str(cause), partial(isinstance, cause)
    detail = shortened(without_tokens(f"{type(cause).__name__}: {' '.join(text.split())}", token), 400)
    causes = (
        ((is_a(OSError) and getattr(cause, "errno", None) == errno.ENOSPC) or "No space left" in text,
         f"the disk is full ({detail}). Free space, or choose another place by cache_dir= or HF_HOME (downloads) or "
         "TMPDIR (uploads), and repeat"),
        (is_a(hf_errors.HFValidationError),
         f"that is no name of a repository ({detail}). Expected 'organisation/name'"),
        (is_a(hf_errors.GatedRepoError),
         f"its owner grants access by request ({detail}). Ask for it on its page on the Hub, then log in"),
        (is_a(hf_errors.RepositoryNotFoundError),
         f"the Hub knows no such repository for this login (HTTP {status}): it does not exist, or it is private. Check "
         f"the name. {_LOG_IN}"),
        (is_a(hf_errors.RevisionNotFoundError),
         "it has no such revision. Expected a branch, tag or commit of it; see 'Files and versions' on its page"),
        (status == 401,
         f"the Hub refused the login (HTTP 401; {detail}). The token is missing, wrong or expired. {_LOG_IN}"),
        (status == 403,
         f"the login may not do that (HTTP 403; {detail}). The token needs write access to the repository"),
        (is_a(hf_errors.OfflineModeIsEnabled) or hf.constants.HF_HUB_OFFLINE,
         "HF_HUB_OFFLINE is set and the cache does not hold it. Unset it, or pull once with a network and the same "
         "cache_dir and HF_HOME"),
        (status is not None, f"the Hub returned HTTP {status} ({detail}). Repeat it later"),
        ("Consistency check failed" in text, f"a file arrived cut short ({detail}). Repeat it: the download resumes"),
        (_is_of_transport(cause) or is_a(ConnectionError | TimeoutError),
         f"the connection to {hf.constants.ENDPOINT} failed ({detail}). Check the network and proxy and repeat"),
        (True, f"{detail}. Mend the cause and repeat"),
    )
    return HubError(f"{doing}: {next(why for applies, why in causes if applies)}")


def _telling(error: BaseException) -> BaseException:
    """Returns the first informative error among an error and its causes."""
    link: BaseException | None = error
    while link is not None:
        # The client wraps the error of an upload, and looks into the cache after a failed download.
        if not isinstance(link, hf_errors.LocalEntryNotFoundError) and (
                isinstance(link, OSError) or _is_of_transport(link)):
            return link
        link = link.__cause__
    return error


def _is_of_transport(error: BaseException) -> bool:
    return any(kind.__module__.partition(".")[0] in _TRANSPORTS for kind in type(error).__mro__)


def _usable_token(token: str | None) -> str | None:
    """Returns a token without the line break of its file."""
    if token is None:
        return None
    token = token.strip()
    if not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError("the token holds spaces, line breaks or letters that are not ASCII; expected the one line "
                         "that the Hub shows, such as hf_...")
    return token
