"""GenEval: objects, counts, colours and positions asked for in the prompt, checked with an object
detector."""

from ramctl.scorers.geneval.rules import Detection
from ramctl.scorers.geneval.scorer import Detector, GenEvalScorer, KnownPicture

__all__ = ["Detection", "Detector", "GenEvalScorer", "KnownPicture"]
