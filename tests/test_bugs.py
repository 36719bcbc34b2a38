"""A bug shows its place; a mistake of the user's, its message alone."""

import pytest

from gengrad.cli import main


def test_a_bug_is_not_disguised_as_a_users_mistake(small, monkeypatch):
    from gengrad.methods import nsgf

    def broken(self, networks, part, generator):
        return [][0]

    monkeypatch.setattr(nsgf.SinkhornStage, "objective", broken)
    with pytest.raises(IndexError):
        main(["train", str(small("run"))])


def test_a_bug_of_gengrads_shows_its_place_and_a_mistake_only_its_message(capsys):
    from gengrad.cli import guarded
    from gengrad.data.arrays import read_array
    from gengrad.registry import METHODS

    inside = {"__name__": "gengrad.some_module"}
    with pytest.raises(ValueError, match="invalid literal"):  # raised by Python, on behalf of gengrad's code
        guarded(eval("lambda given: int('x')", inside), None)
    assert guarded(lambda given: read_array("nothing.npy"), None) == 2
    assert guarded(lambda given: METHODS.get("nsfg"), None) == 2
    assert "Did you mean" in capsys.readouterr().err


def test_an_os_error_is_the_users_where_it_names_a_file_or_a_full_disk(tmp_path):
    import errno

    from gengrad.cli import guarded

    def failing(error: OSError):
        def command(given):
            raise error

        return command

    assert guarded(lambda given: (tmp_path / "none").read_text(), None) == 2
    assert guarded(failing(OSError(errno.ENOSPC, "No space left on device")), None) == 2
    for bug in (OSError(errno.EBADF, "Bad file descriptor"), ConnectionResetError("by the other process")):
        with pytest.raises(type(bug)):
            guarded(failing(bug), None)
