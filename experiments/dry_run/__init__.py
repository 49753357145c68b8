"""What would a run need on machines that are not here, and how should they be divided?

    python -m experiments.dry_run --cluster v5p:4x4x4 --model llama3-8b

plans every program of asynchronous RL for those chips: the update, log-probabilities of the
reference, reward and cost models, prefill and decoding, and the device halves of publishing and
receiving weights; says how the chips are best divided between learner and actors, how fast a step
will be and what limits it; and asks the production compilers how much memory each program takes
(`--no-compile` leaves that out; with it, the extra `aot` is needed, and a minute or two a program).
What the compilers said is kept in `--answers`: an interrupted run goes on where it was.

`--suite` does so for the configurations of the README's table, `--workloads` plans runs of other
lengths and links. `python -m experiments.safety --dry-run CLUSTER`, and every other experiment that
trains, is the same command with the sizes of that experiment.

Exit status 1 if it does not fit, with the smallest shortfall. No accelerator is needed; without
compilation a configuration takes about a minute on two CPU cores.
"""

from experiments.dry_run.config import OWN as OWN
from experiments.dry_run.config import DryRunConfig as DryRunConfig
from experiments.dry_run.hand_over import Sizes as Sizes
from experiments.dry_run.hand_over import hand_over as hand_over
from experiments.dry_run.hand_over import hand_over_sizes as hand_over_sizes
from experiments.dry_run.running import main as main
