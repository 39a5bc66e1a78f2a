"""A pool of adapters: some in memory, by recent use, the others on disk until they are needed."""

from __future__ import annotations

import collections
import dataclasses
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import NamedTuple, Self

import jax

from .._core import display
from .._core.adapter import Adapter, Adapters, check_adapter
from .._core.numbers import integer
from .._core.table import Table, Tabular
from .._errors import AdapterError


class PoolStats(NamedTuple):
    """What a pool has done, and what it holds.

    Attributes:
      hits: calls of `get` that found the adapter in memory.
      misses: calls of `get` that loaded it, or waited for another thread that was loading it.
      evictions: adapters that were removed for others.
      failures: loads that raised.
      resident: the names in memory, the least recently used first.
      loading: the names that are being loaded, or wait for it.
    """

    hits: int
    misses: int
    evictions: int
    failures: int
    resident: tuple[str, ...]
    loading: tuple[str, ...]


@dataclasses.dataclass
class _Load:
    """A load that was asked for; one thread runs it."""

    result: Future[Adapters] = dataclasses.field(default_factory=Future)
    is_taken: bool = False


class Pool(Tabular):
    """Adapters in memory by recent use; the others are loaded when asked for. Safe under threads.

    `get` returns an adapter. If it is not in memory, the calling thread loads it; `prefetch` has a background thread
    load it, and returns at once, so that a step can run in the meantime. An adapter that several threads ask for is
    loaded once. An adapter that was removed stays valid for those who hold it.

    An error of `load` is raised to each caller of `get` that waits for that load. It is not kept: the next `get`
    tries again. That of a prefetch which nobody waits for is only counted.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> part = lj.Adapter(lj.LoRA(rank=1, alpha=1), "io", a=jnp.ones((2, 1)), b=jnp.ones((1, 2)))
    >>> with lj.many.Pool(lambda name: {"kernel": part}, capacity=2) as pool:
    ...     for name in ["fr", "de", "fr", "pl"]:
    ...         adapter = pool.get(name)
    ...     print(pool.stats())
    PoolStats(hits=1, misses=3, evictions=1, failures=0, resident=('fr', 'pl'), loading=())

    Args:
      load: returns the adapter of a name, such as `lambda name: lora_jax.restore(root / name, base=params)`. It is
        called in several threads at once, for different names.
      capacity: the number of adapters in memory, at least 1. Those that are being loaded come on top of it.
      threads: the number of background threads for `prefetch`.

    Raises:
      SpecError: for a capacity or a number of threads below 1.
    """

    def __init__(self, load: Callable[[str], Adapters], *, capacity: int, threads: int = 1) -> None:
        self._load = load
        self._capacity = integer("capacity", capacity, least=1)
        self._executor = ThreadPoolExecutor(integer("threads", threads, least=1), thread_name_prefix="lora_jax.Pool")
        self._lock = threading.Lock()  # for all that follows; never held during a load
        self._resident: collections.OrderedDict[str, Adapters] = collections.OrderedDict()
        self._loads: dict[str, _Load] = {}
        self._counts: collections.Counter[str] = collections.Counter()
        self._is_closed = False

    def get(self, name: str) -> dict[str, Adapter]:
        """Returns an adapter, and makes it the most recently used.

        Raises:
          AdapterError: if the pool is closed, or `load` does not return an adapter.
          Exception: what `load` raises.
        """
        with self._lock:
            self._check_open()
            if name in self._resident:
                self._counts["hits"] += 1
                self._resident.move_to_end(name)
                return dict(self._resident[name])
            self._counts["misses"] += 1
            load = self._loads.setdefault(name, _Load())
        self._run(name, load)  # also one that waits in the queue of the background threads
        return dict(load.result.result())

    def prefetch(self, name: str) -> None:
        """Has a background thread load an adapter, unless it is in memory or being loaded. Returns at once.

        Raises:
          AdapterError: if the pool is closed.
        """
        with self._lock:
            self._check_open()
            if name in self._resident or name in self._loads:
                return
            load = self._loads[name] = _Load()
            self._executor.submit(self._run, name, load)

    def stats(self) -> PoolStats:
        """Returns the counts so far, and the names in memory."""
        with self._lock:
            return PoolStats(
                hits=self._counts["hits"],
                misses=self._counts["misses"],
                evictions=self._counts["evictions"],
                failures=self._counts["failures"],
                resident=tuple(self._resident),
                loading=tuple(self._loads),
            )

    def _table(self) -> Table:
        with self._lock:
            resident, loading, counts = dict(self._resident), [*self._loads], dict(self._counts)
        rows = [[name, "in memory", *display.cells(adapter).values()] for name, adapter in resident.items()]
        rows += [[name, "loading", "", "", ""] for name in loading]
        found = ", ".join(f"{name} {counts.get(name, 0)}" for name in ("hits", "misses", "evictions", "failures"))
        notes = [f"{len(resident)} of at most {self._capacity} in memory, the least recently used first; {found}"]
        return Table(["adapter", "state", *display.cells({})], rows, {"leaves", "memory"}, notes)

    def close(self) -> None:
        """Removes all adapters, after the loads that run have ended. Loads that wait are dropped."""
        with self._lock:
            self._is_closed = True
        self._executor.shutdown(cancel_futures=True)
        with self._lock:
            self._resident.clear()
            self._loads.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._is_closed:
            raise AdapterError("Expected an open pool; it has been closed.\n  Make another Pool.")

    def _run(self, name: str, load: _Load) -> None:
        """Loads an adapter, unless another thread does or did."""
        with self._lock:
            if load.is_taken:
                return
            load.is_taken = True
        try:
            adapter = self._load(name)
            check_adapter(adapter, f"`load` returned it for {name!r}.")
            jax.block_until_ready(dict(adapter))  # here, not in the step that uses it
        except BaseException as error:
            with self._lock:
                self._counts["failures"] += 1
                self._loads.pop(name, None)
            load.result.set_exception(error)
            return
        with self._lock:
            self._loads.pop(name, None)
            if not self._is_closed:
                self._resident[name] = adapter
                while len(self._resident) > self._capacity:
                    self._resident.popitem(last=False)
                    self._counts["evictions"] += 1
        load.result.set_result(adapter)
