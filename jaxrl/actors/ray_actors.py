"""Actors on a Ray cluster, placed and restarted by Ray; needs the extra `ray`."""

import contextlib
import os
import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from jaxrl.actors.factory import Factory
from jaxrl.actors.pool import Pool, PoolConfig
from jaxrl.actors.processes import ActorFailed, answer_to
from jaxrl.actors.wire import item_from_json, item_to_json, result_to_wire
from jaxrl.actors.work import AbstractActor, Accept, Interrupted, Score, Supply, WorkItem

_LOOK_S = 0.2
_OF_THE_POOL = {"max_restarts", "max_task_retries", "max_concurrency"}


class RayActors(Pool):
    """Actors that Ray places on its cluster, starts, and starts again when they die.

    Items and results cross the cluster as JSON and raw bytes, as between any processes here; what
    Ray itself pickles stays within the cluster, which trusts its members. Weights come from the
    store that the factory's config names.
    """

    def __init__(
        self,
        size: int,
        build: Factory,
        *,
        options: Mapping[str, Any] | None = None,
        connect_s: float = 300.0,
        config: PoolConfig | None = None,
    ) -> None:
        """Prepares; `start` connects to Ray where this process has not done so, and starts.

        A connection that `start` has made `close` ends.

        Args:
          size: how many actors, named "actor-0", "actor-1", ….
          build: makes them.
          options: of each Ray actor, such as `num_gpus`, `resources` or `runtime_env`; not those
            that say how often it is tried again and how many items it has at once.
          connect_s: the longest that an actor may need to come up, again after each death.
          config: how actors are treated; defaults where None.

        Raises:
          ImportError: Ray is not installed.
          ValueError: `options` has what only the pool can say.
        """
        super().__init__(size, config)
        if taken := _OF_THE_POOL & set(options or {}):
            raise ValueError(
                "a Ray actor's restarts, retries and concurrency are the pool's to say: leave "
                f"{', '.join(sorted(taken))} out of options; how often an actor may die in a row "
                "is PoolConfig.max_restarts"
            )
        try:
            import ray
        except ImportError as error:
            raise ImportError(
                'actors on a Ray cluster need Ray: pip install "jaxrl-safe[ray]"'
            ) from error
        self._ray, self._build = ray, build
        self._options, self._connect_s = dict(options or {}), connect_s
        self._hosts: dict[str, Any] = {}
        self._connected = False

    def start(self, accept: Accept, supply: Supply | None = None) -> None:
        if not self._ray.is_initialized():
            self._ray.init()  # the cluster of RAY_ADDRESS, or one of this machine
            self._connected = True
        super().start(accept, supply)

    def close(self) -> None:
        super().close()
        for host in self._hosts.values():
            self._ray.kill(host)
        self._hosts = {}
        if self._connected:
            self._ray.shutdown()
            self._connected = False

    def _hire(self, name: str) -> AbstractActor:
        """The actor of a name, once Ray has it up."""
        host = self._hosts.get(name)
        if host is None:
            host = self._hosts[name] = self._place(name)
        remote = _OnRay(self._ray, host, self._closed)
        end = time.monotonic() + self._connect_s
        while True:
            try:
                remote.wait(host.process.remote(), self._connect_s)
                return remote
            except ActorFailed as error:
                unavailable = self._ray.exceptions.ActorUnavailableError
                if not isinstance(error.__cause__, unavailable) or time.monotonic() > end:
                    del self._hosts[name]  # Ray has given it up, as when it cannot be built
                    raise
            self._closed.wait(_LOOK_S)  # Ray is starting it again

    def _place(self, name: str) -> Any:
        # Restarts are Ray's; which item is handed out again is the ledger's to say.
        options = {"num_cpus": 1} | self._options
        options |= {"max_restarts": -1, "max_task_retries": 0, "max_concurrency": 2}
        remote = self._ray.remote(_Host).options(**options)
        return remote.remote(name, self._build.target, dict(self._build.config))


class _Host:
    """An actor in a process of Ray's."""

    def __init__(self, name: str, target: str, config: dict[str, Any]) -> None:
        self._actor = Factory(target=target, config=config)(name).__enter__()
        self._written: dict[int, Score] = {}

    def process(self) -> int:
        return os.getpid()

    def write(self, fields: dict[str, Any]) -> None:
        item = item_from_json(fields)
        self._written[item.id] = self._actor.write(item)

    def score(self, item: int) -> tuple[dict[str, Any], bytes]:
        return result_to_wire(self._written.pop(item)())


class _OnRay:
    """The actor behind a Ray handle."""

    def __init__(self, ray: Any, host: Any, closed: threading.Event) -> None:
        self._ray, self._host = ray, host
        self._closed, self._stop = closed, threading.Event()

    def __enter__(self) -> "_OnRay":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, ActorFailed) and isinstance(
            error.__cause__, self._ray.exceptions.RayTaskError
        ):
            # It raised, so that its state is in doubt; Ray starts it afresh.
            with contextlib.suppress(self._ray.exceptions.RayError):
                self._ray.kill(self._host, no_restart=False)

    def interrupt(self) -> None:
        self._stop.set()

    def write(self, item: WorkItem) -> Score:
        """Has an item written; what it returns has it scored, and raises alike.

        Raises:
          ActorFailed: the actor raised or died.
          Interrupted: see `interrupt`.
        """
        self.wait(self._host.write.remote(item_to_json(item)))
        return lambda: answer_to(item, *self.wait(self._host.score.remote(item.id)))

    def wait(self, reference: Any, timeout_s: float = float("inf")) -> Any:
        """The value of a reference."""
        waited_s = 0.0
        while not self._ray.wait([reference], timeout=_LOOK_S)[0]:
            waited_s += _LOOK_S
            if self._stop.is_set() or self._closed.is_set():
                raise Interrupted("the pool closes")
            if waited_s > timeout_s:
                raise ActorFailed(f"Ray did not bring it up within {timeout_s:.0f} s (connect_s)")
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            raise ActorFailed(f"{type(error).__name__}: {error}") from error
