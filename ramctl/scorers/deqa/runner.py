"""DeQA-Score behind a pipe: this file runs in DeQA's own environment, started by ``ramctl.scorers.deqa.scorer``.

It imports nothing of ramctl: the standard library, numpy, Pillow, torch and the transformers release that the model's
own code works with (``environment.py`` beside it makes that environment).

Protocol, in both directions: four bytes (big endian) with the length of a JSON header, the header, and after that of a
``score`` request the pixels as they are (uint8, rows of RGB). Requests and their replies:

    {"do": "load", "folder": PATH, "device": "cuda:0", "dtype": "float16"}
        -> {"ok": true, "versions": {"python": …, "torch": …, "transformers": …}}
    {"do": "score", "shape": [N, H, W, 3]} + N*H*W*3 bytes
        -> {"ok": true, "scores": [N numbers between 1 and 5, null where not finite]}
    any -> {"ok": false, "kind": "missing" | "out-of-memory" | "error", "error": TEXT, "transformers": VERSION | null}

The end of its input ends it, so it does not outlive the process that started it.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
import sys
import tempfile
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

# The rule (DeQA-Score, arXiv 2501.11561, as its repository's Scorer computes it). The ids are those of the model's
# tokenizer (LLaMA-2) for "USER: How would you rate the quality of this image?\n<image>\nASSISTANT: The quality of the
# image is"; the next token is one of five words.
BEFORE_IMAGE = (1, 3148, 1001, 29901, 1128, 723, 366, 6554, 278, 11029, 310, 445, 1967, 29973, 13)
IMAGE_TOKEN = -200
AFTER_IMAGE = (29871, 13, 22933, 9047, 13566, 29901, 450, 11029, 310, 278, 1967, 338)
#: excellent, good, fair, poor, bad, and what they are worth.
LEVEL_IDS = (15129, 1781, 6534, 6460, 4319)
LEVEL_VALUES = (5.0, 4.0, 3.0, 2.0, 1.0)

SIDE = 448
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)

LONGEST_HEADER = 1 << 20


# --- the pipe


def read_exactly(stream: BinaryIO, size: int) -> bytes:
    """``size`` bytes.

    Raises:
        EOFError: the stream ends before them.
    """
    parts: list[bytes] = []
    left = size
    while left:
        part = stream.read(left)
        if not part:
            raise EOFError(f"the stream ended {left} bytes early")
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def read_header(stream: BinaryIO) -> dict[str, Any]:
    """The next message's header.

    Raises:
        EOFError: there is none.
        ValueError: what is there is no header.
    """
    (length,) = struct.unpack(">I", read_exactly(stream, 4))
    if length > LONGEST_HEADER:
        raise ValueError(f"a header of {length} bytes")
    header = json.loads(read_exactly(stream, length))
    if not isinstance(header, dict):
        raise ValueError("a header that is not an object")
    return header


def write_header(stream: BinaryIO, header: Mapping[str, Any]) -> None:
    """Send one message without pixels."""
    data = json.dumps(header, allow_nan=False).encode()
    stream.write(struct.pack(">I", len(data)) + data)
    stream.flush()


# --- the model


def preprocess(picture: NDArray[np.uint8]) -> NDArray[np.float32]:
    """A picture ``uint8 [H, W, 3]`` as the model's input, float32 [3, 448, 448].

    Padded to a square with CLIP's mean colour, resized (Pillow, bicubic), normalised: CLIPImageProcessor's arithmetic
    in the same order and precision.
    """
    import numpy as np
    from PIL import Image

    height, width = picture.shape[:2]
    if height != width:
        side = max(height, width)
        square = np.empty((side, side, 3), dtype=np.uint8)
        square[:] = [int(mean * 255) for mean in PIXEL_MEAN]
        top, left = (side - height) // 2, (side - width) // 2
        square[top : top + height, left : left + width] = picture
        picture = square
    resized = np.asarray(Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    scaled = (resized * (1 / 255)).astype(np.float32)
    normalised = (scaled - np.array(PIXEL_MEAN, np.float32)) / np.array(PIXEL_STD, np.float32)
    return np.asarray(normalised.transpose(2, 0, 1), dtype=np.float32)


class Model:
    """DeQA-Score from a local folder, loaded with the code that lies in it.

    Args:
        folder: of the hub's layout: config.json, its code, weights, tokenizer.
        device: as torch names it. dtype: as torch names it, without "torch.".

    Raises:
        ValueError: the weights are incomplete, or the tokenizer is another one.
    """

    def __init__(self, folder: str, device: str, dtype: str) -> None:
        import torch
        import transformers

        _lay_out_code(Path(folder))
        _answer_from(folder)
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            trust_remote_code=True,
            attn_implementation="eager",
            torch_dtype=getattr(torch, dtype),
            low_cpu_mem_usage=True,
            output_loading_info=True,
        )
        # inv_freq is computed, not learned, and not saved by every release.
        missing = sorted(key for key in report["missing_keys"] if not key.endswith("inv_freq"))
        if missing:
            raise ValueError(f"the weights in {folder} lack {len(missing)} tensors: {', '.join(missing[:3])}")
        known = getattr(model, "preferential_ids_", None)
        if known is not None and tuple(known) != LEVEL_IDS:
            raise ValueError(f"the tokenizer in {folder} numbers the five quality words {list(known)}, not {LEVEL_IDS}")
        self._model = model.to(device).eval()
        self._device = device
        self._dtype = getattr(torch, dtype)
        self._ids = torch.tensor([[*BEFORE_IMAGE, IMAGE_TOKEN, *AFTER_IMAGE]], device=device)

    def scores(self, pictures: NDArray[np.uint8]) -> list[float | None]:
        """Expected quality of pictures ``uint8 [N, H, W, 3]``: N numbers between 1 and 5, None where not finite."""
        import numpy as np
        import torch

        pixels = torch.from_numpy(np.stack([preprocess(picture) for picture in pictures]))
        with torch.inference_mode():
            output = self._model(
                input_ids=self._ids.repeat(len(pictures), 1),
                images=pixels.to(self._device, self._dtype),
                use_cache=False,
            )
            # The official code does this last step in float16, which leaves steps of 0.002 to 0.004 in the score.
            levels = torch.softmax(output["logits"][:, -1, list(LEVEL_IDS)].float(), dim=-1).double().cpu()
        scores = (levels @ torch.tensor(LEVEL_VALUES, dtype=torch.float64)).tolist()
        return [score if math.isfinite(score) else None for score in scores]


def _lay_out_code(folder: Path) -> None:
    """Put all of a folder's modules where transformers imports its code from.

    By itself it copies the model's module and those that this one imports, not those that those import.
    """
    place = Path(os.environ["HF_MODULES_CACHE"], "transformers_modules", folder.name)
    place.mkdir(parents=True, exist_ok=True)
    for file in folder.glob("*.py"):
        shutil.copy(file, place)


def _answer_from(folder: str) -> None:
    """Let the model's code find tokenizer and image processor in its folder where it asks for them by hub address."""
    import transformers

    def local(original: Any) -> Any:
        def from_pretrained(cls: type, name: Any, *arguments: Any, **options: Any) -> Any:
            return original.__func__(cls, name if Path(str(name)).is_dir() else folder, *arguments, **options)

        return classmethod(from_pretrained)

    for kind in (transformers.AutoTokenizer, transformers.LlamaTokenizer, transformers.CLIPImageProcessor):
        kind.from_pretrained = local(kind.from_pretrained)


