"""Classes and guidance: the formula, the bill, which sample gets which class, and who refuses them."""

import json

import pytest
import torch
from torch import nn

import gengrad
from gengrad.cli import main
from gengrad.flows import Flow, VelocityTransport
from gengrad.flows.transports import Condition, conditioned
from gengrad.networks import MLP, UNet
from gengrad.registry import DATASETS

SHAPE = (1, 4, 4)


class Shift(nn.Module):
    """u(x, t, y) = y + 1 for a class, 0 for none."""

    classes = 3

    def forward(self, x, t, y=None):
        y = torch.full((len(x),), 3) if y is None else y
        return torch.where(y < 3, y + 1.0, 0.0).view(-1, 1, 1, 1).expand_as(x)


def flow_of(network, **options) -> Flow:
    return Flow(DATASETS.build({"name": "normal"}, event_shape=SHAPE), [VelocityTransport(network)], **options)


def unet(classes=3):
    torch.manual_seed(0)
    network = UNet(event_shape=SHAPE, channels=4, multipliers=[1], attention=False, classes=classes)
    for parameter in network.parameters():  # zero-initialised layers would hide what comes before them
        nn.init.normal_(parameter, std=0.2)
    return network


@pytest.mark.parametrize("w", [0.0, 1.0, 2.5])
def test_guidance_is_the_class_velocity_pulled_away_from_the_one_without(w):
    x, t, y = torch.zeros(3, *SHAPE), torch.zeros(3), torch.tensor([0, 1, 2])
    v = conditioned(Shift(), Condition(y, w))(x, t)
    assert torch.allclose(v.amax(dim=(1, 2, 3)), w * (y + 1.0))


def test_guidance_costs_a_second_evaluation_and_the_bill_says_so():
    flow = flow_of(unet())
    assert flow.draw_samples(5, 4).nfe == 4
    assert flow.draw_samples(5, 4, label=1, guidance=2.0).nfe == 8


def test_a_class_asked_for_is_given_to_all_and_others_are_drawn_like_the_data():
    flow = flow_of(Shift(), class_weights=[0.5, 0.0, 0.5])
    x_0 = flow_of(Shift(), class_weights=[0.5, 0.0, 0.5]).trajectory(600, 1)[0]
    moved = (flow.sample(600, 1) - x_0).mean(dim=(1, 2, 3)).round()
    assert torch.equal(flow.draw_samples(600, 1).y, (moved - 1).long())
    share = float((moved == 3).float().mean())
    assert set(moved.tolist()) == {1.0, 3.0} and 0.4 < share < 0.6  # 600 coins: five standard deviations
    assert torch.equal(flow.sample(600, 1, chunk=7), flow.sample(600, 1))
    assert torch.equal(flow.draw_samples(100, 1, first=300).y, flow.draw_samples(600, 1).y[300:400])
    assert torch.allclose(flow.sample(4, 1, label=2) - x_0[:4], torch.tensor(3.0), atol=1e-5)


def test_a_network_without_a_label_is_the_one_of_no_class():
    network = unet()
    x, t = torch.randn(2, *SHAPE), torch.rand(2)
    assert torch.equal(network(x, t), network(x, t, torch.full((2,), 3)))
    assert not torch.equal(network(x, t), network(x, t, torch.zeros(2, dtype=torch.long)))


def test_channels_last_changes_nothing_but_the_layout():
    settings = {"event_shape": (3, 8, 8), "channels": 8, "multipliers": [1, 2], "attention_at": [8]}
    plain, last = UNet(**settings), UNet(**settings, channels_last=True)
    for parameter in plain.parameters():
        nn.init.normal_(parameter, std=0.2)
    last.load_state_dict(plain.state_dict())
    x, t = torch.randn(2, 3, 8, 8), torch.rand(2)
    assert torch.allclose(last(x, t), plain(x, t), atol=1e-4 * float(plain(x, t).abs().max()))


@pytest.mark.parametrize("options", [{"label": 1}, {"guidance": 2.0}])
def test_a_flow_without_classes_refuses_them(options):
    flow = Flow(DATASETS.build({"name": "normal"}, event_shape=(2,)), [VelocityTransport(MLP(event_shape=(2,)))])
    with pytest.raises(ValueError, match="trained without classes"):
        flow.sample(2, 2, **options)


def test_classes_that_the_flow_does_not_know_are_refused():
    flow = flow_of(unet(), class_weights=[0.5, 0.0, 0.5])
    with pytest.raises(ValueError, match=r"0 \.\. 2"):
        flow.sample(2, 2, label=7)
    with pytest.raises(ValueError, match=r"had the classes \[0, 2\]"):
        flow.sample(2, 2, label=1)
    with pytest.raises(ValueError, match="guidance is a finite number"):
        flow.sample(2, 2, guidance=-1.0)


