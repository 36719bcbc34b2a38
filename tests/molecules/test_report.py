"""The report: one file that fetches nothing, escapes what it is given, and says what is not there."""

import re
from html.parser import HTMLParser

import pytest

from gengrad.cli import main
from gengrad.molecules.drawing import beside
from gengrad.molecules.report.folder import WANTED, read_folder

pytestmark = pytest.mark.usefixtures("in_process_for_all")
OBJECTIVE = """
components:
  - {scorer: qed, weight: 2.0}
  - {scorer: logp, transform: {name: double_sigmoid, low: 1, high: 3}}
filters: [{scorer: weight, at_most: 200}]
"""
# before as a search writes it, after as a flow does: the same ids, and parents that are no rows of before
BEFORE = """id,parent,smiles,valid,qed,logp,weight,total,passed,similarity,scaffold,step,seed,notes
0-0,m1,CCO,1,0.41,0.0,46.1,0.1,1,1.0,,0,0,
0-1,m2,c1ccccc1CCO,1,0.6,1.2,122.2,0.5,1,1.0,c1ccccc1,0,0,
0-2,m3,,0,,,,,0,,,0,0,no molecule comes out
"""
AFTER = """id,parent,smiles,valid,qed,logp,weight,total,passed,similarity,scaffold,step,seed,notes
0-0,m1,CCCCO,1,0.5,0.8,74.1,0.3,1,0.5,,2,0,
0-1,m2,c1ccccc1CCN,1,0.65,1.3,121.2,0.7,1,0.6,c1ccccc1,2,0,
0-2,m3,<script>alert(1)</script>,0,,,,,0,,,2,0,"no, <b>""not""</b>"
"""
STEPS = """step,true_mean,surrogate_mean,spare_mean,moved,validity,divergence,scorer_calls
0,0.3,0.32,0.31,0.0,0.67,0.0,2
1,0.4,0.5,0.45,0.8,0.67,0.1,4
2,0.5,0.9,0.6,1.5,0.67,nan,6
"""
FILES = {
    "population_before.csv": BEFORE,
    "population_after.csv": AFTER,
    "steps.csv": STEPS,
    "objective.yaml": OBJECTIVE,
    "reconstruction.json": '{"n": 100, "exact": 0.5, "tanimoto": 0.8, "spectrum": [1.0]}',
    "flow.json": '{"config": {"method": {"name": "jko_icnn"}}, "gengrad": "0.1.0"}',
}


class Page(HTMLParser):
    """Every address and tag of a page, and whether what is opened is closed again."""

    def __init__(self, text):
        super().__init__()
        self.addresses, self.tags, self.open, self.alts = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.tags.append(tag)
        self.addresses += [given[key] for key in ("src", "href", "action", "srcset") if key in given]
        if tag == "img":
            self.alts.append(given.get("alt"))
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, tag


def write(folder, files):
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(content, encoding="utf-8")
    return folder


def made(folder):
    assert main(["molecules", "report", str(folder), "--processes", "1", "--timeout", "60"]) == 0
    return (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def full(tmp_path_factory, in_process_for_all):
    return made(write(tmp_path_factory.mktemp("report"), FILES))


def test_the_page_is_whole_runs_nothing_and_fetches_nothing(full):
    page = Page(full)
    assert page.open == [] and "script" not in page.tags and "iframe" not in page.tags
    assert all(address.startswith("data:") for address in page.addresses)
    assert not re.search(r"@import|url\(", full) and 'name="viewport"' in full
    assert len(page.alts) > 15 and all(page.alts)


def test_what_the_files_say_is_escaped_and_shown(full):
    assert "<script>alert" not in full and "<b>" + '"not"' not in full
    assert "Flow by jko_icnn" in full and "between 1 and 3" in full and "MW (Da) at most 200" in full
    assert all(said in full for said in ("Surrogate against truth", "Gain against way in the", "come back exactly"))
    assert "50 %" in full and "went from 0.3 to 0.5" in full  # medians of (0.1, 0.5) and (0.3, 0.7)
    assert "Not in this folder" not in full


def test_the_same_folder_gives_the_same_page(full, tmp_path):
    write(tmp_path / "a", FILES)
    text = made(tmp_path / "a")
    assert re.sub(r"Population report: [^<]*", "", text) == re.sub(r"Population report: [^<]*", "", full)


def test_a_molecule_after_belongs_to_the_one_before_of_its_parent_or_else_of_its_id(tmp_path):
    found = read_folder(write(tmp_path, FILES))
    assert found.origins() == [0, 1, 2]
    other = AFTER.replace("0-0,m1", "7,0-1").replace("0-1,m2", "8,x")
    (tmp_path / "population_after.csv").write_text(other)
    assert read_folder(tmp_path).origins() == [1, None, 2]


@pytest.mark.parametrize("name", WANTED)
def test_a_file_that_is_missing_is_said_and_not_fatal(name, tmp_path, capsys):
    text = made(write(tmp_path, {key: FILES[key] for key in WANTED if key != name}))
    assert text.count("<code>") and f"<code>{name}</code>" in text  # and of the optional ones there is no section
    assert f"{name} is not there" in capsys.readouterr().out and "The autoencoder" not in text


def test_steps_alone_and_an_objective_whose_scorer_is_gone_still_give_a_page(tmp_path):
    lost = "components: [{scorer: mine_of_old}]\n"
    text = made(write(tmp_path, {"steps.csv": STEPS, "objective.yaml": lost}))
    assert "mine_of_old" in text and "cannot be read" in text and "Score along the flow" in text


def test_a_population_without_one_molecule_is_no_picture_and_no_crash(tmp_path):
    bad = "id,smiles\n1,hello\n2,\n"
    text = made(write(tmp_path, {"population_before.csv": bad, "population_after.csv": bad}))
    assert "2 molecules before, 2 molecules after" in text and "image/svg" not in text


def test_a_child_is_drawn_with_what_is_new_in_it_marked(monkeypatch):
    monkeypatch.setattr("gengrad.molecules.drawing.SECONDS", 60)  # a machine may stand still for one
    same, changed = beside("CCc1ccccc1", "CCc1ccccc1")[1], beside("CCc1ccccc1", "OCCc1ccccc1")[1]
    mark = "#AFD1ED"
    assert mark not in same and mark in changed
