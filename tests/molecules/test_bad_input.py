"""The commands answer a mistake with one message and exit code 2, and leave no half-written table."""

import csv

import pytest

from gengrad.cli import main

FILES = {
    "a.smi": "CCO ethanol\nc1ccccc1 benzene\n",
    "bad.smi": "hello\n",
    "a.csv": "id,mol\n1,CCO\n",
    "qed.yaml": "components: [{scorer: qed}]\n",
    "none.yaml": "components: [{scorer: {name: python, path: mine.py}, transform: {name: linear, low: 0, high: 1}}]\n",
    "lost.yaml": "components: [{scorer: {name: python, path: no.py}, transform: {name: linear, low: 0, high: 1}}]\n",
    "text.yaml": "components: qed\n",
    "broken.yaml": "components: [",
    "mine.py": "def score(smiles):\n    return 'much'\n",
    "folder/a.smi": "C\n",
    "file": "no folder",
}
CASES = {  # command line -> what the message says, whether the table is written all the same
    "prepare none.smi --out out": (["none.smi"], False),
    "prepare folder --out out": (["is a folder", "a.smi"], False),
    "prepare a.csv --out out": (["no SMILES column", "id, mol", "--column"], False),
    "prepare a.csv --column smile --out out": (["no column 'smile'"], False),
    "prepare a.smi --out file": (["file"], False),
    "prepare a.smi --out out --processes 0": (["--processes", "at least 1"], False),
    "score a.smi --objective none2.yaml --out s.csv": (["no objective file"], False),
    "score a.smi --objective broken.yaml --out s.csv": (["not valid YAML"], False),
    "score a.smi --objective text.yaml --out s.csv": (["components", "list"], False),
    "score a.smi --objective qed.yaml --out s.txt": ([".csv"], False),
    "score a.smi --objective qed.yaml --out nowhere/s.csv": (["no folder"], False),
    "score a.smi --objective lost.yaml --out s.csv": (["no file no.py", "score(smiles)"], False),
    "score bad.smi --objective qed.yaml --out s.csv": (["none of 1 rows is a molecule"], True),
    "score a.smi --objective none.yaml --out s.csv": (["python has no value", "'much'"], True),
    "library --n 2000000 --out l.smi": (["1 to 1,000,000"], False),
    "library --out l.csv": ([".smi"], False),
    "flow a.smi": (["flow"], False),
}


@pytest.mark.parametrize("command", CASES)
def test_a_mistake_gives_one_message_and_exit_code_2(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    says, written = CASES[command]
    more = ["--processes", "1"] if command.startswith("score") else []
    try:
        code = main(["molecules", *command.split(), *more])
    except SystemExit as ended:  # argparse leaves this way
        code = ended.code
    told = capsys.readouterr().err
    assert code == 2 and all(said in told for said in says), told
    assert "Traceback" not in told and (tmp_path / "s.csv").exists() == written
    if written:
        with open("s.csv", newline="") as file:
            assert len(list(csv.DictReader(file))) == len(FILES[command.split()[1]].splitlines())


def test_a_population_that_no_filter_lets_through_is_written_with_the_reasons_and_exit_code_0(tmp_path, capsys):
    (tmp_path / "a.smi").write_text(FILES["a.smi"])
    (tmp_path / "o.yaml").write_text("components: [{scorer: qed}]\nfilters: [{scorer: weight, at_least: 5000}]\n")
    given = [str(tmp_path / "a.smi"), "--objective", str(tmp_path / "o.yaml"), "--out", str(tmp_path / "s.csv")]
    assert main(["molecules", "score", *given, "--processes", "1"]) == 0
    assert "filter weight at least 5000: 2 refused" in capsys.readouterr().out
    with open(tmp_path / "s.csv", newline="") as file:
        assert [(r["passed"], r["notes"]) for r in csv.DictReader(file)] == [("0", "filter: weight at least 5000")] * 2


def test_the_library_command_writes_what_prepare_reads(tmp_path):
    assert main(["molecules", "library", "--n", "5", "--out", str(tmp_path / "l.smi")]) == 0
    lines = (tmp_path / "l.smi").read_text().splitlines()
    assert len(lines) == 5 and lines[4].endswith(" 5")
