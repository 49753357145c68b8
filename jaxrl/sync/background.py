"""Publishing beside the learner's updates: one version at a time, in a thread of its own.

    start ─► copy of the parameters (dispatched) ─┐
    update, update, …                             ├─► encode ─► write ─► tidy
    advance ◄─────────────────────────────────────┘   in the thread

In a learner of several processes `start` and `advance` are called by all of them, in the same
places of their programs: all that is collective happens within these two calls, in the thread that
also dispatches the updates, so that every process sees the collectives in one order. Beside the
updates run only what is each process's own: coding its part (on CPUs; elsewhere coding dispatches
programs of its own, and stays within `start`) and, in the first, the dealings with the store.
"""

import concurrent.futures
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

from jaxrl.sync.publisher import Local, Published, Publisher, Sections, inline


class BackgroundPublisher:
    """A publisher with at most one publication under way; a context manager.

    >>> import jax.numpy as jnp
    >>> from jaxrl.sync import MemoryStore
    >>> with BackgroundPublisher(Publisher(MemoryStore(), run_id="docs")) as background:
    ...     background.start({"w": jnp.ones(4096)}, version=0)
    ...     background.finish().version
    0
    """

    def __init__(
        self,
        publisher: Publisher,
        *,
        before: Callable[[], None] = lambda: None,
        on_turn: Callable[[], None] = lambda: None,
    ) -> None:
        """Prepares; starts no thread yet.

        Args:
          publisher: does the work; nobody else publishes with it meanwhile.
          before: called in the thread before anything of a version is coded or written, such as
            to make durable what the version came from.
          on_turn: called from the thread whenever `ready` has become true.
        """
        self._publisher, self._before, self._on_turn = publisher, before, on_turn
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="publish")
        self._sections: Sections | None = None
        self._under_way: Future[Any] | None = None
        self._looking: Future[bool] | None = None

    @property
    def busy(self) -> bool:
        """Whether a publication is under way."""
        return self._sections is not None

    @property
    def free(self) -> bool:
        """Whether `start` would find the thread without work."""
        return not self.busy and (self._looking is None or self._looking.done())

    @property
    def ready(self) -> bool:
        """Whether `advance` would not have to wait."""
        return self._under_way is not None and self._under_way.done()

    def start(self, params: Any, version: int, *, anchor: bool = False) -> None:
        """Begins to publish; returns as soon as `params` may be donated.

        Where `damaged` still looks, which `free` tells, it waits for that.

        Args:
          params: see `Publisher.publish`.
          version: see `Publisher.publish`.
          anchor: see `Publisher.publish`.

        Raises:
          RuntimeError: one publication is under way.
          Exception: what `Publisher.publish` raises, where it fails this early.
        """
        if self.busy:
            raise RuntimeError(
                f"one publication at a time: {version=} must wait until `advance` has given the "
                "last one back"
            )
        if self._looking is not None:
            # It needs the lock that a publication holds from here on, and the one thread there is.
            concurrent.futures.wait([self._looking])
        sections = self._publisher.sections(params, version, anchor=anchor)
        first = next(sections)
        self._sections = sections
        self._submit(first, prepare=self._before)

    def advance(self) -> Published | None:
        """Takes the publication on as far as it goes here, waiting for what its thread does.

        Returns:
          What it cost, once it is complete; None before.

        Raises:
          RuntimeError: none is under way.
          Exception: what `Publisher.publish` raises. The publication is over then.
        """
        sections, under_way = self._sections, self._under_way
        if sections is None or under_way is None:
            raise RuntimeError("no publication is under way: call start() first")
        self._sections = self._under_way = None
        if jax.process_count() == 1:
            return under_way.result()
        try:
            failure = under_way.exception()
            local = (
                sections.send(under_way.result()) if failure is None else sections.throw(failure)
            )
        except StopIteration as end:
            return end.value
        self._sections = sections
        self._submit(local)
        return None

    def finish(self) -> Published:
        """Waits until the publication is complete; see `advance`."""
        while (published := self.advance()) is None:
            pass
        return published

    def damaged(self) -> bool:
        """Whether a payload proved damaged; see `Publisher.damaged`. Never waits for the store.

        In the learner's first process only. The store is looked at in the thread: what one call
        has asked for a later one tells, or raises.
        """
        if self.busy:
            return False
        found = False
        if self._looking is not None:
            if not self._looking.done():
                return False
            looked, self._looking = self._looking, None
            found = looked.result()
        if not found:
            self._looking = self._executor.submit(self._publisher.damaged)
        return found

    def _submit(self, local: Local, prepare: Callable[[], None] = lambda: None) -> None:
        def work() -> Any:
            prepare()
            return local()

        sections = self._sections
        assert sections is not None
        # Where there is nobody to do anything together with, it all happens in the thread.
        alone = jax.process_count() == 1
        job = (lambda: inline(sections, work)) if alone else work
        self._under_way = self._executor.submit(job)
        self._under_way.add_done_callback(lambda _: self._on_turn())

    def close(self) -> None:
        """Waits for the thread; a publication that nobody took to its end stays incomplete."""
        self._executor.shutdown(wait=True)
        if self._sections is not None:
            self._sections.close()
            self._sections = self._under_way = None

    def __enter__(self) -> "BackgroundPublisher":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