@pytest.fixture(scope="module")
def with_classes(tmp_path_factory):
    """A run on digits 0 to 4 with classes, hardly trained."""
    import yaml

    folder = tmp_path_factory.mktemp("classes")
    raw = {
        "out": str(folder / "run"),
        "data": {"name": "digits", "classes": [0, 1, 2, 3, 4]},
        "network": {"name": "unet", "channels": 8, "multipliers": [1, 2], "attention": False, "classes": 10},
        "method": {"name": "nsgf_pp", "ot_batch": 64},
        "train": {"steps": 24, "batch_size": 32, "lr": 1e-3},
        "evaluate": {"nfe": [3]},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(raw))
    assert main(["train", str(folder / "run.yaml")]) == 0
    return folder


def test_sample_takes_a_class_and_guidance(with_classes, tmp_path, capsys):
    base = ["sample", str(with_classes / "run"), "--n", "4", "--nfe", "3"]
    out = ["--out", str(tmp_path / "x.npy")]
    assert main([*base, "--class", "3", "--guidance", "2", *out]) == 0
    assert "6 network evaluations each (counted), and 1 of the time predictor" in capsys.readouterr().out
    assert main([*base, "--class", "7", *out]) == 2
    assert "had the classes [0, 1, 2, 3, 4]" in capsys.readouterr().err
    assert main([*base, "--phase-1", "3", *out]) == 2
    assert "leaves 0 evaluations" in capsys.readouterr().err
    assert main([*base, "--tau", "0.1", *out]) == 2
    assert "trained from 0.35 on" in capsys.readouterr().err
    assert main([*base, "--phase-1", "1", "--tau", "0.6", *out]) == 0


def test_several_nfe_of_a_class_are_compared_with_its_images_alone(with_classes, tmp_path, monkeypatch, capsys):
    from gengrad.evaluation import classifier

    monkeypatch.setenv("GENGRAD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(classifier, "steps_for", lambda n: 5)
    drawn, draw = [], Flow.draw_samples
    monkeypatch.setattr(Flow, "draw_samples", lambda *a, **k: (drawn.append(draw(*a, **k)), drawn[-1])[1])
    base = ["sample", str(with_classes / "run"), "--n", "6", "--nfe", "2,3"]
    assert main([*base, "--class", "3", "--guidance", "2"]) == 0
    assert drawn and all((found.y == 3).all() for found in drawn)
    report = json.loads((with_classes / "run" / "quality.json").read_text())
    protocol = report["results"][0]["protocol"]
    held_out = int((DATASETS.build({"name": "digits"}).held_out_labels == 3).sum())
    assert protocol["reference"] == f"{held_out} images of class 3 of digits (held_out)" and protocol["label"] == 3
    assert [row["NFE"] for row in report["table"]] == ["4", "6"]  # two evaluations for each
    told = capsys.readouterr().out
    assert "| NFE | time predictor |" in told


def test_a_run_starts_from_another_ones_weights_on_other_classes(with_classes, tmp_path):
    """Both networks come from 0-4; at a learning rate of 1e-9 they stay where they were, with 5-9 as their data."""
    more = ["data.classes=[5,6,7,8,9]", f"init_from={with_classes / 'run'}", f"out={tmp_path / 'next'}"]
    assert main(["train", str(with_classes / "run.yaml"), *more, "train.lr=1e-9"]) == 0
    before, after = gengrad.load(with_classes / "run"), gengrad.load(tmp_path / "next")
    a, b = before.transports[0], after.transports[0]
    for mine, theirs in ((a.network, b.network), (a.straight, b.straight)):
        pairs = zip(mine.state_dict().values(), theirs.state_dict().values())
        assert all((x - y).abs().max() < 1e-6 for x, y in pairs)
    assert [c for c, w in enumerate(before.class_weights) if w] == [0, 1, 2, 3, 4]
    assert [c for c, w in enumerate(after.class_weights) if w] == [5, 6, 7, 8, 9]


def test_classes_train_in_bf16_with_channels_last(with_classes, tmp_path):
    change = ["train.precision=bf16", "network.channels_last=true", "method.shared_network=true", "train.steps=3"]
    assert main(["train", str(with_classes / "run.yaml"), *change, f"out={tmp_path / 'bf16'}"]) == 0
    flow = gengrad.load(tmp_path / "bf16")
    assert flow.sample(3, 3, label=2, guidance=1.5).isfinite().all()
    assert all(p.dtype == torch.float32 for p in flow.parameters())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("network.classes=5", "labels up to 9; use network.classes=10"),
        ("method.target_batch=32", "one to one"),
        ("train.accumulate=5", "does not divide into the pieces"),
    ],
)
def test_classes_that_do_not_fit_the_data_or_the_method_are_refused(with_classes, tmp_path, capsys, change, says):
    command = ["train", str(with_classes / "run.yaml"), "data.classes=null", f"out={tmp_path / 'x'}", change]
    assert main(command) == 2
    assert says in capsys.readouterr().err


def test_data_without_labels_cannot_train_a_network_with_classes(with_classes, tmp_path, capsys):
    import numpy as np

    np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (90, 8, 8), dtype=np.uint8))
    command = ["data.name=image_array", f"data.path={tmp_path / 'images.npy'}", f"out={tmp_path / 'x'}"]
    assert main(["train", str(with_classes / "run.yaml"), *command]) == 2
    assert "needs labels, which data 'image_array' in" in (told := capsys.readouterr().err)
    assert "images.npy' have none of; name the array of labels as data.labels, or leave it out" in told
