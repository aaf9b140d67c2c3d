"""Pushing models to the Hugging Face Hub, with a card, and pulling them.

What is pushed is timm's own format (`model.safetensors`, `config.json`): after `import timm_hpm`, timm itself loads it
by `timm.create_model("hf-hub:org/name", pretrained=True)`. From a shell: `python -m timm_hpm.hub push|pull|card`.
"""

import argparse
import errno
import os
import shutil
import sys
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
from timm.utils import ParseKwargs, unwrap_model
from torch import nn

from . import __version__, cards
from .data import PixelModel, normalisation_of
from .files import replacing, use_any_console, writable_folder, write_text
from .guards import last_words, shortened, without_tokens
from .head import HPMHead, find_head
from .models.configs import read_config
from .models.create import class_names, create_model
from .models.hpm_timm import register_saved
from .models.saving import CONFIG, WEIGHTS, in_chans, saved_config, write_model
from .report import AttackReport, weights_digest

CARD: Final = "README.md"
REPORT: Final = "report.json"
# What makes a model, and what is said of it.
_FILES: Final = (CONFIG, WEIGHTS, CARD, REPORT)

_LIBRARY: Final[dict[str, Any]] = {"library_name": "timm_hpm", "library_version": __version__}
_LOG_IN = "Log in with `hf auth login`, set HF_TOKEN, or pass token="
# What the packages below huggingface_hub raise where the connection is at fault; it has used several.
_TRANSPORTS = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")


class HubError(OSError):
    """A push or pull that failed; the message names the repository, the cause and what to do about it."""


def push(
        model: nn.Module,
        repo_id: str,
        *,
        report: AttackReport | str | os.PathLike | None = None,
        private: bool = False,
        revision: str | None = None,
        create_pr: bool = False,
        token: str | None = None,
        commit_message: str = "Push a model of timm_hpm",
        license: str | None = None,
        base_model: str | None = None,
        notes: str = "",
        training: dict[str, Any] | None = None,
) -> str:
    """Uploads a model with its card to the Hub, in one commit, and returns the URL where it stands.

    Everything is first built in a temporary folder and loaded from there again: what cannot be pulled is not pushed.
    The repository and the branch are made where they are missing. Pushing again updates all of the files; without
    `report` it removes the report of an earlier push, which was of another model.

    Arguments:
        model: a model with an HPM head, made by `timm.create_model` (with `add_hpm_head`, or an `hpm_*` name).
        repo_id: "organisation/name", or "name" for one's own.
        report: what `mixed_surrogate_attack` measured of this very model, or its file.
        private: whether a new repository is private. A public one stays public, so that is refused.
        revision: branch to push to; None for `main`.
        create_pr: whether to open a pull request instead.
        token: None for that of `hf auth login` or HF_TOKEN.
        commit_message: first line of the commit.
        license: the Hub's name of a licence, such as "mit"; None for that of the weights, if their pretrained cfg says
            one: weights of one's own have none until their owner gives it.
        base_model: Hub id of the model that this one was trained from.
        notes: Markdown for the card: what stands before the first `## ` opens it, the rest follows the usage.
        training: how the model was trained, as train.py writes it into `config.json`; None for that of the weights'
            file, if the model still has its weights.

    Raises:
        ValueError: no HPM head, a report of another model, or a token that can be none.
        HubError: anything else. Nothing has changed on the Hub then, but for a new and empty repository or branch.
    """
    token = _usable_token(token)
    with _explained(repo_id, f"cannot push to {repo_id}", token):
        hf.utils.validate_repo_id(repo_id)
        if "/" not in repo_id:
            repo_id = f"{hf.HfApi(token=token).whoami()['name']}/{repo_id}"
    with TemporaryDirectory(prefix="timm_hpm-") as temporary:
        folder = Path(temporary)
        where = repo_id if revision is None or create_pr else f"{repo_id}@{revision}"
        save(model, folder, repo_id=where, report=report, license=license, base_model=base_model, notes=notes,
             training=training)
        with _explained(repo_id, f"cannot push to {repo_id}", token):
            return _upload(folder, repo_id, private, revision, create_pr, token, commit_message)


