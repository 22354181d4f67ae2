"""Ranks, collectives with gradients, one mixer for seeds, and a clean end: what relssl knows of processes.

Every function works without a process group too: one process is a world of size 1, where the collectives are
the identity.  Collectives must be called by all ranks, in the same order, with tensors of equal shape.

Why the seed mixer lives here: what a random draw may depend on (the run's seed, the update, the rank, a name)
is a statement about processes, and equal seeds on every rank are as important as equal parameters.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import operator
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipelines.errors import RunError

_MASK = (1 << 64) - 1
_START = 0x72656C73736C2121  # any number unlike a key, or mix(1) and mix() would meet
_is_alone = False
PATIENCE = timedelta(hours=2)  # of processes that wait for each other: the main one may be clustering


def mix(*keys: int | str) -> int:
    """A 64-bit seed from any number of integers and names; its low 32 bits are well mixed on their own.

    `torch.Generator` on CPU ignores the upper half of its seed, so seeds such as `(seed << 32) + update`
    collide there.  Each key goes through the finaliser of SplitMix64 (Steele, Lea & Flood, OOPSLA 2014),
    chained, so order and number of keys matter.  Names enter by BLAKE2, never by `hash()`, which differs from
    process to process.

    Args:
        keys: integers in [-2**63, 2**64) (NumPy's too) and strings.

    Returns:
        An integer in [0, 2**64), as `torch.manual_seed` accepts.

    Raises:
        TypeError: a key that is neither an integer nor a string.
        ValueError: an integer beyond 64 bits.
    """
    state = _scramble(_START + len(keys))
    for key in keys:
        state = _scramble(state ^ _scramble(_key_word(key)))
    return state


def _key_word(key: int | str) -> int:
    if isinstance(key, str):
        return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")
    try:
        value = operator.index(key)
    except TypeError:
        raise TypeError(f"mix takes integers and strings, got {key!r} of type {type(key).__name__}") from None
    if not -(1 << 63) <= value <= _MASK:
        raise ValueError(f"mix takes integers of at most 64 bits, got {value}")
    return value & _MASK


def _scramble(word: int) -> int:
    word = (word + 0x9E3779B97F4A7C15) & _MASK
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _MASK
    return word ^ (word >> 31)


def is_distributed() -> bool:
    """Whether a process group exists (a group of one process counts)."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's number, 0 without a process group."""
    return dist.get_rank() if is_distributed() and not _is_alone else 0


def world_size() -> int:
    """The number of processes, 1 without a process group."""
    return dist.get_world_size() if is_distributed() and not _is_alone else 1


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Within it this process is a world of its own, for what the others do not take part in.

    They wait for it at their next collective.
    """
    global _is_alone
    before, _is_alone = _is_alone, True
    try:
        yield
    finally:
        _is_alone = before


def local_slice(rows: Tensor, *, micro: int = 0, num_micro: int = 1) -> Tensor:
    """The rows of a global batch (in position order) that belong to this rank and one of its micro-batches.

    Micro-batch m of A is `[m::A]` of the global batch and rank r takes `[r::W]` of that, so local row j has
    the position `m + A * (r + W * j)`.  A micro-batch is therefore the same images for every W.

    Args:
        rows: (G, ...) in position order.
        micro, num_micro: m and A.

    Returns:
        (about G / (A W), ...): a view, no copy.
    """
    return rows[micro + num_micro * rank() :: num_micro * world_size()]


def gather(x: Tensor, grad: bool = False) -> Tensor:
    """All ranks' rows, rank-major: rows of rank 0, then of rank 1, ...

    Args:
        x: (B, ...) of any dtype, the same shape on every rank; a 0-d tensor counts as (1,).
        grad: let gradient through.  The backward sums the gradient of the gathered tensor over the ranks and
            returns the own slice: the derivative of the *sum* of all ranks' losses (DDP then divides by W).
            All ranks must run the backward.

    Returns:
        (W * B, ...), identical on every rank; `x` itself (0-d as (1,)) in a world of size 1.
    """
    x = x.reshape(1) if x.dim() == 0 else x
    if world_size() == 1:
        return x if grad else x.detach()
    if grad:
        return _Gather.apply(x)
    return _all_gather(x.detach())


def gather_batch(x: Tensor, num_rows: int) -> Tensor:
    """The rows of a global batch in position order, from the `local_slice` of it that every rank holds.

    Args:
        x: (about num_rows / W, ...), rows at the positions rank, rank + W, ...
        num_rows: of the global batch.

    Returns:
        (num_rows, ...) without gradient, identical on every rank; `x` itself in a world of size 1.
    """
    if world_size() == 1:
        return x.detach()
    share = -(-num_rows // world_size())
    padded = torch.cat([x, x.new_zeros((share - len(x), *x.shape[1:]))])
    return gather(padded).unflatten(0, (world_size(), share)).transpose(0, 1).flatten(0, 1)[:num_rows]


def _all_gather(x: Tensor) -> Tensor:
    """Moves bytes, so every dtype works with every backend (gloo knows neither bool nor bfloat16
    everywhere)."""
    out = x.new_empty((world_size() * x.shape[0], *x.shape[1:]))
    if x.numel():
        parts = list(_bytes(out).chunk(world_size()))
        dist.all_gather(parts, _bytes(x.contiguous()))
    return out


def _bytes(x: Tensor) -> Tensor:
    """The memory of a contiguous tensor as a flat uint8 view."""
    return x.view(-1).view(torch.uint8)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.num_rows = x.shape[0]
        return _all_gather(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        start = rank() * ctx.num_rows
        return all_reduce_sum(grad)[start : start + ctx.num_rows]


def all_reduce_sum(x: Tensor) -> Tensor:
    """The sum over ranks, equal on all of them; its backward is the sum over ranks of the gradient.

    Args:
        x: any shape.  float16 and bfloat16 are added in float32.

    Returns:
        A new tensor of x's shape and dtype; `x` itself in a world of size 1.
    """
    return x if world_size() == 1 else _AllReduceSum.apply(x)


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        wide = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
        total = x.to(wide, copy=True, memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return all_reduce_sum(grad)


@torch.no_grad()
def broadcast(x: Tensor, src: int = 0) -> Tensor:
    """The values that rank `src` holds in `x`, on every rank.

    Args:
        x: any dtype; shape and dtype must be equal on every rank, only the values of `src` count.

    Returns:
        A new tensor without gradient; `x` itself (detached) in a world of size 1.
    """
    if world_size() == 1:
        return x.detach()
    out = x.detach().clone(memory_format=torch.contiguous_format)
    if out.numel():
        dist.broadcast(_bytes(out), src)
    return out


def assert_equal_across_ranks(tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> None:
    """Compare named tensors bit for bit over the ranks by checksum of name, dtype, shape and bytes.

    For instance `assert_equal_across_ranks(itertools.chain(m.named_parameters(), m.named_buffers()))` after
    DDP has wrapped a module.  Reads every byte on the host: for once per run, not once per step.

    Raises:
        RunError: on every rank, naming the first tensor that differs and the ranks that disagree with rank 0.
    """
    if world_size() == 1:
        return
    named = list(tensors.items() if isinstance(tensors, Mapping) else tensors)
    device = _collective_device()
    counts = gather(torch.tensor([len(named)], device=device)).tolist()
    if len(set(counts)) > 1:
        raise RunError(f"The ranks hold different numbers of tensors: {counts}. Every rank must build the same model.")
    if not named:
        return
    sums = torch.tensor([_checksum(name, tensor) for name, tensor in named], device=device)
    table = gather(sums).view(world_size(), len(named))
    equal = (table == table[0]).all(dim=0)
    if bool(equal.all()):
        return
    first = int((~equal).nonzero()[0])
    others = (table[:, first] != table[0, first]).nonzero().flatten().tolist()
    name, tensor = named[first]
    raise RunError(
        f"{name!r} ({_describe(tensor)} on this rank) differs between rank 0 and rank(s) {others}: expected "
        f"equal bytes on every rank. {int((~equal).sum())} of {len(named)} tensors differ. Seed every rank "
        "equally before the model is built, and load the same weights on all of them."
    )


def _collective_device() -> torch.device:
    """Where small tensors must live for the backend at hand: NCCL moves only CUDA tensors."""
    if "nccl" in dist.get_backend():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _checksum(name: str, tensor: Tensor) -> int:
    data = _bytes(tensor.detach().contiguous().cpu()).numpy().data
    digest = hashlib.blake2b(f"{name} {_describe(tensor)}".encode(), digest_size=8)
    digest.update(data)
    return int.from_bytes(digest.digest(), "little", signed=True)


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def shutdown(code: int = 0, *, agreed: bool = True) -> None:
    """End this process's part in a run: flush, wait for the others, leave the group, exit.

    With several processes this never returns: after the group is destroyed the process leaves by `os._exit`,
    because gloo's threads otherwise abort at interpreter exit in 1 of 2 to 1 of 20 runs (a run that had
    succeeded then reports failure).  With one process it returns for code 0 and raises `SystemExit(code)`
    otherwise.

    Args:
        code: exit status.
        agreed: every rank ends here, so wait for all (a launcher kills the others as soon as one has left
            with a status other than 0, perhaps in the middle of a checkpoint).  False when this rank alone
            has failed: the others may sit in another collective and would never come.
    """
    _flush()
    alone = world_size() == 1
    if is_distributed():
        if agreed and not alone:
            dist.barrier()
        if agreed or alone:
            dist.destroy_process_group()
    if not alone:
        os._exit(code)
    if code:
        sys.exit(code)


def _flush() -> None:
    for handler in logging.getLogger().handlers:
        handler.flush()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
