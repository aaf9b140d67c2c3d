"""A process of its own for the Hub's real client, which reads HF_ENDPOINT and HF_HUB_OFFLINE when it is imported.

Runs the functions below by name: a line of JSON in, a line of JSON out, with all that was logged and printed meanwhile.
"""

import contextlib
import hashlib
import io
import json
import logging
import os
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any

import timm
import torch

import timm_hpm
from timm_hpm.__main__ import main

torch.set_num_threads(1)


def made(name: str = "hpm_wrn10_2", *, seed: int = 0, add: bool = False, fitted: bool = True, **kwargs: Any) -> Any:
    """Returns a small model with random weights and, if `fitted`, random prototypes."""
    torch.manual_seed(seed)
    model = timm.create_model(name, **kwargs)
    if add:
        timm_hpm.add_hpm_head(model, mix=0.25, ema_decay=0.5, inference="sample")
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d) and not kwargs.get("pretrained"):
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
    head = timm_hpm.find_head(model)
    if fitted:
        head.set_prototypes(torch.randn_like(head.prototypes))
        torch.nn.init.constant_(head.log_scale, -1.5)
    return model.eval()


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


def answered(line: str) -> dict[str, Any]:
    """Runs one request and returns its result or error, and what it wrote."""
    request = json.loads(line)
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    os.environ.pop("HF_TOKEN", None)
    os.environ.update(request["environ"])
    answer: dict[str, Any] = {"result": None, "error": None, "traceback": "", "warnings": []}
    logging.getLogger().addHandler(handler)
    with contextlib.redirect_stdout(written), contextlib.redirect_stderr(written), \
            warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            answer["result"] = globals()[request["function"]](**request["arguments"])
        except Exception as error:
            answer |= {"error": str(error), "type": type(error).__name__, "traceback": traceback.format_exc()}
    logging.getLogger().removeHandler(handler)
    return answer | {"written": written.getvalue(), "warnings": [str(warning.message) for warning in caught]}


if __name__ == "__main__":
    logging.getLogger().setLevel(logging.DEBUG)
    for name in ("huggingface_hub", "timm", "httpx", "httpx2"):
        logging.getLogger(name).setLevel(logging.DEBUG)
        logging.getLogger(name).propagate = True
    for name in ("httpcore", "httpcore2"):
        # Below it lies the wire, with whatever a server answers.
        logging.getLogger(name).setLevel(logging.INFO)
    os.chdir(Path(sys.argv[1]))
    out, sys.stdout = sys.stdout, sys.stderr
    print(json.dumps("ready"), file=out, flush=True)
    for request_line in sys.stdin:
        print(json.dumps(answered(request_line)), file=out, flush=True)
