"""GenEval's object detector: Mask2Former with Swin-S on COCO instances, as MMDetection trained and runs it.

The network is transformers' class with MMDetection's weights (:mod:`mmdet_checkpoint`); everything around it follows
MMDetection 2.28.2 with the configuration ``mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco``, because small differences
in resizing move scores across the thresholds. transformers' own image processor and post-processing for this class
do something else (384x384 input, no overlaps between objects) and are not used.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ramctl.errors import DataError, MissingDependencyError, ScorerError, UsageError
from ramctl.hashing import file_sha256
from ramctl.prompts import Prompt
from ramctl.scorers.base import Images
from ramctl.scorers.devices import placed, scorer_device
from ramctl.scorers.geneval import mmdet_checkpoint
from ramctl.scorers.geneval.coco import CLASS_NAMES
from ramctl.scorers.geneval.colours import COLORS, ColorNamer, object_crop
from ramctl.scorers.geneval.rules import SCORE_THRESHOLD, Detection
from ramctl.scorers.geneval.scorer import KnownPicture

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import Mask2FormerConfig

    from ramctl.scorers.clip import Batches

ChannelOrder = Literal["rgb", "swapped"]
CHANNEL_ORDERS: tuple[ChannelOrder, ...] = get_args(ChannelOrder)
Precision = Literal["float32", "bfloat16", "float16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

#: What surrounds the network; goes into the version.
PROCESSING = "mmdet-2.28.2"
_LONG_SIDE, _SHORT_SIDE = 1333, 800
_DIVISOR = 32
_PADDING = 128
_MEAN = (123.675, 116.28, 103.53)
_STD = (58.395, 57.12, 57.375)
#: Pairs of query and class that are looked at, the most probable first.
_CANDIDATES = 100
#: Masks brought to full size at once: 16 of 1024x1024 take 64 MiB, and as much again for their sigmoids.
_MASKS_AT_ONCE = 16


@dataclass(frozen=True)
class Segment(Detection):
    """A detection with the object's pixels: ``mask`` bool [bottom - top, right - left], within the box."""

    mask: NDArray[np.bool_] = field(default_factory=lambda: np.zeros((0, 0), dtype=bool), repr=False, compare=False)


