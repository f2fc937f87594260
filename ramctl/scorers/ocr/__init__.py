"""Is the prompt's quoted text written in the picture? Flow-GRPO's OCR reward with a choice of two engines.

``rule`` compares texts, ``engine`` says what an engine is, ``rapid`` and ``paddle`` are the two, ``scorer`` joins them.
"""

from ramctl.scorers.ocr.engine import limit_aspect
from ramctl.scorers.ocr.rule import capped_distance, normalise, target_text
from ramctl.scorers.ocr.scorer import OcrScorer

__all__ = ["OcrScorer", "capped_distance", "limit_aspect", "normalise", "target_text"]
