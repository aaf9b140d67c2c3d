"""What a process of its own does with the Hub's real client, which reads HF_ENDPOINT when it is imported."""

import contextlib
import hashlib
import io
import logging
import os
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any

import timm
import torch
from nets import with_prototypes, with_statistics

import timm_hpm
from timm_hpm.__main__ import main


def made(name: str = "hpm_wrn10_2", *, seed: int = 0, add: bool = False, fitted: bool = True, **kwargs: Any) -> Any:
    """Returns a small model with random weights and, if `fitted`, random prototypes."""
    torch.manual_seed(seed)
    model = timm.create_model(name, **kwargs)
    if add:
        timm_hpm.add_hpm_head(model, mix=0.25, ema_decay=0.5, inference="sample")
    if not kwargs.get("pretrained"):
        with_statistics(model)
    return (with_prototypes(model, -1.5) if fitted else model).eval()


def facts(model: Any) -> dict[str, Any]:
    """Returns what must survive the way to the Hub and back, the answers included."""
    head = timm_hpm.find_head(model)
    data = timm.data.resolve_model_data_config(model)
    size = data["input_size"]
    channels = next(weight for weight in model.parameters() if weight.ndim == 4).shape[1]
    images = torch.randn(3, channels, *size[1:], generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model.eval()(images)
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(key.encode() + tensor.contiguous().numpy().tobytes())
    return {
        "logits": hashlib.sha256(logits.numpy().tobytes()).hexdigest(), "weights": digest.hexdigest(),
        "head": head.config(), "fitted": head.is_fitted(), "input_size": [channels, *size[1:]],
        # timm writes one mean for one channel, their average.
        "mean": round(sum(data["mean"]) / len(data["mean"]), 6), "num_classes": model.num_classes,
    }


def push(repo_id: str, model: dict[str, Any] | None = None, temporary: str = "", **kwargs: Any) -> dict[str, Any]:
    built = made(**model or {})
    tempfile.tempdir = temporary or None
    try:
        return {"url": timm_hpm.hub.push(built, repo_id, **kwargs), **facts(built)}
    finally:
        tempfile.tempdir = None


def save(folder: str, model: dict[str, Any] | None = None) -> dict[str, Any]:
    built = made(**model or {})
    timm_hpm.hub.save(built, folder)
    return facts(built)


def pull(repo_id: str, **kwargs: Any) -> dict[str, Any]:
    return facts(timm_hpm.hub.pull(repo_id, **kwargs))


def create(name: str, register: str = "", **kwargs: Any) -> dict[str, Any]:
    if register:
        timm_hpm.register_hpm(register)
    return facts(timm.create_model(name, pretrained=True, **kwargs))


def shell(words: list[str]) -> int:
    return main(words)


def run(code: str) -> None:
    exec(compile(code, "card", "exec"), {})


def begin(folder: Path) -> None:
    """Prepares the process: all is logged but the wire, with whatever a server answers."""
    os.chdir(folder)
    torch.set_num_threads(1)
    logging.getLogger().setLevel(logging.DEBUG)
    for name in ("huggingface_hub", "timm", "httpx", "httpx2"):
        logging.getLogger(name).setLevel(logging.DEBUG)
        logging.getLogger(name).propagate = True
    for name in ("httpcore", "httpcore2"):
        logging.getLogger(name).setLevel(logging.INFO)


def answered(function: str, arguments: dict[str, Any], environ: dict[str, str]) -> dict[str, Any]:
    """Calls a function of this module by its name; returns its result or error, and what it wrote."""
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    os.environ.pop("HF_TOKEN", None)
    os.environ.update(environ)
    answer: dict[str, Any] = {"result": None, "error": None, "traceback": "", "warnings": []}
    logging.getLogger().addHandler(handler)
    with contextlib.redirect_stdout(written), contextlib.redirect_stderr(written), \
            warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            answer["result"] = globals()[function](**arguments)
        except Exception as error:
            answer |= {"error": str(error), "type": type(error).__name__, "traceback": traceback.format_exc()}
    logging.getLogger().removeHandler(handler)
    return answer | {"written": written.getvalue(), "warnings": [str(warning.message) for warning in caught]}
