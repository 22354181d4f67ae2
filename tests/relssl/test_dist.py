"""Processes: the seed mixer, slices, collectives and their gradients, comparison over ranks, the clean
end."""

from __future__ import annotations

import os
import sys

import numpy as np
import pytest
import torch

from pipelines.errors import RunError
from relssl import dist
from tests.relssl.dist_helpers import run_ranks, start_and_join

WORLD = 2


# ---- mix


def test_mix_is_a_fixed_function_of_its_keys():
    """Seeds are part of what makes a run repeatable: these must not change, nor depend on PYTHONHASHSEED."""
    assert dist.mix() == 0x0EB72D8A7BF04165
    assert dist.mix(0) == 0xE96BC1828DEA6DD2
    assert dist.mix(1, "init") == 0xFC587F17BE270196


def test_mix_tells_order_number_and_kind_of_keys_apart():
    keys = [(), (0,), (0, 0), (1,), (1, 0), (0, 1), ("1",), ("",), ("a", "b"), ("ab",), (-1,), (2**63,)]
    assert len({dist.mix(*k) for k in keys}) == len(keys)


def test_mix_spreads_into_the_low_32_bits():
    """torch's CPU generator reads only those: neighbouring (seed, update, rank) must not collide there."""
    seeds = {
        dist.mix(s, u, m, r) & 0xFFFFFFFF for s in range(4) for u in range(500) for m in range(2) for r in range(4)
    }
    assert len(seeds) > 16000 - 8  # birthday: 0.03 collisions expected
    bits = np.array([[dist.mix(7, u) >> b & 1 for b in range(32)] for u in range(2000)])
    assert np.abs(bits.mean(0) - 0.5).max() < 0.06


def test_mix_seeds_torch_and_takes_numpy_integers():
    torch.Generator().manual_seed(dist.mix(1, "shuffle"))
    torch.Generator().manual_seed(2**64 - 1)
    assert dist.mix(np.int64(5), np.uint8(2)) == dist.mix(5, 2)


@pytest.mark.parametrize(("key", "error"), [(1.0, TypeError), (None, TypeError), (2**64, ValueError)])
def test_mix_refuses_what_it_would_have_to_round(key, error):
    with pytest.raises(error, match="mix takes integers"):
        dist.mix(key)


# ---- one process


def test_one_process_is_a_world_of_its_own():
    x = torch.arange(3.0, requires_grad=True)
    assert (dist.rank(), dist.world_size(), dist.is_distributed()) == (0, 1, False)
    assert torch.equal(dist.gather(x), x)
    assert not dist.gather(x).requires_grad
    assert dist.gather(x, grad=True).requires_grad
    assert dist.gather(torch.tensor(5)).shape == (1,)
    assert dist.all_reduce_sum(x) is x
    assert torch.equal(dist.broadcast(x), x)
    dist.assert_equal_across_ranks({"x": x})


def test_shutdown_of_one_process_returns_or_exits_plainly():
    assert dist.shutdown(0) is None
    with pytest.raises(SystemExit) as exit_info:
        dist.shutdown(75)
    assert exit_info.value.code == 75


def test_micro_batches_partition_the_global_batch():
    rows = torch.arange(12)
    parts = [dist.local_slice(rows, micro=m, num_micro=3) for m in range(3)]
    assert [p.tolist() for p in parts] == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]


# ---- two processes


def _collectives(rank):
    rows = torch.arange(24).view(12, 2)
    out = {"slices": [dist.local_slice(rows, micro=m, num_micro=3) for m in range(3)]}

    base = torch.arange(6).view(3, 2) + 10 * rank
    for dtype in (torch.int64, torch.bool, torch.uint8, torch.bfloat16, torch.float16, torch.float64):
        out[str(dtype)] = dist.gather((base % 2 if dtype == torch.bool else base).to(dtype))
    out["non-contiguous"] = dist.gather(base.t())
    out["0-d"] = dist.gather(torch.tensor(rank + 1.5))
    out["empty"] = dist.gather(torch.zeros(0, 3))
    out["broadcast"] = dist.broadcast(base.to(torch.float64), src=1)
    out["broadcast bool"] = dist.broadcast(base > 12)

    # Each rank weighs the gathered rows differently, so a gradient that is not summed over ranks shows.
    weight = torch.arange(12, dtype=torch.float64).view(6, 2) * (rank + 1)
    x = base.double().requires_grad_()
    (dist.gather(x, grad=True).square() * weight).sum().backward()
    out["gather grad"] = x.grad
    y = base.double().requires_grad_()
    (dist.all_reduce_sum(y).square() * weight[:3]).sum().backward()
    out["sum"], out["sum grad"] = dist.all_reduce_sum(y.detach()), y.grad
    out["sum bf16"] = dist.all_reduce_sum(base.to(torch.bfloat16))
    out["gradcheck"] = _gradcheck_together(rank)
    out["detached"] = dist.gather(x).requires_grad
    if rank == 0:  # the other one does not take part
        with dist.alone():
            mine = torch.arange(3.0)
            out["alone"] = [dist.rank(), dist.world_size(), dist.gather(mine), dist.all_reduce_sum(mine)]
    out["together again"] = [dist.rank(), dist.world_size(), dist.gather(torch.tensor([rank]))]
    return out


