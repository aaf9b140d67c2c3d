"""Training of model objects: timm's without an HPM head, and modules of one's own."""

import pytest
import timm
import torch
import training_runs
from nets import same_tensors
from safetensors.torch import load_file
from torch import nn
from training_runs import forget_accelerator

import timm_hpm
from timm_hpm import PixelModel
from timm_hpm.models.saving import saved_config


def run(folder, network, **options):
    return training_runs.run(folder, network=network, **{"pretrained": False, "epochs": 3, "lr": 0.1, "batch_size": 64}
                             | options)


class Net(nn.Module):
    """A network of pixels in [0, 1]."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 16, 3, 2), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten())
        self.last = nn.Linear(16 * 9, 10)

    def forward(self, x):
        return self.last(self.body(x))


@pytest.fixture
def digits():
    return timm_hpm.load_split("digits", "val").tensors


@pytest.mark.parametrize("options", [
    {}, {"model_ema": True, "objective": "trades", "awp_gamma": 0.005}, {"mean": (0.3,), "std": (0.4,)}], ids=str)
def test_a_module_of_one_s_own_is_trained_in_place_and_saved(options, digits, tmp_path):
    torch.manual_seed(0)
    model = Net()
    kept = run(tmp_path / "run", model, **options)
    assert kept["val_clean"] > 0.8 and kept["val_robust"] > 0.3 and kept["val_fc_clean"] == kept["val_clean"]
    images, labels = digits
    pixels = PixelModel(model, options.get("mean", (0,)), options.get("std", (1,)))
    assert timm_hpm.judge(pixels, images, labels, 64).float().mean().item() == pytest.approx(kept["val_clean"])
    saved = load_file(tmp_path / "run" / "model.safetensors")
    assert same_tensors(model.state_dict(), saved)
    config = saved_config(tmp_path / "run" / "model.safetensors")
    assert config["constructor"] == f"{__name__}:Net" and config["num_classes"] == 10
    assert config["pretrained_cfg"]["mean"] == list(options.get("mean", (0,)))
    assert config["training"]["options"]["epochs"] == 3


def test_a_timm_model_without_an_hpm_head_is_trained_by_the_same_options(digits, tmp_path):
    # With a stride of 8 no convolution of stride 2 meets a map of one pixel: torch's CPU kernel for bfloat16 leaves
    # parts of that weight gradient uninitialised.
    run(tmp_path / "run", None, model="test_resnet", model_kwargs={"output_stride": 8}, num_classes=10, in_chans=1,
        epochs=1, batch_size=350, freeze_backbone=True)
    model = timm.create_model(f"local-dir:{tmp_path / 'run'}", pretrained=True).eval()
    assert type(model).__name__ == "ResNet" and model.pretrained_cfg["mean"] == [0.3053]
    assert timm_hpm.judge(model, digits[0][:8], digits[1][:8], 8).shape == (8,)
    # As an object it keeps the normalisation that it has, and a process's next run may have another precision.
    again = timm_hpm.train(model, epochs=1, device="cpu", amp=True, attack_steps=1, val_attack_steps=1, batch_size=350,
                           output=tmp_path / "again")
    forget_accelerator()
    assert model.pretrained_cfg["mean"] == [0.3053] and not model.training
    assert timm_hpm.judge(model, *digits, 350).float().mean().item() == pytest.approx(again["val_clean"])


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_a_wrapped_model_is_trained_and_saved_as_the_one_inside(wrap, tmp_path):
    model = timm.create_model("hpm_wrn10_2", pretrained=True)
    run(tmp_path, wrap(model), epochs=1, lr=1e-4, batch_size=350)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert again.pretrained_cfg["architecture"] == "hpm_wrn10_2" and again.pretrained_cfg["mean"] == [0.3053]
    assert same_tensors(model.state_dict(), again.state_dict())


def test_an_hpm_head_in_a_module_of_one_s_own_gets_prototypes(digits, tmp_path):
    model = timm_hpm.add_hpm_head(Net())
    whole = PixelModel(model, (0.3,), (0.4,)).train()
    kept = run(tmp_path / "run", whole)
    assert timm_hpm.find_head(model).is_fitted() and kept["val_clean"] > 0.8
    assert timm_hpm.judge(whole, *digits, 64).float().mean().item() == pytest.approx(kept["val_clean"])
    assert saved_config(tmp_path / "run" / "model.safetensors")["pretrained_cfg"]["mean"] == pytest.approx([0.3])


def test_a_resumed_run_of_an_object_ends_with_the_same_bits(tmp_path):
    torch.manual_seed(0)
    whole, part = Net(), Net()
    part.load_state_dict(whole.state_dict())
    run(tmp_path / "whole", whole, sched="constant")
    run(tmp_path / "part", part, sched="constant", epochs=2)
    run(tmp_path / "part", Net(), sched="constant", resume=True)
    newest = [load_file(tmp_path / name / "checkpoints" / "epoch-00003-batch-00000000" / "model.safetensors")
              for name in ("whole", "part")]
    assert same_tensors(*newest)
    with pytest.raises(ValueError, match=r"model \('test_any_network:Net' there, 'torch.nn.*Sequential' given\)"):
        run(tmp_path / "part", nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), sched="constant", resume=True)


@pytest.mark.parametrize(("model", "options", "message"), [
    (Net, {"pretrained": True}, "pretrained makes a model, and the run is given one"),
    (lambda: PixelModel(Net(), (0.5,), (1.0,)), {"mean": (0.1,)},
     r"mean is \(0.1,\), and the PixelModel normalises by \(0.5,\); leave it out"),
    (Net, {"batch_size": 1}, "has BatchNorm, which learns nothing from the statistics of one image"),
    (Net, {"num_classes": 5}, "Net has 5 classes and digits 10. To train, give --num-classes 10"),
    (Net, {"in_chans": 3}, "in_chans is 3, and the model has 1"),
    (lambda: nn.Sequential(nn.Flatten(), nn.Linear(9, 10)), {}, "Sequential does not take digits's images"),
    (lambda: nn.Sequential(timm_hpm.add_hpm_head(nn.Sequential(nn.Flatten(), nn.Linear(64, 10))), nn.Softmax(dim=1)),
     {}, r"logits are not those of its HPM head \(model.0.1\): another layer follows"),
    (nn.Flatten, {"num_classes": 10}, "it returns 64 logits for 10 classes"),
    (Net, {"freeze_backbone": True}, "neither an HPM head nor timm's get_classifier"),
    (Net, {"grad_checkpointing": True}, "Net has no gradient checkpointing"),
])
def test_a_model_or_options_that_do_not_fit_are_refused_before_anything_is_written(model, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "run", model(), **options)
    assert not list(tmp_path.iterdir())
