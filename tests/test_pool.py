"""The pool of adapters: which are in memory, what is counted, and that neither slow nor failing loads stop others."""

from __future__ import annotations

import collections
import pathlib
import random
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import bits

import lora_jax as lj
from lora_jax import many

LONG = 30.0  # seconds, after which a thread that hangs fails a test


def adapter(name: str) -> Any:
    value = np.full((2, 1), float(len(name) and ord(name[0])), np.float32)
    return {"w": lj.Adapter(lj.LoRA(rank=1, alpha=1), "io", a=value, b=np.ones((1, 2), np.float32))}


class Disk:
    """Loads that a test can hold up or make fail, and their number by name."""

    def __init__(self) -> None:
        self.loads: collections.Counter[str] = collections.Counter()
        self.held: dict[str, threading.Event] = {}
        self.failing: set[str] = set()
        self.started: collections.defaultdict[str, threading.Event] = collections.defaultdict(threading.Event)

    def load(self, name: str) -> Any:
        self.loads[name] += 1
        self.started[name].set()
        if name in self.held:
            assert self.held[name].wait(LONG)
        if name in self.failing:
            raise OSError(f"{name} cannot be read")
        return adapter(name)


def eventually(true: Any) -> None:
    end = time.monotonic() + LONG
    while not true():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_the_least_recently_used_adapter_is_removed() -> None:
    disk = Disk()
    with many.Pool(disk.load, capacity=2) as pool:
        for name in "ababcb":
            assert bits(pool.get(name)) == bits(adapter(name))
        assert pool.stats() == (3, 3, 1, 0, ("c", "b"), ())
        pool.get("a")
        assert pool.stats().resident == ("b", "a") and disk.loads == {"a": 2, "b": 1, "c": 1}


def test_any_sequence_is_counted_as_by_a_plain_list() -> None:
    choose, recent, hits, evictions = random.Random(0), [], 0, 0
    with many.Pool(Disk().load, capacity=3) as pool:
        for name in choose.choices("abcdef", k=200):
            pool.get(name)
            if name in recent:
                recent.remove(name)
                hits += 1
            recent.append(name)
            if len(recent) > 3:
                recent.pop(0)
                evictions += 1
            assert pool.stats() == (hits, pool.stats().misses, evictions, 0, tuple(recent), ())
        assert pool.stats().misses == 200 - hits


def test_a_removed_adapter_stays_valid_and_the_pool_does_not_hold_it() -> None:
    loaded: dict[str, Any] = {}

    def load(name: str) -> Any:
        found = jax.tree.map(jnp.asarray, adapter(name))
        loaded[name] = weakref.ref(found["w"].a)
        return found

    with many.Pool(load, capacity=1) as pool:
        first = pool.get("a")
        pool.get("b")
        assert float(first["w"].a[0, 0]) == ord("a")
        del first
        assert loaded["a"]() is None and loaded["b"]() is not None
    assert loaded["b"]() is None  # a closed pool holds nothing


def test_a_prefetch_returns_at_once_and_a_step_runs_meanwhile() -> None:
    disk = Disk()
    disk.held["slow"] = threading.Event()
    step = jax.jit(lambda adapter, x: x @ adapter["w"].a @ adapter["w"].b)
    with many.Pool(disk.load, capacity=2) as pool:
        pool.get("fast")
        pool.prefetch("slow")
        assert disk.started["slow"].wait(LONG)
        for _ in range(3):
            assert step(pool.get("fast"), jnp.ones(2)).shape == (2,)
        assert pool.stats().loading == ("slow",) and "slow" not in pool.stats().resident
        disk.held["slow"].set()
        eventually(lambda: "slow" in pool.stats().resident)
        pool.get("slow")
        assert pool.stats()[:4] == (4, 1, 0, 0)  # the prefetched one is a hit
        pool.prefetch("slow")
        assert disk.loads["slow"] == 1


def test_a_get_does_not_wait_for_the_prefetches_of_others() -> None:
    disk = Disk()
    disk.held["slow"] = threading.Event()
    with many.Pool(disk.load, capacity=4) as pool:
        for name in ("slow", "queued"):
            pool.prefetch(name)
        assert disk.started["slow"].wait(LONG)
        pool.get("queued")  # takes the load over from the queue
        pool.get("other")
        assert pool.stats().loading == ("slow",)
        disk.held["slow"].set()
    assert disk.loads == {"slow": 1, "queued": 1, "other": 1}


def test_threads_that_ask_for_one_adapter_share_its_load() -> None:
    disk = Disk()
    disk.held["a"] = threading.Event()
    with many.Pool(disk.load, capacity=1) as pool, ThreadPoolExecutor(8) as threads:
        asked = [threads.submit(pool.get, "a") for _ in range(8)]
        eventually(lambda: pool.stats().misses == 8)
        disk.held["a"].set()
        assert all(bits(future.result(LONG)) == bits(adapter("a")) for future in asked)
        assert disk.loads["a"] == 1


