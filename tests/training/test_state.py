"""State by name comes back bit by bit, into the names it came from, or is refused by name."""

import copy
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from pytorch_optimizer import SOAP
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from any_states import plain, states
from checkpoint_cases import same

from gengrad.files import decode_json, encode_json
from gengrad.training.checkpoint import (
    CheckpointError,
    generator_state,
    load_generator_state,
    load_module_state,
    load_optimizer_state_by_name,
    load_random_state,
    module_state,
    optimizer_state_by_name,
    random_state,
)
from gengrad.training.state import join, split


def through_bytes(state: dict) -> dict:
    tree, parts = split(state)
    stored = safetensors.torch.load(safetensors.torch.save(parts))
    return join(decode_json(encode_json(tree, "state"), "state"), stored)


@settings(max_examples=150, deadline=None)
@given(state=states)
def test_any_state_comes_back_bit_by_bit(state):
    assert same(through_bytes(state), plain(state))


def test_names_that_look_like_paths_or_marks_stay_apart():
    state = {
        "a/b": torch.tensor(1),
        "a": {"b": torch.tensor(2), "~1b": torch.tensor(3), "/b": torch.tensor(4), "~01b": torch.tensor(5)},
        "$tensor": "/a/b",
        "$$tensor": {"$tensor": "/a/b"},
        "list": [torch.tensor(6), {"0": torch.tensor(7)}],
        "list/0": torch.tensor(8),
    }
    assert same(through_bytes(state), state)


def test_tensors_that_share_memory_come_back_apart():
    whole = torch.arange(6.0)
    state = through_bytes({"whole": whole, "half": whole[:3], "tied": whole, "turned": whole.view(2, 3).T})
    state["whole"].zero_()
    assert state["half"].tolist() == [0, 1, 2] and state["tied"].tolist() == [0, 1, 2, 3, 4, 5]
    assert state["turned"].tolist() == [[0, 3], [1, 4], [2, 5]] and whole[5] == 5


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ((1, 2), "/a/b is a tuple"),
        (float("nan"), "/a/b is nan"),
        (b"bytes", "/a/b is a bytes"),
        (object(), "/a/b is a object"),
        (torch.zeros(2, dtype=torch.complex64), r"/a/b is a torch.strided tensor of torch.complex64"),
        (torch.eye(2).to_sparse(), "/a/b is a torch.sparse_coo tensor"),
        (torch.zeros(2, device="meta"), "on meta"),
        ({1: 2}, "/a/b has the key 1"),
        ({"\ud800": 2}, "/a/b has the key"),
    ],
)
def test_what_has_no_exact_form_is_refused_by_name(value, named):
    with pytest.raises(CheckpointError, match=named):
        split({"a": {"b": value}})


def test_a_state_that_contains_itself_is_refused():
    state = {}
    state["self"] = state
    with pytest.raises(CheckpointError, match="contains itself"):
        split(state)


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({}, "stored but not named in the state: /a"),
        ({"a": {"$tensor": "/a"}, "b": {"$tensor": "/b"}}, "not stored"),
        ({"a": {"$tensor": "/a"}, "b": {"$tensor": "/a"}}, "named twice"),
    ],
)
def test_a_tree_and_tensors_that_do_not_belong_together_are_refused(tree, said):
    with pytest.raises(CheckpointError, match=said):
        join(tree, {"/a": torch.zeros(1)})


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))


def named(**networks: nn.Module) -> dict[str, nn.Parameter]:
    return {f"{name}.{key}": p for name, net in networks.items() for key, p in net.named_parameters()}


def stepped(kind=torch.optim.AdamW, **settings):
    """Two networks of equal shapes, one optimiser over both, after three steps."""
    first, second = network(1), network(2)
    optimizer = kind([*first.parameters(), *second.parameters()], **settings)
    take_steps(optimizer, first, second)
    return first, second, optimizer


def take_steps(optimizer, first: nn.Module, second: nn.Module, steps: int = 3) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        x = torch.full((4, 3), float(step)) + torch.arange(4.0)[:, None]
        (first(x).square().sum() + second(x).sin().sum()).backward()
        optimizer.step()


