"""What happens when the GPU's memory runs out; simulated by raising the error PyTorch raises."""

from __future__ import annotations

import pytest
import torch

from ramctl.engine.micro_batch import MicroBatch, auto_micro_batch, drawing_batch, even_batch
from ramctl.errors import OutOfMemoryError


def batch(size: int) -> MicroBatch:
    return MicroBatch(size, "drawing pictures,", "Lower rollout.micro_batch.")


class Card:
    """A GPU with room for so many items."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.asked: list[int] = []

    def work(self, size: int) -> int:
        self.asked.append(size)
        if size > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return size


def test_the_size_is_halved_once_and_stays_so() -> None:
    card, micro_batch = Card(4), batch(8)
    assert [micro_batch.run(card.work), micro_batch.run(card.work)] == [4, 4]
    assert card.asked == [8, 4, 4]


def test_what_was_really_tried_is_halved() -> None:
    """48 items fit below a size of 128, so half of that would be tried with all 48 again."""
    card, micro_batch = Card(24), batch(128)
    assert micro_batch.run(card.work, 48) == 24
    assert card.asked == [48, 24]
    with pytest.raises(OutOfMemoryError, match="drawing pictures, 24 at once"):
        micro_batch.run(Card(20).work, 48)


def test_where_half_is_too_much_the_message_says_what_to_do() -> None:
    card = Card(3)
    with pytest.raises(OutOfMemoryError) as caught:
        batch(8).run(card.work)
    assert card.asked == [8, 4]
    assert str(caught.value) == (
        "The GPU ran out of memory while drawing pictures, 4 at once. Lower rollout.micro_batch."
    )


def test_a_single_item_that_does_not_fit_is_not_tried_again() -> None:
    card = Card(0)
    with pytest.raises(OutOfMemoryError):
        batch(1).run(card.work)
    assert card.asked == [1]


def test_other_errors_pass() -> None:
    def work(size: int) -> None:
        raise ValueError("no memory matter")

    with pytest.raises(ValueError, match="no memory matter"):
        batch(8).run(work)


def test_commands_without_a_key_for_the_size_are_told_what_they_can_do() -> None:
    with pytest.raises(OutOfMemoryError, match=r"drawing pictures, 4 at once\. Free its memory of other programs\.$"):
        drawing_batch(8).run(Card(3).work)


@pytest.mark.parametrize(
    ("total", "most", "size"), [(96, 64, 48), (64, 64, 64), (65, 64, 33), (9, 4, 3), (3, 64, 3), (1, 1, 1), (0, 4, 4)]
)
def test_passes_are_of_equal_size_and_no_more_than_needed(total: int, most: int, size: int) -> None:
    assert even_batch(total, most) == size
    assert size <= most
    if total:
        assert -(-total // size) == -(-total // most)


@pytest.mark.parametrize(("gigabytes", "items"), [(24, 4), (48, 8), (85, 16), (150, 32), (190, 32)])
def test_a_card_twice_as_large_trains_on_twice_the_pictures_up_to_a_bound(gigabytes: int, items: int) -> None:
    gpu, at_512 = torch.device("cuda"), (16, 64, 64)
    sizes = [auto_micro_batch(at_512, gpu, training=training, card=gigabytes * 10**9) for training in (True, False)]
    assert sizes == [items, 4 * items]
