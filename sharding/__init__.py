"""Plans: where the arrays of a JAX program lie on a mesh. Knows nothing of models or of RL."""

from sharding.plan import BoundPlan as BoundPlan
from sharding.plan import Plan as Plan
from sharding.plan import leaf_path as leaf_path