def test_two_networks_of_equal_shapes_find_their_own_states_in_any_order():
    first, second, optimizer = stepped()
    state = through_bytes(
        {
            "networks": {"first": module_state(first), "second": module_state(second)},
            "optimizer": optimizer_state_by_name(optimizer, named(first=first, second=second)),
        }
    )
    new_first, new_second = network(3), network(4)
    swapped = torch.optim.AdamW([*new_second.parameters(), *new_first.parameters()])
    for name, net in {"second": new_second, "first": new_first}.items():
        load_module_state(net, state["networks"][name])
    load_optimizer_state_by_name(swapped, named(second=new_second, first=new_first), state["optimizer"])
    assert same(module_state(new_first), module_state(first))
    assert swapped.state[new_first[0].weight]["exp_avg"].equal(optimizer.state[first[0].weight]["exp_avg"])
    assert not first[0].weight.equal(second[0].weight)  # or nothing was shown

    # the control: PyTorch's own state is by position, and loads the other network's averages without a word
    by_position = torch.optim.AdamW([*new_second.parameters(), *new_first.parameters()])
    by_position.load_state_dict(optimizer.state_dict())
    assert by_position.state[new_second[0].weight]["exp_avg"].equal(optimizer.state[first[0].weight]["exp_avg"])


@pytest.mark.parametrize(
    ("kind", "chosen"),
    [
        (torch.optim.SGD, {"lr": 0.1}),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
        (torch.optim.Adam, {"amsgrad": True}),
        (torch.optim.AdamW, {"fused": True}),
        (torch.optim.AdamW, {"foreach": True, "betas": (0.5, 0.7)}),
        (torch.optim.RMSprop, {"momentum": 0.5, "centered": True}),
        (torch.optim.Adagrad, {}),
        (torch.optim.Adafactor, {}),
        (torch.optim.NAdam, {}),
        (SOAP, {"precondition_frequency": 2}),
    ],
)
def test_training_goes_on_bit_by_bit_after_a_reload(kind, chosen):
    first, second, optimizer = stepped(kind, **chosen)
    state = through_bytes(
        {
            "first": module_state(first),
            "second": module_state(second),
            "optimizer": optimizer_state_by_name(optimizer, named(first=first, second=second)),
        }
    )
    again_first, again_second = network(5), network(6)
    again = kind([*again_first.parameters(), *again_second.parameters()], **{**chosen, "lr": 0.5})
    load_module_state(again_first, state["first"])
    load_module_state(again_second, state["second"])
    untouched = copy.deepcopy(state)
    load_optimizer_state_by_name(again, named(first=again_first, second=again_second), state["optimizer"])
    for pair in [(optimizer, first, second), (again, again_first, again_second)]:
        take_steps(*pair)
    assert same(module_state(first), module_state(again_first))
    assert same(module_state(second), module_state(again_second))
    assert same(state, untouched)  # the optimiser works on copies


def test_a_matrix_that_is_stored_by_columns_comes_back_by_columns():
    optimizer = SOAP([nn.Parameter(torch.zeros(5, 4))])  # its eigenbases are: products with them round by the order
    weight = optimizer.param_groups[0]["params"][0]
    weight.grad = torch.randn(5, 4)
    optimizer.step()
    optimizer.state[weight]["Q"][0] = torch.randn(5, 5).mT
    saved = through_bytes(optimizer_state_by_name(optimizer, {"weight": weight}))
    again = SOAP([weight])
    load_optimizer_state_by_name(again, {"weight": weight}, saved)
    one, two = optimizer.state[weight]["Q"][0], again.state[weight]["Q"][0]
    assert one.equal(two) and one.stride() == two.stride() == (1, 5)


def test_float32_averages_of_bfloat16_weights_keep_their_bits():
    weight = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = torch.optim.Adam([weight])
    average = torch.tensor([1 / 3, 1e-6, 1.0])
    optimizer.state[weight] = {"step": torch.tensor(1.0), "exp_avg": average, "exp_avg_sq": average.square()}
    state = optimizer_state_by_name(optimizer, {"weight": weight})
    again = torch.optim.Adam([weight])
    load_optimizer_state_by_name(again, {"weight": weight}, state)
    assert same(again.state[weight]["exp_avg"], average)


def test_groups_find_their_settings_by_the_names_they_hold():
    first, second = network(1), network(2)
    groups = [
        {"params": first.parameters(), "lr": 0.1},
        {"params": second.parameters(), "lr": 0.2, "betas": (0.1, 0.2)},
    ]
    names = named(first=first, second=second)
    state = through_bytes(optimizer_state_by_name(torch.optim.Adam(groups), names))
    turned = torch.optim.Adam([{"params": second.parameters()}, {"params": first.parameters()}])
    load_optimizer_state_by_name(turned, names, state)
    assert [group["lr"] for group in turned.param_groups] == [0.2, 0.1]
    assert turned.param_groups[0]["betas"] == (0.1, 0.2)


