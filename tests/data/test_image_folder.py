"""A folder of images: odd files are handled and said, or refused by name; never a crash."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from gengrad.cli import main
from gengrad.data import ImageFolder

RANDOM = np.random.default_rng(0)


def noise(*shape, dtype=np.uint8, top=256):
    return RANDOM.integers(0, top, shape).astype(dtype)


def save(folder, name, pixels, mode=None, **options):
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(file, **options)
    return file


def plain(folder, n=6, size=8):
    for k in range(n):
        save(folder, f"{k}.png", noise(size, size, 3))


def test_a_folder_of_equal_images_is_read_exactly(tmp_path):
    plain(tmp_path)
    data = ImageFolder(path=str(tmp_path), held_out=0.0)
    assert data.event_shape == (3, 8, 8) and data.labels is None and data.notes == ()
    assert np.array_equal(data.pixels[0].permute(1, 2, 0).numpy(), np.asarray(Image.open(tmp_path / "0.png")))


def test_folders_are_classes_in_alphabetical_order(tmp_path):
    for name in ("cat", "ant"):
        plain(tmp_path / name, 5)
    data = ImageFolder(path=str(tmp_path), held_out=0.0)
    assert torch.bincount(data.labels).tolist() == [5, 5]
    first = np.asarray(Image.open(tmp_path / "ant" / "0.png"))
    assert np.array_equal(data.pixels[0].permute(1, 2, 0).numpy(), first) and data.labels[0] == 0
    save(tmp_path, "loose.png", noise(8, 8, 3))
    with pytest.raises(ValueError, match=r"loose\.png"):
        ImageFolder(path=str(tmp_path))


def test_16_bit_images_are_scaled_not_clipped(tmp_path):
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    for k in range(3):
        save(tmp_path, f"{k}.png", values)
    data = ImageFolder(path=str(tmp_path), held_out=0.0)
    assert data.event_shape == (1, 8, 8)
    assert np.array_equal(data.pixels[0, 0].numpy(), np.round(values / 257).astype(np.uint8))
    assert "3 of 3 images have 16 bits" in data.notes[0]


def test_transparent_images_are_laid_on_the_background(tmp_path):
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[:4, :, 3] = 255  # the upper half black, the lower half nothing
    for k in range(2):
        save(tmp_path, f"{k}.png", pixels)
    image = ImageFolder(path=str(tmp_path), held_out=0.0, background=[10, 20, 30]).pixels[0]
    assert image[:, :4].max() == 0 and image[:, 4:].amin(dim=(1, 2)).tolist() == [10, 20, 30]


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "LA"])
def test_images_of_other_modes_join_the_colour_ones(tmp_path, mode):
    plain(tmp_path, 2)
    save(tmp_path, f"other.{'jpg' if mode == 'CMYK' else 'png'}", noise(8, 8, 3), mode)
    assert ImageFolder(path=str(tmp_path), held_out=0.0).pixels.shape == (3, 3, 8, 8)


def test_grey_images_alone_have_one_channel_and_colours_can_be_dropped(tmp_path):
    for k in range(2):
        save(tmp_path / "grey", f"{k}.png", noise(8, 8))
        save(tmp_path / "colour", f"{k}.png", noise(8, 8, 3))
    assert ImageFolder(path=str(tmp_path / "grey")).event_shape == (1, 8, 8)
    assert ImageFolder(path=str(tmp_path / "grey"), channels=3).event_shape == (3, 8, 8)
    assert ImageFolder(path=str(tmp_path / "colour"), channels=1).event_shape == (1, 8, 8)


def test_of_an_animation_the_first_frame_is_taken(tmp_path):
    plain(tmp_path, 2)
    frames = [Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (250, 0, 100)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    data = ImageFolder(path=str(tmp_path), held_out=0.0)
    assert data.pixels[-1].float().mean() > 240 and any("animations" in note for note in data.notes)


def test_mixed_sizes_are_named_and_made_one_by_size(tmp_path):
    save(tmp_path, "wide.png", noise(16, 40, 3))
    save(tmp_path, "high.png", noise(30, 16, 3))
    with pytest.raises(ValueError, match=r"2 sizes: .*wide\.png.*set data\.size"):
        ImageFolder(path=str(tmp_path))
    data = ImageFolder(path=str(tmp_path), size=12, held_out=0.0)
    assert data.pixels.shape == (2, 3, 12, 12) and "2 of 2 images were resized" in data.notes[0]


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


BAD = {
    "a cut file": (lambda d: cut(save(d, "bad.png", noise(64, 64, 3))), "damaged or cut short"),
    "a cut jpeg": (lambda d: cut(save(d, "bad.jpg", noise(64, 64, 3))), "damaged or cut short"),
    "an empty file": (lambda d: (d / "bad.png").write_bytes(b""), "empty"),
    "a text file": (lambda d: (d / "bad.png").write_text("hello"), "no image"),
    "a header alone": (lambda d: (d / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n"), "no image|damaged"),
    "a huge image": (lambda d: save(d, "bad.png", Image.new("L", (4000, 3000))), "more than max_pixels"),
    "a bomb": (lambda d: save(d, "bad.png", Image.new("1", (20000, 15000))), "too large|max_pixels"),
    "a tiny image": (lambda d: save(d, "bad.png", noise(3, 3, 3)), "smaller than size=8"),
    "floating-point pixels": (lambda d: save(d, "bad.tiff", noise(8, 8).astype(np.float32)), "floating-point"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_cannot_be_trained_on_is_named_or_left_out(tmp_path, name):
    spoil, says = BAD[name]
    plain(tmp_path)
    spoil(tmp_path)
    settings = {"path": str(tmp_path), "size": 8, "held_out": 0.0, "max_pixels": 1_000_000}
    with pytest.raises(ValueError, match=rf"1 of 7 images.*data\.bad=skip(.|\n)*bad\..*({says})"):
        ImageFolder(**settings)
    data = ImageFolder(**settings, bad="skip")
    assert len(data) == 6 and "left out: bad." in data.notes[-1]


FOLDERS = {
    "no folder": (lambda d: None, "no folder of images"),
    "an empty folder": (lambda d: d.mkdir(), "holds no images, but nothing"),
    "other files": (lambda d: (d.mkdir(), (d / "a.txt").write_text("x")), r"1 other files \(\.txt\)"),
    "one image": (lambda d: save(d, "a.png", noise(8, 8, 3)), "1 image"),
    "only broken images": (lambda d: (d.mkdir(), (d / "a.png").write_text("x")), "1 of 1 images"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_without_enough_images_ends_with_one_message(tmp_path, name, small, capsys):
    prepare, says = FOLDERS[name]
    prepare(tmp_path / "images")
    command = ["data.name=image_folder", f"data.path={tmp_path / 'images'}", "network.name=unet"]
    assert main(["train", str(small("run")), *command]) == 2
    told = capsys.readouterr().err
    assert re.search(says, told) and str(tmp_path / "images") in told and "Trace" not in told


def test_damaged_bytes_never_crash_the_reader(tmp_path):
    """Images with random bytes changed: each is read, or refused by name."""
    kinds = ("png", "jpg", "gif", "bmp")
    good = {kind: save(tmp_path, f"good.{kind}", noise(12, 12, 3)).read_bytes() for kind in kinds}
    folder = tmp_path / "damaged"
    folder.mkdir()
    for k in range(200):
        kind = list(good)[k % 4]
        content = bytearray(good[kind])
        for place in RANDOM.integers(0, len(content), 1 + k % 5):
            content[place] = RANDOM.integers(256)
        (folder / f"{k:03d}.{kind}").write_bytes(bytes(content))
    plain(folder, 2, 12)
    data = ImageFolder(path=str(folder), size=12, bad="skip", max_pixels=100_000)
    assert 2 <= len(data) + len(data.held_out) <= 202 and data.event_shape[1:] == (12, 12)
