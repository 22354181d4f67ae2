"""RotNet, Deep InfoMax and DeepCluster against the numbers of their originals, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.batch import ViewBatch
from pipelines.errors import ConfigError, RunError
from relssl.methods import deepcluster, deepinfomax, rotation
from relssl.methods.base import DataInfo, Step
from relssl.nets import build_backbone
from tests.relssl import golden

ARRAYS = golden.load("baselines")
DATA = DataInfo(num_samples=120, num_classes=3, global_batch=8, total_updates=10, updates_per_epoch=5)
STEP = Step(update=0, epoch=0, seed=3)


def array(name: str) -> Tensor:
    return golden.tensor(ARRAYS[name])


def deterministic_fill(module: torch.nn.Module) -> None:
    """The fill that the golden data prescribes for the global discriminator's weights."""
    for i, (name, value) in enumerate(module.state_dict().items()):
        j = torch.arange(value.numel(), dtype=torch.float64)
        s = torch.sin(43758.5453 * torch.sin(12.9898 * (j + 1) + 78.233 * (i + 1))).reshape(value.shape)
        fan_in = value[0].numel()
        value.copy_(0.05 * s if name.endswith("bias") else s * (2 / fan_in) ** 0.5)


# -- RotNet ----------------------------------------------------------------------------------------------------------


@pytest.mark.evidence(
    "rotation", "L0", "turned images, targets, and cross-entropy of given logits",
    golden="baselines", dtype="float32", tolerance="exact, loss 1e-6",
)  # fmt: skip
def test_rotations_are_the_originals() -> None:
    turned, targets = rotation.rotations(array("rotation__x"))
    assert torch.equal(turned, array("rotation__out"))
    assert torch.equal(targets, array("rotation__targets"))
    assert F.cross_entropy(array("rotation__logits"), targets).item() == pytest.approx(
        float(ARRAYS["rotation__ce"]), rel=1e-6
    )


def test_rotations_keep_the_memory_order() -> None:
    x = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    assert rotation.rotations(x)[0].is_contiguous(memory_format=torch.channels_last)


def test_rotation_refuses_what_is_not_square() -> None:
    with pytest.raises(ConfigError, match=r"must be square; got \(4, 6\)"):
        rotation.rotations(torch.zeros(2, 3, 4, 6))


# -- Deep InfoMax ----------------------------------------------------------------------------------------------------


@pytest.mark.evidence(
    "deepinfomax", "L0", "local term, prior term, their sum, and its gradient to features, map and discriminators",
    golden="baselines", dtype="float32", tolerance="loss 1e-5, gradient 1e-4", gradient=True,
)  # fmt: skip
def test_local_and_prior_terms_are_the_originals() -> None:
    y, stem = array("dim__y").requires_grad_(), array("dim__M").requires_grad_()
    local = deepinfomax.LocalDiscriminator(y.shape[1], stem.shape[1])
    prior = deepinfomax.PriorDiscriminator(y.shape[1])
    for name, module in (("local_d", local), ("prior_d", prior)):
        state = {k: golden.tensor(v, torch.float32) for k, v in golden.part(ARRAYS, f"dim__param.{name}.").items()}
        module.load_state_dict(state)
    local_loss = deepinfomax.contrast(*local(y, stem))
    prior_loss = 0.1 * prior(y, array("dim__prior"))
    total = local_loss + prior_loss
    total.backward()
    for got, name in ((local_loss, "local"), (prior_loss, "prior_term"), (total, "total")):
        assert got.item() == pytest.approx(float(ARRAYS[f"dim__{name}"]), rel=1e-5)
    gradients = {f"local_d.{k}": p.grad for k, p in local.named_parameters()}
    gradients |= {f"prior_d.{k}": p.grad for k, p in prior.named_parameters()}
    expected = {"y": y.grad, "M": stem.grad}
    compared = 0
    for key, value in golden.part(ARRAYS, "dim__grad").items():
        got = expected[key[1:]] if key.startswith("_") else gradients[key[1:]]
        np.testing.assert_allclose(got.numpy(), value, atol=1e-6, rtol=1e-4, err_msg=key)
        compared += 1
    assert compared == 6


