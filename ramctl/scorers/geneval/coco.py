"""The 80 classes of COCO in its order, under the names GenEval's prompts use: one list for prompts and detector."""

from __future__ import annotations

from ramctl.promptsets.geneval import CLASSES

CLASS_NAMES: tuple[str, ...] = CLASSES
