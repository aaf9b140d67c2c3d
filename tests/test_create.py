"""What a script's mistakes about models, checkpoints and devices are answered with."""

import pytest
import timm
import torch
from safetensors.torch import save_file

from timm_hpm.models.create import create_model, load_checkpoint, usable_device


def test_a_model_is_timms():
    assert type(create_model("hpm_wrn10_2", pretrained=True)) is type(timm.create_model("hpm_wrn10_2"))


@pytest.mark.parametrize(("name", "pretrained", "kwargs", "message"), [
    ("nosuch", False, {}, "'nosuch'.*Unknown model.*list_models"),
    ("hpm_wrn16_4", True, {}, "'hpm_wrn16_4' \\(pretrained=True\\).*list_pretrained"),
    ("hpm_wrn10_2.nosuch", False, {}, "nosuch"),
    ("hpm_wrn10_2", False, {"foo": 1}, "foo=1.*unexpected keyword argument 'foo'"),
])
def test_a_model_that_cannot_be_is_explained(name, pretrained, kwargs, message):
    with pytest.raises(ValueError, match=message):
        create_model(name, pretrained=pretrained, **kwargs)


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_a_checkpoint_is_loaded_or_explained(tmp_path, suffix):
    model, other = timm.create_model("hpm_wrn10_2.untrained"), timm.create_model("hpm_wrn10_2.untrained")
    path = tmp_path / f"model.{suffix}"
    with pytest.raises(ValueError, match=r"cannot read the checkpoint .*: there is no such file"):
        load_checkpoint(model, str(path))
    save = save_file if suffix == "safetensors" else torch.save
    save(other.state_dict(), path)
    load_checkpoint(model, str(path))
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())

    with pytest.raises(ValueError, match=r"(?s)into PreActNet: .*conv1"):
        load_checkpoint(timm.create_model("hpm_wrn16_4", num_classes=3), str(path))
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"cannot read the checkpoint .*cut short, damaged, or no checkpoint"):
        load_checkpoint(model, str(path))


@pytest.mark.parametrize("content", [b"", b"hello\n", b"R", b"<html>404</html>"])
def test_a_file_that_is_no_checkpoint_is_refused_with_the_reason(tmp_path, content):
    (tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.pt: it holds nothing that torch\.save writes"):
        load_checkpoint(timm.create_model("hpm_wrn10_2"), str(tmp_path / "model.pt"))
    torch.save([torch.ones(1)], tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"model\.pt: the checkpoint is a list; expected a state dict"):
        load_checkpoint(timm.create_model("hpm_wrn10_2"), str(tmp_path / "model.pt"))


def test_a_pickled_object_is_not_run(tmp_path):
    torch.save({"state_dict": timm.create_model("hpm_wrn10_2")}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"PyTorch refused [\w.]*PreActNet.*save its weights alone"):
        load_checkpoint(timm.create_model("hpm_wrn10_2"), str(tmp_path / "model.pt"))


@pytest.mark.parametrize("name", ["foo", "cuda:99", "hpu", "meta"])
def test_a_device_that_is_not_there_is_explained(name):
    with pytest.raises(ValueError, match=f"'{name}' cannot be used"):
        usable_device(name)
    assert usable_device("cpu") == torch.device("cpu")