@pytest.mark.evidence(
    "deepinfomax", "L0", "global term and its scores (weight 0 unless asked for); values only",
    golden="baselines", dtype="float32", tolerance="loss 1e-5, scores 1e-4",
)  # fmt: skip
def test_the_global_term_is_the_originals() -> None:
    y = array("dim__y")
    shape = [int(n) for n in ARRAYS["dim__global_M_shape"]]
    j = torch.arange(int(np.prod(shape)), dtype=torch.float64)
    stem = torch.sin(0.7 * j + 3 * torch.sin(0.013 * j)).abs().reshape(shape).float()
    head = deepinfomax.GlobalDiscriminator(y.shape[1], shape[1])
    with torch.no_grad():
        deterministic_fill(head)
        scores, others = head(y, stem)
    np.testing.assert_allclose(scores.flatten().numpy(), ARRAYS["dim__global_scores"], rtol=1e-4, atol=1e-5)
    assert deepinfomax.contrast(scores, others).item() == pytest.approx(float(ARRAYS["dim__global"]), rel=1e-5)


def infomax(**settings: float) -> deepinfomax.Method:
    torch.manual_seed(0)
    return deepinfomax.Method(lambda: build_backbone("conv4"), deepinfomax.DeepInfoMaxConfig(**settings), DATA)


def batch(images: int, places: Tensor | None = None, side: int = 16) -> ViewBatch:
    places = torch.arange(images) if places is None else places
    x = torch.randn(8, 3, side, side, generator=torch.Generator().manual_seed(1))[places]
    return ViewBatch({"view": (x,)}, places, torch.zeros(images, dtype=torch.int64), places)


def test_a_term_of_weight_zero_has_no_discriminator() -> None:
    names = {name.split(".")[0] for name, _ in infomax().named_parameters()}
    assert names == {"encoder", "local_d", "prior_d"}
    method = infomax(alpha=0.5, beta=0, gamma=0)
    assert {name.split(".")[0] for name, _ in method.named_parameters()} == {"encoder", "global_d"}
    loss, metrics = method(batch(8), STEP)
    assert metrics["global_loss"] == loss.detach()


def test_a_map_too_small_for_the_global_term_is_named_with_the_size_that_is_enough() -> None:
    def method(**settings: float) -> deepinfomax.Method:
        config = deepinfomax.DeepInfoMaxConfig(**settings)
        return deepinfomax.Method(lambda: build_backbone("resnet18", width=0.0625), config, DATA)

    words = (
        r"at least 5 x 5 pixels; views of 8 x 8 pixels give 4 x 4\. Make the views about 10 pixels wide.*stem: cifar"
    )
    with pytest.raises(ConfigError, match=words):
        method(alpha=0.5)(batch(8, side=8), STEP)
    assert method(alpha=0.5)(batch(8, side=10), STEP)[0].isfinite()
    assert method()(batch(8, side=8), STEP)[0].isfinite()


def test_the_priors_noise_belongs_to_a_place_in_the_global_batch() -> None:
    method = infomax()
    whole = method._noise(batch(8), STEP)
    half = method._noise(batch(4, torch.arange(1, 8, 2)), Step(update=0, epoch=0, micro=1, num_micro=2, seed=3))
    assert torch.equal(half, whole[1::2])
    assert not torch.equal(whole, method._noise(batch(8), Step(update=1, epoch=0, seed=3)))
    assert whole.min() >= 0
    assert whole.max() < 1


def test_weights_that_leave_nothing_to_learn_are_refused() -> None:
    with pytest.raises(ValueError, match="nothing ties the features"):
        deepinfomax.DeepInfoMaxConfig(alpha=0, beta=0)


# -- DeepCluster -----------------------------------------------------------------------------------------------------


@pytest.mark.evidence(
    "deepcluster", "L0", "whitened, normalised features, by their products (signs are arbitrary)",
    golden="baselines", dtype="float32", tolerance="1e-3",
)  # fmt: skip
def test_whitened_features_are_the_originals() -> None:
    white = deepcluster.whiten(ARRAYS["dc__features"])
    np.testing.assert_allclose(white @ white.T, ARRAYS["dc__gram"], atol=1e-3)


@pytest.mark.evidence(
    "deepcluster", "L0", "k-means is as tight as the original's worst of ten seeds",
    golden="baselines", dtype="float32", tolerance="2 %",
)  # fmt: skip
def test_clusters_are_as_tight_as_the_originals() -> None:
    points, k = ARRAYS["dc__pca_white_l2"], int(ARRAYS["dc__kmeans_k"])
    labels = deepcluster.cluster(points, k, deepcluster.DeepClusterConfig(), seed=0)
    centres = np.stack([points[labels == c].mean(0) for c in range(k)])
    assert ((points - centres[labels]) ** 2).sum() <= float(ARRAYS["dc__kmeans_inertia_worst_of_10"]) * 1.02
    assert (labels == deepcluster.cluster(points, k, deepcluster.DeepClusterConfig(), seed=0)).all()


