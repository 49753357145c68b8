"""Steps that train are compiled with the options of their machine."""

import importlib.util
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from jaxrl import recipes
from jaxrl.learner import Learner, OptimizerConfig, lm_apply, lm_optimizer
from jaxrl.models import Decoder, DecoderConfig
from jaxrl.models.compiling import training_options
from jaxrl.supervised import Supervised
from jaxrl.types import Prompts, Rollouts

CONFIG = DecoderConfig(
    vocab_size=8, layers=1, embed=8, heads=2, kv_heads=1, head_dim=4, mlp=8, max_len=8,
    remat="none",
)  # fmt: skip
PROMPTS = Prompts(tokens=jnp.ones((2, 2), jnp.int32), mask=jnp.ones((2, 2), bool),
                  ids=jnp.arange(2))  # fmt: skip


def test_only_tpus_need_options():
    assert training_options("cpu") is None
    assert training_options("gpu") is None
    assert training_options("tpu")


def _supervised(graphdef, params):
    trainer = Supervised(graphdef=graphdef, optimizer=optax.sgd(0.1))
    tokens = jnp.ones((2, 3), jnp.int32)
    trainer.update(trainer.init(params), PROMPTS, tokens, tokens > 0)


def _learner(graphdef, params):
    trainer = Learner(
        recipe=recipes.get("rloo", group_size=2),
        apply=lm_apply(graphdef, None, temperature=1.0),
        optimizer=lm_optimizer(OptimizerConfig()),
    )
    ones = jnp.ones((2, 2, 3))
    rollouts = Rollouts(
        prompts=PROMPTS, tokens=ones.astype(jnp.int32), mask=ones > 0, behaviour_log_probs=-ones,
        reference_log_probs=-ones, policy_version=jnp.zeros((2, 2, 3), jnp.int32),
        rewards={"reward": ones[..., 0]}, costs={"cost": ones[..., 0]},
    )  # fmt: skip
    trainer.update(trainer.init({"policy": params}, num_prompts=2), rollouts)


@pytest.mark.parametrize("train", [_supervised, _learner])
def test_the_options_reach_the_compiler(train, monkeypatch):
    """That of CPUs, which does not know those of TPUs and says so."""
    for module in ("learner", "supervised"):
        monkeypatch.setattr(f"jaxrl.{module}.training_options", lambda _: training_options("tpu"))
    graphdef, params = nnx.split(Decoder(CONFIG, rngs=nnx.Rngs(0)))
    (option,) = training_options("tpu")
    with pytest.raises(jax.errors.JaxRuntimeError, match=option):
        train(graphdef, params)


_COMPILE = """
import jax
from jax.experimental import topologies
from jaxrl.models.compiling import training_options

device = topologies.get_topology_desc("v5e:2x2", "tpu").devices[0]
lies = jax.sharding.SingleDeviceSharding(device)
x = jax.ShapeDtypeStruct((8, 128), "float32", sharding=lies)
lowered = jax.jit(lambda x: x @ x.T).lower(x)
lowered.compile(compiler_options=training_options("tpu"))
try:
    lowered.compile(compiler_options={"xla_no_such_option": "1"})
except jax.errors.JaxRuntimeError:
    print("refused")
"""


@pytest.mark.aot
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="compiling for a TPU needs libtpu: pip install -e '.[aot]'",
)
def test_the_compiler_of_tpus_knows_them():
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-c", _COMPILE], capture_output=True, text=True, timeout=120,
        env=environment | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["refused"]
