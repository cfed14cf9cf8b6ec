"""What is played, without a page: a prediction waits for what is shown, stops, and is gone on from."""

import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.errors import UserError
from pipelines.play.playing import AHEAD, PAST, Past, Prediction

GIVEN = 2
CLIP = Past("clip", 7, 10.0, np.zeros((GIVEN, 8, 8, 3), np.uint8))


class Counting:
    """A predictor whose frame number i is of the gray value i, and sample s of it 100 more."""

    def __init__(self) -> None:
        self.asked: dict[str, Any] = {}
        self.closed = False

    def stream(self, images: torch.Tensor, **asked: Any) -> Iterator[torch.Tensor]:
        self.asked = asked | {"images": images}
        levels = torch.arange(asked["samples"]) * 100.0
        try:
            number = GIVEN
            while True:
                yield ((levels + number) / 127.5 - 1).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
                number += 1
        finally:
            self.closed = True


@pytest.fixture
def playing() -> Iterator[Callable[..., SimpleNamespace]]:
    """Starts a prediction in a thread; it is stopped in the end."""
    running: list[SimpleNamespace] = []

    def start(samples: int = 1, predictor: Any = None) -> SimpleNamespace:
        predictor, sent = predictor or Counting(), []
        prediction = Prediction(CLIP, samples, {"seed": 3}, GIVEN, is_new=True)
        arguments = (predictor, lambda number, given, frame: sent.append((number, given, frame)))
        thread = threading.Thread(target=prediction.run, args=arguments)
        thread.start()
        running.append(SimpleNamespace(prediction=prediction, predictor=predictor, sent=sent, thread=thread))
        return running[-1]

    yield start
    for each in running:
        each.prediction.stop()
        each.thread.join(10)


def wait_until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.002)


def test_a_prediction_waits_for_the_page_and_ends_when_it_is_stopped(playing):
    played = playing(samples=2)
    wait_until(lambda: len(played.sent) == AHEAD)
    time.sleep(0.05)
    assert [(number, given) for number, given, _ in played.sent] == [(n, n < GIVEN) for n in range(AHEAD)]
    played.prediction.has_shown(10**9)  # a page that says so shows no frame that was never sent
    wait_until(lambda: len(played.sent) == 2 * AHEAD)
    assert [frame[1, 0, 0, 0] for _, given, frame in played.sent if not given] == [100 + n for n in range(2, 2 * AHEAD)]
    assert played.predictor.asked["keys"] == [(7, 0)]
    assert played.predictor.asked["sampling"] == {"seed": 3}
    played.prediction.stop()
    played.thread.join(10)
    assert not played.thread.is_alive()
    assert played.predictor.closed


def test_a_shown_frame_and_those_before_it_are_the_next_past_however_long_it_went_on(playing):
    played = playing(samples=2)
    for shown in range(0, 100, 2):
        wait_until(lambda: len(played.sent) > shown)  # noqa: B023
        played.prediction.has_shown(shown)
    past = played.prediction.past(98, 1)
    assert past.frames[:, 0, 0, 0].tolist() == [100 + n for n in range(99 - PAST, 99)]
    for frame, sample in ((50, 0), (10**6, 0), (98, 2)):
        with pytest.raises(UserError, match=str(frame)):
            played.prediction.past(frame, sample)
    # A prediction that continues there sends no given frames, counts on, and remembers its past.
    onward = Prediction(past, 1, {}, 99, is_new=False)
    assert onward.past(98, 0).frames.tolist() == past.frames.tolist()


def test_the_past_in_the_given_frames_ends_at_the_shown_one(playing):
    played = playing()
    wait_until(lambda: len(played.sent) == AHEAD)
    assert len(played.prediction.past(0, 0).frames) == 1


def test_what_a_stream_refuses_comes_out_of_run():
    def refusing(images: torch.Tensor, **asked: Any) -> Iterator[torch.Tensor]:
        raise UserError("nfe 3")
        yield images

    prediction = Prediction(CLIP, 1, {}, GIVEN, is_new=True)
    with pytest.raises(UserError, match="nfe 3"):
        prediction.run(SimpleNamespace(stream=refusing), lambda *sent: None)
