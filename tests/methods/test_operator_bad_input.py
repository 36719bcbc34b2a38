"""What users get wrong with a learned operator's config: one message with the reason and what to do, exit code 2."""

import pytest
import yaml

from gengrad.cli import main

BASE = {
    "source": {"name": "gaussian", "mean": [0.0]},
    "data": {"name": "space", "dimension": 1},
    "network": {"name": "set_operator", "width": 8, "tokens": 2, "heads": 2},
    "method": {"name": "jko_operator", "functional": "entropy", "jko_steps": 2, "particles": 16, "buffer": 4},
    "train": {"steps": 2, "batch_size": 4},
    "evaluate": {"nfe": [2]},
}
SPACE = {"source": {"name": "normal"}, "data": {"name": "space", "dimension": 4}}
CASES = {
    "an entropy above three dimensions": (
        SPACE, {}, ["needs a density", "up to d = 3", "here d = 4", "jko_icnn"],
    ),
    "kl above three dimensions": (
        {"source": {"name": "normal"}, "data": {"name": "gaussian", "mean": [0.0] * 5}}, {"functional": "kl"},
        ["up to d = 3", "here d = 5"],
    ),
    "images": (
        {"source": {"name": "normal"}, "data": {"name": "digits"}}, {"functional": "energy_distance"},
        ["clouds of points (d,), not events of shape (1, 8, 8)"],
    ),
    "kl to no data": ({}, {"functional": "kl"}, ["log density of the data", "'space'"]),
    "samples of no data": ({}, {"functional": "energy_distance"}, ["compares with samples", "'space' has none"]),
    "a negative entropy": (
        {}, {"functional": [{"name": "entropy", "weight": -1.0}]}, ["entropy of weight -1", "positive weight"],
    ),
    "a misspelt family": ({}, {"initial": ["gausians"]}, ["method.initial", "Did you mean 'gaussians'"]),
    "axes of another dimension": (
        {}, {"initial": {"name": "products", "axes": [[0, 1, 0], [1, 0, 0], [0, 0, 1]]}},
        ["method.initial: family 'products': 3 axes for points of d ="],
    ),
    "no family": ({}, {"initial": []}, ["at least one family"]),
    "a family that is turned inside out": (
        {}, {"initial": {"name": "boxes", "smallest": 2.0, "largest": 1.0}}, ["smallest=2 is above largest=1"],
    ),
    "a network of another kind": (
        {"network": {"name": "mlp"}}, {}, ["method 'jko_operator' learns an operator", "set_operator"],
    ),
    "many taus of a network that sees none": ({}, {"taus": [0.05, 0.2]}, ["on_tau=true"]),
    "a network blind to where a potential pulls": (
        {"network": {**BASE["network"], "translation_equivariant": True}},
        {"functional": {"name": "potential", "potential": "quadratic"}},
        ["translation_equivariant", "internal and interaction energies alone do not"],
    ),
    "log densities of particles": (
        {"network": {**BASE["network"], "log_density": True}},
        {"functional": {"name": "potential", "potential": "quadratic"}},
        ["network.log_density=true: the functional is one of particles"],
    ),
    "log densities without kernels": (
        {"network": {**BASE["network"], "log_density": True, "kernels": 0}}, {}, ["kernels=0 leaves none"],
    ),
    "nobody untold": ({}, {"untold": 0}, ["method.untold", "greater than or equal to 0.01"]),
    "taus beside tau": ({}, {"taus": [0.2, 0.4]}, ["around tau=0.1"]),
    "no steps": ({}, {"jko_steps": 0}, ["method.jko_steps", "greater than or equal to 1"]),
    "fewer evaluations than steps": ({"evaluate": {"nfe": [1]}}, {}, ["takes 2 network evaluations"]),
    "more fresh measures than there are": ({}, {"fresh": 1.5}, ["method.fresh", "less than or equal to 1"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_with_an_operator_gives_one_message_and_exit_code_2(name, tmp_path, capsys):
    changes, method, says = CASES[name]
    raw = {key: dict(value) for key, value in BASE.items()} | {"out": str(tmp_path / "run")} | changes
    raw["method"] |= method
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw))
    assert main(["train", str(tmp_path / "run.yaml")]) == 2
    told = capsys.readouterr().err
    assert all(words in told for words in says) and "Traceback" not in told, told
    assert not (tmp_path / "run").exists()  # so that the mended one starts in the same folder


def test_many_taus_are_trained_where_the_network_sees_them(tmp_path):
    import torch

    import gengrad

    raw = {key: dict(value) for key, value in BASE.items()} | {"out": str(tmp_path / "run")}
    raw["network"]["on_tau"], raw["method"]["taus"] = True, [0.05, 0.2]
    raw["train"]["steps"] = 20  # long enough for states to be moved
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw))
    assert main(["train", str(tmp_path / "run.yaml")]) == 0
    flow, x = gengrad.load(tmp_path / "run"), torch.randn(30, 1)
    assert flow.step(x, tau=0.2).isfinite().all()
    with pytest.raises(ValueError, match=r"outside of 0\.05 to 0\.2"):
        flow.step(x, tau=0.3)
