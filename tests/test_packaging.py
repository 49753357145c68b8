"""What a user gets from `pip install`, and that the checkers see every package."""

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = ("jaxrl", "sharding", "kernels", "experiments")
HEAVY = re.compile(r"^(torch|nvidia|libtpu|jax-cuda|jax-rocm|tensorflow|triton|ray)\b")


def installed_closure(roots: list[str]) -> set[str]:
    """Names of all distributions that `roots` need in this environment, extras respected."""
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = [Requirement(root) for root in roots]
    while waiting:
        requirement = waiting.pop()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        for line in metadata.requires(name) or []:
            child = Requirement(line)
            environments = [{"extra": extra} for extra in extras or {""}]
            if child.marker is None or any(map(child.marker.evaluate, environments)):
                waiting.append(child)
    return {name for name, _ in seen}


def test_base_install_needs_neither_cuda_nor_tpu_packages_nor_torch():
    closure = installed_closure(PROJECT["project"]["dependencies"])
    assert {"jax", "jaxlib", "flax"} <= closure
    assert not [name for name in closure if HEAVY.match(name)]


def test_accelerators_are_what_the_extras_bring():
    extras = PROJECT["project"]["optional-dependencies"]
    assert set(extras) == {"cuda", "tpu", "aot", "hub", "ray", "wandb", "peers", "test", "docs"}
    assert "cuda" in extras["cuda"][0]
    assert "tpu" in extras["tpu"][0]


@pytest.mark.parametrize("line", PROJECT["project"]["dependencies"])
def test_each_dependency_has_a_lower_bound_and_no_upper(line):
    operators = {specifier.operator for specifier in Requirement(line).specifier}
    assert operators == {">="}


def test_installed_versions_meet_the_bounds():
    for line in PROJECT["project"]["dependencies"]:
        requirement = Requirement(line)
        version = metadata.version(requirement.name)
        assert requirement.specifier.contains(version), f"{line}: {version} is installed"


def package_folders() -> list[Path]:
    """Every folder below the packages that holds Python."""
    files = (file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))
    return sorted({file.parent for file in files})


def test_every_folder_with_python_is_a_package_that_setuptools_finds():
    assert package_folders()
    assert [str(d) for d in package_folders() if not (d / "__init__.py").exists()] == []


def test_packages_are_typed_and_under_the_import_rules():
    rules = PROJECT["tool"]["importlinter"]["root_packages"]
    for name in PACKAGES:
        if not (ROOT / name / "__init__.py").exists():
            continue
        assert (ROOT / name / "py.typed").exists(), f"{name}/py.typed is missing"
        assert name in rules, f"add {name} to tool.importlinter.root_packages and to a contract"


def test_license_is_apache_2():
    text = (ROOT / "LICENSE").read_text()
    assert PROJECT["project"]["license"] == "Apache-2.0"
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_tests_run_on_eight_devices_with_strict_ranks():
    import jax
    import jax.numpy as jnp

    assert len(jax.devices()) == 8
    with pytest.raises(ValueError, match="rank"):
        jnp.ones((2, 3)) + jnp.ones(3)
