"""A user's mistake gives one clear message (what, where, allowed, how to mend), exit code 2, and loses nothing."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from gengrad.cli import main
from gengrad.files import sha256_of


@dataclass
class Case:
    """A command line (with {tmp}, {run}, {config} filled in) and what the message must say."""

    command: str
    says: list[str]
    files: dict = field(default_factory=dict)  # name -> array or text, written to {tmp}
    spoil: object = None  # changes a copy of the trained run before the command


def cut_in_half(run: Path) -> None:
    path = run / "flow.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(run: Path) -> None:
    content = bytearray((run / "flow.safetensors").read_bytes())
    content[-3] ^= 1
    (run / "flow.safetensors").write_bytes(content)


def raise_the_format(run: Path) -> None:
    description = json.loads((run / "flow.json").read_text())
    (run / "flow.json").write_text(json.dumps({**description, "format": 99}))


def other_network(run: Path) -> None:
    description = json.loads((run / "flow.json").read_text())
    description["transports"][0]["network"]["width"] = 17
    (run / "flow.json").write_text(json.dumps(description))


POINTS = np.random.default_rng(0).normal(size=(200, 2)).astype(np.float32)
WITH_NAN = POINTS.copy()
WITH_NAN[7, 1] = np.nan
ARRAY = "train {config} data.name=array data.path={tmp}/points.npy"

CASES = {
    # configs
    "misspelt key": Case("train {config} train.stpes=10", ["train.stpes (the command line)", "did you mean 'steps'"]),
    "misspelt section": Case("train {config} trian.steps=10", ["trian", "did you mean 'train'"]),
    "wrong type": Case("train {config} train.lr=fast", ["train.lr", "'fast'", "number"]),
    "a fraction of a step": Case("train {config} train.steps=2.5", ["train.steps", "2.5", "integer"]),
    "out of range": Case("train {config} train.lr=-1", ["train.lr", "greater than 0", "-1"]),
    "not a number": Case("train {config} method.tol=.nan", ["method.tol", "finite"]),
    "unknown method": Case("train {config} method.name=nsfg", ["method.name", "'nsfg'", "Did you mean 'nsgf'"]),
    "unknown data set": Case("train {config} data.name=mnits", ["data.name", "Known: ", "moons"]),
    "another method's setting": Case(
        "train {config} method.name=flow_matching method.tol=1.0", ["method.tol", "Known here: coupling"]
    ),
    "several mistakes at once": Case(
        "train {config} train.lr=-1 method.ot_batch=1 seed=x", ["3 mistakes", "train.lr", "method.ot_batch", "seed"]
    ),
    "override without value": Case("train {config} train.steps", ["key=value", "'train.steps'"]),
    "override that is no YAML": Case("train {config} data.path=[x", ["data.path=[x", "quote it"]),
    "no evaluations to judge": Case("train {config} evaluate.nfe=[0]", ["evaluate.nfe.0", "greater than or equal"]),
    "odd channels": Case("train {config} network.name=unet network.channels=5", ["network.channels", "multiple of 2"]),
    "override below a value": Case("train {config} data.name.x=1", ["'name' is a value"]),
    "missing config": Case("train {tmp}/run.yml", ["no config file", "Did you mean", "run.yaml"]),
    "a config by its name alone": Case("train 8gaussians_nsgf", ["no config file", "toy/8gaussians_nsgf.yaml"]),
    "a setting without its section": Case(
        "train {config} lr=0.1 steps=10 ot_batch=8",
        ["did you mean train.lr", "did you mean train.steps", "did you mean method.ot_batch"],
    ),
    "a setting of another data set": Case("train {config} data.path=x.npy", ["data.path", "of data.name=array"]),
    "a path without the name of its data set": Case(
        "train {tmp}/bad.yaml", ["data.name", "with these settings: array"], {"bad.yaml": "data: {path: x.npy}"}
    ),
    "a seed below 0": Case("train {config} seed=-1", ["seed", "greater than or equal to 0"]),
    "a seed of 24 digits": Case("train {config} seed=123456789012345678901234", ["seed", "less than"]),
    "more points in a transport problem than memory holds": Case(
        "train {config} method.ot_batch=100000000", ["method.ot_batch=100000000", "40,000,000,000,000,000 bytes"]
    ),
    "more points to pair than memory holds": Case(
        "train {config} method.name=flow_matching method.coupling=minibatch_ot train.batch_size=50000000",
        ["train.batch_size=50000000", "10,000,000,000,000,000 bytes"],
    ),
    "config is a folder": Case("train {tmp}", ["cannot read the config"]),
    "config is no YAML": Case("train {tmp}/bad.yaml", ["not valid YAML", "bad.yaml"], {"bad.yaml": "a: [1"}),
    "config with a tag": Case(
        "train {tmp}/bad.yaml", ["not valid YAML", "tag"], {"bad.yaml": "seed: !!python/name:os.system"}
    ),
    "config without data": Case(
        "train {tmp}/bad.yaml", ["data", "missing"], {"bad.yaml": "network: mlp\nmethod: nsgf"}
    ),
    "unet for points": Case("train {config} network.name=unet", ["network.name=mlp", "(2,)"]),
    "cuda where there is none": Case("train {config} device=cuda", ["device=cpu"]),
    "unwritable output": Case("train {config} out={tmp}/file/run", ["file"], {"file": "no folder"}),
    "init_from nothing": Case("train {config} init_from={tmp}/none", ["no run folder"]),
    "init_from another network": Case(
        "train {config} init_from={run} network.width=8", ["init_from", "does not fit", "network"]
    ),
    # data
    "missing data file": Case("train {config} data.name=array data.path={tmp}/none.npy", ["none.npy"]),
    "data without a path": Case("train {config} data.name=array", ["data.path", "missing"]),
    "NaN in the data": Case(ARRAY, ["points.npy", "1", "row 7"], {"points.npy": WITH_NAN}),
    "points beyond what squares can hold": Case(
        ARRAY, ["points.npy", "200 of 200", "row 0", "divide by"], {"points.npy": POINTS * 1e30 + 1e20}
    ),
    "a radius beyond what squares can hold": Case("train {config} data.radius=1e38", ["data.radius", "1e+38"]),
    "noise beyond what squares can hold": Case(
        "train {config} source.name=gaussian source.covariance=[[1e36,0],[0,1e36]]", ["source 'gaussian'", "1e+15"]
    ),
    "identical points": Case(ARRAY, ["identical"], {"points.npy": np.ones((200, 2), np.float32)}),
    "a batch larger than the data": Case(
        ARRAY + " train.batch_size=512 method.ot_batch=512",
        ["train.batch_size=512", "method.ot_batch=512", "180"],
        {"points.npy": POINTS},
    ),
    "a batch of one": Case("train {config} train.batch_size=1", ["train.batch_size", "2", "found 1"]),
    "one point": Case(ARRAY, ["points.npy"], {"points.npy": POINTS[:1]}),
    "text as data": Case(ARRAY, ["points.npy"], {"points.npy": "hello"}),
    "pickled objects as data": Case(ARRAY, ["points.npy"], {"points.npy": np.array([{}, {}], dtype=object)}),
    "a source of another shape": Case(ARRAY + " source.name=moons", ["(2,)", "(5,)"], {"points.npy": np.eye(200, 5)}),
    # runs
    "no such run": Case("sample {tmp}/none", ["no run folder", "none"]),
    "a folder that is no run": Case("sample {tmp}", ["flow.json", "no run folder of gengrad"]),
    "truncated flow": Case("sample {copy}", ["truncated or altered", "SHA-256"], spoil=cut_in_half),
    "a flipped bit": Case("sample {copy}", ["truncated or altered"], spoil=flip_a_bit),
    "weights missing": Case("sample {copy}", ["missing"], spoil=lambda run: (run / "flow.safetensors").unlink()),
    "damaged description": Case(
        "sample {copy}", ["flow.json", "damaged"], spoil=lambda run: (run / "flow.json").write_text("{")
    ),
    "a newer format": Case("sample {copy}", ["format 99", "reads 1"], spoil=raise_the_format),
    "an edited description": Case("sample {copy}", ["flow.json", "edited"], spoil=other_network),
    # sampling
    "nfe 0": Case("sample {run} --nfe 0", ["--nfe", "at least 1"]),
    "nfe that is no number": Case("sample {run} --nfe five", ["--nfe", "'five'"]),
    "nfe that ends in a comma": Case("sample {run} --nfe 5,", ["--nfe", "e.g. 5,10"]),
    "several nfe without commas": Case("sample {run} --nfe 5 10", ["unrecognized arguments: 10", "e.g. --nfe 5,10"]),
    "a negative seed of samples": Case("sample {run} --seed -1", ["--seed", "at least 0"]),
    "a seed of samples of 24 digits": Case("sample {run} --seed 123456789012345678901234", ["less than 2^63"]),
    "nfe that the solver cannot spend": Case("sample {run} --nfe 5 --solver heun", ["heun", "multiple of 2"]),
    "n 0": Case("sample {run} --n 0", ["--n", "at least 1"]),
    "unknown format": Case("sample {run} --out {tmp}/x.mp3", [".npy, .pt, .png"]),
    "output in no folder": Case("sample {run} --out {tmp}/none/x.npy", ["no folder"]),
    "output is a folder": Case("sample {run} --out {tmp}/d.npy", ["d.npy"], {"d.npy/keep": "x"}),
    "a film that is no GIF": Case("sample {run} --trajectory {tmp}/x.mp4", [".gif"]),
    "evaluating one point": Case("evaluate {run} --n 1", ["n=1"]),
    # images, classes, phases
    "a class of a flow without": Case("sample {run} --class 3", ["trained without classes", "network.classes=K"]),
    "guidance of a flow without classes": Case("sample {run} --guidance 2", ["trained without classes"]),
    "guidance that is no number": Case("sample {run} --guidance strong", ["--guidance", "'strong'"]),
    "phases of a flow without": Case("sample {run} --phase-1 3", ["no phases", "--phase-1"]),
    "a tau of a flow without phases": Case("sample {run} --tau 0.5", ["no phases", "--tau"]),
    "image scores of points": Case("evaluate {run} --features classifier", ["are for images"]),
    "unknown features": Case("evaluate {run} --features vgg", ["--features", "'vgg'"]),
    "classes for points": Case("train {config} network.classes=10", ["network.classes", "unknown key"]),
    "a folder of images that is not there": Case(
        "train {config} data.name=image_folder data.path={tmp}/none", ["no folder of images", "none"]
    ),
    "a folder of other files": Case(
        "train {config} data.name=image_folder data.path={tmp}/d", ["no images", ".txt"], {"d/a.txt": "x"}
    ),
    "a text file as an image": Case(
        "train {config} data.name=image_folder data.path={tmp}/d", ["a.png", "no image"], {"d/a.png": "x"}
    ),
    "a class that no image has": Case("train {config} data.name=digits data.classes=[12]", ["data.classes"]),
    "an image size that cannot be halved": Case(
        "train {config} data.name=digits network.name=unet network.multipliers=[1,1,1,1,1]", ["multiples of 16", "8x8"]
    ),
    "classes without labels": Case(
        "train {config} data.name=image_array data.path={tmp}/x.npy network.name=unet network.classes=3",
        ["needs labels"],
        {"x.npy": np.zeros((80, 8, 8), np.uint8) + np.arange(8, dtype=np.uint8)},
    ),
    "pieces that do not divide the batch": Case("train {config} train.accumulate=5", ["train.accumulate=5", "divide"]),
    "more than five Sinkhorn steps": Case(
        "train {config} method.name=nsgf_pp method.flow_steps=6", ["method.flow_steps", "less than or equal to 5"]
    ),
    "a Sinkhorn phase over the whole clock": Case(
        "train {config} method.name=nsgf_pp method.until=1.0", ["method.until", "less than 1"]
    ),
    "a shared network with two clocks": Case(
        "train {config} method.name=nsgf_pp method.shared_network=true method.tau=0.3", ["leave out tau"]
    ),
    "components for the debiased mean": Case(
        "train {config} method.ot_dims=1 method.target=mean", ["ot_dims", "target=match", "leave out ot_dims"]
    ),
    "more components than dimensions": Case("train {config} method.ot_dims=3", ["3 principal components", "at most 2"]),
    "patches that do not divide the image": Case(
        "train {config} data.name=digits network.name=unet network.multipliers=[1] network.patch=3",
        ["patches of 3x3", "multiples of 3", "8x8", "network.patch"],
    ),
    "unknown command": Case("smaple {run}", ["smaple"]),
}


def write(folder: Path, name: str, content) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
        path.write_text(content)
    else:
        with path.open("wb") as file:
            np.save(file, content, allow_pickle=content.dtype == object)


def contents(folder: Path) -> dict[str, str]:
    """The hash of every file below a folder."""
    return {str(p): sha256_of(p) if p.is_file() else "folder" for p in folder.rglob("*")}


def test_the_contents_of_a_folder_see_a_change_of_one_byte(tmp_path):
    (tmp_path / "a").write_bytes(b"1")
    before = contents(tmp_path)
    (tmp_path / "a").write_bytes(b"2")
    assert contents(tmp_path).keys() == before.keys() and contents(tmp_path) != before


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_gives_one_message_and_exit_code_2(name, tmp_path, small, trained, capsys, monkeypatch):
    case = CASES[name]
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)  # also on a machine that has one
    config, copy = small("run"), tmp_path / "copy"
    for file, content in case.files.items():
        write(tmp_path, file, content)
    if case.spoil:
        shutil.copytree(trained, copy)
        case.spoil(copy)
    before = contents(trained)
    words = [w.format(tmp=tmp_path, run=trained, config=config, copy=copy) for w in case.command.split()]
    try:
        code = main(words)
    except SystemExit as ended:  # argparse leaves this way
        code = ended.code
    told = capsys.readouterr()
    assert code == 2, told.err
    for words_said in case.says:
        assert words_said in told.err, told.err
    assert "Traceback" not in told.err
    assert contents(trained) == before  # nothing lost, nothing added, nothing written over


def test_out_of_gpu_memory_says_what_to_lower(small, monkeypatch, capsys):
    import torch

    from gengrad.methods.flow_matching import StraightStage

    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(StraightStage, "objective", full)
    assert main(["train", str(small("full", method={"name": "flow_matching"}))]) == 2
    message = capsys.readouterr().err
    assert "out of GPU memory (CUDA out of memory)" in message and "train.batch_size" in message
