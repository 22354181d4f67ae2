"""Which images make up which batch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.errors import ConfigError
from pipelines.order import batch_sizes, local_positions, permutation


@given(seed=st.integers(0, 2**40), epoch=st.integers(0, 2000), n=st.integers(1, 500))
def test_permutation_holds_every_id_once(seed, epoch, n):
    assert sorted(permutation(seed, epoch, n)) == list(range(n))


def test_permutation_changes_with_seed_and_epoch():
    base = permutation(0, 0, 1000)
    for other in (permutation(1, 0, 1000), permutation(0, 1, 1000)):
        assert (base == other).mean() < 0.02


@given(micros=st.integers(1, 4), ranks=st.integers(1, 4), each=st.integers(1, 5), rest=st.integers(0, 3))
def test_shares_cover_a_batch_once_whoever_asks(micros, ranks, each, rest):
    n = micros * ranks * each + rest

    def share(m, r, w):
        return local_positions(n, micro=m, num_micro=micros, rank=r, world_size=w)

    places = np.concatenate([share(m, r, ranks) for m in range(micros) for r in range(ranks)])
    assert sorted(places) == list(range(n))
    for m in range(micros):  # a micro-batch is the same images for every number of ranks
        together = np.sort(np.concatenate([share(m, r, ranks) for r in range(ranks)]))
        assert (together == share(m, 0, 1)).all()


@given(micros=st.integers(1, 3), ranks=st.integers(1, 3), multiple=st.integers(1, 3), each=st.integers(1, 4))
def test_split_groups_stay_whole(micros, ranks, multiple, each):
    """With ranks x micros dividing the number of splits, each group `place mod splits` lies in one share."""
    splits = micros * ranks * multiple
    n = splits * each
    owners: dict[int, set[tuple[int, int]]] = {}
    for m in range(micros):
        for r in range(ranks):
            for place in local_positions(n, micro=m, num_micro=micros, rank=r, world_size=ranks):
                owners.setdefault(int(place) % splits, set()).add((m, r))
    assert all(len(shares) == 1 for shares in owners.values())


def test_sizes_of_batches():
    assert batch_sizes(100, 32, drop_last=True, shares=2) == [32, 32, 32]
    assert batch_sizes(100, 32, drop_last=False, shares=2) == [32, 32, 32, 4]
    assert batch_sizes(99, 32, drop_last=False, shares=2) == [32, 32, 32]  # one image in a share is no statistic
    assert batch_sizes(97, 32, drop_last=False, shares=1, least_share=0) == [32, 32, 32, 1]
    assert batch_sizes(96, 32, drop_last=False, shares=1, least_share=0) == [32, 32, 32]


@pytest.mark.parametrize(
    ("samples", "batch", "shares", "words"),
    [(100, 30, 4, "30 images does not divide into 4"), (100, 128, 1, "larger than the data set, which has 100")],
)
def test_impossible_batches_are_refused(samples, batch, shares, words):
    with pytest.raises(ConfigError, match=words):
        batch_sizes(samples, batch, drop_last=True, shares=shares)
