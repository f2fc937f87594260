"""An OCR engine that hangs: the picture fails, its thread is left behind, the others are read, the process ends."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from ramctl.errors import ScorerError, UsageError
from ramctl.prompts import Prompt
from ramctl.scorers.base import Images, Scores
from ramctl.scorers.ocr import OcrScorer
from ramctl.scorers.ocr import scorer as scorer_module
from ramctl.scorers.registry import create

GOOD, HANGS = 0, 255


class StandIn:
    """Readers that say how bright a picture is after ``seconds``, and stay in the white ones until released."""

    def __init__(self) -> None:
        self.released = threading.Event()
        self.made = 0
        self.start_seconds = 0.0
        self.seconds: Callable[[int], float] = lambda level: 0.0

    def make_reader(self) -> StandIn:
        self.made += 1
        time.sleep(self.start_seconds)
        return self

    def read(self, image: Images) -> list[str]:
        if image.min() == HANGS:
            self.released.wait(10)
        level = int(image[0, 0, 0])
        time.sleep(self.seconds(level))
        return [str(level)]


@pytest.fixture
def engine() -> Iterator[StandIn]:
    made = StandIn()
    yield made
    made.released.set()


def scorer(engine: StandIn, *, threads: int = 1, timeout: float = 0.15) -> OcrScorer:
    made = OcrScorer(threads=threads, timeout=timeout)
    made.engine.make_reader = engine.make_reader  # type: ignore[method-assign]
    made.ensure_loaded()
    return made


def score(made: OcrScorer, *levels: int) -> Scores:
    images = np.stack([np.full((8, 8, 3), level, dtype=np.uint8) for level in levels])
    return made.score(images, [Prompt(f'a sign "{level}"') for level in levels])


def test_a_picture_whose_reading_hangs_fails_and_the_others_are_read_in_order(engine: StandIn) -> None:
    engine.seconds = lambda level: max(0.0, 0.06 - 0.01 * level)  # the later ones are done sooner
    made = scorer(engine, threads=2)
    scores = score(made, 1, HANGS, 2, 3, 4, 5)
    assert scores.failed.tolist() == [False, True, False, False, False, False]
    assert scores.errors[1] == "rapidocr did not finish within 0.15 s (timeout)"
    assert [record.get("text") for record in scores.records] == ["1", None, "2", "3", "4", "5"]
    assert scores.value[[0, 2, 3, 4, 5]].tolist() == [1] * 5


def test_a_stuck_engine_is_replaced_by_a_new_one(engine: StandIn) -> None:
    made = scorer(engine)
    assert score(made, 1, HANGS, 2).failed.tolist() == [False, True, False]
    assert engine.made == 2
    assert score(made, HANGS).failed.tolist() == [True]
    assert score(made, 3, 4).value.tolist() == [1, 1]
    assert engine.made == 3


def test_waiting_for_its_turn_is_not_reading(engine: StandIn) -> None:
    engine.seconds = lambda level: 0.07
    assert not score(scorer(engine), *range(6)).failed.any()


def test_starting_an_engine_is_not_reading(engine: StandIn) -> None:
    engine.start_seconds = 0.3
    assert not score(scorer(engine), 1).failed.any()


def test_without_a_limit_slow_pictures_are_waited_for(engine: StandIn) -> None:
    engine.seconds = lambda level: 0.1
    assert not score(scorer(engine, timeout=0), 1, 2).failed.any()


def test_an_engine_that_hangs_in_picture_after_picture_stops_the_work(engine: StandIn) -> None:
    made = scorer(engine, timeout=0.05)
    for _ in range(2):
        assert score(made, HANGS).failed.all()
    with pytest.raises(ScorerError, match=r"The OCR engine rapidocr hangs: .* within 0\.05 s, 3 in a row"):
        score(made, HANGS)


def test_one_picture_read_between_those_that_hang_keeps_the_work_going(engine: StandIn) -> None:
    made = scorer(engine, timeout=0.05)
    scores = score(made, HANGS, HANGS, GOOD, HANGS, HANGS, GOOD)
    assert scores.failed.tolist() == [True, True, False, True, True, False]


@pytest.mark.parametrize(("hanging", "stops"), [(4, False), (5, True)])
def test_as_many_in_a_row_as_there_are_threads(engine: StandIn, hanging: int, stops: bool) -> None:
    made = scorer(engine, threads=5)
    engine.seconds = lambda level: 0.02
    if stops:
        with pytest.raises(ScorerError, match="5 in a row"):
            score(made, *[HANGS] * hanging)
    else:
        assert score(made, *[HANGS] * hanging, GOOD).failed.tolist() == [True] * hanging + [False]


def test_an_engine_that_hangs_at_its_start_is_said_to(engine: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scorer_module, "_START_TIMEOUT", 0.1)
    engine.start_seconds = 0.5
    with pytest.raises(ScorerError, match=r"does not start: rapidocr did not finish within 0\.1 s"):
        scorer(engine, timeout=0.05)


@pytest.mark.parametrize("timeout", [-1, float("nan")])
def test_a_timeout_is_seconds(timeout: float) -> None:
    with pytest.raises(UsageError, match="timeout"):
        create("ocr", {"timeout": timeout})


def test_a_timeout_may_be_given_as_text_and_infinite() -> None:
    made = create("ocr", {"timeout": "2.5"})
    assert isinstance(made, OcrScorer) and made.timeout == 2.5
    create("ocr", {"timeout": float("inf")})


@pytest.mark.parametrize("given_up", [True, False])
def test_the_process_ends_while_a_reader_is_stuck(given_up: bool) -> None:
    timeout = 0.1 if given_up else 0
    code = f"""
import threading, time
import numpy as np
from ramctl.prompts import Prompt
from ramctl import watched_threads
from ramctl.scorers.ocr import OcrScorer

class Stuck:
    def read(self, image):
        if image.max() == 0:
            time.sleep(600)
        return []

watched_threads._EXIT_GRACE = 0.1
scorer = OcrScorer(threads=1, timeout={timeout})
scorer.engine.make_reader = Stuck
scorer.ensure_loaded()
work = lambda: print(scorer.score(np.zeros((1, 8, 8, 3), np.uint8), [Prompt('a "b"')]).errors)
if {given_up}:
    work()
else:  # as after an interrupt
    threading.Thread(target=work, daemon=True).start()
    time.sleep(0.2)
print("over")
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "over"
    assert ("(timeout)" in done.stdout) is given_up
