"""What a backbone is worth: weighted kNN, linear probes, and measures that need no labels.

Evaluators take tensors and callables only. They never see a method, a loader or a run folder, so the same
function serves the trainer, the `eval` command and a notebook. Import them by file:

    from relssl.evaluators.knn import knn_accuracy, weighted_knn
    from relssl.evaluators.linear import cached_batches, linear_protocol, train_linear_probe
    from relssl.evaluators.label_free import alignment, neighbours_of, rankme, uniformity

Accuracies are percentages everywhere.
"""
