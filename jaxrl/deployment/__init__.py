"""Which chips learn and which act, and what every program of a run asks of them."""

from jaxrl.deployment.division import Division as Division
from jaxrl.deployment.dry_run import Compiling as Compiling
from jaxrl.deployment.dry_run import DryRun as DryRun
from jaxrl.deployment.dry_run import dry_run as dry_run
from jaxrl.deployment.machines import Cut as Cut
from jaxrl.deployment.machines import cuts as cuts
from jaxrl.deployment.machines import half_and_half as half_and_half
from jaxrl.deployment.programs import Program as Program
from jaxrl.deployment.programs import actor_programs as actor_programs
from jaxrl.deployment.programs import learner_programs as learner_programs
from jaxrl.deployment.search import NothingFits as NothingFits
from jaxrl.deployment.search import Planner as Planner
from jaxrl.deployment.search import divide as divide
from jaxrl.deployment.shared_mesh import SharedMesh as SharedMesh
from jaxrl.deployment.shared_mesh import shared_mesh as shared_mesh
from jaxrl.deployment.workload import Workload as Workload
