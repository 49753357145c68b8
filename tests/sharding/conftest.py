"""Programs that the tests of the planner share."""

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def models():
    """The module `models.py` next to this file; tests are no package, so it has no name."""
    spec = importlib.util.spec_from_file_location("models", Path(__file__).with_name("models.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
