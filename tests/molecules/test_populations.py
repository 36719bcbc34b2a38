"""Baselines and leads: the budget kept to the call, the same bytes again, better than chance where chance is poor."""

import csv
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from gengrad.cli import main
from gengrad.molecules.library import library
from gengrad.molecules.progress import Top, area_under
from gengrad.molecules.searching import Search, run_baseline
from gengrad.molecules.workers import Workers

TARGET = "COc1ccc(-c2cnn(CC(=O)Nc3ccccc3F)c2)cc1"
NEAR = {"components": [{"scorer": {"name": "similarity", "to": [TARGET]}}]}  # where a random library is far away
FILES = ("calls.csv", "population_before.csv", "population_after.csv", "steps.csv")
SMALL = Search(population=20, offspring=30)


def rows(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def objective(tmp_path_factory):
    path = tmp_path_factory.mktemp("objective") / "near.yaml"
    path.write_text(yaml.safe_dump(NEAR))
    return path


@pytest.fixture(scope="module")
def searches(objective, tmp_path_factory, in_place_of_workers):
    """Both baselines at 200 calls, seed 0, scored in this process."""
    folder = tmp_path_factory.mktemp("searches")
    out = {name: folder / name for name in ("random", "graph-ga")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Workers, "map", in_place_of_workers)
        return {
            name: (path, run_baseline(name, objective, 200, path, seed=0, settings=SMALL)) for name, path in out.items()
        }


def test_the_best_so_far_and_the_area_under_it_by_hand():
    assert Top(2).add([0.1, 0.5, math.nan, 0.3], [""] * 4).curve == pytest.approx([0.1, 0.3, 0.3, 0.4])
    # of scaffold a only the best counts: 0.5; 0.5; then 0.9 in its place; then with b
    assert Top(2, per_scaffold=1).add([0.5, 0.4, 0.9, 0.1], "aaab").curve == pytest.approx([0.5, 0.5, 0.9, 0.5])
    assert area_under([0.2, 0.4]) == pytest.approx(0.3)
    assert area_under([0.2, 0.4], calls=4) == pytest.approx((0.2 + 3 * 0.4) / 4)  # ended early: the last one held
    assert area_under([]) == 0


@pytest.mark.parametrize("method", ["random", "graph-ga"])
def test_the_budget_is_spent_to_the_call_on_different_molecules(searches, method):
    out, found = searches[method]
    calls = rows(out / "calls.csv")
    assert found["calls"] == len(calls) == len({row["smiles"] for row in calls}) == 200
    steps = rows(out / "steps.csv")
    assert int(steps[-1]["calls"]) == 200 and [int(s["calls"]) for s in steps] == sorted(int(s["calls"]) for s in steps)
    curve = Top(10).add([float(row["total"]) for row in calls], [""] * 200).curve
    assert float(steps[-1]["top_10"]) == pytest.approx(curve[-1])
    assert float(steps[-1]["auc_top_10"]) == pytest.approx(sum(curve) / 200)


def test_graph_ga_beats_random_screening_at_equal_calls_where_chance_is_poor(searches):
    last = {name: found["last_step"] for name, (_, found) in searches.items()}
    assert last["graph-ga"]["top_10"] > last["random"]["top_10"] + 0.05
    assert last["graph-ga"]["auc_top_10"] > last["random"]["auc_top_10"]


def test_children_name_the_molecule_of_the_start_that_they_come_from_and_how_near_they_are(searches):
    out, _ = searches["graph-ga"]
    before = {row["id"]: row for row in rows(out / "population_before.csv")}
    assert len(before) == 20 and all(row["parent"] == "" for row in before.values())
    later = [row for row in rows(out / "calls.csv") if row["step"] != "0"]
    assert all(row["parent"] in before and 0 <= float(row["similarity"]) <= 1 for row in later)
    after = [float(row["total"]) for row in rows(out / "population_after.csv")]
    assert len(after) == 20 and after == sorted(after, reverse=True)


def test_the_same_seed_gives_the_same_bytes_with_two_processes_and_after_a_cut(searches, objective, tmp_path):
    out, _ = searches["graph-ga"]
    lines = (out / "calls.jsonl").read_bytes().splitlines(keepends=True)
    # cut in the middle of a line, as a kill leaves it
    (tmp_path / "calls.jsonl").write_bytes(b"".join(lines[:90]) + lines[90][:17])
    again = run_baseline("graph-ga", objective, 200, tmp_path, seed=0, processes=2, timeout=60.0, settings=SMALL)
    assert again["resumed_after"] == 89
    assert [(tmp_path / name).read_bytes() for name in FILES] == [(out / name).read_bytes() for name in FILES]
    assert (tmp_path / "calls.jsonl").read_bytes() == (out / "calls.jsonl").read_bytes()


def test_a_journal_of_another_search_is_refused_and_stays(searches, objective, in_process):
    out, _ = searches["graph-ga"]
    before = (out / "calls.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"another search \(seed 0, now 1\).*another --out"):
        run_baseline("graph-ga", objective, 200, out, seed=1, settings=SMALL)
    assert (out / "calls.jsonl").read_bytes() == before


def test_a_budget_below_the_population_is_kept_too_and_more_calls_go_on(objective, tmp_path, in_process):
    assert run_baseline("graph-ga", objective, 3, tmp_path, settings=SMALL)["calls"] == 3
    found = run_baseline("graph-ga", objective, 6, tmp_path, settings=SMALL)
    assert (found["calls"], found["resumed_after"]) == (6, 3)


LIMITED = {
    "components": [{"scorer": "qed"}],
    "filters": [{"scorer": "weight", "at_most": 300}],
    "per_scaffold": 1,
}


def test_filters_and_the_limit_for_a_scaffold_hold_in_what_is_kept_and_their_yield_is_told(
    tmp_path, capsys, in_process
):
    (tmp_path / "o.yaml").write_text(yaml.safe_dump(LIMITED))
    (tmp_path / "start.smi").write_text("\n".join(library(60, seed=2)))
    given = ["--start", str(tmp_path / "start.smi"), "--calls", "50", "--out", str(tmp_path / "out")]
    command = ["molecules", "baseline", "random", "--objective", str(tmp_path / "o.yaml"), *given]
    assert main([*command, "--processes", "1", "--timeout", "60", "--population", "40"]) == 0
    after = rows(tmp_path / "out" / "population_after.csv")
    assert len({row["scaffold"] for row in after}) == len(after) > 5
    spent = json.loads((tmp_path / "out" / "run.json").read_text())["yield"]
    everything = rows(tmp_path / "out" / "calls.csv")
    heavy = [row for row in everything if float(row["weight"]) > 300]
    assert spent["refused"] == {"weight at most 300": len(heavy)} and spent["passed"] == 50 - len(heavy) > 0
    assert spent["passed_within_per_scaffold"] == len({r["scaffold"] for r in everything if r["passed"] == "1"})
    assert all(row["passed"] == "0" and "filter: weight" in row["notes"] for row in heavy)
    assert f"filter weight at most 300: {len(heavy)} refused" in capsys.readouterr().out


def test_leads_are_improved_within_their_calls_and_the_similarity(tmp_path, capsys, in_process):
    (tmp_path / "o.yaml").write_text("components: [{scorer: qed}]\n")
    (tmp_path / "leads.csv").write_text("name,smiles\na,CCCCCCCCc1ccccc1\nb,hello\nc,O=C(O)c1ccccc1CCCCBr\n")
    command = ["molecules", "optimize", str(tmp_path / "leads.csv"), "--objective", str(tmp_path / "o.yaml")]
    given = ["--similarity", "0.4", "--calls", "25", "--out", str(tmp_path / "out"), "--processes", "1"]
    assert main([*command, *given, "--timeout", "60"]) == 0
    leads = rows(tmp_path / "out" / "leads.csv")
    assert [(row["id"], row["calls"], row["notes"]) for row in leads] == [
        ("a", "25", ""),
        ("b", "0", "not a SMILES"),
        ("c", "25", ""),
    ]
    for row in (leads[0], leads[2]):
        assert row["improved"] == "1" and float(row["best_total"]) - float(row["total"]) == pytest.approx(
            float(row["gain"])
        )
        assert int(row["proposed"]) >= int(row["valid"]) >= int(row["similar"]) >= int(row["new"]) >= 24
    assert all(float(row["similarity"] or 1) >= 0.4 for row in rows(tmp_path / "out" / "calls.csv"))
    before = {row["id"]: row["smiles"] for row in rows(tmp_path / "out" / "population_before.csv")}
    assert [before[row["parent"]] for row in rows(tmp_path / "out" / "population_after.csv")] == [
        leads[0]["smiles"],
        leads[2]["smiles"],
    ]
    assert "improved 100.0% of them" in capsys.readouterr().out


def test_a_lead_s_scaffold_is_kept_where_that_is_asked_for(tmp_path, in_process):
    (tmp_path / "o.yaml").write_text("components: [{scorer: qed}]\n")
    (tmp_path / "lead.smi").write_text("CCCCCCCCc1ccccc1\n")
    command = ["molecules", "optimize", str(tmp_path / "lead.smi"), "--objective", str(tmp_path / "o.yaml"), "--calls"]
    given = ["15", "--out", str(tmp_path / "out"), "--processes", "1", "--keep-scaffold", "--similarity", "0.3"]
    assert main([*command, *given]) == 0
    assert {row["scaffold"] for row in rows(tmp_path / "out" / "calls.csv")} == {"c1ccccc1"}


BAD = {  # command line after `molecules` -> what the message says
    "baseline random --objective qed.yaml --calls 0 --out out": ["--calls 0", "at least 1"],
    "baseline grpah-ga --objective qed.yaml --calls 5 --out out": ["'grpah-ga'", "Did you mean 'graph-ga'"],
    "baseline random --objective none.yaml --calls 5 --out out": ["no objective file"],
    "baseline random --objective qed.yaml --calls 5 --start empty.smi --out out": ["empty"],
    "baseline random --objective qed.yaml --calls 5 --start no.csv --out out": ["no SMILES column", "--column"],
    "baseline random --objective qed.yaml --calls 5 --start bad.smi --out out": ["none of 1 rows is a molecule"],
    "baseline random --objective qed.yaml --calls 5 --start two.smi --out out": ["2 different molecules", "5"],
    "baseline graph-ga --objective hangs.yaml --calls 2 --out out": ["python has no value", "more than 0.2 s", "blind"],
    "baseline random --objective qed.yaml --calls 5 --out two.smi": ["two.smi"],
    "optimize two.smi --objective qed.yaml --similarity 1.5 --calls 5 --out out": ["--similarity 1.5"],
    "optimize two.smi --objective qed.yaml --calls 1 --out out": ["at least 2"],
    "optimize bad.smi --objective qed.yaml --calls 5 --out out": ["none of 1 rows is a molecule"],
    "optimize two.smi --objective qed.yaml --calls 5 --proposer latnt --out out": [
        "unknown proposer 'latnt'",
        "'latent'",
    ],
    "optimize two.smi --objective qed.yaml --calls 5 --proposer latent --out out": ["proposer latent.run"],
    "optimize two.smi --objective qed.yaml --calls 5 --proposer {name:graph} --out out": ["unknown proposer None"],
    "evaluate two.smi bad.smi": ["none of 1 rows is a molecule"],
    "evaluate empty.smi two.smi": ["empty"],
    "evaluate no.csv two.smi": ["no SMILES column"],
    "evaluate head.csv two.smi": ["no molecule in it"],
    "evaluate two.smi two.smi --fcd": ["5,000", "--fcd-at-any-size"],
    "evaluate two.smi two.smi --calls two.smi": ["'total'"],
    "evaluate two.smi two.smi --out m.txt": [".json"],
    "report folder": ["nothing to report on", "population_before.csv"],
    "report nowhere": ["no folder"],
    "report broken": ["flow.json", "not valid JSON"],
}
CONTENT = {
    "qed.yaml": "components: [{scorer: qed}]\n",
    "hangs.yaml": "components: [{scorer: {name: python, path: mine.py, timeout: 0.2}, "
    "transform: {name: linear, low: 0, high: 1}}]\n",
    "mine.py": "import time\n\n\ndef score(smiles):\n    time.sleep(1000)\n",
    "empty.smi": "",
    "bad.smi": "hello\n",
    "two.smi": "CCO\nc1ccccc1\nOCC\n",
    "no.csv": "id,mol\n1,CCO\n",
    "head.csv": "id,smiles\n",
    "folder/other.txt": "",
    "broken/steps.csv": "step,calls\n0,1\n",
    "broken/flow.json": "{",
}


@pytest.mark.parametrize("command", BAD)
def test_a_mistake_gives_one_message_and_exit_code_2(command, tmp_path, monkeypatch, capsys, in_place_of_workers):
    monkeypatch.chdir(tmp_path)
    if "hangs" not in command:
        monkeypatch.setattr(Workers, "map", in_place_of_workers)
    for name, content in CONTENT.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert main(["molecules", *command.split(), "--processes", "1"]) == 2
    told = capsys.readouterr().err
    assert all(said in told for said in BAD[command]), told
    assert "Traceback" not in told and told.count("\n") == 1


def test_two_searches_do_not_write_one_journal(objective, tmp_path):
    holder = "import fcntl, sys, time; f = open(sys.argv[1], 'a+b'); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True); time.sleep(60)"  # noqa: E501
    other = subprocess.Popen([sys.executable, "-c", holder, str(tmp_path / "calls.jsonl")], stdout=subprocess.PIPE)
    try:
        other.stdout.readline()
        with pytest.raises(ValueError, match="being written by another process"):
            run_baseline("random", objective, 3, tmp_path)
    finally:
        other.kill()
        other.communicate()


def test_the_commands_of_the_docs_are_commands_with_these_options(capsys):
    text = (Path(__file__).parents[2] / "docs" / "molecules.md").read_text()
    shown = re.findall(r"^gengrad molecules (baseline|optimize|evaluate|report) (.*?)(?:  #.*)?$", text, re.MULTILINE)
    assert {name for name, _ in shown} == {"baseline", "optimize", "evaluate", "report"}
    for name, arguments in shown:
        with pytest.raises(SystemExit):
            main(["molecules", name, "--help"])
        known = capsys.readouterr().out
        assert all(option in known for option in re.findall(r"--[a-z-]+", arguments))
