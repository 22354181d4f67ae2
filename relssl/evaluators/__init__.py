"""What a backbone is worth: weighted kNN, linear probes, fine-tuning, retrieval, and measures that need no labels.

Evaluators take tensors, modules and callables only. They never see a method, a loader or a run folder, so the same
function serves the trainer, the `eval` command and a notebook. Import them by file:

    from relssl.evaluators.knn import knn_accuracies, knn_accuracy, knn_protocol, weighted_knn
    from relssl.evaluators.linear import cached_batches, linear_protocol, train_linear_probe
    from relssl.evaluators.finetune import finetune, finetune_protocol
    from relssl.evaluators.retrieval import retrieval_scores
    from relssl.evaluators.label_free import alignment, neighbours_of, rankme, uniformity

Accuracies are percentages everywhere.
"""
