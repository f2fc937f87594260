from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from ramctl.errors import DataError, MissingDependencyError
from ramctl.scorers.clip import preprocess
from ramctl.scorers.geneval.colours import COLORS, ColorNamer, object_crop

RGB = {"red": (220, 20, 20), "green": (20, 160, 40), "blue": (20, 40, 220), "yellow": (230, 220, 30)}


class Measuring:
    """In CLIP's place: sees the mean colour, and knows which one a sentence names."""

    image_size = 32

    def __init__(self):
        self.texts = []
        self.seen = []

    def image_features(self, pixels):
        self.seen += list(pixels)
        return torch.nn.functional.normalize(pixels.mean(dim=(2, 3)), dim=-1)

    def text_features(self, texts):
        self.texts += texts
        flat = [
            np.full((8, 8, 3), next((RGB[c] for c in RGB if c in text), (128, 128, 128)), np.uint8) for text in texts
        ]
        return self.image_features(torch.stack([preprocess(picture, 32) for picture in flat]))


@pytest.fixture
def namer():
    namer = ColorNamer("cpu")
    namer._encoder = Measuring()
    return namer


def flat(color, height=40, width=30):
    return np.full((height, width, 3), RGB[color], dtype=np.uint8)


def test_each_crop_gets_the_colour_it_is_nearest_to(namer):
    names = [*RGB] * 10  # more than one batch
    assert namer.name([flat(name) for name in names], ["car"] * len(names)) == names


def test_what_has_no_pixels_has_no_colour_and_keeps_its_place(namer):
    crops = [flat("red"), None, np.zeros((0, 4, 3), np.uint8), flat("blue")]
    assert namer.name(crops, ["car"] * 4) == ["red", None, None, "blue"]
    assert namer.name([], []) == []


def test_prototypes_are_made_once_per_class_from_three_sentences_a_colour(namer):
    namer.name([flat("red")] * 2, ["bus", "bus"])
    assert len(namer._encoder.texts) == 3 * len(COLORS) == 30
    assert namer._encoder.texts[:3] == [
        "a photo of a red bus",
        "a photo of a red-colored bus",
        "a photo of a red object",
    ]
    namer.name([flat("red")] * 2, ["bus", "tie"])
    assert len(namer._encoder.texts) == 60
    assert namer._encoder.texts[30] == "a photo of a red tie"


def test_the_answer_is_the_nearest_normalised_mean_of_normalised_texts(clip_store):
    clip = clip_store.reference["clip-vit-l14"]
    namer = ColorNamer("cpu")
    rng = np.random.default_rng(0)
    crops = [rng.integers(0, top, (30, 51, 3), dtype=np.uint8) for top in (60, 256)]
    names = ["stop sign", "dog"]
    named = namer.name(crops, names)
    sentences = ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")
    for crop, name, color in zip(crops, names, named, strict=True):
        with torch.no_grad():
            image = clip.image(preprocess(crop, namer._encoder.image_size, crop="round")[None])[0]
            similarity = []
            for word in COLORS:
                ids = [namer._encoder.tokens(sentence.format(word, name)) for sentence in sentences]
                texts = torch.cat([clip.text(torch.tensor([row])) for row in ids])
                mean = texts.mean(dim=0)
                similarity.append(float(mean @ image / mean.norm()))
        assert color == COLORS[int(np.argmax(similarity))]


def test_long_thin_objects_are_seen_at_their_middle(namer):
    strip = flat("blue", 400, 20)
    strip[190:210] = RGB["red"]
    assert namer.name([strip, strip.transpose(1, 0, 2)], ["tie", "tie"]) == ["red", "red"]


def test_crops_are_centred_as_torchvision_does(namer):
    crop = np.random.default_rng(0).integers(0, 256, (35, 32, 3), dtype=np.uint8)  # three rows too many
    namer.name([crop], ["tie"])
    assert torch.equal(namer._encoder.seen[0], preprocess(crop, 32, crop="round"))
    assert not torch.equal(namer._encoder.seen[0], preprocess(crop, 32, crop="floor"))


@pytest.mark.parametrize("shape", [(1, 2048), (2048, 1), (1, 1), (3, 1000)])
def test_any_shape_can_be_named(namer, shape):
    assert namer.name([flat("green", *shape)], ["tie"]) == ["green"]


def test_missing_weights_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("RAMCTL_WEIGHTS", str(tmp_path))
    for act in (lambda: ColorNamer("cpu").version, ColorNamer("cpu").load):
        with pytest.raises(MissingDependencyError, match="clip-vit-l14"):
            act()


# --- crops


def test_a_crop_is_what_pillow_composes_and_cuts():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (50, 60, 3), dtype=np.uint8)
    mask = np.zeros((50, 60), dtype=bool)
    mask[10:30, 20:45] = rng.random((20, 25)) > 0.5
    mask[10, 20] = mask[29, 44] = True
    canvas = Image.new("RGB", (60, 50), "#999")
    composed = Image.composite(Image.fromarray(image), canvas, Image.fromarray(mask.astype(np.uint8) * 255))
    for box in [(20.0, 10.0, 45.0, 30.0), (20.4, 9.6, 45.5, 29.5)]:
        left, top, right, bottom = (round(v) for v in box)
        crop = object_crop(image, box, mask[top:bottom, left:right])
        np.testing.assert_array_equal(crop, np.asarray(composed.crop(box)))
        assert crop.dtype == np.uint8


@pytest.mark.parametrize("box", [(0, 0, 0, 0), (5, 5, 5, 9), (5, 9, 9, 9), (5.1, 5.2, 5.4, 5.3), (9, 9, 5, 5)])
def test_a_box_without_area_gives_no_crop(box):
    assert object_crop(np.zeros((20, 20, 3), np.uint8), box, np.zeros((0, 0), dtype=bool)) is None


@pytest.mark.parametrize(
    ("box", "shape"),
    [((0, 0, 4, 6), (4, 6)), ((0, 0, 4, 6), (20, 20)), ((18, 0, 22, 6), (6, 4)), ((-1, 0, 3, 6), (6, 4))],
)
def test_a_mask_of_another_picture_is_refused(box, shape):
    with pytest.raises(DataError, match="do not fit the picture"):
        object_crop(np.zeros((20, 20, 3), np.uint8), box, np.ones(shape, dtype=bool))


def test_a_full_gpu_halves_the_batch_of_crops():
    sizes = []
    namer = ColorNamer()
    namer._encoder = Measuring()
    namer.name([flat("red")], ["tie"])  # its prototypes are known from here on

    class Small(Measuring):
        def image_features(self, pixels):
            sizes.append(len(pixels))
            if len(pixels) > 16:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().image_features(pixels)

    namer._encoder = Small()
    crops = [np.full((8, 8, 3), 10 * i, dtype=np.uint8) for i in range(20)]
    named = namer.name(crops, ["tie"] * 20)
    assert sizes == [20, 10, 10] and all(named)
