"""Data sets from files: their authors' layouts, torchvision's, folders of images, the Hub's, and their splits."""

import gzip
import os
import random
import tracemalloc
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from pictures import write_pictures
from PIL import Image
from scipy import io
from timm.data import create_transform, resolve_data_config
from torch.utils.data import DataLoader
from torchvision.datasets import STL10, SVHN

from timm_hpm.data import (
    SPLITS,
    check_every_class,
    check_pixels,
    first_images,
    hold_out,
    load_split,
    open_split,
    random_flip,
    sources,
)
from timm_hpm.evaluation.config import EvaluateConfig
from timm_hpm.evaluation.folder import open_images
from timm_hpm.models.create import open_split_for
from timm_hpm.models.saving import WEIGHTS, write_model


def grey_levels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_idx(file: Path, array: np.ndarray, magic: int = 8) -> None:
    """Writes an idx file, gzipped where its name says so."""
    file.parent.mkdir(parents=True, exist_ok=True)
    data = bytes([0, 0, magic, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()
    file.write_bytes(gzip.compress(data) if file.suffix == ".gz" else data)


def write_fashion_mnist(folder: Path, suffix: str = "", labels: int = 4) -> dict[str, np.ndarray]:
    """Writes the four files with few images, a tenth of the real classes missing, and returns what is in them."""
    arrays = {
        "train-images-idx3-ubyte": grey_levels(40, 28, 28),
        "train-labels-idx1-ubyte": np.arange(40, dtype=np.uint8) % labels,
        "t10k-images-idx3-ubyte": grey_levels(12, 28, 28, seed=1),
        "t10k-labels-idx1-ubyte": np.arange(12, dtype=np.uint8) % labels,
    }
    for name, array in arrays.items():
        write_idx(folder / f"{name}{suffix}", array)
    return arrays


def contents(split) -> list[bytes]:
    return [image.numpy().tobytes() for image, _ in split]


FASHION, FOLDER = "fashion_mnist", "folder"


@pytest.mark.parametrize(("name", "split", "options", "message"), [
    *((name, "train", {}, message) for name, message in (
        ("cifar10", r"unknown data set 'cifar10'; expected one of digits, .*hfds/NAME; did you mean torch/cifar10"),
        ("wds/imagenet", "the data set 'wds/imagenet' is streamed: .* use a folder of images"))),
    ("digits", "valid", {}, "unknown split 'valid'; expected one of train, val, test"),
    *(("digits", "train", {"val_fraction": fraction}, r"val_fraction is .*; expected a number above 0 and below 1")
      for fraction in (0.0, float("nan"))),
    ("digits", "val", {"val_fraction": 0.2}, "has a validation split of its own; leave out val_fraction"),
    # A split in memory must fit the model.
    (FASHION, "train", {"input_size": (3, 28, 28)},
     r"\(1, 28, 28\), the model takes \(3, 28, 28\).*--in-chans 1, or another --dataset$"),
    (FASHION, "train", {"num_classes": 3}, r"labels up to 3, the model the classes 0 to 2; .*\(--num-classes 4\)"),
    (FASHION, "test", {"data_dir": "empty"}, r"the split test of fashion_mnist has no image; give another --data-dir$"),
    (FOLDER, "test", {"data_dir": "nowhere"}, r"there is no folder .*nowhere; choose another --data-dir"),
    (FOLDER, "test", {"data_dir": "odd"}, r"val has the class 'bee' \(1 such\), which .*train has not"),
    (FOLDER, "train", {"data_dir": "mine", "input_size": (4, 32, 32)}, "images of 4 channels; files can be read as 1"),
    (FOLDER, "train", {"data_dir": "mine", "input_size": None}, r"of any size; give input_size=\(channels, height, wi"),
])
def test_a_data_set_that_cannot_be_opened_says_how_to_mend_it(tmp_path, name, split, options, message):
    if name == FASHION:
        write_fashion_mnist(tmp_path)
        write_idx(tmp_path / "empty" / "t10k-images-idx3-ubyte", grey_levels(0, 28, 28))
        write_idx(tmp_path / "empty" / "t10k-labels-idx1-ubyte", np.arange(0, dtype=np.uint8))
    if name == FOLDER:
        write_pictures(tmp_path, {"mine/train/ant": 4, "mine/train/bee": 4, "odd/train/ant": 1, "odd/val/ant": 1,
                                  "odd/val/bee": 1})
        options = {"input_size": (3, 16, 16)} | options
    if name != "digits":
        place = options.get("data_dir", ".")
        options = options | {"data_dir": place and tmp_path / place}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_split(name, split, **options)


def test_the_digits_as_a_split_are_those_in_memory():
    split = open_split("digits", "val", input_size=(1, 8, 8), num_classes=10)
    images, labels = load_split("digits", "val").tensors
    assert split.class_names == tuple("0123456789")
    assert len(split) == 360 and split.num_classes == 10 and split.num_channels == 1
    assert all(torch.equal(split[i][0], images[i]) and split[i][1] == labels[i] for i in range(360))
    for n, expected in ((7, 7), (0, 360), (360, 360)):
        got = first_images(split, n)
        assert torch.equal(got[0], images[:expected]) and torch.equal(got[1], labels[:expected])
    for n in (-1, 361):
        with pytest.raises(ValueError, match=rf"first {n} images; the split val of digits has 360"):
            first_images(split, n)


@pytest.mark.parametrize("fraction", [None, 0.25])
def test_the_held_out_split_is_stratified_and_always_the_same(fraction):
    torch.manual_seed(7)
    labels = torch.randint(0, 7, (1003,)).clamp(max=5)
    rest, held = hold_out(labels, fraction)
    assert torch.equal(torch.cat([rest, held]).sort().values, torch.arange(1003))
    expected = fraction or 0.1
    assert len(held) == round(1003 * expected)
    assert (labels[held].bincount(minlength=6) - expected * labels.bincount()).abs().max() < 1
    torch.manual_seed(8)
    assert torch.equal(hold_out(labels, fraction)[1], held)
    assert hold_out(torch.arange(60_000) % 10)[1].numel() == 5000, "at most, unless a fraction is given"
    assert hold_out(torch.arange(200) % 4)[1].tolist() == [  # in every release
        24, 28, 34, 68, 77, 79, 85, 105, 110, 115, 122, 131, 133, 135, 139, 156, 162, 174, 176, 197]
    # Every class keeps an image to train on.
    rest, held = hold_out(labels := torch.tensor([0] * 20 + [1] + [3] * 2), 0.9)
    assert labels[rest].unique().tolist() == [0, 1, 3] and 1 not in labels[held]
    assert [len(part) for part in hold_out(torch.tensor([0, 1, 2]))] == [3, 0]


@pytest.mark.parametrize("numbers", [{"c": 0, "b": 1, "a": 2}, {"b": 0, "c": 1, "a": -1}])
def test_a_class_map_makes_no_validation_image_of_a_training_image(numbers, tmp_path):
    write_pictures(tmp_path, {"train/a": 40, "train/b": 20, "train/c": 30, "test/a": 1, "test/b": 1, "test/c": 1})

    def images(split, class_map):
        return set(contents(open_split(FOLDER, split, data_dir=tmp_path, input_size=(3, 8, 8), class_map=class_map)))

    train, val = images("train", None), images("val", None)
    assert len(train) == 81 and len(val) == 9
    assert images("val", numbers) <= val and images("train", numbers) <= train


def test_a_validation_split_with_images_of_the_model_s_training_is_named(tmp_path):
    write_fashion_mnist(tmp_path)
    model = timm.create_model("hpm_wrn10_2")
    for theirs, ours, seen in ((0.2, 0.3, True), (None, 0.3, True), (None, 0.05, True), (0.05, None, True),
                               (0.2, 0.2, False), (0.3, 0.2, False), (0.1, None, False)):
        write_model(model, tmp_path, training={"options": {"dataset": "fashion_mnist", "val_fraction": theirs}})
        config = EvaluateConfig(checkpoint=str(tmp_path / WEIGHTS), dataset="fashion_mnist", data_dir=str(tmp_path),
                                split="val", val_fraction=ours)
        with pytest.warns(UserWarning, match="may have images of that training") if seen else nullcontext():
            assert len(open_images(config, model)) == 40 * (ours or 0.1)


@pytest.mark.parametrize(("where", "suffix"), [(".", ""), (".", ".gz"), ("FashionMNIST/raw", "")])
def test_fashion_mnist_is_read_from_its_original_files(tmp_path, where, suffix):
    arrays = write_fashion_mnist(tmp_path / where, suffix)
    parts = {split: load_split("fashion_mnist", split, data_dir=tmp_path, val_fraction=0.25).tensors
             for split in SPLITS}
    test = torch.from_numpy(arrays["t10k-images-idx3-ubyte"])[:, None].float() / 255
    assert torch.equal(parts["test"][0], test)
    assert parts["test"][1].tolist() == [0, 1, 2, 3] * 3
    assert len(parts["train"][1]) == 30 and parts["val"][1].bincount().tolist() in ([3, 3, 2, 2], [2, 3, 3, 2])
    both = torch.cat([parts["train"][0], parts["val"][0]])
    expected = torch.from_numpy(arrays["train-images-idx3-ubyte"])[:, None].float() / 255
    assert sorted(x.numpy().tobytes() for x in both) == sorted(x.numpy().tobytes() for x in expected)
    for images, labels in parts.values():
        check_pixels(images, labels, 10)


def test_the_files_of_debian_are_found_beside_data_dir(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_DEBIAN_FASHION_MNIST", tmp_path / "debian")
    for data_dir in (None, tmp_path / "mine"):
        with pytest.raises(FileNotFoundError, match=r"no t10k-images-idx3-ubyte\[.gz\] in .*debian; fetch it with: "
                                                    "apt-get install dataset-fashion-mnist"):
            open_split("fashion_mnist", "test", data_dir=data_dir)
    write_fashion_mnist(tmp_path / "debian", ".gz")
    assert len(open_split("fashion_mnist", "test")) == 12
    write_idx(tmp_path / "mine" / "t10k-images-idx3-ubyte", grey_levels(5, 28, 28))
    write_idx(tmp_path / "mine" / "t10k-labels-idx1-ubyte", np.zeros(5, np.uint8))
    assert len(open_split("fashion_mnist", "test", data_dir=tmp_path / "mine")) == 5


def _cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 100)


def bomb(header: bytes) -> bytes:
    """A file that unfolds to a gigabyte."""
    return gzip.compress(header) + 64 * gzip.compress(bytes(1 << 24))


@pytest.mark.parametrize(("suffix", "damage", "message"), [
    ("", _cut, r"t10k-images-idx3-ubyte has 9308 bytes of data, 9408 by its header; remove it, then fetch it"),
    (".gz", _cut, r"t10k-images-idx3-ubyte\.gz is damaged .*; remove it, then fetch it with: apt-get"),
    (".gz", lambda file: file.write_bytes(b"<html>404</html>"), r"ubyte\.gz is damaged \(Not a gzipped file"),
    ("", lambda file: write_idx(file, grey_levels(12, 28, 28), magic=13), "not begin as an idx file of bytes in 3"),
    ("", lambda file: write_idx(file, grey_levels(11, 28, 28)), "labels-idx1-ubyte has 12 labels for 11 images"),
    (".gz", lambda file: file.write_bytes(bomb(b"\0\0\x08\x03" + np.array([12, 28, 28], ">u4").tobytes())),
     "has more bytes of data, 9408 by its header"),
    (".gz", lambda file: file.write_bytes(bomb(b"\0\0\x08\x03" + b"\xff" * 12)),
     r"has 792281624\d* bytes of data by its header; expected at most 268435456"),
])
def test_a_damaged_idx_file_is_named_before_it_fills_the_memory(tmp_path, suffix, damage, message):
    write_fashion_mnist(tmp_path, suffix)
    damage(tmp_path / f"t10k-images-idx3-ubyte{suffix}")
    tracemalloc.start()
    with pytest.raises(ValueError, match=message):
        open_split("fashion_mnist", "test", data_dir=tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 24
    tracemalloc.stop()


def test_torchvision_reads_its_own_layout(tmp_path):
    arrays = write_fashion_mnist(tmp_path / "FashionMNIST" / "raw")
    split = open_split("Torch/Fashion_MNIST", "test", data_dir=tmp_path, input_size=(1, 28, 28))
    assert split.num_classes == 10 and len(set(split.class_names)) == 10
    images, labels = first_images(split, 3)
    assert torch.equal(images, torch.from_numpy(arrays["t10k-images-idx3-ubyte"][:3, None]).float() / 255)
    assert labels.tolist() == [0, 1, 2]
    assert sum(len(open_split("torch/fashion_mnist", name, data_dir=tmp_path)) for name in ("train", "val")) == 40
    _cut(tmp_path / "FashionMNIST" / "raw" / "t10k-images-idx3-ubyte")
    with pytest.raises(FileNotFoundError, match=r"no undamaged torch/fashion_mnist in"):
        open_split("torch/fashion_mnist", "test", data_dir=tmp_path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Returns a folder with train/ (20 images of each of 3 classes) and val/ (5 of two of them)."""
    root = tmp_path_factory.mktemp("images")
    write_pictures(root, {"train/ant": 20, "train/bee": 20, "train/cat": 20, "val/ant": 5, "val/cat": 5}, (40, 60))
    return root


def test_a_folder_without_test_is_measured_on_val_and_holds_out_of_train(folder):
    splits = {name: open_split("folder", name, data_dir=folder, input_size=(3, 16, 16)) for name in SPLITS}
    assert {name: len(split) for name, split in splits.items()} == {"train": 54, "val": 6, "test": 10}
    assert splits["val"].labels.bincount().tolist() == [2, 2, 2]
    # "cat" is class 2, though the folder of "test" has no "bee".
    assert splits["test"].labels.bincount().tolist() == [5, 0, 5] and splits["test"].num_classes == 3
    images = [content for split in splits.values() for content in contents(split)]
    assert len(set(images)) == len(images) == 70
    for split in splits.values():
        pixels, labels = first_images(split)
        assert pixels.shape[1:] == (3, 16, 16) and pixels.dtype == torch.float32
        check_pixels(pixels, labels, 3)
    with pytest.raises(ValueError, match=r"the split test of folder has no image of 1 of .* 3 classes \(1 bee\)"):
        check_every_class(splits["test"], 3)


def test_the_first_images_of_a_folder_are_of_all_classes_and_always_the_same(folder):
    first = first_images(open_split("folder", "test", data_dir=folder / "train", input_size=(3, 16, 16)), 12)
    torch.manual_seed(99)
    again = first_images(open_split("folder", "test", data_dir=folder / "train", input_size=(3, 16, 16)), 12)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert first[1].unique().tolist() == [0, 1, 2]


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_images_are_cropped_as_timm_does_for_the_model(crop_mode, folder):
    model = timm.create_model("test_resnet", num_classes=3, pretrained_cfg_overlay={
        "crop_mode": crop_mode, "input_size": (3, 16, 16), "crop_pct": 0.9, "mean": (0.2, 0.5, 0.8)})
    transform = create_transform(**resolve_data_config(model=model), normalize=False)
    expected = [transform(Image.open(file)) for file in (folder / "val").rglob("*.png")]
    split = open_split_for(model, "folder", "test", data_dir=folder)
    assert sorted(contents(split)) == sorted((image.float() / 255).numpy().tobytes() for image in expected)


@pytest.mark.parametrize("damage", [_cut, lambda file: file.write_text("no image")])
def test_a_damaged_image_is_named_and_no_other_taken_in_its_place(tmp_path, damage):
    write_pictures(tmp_path, {"a": 2}, (20, 20))
    damage(tmp_path / "a" / "0.png")
    split = open_split("folder", "test", data_dir=tmp_path, input_size=(3, 20, 20))
    with pytest.raises(ValueError, match=r"cannot read the image .*a.0\.png: .*Mend it"):
        contents(split)


def test_random_crops_are_a_function_of_seed_epoch_and_index(folder):
    def opened(seed: int | None, epoch: int = 0):
        split = open_split("folder", "train", data_dir=folder, input_size=(3, 16, 16), random_resized_crop=True,
                           augmentation_seed=seed)
        split.set_epoch(epoch)
        return split

    state = torch.get_rng_state()
    reference = contents(opened(5, 3))
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert contents(opened(5, 3)) == reference
    backwards = opened(5, 3)
    assert [backwards[i][0].numpy().tobytes() for i in reversed(range(54))] == reference[::-1]
    for other in (opened(6, 3), opened(5, 4), opened(None, 3)):
        assert not set(contents(other)) & set(reference)
    check_pixels(*first_images(opened(5)), 3)


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5", "augmix-m3"])
def test_policies_are_a_function_of_seed_epoch_and_index(folder, policy):
    for options in ({"dataset": "digits"}, {"dataset": "folder", "data_dir": folder, "input_size": (3, 16, 16)}):
        plain, *drawn = (open_split(split="train", auto_augment=policy, augmentation_seed=seed, **options)
                         for seed in (None, 5, 5, 6))
        states = random.getstate(), np.random.get_state()[1].tolist()
        one, same, other = ([split[i][0] for i in range(12)] for split in drawn)
        assert states == (random.getstate(), np.random.get_state()[1].tolist())
        assert all(map(torch.equal, one, same)) and not all(map(torch.equal, one, other))
        assert not all(torch.equal(image, plain[i][0]) for i, image in enumerate(one))
        check_pixels(torch.stack(one), drawn[0].labels[:12])
    with pytest.raises(ValueError, match=r"is .rand-magnitude., .*its part 'magnitude' has no number.*expected such"):
        open_split("digits", "train", auto_augment="rand-magnitude", augmentation_seed=0)


def test_the_crop_of_an_option_is_the_model_s_from_then_on_and_workers_read_the_same_images(folder):
    model = timm.create_model("test_resnet", num_classes=3)
    own, wide = (open_split_for(model, "folder", "train", data_dir=folder, img_size=16, **options)
                 for options in ({}, {"crop_pct": 0.5, "interpolation": "nearest"}))
    assert (model.pretrained_cfg["crop_pct"], model.pretrained_cfg["interpolation"]) == (0.5, "nearest")
    assert not torch.equal(own[0][0], wide[0][0])
    state = torch.get_rng_state()
    assert torch.equal(first_images(wide, 9, workers=2)[0], torch.stack([wide[i][0] for i in range(9)]))
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match="crop_pct is of decoded images, and those of digits are all of one size"):
        open_split_for(timm.create_model("hpm_wrn10_2"), "digits", "test", crop_pct=0.9)


def test_workers_that_live_on_draw_the_crops_of_the_epoch(folder):
    split = open_split("folder", "train", data_dir=folder, input_size=(3, 16, 16), random_resized_crop=True,
                       augmentation_seed=0)
    loader = DataLoader(split, batch_size=16, num_workers=2, persistent_workers=True)
    for epoch in (0, 1, 5):
        split.set_epoch(epoch)
        drawn = torch.cat([images for images, _ in loader])
        assert torch.equal(drawn, first_images(split)[0])


def test_random_flip_mirrors_each_image_on_its_own():
    images = torch.rand(1000, 2, 3, 4)
    results = random_flip(images, 0.3)
    flipped, kept = ((results == other).flatten(1).all(dim=1) for other in (images.flip(-1), images))
    assert torch.equal(flipped, ~kept) and flipped.float().mean().item() == pytest.approx(0.3, abs=0.06)


def test_a_data_set_of_the_hubs_format_is_read_by_its_splits(folder, tmp_path):
    splits = {name: open_split(f"hfds/{folder}", name, data_dir=tmp_path, input_size=(3, 16, 16)) for name in SPLITS}
    assert {name: len(split) for name, split in splits.items()} == {"train": 54, "val": 6, "test": 10}
    assert splits["train"].class_names == ("ant", "bee", "cat")
    assert splits["train"].num_classes == 3 and splits["val"].labels.bincount().tolist() == [2, 2, 2]
    ours = open_split("folder", "train", data_dir=folder, input_size=(3, 16, 16))
    theirs = splits["train"]
    assert sorted(contents(theirs) + contents(splits["val"])) == sorted(
        contents(ours) + contents(open_split("folder", "val", data_dir=folder, input_size=(3, 16, 16))))


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
