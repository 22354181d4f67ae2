"""Memory that is used again: never while anybody can see it, always afterwards."""

from __future__ import annotations

import queue
import sys
import threading
import weakref

import numpy as np
import pytest
import torch

from pipelines.memory import Recycler

SHAPE = (4, 8, 8)
SIZE = 4 * 8 * 8 * 4  # bytes of it in float32


def kept(recycler: Recycler) -> list[int]:
    """Sizes of the blocks that are free."""
    return sorted(len(lease.block) for lease in recycler._free)


def others(recycler: Recycler, count: int = 4) -> list[torch.Tensor]:
    """More tensors of the size, all of them written to."""
    taken = [recycler.empty(SHAPE, torch.float32) for _ in range(count)]
    for tensor in taken:
        tensor.fill_(-1)
    return taken


HOLDERS = {
    "itself": lambda t: t,
    "a slice": lambda t: t[1:2],
    "one number": lambda t: t[2, 3, 4],
    "a view": lambda t: t.view(8, 32),
    "another type": lambda t: t.view(torch.uint8),
    "a permutation": lambda t: t.permute(2, 0, 1).unbind(0)[0],
    "detached": lambda t: t.detach(),
    "an array": lambda t: t.numpy(),
    "a slice of an array": lambda t: t.numpy()[1:, 2],
    "a buffer": lambda t: memoryview(t.numpy()),
    "DLPack": lambda t: torch.from_dlpack(t),
    "an array by DLPack": lambda t: np.from_dlpack(t)[0],
    "its storage": lambda t: t.untyped_storage(),
    "a closure": lambda t: lambda: t,
}


def contents(held: object) -> float:
    """The first number of whatever holds it."""
    held = held() if callable(held) else held
    if isinstance(held, torch.UntypedStorage):
        return np.frombuffer(bytes(held), np.float32)[0].item()
    first = np.asarray(held).reshape(-1)
    return (first.view(np.float32) if first.dtype == np.uint8 else first)[0].item()


@pytest.mark.parametrize("holder", HOLDERS)
def test_memory_is_not_used_again_while_anything_holds_it(holder):
    recycler = Recycler()
    tensor = recycler.empty(SHAPE, torch.float32).fill_(7)
    address = tensor.data_ptr()
    held = HOLDERS[holder](tensor)
    del tensor
    taken = others(recycler)
    assert address not in [t.data_ptr() for t in taken]
    assert contents(held) == 7
    del held, taken
    assert address in [t.data_ptr() for t in others(recycler, 5)]


def test_tensors_in_use_do_not_share_memory():
    recycler = Recycler()
    tensors = [recycler.empty(SHAPE, torch.float32).fill_(i) for i in range(20)]
    assert [t.unique().tolist() for t in tensors] == [[i] for i in range(20)]


def test_memory_that_was_let_go_serves_any_type_and_shape_of_its_size_and_no_other():
    recycler = Recycler()
    address = recycler.empty(SHAPE, torch.float32).data_ptr()
    larger, smaller = recycler.empty((SIZE + 4,), torch.uint8), recycler.empty((SIZE - 4,), torch.uint8)
    assert address not in (larger.data_ptr(), smaller.data_ptr())
    same = recycler.empty((SIZE // 2,), torch.bfloat16)
    assert same.data_ptr() == address
    assert (same.dtype, same.shape) == (torch.bfloat16, (SIZE // 2,))


def test_tensors_are_as_large_as_asked_for():
    recycler = Recycler()
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.float64):
        for shape in ((3, 5, 7), (1,), ()):
            tensor = recycler.empty(shape, dtype)
            assert (tensor.dtype, tensor.shape) == (dtype, shape)
            assert tensor.is_contiguous()
            assert tensor.untyped_storage().nbytes() == tensor.numel() * dtype.itemsize


def test_no_more_than_the_cap_is_kept_and_that_is_the_latest():
    recycler = Recycler(keep=2)
    tensors = [recycler.empty((i + 1,), torch.uint8) for i in range(5)]
    while tensors:
        del tensors[0]
    assert kept(recycler) == [4, 5]
    assert recycler.empty((4,), torch.uint8) is not None
    assert kept(recycler) == [4, 5]  # it came back


def test_taking_one_size_leaves_the_others():
    recycler = Recycler()
    tensors = [recycler.empty((size,), torch.uint8) for size in (10, 20, 30, 20)]
    tensors.clear()
    held = recycler.empty((20,), torch.uint8)
    assert kept(recycler) == [10, 20, 30]
    assert len(held) == 20


def test_cleared_memory_is_forgotten_and_what_is_in_use_stays_valid():
    recycler = Recycler()
    held = [recycler.empty(SHAPE, torch.float32).fill_(7) for _ in range(3)]
    others(recycler)
    memory = [weakref.ref(lease.block) for lease, _ in recycler._used.values()]
    assert len(memory) == 3
    recycler.clear()
    assert not recycler._free
    while held:
        assert all((tensor == 7).all() for tensor in held)
        held.pop()
        assert sum(block() is not None for block in memory) == len(held)
    assert not recycler._free


def test_tensors_outlive_their_recycler():
    recycler = Recycler()
    held = recycler.empty(SHAPE, torch.float32).fill_(7)
    del recycler
    assert (held == 7).all()


def test_no_python_code_runs_when_a_tensor_is_let_go():
    """An interrupt that came in it would be lost, and Ctrl-C would do nothing every so often."""
    recycler, called = Recycler(), []
    tensor = recycler.empty(SHAPE, torch.float32)
    sys.setprofile(lambda frame, event, _: called.append(frame.f_code.co_name) if event == "call" else None)
    try:
        del tensor
    finally:
        sys.setprofile(None)
    assert kept(recycler) == [SIZE]
    assert not recycler._used
    assert called == []


def test_many_threads_take_and_let_go():
    """Tensors are filled in one thread, checked and let go in another."""
    recycler, filled, wrong = Recycler(keep=4), queue.Queue(maxsize=6), []

    def fill(number: int) -> None:
        for i in range(400):
            value = number * 1000 + i
            tensor = recycler.empty((64 + 64 * (i % 2),), torch.float32)
            filled.put((tensor.fill_(value), value))

    def check() -> None:
        while (item := filled.get()) is not None:
            tensor, value = item
            if not (tensor == value).all():
                wrong.append(value)
            del tensor, item

    fillers = [threading.Thread(target=fill, args=(n,)) for n in range(3)]
    checkers = [threading.Thread(target=check) for _ in range(3)]
    for thread in fillers + checkers:
        thread.start()
    for thread in fillers:
        thread.join()
    for _ in checkers:
        filled.put(None)
    for thread in checkers:
        thread.join()
    assert not wrong
    assert len(recycler._free) <= 4