def pull(
        repo_id: str,
        *,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | os.PathLike | None = None,
) -> Any:
    """Returns the model of a repository on the Hub, in eval mode; it is downloaded once and then taken from the cache.

    Beyond `timm.create_model("hf-hub:...", pretrained=True)` it takes a token, names the repository in every error, and
    registers `hpm_{base}` where the model was made by `add_hpm_head` from another architecture of timm's.

    Arguments:
        repo_id: "organisation/name".
        revision: branch, tag or commit; None for `main`.
        token: None for that of `hf auth login` or HF_TOKEN.
        cache_dir: folder of the downloads; None for the Hub client's own.

    Raises:
        ValueError: a token that can be none.
        HubError: it cannot be reached or read, or is no model of timm's; nothing but the client's cache is written.
    """
    return _pulled(repo_id, revision, token, cache_dir)


def _pulled(repo_id: str, revision: str | None, token: str | None = None,
            cache_dir: str | os.PathLike | None = None, output: Path | None = None) -> Any:
    """Returns what `pull` does; copies the repository's `_FILES` into the folder `output`, once they make a model."""
    where = repo_id if revision is None else f"{repo_id}@{revision}"
    token = _usable_token(token)
    with _explained(repo_id, f"cannot pull {where}", token):
        folder = Path(hf.snapshot_download(
            repo_id, revision=revision, token=token, cache_dir=None if cache_dir is None else Path(cache_dir),
            allow_patterns=list(_FILES if output else _FILES[:2]), **_LIBRARY))
    model = _load(folder, where).eval()
    model.pretrained_cfg.pop("file", None)
    model.pretrained_cfg.update(source="hf-hub", hf_hub_id=where)
    if output is not None:
        with _explained(repo_id, f"cannot write {where} into {output}", token):
            for name in _FILES:
                if (folder / name).is_file():
                    with replacing(output / name) as path:
                        shutil.copyfile(folder / name, path)
                else:
                    (output / name).unlink(missing_ok=True)  # of a model that stood here before
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
    """Writes into `folder` what `push` uploads: weights, config, card and report.

    timm loads it by `timm.create_model("local-dir:folder", pretrained=True)`.

    Arguments:
        model, report, license, base_model, notes, training: see `push`.
        folder: made where it is missing.
        repo_id: the repository that the card's usage names, "org/name" or "org/name@revision"; None for the folder.

    Raises:
        ValueError: no HPM head, or a report of another model.
        HubError: the model cannot be saved, or what was saved does not give it back.
    """
    folder = Path(folder)
    model = unwrap_model(model)
    head = find_head(model)
    if not isinstance(report, AttackReport) and report is not None:
        report = AttackReport.load(report)
    if report is not None:
        _check_report(report, model, head)
    name = f"local-dir:{folder}" if repo_id is None else f"hf-hub:{repo_id}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".timm_hpm-", dir=folder) as temporary:
            built = Path(temporary)
            training = training or _training_of(model)
            config = write_model(model, built, training=training, license=license)
            card = cards.model_card(
                (repo_id or folder.resolve().name).partition("@")[0], name,
                config["pretrained_cfg"] | {"architecture": config["architecture"], "label_names": class_names(model)},
                head=head, parameters=sum(p.numel() for p in model.parameters()), report=report, license=license,
                base_model=base_model, notes=notes, register=config["architecture"] not in _registered_at_import(),
                training=training)
            write_text(built / CARD, card)
            if report is not None:
                report.save(built / REPORT)
            _check_restores(model, built, repo_id or str(folder))
            # The weights first: they hold their config, which goes before the file's.
            for file in sorted(built.iterdir(), key=lambda file: file.name != WEIGHTS):
                with replacing(folder / file.name) as path:
                    file.rename(path)
            if report is None:
                (folder / REPORT).unlink(missing_ok=True)  # of the model that stood here before
    except HubError:
        raise
    except (OSError, SafetensorError) as error:
        raise _explanation(error, repo_id or str(folder), f"cannot save {type(model).__name__} into {folder}", None) \
            from error


def _training_of(model: Any) -> dict[str, Any] | None:
    """Returns what the file of a model's weights says of their training; None if it says nothing or has others."""
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


