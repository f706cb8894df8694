"""What asks a run to stop, and how: noted until a safe point, or at once."""

import os
import signal

import pytest

from jaxrl_llm.training.run.interrupts import StopAtOnce
from jaxrl_llm.training.run.interrupts import StoppedError
from jaxrl_llm.training.run.interrupts import StopRequests
from jaxrl_llm.training.run.interrupts import ask_to_stop


@pytest.mark.parametrize(
    ("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGHUP, "SIGHUP"), (signal.SIGINT, "Ctrl-C")]
)
def test_signals_are_noted_or_raise_and_handlers_come_back(number, name) -> None:
    before = signal.getsignal(number)
    with StopRequests() as stop:
        assert stop.requested is None
        os.kill(os.getpid(), number)
        assert stop.requested is not None
        assert stop.requested.startswith(name)
    with pytest.raises(StoppedError) as stopped, StopAtOnce():
        os.kill(os.getpid(), number)
    assert stopped.value.reason.startswith(name)
    assert signal.getsignal(number) is before


def test_the_first_request_is_the_one_that_is_named_and_a_second_ctrl_c_interrupts() -> None:
    with StopRequests() as stop:
        ask_to_stop("an output that was closed")
        ask_to_stop("something else")
        assert stop.requested == "an output that was closed"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_the_innermost_listens_and_without_one_nothing_happens() -> None:
    ask_to_stop("nobody")
    with StopRequests() as outer:
        with pytest.raises(StoppedError, match="inner"), StopAtOnce():
            ask_to_stop("inner")
        assert outer.requested is None
        ask_to_stop("outer")
        assert outer.requested == "outer"


def test_what_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequests() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.requested is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_error_of_a_computation_is_not_taken_for_a_request() -> None:
    with pytest.raises(ZeroDivisionError), StopAtOnce():
        _ = 1 / 0
    assert not issubclass(StoppedError, Exception)
