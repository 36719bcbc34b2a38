"""A user's mistake gives one clear message (what, where, allowed, how to mend), exit code 2, and loses nothing."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from gengrad.cli import main


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
    "phases of a flow without": Case("sample {run} --phase-1 3", ["no phases", "phase_1"]),
    "a tau of a flow without phases": Case("sample {run} --tau 0.5", ["no phases", "fixed_tau"]),
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
    before = sorted(str(p) for p in trained.rglob("*"))
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
    assert sorted(str(p) for p in trained.rglob("*")) == before  # nothing lost, nothing added


def test_a_bug_is_not_disguised_as_a_users_mistake(small, monkeypatch):
    from gengrad.methods import nsgf

    def broken(self, networks, part, generator):
        return [][0]

    monkeypatch.setattr(nsgf.SinkhornStage, "objective", broken)
    with pytest.raises(IndexError):
        main(["train", str(small("run"))])


def test_a_bug_of_gengrads_shows_its_place_and_a_mistake_only_its_message(capsys):
    from gengrad.cli import guarded
    from gengrad.data.arrays import read_array
    from gengrad.registry import METHODS

    inside = {"__name__": "gengrad.some_module"}
    with pytest.raises(ValueError, match="invalid literal"):  # raised by Python, on behalf of gengrad's code
        guarded(eval("lambda given: int('x')", inside), None)
    assert guarded(lambda given: read_array("nothing.npy"), None) == 2
    assert guarded(lambda given: METHODS.get("nsfg"), None) == 2
    assert "Did you mean" in capsys.readouterr().err


def test_out_of_gpu_memory_says_what_to_lower(small, monkeypatch, capsys):
    import torch

    from gengrad.methods.flow_matching import StraightStage

    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(StraightStage, "objective", full)
    assert main(["train", str(small("full", method={"name": "flow_matching"}))]) == 2
    message = capsys.readouterr().err
    assert "out of GPU memory (CUDA out of memory)" in message and "train.batch_size" in message
