"""The default inference mode: no answer depends on the other images; a saved model keeps the mode that it was given."""

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from training_runs import run

import timm_hpm
from timm_hpm import PixelModel, find_head
from timm_hpm.data import as_pixel_model
from timm_hpm.models.create import create_model
from timm_hpm.models.saving import CONFIG, WEIGHTS, write_model

NUM_DIGITS = 24


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> str:
    """The name of a model that train.py makes from scratch."""
    folder = tmp_path_factory.mktemp("trained")
    run(folder, pretrained=False)
    return f"local-dir:{folder}"


@torch.no_grad()
def neighbours_matter(model: nn.Module, images: torch.Tensor) -> bool:
    """Returns whether the logits of single images differ from those in a batch by more than rounding."""
    model = as_pixel_model(model.eval())
    return not torch.allclose(torch.cat([model(image) for image in images.split(1)]), model(images), 1e-3, 1e-3)


@pytest.mark.parametrize("name", ["hpm_wrn10_2", "trained"])
def test_by_default_no_answer_depends_on_the_other_images_and_in_the_paper_s_mode_they_do(name, request, digits):
    name = name if name.startswith("hpm_") else request.getfixturevalue(name)
    default, paper = (timm.create_model(name, pretrained=True, **args) for args in ({}, {"inference": "batch"}))
    assert find_head(default).is_fitted()
    assert not neighbours_matter(default, digits[0]) and neighbours_matter(paper, digits[0])


def test_a_head_that_is_added_has_the_same_default(digits):
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    for args, matter in (({}, False), ({"inference": "batch"}, True)):
        model = PixelModel(timm_hpm.add_hpm_head(network, **args), mean=[0.3], std=[0.4])
        timm_hpm.fit_prototypes(model, [digits])
        assert neighbours_matter(model, digits[0]) == matter
        timm_hpm.remove_hpm_head(network)


def test_a_saved_model_keeps_its_mode_and_weights_that_state_none_get_the_default(tmp_path):
    write_model(timm.create_model("hpm_wrn10_2", pretrained=True, inference="batch"), tmp_path)
    folder, file, plain = f"local-dir:{tmp_path}", tmp_path / WEIGHTS, tmp_path / "plain.safetensors"

    def mode(name: str, checkpoint: Path | None = None) -> str:
        model = create_model(name, pretrained=not checkpoint, checkpoint=checkpoint and str(checkpoint))
        return find_head(model).inference

    assert mode(folder) == mode("hpm_wrn10_2", file) == "batch"
    save_file(load_file(file), plain)
    assert mode("hpm_wrn10_2", plain) == "dataset"
    # A folder whose config.json alone states it, and one that does not.
    plain.rename(file)
    assert mode(folder) == "batch"
    config = json.loads((tmp_path / CONFIG).read_text(encoding="utf-8"))
    del config["model_args"]["inference"]
    (tmp_path / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    assert mode(folder) == "dataset"
