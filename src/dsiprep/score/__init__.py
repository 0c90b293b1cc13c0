"""How far derivatives are from the truth of a phantom, in millimetres and degrees."""

from dsiprep.score.compare import Score, score
from dsiprep.score.table import print_scores

__all__ = ["Score", "print_scores", "score"]
