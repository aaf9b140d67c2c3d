"""Images from files: modes, transparency, suffixes, class folders and class maps, against Pillow and torchvision."""

import os
import pickle
import shutil
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from timm_hpm.data import first_images, open_split

GREY16 = np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)
COLOUR16 = np.random.default_rng(0).integers(0, 65536, (8, 8, 3), dtype=np.uint16)


def read(folder: Path, channels: int = 3, **options) -> torch.Tensor:
    """Returns the images (N, channels, 8, 8) of a folder of classes."""
    return first_images(open_split("folder", "test", data_dir=folder, input_size=(channels, 8, 8), **options))[0]


def png(file: Path, values: np.ndarray, kind: int, transparent: bytes = b"") -> None:
    """Writes a PNG of 16 bits a channel; `kind` is its colour type, `transparent` its tRNS chunk."""
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, kind, 0, 0, 0))
                     + (chunk(b"tRNS", transparent) if transparent else b"") + chunk(b"IDAT", zlib.compress(rows))
                     + chunk(b"IEND", b""))


@pytest.mark.parametrize(("name", "write", "expected"), [
    ("a.png", lambda file: png(file, COLOUR16.reshape(8, 24), 2), COLOUR16),
    ("a.png", lambda file: png(file, np.stack([GREY16, np.full_like(GREY16, 65535)], 2).reshape(8, 16), 4), GREY16),
    ("a.ppm", lambda file: file.write_bytes(b"P6 8 8 65535\n" + COLOUR16.astype(">u2").tobytes()), COLOUR16),
    ("a.ppm", lambda file: file.write_bytes(b"P6 8 8 1023\n" + (COLOUR16 >> 6).astype(">u2").tobytes()), COLOUR16),
])
def test_images_of_several_channels_or_other_ranges_of_16_bits_are_scaled(tmp_path, name, write, expected):
    (tmp_path / "a").mkdir()
    write(tmp_path / "a" / name)
    expected = torch.from_numpy(expected.astype(np.float32) / 65535)
    expected = expected.permute(2, 0, 1) if expected.ndim == 3 else expected.expand(3, 8, 8)
    assert (read(tmp_path)[0] - expected).abs().max() < 1.01 / 255


@pytest.mark.parametrize(("name", "write", "mode"), [
    ("a.tif", lambda file: Image.fromarray(GREY16.astype(np.float32) / 65535).save(file), "F"),
    ("a.tif", lambda file: Image.fromarray(GREY16).save(file), "I;16"),
    ("a.pgm", lambda file: file.write_bytes(b"P5 8 8 1023\n" + (GREY16 >> 6).astype(">u2").tobytes()), "I"),
])
def test_grey_of_more_than_8_bits_is_refused_by_file_and_mode(tmp_path, name, write, mode):
    (tmp_path / "a").mkdir()
    write(tmp_path / "a" / name)
    with pytest.raises(ValueError, match=rf"cannot read the image .*{name}: it has the mode {mode}, of more"):
        read(tmp_path)


RGBA = np.random.default_rng(1).integers(0, 256, (8, 8, 4), dtype=np.uint8)


def rgba_of(mode: str) -> Image.Image:
    return Image.fromarray(RGBA).convert(mode)


def palette(file: Path, transparency: int | bytes = 3) -> None:
    Image.fromarray(RGBA[..., :3]).quantize(8).save(file, transparency=transparency)


@pytest.mark.parametrize(("name", "write"), [
    ("a.png", lambda file: rgba_of("LA").save(file)),
    ("a.png", palette),
    ("a.gif", palette),
    ("a.png", lambda file: palette(file, bytes(range(0, 256, 32)))),
    ("a.png", lambda file: rgba_of("RGB").save(file, transparency=tuple(RGBA[2, 3, :3].tolist()))),
])
@pytest.mark.parametrize("channels", [1, 3])
def test_transparent_pixels_are_shown_on_white_which_is_said_once(tmp_path, name, write, channels):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / name)
    with Image.open(tmp_path / "a" / name) as image:
        rgba = torch.from_numpy(np.array(image.convert("RGBA"))).float() / 255
    colours, alpha = rgba[..., :3], rgba[..., 3:]
    expected = (alpha * colours + 1 - alpha).permute(2, 0, 1)
    if channels == 1:
        expected = (torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1) * expected).sum(dim=0, keepdim=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        images = read(tmp_path, channels)
    assert (alpha < 1).any() and (images - expected).abs().max() < 2.5 / 255
    message, = (str(warning.message) for warning in caught)
    assert name in message and "transparent pixels; it is shown on white" in message


def test_opaque_images_with_an_alpha_channel_are_as_they_are(tmp_path):
    (tmp_path / "a").mkdir()
    Image.fromarray(RGBA[..., :3]).convert("RGBA").save(tmp_path / "a" / "0.png")
    # A warning fails this.
    assert torch.equal(read(tmp_path)[0], torch.from_numpy(RGBA[..., :3]).permute(2, 0, 1).float() / 255)


def test_every_usual_format_is_read_whatever_its_suffix_s_case(tmp_path):
    formats = sorted(["WebP", "bmp", "gif", "jp2", "jpeg", "png", "ppm", "tga", "tif", "tiff", "pcx"])
    for suffix in formats:
        (tmp_path / suffix).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / suffix / f"0.{suffix}")
    split = open_split("folder", "test", data_dir=tmp_path, input_size=(3, 8, 8))
    assert split.class_names == tuple(formats) and len(split) == len(formats)
    assert first_images(split)[0].max() < 0.1


