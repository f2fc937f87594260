"""Flow-GRPO's OCR rule (arXiv 2505.05470, r = max(1 - N_e / N_ref, 0)), as its code and DiffusionNFT's compute it.

All recognised lines joined without a separator, ASCII spaces removed and lower-cased on both sides; the distance is
0 when the target occurs in the recognised text, else their Levenshtein distance, at most the target's length.
"""

from __future__ import annotations

from ramctl.errors import DataError
from ramctl.prompts import Prompt

RULE = "flow-grpo-ocr-1"


def target_text(prompt: Prompt, where: str | None = None) -> str:
    """The text to read: ``metadata["target"]``, else what is between the first two straight double quotes.

    ``where`` names the prompt in error messages, by default with its text.

    Raises:
        DataError: neither is there, or the metadata's target is not a string.
    """
    where = where or f"Prompt {prompt.text!r}"
    if "target" in prompt.metadata:
        target = prompt.metadata["target"]
        if not isinstance(target, str):
            raise DataError(f'{where}: its "target" must be a string, got {target!r}.')
        return target
    parts = prompt.text.split('"')
    if len(parts) < 3:
        raise DataError(
            f"{where} names no text to read: put it between straight double quotes "
            f'("…") or add the key "target" to its line.'
        )
    return parts[1]


def normalise(text: str) -> str:
    """Text as the rule compares it: without ASCII spaces, in lower case; nothing else is folded."""
    return text.replace(" ", "").lower()


def readable_target(prompt: Prompt, where: str | None = None) -> tuple[str, str]:
    """The target as it stands and as the rule compares it, which is never empty; ``where`` as in ``target_text``.

    Raises:
        DataError: there is none, or nothing but spaces: the rule would divide by its length.
    """
    target = target_text(prompt, where)
    wanted = normalise(target)
    if not wanted:
        raise DataError(
            f"{where or f'Prompt {prompt.text!r}'}: its target {target!r} holds nothing to read; "
            f'write a text between the straight double quotes or as its "target".'
        )
    return target, wanted


def capped_distance(recognised: str, target: str) -> int:
    """The rule's distance of normalised texts: 0 when the target occurs, else edits, at most its length."""
    from rapidfuzz.distance import Levenshtein

    return 0 if target in recognised else min(Levenshtein.distance(recognised, target), len(target))
