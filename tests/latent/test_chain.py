"""The chain of a run on molecules, small: a user's own file in, tables and pictures out, every stage kept."""

import csv
import json
from pathlib import Path

import pytest
import torch

from gengrad import chain
from gengrad.cli import main
from gengrad.config import load_config, read_config
from gengrad.data.draws import Shuffle
from gengrad.flows.flow import load
from gengrad.latent import stages
from gengrad.latent.data import Cloud, Latents
from gengrad.latent.population import columns, sources, states
from gengrad.latent.settings import SurrogateSettings
from gengrad.latent.steps import divergence
from gengrad.molecules.library import library
from gengrad.molecules.objective import read_objective
from gengrad.registry import SCORERS

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs" / "molecules" / "qed_jko_icnn.yaml")
STEPS = 2


def small(folder: Path, **more) -> list[str]:
    """Overrides that make the shipped config a matter of seconds."""
    settings = {
        "out": folder / "run",
        "data.path": folder / "my.csv",
        "data.at_most": "null",
        "source.at_most": "null",
        "data.autoencoder.steps": 3,
        "data.autoencoder.network": "{latent: 6, embedding: 8, channels: 8, width: 16, readout: 8}",
        "data.surrogate.steps": 5,
        "data.surrogate.width": 8,
        "data.surrogate.explored": 10,
        "method.jko_steps": STEPS,
        "method.cloud": 64,
        "method.target_samples": 32,
        "train.steps": 2,
        "train.batch_size": 16,
        "evaluate.nfe": f"[{STEPS}]",
        "evaluate.n": 20,
    }
    return [f"{key}={value}" for key, value in {**settings, **more}.items()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a user's file and a finished run on it; tests must not change the run."""
    folder = tmp_path_factory.mktemp("chain")
    lines = [f"m{i},{smiles}" for i, smiles in enumerate(library(80))]
    (folder / "my.csv").write_text("\n".join(["name,smiles", "bad,not a molecule", *lines]))
    assert main(["train", CONFIG, *small(folder)]) == 0
    return folder


def read(path: Path) -> list[dict]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_run_leaves_every_table_that_is_promised(folder):
    run, objective = folder / "run", read_objective({"components": ["qed"]})
    assert "not a SMILES" in read(run / "molecules" / "rejected.csv")[0]["reason"]
    for name in ("population_before", "population_after"):
        rows = read(run / f"{name}.csv")
        assert len(rows) == 20 and list(rows[0]) == columns(objective)
        kept = "id" if name == "population_before" else "parent"
        assert all(row[kept].startswith("m") for row in rows)
        assert len({row[kept] for row in rows}) == 20  # each molecule of the file once
    assert {row["step"] for row in rows} == {str(STEPS)}
    assert "exact" in json.loads((run / "reconstruction.json").read_text())
    assert "qed" in (run / "objective.yaml").read_text() and (run / "flow.json").exists()
    assert (run / "population_after.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_holds_rdkits_own_values(folder):
    from rdkit import Chem
    from rdkit.Chem import QED

    rows = [row for row in read(folder / "run" / "population_after.csv") if row["valid"] == "1"]
    assert rows
    for row in rows:
        assert abs(float(row["qed"]) - QED.qed(Chem.MolFromSmiles(row["smiles"]))) < 1e-9
        assert row["qed.s"] == row["qed"]  # no transform
        assert abs(float(row["total"]) - float(row["qed"])) < 1e-12  # one component: exp of its log


def test_steps_csv_has_a_row_for_each_step_and_starts_at_rest(folder):
    rows = read(folder / "run" / "steps.csv")
    assert [row["step"] for row in rows] == [str(k) for k in range(STEPS + 1)]
    assert abs(float(rows[0]["divergence"])) < 1e-6 and float(rows[0]["moved"]) == 0  # sums of distances are rounded
    assert float(rows[-1]["moved"]) > 0
    calls = [int(row["calls"]) for row in rows]
    assert calls[0] >= 80 and calls == sorted(calls)  # all 80 were scored to fit the surrogate
    assert all(float(row["validity"]) <= 1 for row in rows)


def test_the_same_command_takes_every_stage_that_is_there(folder, capsys):
    stored = [*(folder / "run").glob("*/*.safetensors"), folder / "run" / "molecules" / "molecules.csv"]
    before = {path: path.stat().st_mtime_ns for path in stored}
    assert len(before) == 4
    assert main(["train", CONFIG, *small(folder)]) == 0
    assert {path: path.stat().st_mtime_ns for path in stored} == before


@pytest.mark.parametrize(
    "change, says",
    [
        ({"data.objective": "{components: [fsp3]}"}, "made with other settings"),
        ({"data.autoencoder.lr": 0.1}, "another training"),
        ({"data.surrogate.seed": 3}, "made with other settings"),
        ({"data.path": "nowhere.csv"}, "no molecule file"),
        ({"data.at_most": -1.0}, "0 of 80 molecules"),
        ({"data.at_least": 1.0, "data.at_most": 0.5}, "must not lie above"),
        ({"data.objective": "{components: [qedd]}"}, "qedd"),
        (
            {"source.where": "{sa: {at_most: 3}}"},
            "gengrad: source: where chooses by sa, which the objective does not score",
        ),
        ({"data.where": "{qed: {}}"}, "give at_least, at_most or both"),
        ({"data.path": "null", "data.library": 5}, "library"),
    ],
)
def test_what_does_not_fit_is_refused_with_one_message(folder, capsys, change, says):
    assert main(["train", CONFIG, *small(folder, **change)]) == 2
    told = capsys.readouterr().err
    assert says in told and "Traceback" not in told


def test_samples_are_written_as_table_structures_and_picture(folder, capsys):
    from rdkit import Chem

    run, (table, sdf, png) = str(folder / "run"), (folder / f"hits.{end}" for end in ("csv", "sdf", "png"))
    for out in (table, sdf, png):
        assert main(["sample", run, "--n", "10", "--seed", "4", "--out", str(out)]) == 0
    rows = read(table)
    valid = [row for row in rows if row["valid"] == "1"]
    mols = [mol for mol in Chem.SDMolSupplier(str(sdf))]
    assert len(rows) == 10 and [mol.GetProp("id") for mol in mols] == [row["id"] for row in valid]
    for mol, row in zip(mols, valid):
        assert Chem.MolToSmiles(mol) == row["smiles"] and {key: mol.GetProp(key) for key in row} == row
    assert png.read_bytes().startswith(b"\x89PNG")
    assert main(["sample", run, "--n", "4", "--seed", "4", "--out", str(folder / "few.csv")]) == 0
    assert read(folder / "few.csv") == rows[:4]  # molecule i does not depend on how many are asked for


def test_codes_can_be_had_as_an_array(folder):
    assert main(["sample", str(folder / "run"), "--n", "3", "--out", str(folder / "codes.npy")]) == 0
    import numpy

    assert numpy.load(folder / "codes.npy").shape == (3, 6)


def test_molecules_of_ones_own_are_moved_and_those_that_cannot_be_are_listed(folder, capsys):
    mine = library(120)[100:]
    (folder / "mine.smi").write_text(
        "\n".join(f"{text} own{i}" for i, text in enumerate([*mine, "hello", "C[Si](C)C"]))
    )
    given = ["sample", str(folder / "run"), "--source", str(folder / "mine.smi"), "--out", str(folder / "moved.csv")]
    assert main(given) == 0
    rows, left = read(folder / "moved.csv"), read(folder / "moved_left_out.csv")
    assert [row["parent"] for row in rows] == [f"own{i}" for i in range(20)]
    assert [row["id"] for row in left] == ["own20", "own21"] and all(row["reason"] for row in left)
    assert "20 molecules, median total" in capsys.readouterr().out
    assert main([*given, "--steps", "3"]) == 2
    capsys.readouterr()
    assert main(["sample", str(folder / "run"), "--source", "nowhere.smi"]) == 2
    assert "no molecule file at 'nowhere.smi'" in capsys.readouterr().err


def test_leads_can_be_improved_by_a_run_whose_autoencoder_lies_elsewhere(folder, tmp_path):
    from gengrad.latent.proposer import Latent

    given = {
        "data.autoencoder_from": folder / "run" / "autoencoder",
        "out": tmp_path / "run",
        "data.path": folder / "my.csv",
    }
    assert main(["train", CONFIG, *small(folder, **given)]) == 0
    found = Latent(run=str(tmp_path / "run")).propose(library(3), 4, torch.Generator().manual_seed(0))
    assert len(found) == 4 and any(p.smiles for p in found)


@pytest.mark.parametrize(
    "more, says",
    [
        (["--solver", "heun"], "takes no --solver"),
        (["--source", "my.csv", "--weights", "entropy=1"], "takes no --weights"),
        (["--out", "hits.txt"], ".csv, .sdf, .png"),
        (["--nfe", "2,3"], "one NFE"),
    ],
)
def test_a_wrong_request_for_samples_is_refused(folder, capsys, more, says):
    assert main(["sample", str(folder / "run"), *more]) == 2
    assert says in capsys.readouterr().err


def test_the_flow_starts_from_different_molecules_and_passes_every_step(folder):
    flow = load(folder / "run")
    x, parents = sources(flow.source, 50, seed=1)
    assert len({name for name, _ in parents}) == 50
    path = list(states(flow, x, seed=1))
    assert len(path) == STEPS + 1 and torch.equal(path[0], x)
    assert torch.allclose(path[1], flow.transports[0].push(x).detach(), atol=1e-6)
    order = Shuffle(len(flow.source), 1, "population").take(0, 50)
    assert torch.equal(x, flow.source.points[order])


def test_bounds_choose_molecules_by_their_true_total(folder):
    cloud = Cloud.load(folder / "run" / "latents")
    middle = float(cloud.total.median())
    low = Latents(folder=str(folder / "run"), at_most=middle)
    high = Latents(folder=str(folder / "run"), at_least=middle)
    assert (cloud.total[low.numbers] <= middle).all() and (cloud.total[high.numbers] >= middle).all()
    assert len(low) + len(high) >= 80
    assert torch.equal(low.points, cloud.x[low.numbers])


def test_bounds_of_a_raw_property_choose_too(folder):
    cloud = Cloud.load(folder / "run" / "latents")
    qed = cloud.properties[:, 0]
    third, middle = float(qed.quantile(0.3)), float(qed.median())
    found = Latents(folder=str(folder / "run"), where={"qed": {"at_least": third, "at_most": middle}})
    assert torch.equal(found.numbers, ((qed >= third) & (qed <= middle)).nonzero()[:, 0]) and 0 < len(found) < 80
    few = Latents(folder=str(folder / "run"), where={"qed": {"at_most": middle}}, take=7)
    assert len(few) == 7 and len(set(few.numbers.tolist())) == 7 and (qed[few.numbers] <= middle).all()
    assert not torch.equal(few.numbers, Latents(folder=str(folder / "run"), take=7, seed=1).numbers)
    with pytest.raises(ValueError, match="0 of 80 molecules have qed at most 0"):
        Latents(folder=str(folder / "run"), where={"qed": {"at_most": 0}})


def test_latents_without_a_run_say_how_they_are_made():
    with pytest.raises(ValueError, match=r"train\.py"):
        Latents()


def test_molecules_of_another_alphabet_are_refused_with_a_reason(codec, tmp_path):
    smiles = [f"{'C' * k}I" for k in range(1, 31)]
    with pytest.raises(ValueError, match=r"can take 0 of 30 molecules.*not seen \(\[I\]\)"):
        stages.encoded(codec, smiles, smiles, read_objective({"components": ["qed"]}), tmp_path)


def test_the_surrogate_is_shown_what_points_beside_the_codes_decode_to(folder):
    flow = load(folder / "run")
    codec, objective, surrogate, cloud = chain.parts_of(flow)
    settings = SurrogateSettings(explored=12)
    x, properties, calls = stages.explored(codec, cloud, objective, settings)
    texts = codec.decode(x)
    assert len(x) == len(properties) <= 12 and calls == len(set(texts))
    qed = SCORERS.build({"name": "qed"})
    assert torch.allclose(properties[:, 0], torch.tensor(qed(texts)).double())
    assert torch.cdist(x, cloud.x).min() > 0  # none is a molecule's own code
    assert surrogate.info["calls"] <= 10 and surrogate.info["molecules"] == len(cloud.x)
    nothing = stages.explored(codec, cloud, objective, SurrogateSettings(explored=0))
    assert len(nothing[0]) == nothing[2] == 0


def test_the_distance_of_two_clouds_a_step_apart_is_known():
    """Two atoms a apart: E|x - y| = a, and nothing within either."""
    assert abs(divergence(torch.zeros(5, 3), torch.tensor([[3.0, 0.0, 4.0]])) - 5.0) < 1e-6
    x = torch.randn(40, 3)
    assert abs(divergence(x, x)) < 1e-6


@pytest.mark.parametrize("method", ["jko_icnn", "nsgf", "entropic_map"])
def test_the_command_and_the_shipped_config_run_the_same_flow(method):
    config = load_config(ROOT / "configs" / "molecules" / f"qed_{method}.yaml")
    bounds = {"at_most": 0.7, **({} if method == "jko_icnn" else {"at_least": 0.85})}
    ours = read_config(chain.flow_config(method, {"objective": {"components": ["qed"]}}, config.general.out, **bounds))
    assert ours.resolved() == config.resolved()


def test_the_flow_command_runs_the_chain_with_a_trained_autoencoder(folder, capsys):
    (folder / "qed.yaml").write_text("components: [qed]\n")
    out = folder / "nsgf"
    options = ["--objective", str(folder / "qed.yaml"), "--autoencoder", str(folder / "run" / "autoencoder")]
    start = ["molecules", "flow", str(folder / "my.csv"), "--out", str(out), "--method", "nsgf", *options]
    assert main(start) == 2 and "--at-least" in capsys.readouterr().err
    tiny = ["train.steps=2", "train.batch_size=8", "method.ot_batch=8", "network.width=8", "evaluate.nfe=[2]"]
    tiny += ["evaluate.n=10", "data.surrogate.steps=3", "data.surrogate.width=4"]
    tiny += ["data.surrogate.explored=0"]
    assert main([*start, "--at-least", "0.5", "--set", *tiny]) == 0
    assert len(read(out / "steps.csv")) == 3 and not (out / "autoencoder").exists()


def test_an_entropic_map_moves_molecules_that_its_plan_has_not_seen(folder):
    (folder / "qed.yaml").write_text("components: [qed]\n")
    out, hits = folder / "map", folder / "hits.csv"
    options = ["--objective", str(folder / "qed.yaml"), "--autoencoder", str(folder / "run" / "autoencoder")]
    tiny = ["evaluate.n=10", "data.surrogate.steps=3", "data.surrogate.width=4", "data.surrogate.explored=0"]
    start = ["molecules", "flow", str(folder / "my.csv"), "--out", str(out), "--method", "entropic_map", *options]
    assert main([*start, "--at-least", "0.5", "--set", *tiny, "method.flow_steps=2", "method.stop=1"]) == 0
    assert len(read(out / "steps.csv")) == 3
    (folder / "unseen.smi").write_text("CCOCCN first\nCCCCOCC second\n")
    assert main(["sample", str(out), "--source", str(folder / "unseen.smi"), "--out", str(hits)]) == 0
    flow, (first, second) = load(out), read(hits)
    codec = chain.parts_of(flow)[0]
    x = codec.encode(codec.rows(["CCOCCN", "CCCCOCC"], 1))
    moved = flow.transports[0].map(x)
    assert (moved - x).norm(dim=1).min() > 0.1 and [first["smiles"], second["smiles"]] == codec.decode(moved)


def test_the_step_commands_leave_what_the_next_one_takes(folder, capsys):
    molecules, made = str(folder / "my.csv"), folder / "commands"
    (folder / "qed.yaml").write_text("components: [qed]\n")
    options = ["--steps", "2", "--latent", "4", "--width", "8"]
    assert main(["molecules", "train-autoencoder", molecules, "--out", str(made / "ae"), *options]) == 0
    fit = ["molecules", "train-surrogate", molecules, "--objective", str(folder / "qed.yaml"), "--steps", "2"]
    assert main([*fit, "--autoencoder", str(made / "ae"), "--out", str(made / "fit")]) == 0
    assert (made / "fit" / "surrogate" / "surrogate.json").exists()
    capsys.readouterr()
    assert main([*fit, "--autoencoder", str(folder), "--out", str(made / "other")]) == 2
    assert "autoencoder.json" in capsys.readouterr().err
    bad = folder / "bad.smi"
    bad.write_text("hello\n")
    assert main(["molecules", "train-autoencoder", str(bad), "--out", str(made / "bad")]) == 2
    assert "no molecule is left" in capsys.readouterr().err
    assert main(["molecules", "train-autoencoder", molecules, "--out", str(made / "x"), "--lr", "-1"]) == 2
    assert "--lr" in capsys.readouterr().err