def test_a_class_folder_without_images_is_named_and_files_that_are_passed_over_are_counted(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "c" / "0.bmp")
    for name in ("notes.txt", "b/notes.txt", "c/video.mp4", "a/0.eps", "b/0", "top.png"):
        (tmp_path / name).write_bytes(b"")
    with pytest.warns(UserWarning) as caught:
        split = open_split("folder", "test", data_dir=tmp_path, input_size=(3, 8, 8))
    assert split.class_names == ("a", "b", "c") and split.labels.tolist() == [2]
    empty, others = (str(warning.message) for warning in caught)
    assert f"{tmp_path} has no image in 2 of its 3 class folders: 'a', 'b'" in empty
    assert f"{tmp_path}: 6 files were passed over" in others and "2 .txt" in others and "1 .eps" in others


@pytest.mark.parametrize(("kind", "limit", "message"), [
    # From its limit on Pillow only warns.
    ("PNG", 63, "exceeds limit of"),
    ("EPS", 10**6, "cannot identify image file"),  # a program for Ghostscript, whatever its name
])
def test_a_huge_image_and_a_program_are_not_opened(tmp_path, monkeypatch, kind, limit, message):
    (tmp_path / "a").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "a" / "0.png", format=kind)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(ValueError, match=rf"cannot read the image .*0\.png: .*{message}"):
        read(tmp_path)


def test_the_advice_for_a_folder_with_an_image_a_class_can_be_followed(tmp_path):
    write_classes(tmp_path / "train", ["a", "b"])
    options = {"data_dir": tmp_path, "input_size": (1, 8, 8)}
    with pytest.raises(ValueError, match=r"the split val of folder has no image; each class has at most one.*Add images"
                                         r", or give .* \(test/ and val/\)"):
        open_split("folder", "val", **options)
    write_classes(tmp_path / "test", ["a", "b"])
    write_classes(tmp_path / "val", ["a", "b"])
    assert [len(open_split("folder", split, **options)) for split in ("train", "val", "test")] == [2, 2, 2]
    for folder in ("test", "val"):
        shutil.rmtree(tmp_path / folder)
    Image.new("L", (8, 8)).save(tmp_path / "train" / "a" / "1.png")
    assert [len(open_split("folder", split, **options)) for split in ("train", "val")] == [2, 1]


def write_classes(folder: Path, names: list[str]) -> None:
    """Writes an image of a grey level of its own for each class, in a folder inside the class's folder."""
    for level, name in enumerate(names):
        (folder / name / "sub").mkdir(parents=True)
        Image.new("L", (8, 8), 20 * level).save(folder / name / "sub" / "0.png")


NAMES = ["b", "A", "a10", "a2", "10", "9", "Ä", "a b"]


def test_classes_are_numbered_as_torchvision_does(tmp_path):
    write_classes(tmp_path, NAMES)
    split = open_split("folder", "test", data_dir=tmp_path, input_size=(1, 8, 8))
    theirs = ImageFolder(str(tmp_path))
    assert list(split.class_names) == theirs.classes
    assert number_of(NAMES, split) == {NAMES[image.getpixel((0, 0))[0] // 20]: label for image, label in theirs}


def number_of(names: list[str], split) -> dict[str, int]:
    images, labels = first_images(split)
    return {names[round(255 * image[0, 0, 0].item() / 20)]: int(label) for image, label in zip(images, labels,
                                                                                              strict=True)}


@pytest.mark.parametrize("kind", ["txt", "pkl"])
def test_a_class_map_numbers_the_classes(tmp_path, kind):
    write_classes(tmp_path / "train", NAMES)
    write_classes(tmp_path / "test", NAMES)
    file = tmp_path / f"map.{kind}"
    order = ["9", "10", "other", "a2", "a10", "b", "A", "Ä", "a b"]
    if kind == "txt":
        file.write_text("\n".join(order) + "\n\n")
    else:
        file.write_bytes(pickle.dumps({name: number for number, name in enumerate(order)}))
    for place in (file, file.name):  # timm looks for it in the data's folder, too
        split = open_split("folder", "test", data_dir=tmp_path, input_size=(1, 8, 8), class_map=place, num_classes=12)
        assert number_of(NAMES, split) == {name: order.index(name) for name in NAMES}
        assert split.class_names == (*order, "", "", "") and split.num_classes == 12
    file.write_text("b\nA")
    if kind == "txt":
        with pytest.warns(UserWarning, match="6 of 8 images of test are of classes that the class map leaves out"):
            split = open_split("folder", "test", data_dir=tmp_path, input_size=(1, 8, 8), class_map=file)
        assert number_of(NAMES, split) == {"b": 0, "A": 1} and split.num_classes == 2
        file.write_text("zebra\nlion")
        with pytest.warns(UserWarning, match="8 of 8"), pytest.raises(
                ValueError, match=r"the split test of folder has no image of a class of the class map \(.*zebra"):
            open_split("folder", "test", data_dir=tmp_path, input_size=(1, 8, 8), class_map=file)


@pytest.mark.parametrize(("name", "content"), [
    ("map.txt", b""), ("map.txt", b"0\n1\n 0 \n2\n"), ("map.json", b"{}"), ("map.txt", b"\xff\xfe\xff"),
    ("map.pkl", pickle.dumps([1])),
    ("map.pkl", pickle.dumps({"a": -1})), ("map.pkl", pickle.dumps({1: "a"})), ("map.pkl", b"no pickle"),
    ("map.pkl", b"cos\nsystem\n(S'touch owned'\ntR."), ("missing.txt", None),
])
def test_a_bad_class_map_is_refused_by_name_and_runs_nothing(tmp_path, inside, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"class map .*{name}"):
        open_split("digits", "val", class_map=name)
    assert os.listdir(tmp_path) == ([] if content is None else [name])
