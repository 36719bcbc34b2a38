"""Images as users have them, through the commands: an oddity is handled and said, or refused with its name."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gengrad.cli import main

RANDOM = np.random.default_rng(0)


def noise(*shape: int, top: int = 256, dtype=np.uint8) -> np.ndarray:
    return RANDOM.integers(0, top, shape).astype(dtype)


def saved(folder: Path, name: str, image, **options) -> Path:
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(folder / name, **options)
    return folder / name


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def corrupt(file: Path) -> None:
    content = file.read_bytes()
    middle = len(content) // 2
    file.write_bytes(content[:middle] + bytes(200) + content[middle + 200 :])


def emptied(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


def other_files(folder: Path) -> None:
    emptied(folder)
    (folder / "notes.txt").write_text("no image")


@dataclass
class Odd:
    """What is put into a folder of 20 plain images 8x8, what is set besides, and what is said."""

    spoil: Callable[[Path], object]
    says: list[str]
    code: int = 2
    settings: str = ""


TWO = Image.fromarray(noise(8, 8, 3))
ODD = {
    "corrupt": Odd(lambda d: corrupt(saved(d, "odd.png", noise(64, 64, 3))), ["odd.png", "damaged", "data.bad=skip"]),
    "corrupt, left out": Odd(
        lambda d: corrupt(saved(d, "odd.png", noise(64, 64, 3))),
        ["1 of 21 files left out: odd.png"],
        0,
        "data.bad=skip",
    ),
    "truncated": Odd(lambda d: cut(saved(d, "odd.jpg", noise(64, 64, 3))), ["odd.jpg", "cut short"]),
    "16 bits": Odd(
        lambda d: saved(d, "odd.png", noise(8, 8, top=65536, dtype=np.uint16)), ["1 of 21 images have 16 bits"], 0
    ),
    "grey": Odd(lambda d: saved(d, "odd.png", noise(8, 8)), ["to sample"], 0),
    "alpha": Odd(lambda d: saved(d, "odd.png", noise(8, 8, 4)), ["1 of 21 images are transparent", "background"], 0),
    "palette": Odd(lambda d: saved(d, "odd.png", TWO.convert("P")), ["to sample"], 0),
    "animated": Odd(
        lambda d: saved(d, "odd.gif", TWO, save_all=True, append_images=[Image.fromarray(noise(8, 8, 3))]),
        ["1 of 21 images are animations: the first frame was taken"],
        0,
    ),
    "tiny": Odd(lambda d: saved(d, "odd.png", noise(2, 2, 3)), ["odd.png", "2x2 is smaller"], settings="data.size=8"),
    "huge": Odd(
        lambda d: saved(d, "odd.png", Image.new("1", (900, 800))),
        ["odd.png", "900x800 is more than max_pixels=500,000"],
        settings="data.max_pixels=500000",
    ),
    "mixed sizes": Odd(lambda d: saved(d, "odd.png", noise(9, 12, 3)), ["odd.png", "12x9", "set data.size"]),
    "mixed sizes made one": Odd(
        lambda d: saved(d, "odd.png", noise(9, 12, 3)), ["1 of 21 images were resized"], 0, "data.size=8"
    ),
    "an empty folder": Odd(emptied, ["{folder}", "holds no images, but nothing"]),
    "other files": Odd(other_files, ["{folder}", "1 other files (.txt)"]),
    "labels missing": Odd(
        lambda d: None, ["{folder}", "needs labels", "a folder of its own"], settings="network.classes=3"
    ),
    "a size that cannot be halved": Odd(
        lambda d: None, ["multiples of 16", "8x8", "network.multipliers"], settings="network.multipliers=[1,1,1,1,1]"
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_image_or_folder_is_handled_or_refused_by_name(name, tmp_path, small, capsys):
    odd, folder = ODD[name], tmp_path / "images"
    folder.mkdir()
    for k in range(20):
        saved(folder, f"{k:02d}.png", noise(8, 8, 3))
    odd.spoil(folder)
    network = {"name": "unet", "channels": 4, "multipliers": [1], "attention": False}
    settings = {"network": network, "method": {"name": "flow_matching"}, "train": {"steps": 1, "batch_size": 4}}
    config = small("run", data={"name": "image_folder", "path": str(folder)}, evaluate={"nfe": [1]}, **settings)
    assert main(["train", str(config), *odd.settings.split()]) == odd.code
    told = capsys.readouterr()
    for words in odd.says:
        assert words.format(folder=folder) in (told.err if odd.code else told.out), told
    assert "Traceback" not in told.err


REFUSED = {
    "guidance without classes": ("sample {run} --guidance 2", ["trained without classes", "network.classes=K"]),
    "a class without classes": ("sample {run} --class 3", ["trained without classes"]),
    "more phases than evaluations": (
        "sample {run} --nfe 4 --phase-1 5",
        ["nfe=4 with 5 steps of the Sinkhorn phase", "raise nfe"],
    ),
    "a phase beyond five steps": ("sample {run} --nfe 9 --phase-1 6", ["0 to 5 steps"]),
    "no room for a step of the solver": ("sample {run} --nfe 2 --solver heun", ["nfe=2", "'heun'", "nfe >= 3"]),
    "a tau that was not trained": ("sample {run} --tau 0.1", ["trained from 0.35 on"]),
    "weights missing": ("evaluate {run} --inception {tmp}/none.pth", ["{tmp}/none.pth", "SHA-256", "classifier"]),
    "weights with another hash": ("evaluate {run} --inception {tmp}/w.pth", ["{tmp}/w.pth", "not opened"]),
    "weights with another hash in their place": (
        "sample {run} --n 16 --nfe 1,2",
        ["{tmp}/weights-inception-2015-12-05-6726825d.pth", "not opened"],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_run_on_images_cannot_do_is_refused(name, phased, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("GENGRAD_CACHE", str(tmp_path))
    monkeypatch.delenv("GENGRAD_INCEPTION", raising=False)
    for file in ("w.pth", "weights-inception-2015-12-05-6726825d.pth"):
        (tmp_path / file).write_bytes(b"other weights")
    command, says = REFUSED[name]
    assert main(command.format(run=phased, tmp=tmp_path).split()) == 2
    told = capsys.readouterr().err
    assert all(words.format(tmp=tmp_path) in told for words in says) and "Traceback" not in told, told
