"""The fast probe: what it picks, that the test set has no part in it, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch

from pipelines.errors import ConfigError, InputError, RunError
from relssl.evaluators.heads import labelled_rows, predictions, score_heads, train_heads
from relssl.evaluators.probe import FEATURES, Choice, ProbeProtocol, choose, fast_probe, probe_protocol

NUM_CLASSES, DIM = 5, 6
QUICK = ProbeProtocol(
    lr=(0.01, 0.3), weight_decay=(0.0, 1e-2), penalty=(1e-2,), least_updates=40, batch_size=32, dtype="fp64"
)


def blobs(n: int, seed: int, spread: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    centres = torch.randn(NUM_CLASSES, DIM, generator=torch.Generator().manual_seed(9))
    labels = torch.arange(n) % NUM_CLASSES
    return centres[labels] + spread * torch.randn(n, DIM, generator=torch.Generator().manual_seed(seed)), labels


TRAIN, TEST = blobs(100, 1), blobs(60, 2)


def probe(train=TRAIN, test=TEST, protocol=QUICK, **changes):
    options = {"num_classes": NUM_CLASSES, "protocol": protocol} | changes
    return fast_probe({FEATURES: train[0]}, train[1], {FEATURES: test[0]}, test[1], **options)


def test_the_best_head_on_held_out_images_is_trained_on_all_and_tested():
    result = probe(seed=3)
    choice = result.choice
    assert (choice.num_fit, choice.num_held_out) == (80, 20)
    assert len(choice.grid) == 4
    assert choice.top1 == max(entry["top1"] for entry in choice.grid)
    best = [entry for entry in choice.grid if entry["top1"] == choice.top1]
    chosen = min(best, key=lambda entry: entry["loss"])
    assert (choice.lr, choice.weight_decay) == (chosen["lr"], chosen["weight_decay"])

    rows = labelled_rows(TRAIN[0].double(), TRAIN[1], NUM_CLASSES, "train", "cpu")
    options = {"updates": 40, "batch_size": 32, "momentum": 0.9, "seed": 3}
    ((weight, bias),) = train_heads(rows, torch.arange(100), NUM_CLASSES, [choice.lr], [choice.weight_decay], **options)
    tested = rows.like(*TEST)
    assert result.top1 == pytest.approx(float(score_heads(tested, torch.arange(60), weight, bias)[0]))
    assert torch.equal(result.predicted, predictions(tested, weight[0], bias[0])[:, 0])
    assert result.top5 == 100.0  # of five classes
    assert result.top1 > 40
    assert abs(result.top1 - result.check_top1) < 15


def test_the_test_set_has_no_part_in_the_choice():
    """Neither its labels nor its features: the same pick whatever they are, and another score."""
    first = probe()
    shuffled = TEST[1][torch.randperm(60, generator=torch.Generator().manual_seed(0))]
    for other in (probe(test=(TEST[0], shuffled)), probe(test=(-5 * TEST[0], TEST[1]))):
        assert other.choice == first.choice
        assert other.top1 != first.top1


def test_without_a_refit_the_picked_head_is_tested_as_it_is():
    protocol = QUICK.model_copy(update={"refit": False})
    result = probe(test=TRAIN, protocol=protocol, seed=1)
    refitted = probe(test=TRAIN, seed=1)
    assert result.choice == refitted.choice
    assert not torch.equal(result.predicted, refitted.predicted)


def test_the_best_layer_is_picked():
    noise = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    train, test = {"noise": noise, FEATURES: TRAIN[0]}, {"noise": noise[:60], FEATURES: TEST[0]}
    protocol = QUICK.model_copy(update={"layer": ("noise", FEATURES)})
    options = {"num_classes": NUM_CLASSES, "protocol": protocol}
    result = fast_probe(train, TRAIN[1], test, TEST[1], **options)
    assert result.choice.layer == FEATURES
    assert len(result.choice.grid) == 8
    assert result.top1 == probe().top1
    with pytest.raises(ConfigError, match="unknown layer: 'features'; did"):
        choose({"feature": noise}, TRAIN[1], num_classes=NUM_CLASSES, protocol=QUICK)


def test_the_seed_decides_everything_and_global_randomness_is_untouched():
    state = torch.get_rng_state()
    first, again, other = probe(seed=0), probe(seed=0), probe(seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.choice == again.choice
    assert torch.equal(first.predicted, again.predicted)
    assert first.choice.grid != other.choice.grid


def test_half_precision_and_inference_tensors_are_taken():
    with torch.inference_mode():
        result = probe(train=(TRAIN[0].half(), TRAIN[1].clone()), test=(TEST[0].half(), TEST[1].clone()))
    assert abs(result.top1 - probe().top1) <= 5


def test_a_penalty_is_picked_for_the_check():
    """With classes this far apart, a penalty that allows nothing but the order of the classes is the worse."""
    result = probe(train=blobs(100, 1, 0.1), protocol=QUICK.model_copy(update={"penalty": (1e6, 1e-2)}))
    assert (result.choice.penalty, result.choice.penalty_top1) == (1e-2, 100.0)


def choice(lr: float, top1: dict[float, float], num_held_out: int = 1000) -> Choice:
    grid = [{"layer": FEATURES, "lr": x, "weight_decay": 0.0, "top1": y, "loss": 1.0} for x, y in top1.items()]
    return Choice(FEATURES, lr, 0.0, top1[lr], grid, 1e-3, 50.0, 4000, num_held_out)


def test_the_edge_of_the_grid_is_told_where_it_is_more_than_chance():
    """A standard error of 50 % on 1,000 images is 1.6, on 100,000 images 0.16."""
    assert choice(1.0, {0.01: 40.0, 0.1: 48.0, 1.0: 50.0}).at_edge == ["lr"]
    assert choice(0.01, {0.01: 50.0, 0.1: 48.0, 1.0: 40.0}).at_edge == ["lr"]
    assert choice(1.0, {0.01: 40.0, 0.1: 49.0, 1.0: 50.0}).at_edge == []
    assert choice(1.0, {0.01: 40.0, 0.1: 49.0, 1.0: 50.0}, num_held_out=100_000).at_edge == ["lr"]
    assert choice(0.1, {0.01: 40.0, 0.1: 50.0, 1.0: 40.0}).at_edge == []
    assert choice(0.1, {0.1: 50.0}).at_edge == []


def test_more_updates_than_the_least_where_there_are_many_images():
    protocol = ProbeProtocol()
    assert protocol.updates(50_000) == 1000
    assert protocol.updates(1_281_167) == 12_520


def test_changed_settings_carry_it_in_the_name():
    assert probe_protocol().name == "fast probe"
    assert probe_protocol(lr=list(ProbeProtocol().lr)).name == "fast probe"
    changed = probe_protocol(lr=["0.1", "1"], epochs=3)
    assert (changed.name, changed.lr, changed.epochs) == ("fast probe (changed)", (0.1, 1.0), 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lrs": (1,)}, "unknown setting of the fast probe: 'lrs'; did you mean 'lr'"),
        ({"lr": ["fast"]}, r"lr\.0: .*got 'fast'"),
        ({"lr": [0.0]}, "lr holds 0.0"),
        ({"lr": []}, "lr: .*at least 1"),
        ({"weight_decay": [-1]}, "weight_decay holds -1.0"),
        ({"weight_decay": [math.inf]}, "weight_decay holds inf"),
        ({"held_out": 1.0}, "held_out"),
        ({"name": "mine"}, "unknown setting"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        probe_protocol(**options)


def test_a_class_of_one_image_stays_in_training():
    x, y = torch.cat([TRAIN[0], TRAIN[0][:1] + 50]), torch.cat([TRAIN[1], torch.tensor([NUM_CLASSES])])
    result = probe(train=(x, y), num_classes=NUM_CLASSES + 1)
    assert (result.choice.num_fit, result.choice.num_held_out) == (81, 20)


def nan(features):
    bad = features.clone()
    bad[3, 2] = math.nan
    return bad


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": (nan(TRAIN[0]), TRAIN[1])}, "train features: row 3 holds NaN"),
        ({"test": (nan(TEST[0]), TEST[1])}, "test features: row 3 holds NaN"),
        ({"train": (TRAIN[0], torch.zeros(100, dtype=torch.long))}, "of classes that no training image has"),
        (
            {"train": (TRAIN[0], torch.zeros(100, dtype=torch.long)), "test": (TEST[0], torch.zeros(60).long())},
            "the same label",
        ),
        ({"train": (TRAIN[0], torch.full((100,), -1))}, "train labels: 100 of 100 images have no label"),
        ({"test": (TEST[0], torch.full((60,), -1))}, "test labels: 60 of 60 images have no label"),
        ({"test": (TEST[0], TEST[1] + 1)}, "label 5 found, but there are only 5 classes"),
        ({"test": (TEST[0], TEST[1] + 1), "num_classes": 6}, "12 test images are of classes .* first of class 5"),
        ({"train": (TRAIN[0][:5], TRAIN[1][:5])}, "nothing can be held out"),
        ({"test": (TEST[0][:, :3], TEST[1])}, "wide"),
        ({"train": (torch.zeros(100, DIM), TRAIN[1])}, "every feature of every image is zero"),
    ],
)
def test_bad_input_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        probe(**changes)


def test_a_grid_that_diverges_is_an_error():
    with pytest.raises(RunError, match=r"learning rates .* are too high"):
        probe(protocol=QUICK.model_copy(update={"lr": (1e300,), "dtype": "fp32"}))
    some = probe(protocol=QUICK.model_copy(update={"lr": (1e300, 0.1), "dtype": "fp32"}))
    assert some.choice.lr == 0.1
