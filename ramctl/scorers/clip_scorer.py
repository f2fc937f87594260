"""What the scorers on a CLIP have in common: options, batches, texts encoded once, failures kept to their picture."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from ramctl.errors import DataError
from ramctl.prompts import Prompt
from ramctl.scorers.base import Floats, Images, ImageScore, Scorer, SelfTest
from ramctl.scorers.devices import check_network_options

if TYPE_CHECKING:
    from torch import Tensor

    from ramctl.scorers.clip import Batches, ClipEncoder


class ClipScorer(Scorer):
    """A scorer of a picture's direction in a CLIP's space, against its prompt's unless ``reads_prompt`` is off.

    Subclasses name their ``rule`` and define :meth:`make_encoder`, :meth:`encoder_version`, :meth:`prepare` and
    :meth:`judge`.

    Args:
        device: ``auto`` (this process's GPU where there is one), ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: precision of the network: ``float32``, or ``bfloat16`` / ``float16``: half the memory, faster, and off by
            some thousandths. The version names it.
        batch_size: pictures a time.

    Raises:
        UsageError: an option out of its range.
    """

    #: names how the number is made, in the version.
    rule: str
    reads_prompt: ClassVar[bool] = True

    def __init__(self, device: str = "auto", dtype: str = "float32", batch_size: int = 16) -> None:
        super().__init__()
        check_network_options(self.name, dtype, batch_size)
        self.device = device
        self.dtype = dtype
        self.batch_size = batch_size
        self._engine: tuple[ClipEncoder, Batches] | None = None

    @property
    def version(self) -> str:
        """Rule, weights and tokenizer by their SHA-256, precision.

        Raises:
            MissingDependencyError: the weights are not there.
        """
        return f"{self.name}/{self.rule}/{self.encoder_version()}"

    @abstractmethod
    def encoder_version(self) -> str:
        """The version of what :meth:`make_encoder` makes, without loading it."""

    @abstractmethod
    def make_encoder(self) -> ClipEncoder:
        """Load the encoder, or get it from another scorer that has it."""

    @abstractmethod
    def prepare(self, image: Images) -> Tensor:
        """uint8 [H, W, 3] RGB as the encoder takes it: float32 [3, S, S], normalised."""

    @abstractmethod
    def judge(self, image: Floats, text: Floats | None) -> ImageScore:
        """The score of unit vectors [D] of a picture and of its prompt (None without ``reads_prompt``)."""

    @property
    def engine(self) -> tuple[ClipEncoder, Batches]:
        """The encoder and the runner of its batches; :meth:`load` comes first."""
        if self._engine is None:
            raise RuntimeError(f"the scorer {self.name!r} was used before load")
        return self._engine

    def load(self) -> None:
        """Load the encoder.

        Raises:
            MissingDependencyError: weights are not there; with the command that gets them.
            ScorerError: they cannot be read or do not fit.
            UsageError: no such device.
        """
        from ramctl.scorers.clip import Batches

        self._engine = self.make_encoder(), Batches(self.batch_size, self.name)

    def score_batch(self, images: Images, prompts: Sequence[Prompt]) -> list[ImageScore | str]:
        """Score N pictures; one whose prompt cannot be encoded fails alone."""
        problems: dict[int, str] = {}
        for index, prompt in enumerate(prompts):
            try:
                if self.reads_prompt:
                    self.engine[0].tokens(prompt.text)
            except DataError as error:
                problems[index] = f"DataError: {error}"
        good = [index for index in range(len(images)) if index not in problems]
        scores = self._score_good(images, prompts, good) if good else {}
        return [problems[index] if index in problems else scores[index] for index in range(len(images))]

    def _score_good(self, images: Images, prompts: Sequence[Prompt], good: list[int]) -> dict[int, ImageScore]:
        import torch

        encoder, batches = self.engine

        def encode(part: slice) -> Tensor:
            return encoder.image_features(torch.stack([self.prepare(images[index]) for index in good[part]]))

        pictures = batches.run(len(good), encode).numpy()
        texts = self._text_directions([prompts[index].text for index in good]) if self.reads_prompt else {}
        return {
            index: self.judge(picture, texts.get(prompts[index].text))
            for index, picture in zip(good, pictures, strict=True)
        }

    def _text_directions(self, texts: Sequence[str]) -> dict[str, Floats]:
        """Each distinct text's direction: the pictures of a group share theirs."""
        encoder, batches = self.engine
        distinct = list(dict.fromkeys(texts))
        found = batches.run(len(distinct), lambda part: encoder.text_features(distinct[part]))
        return dict(zip(distinct, found.numpy(), strict=True))

    def self_test(self) -> SelfTest:
        """Of three drawn pictures, each caption scores its own highest."""
        return matching_test(self)


def cosine(image: Floats, text: Floats | None) -> float:
    """Cosine of two unit vectors [D], summed in double precision."""
    if text is None:
        raise RuntimeError("this scorer reads prompts")
    return float(np.dot(image.astype(np.float64), text.astype(np.float64)))


def drawn_pictures() -> dict[str, Images]:
    """Pictures uint8 [224, 224, 3] by their captions, which any trained CLIP tells apart."""
    from PIL import Image, ImageDraw

    def draw(shape: str, colour: str) -> Images:
        picture = Image.new("RGB", (224, 224), "white")
        pen = ImageDraw.Draw(picture)
        if shape == "circle":
            pen.ellipse((40, 40, 184, 184), fill=colour)
        elif shape == "square":
            pen.rectangle((46, 46, 178, 178), fill=colour)
        else:
            pen.polygon([(112, 36), (30, 184), (194, 184)], fill=colour)
        return np.asarray(picture, dtype=np.uint8)

    kinds = [("red", "circle"), ("blue", "square"), ("green", "triangle")]
    return {f"a {colour} {shape} on a white background": draw(shape, colour) for colour, shape in kinds}


def matching_test(scorer: Scorer) -> SelfTest:
    """Whether a scorer that compares pictures with prompts gives each caption's own drawn picture the highest score."""
    drawn = drawn_pictures()
    captions, pictures = list(drawn), np.stack(list(drawn.values()))
    n = len(captions)
    images = np.concatenate([pictures] * n)
    scores = scorer.score(images, [Prompt(caption) for caption in captions for _ in range(n)])
    if scores.failed.any():
        return SelfTest(passed=False, summary=f"a drawn picture failed: {next(filter(None, scores.errors))}")
    table = scores.value.reshape(n, n)  # caption, picture
    wrong = [
        f"for {caption!r} the picture of {captions[int(row.argmax())]!r} scores {row.max():.4f}, its own {row[i]:.4f}"
        for i, (caption, row) in enumerate(zip(captions, table, strict=True))
        if int(row.argmax()) != i
    ]
    margin = min(float(row[i] - np.delete(row, i).max()) for i, row in enumerate(table))
    return SelfTest(
        passed=not wrong,
        summary="; ".join(wrong) or f"{n} of {n} drawn pictures fit their captions best (by {margin:.3f} or more)",
    )