def _check_report(report: AttackReport, model: Any, head: HPMHead) -> None:
    """Raises a ValueError where a report is not of this model in its present state."""
    architecture = model.pretrained_cfg.get("architecture")
    now = {"architecture": architecture, "num_classes": head.out_features, "prototypes_fitted": head.is_fitted(),
           "inference": head.inference, "mix": head.mix, "weights_digest": weights_digest(model)}
    found = report.protocol.get("normalisation")
    if found:
        own = normalisation_of(PixelModel(model)) or {}
        now["normalisation"] = found if own and all(
            len(found[entry]) == len(own[entry]) and torch.allclose(
                torch.tensor(found[entry]), torch.tensor(own[entry]), atol=1e-6) for entry in ("mean", "std")) else own
    for name, value in now.items():
        measured = report.protocol.get(name, value)
        if name == "architecture":
            measured = value if measured in (f"hpm_{value}", value) else measured
        if measured != value:
            raise ValueError(f"the report was measured with {name} {measured!r}, the model has {value!r}. A card may "
                             "only quote what its own model gave: push the model as it was measured (for instance "
                             "find_head(model).inference = 'sample'), or measure this one")


def _check_restores(model: nn.Module, folder: Path, repo_id: str) -> None:
    """Raises a HubError where the saved folder gives a model with other answers."""
    parameter = next(model.parameters())
    # What the caller will draw next does not depend on whether a model was made here.
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
    state, restored = model.state_dict(), back.state_dict()
    # timm resizes what was made for another image size, and the logits may hardly tell.
    same_shapes = {name: tensor.shape for name, tensor in state.items()} == {
        name: tensor.shape for name, tensor in restored.items()}
    if not same_shapes or got.shape != expected.shape or not torch.allclose(
            got, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()), equal_nan=True):
        difference = "gives other logits" if same_shapes else "has weights of other shapes"
        raise HubError(f"cannot save a model for {repo_id}: loaded again from config.json and model.safetensors it "
                       f"{difference}. Something was changed after timm.create_model, or given to a class directly, or "
                       "is not recorded by this version of timm. Make the model by timm.create_model with those "
                       "arguments, or update timm. Nothing was uploaded")


def _registered_at_import() -> set[str]:
    """Returns the names of the models that `import timm_hpm` registers for everyone, `register_hpm` at run time not."""
    from .models import hpm_preact_resnet, hpm_timm, hpm_wrn

    return {*(f"hpm_{base}" for base in hpm_timm._BASES), *hpm_preact_resnet.default_cfgs, *hpm_wrn.default_cfgs}


def _upload(
        folder: Path,
        repo_id: str,
        private: bool,
        revision: str | None,
        create_pr: bool,
        token: str | None,
        commit_message: str,
) -> str:
    api = hf.HfApi(token=token, **_LIBRARY)
    api.create_repo(repo_id, private=private, exist_ok=True)
    if private and not api.model_info(repo_id).private:
        raise HubError(f"cannot push to {repo_id} with private=True: it exists and is public. Make it private in its "
                       "settings on the Hub first, or push with private=False. Nothing was uploaded")
    if revision is not None and not create_pr and not api.revision_exists(repo_id, revision):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    operations: list[Any] = [
        hf.CommitOperationAdd(file.name, file) for file in sorted(folder.iterdir())
    ]
    if not (folder / REPORT).exists() and api.file_exists(repo_id, REPORT, revision=revision):
        operations.append(hf.CommitOperationDelete(REPORT))
    commit = api.create_commit(
        repo_id, operations, commit_message=commit_message, revision=revision, create_pr=create_pr)
    if create_pr and commit.pr_url is not None:
        return commit.pr_url
    url = f"{api.endpoint}/{repo_id}"
    return url if revision is None else f"{url}/tree/{quote(revision, safe='')}"


def _load(folder: Path, where: str) -> Any:
    """Returns the model in a folder of timm's format; `where` is its repository, for the errors."""
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise HubError(f"cannot load {where}: it has no {name}, so it is no model that timm_hpm or timm pushed "
                           "with safetensors (pickled weights are not read). Check the name and the revision")
    try:
        architecture = read_config(folder / CONFIG)["architecture"]
    except (ValueError, OSError) as error:
        raise HubError(f"cannot load {where}: its {CONFIG} is damaged or not timm's ({error}). Push the model again, "
                       "or pull another revision") from None
    try:
        register_saved(architecture)
    except ValueError as error:
        raise HubError(f"cannot load {where}: its architecture {architecture!r} is unknown here ({error}). Update "
                       "timm and timm_hpm, or register the base with timm first") from None
    try:
        return create_model(f"local-dir:{folder}", pretrained=True)
    except (ValueError, OSError) as error:  # whatever a damaged file, or a network with a foreign config, makes of it
        try:
            with safe_open(folder / WEIGHTS, "pt"):
                pass
        except SafetensorError as damage:
            raise HubError(f"cannot load {where}: {WEIGHTS} is damaged ({damage}). Remove {folder / WEIGHTS} and the "
                           "file it links to, to download it again; if that gives the same, the file on the Hub is "
                           "damaged and has to be pushed again") from None
        raise HubError(f"cannot load {where}: {WEIGHTS} and {CONFIG} do not give a model of the architecture "
                       f"{architecture!r} ({shortened(str(error), 600)}). They are of different models or of another "
                       "version of timm; push the model again, or pull another revision") from None


