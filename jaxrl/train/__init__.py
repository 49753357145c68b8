"""The training loops: synchronous, and with actors that run apart from the learner."""

from jaxrl.processes import PREEMPTED as PREEMPTED
from jaxrl.processes import LeaderStopped as LeaderStopped
from jaxrl.processes import Preempted as Preempted
from jaxrl.processes import Preemption as Preemption
from jaxrl.rollouts import NonFiniteScores as NonFiniteScores
from jaxrl.rollouts import Scorer as Scorer
from jaxrl.train.asynchronous import AsynchronousTrainer as AsynchronousTrainer
from jaxrl.train.asynchronous import Stalled as Stalled
from jaxrl.train.asynchronous import TooManyRefusals as TooManyRefusals
from jaxrl.train.metrics import summarise as summarise
from jaxrl.train.synchronous import NonFiniteUpdates as NonFiniteUpdates
from jaxrl.train.synchronous import SamplerDrift as SamplerDrift
from jaxrl.train.synchronous import Span as Span
from jaxrl.train.synchronous import Trainer as Trainer
from jaxrl.train.tape import Tape as Tape
