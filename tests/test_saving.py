"""Saving while training goes on."""

import threading

import pytest
import torch

from tinycats.run.saving import Writer
from tinycats.script.errors import UserError


def test_what_is_saved_is_what_was_there_when_saving_was_asked_for():
    """Seen to fail with the tensors themselves in place of copies."""
    may_write, saved = threading.Event(), []

    def write(checkpoint: dict) -> None:
        may_write.wait(60)
        saved.append({"weights": checkpoint["weights"].clone(), "metrics": list(checkpoint["metrics"])})

    writer = Writer()
    weights, metrics = torch.ones(5), [{"step": 1}]
    writer.save(write, {"weights": weights, "metrics": metrics, "best": {}})
    assert writer.is_saving
    weights.zero_()
    metrics.append({"step": 2})
    may_write.set()
    writer.wait()
    assert not writer.is_saving
    assert saved[0]["weights"].tolist() == [1] * 5
    assert saved[0]["metrics"] == [{"step": 1}]
    writer.save(write, {"weights": weights, "metrics": metrics, "best": {}})
    writer.close()
    assert saved[1]["weights"].tolist() == [0] * 5


def test_what_goes_wrong_on_the_thread_is_raised_by_whatever_is_asked_next():
    def fail(_: dict) -> None:
        raise UserError("cannot save")

    asks = (
        lambda writer: writer.wait(),
        lambda writer: writer.check(),
        lambda writer: writer.write(print),
        lambda writer: writer.save(fail, {}),
    )
    for ask in asks:
        writer = Writer()
        writer.save(fail, {"step": 1})
        writer._checkpoint.result()
        with pytest.raises(UserError, match="cannot save"):
            ask(writer)
        writer.close()


def test_things_are_written_in_their_order():
    writer, written = Writer(), []
    for number in range(100):
        writer.write(written.append, number)
    writer.wait()
    assert written == list(range(100))
    writer.close()
