"""train.compile: the same training through torch.compile, and a compiler that fails is named."""

import pytest
import torch
from torch import nn

import gengrad
from gengrad.cli import main


@pytest.fixture
def compiled_by(monkeypatch):
    """Sets the backend of ``module.compile()``: the default one would need minutes of a C++ compiler."""
    compile_in_place = nn.Module.compile

    def choose(backend):
        monkeypatch.setattr(nn.Module, "compile", lambda self: compile_in_place(self, backend=backend))
        torch.compiler.reset()

    return choose


def test_a_compiled_training_is_the_plain_one(small, tmp_path, compiled_by):
    graphs = []
    compiled_by(lambda graph, inputs: graphs.append(graph) or graph.forward)
    settings = {"method": {"name": "flow_matching"}, "train": {"steps": 6, "batch_size": 32, "log_every": 1}}
    assert main(["train", str(small("plain", **settings))]) == 0 and not graphs
    assert main(["train", str(small("compiled", **settings)), "train.compile=true"]) == 0 and graphs
    a, b = (gengrad.load(tmp_path / name).state_dict() for name in ("plain", "compiled"))
    # the same operations in the same order; fp32 weights of size 1 after six steps of Adam at 1e-3
    assert a.keys() == b.keys() and all(torch.allclose(a[k], b[k], atol=1e-6) for k in a)


def test_a_compilation_that_fails_says_what_to_leave_out(small, compiled_by, capsys):
    def broken(graph, inputs):
        raise OSError("g++: out of memory")

    compiled_by(broken)
    config = small("run", method={"name": "flow_matching"}, train={"steps": 6, "batch_size": 32, "compile": True})
    assert main(["train", str(config)]) == 2
    told = capsys.readouterr().err
    assert "torch.compile failed" in told and "g++: out of memory" in told and "Leave out train.compile" in told
