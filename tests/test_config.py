"""The config: read strictly, every mistake at once, and the same config again from what it resolves to."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from gengrad.config import ConfigError, load_config, parse_yaml, read_config
from gengrad.registry import DATASETS, METHODS, NETWORKS

MINIMAL = {"data": {"name": "moons"}, "network": {"name": "mlp"}, "method": {"name": "nsgf"}}


def test_a_resolved_config_reads_back_as_itself():
    config = read_config(MINIMAL)
    again = read_config(parse_yaml(yaml.safe_dump(config.resolved()), "again"))
    assert again == config
    assert again.digest() == config.digest()


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("network", list(NETWORKS))
def test_every_method_and_network_round_trips_with_its_defaults(method, network):
    raw = {**MINIMAL, "method": {"name": method}, "network": {"name": network}}
    if METHODS.get(method).learns not in ("nothing", getattr(NETWORKS.get(network), "learns", "velocity")):
        with pytest.raises(ConfigError, match=f"network.name .*method {method!r} learns"):
            read_config(raw)
        return
    config = read_config(raw)
    assert read_config(config.resolved()) == config


def test_a_section_may_be_just_a_name():
    assert read_config({**MINIMAL, "data": "moons"}) == read_config(MINIMAL)


def test_all_mistakes_are_reported_at_once_with_their_keys_and_nearest_names():
    raw = {
        "sead": 1,
        "data": {"name": "mooons"},
        "network": {"name": "mlp", "widht": 3, "depth": "three"},
        "method": {"name": "nsgf", "tol": -1.0},
        "train": {"lr": 0.0, "stpes": 10, "batch_size": 1.5},
    }
    with pytest.raises(ConfigError) as caught:
        read_config(raw, "a.yaml")
    text = str(caught.value)
    assert text.startswith("8 mistakes")
    for key in ("sead", "data.name", "network.widht", "network.depth", "method.tol", "train.lr", "train.stpes"):
        assert f"  {key} (a.yaml)" in text
    for guess in ("'seed'", "'moons'", "'width'", "'steps'"):
        assert f"id you mean {guess}" in text


def test_overrides_reach_into_sections_and_are_named_in_messages(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    config = load_config(path, ["train.lr=1e-4", "seed=3", "method.epsilon_rel=.1", "out=runs/x=y"])
    assert (config.train.lr, config.general.seed, config.method["epsilon_rel"]) == (1e-4, 3, 0.1)
    assert config.general.out == "runs/x=y"
    with pytest.raises(ConfigError, match=r"train.lr \(the command line\)"):
        load_config(path, ["train.lr=high"])


def test_another_name_on_the_command_line_drops_the_old_settings(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({**MINIMAL, "method": {"name": "nsgf", "ot_batch": 64}}))
    config = load_config(path, ["method.name=flow_matching", "method.coupling=minibatch_ot"])
    assert config.method["name"] == "flow_matching" and config.method["coupling"] == "minibatch_ot"
    assert "ot_batch" not in config.method


def test_an_override_reaches_an_entry_of_a_list_by_its_number(tmp_path):
    path = tmp_path / "c.yaml"
    terms = [{"name": "potential", "potential": "quadratic"}, "entropy"]
    path.write_text(yaml.safe_dump({**MINIMAL, "method": {"name": "particles", "functional": terms}}))
    words = ["method.functional.0.weight=3", "method.functional.1.weight=0.5", "method.tau=0.01"]
    first, second = load_config(path, words).method["functional"]
    assert (first["weight"], second) == (3, {"name": "entropy", "weight": 0.5})
    with pytest.raises(ConfigError, match=r"method.functional \(the command line\)"):
        load_config(path, ["method.functional.0.weight=high"])
    whole = [
        "method.functional.1.name=interaction",
        "method.functional=[{name: potential}, entropy]",
    ]  # the whole first
    assert [term["name"] for term in load_config(path, whole).method["functional"]] == ["potential", "interaction"]
    with pytest.raises(ConfigError, match="the list is empty"):
        load_config(path, ["evaluate.nfe=[]", "evaluate.nfe.0=3"])
    for wrong in ("method.functional.2.weight=1", "method.functional.entropy.weight=1", "method.functional.-1=entropy"):
        with pytest.raises(ConfigError, match="none of the entries 0 to 1 of a list"):
            load_config(path, [wrong])


def test_the_order_of_overrides_does_not_matter(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({**MINIMAL, "data": "moons"}))
    words = ["method.coupling=minibatch_ot", "method.name=flow_matching", "data.noise=0.2"]
    one, two = load_config(path, words), load_config(path, words[::-1])
    assert one == two
    assert one.method["coupling"] == "minibatch_ot" and one.data == {"name": "moons", "noise": 0.2}


def test_words_that_yaml_1_1_would_bend_stay_what_they_are(tmp_path):
    assert parse_yaml("a: no\nb: on\nc: 010\nd: 1:30\ne: true", "t") == {
        "a": "no", "b": "on", "c": 10, "d": "1:30", "e": True,
    }  # fmt: skip
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    config = load_config(path, ["train.precision=no", "out=2024"])
    assert config.train.precision == "no" and config.general.out == "2024"


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "+1e-4", "1.0e-4", "0.0001", ".0001"])
def test_numbers_are_numbers_however_they_are_written(text):
    assert parse_yaml(f"a: {text}", "t") == {"a": 1e-4}


def test_a_float_without_a_fraction_is_a_whole_number(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    config = load_config(path, ["train.steps=1e3", "evaluate.nfe=[5.0,1e1]", "method.jko_steps=4.0", "train.lr=1e1"])
    assert (config.train.steps, config.evaluate.nfe, config.method["flow_steps"]) == (1000, [5, 10], 4)
    assert all(isinstance(n, int) for n in (config.train.steps, *config.evaluate.nfe, config.method["flow_steps"]))
    assert config.train.lr == 10.0
    for wrong in ("1.5", ".inf", "1e-3"):
        with pytest.raises(ConfigError, match=r"train\.steps"):
            load_config(path, [f"train.steps={wrong}"])


def test_the_users_folder_stands_for_its_sign(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({**MINIMAL, "init_from": "~/runs/a"}))
    general = load_config(path, ["out=~/runs/x"]).general
    assert (general.out, general.init_from) == ("/home/me/runs/x", "/home/me/runs/a")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: !!python/object/apply:os.system ['true']", "tag"),
        ("a: 1\na: 2", "stands twice"),
        ("a: [1", "not valid YAML"),
        ("- a", "found a list"),
        ("1: a", "not a word"),
    ],
)
def test_what_is_no_plain_yaml_is_refused(text, said):
    with pytest.raises(ConfigError, match=said):
        parse_yaml(text, "t.yaml")


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
keys = st.sampled_from(["seed", "out", "data", "source", "network", "method", "train", "evaluate", "x"])


@given(st.dictionaries(keys, json_like, max_size=6))
def test_whatever_stands_in_a_config_gives_a_config_or_a_config_error(raw):
    try:
        read_config(raw)
    except ConfigError as error:
        assert "mistake" in str(error)


def test_the_registries_are_filled():
    assert {"nsgf", "flow_matching"} <= set(METHODS)
    assert {"8gaussians", "digits", "array"} <= set(DATASETS)
    assert {"mlp", "unet"} <= set(NETWORKS)