@contextmanager
def _explained(repo_id: str, doing: str, token: str | None) -> Iterator[None]:
    """Turns every error of the block into a HubError."""
    try:
        yield
    except HubError:
        raise
    except Exception as error:
        explanation = _explanation(error, repo_id, doing, token)
        # Without the cause: its text may hold what the server answered, and that the token.
        raise explanation from None


def _explanation(error: BaseException, repo_id: str, doing: str, token: str | None) -> HubError:
    cause = _telling(error)
    status = getattr(getattr(cause, "response", None), "status_code", None)
    detail = shortened(without_tokens(f"{type(cause).__name__}: {' '.join(str(cause).split())}", token), 400)
    if (isinstance(cause, OSError) and cause.errno == errno.ENOSPC) or "No space left" in str(cause):
        return HubError(f"{doing}: the disk is full ({detail}). Free space, or choose another place by cache_dir= or "
                        "HF_HOME (downloads) or TMPDIR (uploads), and repeat")
    if isinstance(cause, hf_errors.HFValidationError):
        why = f"that is no name of a repository ({detail}). Expected 'organisation/name'"
    elif isinstance(cause, hf_errors.GatedRepoError):
        why = f"its owner grants access by request ({detail}). Ask for it on its page on the Hub, then log in"
    elif isinstance(cause, hf_errors.RepositoryNotFoundError):
        why = (f"the Hub knows no such repository for this login (HTTP {status}): it does not exist, or it is private. "
               f"Check the name. {_LOG_IN}")
    elif isinstance(cause, hf_errors.RevisionNotFoundError):
        why = "it has no such revision. Expected a branch, tag or commit of it; see 'Files and versions' on its page"
    elif status == 401:
        why = f"the Hub refused the login (HTTP 401; {detail}). The token is missing, wrong or expired. {_LOG_IN}"
    elif status == 403:
        why = (f"the login may not do that (HTTP 403; {detail}). The token needs write access to "
               f"{repo_id.rpartition('/')[0] or 'your account'}; without it, push with create_pr=True")
    elif isinstance(cause, hf_errors.EntryNotFoundError) and status is not None:
        why = f"it lacks a file ({detail}). Check the revision"
    elif isinstance(cause, hf_errors.OfflineModeIsEnabled) or hf.constants.HF_HUB_OFFLINE:
        why = ("HF_HUB_OFFLINE is set and the cache does not hold it. Unset it, or pull once with a network and the "
               "same cache_dir and HF_HOME")
    elif status is not None:
        why = f"the Hub answered HTTP {status} ({detail}). Repeat it later; nothing is half-written"
    elif "Consistency check failed" in str(cause):
        why = f"a file arrived cut short ({detail}). Repeat it: the download goes on where it stopped"
    elif _is_of_transport(cause) or isinstance(cause, ConnectionError | TimeoutError):
        why = (f"the connection to {hf.constants.ENDPOINT} failed ({detail}). Check the network and proxy and repeat; "
               "nothing is half-written")
    else:
        why = f"{detail}. Nothing is half-written; mend the cause and repeat"
    return HubError(f"{doing}: {why}")


def _telling(error: BaseException) -> BaseException:
    """Returns the error among an error and its causes that says what happened."""
    link: BaseException | None = error
    while link is not None:
        # The client wraps what broke an upload, and why it looked into the cache in vain.
        if not isinstance(link, hf_errors.LocalEntryNotFoundError) and (isinstance(link, OSError)
                                                                       or _is_of_transport(link)):
            return link
        link = link.__cause__
    return error


def _usable_token(token: str | None) -> str | None:
    """Returns a token without the line break of the file it came from.

    Raises:
        ValueError: characters that no HTTP header may have; the layers below would quote them in logs and errors.
    """
    if token is None:
        return None
    token = token.strip()
    if not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError("the token holds spaces, line breaks or letters that are not ASCII; expected the one line "
                         "that the Hub shows, such as hf_...")
    return token


