"""CLIP encoders, their image preparation, and what their users share: one copy of the weights, batches that shrink.

PickScore, HPSv2, the aesthetic predictor, CLIPScore and GenEval's colours all measure an angle between a picture and a
text (or a fixed vector) in some CLIP's space. Import this module inside ``load``: it needs torch.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ramctl.errors import DataError, OutOfMemoryError, ScorerError, UsageError
from ramctl.scorers.base import Images
from ramctl.scorers.clip_checkpoints import CONFIG_FILE, MODEL_FILE, LoadedClip, load_hub_clip
from ramctl.scorers.clip_tokens import HUB_FILES, Tokenise, hub_tokenizer
from ramctl.scorers.devices import placed, scorer_device
from ramctl.weights import fingerprint

#: Mean and deviation of each channel, of pixels in [0, 1]: OpenAI's, used by every CLIP here.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

#: Strips longer than this many times their width are cut around the middle before the crop: enlarged whole, a strip of
#: one pixel's width takes gigabytes.
MAX_ASPECT = 1000

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Crop = Literal["floor", "round"]
T = TypeVar("T")


# --- pictures


def preprocess(image: Images, size: int = 224, *, crop: Crop = "floor") -> Tensor:
    """CLIP's own preparation: shorter side to ``size`` (bicubic, Pillow), centre crop, mean and deviation.

    Args:
        image: uint8 [H, W, 3] RGB.
        size: side of the result in pixels.
        crop: where the crop begins when an odd number of pixels is cut: ``floor`` as the hub's image processors,
            ``round`` (half to even) as torchvision, hence OpenAI's and open_clip's own code.

    Returns:
        float32 [3, size, size], normalised.

    Raises:
        DataError: a picture without pixels.
    """
    picture = _limit_aspect(_checked(image))
    height, width = picture.shape[:2]
    short = min(height, width)
    # Truncated, as in all published code.
    new_width, new_height = int(size * width / short), int(size * height / short)
    resized = np.asarray(Image.fromarray(picture).resize((new_width, new_height), Image.Resampling.BICUBIC))
    top, left = (_offset(side - size, crop) for side in (new_height, new_width))
    return normalise(to_unit(resized[top : top + size, left : left + size]))


def to_unit(image: Images) -> Tensor:
    """uint8 [H, W, 3] as float32 [3, H, W] in [0, 1].

    Raises:
        DataError: a picture without pixels.
    """
    # A copy: torch warns of arrays that must not be written to.
    return torch.from_numpy(np.array(_checked(image))).permute(2, 0, 1).contiguous().float() / 255


def resize_tensor(pixels: Tensor, height: int, width: int, mode: Literal["bilinear", "bicubic"]) -> Tensor:
    """float32 [3, H, W] to another size with antialiasing, unclamped: what torchvision does to tensors since 0.17."""
    if pixels.shape[1:] == (height, width):
        return pixels
    resized = torch.nn.functional.interpolate(
        pixels[None], size=(height, width), mode=mode, align_corners=False, antialias=True
    )
    return resized[0]


def normalise(pixels: Tensor) -> Tensor:
    """[3, H, W] in [0, 1] less CLIP's channel means, over their deviations."""
    mean, std = (torch.tensor(values, dtype=pixels.dtype).view(3, 1, 1) for values in (MEAN, STD))
    return (pixels - mean) / std


def _checked(image: Images) -> Images:
    if not image.size:
        raise DataError("the picture has no pixels")
    return image


def _limit_aspect(image: Images) -> Images:
    height, width = image.shape[:2]
    most = min(height, width) * MAX_ASPECT
    top, left = max(0, height - most) // 2, max(0, width - most) // 2
    return np.ascontiguousarray(image[top : top + most, left : left + most])


def _offset(spare: int, crop: Crop) -> int:
    return spare // 2 if crop == "floor" else round(spare / 2)


# --- encoders


