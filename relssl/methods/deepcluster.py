"""DeepCluster (Caron et al., ECCV 2018, arXiv:1807.05520), as the baseline of Self-Supervised Relational Reasoning.

    views: view (1)

    before each epoch:
        f = encoder(un-augmented images)                          all of them, evaluation mode
        assignments = k-means(normalize(PCA-whiten(f)))           into C clusters, 10 per class
        the classifier's last layer starts anew                   N(0, 0.01) and 0; Adam keeps its moments
    loss = CE( classifier(encoder(view)), assignment ), class c weighted by 1 - n_c / n

The original clusters augmented images, and trains on images that went through the transform twice and wrapped
around on the way; both are mistakes that are not repeated here. Legend: n images of the data set, C clusters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pipelines.batch import ViewBatch
from pipelines.errors import ConfigError, RunError
from relssl import dist
from relssl.methods import base
from relssl.nets import NormMLPHead
from relssl.ops.rows import at_least_float32, spread

CLUSTERS_PER_CLASS = 10
_COLLAPSED = 1e-5  # spread of equal features
_UNREADABLE = 0.05  # share of the images; the loader stops long before
_MANY_FEATURES = 512  # from here on, PCA keeps half of the directions


class DeepClusterConfig(base.MethodConfig):
    name: str = "deepcluster"
    hidden_dim: int = Field(256, gt=0)
    num_clusters: int | None = Field(None, gt=1, description="10 x the number of classes when absent")
    restarts: int = Field(5, gt=0, description="runs of k-means per epoch; the tightest is kept")
    iterations: int = Field(30, gt=0, description="of k-means, at most")


class Method(base.Method):
    Config = DeepClusterConfig
    config: DeepClusterConfig
    VIEWS: ClassVar = {"view": (1, 1)}
    ACCUMULATION = "approximate"  # the loss is a weighted mean over one micro-batch
    assignments: Tensor
    class_weight: Tensor

    def __init__(self, make_backbone: Callable[[], Any], config: DeepClusterConfig, data: base.DataInfo):
        super().__init__(make_backbone, config, data)
        self.num_clusters = _number_of_clusters(config, data)
        self.encoder = make_backbone()
        self.classifier = NormMLPHead(self.encoder.feature_dim, config.hidden_dim, self.num_clusters)
        self.register_buffer("assignments", torch.zeros(data.num_samples, dtype=torch.int64))
        self.register_buffer("class_weight", torch.ones(self.num_clusters))

    def before_epoch(self, step: base.Step, encode: Callable[[], Tensor]) -> None:
        features = encode()
        labels = torch.zeros_like(self.assignments)
        if dist.rank() == 0:
            seed = int(torch.randint(2**31, (), generator=step.generator("k-means")))
            readable = _readable(features.cpu())  # other images belong to cluster 0, and are never shown
            points = whiten(features.cpu()[readable].numpy())
            found = torch.from_numpy(cluster(points, self.num_clusters, self.config, seed))
            labels[readable.to(labels.device)] = found.to(labels)
        self.assignments.copy_(dist.broadcast(labels))
        self.class_weight.copy_(weight_of_classes(self.assignments, self.num_clusters))
        with torch.no_grad():
            last = self.classifier.linear2
            last.weight.copy_(torch.empty(last.weight.shape).normal_(0, 0.01, generator=step.generator("classifier")))
            nn.init.zeros_(last.bias)

    def forward(self, batch: ViewBatch, step: base.Step) -> tuple[Tensor, dict[str, Tensor]]:
        features = self.encoder(batch.views["view"][0])
        logits = at_least_float32(self.classifier(features))
        target = self.assignments[batch.index]
        weight_C = self.class_weight.to(logits.dtype)
        summed = F.cross_entropy(logits, target, weight_C, reduction="sum")
        # The mean is over the weights of all ranks' images; the trainer averages over ranks by numbers of images.
        weight, images = dist.all_reduce_sum(torch.stack([weight_C[target].sum(), weight_C.new_tensor(len(target))]))
        loss = summed / weight * images / len(target)
        accuracy = (logits.argmax(1) == target).float().mean()
        return loss, {"accuracy": accuracy, "features_spread": spread(features)}


def whiten(features: np.ndarray) -> np.ndarray:
    """PCA with whitening, then rows of length 1; all directions below 512 features, half of them from there on.

    Args:
        features: (n, D) float32.

    Returns:
        (n, D') float32; signs of the directions are arbitrary.

    Raises:
        RunError: features that are not finite, or have collapsed.
    """
    from sklearn.decomposition import PCA

    if not np.isfinite(features).all():
        raise RunError("the features of the data set are not finite, and cannot be clustered,")
    if float(spread(torch.from_numpy(features))) < _COLLAPSED:
        raise RunError(
            "the features collapsed: all images of the data set have the same ones, and cannot be clustered,"
        )
    width = features.shape[1]
    kept = min(width if width < _MANY_FEATURES else width // 2, len(features))
    white = PCA(kept, whiten=True, svd_solver="full").fit_transform(features)
    length = np.linalg.norm(white, axis=1, keepdims=True)
    return white / np.where(length > 0, length, 1)


def _readable(features: Tensor) -> Tensor:
    """(n,) whether an image has features: few may be unreadable, and where all are NaN it is not the images."""
    absent = features.isnan().all(dim=1)
    return torch.ones_like(absent) if absent.float().mean() > _UNREADABLE else ~absent


def cluster(points: np.ndarray, num_clusters: int, config: DeepClusterConfig, seed: int) -> np.ndarray:
    """k-means with k-means++ starts: (n, D) float32 -> (n,) cluster of each row."""
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    kmeans = KMeans(num_clusters, n_init=config.restarts, max_iter=config.iterations, random_state=seed)
    with threadpool_limits(2):  # sums of more threads come in any order, and a resumed run must find the same clusters
        return kmeans.fit_predict(points)


def weight_of_classes(labels: Tensor, num_classes: int) -> Tensor:
    """1 - n_c / n, for labels (n,) int64 -> (C,) float32."""
    counts = torch.bincount(labels, minlength=num_classes)
    return 1 - counts.float() / len(labels)


def _number_of_clusters(config: DeepClusterConfig, data: base.DataInfo) -> int:
    if config.num_clusters is None and data.num_classes is None:
        raise ConfigError(
            "deepcluster takes 10 clusters per class, but the data has no labels: set method.num_clusters"
        )
    number = config.num_clusters or CLUSTERS_PER_CLASS * (data.num_classes or 0)
    if number > data.num_samples:
        raise ConfigError(
            f"method.num_clusters is {number}, more than the {data.num_samples} images; set it to at most that"
        )
    return number
