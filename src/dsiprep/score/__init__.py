"""Compare derivatives with the ground truth of a phantom."""

from dsiprep.score.compare import Score, score
from dsiprep.score.table import print_scores

__all__ = ["Score", "print_scores", "score"]
