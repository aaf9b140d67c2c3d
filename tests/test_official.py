"""SVHN, STL-10 and Tiny ImageNet from small files in their authors' layout."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import io
from torchvision.datasets import STL10, SVHN

from timm_hpm.data import load_split, open_split

RNG = np.random.default_rng(0)


def svhn(folder: Path, number: int = 12) -> None:
    for part in ("train", "test"):
        io.savemat(folder / f"{part}_32x32.mat", {
            "X": RNG.integers(0, 256, (32, 32, 3, number), np.uint8),
            "y": (np.arange(number, dtype=np.uint8) % 10 + 1)[:, None]}, do_compression=True)


def stl10(folder: Path, number: int = 12) -> None:
    (folder / "stl10_binary").mkdir()
    for part in ("train", "test"):
        RNG.integers(0, 256, (number, 3, 96, 96), np.uint8).tofile(folder / "stl10_binary" / f"{part}_X.bin")
        (np.arange(number, dtype=np.uint8) % 10 + 1).tofile(folder / "stl10_binary" / f"{part}_y.bin")


def tiny_imagenet(folder: Path) -> None:
    root = folder / "tiny-imagenet-200"
    names = ["n02124075", "n01443537", "n09256479"]  # as in the official file, not sorted
    for place in (*(f"train/{name}/images" for name in names), "val/images", "test/images"):
        (root / place).mkdir(parents=True)
    (root / "wnids.txt").write_text("".join(f"{name}\n" for name in names))
    for i, name in enumerate(names):
        for k in range(4):
            Image.new("RGB", (64, 64), (60 * i, 10 * k, 0)).save(root / f"train/{name}/images/{name}_{k}.JPEG")
        Image.new("RGB", (64, 64), (60 * i, 200, 0)).save(root / f"val/images/val_{i}.JPEG")
    (root / "val/val_annotations.txt").write_text(
        "".join(f"val_{i}.JPEG\t{name}\t0\t32\t44\t62\n" for i, name in enumerate(names)))


def test_svhn_and_stl10_are_torchvision_s(tmp_path, monkeypatch):
    svhn(tmp_path)
    stl10(tmp_path)
    # Theirs ask for the digests of the whole files.
    monkeypatch.setattr(SVHN, "_check_integrity", lambda self: True)
    monkeypatch.setattr(STL10, "_check_integrity", lambda self: True)
    for name, theirs in (("svhn", SVHN(tmp_path, "test")), ("stl10", STL10(tmp_path, "test"))):
        images, labels = load_split(name, "test", data_dir=tmp_path).tensors
        assert torch.equal(images, torch.from_numpy(np.ascontiguousarray(theirs.data)).float() / 255)
        assert labels.tolist() == [int(label) for label in theirs.labels]
    split = open_split("svhn", "test", data_dir=tmp_path)
    assert split.class_names == tuple("0123456789") and split.threat == "Linf:8/255" and split.num_classes == 10
    assert open_split("stl10", "train", data_dir=tmp_path / "stl10_binary").class_names[7] == "monkey"


def test_tiny_imagenet_is_measured_on_its_validation_images(tmp_path):
    tiny_imagenet(tmp_path)
    test = open_split("tiny_imagenet", "test", data_dir=tmp_path, input_size=(3, 64, 64))
    assert test.class_names == ("n01443537", "n02124075", "n09256479") and len(test) == 3
    # The red of an image is 60 times the place of its class in wnids.txt.
    places = {round(float(image[0].mean()) * 255 / 60): label for image, label in test}
    assert places == {0: 1, 1: 0, 2: 2}
    train = open_split("tiny_imagenet", "train", data_dir=tmp_path / "tiny-imagenet-200", input_size=(3, 64, 64))
    assert len(train) == 11 and {label for _, label in train} == {0, 1, 2}


def test_damaged_and_missing_files_are_named(tmp_path):
    for name, file in (("svhn", "test_32x32.mat"), ("stl10", "test_X.bin"), ("tiny_imagenet", "wnids.txt")):
        with pytest.raises(FileNotFoundError, match=rf"there is no {file} in .*; fetch it from http"):
            open_split(name, "test", data_dir=tmp_path, input_size=(3, 64, 64))
    svhn(tmp_path)
    stl10(tmp_path)
    tiny_imagenet(tmp_path)
    whole = (tmp_path / "test_32x32.mat").read_bytes()
    (tmp_path / "test_32x32.mat").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ValueError, match=r"cannot read .*test_32x32\.mat: .*Fetch it again"):
        open_split("svhn", "test", data_dir=tmp_path)
    io.savemat(tmp_path / "test_32x32.mat", {"X": np.zeros((32, 32, 3, 2), np.uint8), "y": np.array([[1], [11]])})
    with pytest.raises(ValueError, match=r"has 2 labels for 2 images; expected one of 10 classes"):
        open_split("svhn", "test", data_dir=tmp_path)
    pixels = tmp_path / "stl10_binary" / "test_X.bin"
    pixels.write_bytes(pixels.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"cannot read .*test_X\.bin: .*Fetch it again"):
        open_split("stl10", "test", data_dir=tmp_path)
    annotations = tmp_path / "tiny-imagenet-200/val/val_annotations.txt"
    annotations.write_text(annotations.read_text().replace("n02124075", "n00000000"))
    with pytest.raises(ValueError, match=r"names the class 'n00000000' \(1 such\), which wnids.txt does not"):
        open_split("tiny_imagenet", "test", data_dir=tmp_path, input_size=(3, 64, 64))
