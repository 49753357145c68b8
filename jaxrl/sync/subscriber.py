"""The actor's end: fetches, rebuilds and verifies a version beside the one that serves."""

import functools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax

from jaxrl.sync import multihost, trees
from jaxrl.sync.acks import Acker
from jaxrl.sync.errors import Refused, StoreError, SyncError
from jaxrl.sync.fetching import BadPayload, Fetched, fetch
from jaxrl.sync.index import Index
from jaxrl.sync.manifest import Manifest, Payload, checked_name, read_manifest, seal
from jaxrl.sync.quantise import dequantiser, quantised_like
from jaxrl.sync.rebuild import rebuild
from jaxrl.sync.routes import Step, route
from jaxrl.sync.stores import Store
from kernels import sparse_delta

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Update:
    """One change of the weights that serve.

    Attributes:
      version: that serves now.
      previous: that served before; None at the first.
      sequence: number of the publication.
      kinds: of the payloads that were applied, in order.
      size_bytes: fetched.
      fetch_s: seconds of finding and fetching, beside generation.
      apply_s: seconds of rebuilding and verifying, beside generation.
      pause_s: seconds for which generation had to wait for this one exchange.
    """

    version: int
    previous: int | None
    sequence: int
    kinds: tuple[str, ...]
    size_bytes: int
    fetch_s: float
    apply_s: float
    pause_s: float


@dataclass(frozen=True)
class _Weights:
    """A complete, verified version, and what it took to make it.

    Attributes:
      manifest: of the version.
      params: as published.
      digest: of them.
      usable: what a model computes with; the same unless they are quantised.
    """

    manifest: Manifest
    params: Any
    digest: sparse_delta.TreeDigest
    usable: Any
    kinds: tuple[str, ...] = ()
    size_bytes: int = 0
    fetch_s: float = 0.0
    apply_s: float = 0.0


class _BadBase(Exception):
    """The weights that a delta was applied to are not what they were when they were verified."""


