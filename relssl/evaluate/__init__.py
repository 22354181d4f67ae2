"""`relssl eval`: what a backbone is worth, written into results.json beside it.

Weights come from a run folder, one of its checkpoints or a `backbone.safetensors`; all carry the recipe, which says how
images are prepared and which protocol is the method's own. What is computed from features or images alone is in
`relssl.evaluators`.
"""

from relssl.evaluate.analysis import analyse
from relssl.evaluate.few_labels import evaluate_few_labels
from relssl.evaluate.finetune import evaluate_finetune
from relssl.evaluate.follow import follow_run
from relssl.evaluate.knn import evaluate_knn
from relssl.evaluate.linear import evaluate_heads, evaluate_linear
from relssl.evaluate.probe import evaluate_probe
from relssl.evaluate.retrieval import evaluate_retrieval
from relssl.evaluate.task import Portion
from relssl.evaluate.weights import Weights, evaluated_as, initial_backbone, open_weights

__all__ = [
    "Portion",
    "Weights",
    "analyse",
    "evaluate_few_labels",
    "evaluate_finetune",
    "evaluate_heads",
    "evaluate_knn",
    "evaluate_linear",
    "evaluate_probe",
    "evaluate_retrieval",
    "evaluated_as",
    "follow_run",
    "initial_backbone",
    "open_weights",
]
