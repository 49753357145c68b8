"""Actors write and score rollouts apart from the learner.

work items ─► pool (threads | processes | Ray) ─► actor: newest weights, generate, score
│
learner ◄─ checks, journal, acknowledgement ◄─ result ┘
"""

from jaxrl.actors.actor import Actor, ActorConfig, WeightsUnavailable
from jaxrl.actors.factory import Factory
from jaxrl.actors.journal import Journal, JournalError
from jaxrl.actors.ledger import ActorStatistics
from jaxrl.actors.pool import NoActorsLeft, Pool, PoolConfig
from jaxrl.actors.processes import ActorFailed, Processes
from jaxrl.actors.ray_actors import RayActors
from jaxrl.actors.threads import Threads
from jaxrl.actors.validation import RolloutChecks
from jaxrl.actors.work import AbstractActor, Interrupted, Refusal, Result, Timings, WorkItem

__all__ = [
    "AbstractActor",
    "Actor",
    "ActorConfig",
    "ActorFailed",
    "ActorStatistics",
    "Factory",
    "Interrupted",
    "Journal",
    "JournalError",
    "NoActorsLeft",
    "Pool",
    "PoolConfig",
    "Processes",
    "RayActors",
    "Refusal",
    "Result",
    "RolloutChecks",
    "Threads",
    "Timings",
    "WeightsUnavailable",
    "WorkItem",
]
