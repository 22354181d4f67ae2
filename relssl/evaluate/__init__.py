"""`relssl eval`: what a backbone is worth, written into results.json beside it.

Weights come from a run folder or a `backbone.safetensors`; both carry the recipe, which says how images are
prepared and which protocol is the method's own. What is computed from features alone is in `relssl.evaluators`.
"""

from relssl.evaluate.analysis import analyse
from relssl.evaluate.few_labels import evaluate_few_labels
from relssl.evaluate.knn import evaluate_knn
from relssl.evaluate.linear import evaluate_linear
from relssl.evaluate.probe import evaluate_probe
from relssl.evaluate.weights import Weights, initial_backbone, open_weights

__all__ = [
    "Weights",
    "analyse",
    "evaluate_few_labels",
    "evaluate_knn",
    "evaluate_linear",
    "evaluate_probe",
    "initial_backbone",
    "open_weights",
]