def _is_of_transport(error: BaseException) -> bool:
    return any(kind.__module__.partition(".")[0] in _TRANSPORTS for kind in type(error).__mro__)


# The command line


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Returns the command line's options."""
    parser = argparse.ArgumentParser(
        prog="python -m timm_hpm.hub", description="Pushes models to the Hugging Face Hub, pulls them, writes cards.",
        epilog="The token is that of `hf auth login` or of HF_TOKEN: in an option, every user of the machine sees it.")
    commands = parser.add_subparsers(dest="command", required=True)

    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("--checkpoint", metavar="FILE",
                       help="weights, such as train.py's model.safetensors (the model's pretrained ones)")
    model.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="NAME=VALUE",
                       help="arguments of timm.create_model, such as inference=sample")
    model.add_argument("--report", metavar="FILE", help="report.json of evaluate.py, measured of this model")
    model.add_argument("--notes", metavar="FILE", help="Markdown for the card, such as how it was trained")
    model.add_argument("--license", help="the Hub's name of a licence, such as mit (the weights' own, or none)")
    model.add_argument("--base-model", metavar="ID", help="Hub id of the model that this one was trained from")

    command = commands.add_parser("push", parents=[model], help="upload a model and its card in one commit")
    command.add_argument("repo_id", metavar="ORG/NAME")
    command.add_argument("--model", required=True, help="timm model with an HPM head, such as hpm_wrn28_10")
    command.add_argument("--private", action="store_true", help="make a new repository private")
    command.add_argument("--revision", help="branch, made where it is missing (main)")
    command.add_argument("--create-pr", action="store_true", help="open a pull request instead")
    command.add_argument("--message", default="Push a model of timm_hpm", help="of the commit (%(default)s)")

    command = commands.add_parser("pull", help="download a model, check that it loads, and say what it is")
    command.add_argument("repo_id", metavar="ORG/NAME")
    command.add_argument("--revision", help="branch, tag or commit (main)")
    command.add_argument("--output", type=Path, metavar="FOLDER", help="also write it there, for local-dir:FOLDER")

    command = commands.add_parser("card", parents=[model], help="write the card of a model without uploading it")
    command.add_argument("model", help="timm model with an HPM head, or its tag")
    command.add_argument("--repo-id", metavar="ORG/NAME", help="the repository that the usage shall name (the tag)")
    command.add_argument("--output", type=Path, metavar="FILE", help="(the terminal)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Runs one of the commands; returns the exit code."""
    use_any_console()
    args = parse_args(argv)
    if args.command == "pull":
        return _main_pull(args)
    notes = Path(args.notes).read_text(encoding="utf-8") if args.notes else ""
    shared = {"report": args.report, "license": args.license, "base_model": args.base_model, "notes": notes}
    if args.checkpoint:
        shared["training"] = saved_config(args.checkpoint).get("training")
    if args.command == "push":
        url = push(_created(args), args.repo_id, private=args.private, revision=args.revision,
                   create_pr=args.create_pr, commit_message=args.message, **shared)
        print(f"pushed: {url}")
        return 0
    cards.print_or_write(_card(args, shared), args.output)
    return 0


def _main_pull(args: argparse.Namespace) -> int:
    model = _pulled(args.repo_id, args.revision, output=None if args.output is None else writable_folder(args.output))
    print(f"{args.repo_id}: {model.pretrained_cfg['architecture']}, {model.num_classes} classes, "
          f"{sum(p.numel() for p in model.parameters()):,} parameters")
    print(f"head: {find_head(model)}, prototypes {'fitted' if find_head(model).is_fitted() else 'not fitted'}")
    if args.output is not None:
        print(f"written: {args.output}")
    return 0


def _created(args: argparse.Namespace) -> Any:
    return create_model(args.model, pretrained=args.checkpoint is None, checkpoint=args.checkpoint, **args.model_kwargs)


def _card(args: argparse.Namespace, shared: dict[str, Any]) -> str:
    if args.repo_id is None and args.checkpoint is None and not args.model_kwargs:
        return cards.tag_card(args.model, **shared)
    with TemporaryDirectory(prefix="timm_hpm-") as folder:
        save(_created(args), folder, repo_id=args.repo_id or args.model, **shared)
        return (Path(folder) / CARD).read_text(encoding="utf-8")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        sys.exit(last_words("timm_hpm.hub", error))