def broken(change) -> tuple[dict, nn.Module, torch.optim.Optimizer]:
    net = network(1)
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    state = optimizer_state_by_name(optimizer, net.named_parameters())
    change(state)
    fresh = network(2)
    return state, fresh, torch.optim.AdamW(fresh.parameters())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s["parameters"].pop("0.weight"), "parameters missing: 0.weight"),
        (lambda s: s["parameters"].update(x=s["parameters"]["0.weight"]), "parameters unknown: x"),
        (lambda s: s["parameters"]["0.weight"]["state"].pop("exp_avg"), "0.weight entries missing: exp_avg"),
        (lambda s: s["parameters"]["0.weight"]["state"].update(y=1), "0.weight entries unknown: y"),
        (
            lambda s: s["parameters"]["0.weight"]["state"].update(exp_avg=torch.zeros(9)),
            r"0.weight exp_avg is float32 of",
        ),
        (lambda s: s["parameters"]["0.weight"].update(shape=[9]), r"0.weight has shape \[9\]"),
        (lambda s: s["groups"].clear(), "no saved group holds the same parameters as group 0"),
        (lambda s: s["groups"][0]["settings"].pop("eps"), "group 0 lacks eps"),
        (lambda s: s["groups"][0]["parameters"].pop(), "no saved group holds the same"),
        (lambda s: s.update(optimizer="SGD"), "it is of SGD, the optimiser is AdamW"),
        (lambda s: s.pop("parameters"), "missing: parameters"),
        (lambda s: s.update(more=1), "unknown: more"),
    ],
)
def test_an_optimiser_state_that_does_not_fit_is_refused_by_name_and_untouched(change, said):
    state, fresh, optimizer = broken(change)
    before = optimizer_state_by_name(optimizer, fresh.named_parameters())
    with pytest.raises(CheckpointError, match=said):
        load_optimizer_state_by_name(optimizer, fresh.named_parameters(), state)
    assert same(optimizer_state_by_name(optimizer, fresh.named_parameters()), before)


def test_a_parameter_without_a_name_and_a_name_given_twice_are_refused():
    net, other = network(), network()
    optimizer = torch.optim.SGD([*net.parameters(), *other.parameters()])
    with pytest.raises(CheckpointError, match="6 parameters without a name"):
        optimizer_state_by_name(optimizer, net.named_parameters())
    with pytest.raises(CheckpointError, match=r"two parameters are named '0\.weight'"):
        optimizer_state_by_name(optimizer, [*net.named_parameters(), *other.named_parameters()])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("1.running_mean"), "missing: 1.running_mean"),
        (lambda s: s.update(extra=torch.zeros(1)), "unknown: extra"),
        (lambda s: s.update({"0.weight": torch.zeros(1)}), r"0.weight is float32 of shape \(1,\), the network has"),
        (lambda s: s.update({"0.weight": s["0.weight"].double()}), "0.weight is float64 of shape"),
        (lambda s: s.update({"0.weight": None}), "0.weight is a NoneType"),
    ],
)
def test_a_network_state_that_does_not_fit_is_refused_by_name_and_untouched(change, said):
    state, net = copy.deepcopy(module_state(network(1))), network(2)
    change(state)
    with pytest.raises(CheckpointError, match=said):
        load_module_state(net, state)
    assert same(module_state(net), module_state(network(2)))


def test_a_compiled_network_has_the_names_of_the_plain_one():
    net = network()
    compiled = torch.compile(net, backend="eager")  # nothing is compiled before the first call
    assert list(module_state(compiled)) == list(module_state(net))
    assert next(iter(compiled.state_dict())).startswith("_orig_mod.")  # what it would have been
    load_module_state(compiled, module_state(network(7)))
    assert same(module_state(net), module_state(network(7)))


def test_generators_go_on_where_they_were():
    generator = torch.Generator().manual_seed(3)
    torch.randn(5, generator=generator)
    state = through_bytes({"named": generator_state(generator), "global": random_state()})
    expected = torch.randn(5, generator=generator), torch.rand(2)
    again = torch.Generator()
    load_generator_state(again, state["named"])
    load_random_state(state["global"])
    assert torch.randn(5, generator=again).equal(expected[0]) and torch.rand(2).equal(expected[1])


@pytest.mark.parametrize(
    "change",
    [lambda s: s.update(device="cuda"), lambda s: s.pop("state"), lambda s: s.update(state=torch.zeros(3))],
    ids=["another device", "no state", "not a state"],
)
def test_a_generator_state_that_does_not_fit_is_refused(change):
    state = generator_state(torch.Generator())
    change(state)
    with pytest.raises(CheckpointError, match="generator"):
        load_generator_state(torch.Generator(), state)


@pytest.mark.parametrize("entry", ["torch", "python", "cuda"])
def test_a_random_state_without_one_generator_is_refused(entry):
    state = random_state()
    del state[entry]
    with pytest.raises(CheckpointError, match=f"missing: {entry}"):
        load_random_state(state)
