"""What a script's mistakes about models, checkpoints and devices are answered with."""

import pytest
import timm
import torch

from timm_hpm.models.create import create_model, load_checkpoint, usable_device


@pytest.mark.parametrize(("name", "pretrained", "kwargs", "message"), [
    ("nosuch", False, {}, "'nosuch'.*Unknown model.*list_models"),
    ("hpm_wrn16_4", True, {}, "'hpm_wrn16_4' \\(pretrained=True\\).*list_pretrained"),
    ("hpm_wrn10_2.nosuch", False, {}, "nosuch"),
    ("hpm_wrn10_2", False, {"foo": 1}, "foo=1.*unexpected keyword argument 'foo'"),
])
def test_a_model_that_cannot_be_is_explained(name, pretrained, kwargs, message):
    with pytest.raises(ValueError, match=message):
        create_model(name, pretrained=pretrained, **kwargs)


def test_a_checkpoint_is_loaded_or_explained(tmp_path):
    model, other = timm.create_model("hpm_wrn10_2.untrained"), timm.create_model("hpm_wrn10_2.untrained")
    path = str(tmp_path / "model.pt")
    torch.save(other.state_dict(), path)
    load_checkpoint(model, path)
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())
    with pytest.raises(ValueError, match=r"(?s)into HPMPreActNet: .*conv1"):
        load_checkpoint(timm.create_model("hpm_wrn16_4", num_classes=3), path)
    # A pickled object is not run.
    torch.save({"state_dict": model}, path)
    with pytest.raises(ValueError, match=r"PyTorch refused timm_hpm[\w.]*.*save its weights alone"):
        load_checkpoint(model, path)
    (tmp_path / "model.pt").write_bytes(b"hello\n")
    with pytest.raises(ValueError, match=r"model\.pt: it holds nothing that torch\.save writes"):
        load_checkpoint(model, path)


@pytest.mark.parametrize("name", ["foo", "cuda:99", "hpu", "meta"])
def test_a_device_that_is_not_there_is_explained(name):
    with pytest.raises(ValueError, match=f"'{name}' cannot be used"):
        usable_device(name)
    assert usable_device("cpu") == torch.device("cpu")
