"""The intermediate form: what follows from names, against hand arithmetic."""

import math

import pytest

from sharding.programs.program import Block, Op, Program, Tensor, dtype_bytes

DIMS = {"batch": 4, "embed": 8, "mlp": 32, "expert": 2}


def mlp(**changes):
    tensors = [
        Tensor(name="x", dims=("batch", "embed")),
        Tensor(name="up", dims=("embed", "mlp"), dtype="float32", role="param"),
        Tensor(name="h", dims=("batch", "mlp")),
        Tensor(name="down", dims=("mlp", "embed"), dtype="float32", role="param"),
        Tensor(name="y", dims=("batch", "embed")),
    ]
    ops = (
        Op(kind="dot", inputs=("x", "up"), outputs=("h",), contracted=("embed",)),
        Op(kind="dot", inputs=("h", "down"), outputs=("y",), contracted=("mlp",)),
    )
    fields = {
        "name": "mlp",
        "dims": DIMS,
        "tensors": {t.name: t for t in tensors},
        "blocks": (Block(name="layer", ops=ops, repeat=3, carry=("x",)),),
        "splits": {"batch": "data", "mlp": "tensor"},
    }
    return Program(**{**fields, **changes})


def test_counts_follow_from_the_dimensions():
    program = mlp()
    # Two matrices of 8 x 32 in each of three layers; 2·4·8·32 FLOPs each.
    assert program.parameter_count == 3 * 2 * 8 * 32
    assert program.forward_flops == 3 * 2 * (2 * 4 * 8 * 32)
    assert program.bytes("h") == 4 * 32 * 2
    assert program.bytes("up") == 8 * 32 * 4
    assert [t.name for t in program.params(program.blocks[0])] == ["up", "down"]


def test_a_row_of_a_grouped_product_meets_one_expert():
    tensors = {
        "x": Tensor(name="x", dims=("batch", "embed")),
        "w": Tensor(name="w", dims=("expert", "embed", "mlp"), role="param"),
        "h": Tensor(name="h", dims=("batch", "mlp")),
    }
    op = Op(kind="grouped_dot", inputs=("x", "w"), outputs=("h",), contracted=("embed",))
    program = mlp(
        tensors=tensors, blocks=(Block(name="moe", ops=(op,)),), splits={"expert": "expert"}
    )
    assert program.flops(op) == 2 * 4 * 8 * 32
    assert program.parameter_count == 2 * 8 * 32


def test_a_parameter_that_two_blocks_share_counts_once():
    program = mlp()
    (layer,) = program.blocks
    tied = mlp(blocks=(layer, Block(name="again", ops=layer.ops[:1])))
    assert tied.parameter_count == program.parameter_count
    assert tied.forward_flops == program.forward_flops + 2 * 4 * 8 * 32


def test_causal_attention_computes_half_of_its_space():
    half = Op(kind="attention", inputs=("x",), outputs=("y",), work=4.0, fraction=0.5)
    assert mlp().flops(half) == 0.5 * 4 * 4 * 8
    assert half.residual_names == ("x", "y")
    assert half.backward_passes == 2.5


def test_json_gives_the_program_back():
    program = mlp(unknown=("fft",))
    assert Program.from_json(program.to_json()) == program


@pytest.mark.parametrize(
    ("dtype", "size"), [("float32", 4), ("bfloat16", 2), ("int4", 0.5), ("float8_e5m2", 1)]
)
def test_bytes_of_types(dtype, size):
    assert math.isclose(dtype_bytes(dtype), size)


def test_what_contradicts_itself_is_refused():
    with pytest.raises(ValueError, match="no element type: 'float33'"):
        Tensor(name="x", dims=(), dtype="float33")
    with pytest.raises(ValueError, match=r"tensor x names dimensions \['nowhere'\]"):
        mlp(tensors={"x": Tensor(name="x", dims=("nowhere",))}, blocks=())
    with pytest.raises(ValueError, match=r"layer uses unlisted tensors \['down', 'h', 'up'"):
        mlp(tensors={"x": Tensor(name="x", dims=("batch",))})
    with pytest.raises(ValueError, match="splits maps known dimensions"):
        mlp(splits={"nowhere": "data"})
    with pytest.raises(ValueError, match="fraction of the iteration space"):
        Op(kind="dot", inputs=(), outputs=(), fraction=2.0)
    with pytest.raises(ValueError, match="at least one repetition"):
        Block(name="b", ops=(), repeat=0)
