"""Plans: where the arrays of a JAX program lie on a mesh. Knows nothing of models or of RL.

`plan` finds one for a function and a cluster, `simulate` costs one that somebody else made, and
`train_step` makes a step whose inside a plan may change; `layers` writes layers so that it may
reach them. `transformer` describes a decoder without code, which `plan` and `simulate` take, too.
`profile` measures the machine that is here. `fused` tells the planner what a
kernel computes.
"""

from sharding.compiled.compile_check import Report as Report
from sharding.costs.constants import Calibration as Calibration
from sharding.costs.strategies import Strategy as Strategy
from sharding.execution.execute import TrainStep as TrainStep
from sharding.execution.execute import train_step as train_step
from sharding.execution.layers import layers as layers
from sharding.machines.profiling import profile as profile
from sharding.machines.topology import Cluster as Cluster
from sharding.machines.topology import Node as Node
from sharding.paths import leaf_path as leaf_path
from sharding.plan import BoundPlan as BoundPlan
from sharding.plan import Plan as Plan
from sharding.planner import plan as plan
from sharding.programs.fused import fused as fused
from sharding.programs.fused import planned_for as planned_for
from sharding.programs.transformer import transformer as transformer
from sharding.search.space import Constraints as Constraints
from sharding.search.space import DoesNotFit as DoesNotFit
from sharding.simulation import simulate as simulate