def network_config() -> Mask2FormerConfig:
    """The architecture of the official checkpoint, 68.7 million parameters."""
    from transformers import Mask2FormerConfig, SwinConfig

    backbone = SwinConfig(
        image_size=224,
        patch_size=4,
        embed_dim=96,
        depths=[2, 2, 18, 2],
        num_heads=[3, 6, 12, 24],
        window_size=7,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    return Mask2FormerConfig(backbone_config=backbone, num_labels=len(CLASS_NAMES))


def input_size(height: int, width: int) -> tuple[int, int]:
    """(height, width) a picture is resized to: at most 1333 x 800 whichever way round, aspect kept, then rounded."""
    factor = min(_LONG_SIDE / max(height, width), _SHORT_SIDE / min(height, width))
    return max(int(height * factor + 0.5), 1), max(int(width * factor + 0.5), 1)


def network_input(images: Images, channel_order: ChannelOrder = "rgb") -> NDArray[np.uint8]:
    """Pictures resized and padded: uint8 [N, H, W, 3] to uint8 [N, h, w, 3], h and w multiples of 32.

    Resized by OpenCV's bilinear on uint8 (no antialiasing), then padded at the right and the bottom with 128. For
    ``"swapped"`` red and blue are exchanged, as Flow-GRPO's reward server and DiffusionNFT (unwittingly) do.

    Raises:
        DataError: the pictures have no pixels.
    """
    import cv2

    number, height, width = images.shape[:3]
    if not height or not width:
        raise DataError("the picture has no pixels")
    new_height, new_width = input_size(height, width)
    padded_height, padded_width = (-(-side // _DIVISOR) * _DIVISOR for side in (new_height, new_width))
    padded = np.full((number, padded_height, padded_width, 3), _PADDING, dtype=np.uint8)
    for target, image in zip(padded, images, strict=True):
        source = np.ascontiguousarray(image if channel_order == "rgb" else image[:, :, ::-1])
        target[:new_height, :new_width] = cv2.resize(source, (new_width, new_height), interpolation=cv2.INTER_LINEAR)
    return padded


def full_size(logits: Tensor, padded: tuple[int, int], inner: tuple[int, int], original: tuple[int, int]) -> Tensor:
    """Mask logits [M, h, w] at the picture's size [M, *original].

    Bilinear twice, as MMDetection does: to the padded input, cut to the picture's part of it, then to the picture.
    """
    from torch.nn.functional import interpolate

    large = interpolate(logits[:, None], size=padded, mode="bilinear", align_corners=False)
    inside = large[:, :, : inner[0], : inner[1]]
    return interpolate(inside, size=original, mode="bilinear", align_corners=False)[:, 0]


def tight_box(mask: Tensor) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a bool [H, W] mask, right and bottom exclusive; zeros when it is empty."""
    columns, rows = mask.any(dim=0).nonzero(), mask.any(dim=1).nonzero()
    if not len(columns):
        return 0, 0, 0, 0
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def segments(
    class_logits: Tensor,
    mask_logits: Tensor,
    padded: tuple[int, int],
    original: tuple[int, int],
    threshold: float = SCORE_THRESHOLD,
) -> list[Segment]:
    """The objects of one picture whose score is above the threshold.

    A score is the class's probability times the mean sigmoid over the mask's own pixels (those with a positive
    logit). Only masks of candidates whose probability alone passes are brought to full size; the others cannot pass.

    Args:
        class_logits: float32 [Q, classes + 1], the last class is "no object".
        mask_logits: float32 [Q, h, w].
        padded: (height, width) of the network's input.
        original: (height, width) of the picture.
        threshold: scores have to be strictly greater.

    Raises:
        ScorerError: the network's output is not finite.
    """
    import torch

    probability = class_logits.float().softmax(dim=-1)[:, :-1]
    best, index = probability.flatten().topk(min(_CANDIDATES, probability.numel()))
    likely = best > threshold
    # An infinite logit makes the whole row NaN, and NaN passes no threshold: the picture would seem empty.
    if not bool(torch.isfinite(best).all()) or not bool(torch.isfinite(mask_logits).all()):
        raise ScorerError("the detector's output is not finite")
    queries, labels = index[likely] // probability.shape[1], index[likely] % probability.shape[1]
    inner = input_size(*original)
    found: list[Segment] = []
    for start in range(0, len(queries), _MASKS_AT_ONCE):
        part = slice(start, start + _MASKS_AT_ONCE)
        logits = full_size(mask_logits[queries[part]].float(), padded, inner, original)
        inside = logits > 0
        certainty = (logits.sigmoid() * inside).flatten(1).sum(1) / (inside.flatten(1).sum(1) + 1e-6)
        scores = (best[likely][part] * certainty).tolist()
        for score, label, mask in zip(scores, labels[part].tolist(), inside, strict=True):
            if score > threshold:
                left, top, right, bottom = tight_box(mask)
                pixels = mask[top:bottom, left:right].cpu().numpy()
                box = (float(left), float(top), float(right), float(bottom))
                found.append(Segment(CLASS_NAMES[label], score, box, mask=pixels))
    return found


class _Network:
    """The loaded network on its device."""

    def __init__(self, file: Path, device: torch.device, dtype: Precision) -> None:
        import torch
        from transformers import Mask2FormerForUniversalSegmentation

        state = mmdet_checkpoint.read_checkpoint(file)
        with mmdet_checkpoint.untouched_random_state():
            model: Any = Mask2FormerForUniversalSegmentation(network_config())
        model.load_state_dict(mmdet_checkpoint.convert(state, model.state_dict(), str(file)))
        self.device = device
        self.dtype: torch.dtype = getattr(torch, dtype)
        self._model = placed(model.eval().requires_grad_(False), device, torch.float32, "GenEval's detector")
        self._mean = torch.tensor(_MEAN, device=device)[:, None, None]
        self._scale = 1 / torch.tensor(_STD, device=device)[:, None, None]

    def __call__(self, images: Images, channel_order: ChannelOrder) -> list[list[Segment]]:
        """The objects of each picture; images uint8 [N, H, W, 3]."""
        import torch

        with torch.inference_mode():
            pixels = torch.from_numpy(network_input(images, channel_order))
            output = self.forward(pixels)
            padded, original = (pixels.shape[1], pixels.shape[2]), (images.shape[1], images.shape[2])
            pairs = zip(output.class_queries_logits, output.masks_queries_logits, strict=True)
            return [segments(classes, masks, padded, original) for classes, masks in pairs]

    def forward(self, pixels: Tensor) -> Any:
        """The network's output for pictures as :func:`network_input` makes them, uint8 [N, h, w, 3]."""
        import torch

        values = pixels.to(self.device).permute(0, 3, 1, 2).float()
        # Weights stay float32: autocast keeps positions and normalisations exact and reduces the products.
        reduced = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype if reduced else torch.bfloat16, enabled=reduced):
            return self._model(pixel_values=(values - self._mean) * self._scale)


class Mask2FormerDetector:
    """COCO's 80 classes by MMDetection's Mask2Former, ten colours by CLIP ViT-L/14: GenEval's own pair.

    Args:
        channel_order: "rgb" shows the detector the pictures as they are, as GenEval does; "swapped" exchanges red
            and blue first, as the training rewards of Flow-GRPO and DiffusionNFT do. Colours are always read right.
        device: "auto" (this process's GPU where there is one), "cpu", "cuda" or "cuda:N". On a GPU convolutions
            follow PyTorch's own setting for TF32.
        dtype: "float32", or "bfloat16" or "float16" for autocast; part of the version, since scores shift.
        batch_size: pictures the network sees at once; halved once when the GPU's memory does not hold them.
        weights: the MMDetection ``.pth`` file; None: the one ``ramctl download-weights`` fetches.

    Raises:
        UsageError: an option out of its range.
    """

    name = "mask2former"
    class_names: Sequence[str] = CLASS_NAMES
    colors: Sequence[str] = COLORS

    def __init__(
        self,
        channel_order: ChannelOrder = "rgb",
        device: str = "auto",
        dtype: Precision = "float32",
        batch_size: int = 8,
        weights: str | None = None,
    ) -> None:
        choices: Mapping[str, tuple[str, tuple[str, ...]]] = {
            "channel_order": (channel_order, CHANNEL_ORDERS),
            "dtype": (dtype, PRECISIONS),
        }
        for option, (value, known) in choices.items():
            if value not in known:
                raise UsageError(f"The detector 'mask2former' has no {option} {value!r}; known: {', '.join(known)}.")
        if batch_size < 1:
            raise UsageError(f"The detector 'mask2former': batch_size is {batch_size}, it must be 1 or more.")
        self.channel_order: ChannelOrder = channel_order
        self.device = device
        self.dtype: Precision = dtype
        self.batch_size = batch_size
        self.weights = None if weights is None else Path(weights).expanduser()
        self._colors = ColorNamer(device, dtype)
        self._network: _Network | None = None
        self._batches: Batches | None = None

    @functools.cached_property
    def version(self) -> str:
        """Weights of both networks (SHA-256, first 12 digits), processing, channel order and precision.

        Raises:
            MissingDependencyError: the weights of one of them are not there.
        """
        if self.weights is None:
            from ramctl.weights import fingerprint

            digest = fingerprint(mmdet_checkpoint.ENTRY, mmdet_checkpoint.FILE)
        else:
            digest = file_sha256(self._file())[:12]
        return f"{digest} {PROCESSING} channels={self.channel_order} dtype={self.dtype} colors={self._colors.version}"

    def load(self) -> None:
        """Read both networks' weights.

        Raises:
            MissingDependencyError: a package or a file of weights is not there.
            ScorerError: the file does not hold the detector's weights.
            UsageError: there is no such device.
        """
        file = self._file()
        try:
            import cv2  # noqa: F401 - needed by the first picture
            import scipy  # noqa: F401 - transformers' class refuses to be made without it
            from transformers import Mask2FormerForUniversalSegmentation  # noqa: F401
        except ImportError as error:
            package = {"cv2": "opencv-python-headless"}.get(error.name or "", error.name or "transformers")
            raise MissingDependencyError(
                f"The detector 'mask2former' needs the package {package}, which does not import ({error}): "
                f"pip install {package}"
            ) from None
        from ramctl.scorers.clip import Batches

        device = scorer_device(self.device)
        self._colors.load()
        self._network = _Network(file, device, self.dtype)
        self._batches = Batches(self.batch_size, "geneval")

    def detect(self, images: Images) -> list[list[Detection]]:
        """The objects of each picture with a score above 0.3, colours not named yet; uint8 [N, H, W, 3] RGB.

        Raises:
            DataError: the pictures have no pixels.
            ScorerError: the network's output is not finite.
            OutOfMemoryError: the GPU's memory does not hold half a batch either.
        """
        if self._network is None or self._batches is None:
            self.load()
        network, batches = self._network, self._batches
        assert network is not None and batches is not None
        parts = batches.parts(len(images), lambda part: network(images[part], self.channel_order))
        return [[*objects] for part in parts for objects in part]

    def name_colors(self, objects: Sequence[tuple[Images, Detection]]) -> list[str | None]:
        """The colour of each object in its picture, uint8 [H, W, 3]; None for one without pixels.

        Raises:
            DataError: an object is not one of :meth:`detect`'s, or its mask does not fit the picture.
        """
        crops: list[Images | None] = []
        for image, detection in objects:
            if not isinstance(detection, Segment):
                raise DataError(f"The object {detection.class_name!r} has no mask to read a colour from.")
            crops.append(object_crop(image, detection.box, detection.mask))
        return self._colors.name(crops, [detection.class_name for _, detection in objects])

    def examples(self) -> Sequence[KnownPicture]:
        """Two pictures that show nothing, which any working detector agrees on, and a drawn stop sign.

        What the official weights say of the drawing was never seen by us, so it is reported and does not decide.
        """
        dog = Prompt("a photo of a dog", {"tag": "single_object", "include": [{"class": "dog", "count": 1}]})
        clause = {"class": "stop sign", "count": 1, "color": "red"}
        sign = Prompt("a photo of a red stop sign", {"tag": "colors", "include": [clause]})
        grey = np.full((512, 512, 3), 128, dtype=np.uint8)
        return (
            KnownPicture(grey, dog, strict=False),
            KnownPicture(grey, sign, strict=False),
            KnownPicture(stop_sign(), sign, strict=True, decides=False),
        )

    def _file(self) -> Path:
        if self.weights is None:
            from ramctl.weights import weight_file

            return weight_file(mmdet_checkpoint.ENTRY, mmdet_checkpoint.FILE)
        if not self.weights.is_file():
            raise MissingDependencyError(
                f"The detector's weights {self.weights} are not there. Leave the option out and run: "
                f"ramctl download-weights {mmdet_checkpoint.ENTRY}"
            )
        return self.weights


def stop_sign() -> Images:
    """A drawn red octagon with a white rim and STOP on it, before sky and grass: uint8 [512, 512, 3]."""
    from PIL import Image, ImageDraw, ImageFont

    picture = Image.new("RGB", (1024, 1024), (150, 190, 230))
    draw = ImageDraw.Draw(picture)
    draw.rectangle((0, 800, 1024, 1024), fill=(90, 130, 60))
    draw.rectangle((496, 400, 528, 960), fill=(120, 120, 125))
    for radius, color in ((300, (245, 245, 245)), (280, (190, 20, 30))):
        draw.regular_polygon((512, 400, radius), n_sides=8, rotation=22.5, fill=color)
    font = ImageFont.load_default(180)
    draw.text((512, 400), "STOP", fill=(245, 245, 245), font=font, anchor="mm", stroke_width=6)
    return np.asarray(picture.resize((512, 512), Image.Resampling.LANCZOS))
