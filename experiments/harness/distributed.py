"""One run on several processes: how they find each other."""

import os
from dataclasses import dataclass, field

from experiments.harness.config import COSMETIC, RunOptions

AUTO = "auto"


@dataclass(frozen=True, kw_only=True)
class ProcessOptions(RunOptions):
    """What an experiment takes that runs on several processes (`jax.distributed`).

    Raises:
      ValueError: numbers that belong to no job.
    """

    coordinator: str = field(default="", metadata=COSMETIC)
    """host:port of the first of several processes, or `auto` on Cloud TPU, GKE, Slurm and Open
    MPI, which tell JAX. By default JAX_COORDINATOR_ADDRESS, else there is one process."""
    num_processes: int = field(default=0, metadata=COSMETIC)
    """How many processes the run has, where --coordinator is an address; by default
    JAX_NUM_PROCESSES."""
    process_id: int = field(default=-1, metadata=COSMETIC)
    """Which of them this is, from 0; by default JAX_PROCESS_ID."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_processes and self.process_id >= self.num_processes:
            raise ValueError(
                "processes are numbered from 0: "
                f"num_processes={self.num_processes}, process_id={self.process_id}"
            )
        if (self.num_processes or self.process_id >= 0) and not _address(self.coordinator):
            raise ValueError(
                "several processes need the address of the first: pass --coordinator HOST:PORT, "
                "or set JAX_COORDINATOR_ADDRESS"
            )


def _address(coordinator: str) -> str:
    return coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS", "")


def join(coordinator: str = "", num_processes: int = 0, process_id: int = -1) -> None:
    """Joins the processes of a run; does nothing where no address is given or in the environment.

    Call it before anything that starts a JAX backend.

    Args:
      coordinator: host:port of process 0; "auto" lets JAX ask the cluster; "" takes
        JAX_COORDINATOR_ADDRESS.
      num_processes: 0 takes JAX_NUM_PROCESSES.
      process_id: below 0 takes JAX_PROCESS_ID.

    Raises:
      ValueError: an address without the other two, or no cluster that JAX knows.
    """
    address = _address(coordinator)
    if not address:
        return
    import jax

    # On CPUs this carries data between processes; elsewhere it changes nothing.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # `jaxrl.processes.Preemption` answers SIGTERM, with one process and with many.
    jax.config.update("jax_enable_preemption_service", False)
    if address == AUTO:
        jax.distributed.initialize()
        return
    count = num_processes or int(os.environ.get("JAX_NUM_PROCESSES", 0))
    number = process_id if process_id >= 0 else int(os.environ.get("JAX_PROCESS_ID", -1))
    if not 0 <= number < count:
        raise ValueError(
            f"process {number} of {count} at {address}: pass --num-processes N and --process-id K "
            "with 0 ≤ K < N, or set JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        )
    jax.distributed.initialize(address, count, number)
