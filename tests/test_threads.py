"""Work that is handed to several threads gives the same bits as in turn, and leaves torch's settings alone."""

from __future__ import annotations

import os
import threading

import pytest
import torch
from torch import nn

from hybridtheory import threads
from hybridtheory.blocks import partition
from hybridtheory.estimators import LOZO, Gaussian, Key, Rademacher, SubZero, ZOGradient
from hybridtheory.estimators.streams import CHUNK, normal


@pytest.fixture(params=[1, 2, 3])
def count(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


CPU = torch.device("cpu")


def test_every_item_once_and_where_it_runs(count):
    seen: list[tuple[int, str, int, bool]] = []
    lock = threading.Lock()

    def work(i: int) -> None:
        with lock:
            seen.append((i, threading.current_thread().name, torch.get_num_threads(), torch.is_grad_enabled()))

    with torch.no_grad():
        threads.each(work, range(50), 10**6, CPU)
    assert sorted(i for i, *_ in seen) == list(range(50))
    assert all(not grad for *_, grad in seen)
    pooled = all(name.startswith("hybridtheory") for _, name, *_ in seen)
    assert pooled == (count > 1)
    assert {n for _, _, n, _ in seen} == {1}  # of a pool's thread, and of a process that has one
    assert torch.get_num_threads() == count
    seen.clear()
    threads.each(work, range(5), 10, CPU)  # too little to hand over
    assert [i for i, *_ in seen] == list(range(5)) and seen[0][1] == "MainThread"


def test_a_thread_that_starts_later_has_torchs_number_and_not_the_pools(count):
    threads.each(lambda i: None, range(4), 10**6, CPU)
    found: list[int] = []
    later = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert found == [count]


def test_an_error_in_a_thread_is_raised(count):
    def work(i: int) -> None:
        if i == 3:
            raise ZeroDivisionError("item 3")

    with pytest.raises(ZeroDivisionError, match="item 3"):
        threads.each(work, range(8), 10**6, CPU)


def test_a_forked_process_makes_a_pool_of_its_own():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        threads.each(lambda i: None, range(4), 10**6, CPU)
        child = os.fork()
        if child == 0:  # a pool that was inherited would wait for threads that are not there
            done: list[int] = []
            threads.each(done.append, range(4), 10**6, CPU)
            os._exit(0 if sorted(done) == [0, 1, 2, 3] else 1)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        torch.set_num_threads(before)


def test_directions_and_updates_have_the_same_bits_on_any_number_of_threads(count):
    like = torch.empty(3, CHUNK)
    whole = normal(Key(1, 2, 3), "w", like.shape, like).view(-1)
    for chunk in range(3):
        alone = torch.empty(CHUNK)
        alone.normal_(generator=threads_free_generator(chunk))
        assert torch.equal(whole[chunk * CHUNK : (chunk + 1) * CHUNK], alone)

    def updated(n: int, law) -> list[torch.Tensor]:
        torch.set_num_threads(n)
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(600, 500), nn.Linear(500, 40), nn.Linear(40, 7))
        block = partition(net)[0]
        keys = (Key(0, 1), Key(0, 2))
        ZOGradient(law.bind(block, keys), keys, (0.5, -2.0), block).add_to_(0.1)
        ZOGradient(law.bind(block, keys[:1]), keys[:1], (0.5,), block).add_to_(0.1)
        return [p.detach() for p in net.parameters()]

    for law in (Gaussian, Rademacher, lambda: SubZero(rank=2), lambda: LOZO(rank=2)):
        one, many = updated(1, law()), updated(count, law())
        assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True))


def threads_free_generator(chunk: int) -> torch.Generator:
    from hybridtheory.estimators.streams import generator

    return generator(Key(1, 2, 3), "w", chunk)
