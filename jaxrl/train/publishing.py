"""When versions are published: as they become due, one at a time, beside the updates."""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

from jaxrl.sync import BackgroundPublisher, Published, Publisher, StoreError
from jaxrl.train import multihost

_log = logging.getLogger(__name__)
_LOOK_EVERY_S = 2.0  # at what waiting actors complain of
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 5.0  # after a failure; doubled for each further one
_LAST_ATTEMPTS = 6  # at the last version, when the run is over


class Publications:
    """The publications of one run, in every process of its learner; a context manager.

    The first process decides and tells; the others do as it does.

    Attributes:
      promised: the version that is published last or under way, which work items may ask for;
        None before the first, and after its failure.
      published: what the last complete one cost.
    """

    def __init__(
        self,
        publisher: Publisher,
        *,
        every: int,
        before: Callable[[], None],
        on_turn: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Publishes nothing yet.

        Args:
          publisher: of the policy's weights.
          every: updates after which a version is due.
          before: see `BackgroundPublisher`.
          on_turn: see `BackgroundPublisher`.
          clock: seconds that never go back.
          sleep: lets so many of them pass.
        """
        self._background = BackgroundPublisher(publisher, before=before, on_turn=on_turn)
        self._every, self._clock, self._sleep = every, clock, sleep
        self._looked_at = self._not_before = -math.inf
        self._pause_s = _FIRST_PAUSE_S
        self.promised: int | None = None
        self.published: Published | None = None

    def lead(self, params: Any, version: int, *, starting: Callable[[int], None]) -> bool:
        """Takes on what is under way, and begins what is due; in the first process.

        Args:
          params: of the policy; may be donated afterwards.
          version: of it.
          starting: called with a version that actors may have from now on.

        Returns:
          Whether a publication has become complete; `published` has it.
        """
        complete = False
        if self._background.ready:
            multihost.tell({"advance": True})
            complete = self._advance()
        if self._clock() < self._not_before:  # a store that has just failed is left in peace
            return complete
        due = self.promised is None or version - self.promised >= self._every
        repair = not due and self._repair_is_due()
        if (due or repair) and self._background.free:
            multihost.tell({"publish": version, "anchor": repair})
            starting(version)
            self._start(params, version, anchor=repair)
        return complete

    def follow(self, params: Any) -> multihost.Message:
        """Does as the first process does, until it says something else: that is returned."""
        while True:
            message = multihost.hear()
            match message[0]:
                case {"advance": _}:
                    self._advance()
                case {"publish": version, "anchor": anchor}:
                    self._start(params, version, anchor=anchor)
                case _:
                    return message

    def finish(self, params: Any, version: int, *, starting: Callable[[int], None]) -> None:
        """Waits for what is under way, then publishes the run's last version if that was another.

        All processes call it together. A store that fails is tried again a few times; that it never
        took the last version is logged as an error.

        Args:
          params: of the policy at the end.
          version: of it.
          starting: see `lead`.
        """
        self._complete()
        for attempt in range(_LAST_ATTEMPTS):
            if self.promised == version:
                return
            if attempt:
                self._sleep(self._pause_s)
            starting(version)
            self._start(params, version, anchor=False)
            self._complete()
        if self.promised != version:
            _log.error(
                "the last version, %d, is in no store: publish it from the checkpoint", version
            )

    def _complete(self) -> None:
        while self._background.busy:
            self._advance()

    def _start(self, params: Any, version: int, *, anchor: bool) -> None:
        self.promised = version
        with self._failures_of(version):
            self._background.start(params, version, anchor=anchor)

    def _advance(self) -> bool:
        with self._failures_of(self.promised):
            published = self._background.advance()
            if published is not None:
                self.published, self._pause_s = published, _FIRST_PAUSE_S
                return True
        return False

    @contextlib.contextmanager
    def _failures_of(self, version: int | None) -> Iterator[None]:
        """What a store refuses is tried again."""
        try:
            yield
        except StoreError as error:
            self.promised = None if self.published is None else self.published.version
            self._not_before = self._clock() + self._pause_s
            self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
            _log.error(
                "version %s cannot be published and is tried again; the actors go on with %s: %s",
                version, self.promised, error,
            )  # fmt: skip

    def _repair_is_due(self) -> bool:
        """Whether actors wait for a payload that is damaged; asked now and then."""
        now = self._clock()
        if self.published is None or now - self._looked_at < _LOOK_EVERY_S:
            return False
        self._looked_at = now
        try:
            return self._background.damaged()
        except StoreError as error:
            _log.warning("what actors complain of cannot be read now: %s", error)
            return False

    def __enter__(self) -> "Publications":
        return self

    def __exit__(self, *_: object) -> None:
        self._background.close()