@pytest.mark.evidence(
    "deepcluster", "L0", "class weights, and the weighted cross-entropy of given logits; values only",
    golden="baselines", dtype="float32", tolerance="weights 1e-6, loss 1e-5",
)  # fmt: skip
def test_class_weights_and_their_loss_are_the_originals() -> None:
    labels = array("dc__labels")
    weight = deepcluster.weight_of_classes(labels, len(ARRAYS["dc__class_weight"]))
    np.testing.assert_allclose(weight.numpy(), ARRAYS["dc__class_weight"], rtol=1e-6)
    loss = F.cross_entropy(array("dc__logits"), labels, weight)
    assert loss.item() == pytest.approx(float(ARRAYS["dc__ce"]), rel=1e-5)


def clustering(**settings: int) -> deepcluster.Method:
    torch.manual_seed(0)
    config = deepcluster.DeepClusterConfig(**settings)
    return deepcluster.Method(lambda: build_backbone("conv4"), config, DATA)


def features() -> Tensor:
    return golden.tensor(ARRAYS["dc__features"])


def test_an_epoch_begins_with_new_clusters_and_a_new_last_layer() -> None:
    method = clustering()
    assert method.num_clusters == 30
    before = {k: v.clone() for k, v in method.state_dict().items()}
    method.before_epoch(STEP, features)
    after = method.state_dict()
    assert {k for k in after if not torch.equal(before[k], after[k])} == {
        "assignments", "class_weight", "classifier.linear2.weight", "classifier.linear2.bias",
    }  # fmt: skip
    assert torch.equal(method.class_weight, deepcluster.weight_of_classes(method.assignments, 30))
    assert method.classifier.linear2.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert (method.classifier.linear2.bias == 0).all()
    first = method.assignments.clone()
    method.before_epoch(STEP, features)
    assert torch.equal(first, method.assignments)  # a function of seed and place


def test_the_loss_is_the_weighted_mean_over_the_batch() -> None:
    method = clustering(num_clusters=6)
    method.assignments.copy_(torch.arange(120) % 6)
    method.class_weight.copy_(torch.linspace(0.1, 1, 6))
    images = batch(8)
    loss, _ = method(images, STEP)
    logits = method.classifier(method.encoder(images.views["view"][0]))
    expected = F.cross_entropy(logits, method.assignments[images.index], method.class_weight)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_unlabelled_data_needs_a_number_of_clusters() -> None:
    unlabelled = DataInfo(120, None, 8, 10, 5)
    config = deepcluster.DeepClusterConfig()
    with pytest.raises(ConfigError, match=r"no labels: set method\.num_clusters"):
        deepcluster.Method(lambda: build_backbone("conv4"), config, unlabelled)
    config = deepcluster.DeepClusterConfig(num_clusters=7)
    assert deepcluster.Method(lambda: build_backbone("conv4"), config, unlabelled).num_clusters == 7


def test_more_clusters_than_images_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_clusters is 121, more than the 120 images"):
        clustering(num_clusters=121)


@pytest.mark.parametrize(("broken", "message"), [(float("nan"), "not finite"), (1.0, "the features collapsed")])
def test_features_that_cannot_be_clustered(broken: float, message: str) -> None:
    method = clustering(num_clusters=4)
    with pytest.raises(RunError, match=message):
        method.before_epoch(STEP, lambda: torch.full((120, 64), broken))


def test_an_unreadable_image_does_not_end_the_clustering() -> None:
    method = clustering(num_clusters=6)
    torn = features().clone()
    torn[7] = float("nan")
    method.before_epoch(STEP, lambda: torn)
    assert method.assignments[7] == 0
    assert method.assignments.unique().tolist() == list(range(6))


def test_wide_features_lose_half_of_their_directions() -> None:
    wide = np.random.default_rng(0).normal(size=(700, 512)).astype(np.float32)
    assert deepcluster.whiten(wide).shape == (700, 256)
    assert deepcluster.whiten(wide[:40]).shape == (40, 40)
