"""What has to be true before any test or doctest imports JAX."""

import os
import sys
from pathlib import Path

import pytest

assert "jax" not in sys.modules, "a pytest plugin imported jax before its settings were made"

_XLA_FLAGS = {
    # Eight devices on any machine: what is sharded in the tests is really sharded.
    "xla_force_host_platform_device_count": 8,
    # Small shapes: compiling is most of the time, and this saves a quarter of it.
    "xla_backend_optimization_level": 1,
}
for _name, _value in _XLA_FLAGS.items():
    if _name not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --{_name}={_value}".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Most of a first run is compilation; later runs, and the commands that tests start as processes
# of their own, find it in this cache.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# A missing axis is the commonest bug of this kind of code, and broadcasting hides it.
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")

os.environ.setdefault("MPLBACKEND", "Agg")

from beartype import BeartypeConf, BeartypeDecorPlace  # noqa: E402  # after the settings above
from beartype.claw import beartype_packages  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

# Every annotation of the packages is checked at every call in the tests. Not so in the records
# themselves: JAX rebuilds a pytree with whatever leaves a `tree.map` made, and the hook would
# refuse those; nor in the loops that numba compiles, which takes plain functions only.
_UNCHECKED = {"jaxrl.types", "kernels.sparse_delta.loops"}
_ROOT = Path(__file__).parent
_MODULES = {
    ".".join(file.relative_to(_ROOT).with_suffix("").parts): file
    for package in ("jaxrl", "sharding", "kernels")
    for file in (_ROOT / package).rglob("*.py")
    if file.stem not in ("__init__", "__main__")  # a package's name would bring all that is in it
}
# What names of axes mean lasts for one call, which jaxtyping keeps at the price of several
# microseconds a call; most modules, and all of the planner, name none.
_SHAPED = {name for name, file in _MODULES.items() if "jaxtyping" in file.read_text("utf-8")}
_SHAPED |= {"jaxrl.actors.ray_actors"}  # Ray cannot read the `__sizeof__` that beartype gives
install_import_hook(sorted(_SHAPED - _UNCHECKED), "beartype.beartype")
beartype_packages(
    sorted(_MODULES.keys() - _SHAPED - _UNCHECKED),
    # Where jaxtyping puts its decorator too: below `jax.custom_vjp`, above `dataclass`.
    conf=BeartypeConf(
        violation_type=TypeError,  # as jaxtyping's is, and what bad values raise without checks
        claw_is_pep526=False,
        claw_decor_place_func=BeartypeDecorPlace.FIRST,
        claw_decor_place_type=BeartypeDecorPlace.LAST,
    ),
)

# The same examples on every machine, however slow or busy it is. New ones are drawn by
# `pytest --hypothesis-profile=explore`.
settings.register_profile("explore", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("repeat", settings.get_profile("explore"), derandomize=True)
settings.load_profile("repeat")


@pytest.fixture(autouse=True)
def _names_for_doctests(doctest_namespace):
    import jax
    import jax.numpy as jnp
    import numpy as np

    doctest_namespace.update(jax=jax, jnp=jnp, np=np)


# Every compiled program holds mappings of memory, of which a process may have 65,530 on Linux;
# beyond that the compiler crashes.
_MOST_MAPPINGS = 25_000


@pytest.fixture(autouse=True, scope="module")
def _forget_programs_before_there_are_too_many():
    yield
    mappings = Path("/proc/self/maps")
    if mappings.exists() and mappings.read_bytes().count(b"\n") > _MOST_MAPPINGS:
        import jax

        jax.clear_caches()
