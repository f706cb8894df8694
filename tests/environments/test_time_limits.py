"""Time limits: they end loops that never end, and leave every other timer as it was."""

import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from jaxrl_llm.environments import TimeLimitError
from jaxrl_llm.environments import time_limit


def spin(seconds=30.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def stubborn():
    """Swallows what a well-behaved function would let through."""
    end = time.monotonic() + 30
    for _ in range(3):
        try:
            while time.monotonic() < end:
                pass
        except:  # noqa: E722
            pass


@pytest.mark.parametrize("loop", [spin, stubborn])
def test_a_loop_is_ended_and_named(loop):
    started = time.monotonic()
    with pytest.raises(TimeLimitError, match=r"the maze took longer than 0\.1 s"), time_limit(0.1, what="the maze"):
        loop()
    assert 0.1 <= time.monotonic() - started < 5


def test_a_fast_body_is_left_alone_and_no_alarm_comes_later():
    with time_limit(0.1):
        value = 3
    time.sleep(0.2)
    assert value == 3


def test_errors_of_the_body_pass_through():
    with pytest.raises(ZeroDivisionError), time_limit(5.0):
        1 / 0  # noqa: B018


def test_the_inner_limit_fires_and_the_outer_one_still_works():

    def both():
        with pytest.raises(TimeLimitError, match="inner"), time_limit(0.1, what="inner"):
            spin()
        spin()

    with pytest.raises(TimeLimitError, match="outer"), time_limit(0.4, what="outer"):
        both()


def test_an_outer_limit_that_is_due_first_fires_first():
    started = time.monotonic()
    with pytest.raises(TimeLimitError, match="outer"), time_limit(0.1, what="outer"), time_limit(20.0, what="inner"):
        spin()
    assert time.monotonic() - started < 5


def test_a_foreign_handler_and_its_timer_are_put_back():
    rung = []
    before = signal.signal(signal.SIGALRM, lambda *_: rung.append(time.monotonic()))
    outer_delay, outer_interval = signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(TimeLimitError), time_limit(0.1):
            spin()
        assert not rung
        spin(0.5)
        assert len(rung) == 1
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, outer_delay, outer_interval)


def test_a_foreign_alarm_that_does_not_raise_leaves_the_limit_in_force():
    rung = []
    before = signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
    outer_delay, outer_interval = signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        with pytest.raises(TimeLimitError), time_limit(0.3):
            spin()
        assert rung == [1]
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, outer_delay, outer_interval)


def test_impossible_limits_are_refused():
    with pytest.raises(ValueError, match="seconds is 0"), time_limit(0):
        pass


def in_a_thread(call):
    """What a call does in another thread than the main one."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(call).result()


@pytest.mark.parametrize("swallows", [False, True])
def test_other_threads_have_the_limit_too(swallows):
    def forever():
        with time_limit(0.1, what="the loop"):
            while True:
                try:
                    sum(range(1000))
                except BaseException:
                    if not swallows or time.monotonic() > started + 0.3:
                        raise

    started = time.monotonic()
    with pytest.raises(TimeLimitError, match=r"the loop took longer than 0\.1 s"):
        in_a_thread(forever)
    assert time.monotonic() - started < 5


def test_a_thread_goes_on_after_calls_that_end_in_time():
    def many():
        for _ in range(200):
            with time_limit(5.0):
                pass
        # Ends about when the limit does: in time or not, but nothing is raised later.
        late = 0
        for _ in range(30):
            try:
                with time_limit(0.002):
                    time.sleep(0.0019)
            except TimeLimitError:
                late += 1
        time.sleep(0.1)
        return sum(range(10_000)), late

    assert in_a_thread(many)[0] == sum(range(10_000))


def test_limits_that_end_when_they_ring_leave_no_watcher_in_busy_threads():
    """A watcher that went on would ring in whatever thread has the number of its own by then."""
    end = time.monotonic() + 3.0

    def many():
        late = 0
        while time.monotonic() < end:
            try:
                with time_limit(0.002):
                    time.sleep(0.0018 + 0.0001 * (late % 5))
            except TimeLimitError:
                late += 1
        return late

    with ThreadPoolExecutor(3) as pool:
        assert min(pool.map(lambda _: many(), range(3))) > 0
    time.sleep(0.2)
    assert not [thread.name for thread in threading.enumerate() if thread.name == "time-limit"]


def test_an_alarm_at_the_very_end_leaves_no_timer_and_no_error():
    """Bodies that end when the alarm rings, thousands of times: it may ring in the middle of being switched off."""
    limit, before = 2e-3, signal.getsignal(signal.SIGALRM)
    end = time.monotonic() + 2.0
    rounds = rang = 0
    while time.monotonic() < end:
        rounds += 1
        started = time.monotonic()
        try:
            with time_limit(limit):
                while time.monotonic() - started < limit * (0.97 + 0.0001 * (rounds % 400)):
                    pass
                raise KeyError
        except TimeLimitError:
            rang += 1
        except KeyError:
            pass
        assert signal.getsignal(signal.SIGALRM) is before
    assert 0 < rang < rounds
