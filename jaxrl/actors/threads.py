"""Actors as threads of this process: the default, with no server and no network."""

from jaxrl.actors.pool import Pool, PoolConfig
from jaxrl.actors.work import AbstractActor, Build


class Threads(Pool):
    """Actors that share this process and its devices with the learner.

    Compiled programs run outside the interpreter's lock, so an actor generates while the learner
    updates as far as the devices allow. An actor whose parameters lie on other devices than the
    learner's generates there.
    """

    def __init__(self, size: int, build: Build, *, config: PoolConfig | None = None) -> None:
        """Prepares; `start` starts.

        Args:
          size: how many actors, named "actor-0", "actor-1", ….
          build: makes the actor of a name; called in its thread, and again after its death.
          config: how actors are treated; defaults where None.
        """
        super().__init__(size, config)
        self._build = build

    def _hire(self, name: str) -> AbstractActor:
        return self._build(name)