def _gradcheck_together(rank):
    """d(sum of both ranks' losses) / d(rank 0's x) by finite differences, with both ranks taking part."""
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(2, 2, generator=generator, dtype=torch.float64)

    def loss(x):
        everyone = dist.gather(x, grad=True)
        return (everyone.sin() * (everyone @ everyone.T).sum(1, keepdim=True)).sum() * (1 + 2 * rank)

    leaf = x.clone().requires_grad_()
    loss(leaf).backward()
    numeric = torch.zeros_like(x)
    for i in range(4):
        step = torch.zeros(4, dtype=torch.float64)
        step[i] = 1e-6 if rank == 0 else 0.0
        high, low = (dist.all_reduce_sum(loss(x + s * step.view(2, 2)).detach()) for s in (1, -1))
        numeric.view(-1)[i] = (high - low) / 2e-6
    return bool(torch.allclose(numeric, leaf.grad, atol=1e-6)) if rank == 0 else True


@pytest.mark.slow
def test_collectives_on_two_processes():
    results = run_ranks(_collectives, WORLD)
    rows = torch.arange(24).view(12, 2)
    for rank, out in enumerate(results):
        for m in range(3):
            assert torch.equal(out["slices"][m], rows[m::3][rank::WORLD])
    assert results[0]["alone"][:2] == [0, 1]
    assert all(torch.equal(x, torch.arange(3.0)) for x in results[0]["alone"][2:])
    assert [out["together again"][:2] for out in results] == [[0, 2], [1, 2]]
    assert all(out["together again"][2].tolist() == [0, 1] for out in results)
    both = torch.cat([torch.arange(6).view(3, 2), torch.arange(6).view(3, 2) + 10])
    weight = torch.arange(12, dtype=torch.float64).view(6, 2)
    for rank, out in enumerate(results):
        for dtype in (torch.int64, torch.uint8, torch.bfloat16, torch.float16, torch.float64):
            assert torch.equal(out[str(dtype)], both.to(dtype))
            assert out[str(dtype)].dtype == dtype
        assert torch.equal(out["torch.bool"], both % 2 == 1)
        assert torch.equal(out["non-contiguous"], torch.cat([both[:3].t(), both[3:].t()]))
        assert out["0-d"].tolist() == [1.5, 2.5]
        assert out["empty"].shape == (0, 3)
        assert torch.equal(out["broadcast"], both[3:].double())
        assert not out["broadcast bool"].any()
        # Losses are sum(w_r x^2) with w_r = (r + 1) w, so the summed gradient is 2 x (1 + 2) w.
        assert torch.equal(out["gather grad"], (6 * both * weight)[3 * rank : 3 * rank + 3])
        assert torch.equal(out["sum"], (both[:3] + both[3:]).double())
        assert torch.equal(out["sum grad"], 6 * (both[:3] + both[3:]) * weight[:3])
        assert out["sum bf16"].dtype == torch.bfloat16
        assert torch.equal(out["sum bf16"].long(), both[:3] + both[3:])
        assert out["gradcheck"]
        assert not out["detached"]


def _comparison(rank):
    same = torch.nn.Linear(3, 2, dtype=torch.float64)
    with torch.no_grad():
        for p in same.parameters():
            p.fill_(1.25)
    dist.assert_equal_across_ranks(same.named_parameters())
    dist.assert_equal_across_ranks({})

    messages = {}
    broken = {
        "value": {"a": torch.zeros(3), "b": torch.zeros(3) + 1e-45 * rank, "c": torch.ones(2) * rank},
        "sign of zero": {"a": torch.tensor([0.0, -0.0 if rank else 0.0])},
        "dtype": {"a": torch.zeros(2, dtype=torch.int64 if rank else torch.float64)},
        "shape": {"a": torch.zeros(4).view((4,) if rank else (2, 2))},
        "bool": {"a": torch.tensor([True, bool(rank)])},
        "order": {"a": torch.zeros(1), "b": torch.zeros(1)} if rank else {"b": torch.zeros(1), "a": torch.zeros(1)},
        "number": {str(i): torch.zeros(1) for i in range(2 + rank)},
    }
    for case, tensors in broken.items():
        try:
            dist.assert_equal_across_ranks(tensors)
        except RunError as error:
            messages[case] = str(error)
    return messages


def test_a_difference_between_ranks_is_named_on_every_rank():
    for messages in run_ranks(_comparison, WORLD):
        assert set(messages) == {"value", "sign of zero", "dtype", "shape", "bool", "order", "number"}
        assert "'b' ((3,) float32 on this rank) differs between rank 0 and rank(s) [1]" in messages["value"]
        assert "2 of 3 tensors differ" in messages["value"]
        assert "different numbers of tensors: [2, 3]" in messages["number"]


def _leave(rank, folder, code, agreed, ranks_that_agree):
    sys.stdout = (folder / f"out{rank}").open("w")
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    dist.all_reduce_sum(torch.ones(10))
    sys.stdout.write("last words")  # in the buffer until the flush
    if rank not in ranks_that_agree:
        os._exit(0)
    dist.shutdown(code, agreed=agreed)
    sys.stdout.write(" never written")


@pytest.mark.parametrize("code", [0, 75])
def test_shutdown_gives_the_code_and_the_last_words(tmp_path, code):
    assert start_and_join(_leave, WORLD, tmp_path, code, True, (0, 1)) == [code, code]
    assert [(tmp_path / f"out{rank}").read_text() for rank in range(WORLD)] == ["last words"] * WORLD


def test_only_an_agreed_end_waits_for_the_others(tmp_path):
    """Rank 1 is gone without a word: waiting for it fails, a rank that knows itself alone does not try."""
    (tmp_path / "alone").mkdir()
    (tmp_path / "agreed").mkdir()
    assert start_and_join(_leave, WORLD, tmp_path / "alone", 3, False, (0,)) == [3, 0]
    assert (tmp_path / "alone" / "out0").read_text() == "last words"
    codes = start_and_join(_leave, WORLD, tmp_path / "agreed", 3, True, (0,))
    assert codes[0] not in (0, 3)
