"""A first signal is a request, a second an order; signals at random moments of a real loop are in test_kills.py."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from checkpoint_cases import in_ranks

from gengrad.training.interrupt import Interrupts


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_is_noted_announced_and_gives_the_exit_code(number, code, capfd):
    with Interrupts() as interrupts:
        assert interrupts.signal is None and interrupts.exit_code == 0
        send(number)
        assert interrupts.signal == number
    assert interrupts.exit_code == code
    assert f"{signal.Signals(number).name}: finishing this step and saving" in capfd.readouterr().err


def test_the_handlers_before_come_back_also_after_an_exception():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(KeyError), Interrupts():
        assert signal.getsignal(signal.SIGTERM) != before[0]
        raise KeyError
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_second_signal_ends_the_process_at_once():
    with Interrupts(grace=0) as interrupts:
        send(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
        with pytest.raises(SystemExit) as caught:
            send(signal.SIGTERM)
    assert caught.value.code == 143 and interrupts.signal == signal.SIGTERM


def test_the_same_signal_twice_at_once_is_one_request():
    """The terminal and a launcher both pass a Ctrl-C on; a process that took the second for an order would not save."""
    with Interrupts(grace=0.2) as interrupts:
        send(signal.SIGINT)
        send(signal.SIGINT)
        send(signal.SIGTERM)
        assert interrupts.signal == signal.SIGINT
        time.sleep(0.25)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_a_hanging_step_can_be_left_by_a_second_signal():
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with Interrupts(grace=0.1, announce=False):
                os.write(writing, b"in its step")
                time.sleep(60)
        except SystemExit as leaving:
            os._exit(leaving.code)
        finally:
            os._exit(1)
    os.read(reading, 1)
    os.kill(child, signal.SIGTERM)
    time.sleep(0.3)
    assert os.waitpid(child, os.WNOHANG) == (0, 0)  # the first one is only noted
    os.kill(child, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 143


def test_outside_the_main_thread_signals_keep_their_effect():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work():
        with Interrupts() as interrupts:
            seen.append((signal.getsignal(signal.SIGTERM), interrupts.signal))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(before, None)]


@pytest.mark.parametrize(
    ("received", "agreed"),
    [
        ((None, signal.SIGTERM), signal.SIGTERM),
        ((signal.SIGINT, None), signal.SIGINT),
        ((signal.SIGINT, signal.SIGTERM), signal.SIGTERM),
        ((None, None), None),
    ],
)
def test_all_ranks_stop_at_the_same_step_when_one_is_signalled(received, agreed):
    def loop(ranks):
        interrupts = Interrupts(announce=False)
        for step in range(5):
            if step == 2 and received[ranks.rank]:
                interrupts._note(received[ranks.rank], None)
            if interrupts.agreed(ranks.largest):
                break
        return step, interrupts.signal, interrupts.exit_code

    code = 0 if agreed is None else 128 + agreed
    assert in_ranks(2, loop) == [(4 if agreed is None else 2, agreed, code)] * 2