# --- requests


def _load(request: Mapping[str, Any]) -> tuple[Model, dict[str, str]]:
    import platform

    model = Model(request["folder"], request["device"], request["dtype"])
    import torch
    import transformers

    versions = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": str(transformers.__version__),
    }
    return model, versions


def _score(model: Model | None, shape: Sequence[int], stream: BinaryIO) -> list[float | None]:
    # Read before anything can fail: pixels left in the pipe would be taken for the next header.
    data = read_exactly(stream, math.prod(shape))
    import numpy as np

    if model is None:
        raise ValueError("asked to score before load")
    return model.scores(np.frombuffer(data, dtype=np.uint8).reshape(shape))


def _failure(error: Exception) -> dict[str, Any]:
    """The reply to a request that failed."""
    name = type(error).__name__
    if name == "OutOfMemoryError":
        kind = "out-of-memory"
        sys.modules["torch"].cuda.empty_cache()
    else:
        kind = "missing" if isinstance(error, ImportError) else "error"
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
    version = getattr(sys.modules.get("transformers"), "__version__", None)
    return {"ok": False, "kind": kind, "error": f"{name}: {text}", "transformers": version}


def serve(requests: BinaryIO, replies: BinaryIO) -> None:
    """Answer requests until the input ends."""
    model: Model | None = None
    while True:
        try:
            request = read_header(requests)
        except EOFError:
            return
        try:
            if request["do"] == "load":
                model, versions = _load(request)
                reply: dict[str, Any] = {"ok": True, "versions": versions}
            elif request["do"] == "score":
                reply = {"ok": True, "scores": _score(model, request["shape"], requests)}
            else:
                raise ValueError(f"an unknown request {request['do']!r}")
        except EOFError:
            return
        except Exception as error:
            traceback.print_exc()
            reply = _failure(error)
        write_header(replies, reply)


def main() -> None:
    """Serve standard input and output."""
    # The pipes are the protocol's alone: whatever the model's code prints goes to standard error.
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    # transformers copies a folder's code into this place and imports it from there. Each runner has its own: several at
    # once do not write over one another, and no older copy is used.
    modules = tempfile.mkdtemp(prefix="ramctl-deqa-")
    os.environ.update(HF_MODULES_CACHE=modules, HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
    try:
        serve(requests, replies)
    except BrokenPipeError:
        pass  # who asked is gone
    finally:
        shutil.rmtree(modules, ignore_errors=True)


if __name__ == "__main__":
    main()
