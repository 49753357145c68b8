"""What conftest.py promises: annotations of the packages are checked while tests run."""

import dataclasses

import numpy as np
import pytest

from jaxrl import evaluation
from jaxrl.actors.wire import item_from_json
from sharding import Cluster
from sharding.tracing.dims import DimensionGraph


def test_functions_and_records_of_modules_that_name_no_axes():
    with pytest.raises(TypeError, match="parameter fields"):
        item_from_json([1, 2])
    with pytest.raises(TypeError, match="parameter size"):
        DimensionGraph().new("two")
    with pytest.raises(TypeError, match="parameter slices"):
        dataclasses.replace(Cluster.from_name("h100:1x2"), slices="1")


def test_axes_of_one_call_have_one_size():
    with pytest.raises(TypeError, match="probs"):
        evaluation.safety_rate(np.zeros((2, 3)), np.zeros((2, 4)))
