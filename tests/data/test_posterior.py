"""The logistic posterior: its density against a direct sum, its figures of merit, and tables it refuses."""

import math

import numpy as np
import pytest
import torch
import yaml

from gengrad.cli import main
from gengrad.data import LogisticPosterior, generator_for


@pytest.fixture
def table(tmp_path):
    def write(name="table.csv", rows=60, labels=None, text=None):
        generator = np.random.default_rng(0)
        x = generator.normal(size=(rows, 3)) * [1, 5, 0.1] + [0, 3, 0]
        y = np.where(x[:, 0] + 0.3 * generator.normal(size=rows) > 0, 1, -1) if labels is None else np.array(labels)
        path = tmp_path / name
        if path.suffix == ".npz":
            np.savez(path, x=x, y=y)
        else:
            lines = [",".join(map(str, [*row, label])) for row, label in zip(x.tolist(), y.tolist())]
            path.write_text("\n".join(["a,b,c,y", *lines, *([text] if text else [])]))
        return str(path)

    return write


def test_the_density_is_likelihood_times_prior(table):
    data = LogisticPosterior(path=table())
    theta = torch.randn(5, 5, generator=generator_for(0, "test")).double()
    assert data.event_shape == (5,)
    for row, found in zip(theta, data.log_density(theta)):
        w, a = row[:4], row[4]
        likelihood = sum(-math.log1p(math.exp(-float(y * (x @ w)))) for x, y in zip(data.x, data.y))
        # N(w; 0, 1/alpha) and Gamma(1, 0.01) in log alpha, without their constants
        prior = 2 * a - a.exp() * w.square().sum() / 2 + a - 0.01 * a.exp()
        assert float(found) == pytest.approx(likelihood + float(prior), rel=1e-9)


def test_a_table_of_csv_and_of_npz_are_the_same_data(table):
    a, b = LogisticPosterior(path=table()), LogisticPosterior(path=table("t.npz"), features="x", labels="y")
    assert torch.allclose(a.x, b.x) and torch.equal(a.y, b.y)
    assert len(a.x) == 48 and len(a.x_held_out) == 12
    assert torch.allclose(a.x[:, :3].mean(0), torch.zeros(3).double(), atol=1e-12) and (a.x[:, 3] == 1).all()


def test_weights_that_separate_the_classes_score_better_than_their_opposite(table):
    data = LogisticPosterior(path=table(rows=400))
    good = torch.tensor([[4.0, 0.0, 0.0, 0.0, 0.0]]).repeat(10, 1)
    right, wrong = data.score_samples(good), data.score_samples(-good)
    assert right["accuracy"] > 0.85 and wrong["accuracy"] == pytest.approx(1 - right["accuracy"])
    assert right["log_likelihood"] > wrong["log_likelihood"]
    one = data.score_samples(torch.zeros(3, 5))
    assert one["log_likelihood"] == pytest.approx(-math.log(2))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"labels": [1] * 60}, "of two kinds; found 1"),
        ({"labels": list(range(60))}, "Is the label in another column"),
        ({"text": "red,1,2,1"}, "not a row of numbers"),
    ],
)
def test_a_table_that_is_no_classification_is_refused(table, changes, says):
    with pytest.raises(ValueError, match=says):
        LogisticPosterior(path=table(**changes))


def test_an_npz_must_say_which_arrays_it_means(table):
    with pytest.raises(ValueError, match="name its arrays"):
        LogisticPosterior(path=table("t.npz"))


def test_a_minibatch_of_rows_gives_the_log_density_on_average(table):
    data = LogisticPosterior(path=table(rows=200), minibatch=20)
    theta = torch.randn(3, 5, generator=generator_for(0, "test")).double()
    some = torch.stack([data.estimate(generator_for(k, "rows")).log_density(theta) for k in range(2000)])
    noise = some.std(0) / len(some) ** 0.5
    assert (some.std(0) > 0).all() and ((some.mean(0) - data.log_density(theta)).abs() < 4 * noise).all()
    assert len(data.x) == 160  # what is judged stays whole
    whole = LogisticPosterior(path=table(rows=200))
    assert whole.estimate(generator_for(0, "rows")) is whole


def test_exported_weights_give_the_same_logits_on_the_table_as_it_stands(table):
    path = table()
    data, theta = LogisticPosterior(path=path), torch.randn(4, 5, generator=generator_for(1, "test")).double()
    names, rows = data.table_of(theta)
    assert names == ["w1", "w2", "w3", "intercept", "alpha"]
    raw = torch.from_numpy(np.loadtxt(path, delimiter=",", skiprows=1)[:, :3])
    standard = (raw - data.mean) / data.scale
    assert torch.allclose(rows[:, :3] @ raw.T + rows[:, 3:4], theta[:, :3] @ standard.T + theta[:, 3:4])
    assert torch.allclose(rows[:, 4], theta[:, 4].exp())


def test_a_trained_posterior_reports_held_out_rows_and_exports_its_weights(table, tmp_path, capsys):
    raw = {
        "out": str(tmp_path / "run"),
        "data": {"name": "logistic_posterior", "path": table("t.npz", rows=300), "features": "x", "labels": "y",
                 "minibatch": 64},
        "network": {"name": "icnn", "width": 8},
        "method": {"name": "jko_icnn", "functional": "kl", "tau": 1.0, "jko_steps": 2, "cloud": 1024},
        "train": {"steps": 20, "batch_size": 64},
        "evaluate": {"nfe": [2], "n": 50},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw))
    assert main(["train", str(tmp_path / "run.yaml")]) == 0
    assert main(["evaluate", raw["out"]]) == 0
    told = capsys.readouterr().out
    accuracy = float(told.split("accuracy ")[1].split()[0])
    assert accuracy > 0.85 and "log likelihood" in told and "samples.csv" in told
    with open(tmp_path / "run" / "samples.csv") as file:
        assert file.readline().strip() == "w1,w2,w3,intercept,alpha"
        weights = np.loadtxt(file, delimiter=",")
    assert weights.shape == (50, 5) and weights[:, 0].mean() > abs(weights[:, 1].mean())
    assert main(["sample", raw["out"], "--n", "7", "--nfe", "2", "--out", str(tmp_path / "w.npy")]) == 0
    assert np.load(tmp_path / "w.npy").shape == (7, 5)
