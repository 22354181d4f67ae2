"""`relssl eval`: what a backbone is worth, written into results.json beside it.

Weights come from a run folder or a `backbone.safetensors`; both carry the recipe, which says how images are
prepared and which protocol is the method's own. What is computed from features alone is in `relssl.evaluators`.
"""

from relssl.evaluate.knn import evaluate_knn
from relssl.evaluate.linear import evaluate_linear
from relssl.evaluate.weights import Weights, initial_backbone, open_weights

__all__ = ["Weights", "evaluate_knn", "evaluate_linear", "initial_backbone", "open_weights"]
