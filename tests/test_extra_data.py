"""Extra training images of an npz file: read as they are drawn, mixed into every batch, resumable, across processes."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from nets import same_tensors
from processes import python
from training_runs import run, stopped, weights

import timm_hpm
from timm_hpm.training import TrainConfig
from timm_hpm.training.extra import ExtraImages


def digits(number: int = 400) -> dict[str, np.ndarray]:
    """Returns the first training digits in the layout of generated images."""
    images, labels = timm_hpm.load_split("digits", "train").tensors
    return {"image": (images[:number] * 255).round().byte().permute(0, 2, 3, 1).numpy(),
            "label": labels[:number].numpy()}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_images_are_drawn_as_they_were_saved(save, tmp_path):
    arrays = digits()
    save(tmp_path / "more.npz", **arrays, origin=np.zeros(3))
    extra = ExtraImages(tmp_path / "more.npz", (1, 8, 8), 10, tmp_path / "unpacked.npy")
    assert (tmp_path / "unpacked.npy").exists() == (save is np.savez_compressed)
    torch.manual_seed(1)
    rows = torch.randint(400, (50,))
    torch.manual_seed(1)
    images, labels = extra.draw(50)
    assert images.shape == (50, 1, 8, 8) and images.dtype == torch.float32 and labels.dtype == torch.int64
    assert torch.equal((images * 255).round().byte().permute(0, 2, 3, 1), torch.from_numpy(arrays["image"])[rows])
    assert torch.equal(labels, torch.from_numpy(arrays["label"])[rows])


MEMORY = '''
import re, sys
from pathlib import Path
import numpy as np, torch
from timm_hpm.training.extra import ExtraImages

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

torch.rand(10), np.load
before = anonymous()
extra = ExtraImages(sys.argv[1], (3, 32, 32), 10, Path(sys.argv[2]))
for _ in range(20):
    extra.draw(100)
print(anonymous() - before)
'''


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_file_of_180_mib_takes_few_of_them_in_memory(save, tmp_path):
    save(tmp_path / "more.npz", image=np.zeros((60_000, 32, 32, 3), np.uint8), label=np.zeros(60_000, np.int64))
    assert float(python("-c", MEMORY, "more.npz", "unpacked.npy", folder=tmp_path).stdout) < 40  # MiB


def test_a_model_learns_from_them(tmp_path):
    """All the extra labels are 3, so a model that learns from many of them predicts it too often."""
    three = digits()
    three["label"][:] = 3
    np.savez_compressed(tmp_path / "more.npz", **three)
    options = {"objective": "trades", "extra_data": str(tmp_path / "more.npz"), "batch_size": 128, "lr": 0.1,
               "model_kwargs": {"inference": "fc"}}
    accuracy = {}
    for fraction in (0.0, 0.9):
        accuracy[fraction] = run(tmp_path / str(fraction), extra_fraction=fraction, **options)["val_clean"]
        assert not (tmp_path / str(fraction) / "extra-data.npy").exists()
    assert accuracy[0.0] > 0.8 and accuracy[0.9] < 0.5


def test_a_fraction_of_0_is_the_plain_run_and_a_resumed_one_ends_with_the_same_bits(tmp_path):
    """Other images of the same labels are refused."""
    np.savez(tmp_path / "more.npz", **digits())
    given = {"extra_data": str(tmp_path / "more.npz"), "recovery_interval": 2, "checkpoint_hist": 9}
    run(tmp_path / "plain")
    run(tmp_path / "zero", **given | {"extra_fraction": 0.0})
    assert same_tensors(weights(tmp_path / "plain"), weights(tmp_path / "zero"))
    run(tmp_path / "whole", **given, extra_fraction=0.5)
    part = stopped(tmp_path / "whole", tmp_path / "part")
    # 6 batches of 175 digits, and the end of the epoch.
    assert len(list((tmp_path / "whole" / "checkpoints").iterdir())) == 4
    np.savez(tmp_path / "more.npz", image=255 - digits()["image"], label=digits()["label"])
    with pytest.raises(ValueError, match="begun with other extra data"):
        run(part, resume=True, **given, extra_fraction=0.5)
    np.savez(tmp_path / "more.npz", **digits())
    run(part, resume=True, **given, extra_fraction=0.5)
    for name in ("metrics.csv", "model.safetensors"):
        assert (part / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(("change", "message"), [
    ({"image": np.zeros((4, 1, 8, 8), np.uint8)}, "`image` is uint8 (4, 1, 8, 8); expected uint8 (N, 8, 8, 1)"),
    ({"image": np.zeros((4, 8, 8, 1), np.uint8, order="F") + np.zeros((4, 8, 8, 1), np.uint8, order="F")}, "Fortran"),
    ({"label": np.zeros(3, np.int64)}, "`label` is int64 (3,), of 4 images"),
    ({"label": np.array([0, 1, 2, 10])}, "`label` has values from 0 to 10, and the model has the classes 0 to 9"),
    ({"label": np.array([0, "a", None, 2], dtype=object)}, "allow_pickle=False"),
    ({"label": None}, "label.npz: it holds image; expected"), (b"PK\\x03\\x04 cut", "not a zip file"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_another_layout_is_refused_before_anything_is_written(change, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if isinstance(change, bytes):
        Path("label.npz").write_bytes(change)
    else:
        arrays = {name: array for name, array in ({"image": np.zeros((4, 8, 8, 1), np.uint8), "label": np.arange(4)}
                                                  | change).items() if array is not None}
        np.savez_compressed("label.npz", **arrays)
    with pytest.raises(ValueError, match=re.escape(message)) as found:
        run("run", extra_data="label.npz")
    assert "label.npz" in str(found.value) and "expected `image`, uint8 (N, H, W, channels)" in str(found.value)
    assert [path.name for path in tmp_path.iterdir()] == ["label.npz"]


def test_a_missing_file_and_a_batch_without_images_of_the_data_set_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"the extra data nosuch.npz: there is no such file"):
        run(tmp_path / "run", extra_data="nosuch.npz")
    with pytest.raises(ValueError, match="which leaves no image of the data set"):
        TrainConfig(extra_data="x.npz", extra_fraction=0.99, batch_size=10)
    assert not list(tmp_path.iterdir())
