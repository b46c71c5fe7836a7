"""Work ahead of time: in order, not too far ahead, and over when nobody wants it any more."""

import threading
import time

import pytest

from tinycats.images.prefetching import prefetch


def test_results_come_in_order_whatever_each_takes():
    def slow_at_times(item: int) -> int:
        time.sleep(0.02 if item % 3 == 0 else 0)
        return item * item

    assert list(prefetch(slow_at_times, range(20), workers=3, ahead=5)) == [item * item for item in range(20)]


def test_no_more_is_done_than_asked_for_and_closing_ends_it():
    before = set(threading.enumerate())  # an earlier test's may still be among them
    done: list[int] = []
    results = prefetch(done.append, range(1000), workers=2, ahead=4)
    next(results)
    time.sleep(0.1)
    assert len(done) <= 6
    results.close()
    assert len(done) <= 6
    assert not set(threading.enumerate()) - before


def test_an_error_comes_where_its_result_is_due():
    results = prefetch(lambda item: 1 // item, [2, 1, 0, 1], workers=2, ahead=4)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)