class ClipEncoder:
    """A CLIP that turns pictures and texts into directions.

    Attributes:
        version: names weights, tokenizer and precision; part of a scorer's version.
        device, dtype: where and in what precision it runs.
        logit_scale: exp of the learned temperature.
        image_size: side of the pictures it takes, in pixels.
        width: numbers in a direction (D).
    """

    def __init__(
        self, loaded: LoadedClip, tokenise: Tokenise, version: str, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.version = version
        self.device = device
        self.dtype = dtype
        self.logit_scale = loaded.logit_scale
        self._tokenise = tokenise
        text = loaded.model.config.text_config
        self.image_size: int = loaded.model.config.vision_config.image_size
        self.width: int = loaded.model.config.projection_dim
        self._context: int = text.max_position_embeddings
        end = tokenise("")[-1]
        # The text's vector is read at the end token: the network and the tokenizer must agree on which that is.
        if end >= text.vocab_size or (text.eos_token_id not in (2, end)):
            raise ScorerError(
                f"{version}: the tokenizer ends texts with token {end}, the network has {text.vocab_size} tokens and "
                f"ends with {text.eos_token_id}. These files do not belong together."
            )
        self._model = placed(loaded.model, device, dtype, version)

    def tokens(self, text: str) -> list[int]:
        """Token ids of a text, start and end included, at most 77.

        Raises:
            DataError: the text cannot be encoded (half of a surrogate pair).
        """
        try:
            return self._tokenise(text)
        except (TypeError, UnicodeError):
            raise DataError(f"the text {text!r} is not valid Unicode") from None

    def image_features(self, pixels: Tensor) -> Tensor:
        """Directions of pictures.

        Args:
            pixels: float32 [N, 3, S, S], normalised (:func:`preprocess`), on any device.

        Returns:
            float32 [N, D] of length 1, on the CPU.
        """
        return self._features(lambda: self._model.get_image_features(pixel_values=pixels.to(self.device, self.dtype)))

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Directions of texts.

        Each is padded to the full context, so that a text's numbers do not depend on its neighbours.

        Returns:
            float32 [N, D] of length 1, on the CPU.

        Raises:
            DataError: a text cannot be encoded.
        """
        ids = torch.zeros(len(texts), self._context, dtype=torch.long)
        for row, text in enumerate(texts):
            tokens = self.tokens(text)
            ids[row, : len(tokens)] = torch.tensor(tokens)
        return self._features(lambda: self._model.get_text_features(input_ids=ids.to(self.device)))

    def _features(self, run: Callable[[], Any]) -> Tensor:
        # A caller may be under autocast: the precision here is the one the version names.
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            output = run()
            # transformers 5 wraps what 4 returned as it was.
            features: Tensor = (output if isinstance(output, Tensor) else output.pooler_output).float()
            directions: Tensor = features / features.norm(dim=-1, keepdim=True)
            return directions.cpu()


def scorer_dtype(name: str) -> torch.dtype:
    """The precision an option names.

    Raises:
        UsageError: another word than float32, bfloat16 or float16.
    """
    if name not in _DTYPES:
        raise UsageError(f"A scorer's dtype is {name!r}; it must be one of {', '.join(_DTYPES)}.")
    return _DTYPES[name]


_shared: weakref.WeakValueDictionary[tuple[str, str], ClipEncoder] = weakref.WeakValueDictionary()
_shared_lock = threading.Lock()


def shared_encoder(
    version: str, device: str, dtype: str, load: Callable[[], LoadedClip], tokenizer: Callable[[], Tokenise]
) -> ClipEncoder:
    """The encoder of this ``version`` on this device; loaded by the first who asks, gone with the last who holds it.

    Raises:
        MissingDependencyError, ScorerError: from ``load`` and ``tokenizer``.
        UsageError: no such device or dtype.
    """
    where, precision = scorer_device(device), scorer_dtype(dtype)
    key = (version, str(where))
    with _shared_lock:
        encoder = _shared.get(key)
        if encoder is None:
            made_tokenizer = tokenizer()  # small, so what is missing shows before gigabytes are read
            encoder = ClipEncoder(load(), made_tokenizer, version, where, precision)
            _shared[key] = encoder
        return encoder


CLIP_VIT_L14 = "clip-vit-l14"


def clip_vit_l14_version(dtype: str = "float32") -> str:
    """Version of :func:`clip_vit_l14` without loading it.

    Raises:
        MissingDependencyError: the weights are not there.
    """
    return hub_version(CLIP_VIT_L14, CLIP_VIT_L14, dtype)


def hub_version(model: str, tokenizer: str, dtype: str) -> str:
    """Names the files of two weights entries by their SHA-256, and the precision.

    Raises:
        MissingDependencyError: a file is not there.
    """
    files = [(model, MODEL_FILE), (model, CONFIG_FILE), *((tokenizer, file) for file in HUB_FILES)]
    weights, *others = (fingerprint(name, file) for name, file in files)
    return "/".join([f"{model}-{weights}", f"config-{others[0]}", f"tokenizer-{others[1]}", dtype])


def clip_vit_l14(device: str = "auto", dtype: str = "float32") -> ClipEncoder:
    """OpenAI's CLIP ViT-L/14, one instance per device and dtype for all who ask.

    Raises:
        MissingDependencyError: the weights are not there.
        ScorerError: they cannot be read, or are of a CLIP with another activation.
        OutOfMemoryError: the GPU has no room for them.
        UsageError: no such device or dtype.
    """
    return shared_encoder(
        clip_vit_l14_version(dtype), device, dtype, _load_clip_vit_l14, lambda: hub_tokenizer(CLIP_VIT_L14)
    )


def _load_clip_vit_l14() -> LoadedClip:
    loaded = load_hub_clip(CLIP_VIT_L14)
    for tower in (loaded.model.config.text_config, loaded.model.config.vision_config):
        # OpenAI trained with x * sigmoid(1.702 x). With the usual GELU everything still runs, and is wrong.
        if tower.hidden_act != "quick_gelu":
            raise ScorerError(
                f"The config.json of {CLIP_VIT_L14} asks for {tower.hidden_act!r}, but OpenAI's CLIP was trained with "
                f"'quick_gelu': ramctl download-weights {CLIP_VIT_L14} --verify"
            )
    return loaded


# --- batches


class Batches:
    """Work on many items, a batch at a time; a GPU that runs out of memory halves the batch once.

    Args:
        size: items in a batch. owner: the scorer, for messages.
    """

    def __init__(self, size: int, owner: str) -> None:
        self.size = size
        self.owner = owner
        self._halved = False

    def run(self, count: int, work: Callable[[slice], Tensor]) -> Tensor:
        """``work`` on slices of ``range(count)``, its results concatenated along dimension 0.

        Args:
            count: items, at least one.
            work: takes a slice of items, returns a tensor [len, ...].

        Raises:
            OutOfMemoryError: out of GPU memory again after the batch was halved.
        """
        return torch.cat(self.parts(count, work))

    def parts(self, count: int, work: Callable[[slice], T]) -> list[T]:
        """The results of ``work`` on consecutive slices of ``range(count)``; raises what :meth:`run` raises."""
        parts: list[T] = []
        done = 0
        while done < count:
            stop = min(done + self.size, count)
            try:
                parts.append(work(slice(done, stop)))
                done = stop
                continue
            except torch.OutOfMemoryError:
                pass
            # Outside of the handler: its traceback would keep the batch's memory.
            self._halve(stop - done)
        return parts

    def _halve(self, items: int) -> None:
        torch.cuda.empty_cache()
        if self._halved or items == 1:
            raise OutOfMemoryError(
                f"The GPU's memory does not hold the scorer {self.owner!r} at {items} images a time: give it a smaller "
                f'batch_size, dtype = "bfloat16" or device = "cpu".'
            )
        self._halved = True
        self.size = items // 2