class Subscriber:
    """Weights of one run at one actor; those that serve are always one complete, verified version.

    `prepare` may run in a thread of its own, beside generation; `flip` is called where generation
    can change weights, between two batches. A version that cannot be fetched, applied or verified
    never serves: the reason is logged and the old one stays. Both versions are in memory until
    nobody uses the old one.

    Where the actor's arrays lie over several processes, each of them makes a subscriber, and they
    call `prepare` and `flip` together.

    >>> from jaxrl.sync import MemoryStore, Publisher
    >>> store, params = MemoryStore(), {"w": jnp.arange(8.0)}
    >>> _ = Publisher(store, run_id="docs").publish(params, version=3)
    >>> subscriber = Subscriber(store, run_id="docs", like=jax.eval_shape(lambda: params))
    >>> subscriber.prepare(), subscriber.flip().version, subscriber.prepare()
    (True, 3, False)
    """

    def __init__(
        self,
        store: Store,
        *,
        run_id: str,
        like: Any,
        name: str = "actor",
        dequantise: bool = False,
        heartbeat_s: float = 60.0,
    ) -> None:
        """Prepares to subscribe; reads nothing yet.

        Args:
          store: of the publisher.
          run_id: of the publisher.
          like: pytree of `jax.ShapeDtypeStruct` or arrays: shapes, dtypes and, where they have
            one, shardings of the weights here. Mesh and layout may differ from the learner's.
          name: of this subscriber, different from every other's.
          dequantise: for models that know no `Quantised`: `params` then are as `like` says, however
            they are published, made beside generation and kept beside what was published.
          heartbeat_s: seconds between signs of life in the store; well below the publisher's
            `ack_expiry_s`.

        Raises:
          ValueError: `run_id` or `name` cannot stand in a key.
        """
        self._store = store
        self.run_id, self.name = checked_name("run_id", run_id), checked_name("name", name)
        self._like = jax.tree.map(_shape, like)
        self._shared = multihost.is_spread(self._like)
        self._index = Index(store, run_id, ahead=True)
        self._acker = Acker(store, run_id, name, every_s=heartbeat_s)
        self._expand = dequantiser(self._like) if dequantise else None
        self._said: set[str] = set()  # problems and complaints since the last success
        self._serving: _Weights | None = None
        self._next: _Weights | None = None
        self._preparing, self._swapping = threading.Lock(), threading.Lock()
        self.problem: str | None = None
        """Why the last `prepare` did not give what it could have given; None where it did."""

    @property
    def version(self) -> int | None:
        """What the learner calls the weights that serve; None before the first flip."""
        return None if self._serving is None else self._serving.manifest.version

    @property
    def params(self) -> Any:
        """The weights that serve.

        Raises:
          SyncError: none do yet.
        """
        return self._served.usable

    @property
    def published(self) -> Any:
        """The weights that serve, bit for bit as they were published: quantised if they were.

        Raises:
          SyncError: none do yet.
        """
        return self._served.params

    @property
    def _served(self) -> _Weights:
        if self._serving is None:
            raise SyncError("no version serves yet: call prepare() until it is true, then flip()")
        return self._serving

    def prepare(self, version: int | None = None) -> bool:
        """Fetches, rebuilds and verifies a version beside the one that serves.

        What damage, delay or a broken connection prevents is logged (once, until a version
        arrives), kept in `problem`, and tried again by the next call. Of a damaged payload the
        publisher is told, which makes a way past it.

        Args:
          version: which one; the newest that can be had where None.

        Returns:
          Whether another version than the one that serves is ready for `flip`.

        Raises:
          WrongModel: the weights published have other names, shapes or dtypes than `like`.
          Refused: the store asks for another secret.
        """
        with self._preparing:
            self.problem = None
            started = time.perf_counter()
            try:
                multihost.on_first(self._index.refresh, shared=self._shared)
                self._prepare(version, started)
                # Last, as nobody waits for it.
                multihost.on_first(self._acknowledge, shared=self._shared)
            except StoreError as error:
                self._complain(error)
            return self._next is not None

    def flip(self) -> Update | None:
        """Lets the prepared version serve; all that generation waits for.

        Returns:
          What changed; None where nothing was prepared.
        """
        started = time.perf_counter()
        with self._swapping:
            new, old = self._next, self._serving
            if new is None:
                return None
            self._serving, self._next = new, None
        pause_s = time.perf_counter() - started
        return Update(
            version=new.manifest.version,
            previous=None if old is None else old.manifest.version,
            sequence=new.manifest.sequence,
            kinds=new.kinds,
            size_bytes=new.size_bytes,
            fetch_s=new.fetch_s,
            apply_s=new.apply_s,
            pause_s=pause_s,
        )

    def _acknowledge(self) -> None:
        if self._serving is not None:
            self._acker.send(self._serving.manifest.sequence)

    def _prepare(self, version: int | None, started: float) -> None:
        start = self._next or self._serving
        avoid: set[str] = set()
        while True:
            steps = self._agreed(functools.partial(self._plan, version, start, avoid))
            if not steps:
                return
            try:
                new = self._build(start, steps, started)
            except BadPayload as bad:
                self._complain(bad)
                self._tell_publisher(next(s.payload for s in steps if s.payload.key == bad.key))
                avoid.add(bad.key)
            except _BadBase as bad:
                self._complain(bad)
                avoid |= {steps[-1].payload.key} if start is None else set()
                start = None
            else:
                with self._swapping:
                    self._next = new
                self._said = set()
                return

    def _plan(self, version: int | None, start: _Weights | None, avoid: set[str]) -> list[Step]:
        """The way to the newest publication that is wanted and can be reached; empty without."""
        at = -1 if start is None else start.manifest.sequence
        have = None if start is None else start.manifest.id
        for sequence, goal in sorted(self._index.manifests.items(), reverse=True):
            wanted = sequence > at if version is None else goal.version == version
            if not wanted or goal.id == have:
                continue
            steps = route(
                self._index.manifests.values(),
                goal.id,
                have=have,
                shortcuts=self._index.shortcuts,
                avoid=avoid,
            )
            if steps is not None:
                return steps
        return []

    def _agreed(self, plan: Callable[[], list[Step]]) -> list[Step]:
        """The plan of the first process, in all of them."""

        def act() -> list[Any]:
            return [(asdict(step.payload), seal(step.target)[1].decode()) for step in plan()]

        if not self._shared:
            return plan()
        return [
            Step(Payload(**payload), read_manifest(target.encode()))
            for payload, target in multihost.on_first(act)
        ]

    def _build(self, start: _Weights | None, steps: Sequence[Step], started: float) -> _Weights:
        """The weights that the steps lead to, verified where they lie."""
        goal = steps[-1].target
        if start is None or steps[0].payload.kind == "anchor":
            params, known = self._template(goal), None
        else:
            params, known = start.params, start.digest
        found = [self._fetch(step.payload, params) for step in steps]
        fetched = time.perf_counter()
        params, _ = rebuild(params, known, steps, [each.data for each in found])
        # The checks so far are of what was computed; this one is of what lies on the devices.
        digest = trees.digest(params)
        if digest.root.hex() != goal.digest:
            raise _BadBase(
                f"version {goal.version} came out as {digest}, not as {goal.digest}: the weights "
                "that it was made from, or this machine's memory, are damaged"
            )
        usable = params if self._expand is None else self._expand(params)
        return _Weights(
            manifest=goal,
            params=params,
            digest=digest,
            usable=jax.block_until_ready(usable),
            kinds=tuple(step.payload.kind for step in steps),
            size_bytes=sum(each.size_bytes for each in found),
            fetch_s=fetched - started,
            apply_s=time.perf_counter() - fetched,
        )

    def _fetch(self, payload: Payload, receiver: Any) -> Fetched:
        """A payload, or what this process needs of it; where one does not get it, none goes on."""
        failure: Exception | None = None
        found = Fetched(b"", 0)
        try:
            found = fetch(self._store, payload, receiver=receiver if self._shared else None)
        except Exception as error:  # whatever it is, the others wait for word of it
            failure = error
        worst = multihost.worst(_gravity(failure), shared=self._shared)
        if failure is not None and _gravity(failure) == worst:
            raise failure
        if worst:
            raise _elsewhere(worst, payload.key)
        return found

    def _template(self, goal: Manifest) -> Any:
        if goal.quantise is None:
            return self._like
        return quantised_like(self._like, goal.quantise, kept=goal.kept)

    def _complain(self, error: Exception) -> None:
        serving = "none" if self.version is None else str(self.version)
        self.problem = str(error)
        level = logging.DEBUG if self.problem in self._said else logging.WARNING
        self._said.add(self.problem)
        _log.log(level, "%s: version %s goes on serving: %s", self.name, serving, error)

    def _tell_publisher(self, payload: Payload) -> None:
        """Complains of a payload, once."""
        if payload.key not in self._said:
            self._said.add(payload.key)
            multihost.on_first(lambda: self._acker.complain(payload), shared=self._shared)


_FETCH_FAILURES = (BadPayload, StoreError, sparse_delta.WrongModel, Refused)
"""The gravest last: what comes to one process of an actor, all of them raise alike, since each
kind is dealt with in another way, and together."""


def _gravity(failure: Exception | None) -> int:
    """0 of no failure, then as in `_FETCH_FAILURES`; the highest is anything else."""
    if failure is None:
        return 0
    known = (i for i, kind in enumerate(_FETCH_FAILURES, 1) if isinstance(failure, kind))
    return next(known, 1 + len(_FETCH_FAILURES))


def _elsewhere(gravity: int, key: str) -> Exception:
    """The failure of another process."""
    reason = "another process did not get it; see its own log"
    if gravity == 1:
        return BadPayload(key, reason)
    kinds = (StoreError, sparse_delta.WrongModel, Refused, SyncError)  # but the first of them
    return kinds[gravity - 2](f"{key}: {reason}")


def _shape(leaf: Any) -> Any:
    """Shape, dtype and place of a leaf, without its values."""
    if not isinstance(leaf, jax.Array):
        return leaf
    placed = leaf.sharding if leaf.committed else None
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed)
