"""Threads on all cores: answers in order, faults raised, what was not begun left out."""

import threading
import time

import pytest

from spade3d.cores import on_all_cores, usable_cores


def test_answers_come_in_the_order_of_what_was_given():
    def slow_first(n):
        time.sleep(0.02 if n == 0 else 0)
        return n * n

    assert list(on_all_cores(slow_first, range(6))) == [0, 1, 4, 9, 16, 25]
    assert list(on_all_cores(slow_first, [])) == []


def test_no_more_threads_than_asked_for_and_than_cores():
    seen = set()

    def noted(_):
        time.sleep(0.01)
        seen.add(threading.get_ident())

    list(on_all_cores(noted, range(8), most=1))
    assert len(seen) == 1 and usable_cores() >= 1
    seen.clear()
    list(on_all_cores(noted, range(8), most=1000))
    assert len(seen) <= usable_cores()


def test_two_run_at_once(monkeypatch):
    monkeypatch.setattr("spade3d.cores.usable_cores", lambda: 2)  # threads meet on one core as well
    meeting = threading.Barrier(2, timeout=20)
    assert len(list(on_all_cores(lambda _: meeting.wait(), range(2)))) == 2


def test_a_fault_is_raised_and_the_rest_is_not_begun():
    begun = []

    def faulty(n):
        begun.append(n)
        if n == 1:
            raise OSError("the second one")
        time.sleep(0.05)

    with pytest.raises(OSError, match="the second one"):
        list(on_all_cores(faulty, range(100), most=1))
    assert len(begun) < 10