def test_an_error_comes_to_those_who_wait_and_the_pool_remains_usable() -> None:
    disk = Disk()
    disk.held["bad"], disk.failing = threading.Event(), {"bad"}
    with many.Pool(disk.load, capacity=2) as pool, ThreadPoolExecutor(4) as threads:
        pool.prefetch("bad")
        waiting = [threads.submit(pool.get, "bad") for _ in range(3)]
        eventually(lambda: pool.stats().misses == 3)
        assert bits(pool.get("good")) == bits(adapter("good"))  # meanwhile
        disk.held["bad"].set()
        for future in waiting:
            with pytest.raises(OSError, match="bad cannot be read"):
                future.result(LONG)
        assert disk.loads["bad"] == 1 and pool.stats()[3:] == (1, ("good",), ())
        with pytest.raises(OSError, match="bad cannot be read"):
            pool.get("bad")
        disk.failing = set()
        assert bits(pool.get("bad")) == bits(adapter("bad"))
        assert pool.stats().resident == ("good", "bad") and pool.stats().failures == 2


def test_a_failing_prefetch_is_counted_and_tried_again() -> None:
    disk = Disk()
    disk.failing = {"bad"}
    with many.Pool(disk.load, capacity=2) as pool:
        pool.prefetch("bad")
        eventually(lambda: pool.stats().failures == 1)
        assert pool.stats().loading == ()
        disk.failing = set()
        pool.get("bad")


def test_what_is_not_an_adapter_is_an_error() -> None:
    with many.Pool(lambda name: {"w": jnp.ones(3)}, capacity=1) as pool:
        with pytest.raises(lj.AdapterError, match="`load` returned it for 'a'"):
            pool.get("a")
        assert pool.stats().failures == 1


def test_a_change_of_the_returned_dict_is_not_seen_by_others() -> None:
    with many.Pool(Disk().load, capacity=1) as pool:
        pool.get("a").clear()
        assert list(pool.get("a")) == ["w"]


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.sweep) for seed in range(1, 10))])
def test_many_threads_with_slow_and_failing_loads_see_only_their_adapters(seed: int) -> None:
    names, failing = "abcdefgh", {"d", "g"}

    def load(name: str) -> Any:
        time.sleep(random.random() * 0.002)
        if name in failing and random.random() < 0.7:
            raise OSError(name)
        return adapter(name)

    def work(pool: many.Pool, number: int) -> tuple[int, int]:
        choose, calls, errors = random.Random(100 * seed + number), 0, 0
        for _ in range(60):
            name = choose.choice(names)
            if choose.random() < 0.3:
                pool.prefetch(name)
                continue
            calls += 1
            try:
                assert pool.get(name)["w"].a[0, 0] == ord(name)
            except OSError as error:
                assert str(error) == name and name in failing
                errors += 1
        return calls, errors

    with many.Pool(load, capacity=3, threads=2) as pool, ThreadPoolExecutor(6) as threads:
        done = [future.result(LONG) for future in [threads.submit(work, pool, number) for number in range(6)]]
        stats = pool.stats()
    calls, errors = (sum(counts) for counts in zip(*done, strict=True))
    assert stats.hits + stats.misses == calls and errors
    assert len(stats.resident) <= 3 and stats.evictions


def test_checkpoints_are_loaded_in_the_background(tmp_path: pathlib.Path) -> None:
    params = {"w": jnp.ones((2, 2))}
    for name in "abc":
        lj.save(tmp_path / name, jax.tree.map(jnp.asarray, adapter(name)), base=params)
    with many.Pool(lambda name: lj.restore(tmp_path / name, base=params), capacity=2, threads=2) as pool:
        for name in "abc":
            pool.prefetch(name)
        found = {name: pool.get(name) for name in "abc"}
        assert bits(found) == bits({name: adapter(name) for name in "abc"})
        with pytest.raises(lj.CheckpointError):
            pool.get("none")
        stacked = many.stack({"now": pool.get("a")})
        stacked = many.swap(stacked, "now", pool.get("b"))
        assert float(stacked.members["w"].a[0, 0, 0]) == ord("b")


def test_a_closed_pool_refuses_calls_and_drops_what_waits() -> None:
    disk = Disk()
    disk.held["slow"] = threading.Event()
    pool = many.Pool(disk.load, capacity=2)
    for name in ("slow", "queued"):
        pool.prefetch(name)
    assert disk.started["slow"].wait(LONG)
    threading.Timer(0.01, disk.held["slow"].set).start()
    pool.close()
    assert disk.loads["queued"] == 0 and pool.stats()[4:] == ((), ())
    for call in (pool.get, pool.prefetch):
        with pytest.raises(lj.AdapterError, match="Expected an open pool; it has been closed"):
            call("a")


@pytest.mark.parametrize("fields", [{"capacity": 0}, {"capacity": 1, "threads": 0}])
def test_a_size_below_one_is_an_error(fields: Any) -> None:
    with pytest.raises(lj.SpecError, match="Expected an integer of at least 1"):
        many.Pool(adapter, **fields)
