"""The Hub for real: its own client and timm's functions, in processes of their own, against a server on loopback."""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import hub_client
import hub_server
import pytest
import timm
import torch
from timm.utils import ModelEma, ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel

import timm_hpm
from timm_hpm import AttackReport
from timm_hpm.models.saving import saved_network

TOKEN = "hf_Secret0123456789abcdefghijklmnopqr"
#: Of the embedded weights, measured by evaluate.py.
REPORT = Path(__file__).parents[1] / "hub_cards" / "hpm_wrn10_2.digits_linf.report.json"
EMBEDDED = {"name": "hpm_wrn10_2.digits_linf", "pretrained": True, "fitted": False}


class Failed(Exception):
    """An error in the client's process."""


class Client:
    """A process of its own for the Hub's client, which reads its environment when it is imported; see hub_client.py."""

    def __init__(self, folder: Path, **environ: str):
        folder.mkdir(parents=True, exist_ok=True)
        environ |= {"HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        self.pool = ProcessPoolExecutor(1, get_context("spawn"), hub_client.begin, (folder,))
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("HF_TOKEN", raising=False)
            for name, value in environ.items():
                patch.setenv(name, value)
            self.pool.submit(int)  # which starts the process
        self.answer: dict[str, Any] = {}

    def __call__(self, function: str, *, environ: dict[str, str] | None = None, **arguments: Any) -> Any:
        """Returns what a function of hub_client.py returns; raises `Failed` with its error."""
        self.answer = self.pool.submit(hub_client.answered, function, arguments, environ or {}).result(600)
        # Whatever happened: nobody has said the token.
        assert TOKEN not in repr(self.answer), "the token leaked"
        if self.answer["error"] is not None:
            raise Failed(f"{self.answer['type']}: {self.answer['error']}")
        return self.answer["result"]


@pytest.fixture(scope="module")
def server():
    with hub_server.running() as running:
        running.tokens[TOKEN] = "someone"
        yield running


@pytest.fixture(scope="module")
def client(server, tmp_path_factory):
    client = Client(tmp_path_factory.mktemp("client"), HF_ENDPOINT=server.url)
    yield client
    client.pool.shutdown()


@pytest.fixture(scope="module")
def loader(server, tmp_path_factory):
    """Another process, as of another user, with a cache of its own."""
    loader = Client(tmp_path_factory.mktemp("loader"), HF_ENDPOINT=server.url)
    yield loader
    loader.pool.shutdown()


@pytest.fixture(autouse=True)
def no_faults(server):
    server.requests.clear()
    yield
    # At once, as the fixtures of the module push before the next test's.
    server.faults = hub_server.Faults()


def push(client: Client, repo_id: str, **arguments: Any) -> dict[str, Any]:
    """Pushes a model made by hub_client.py, and returns its facts."""
    pushed = client("push", repo_id=repo_id, **{"token": TOKEN} | arguments)
    pushed.pop("url")
    return pushed


@pytest.fixture(scope="module")
def good(server, client):
    """The files of a pushed model, and its facts."""
    pushed = push(client, "org/good")
    return server.files("org/good"), pushed


def test_a_pushed_model_is_pulled_equal(server, loader, good):
    files, pushed = good
    assert sorted(files) == [".gitattributes", "README.md", "config.json", "model.safetensors"]
    assert len(server.repos["org/good"].commits) == 2  # the repository's own, and one
    assert loader("pull", repo_id="org/good") == loader("create", name="hf-hub:org/good") == pushed


@pytest.mark.parametrize(("model", "architecture"), [
    ({"name": "hpm_wrn10_2.untrained_deepmind", "inference": "dataset", "mix": 0.125, "ema_decay": 0.75,
      "depths": [2, 1, 1], "in_chans": 1, "num_classes": 7}, "hpm_wrn10_2"),
    ({"name": "hpm_wrn10_2", "fitted": False}, "hpm_wrn10_2"),
    ({"name": "resnet18", "add": True, "num_classes": 5}, "hpm_resnet18"),
    ({"name": "test_vit", "add": True, "img_size": 96, "num_classes": 3}, "hpm_test_vit"),
])
def test_architecture_and_head_come_back(server, client, loader, model, architecture):
    repo_id = f"org/{model['name']}-{model.get('add', False)}"
    pushed = push(client, repo_id, model=model)
    assert json.loads(server.files(repo_id)["config.json"])["architecture"] == architecture
    register = "test_vit" if architecture == "hpm_test_vit" else ""
    card = server.files(repo_id)["README.md"].decode()
    assert ('timm_hpm.register_hpm("test_vit")' in card) == bool(register)
    assert ("No prototypes yet" in card) == (not pushed["fitted"])
    if register:
        with pytest.raises(Failed, match="Unknown model"):
            loader("create", name=f"hf-hub:{repo_id}")
    # pull registers the architecture; create_model is used as the card says.
    assert loader("pull", repo_id=repo_id) == pushed
    assert loader("create", name=f"hf-hub:{repo_id}", register=register) == pushed


def aliased(model: nn.Module) -> nn.Module:
    shared = torch.rand(2, 32)
    model.stages[0][0].bn2.running_mean, model.stages[0][0].bn2.running_var = shared[0], shared[1]
    model.norm.running_mean = model.norm.running_var
    return model


def partly_training(model: nn.Module) -> nn.Module:
    model.train().norm.eval()
    return model


@pytest.mark.parametrize("odd", [lambda model: model.to(memory_format=torch.channels_last), aliased, nn.Module.bfloat16,
                                 nn.DataParallel, partly_training])
def test_odd_models_are_saved_and_left_as_they_are(odd, tmp_path):
    model = hub_client.made()
    given = odd(model)
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    timm_hpm.hub.save(given, tmp_path)
    assert [module.training for module in model.modules()] == modes and torch.equal(torch.get_rng_state(), state)
    model = model.float().to(memory_format=torch.contiguous_format)
    saved = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert hub_client.facts(saved) == hub_client.facts(model)


class Outer(nn.Module):
    """A network whose attribute has the name by which DataParallel and averages keep theirs."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.module, self.fc = inner, nn.Linear(4, 3)


def test_only_a_wrapper_is_saved_without_its_own_layers():
    network = hub_client.made()
    for wrap in (nn.DataParallel, ModelEma, ModelEmaV3, AveragedModel,
                 lambda model: ModelEmaV3(nn.DataParallel(model))):
        assert type(saved_network(wrap(network))) is type(network)
    outer = Outer(network)
    assert saved_network(outer) is outer and saved_network(nn.DataParallel(outer)) is outer


def test_a_model_that_could_not_be_pulled_is_not_pushed(server, client):
    with pytest.raises(Failed, match=r"HubError: cannot save a model for org/changed: .*gives other logits"):
        client("run", code=f"""
import torch, timm_hpm, hub_client
model = hub_client.made()
model.act = torch.nn.GELU()
timm_hpm.hub.push(model, "org/changed", token={TOKEN!r})
""")
    assert "org/changed" not in server.repos


def test_a_second_push_updates_and_an_equal_one_adds_no_commit(server, client, loader):
    push(client, "org/twice", report=str(REPORT), model=EMBEDDED)
    assert json.loads(server.files("org/twice")["report.json"]) == AttackReport.load(REPORT).to_dict()
    second = push(client, "org/twice", model={"seed": 2}, commit_message="another")
    repo = server.repos["org/twice"]
    assert repo.messages[1:] == ["Push a model of timm_hpm", "another"]
    # The report was of the first model.
    assert sorted(server.files("org/twice")) == [".gitattributes", "README.md", "config.json", "model.safetensors"]
    assert push(client, "org/twice", model={"seed": 2}) == second and len(repo.commits) == 3
    assert loader("pull", repo_id="org/twice") == second


def test_the_name_alone_means_ones_own_and_the_cards_usage_runs_as_it_stands(server, client, loader):
    model = {"name": "test_resnet", "add": True, "num_classes": 4}
    assert client("push", repo_id="mine", token=TOKEN, model=model)["url"] == f"{server.url}/someone/mine"
    card = server.files("someone/mine")["README.md"].decode()
    usage, = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert '"hf-hub:someone/mine"' in usage
    # evaluate.py asks as this does for an architecture that nobody has registered.
    loader("run", code="import timm_hpm; timm_hpm.models.create.create_model('hf-hub:someone/mine', pretrained=True)")
    loader("run", code=usage + """
import torch
assert timm_hpm.find_head(model).inference == "sample" and pixel_model(torch.rand(2, 3, 160, 160)).shape == (2, 4)
""")


def test_a_private_repository_needs_a_token(server, client, loader):
    pushed = push(client, "org/private", private=True, token=None, environ={"HF_TOKEN": TOKEN})
    assert server.repos["org/private"].private
    with pytest.raises(Failed, match="org/private"):
        client("create", name="hf-hub:org/private")
    with pytest.raises(Failed, match=r"HubError: cannot pull org/private: HTTP 401: there is no such repository, or "
                                     r"this login .*hf auth login"):
        loader("pull", repo_id="org/private")
    assert loader("pull", repo_id="org/private", token=f"{TOKEN}\n") == pushed
    assert loader("create", name="hf-hub:org/private", environ={"HF_TOKEN": TOKEN}) == pushed
    server.add("org/public", {"README.md": b"mine"})
    with pytest.raises(Failed, match=r"cannot push to org/public with private=True: it exists and is public"):
        client("push", repo_id="org/public", private=True, token=TOKEN)
    assert server.files("org/public") == {"README.md": b"mine"}


def test_revisions(server, client, loader):
    first = push(client, "org/revisions")
    second = client("push", repo_id="org/revisions", model={"seed": 3}, revision="v1", token=TOKEN)
    assert second.pop("url") == f"{server.url}/org/revisions/tree/v1"
    assert loader("pull", repo_id="org/revisions") == first
    for revision in ("v1", server.repos["org/revisions"].refs["v1"]):
        assert loader("pull", repo_id="org/revisions", revision=revision) == second
    assert loader("create", name="hf-hub:org/revisions@v1") == second
    card = server.files("org/revisions", "v1")["README.md"].decode()
    assert '"hf-hub:org/revisions@v1"' in card and 'pull("org/revisions", revision="v1")' in card


def test_the_cache_serves_without_a_network(server, loader, good, tmp_path):
    assert loader("pull", repo_id="org/good", cache_dir=str(tmp_path)) == good[1]
    before = len(server.requests)
    offline = Client(tmp_path / "offline", HF_ENDPOINT=server.url, HF_HUB_OFFLINE="1")
    try:
        assert offline("pull", repo_id="org/good", cache_dir=str(tmp_path)) == good[1]
        assert offline("create", name="hf-hub:org/good", cache_dir=str(tmp_path)) == good[1]
        with pytest.raises(Failed, match=r"HubError: cannot pull org/other: HF_HUB_OFFLINE is set and the cache"):
            offline("pull", repo_id="org/other", cache_dir=str(tmp_path))
        with pytest.raises(Failed, match=r"HubError: cannot push to org/good: HF_HUB_OFFLINE is set"):
            offline("push", repo_id="org/good", token=TOKEN)
    finally:
        offline.pool.shutdown()
    assert len(server.requests) == before


def test_a_connection_that_fails_is_named(server, client):
    server.faults.hang_up = "."
    for function, doing in (("pull", "pull"), ("push", "push to")):
        with pytest.raises(Failed, match=rf"HubError: cannot {doing} org/x: check the connection to {server.url}"):
            client(function, repo_id="org/x", token=TOKEN)


WRONG = "hf_wrongwrongwrong"


@pytest.mark.parametrize(("function", "repo_id", "token", "message"), [
    ("pull", "org/nowhere", None, "cannot pull org/nowhere: HTTP 401: there is no such repository"),
    ("pull", "org/nowhere", TOKEN, "cannot pull org/nowhere: HTTP 404: there is no such repository"),
    ("pull", "a/b/c", None, "cannot pull a/b/c: that is no name of a repository.*organisation/na"),
    ("pull", "org/good2", WRONG, "cannot pull org/good2: HTTP 401: .*this login"),
    ("push", "org/good2", WRONG, "cannot push to org/good2: HTTP 401: .*this login"),
    ("push", "org/new", None, "cannot push to org/new: HTTP 401: .*this login"),
    ("push", "other/new", TOKEN, "cannot push to other/new: HTTP 403: .*needs write access"),
    *((function, "org/good", token, "the token holds spaces, line breaks or letters") for function in ("pull", "push")
      for token in (f"{TOKEN}\n{TOKEN}", f"{TOKEN} x", f"{TOKEN}\u00e9")),
])
def test_a_repository_that_is_not_there_or_a_wrong_login_is_named(server, client, function, repo_id, token, message):
    before = [*server.repos]
    with pytest.raises(Failed, match=rf"(HubError|ValueError): {message}"):
        client(function, repo_id=repo_id, token=token)
    assert [*server.repos] == before and WRONG not in json.dumps(client.answer)


def test_a_server_that_repeats_the_token(server, client):
    server.faults.echo_token = True
    server.faults.answer = {"/api/.*": (418, "a teapot")}
    for function in ("pull", "push"):
        with pytest.raises(Failed, match=r"HubError: .*a teapot \(got Bearer <token>\)"):
            client(function, repo_id="org/teapot", token=TOKEN)
        with pytest.raises(Failed, match=r"HubError: .*a teapot \(got Bearer <token>\)"):
            client(function, repo_id="org/teapot", environ={"HF_TOKEN": TOKEN})
    for words in (["evaluate", "--model", "hf-hub:org/x"], ["push", "org/y", "--model", "hf-hub:org/x"]):
        with pytest.raises(Failed, match="got Bearer <token>"):
            client("shell", words=words, environ={"HF_TOKEN": TOKEN})


def test_a_file_that_arrives_short(server, loader, good, tmp_path):
    server.faults.shorten_to["model.safetensors"] = 1000
    with pytest.raises(Failed, match=r"HubError: cannot pull org/good: .*repeat it \(.*Consistency check failed"):
        loader("pull", repo_id="org/good", cache_dir=str(tmp_path))
    assert not list(tmp_path.rglob("*.safetensors"))
    server.faults.shorten_to.clear()
    assert loader("pull", repo_id="org/good", cache_dir=str(tmp_path)) == good[1]


@pytest.mark.parametrize(("file", "damage", "message"), [
    ("config.json", None, "it has no config.json.*Check the name"),
    *(("model.safetensors", damage, "deserializing") for damage in (
        lambda content: content[:8] + b"\xff" * 40 + content[48:], lambda content: content[:5000])),
    ("config.json", lambda content: content[:40], "config.json is damaged or not"),
    *(("config.json", lambda content, name=name: content.replace(b"hpm_wrn10_2", name), message) for name, message in (
        (b"hpm_preact_resnet18", "the weights are of hpm_wrn10_2, and the network is hpm_preact_resnet18"),
        (b"nonsense", "nonsense"))),
])
def test_a_broken_repository_is_named_with_what_is_wrong(server, loader, good, file, damage, message):
    content = {file: damage(good[0][file])} if damage else {}
    repo_id = f"org/broken{len(server.repos)}"
    server.add(repo_id, {name: kept for name, kept in good[0].items() if name != file} | content)
    with pytest.raises(Failed, match=f"HubError: cannot load {repo_id}: .*{message}"):
        loader("pull", repo_id=repo_id)


def test_a_pickle_is_not_opened(server, loader, good, tmp_path):
    """A repository with a pickle in the place of safetensors, which would write a file if it were run."""
    trap = tmp_path / "ran"
    code = f"c__builtin__\neval\n(S'open(\"{trap}\", \"w\")'\ntR.".encode()
    server.add("org/pickle", {"config.json": good[0]["config.json"], "pytorch_model.bin": code})
    with pytest.raises(Failed, match=r"HubError: cannot load org/pickle: it has no model.safetensors"):
        loader("pull", repo_id="org/pickle")
    with pytest.raises(Failed, match=r"weights_only|Weights only"):
        loader("create", name="hf-hub:org/pickle")
    assert not trap.exists()


def test_a_server_that_stops_in_the_middle_of_an_upload(server, client, loader):
    before = push(client, "org/stops")
    files = dict(server.files("org/stops"))
    server.faults.hang_up = "/commit/"
    with pytest.raises(Failed, match=r"HubError: cannot push to org/stops: check the connection to .* and repeat"):
        push(client, "org/stops", model={"seed": 4})
    assert server.files("org/stops") == files and loader("pull", repo_id="org/stops") == before
    server.faults.hang_up = "(?!)"
    after = push(client, "org/stops", model={"seed": 4})
    assert loader("pull", repo_id="org/stops") == after != before


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 600 kB: half of the weights."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if sys.platform != "linux" or os.geteuid() != 0 or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=600k", "none", str(folder)], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs takes Linux and root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(server, client, loader, good, small_disk):
    with pytest.raises(Failed, match=r"HubError: .*cannot pull org/good: the disk is full. Free space.*cache_dir"):
        loader("pull", repo_id="org/good", cache_dir=str(small_disk))
    assert not list(small_disk.rglob("*.safetensors"))
    for path in small_disk.iterdir():
        subprocess.run(["rm", "-r", str(path)], check=True)
    with pytest.raises(Failed, match=r"HubError: .*cannot save HPMPreActNet into .*disk is full"):
        client("save", folder=str(small_disk / "saved"))
    assert not (small_disk / "saved").exists()
    with pytest.raises(Failed, match=r"HubError: .*disk is full.*TMPDIR"):
        client("push", repo_id="org/full", token=TOKEN, temporary=str(small_disk))
    assert "org/full" not in server.repos and not list((small_disk).glob("timm_hpm-*"))


def test_a_public_checkpoint_is_fetched_by_the_default_tag_or_named_with_the_cause(server, loader, tmp_path):
    name, repo_id, file = "hpm_preact_resnet18", "KaiwenDu/robust-overfitting-checkpoints", "epoch_105.pt"
    where = f"{file} of the Hugging Face repository {repo_id}"

    def error() -> str:
        with pytest.raises(Failed, match=rf"CheckpointError: .*{re.escape(where)}") as failed:
            loader("create", name=name, cache_dir=str(tmp_path / "cache"))
        return str(failed.value)

    assert "Repository Not Found" in error()
    server.add(repo_id, {"README.md": b""})
    assert "Entry Not Found" in error()
    trap = tmp_path / "ran"
    server.add(repo_id, {file: f"c__builtin__\neval\n(S'open(\"{trap}\", \"w\")'\ntR.".encode()})
    assert re.search("weights_only|no checkpoint|CVE-2025-32434", error()) and not trap.exists()
    model = hub_client.made(f"{name}.untrained", fitted=False)
    head = ("fc.prototypes", "fc.num_updates", "fc.log_scale")
    torch.save({"epoch": 105, "model_state_dict": {  # as of a data-parallel model without an HPM head
        f"module.{key}": value for key, value in model.state_dict().items() if key not in head}}, tmp_path / file)
    server.add(repo_id, {file: (tmp_path / file).read_bytes()})
    server.faults.shorten_to[file] = 10
    assert "Consistency check failed" in error()
    server.faults.shorten_to.clear()
    assert loader("create", name=name) == hub_client.facts(model) | {"fitted": False}
    warning, = loader.answer["warnings"]
    assert "hold no prototypes" in warning and "fit_prototypes" in warning
    assert ("GET", f"/{repo_id}/resolve/main/{file}", False) in server.requests


def test_the_command_line(server, client, loader, tmp_path):
    words = ["push", "org/shell", "--model", "hpm_wrn10_2.digits_linf", "--report", str(REPORT), "--private"]
    assert client("shell", words=words, environ={"HF_TOKEN": TOKEN}) == 0
    assert client.answer["written"].endswith(f"pushed: {server.url}/org/shell\n")
    assert server.repos["org/shell"].private and "report.json" in server.files("org/shell")
    words = ["pull", "org/shell", "--output", str(tmp_path / "model")]
    assert loader("shell", words=words, environ={"HF_TOKEN": TOKEN}) == 0
    assert "org/shell: hpm_wrn10_2, 10 classes, 303," in loader.answer["written"]
    # With its card and its report, and of a repository without them without those of a model that stood here before.
    files = server.files("org/shell")
    files.pop(".gitattributes", None)
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == files
    assert b"Robust accuracy" in files["README.md"]
    server.add("org/bare", {name: files[name] for name in ("config.json", "model.safetensors")})
    words = ["pull", "org/bare", "--output", str(tmp_path / "model")]
    assert loader("shell", words=words, environ={"HF_TOKEN": TOKEN}) == 0
    assert {path.name for path in (tmp_path / "model").iterdir()} == {"config.json", "model.safetensors"}
