"""Hugging Face checkpoints: logits against golden files of `transformers`, and both ways of I/O."""

import contextlib
import dataclasses
import functools
import json
import pickle
import shutil
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from jaxrl.models import Decoder, DecoderConfig, LoraConfig, LoraParam, RopeScaling
from jaxrl.models.huggingface import (
    CheckpointMismatch,
    UnsupportedModel,
    decoder_config,
    document_of,
    load_adapter,
    load_pretrained,
    save_adapter,
    save_pretrained,
    with_adapter,
)
from jaxrl.models.huggingface import load as load_module
from jaxrl.models.huggingface.load import read_document, read_part
from jaxrl.models.huggingface.names import Parameter

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(path.name for path in GOLDEN.iterdir())


@functools.cache
def golden(name: str):
    expected = np.load(GOLDEN / name / "expected.npz")
    loaded = load_pretrained(GOLDEN / name, compute_dtype="float32")
    return loaded, jnp.asarray(expected["tokens"]), expected["logits"]


@nnx.jit
def logits_of(model: Decoder, tokens):
    return model(tokens)


# --- logits -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(name):
    loaded, tokens, expected = golden(name)
    assert expected.std() >= 1
    np.testing.assert_allclose(logits_of(loaded.model(), tokens), expected, atol=1e-4)


def without(config: DecoderConfig) -> dict[str, DecoderConfig]:
    """The decoder without each of its features, by the feature's name."""
    off = {
        "rope_scaling": RopeScaling(), "qk_norm": False, "attention_bias": False,
        "output_bias": False, "norm_plus_one": False, "post_norms": False,
        "scale_embeddings": False, "activation": "silu", "query_scale": None,
        "attention_softcap": None, "logit_softcap": None, "windows": (),
        "window_rope_theta": None,
    }  # fmt: skip
    changes = {name: {name: value} for name, value in off.items()}
    changes["windows"]["window_rope_theta"] = None
    wider = tuple(None if w is None else w + 1 for w in config.windows)
    changes["window_size"], changes["window_layers"] = (
        {"windows": wider}, {"windows": config.windows[::-1]}
    )  # fmt: skip
    changes["theta"] = {"rope_theta": 1e4}
    changes["eps"] = {"norm_eps": 0.1}
    if config.rope_scaling.kind == "yarn":
        plain = dataclasses.replace(config.rope_scaling, temperature=1.0)
        changes["rope_temperature"] = {"rope_scaling": plain}
    if config.rope_scaling.kind == "llama3":
        narrower = dataclasses.replace(config.rope_scaling, low_freq_factor=3.0)
        changes["rope_band"] = {"rope_scaling": narrower}
    if config.experts:
        changes["routing"] = {"normalise_routing": not config.normalise_routing}
        changes["fewer_experts"] = {"experts_per_token": config.experts_per_token - 1}
    if not config.tie_embeddings:
        changes["tied"] = {"tie_embeddings": True}
    if config.kv_heads > 1:
        changes["one_key_head"] = {"kv_heads": 1}
    replaced = {name: dataclasses.replace(config, **change) for name, change in changes.items()}
    return {name: changed for name, changed in replaced.items() if changed != config}


def transplanted(config: DecoderConfig, params: nnx.State) -> Decoder:
    """A decoder with those of the parameters that it has; of key heads the first ones."""
    model = Decoder(config, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(model)
    flat, source = dict(nnx.to_flat_state(state)), dict(nnx.to_flat_state(params))
    chosen = {}
    for path, variable in flat.items():
        cut = tuple(slice(n) for n in variable.get_value().shape)
        chosen[path] = variable.replace(source[path].get_value()[cut])
    return nnx.merge(graphdef, nnx.from_flat_state(chosen.items()))


@pytest.mark.parametrize(
    ("name", "feature"),
    [
        (name, feature)
        for name in CASES
        for feature in without(decoder_config(read_document(GOLDEN / name)))
    ],
)  # fmt: skip
def test_every_feature_moves_the_logits(name, feature):
    loaded, tokens, expected = golden(name)
    model = transplanted(without(loaded.config)[feature], loaded.params)
    gap = np.max(np.abs(model(tokens) - expected))
    assert gap > 1e-3


def test_the_golden_models_have_every_feature():
    seen = set()
    for name in CASES:
        seen |= set(without(golden(name)[0].config))
    everything = set(without(dataclasses.replace(golden("gemma2")[0].config, qk_norm=True)))
    everything |= {"rope_scaling", "attention_bias", "output_bias", "window_rope_theta", "routing",
                   "fewer_experts", "tied", "rope_temperature", "rope_band",
                   "window_layers"}  # fmt: skip
    assert seen == everything
    kinds = {golden(name)[0].config.rope_scaling.kind for name in CASES}
    assert kinds == {"none", "linear", "llama3", "yarn"}
    assert {golden(name)[0].config.kv_heads for name in CASES} >= {1, 2, 4}


# --- config.json --------------------------------------------------------------------------------

LLAMA = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
}  # fmt: skip


def test_config_of_llama_3_1_as_the_hub_has_it():
    config = decoder_config(LLAMA, max_len=4096)
    assert config.num_params == 8_030_261_248
    assert (config.rope_theta, config.max_len) == (500000.0, 4096)
    assert config.rope_scaling == RopeScaling(kind="llama3", factor=8.0, original_max_len=8192)


def test_config_of_gemma_3_from_the_multimodal_document():
    # The fields that google/gemma-3-4b-it writes; the rest are the family's defaults.
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
            "model_type": "gemma3_text", "sliding_window": 1024,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}  # fmt: skip
    config = decoder_config({"model_type": "gemma3", "text_config": text})
    assert config.windows == tuple(None if (i + 1) % 6 == 0 else 1024 for i in range(34))
    assert (config.rope_theta, config.window_rope_theta) == (1e6, 1e4)
    assert config.rope_scaling == RopeScaling(kind="linear", factor=8.0)
    assert (config.heads, config.kv_heads, config.head_dim) == (8, 4, 256)
    assert config.query_scale is None  # 256^-½ is that of the head


@pytest.mark.parametrize("changes", [
    {"rope_parameters": {"rope_theta": 77.0, "rope_type": "default"}, "rope_scaling": None},
    {"rope_theta": 77.0, "rope_scaling": None},
    {"rope_theta": 77.0, "rope_scaling": {"rope_type": "default"}},
])  # fmt: skip
def test_both_spellings_of_rope(changes):
    config = decoder_config({**LLAMA, **changes})
    assert (config.rope_theta, config.rope_scaling) == (77.0, RopeScaling())


def test_a_window_that_is_switched_off_is_none():
    qwen = {**LLAMA, "model_type": "qwen2", "use_sliding_window": False, "sliding_window": 4096}
    assert decoder_config(qwen).windows == ()


@pytest.mark.parametrize(("changes", "message"), [
    ({"model_type": "mamba"}, "one of llama, .*got 'mamba'"),
    ({"mlp_bias": True}, "mlp_bias=True is not supported"),
    ({"hidden_act": "relu"}, "activation must be one of silu"),
    ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "got 'longrope'"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
])  # fmt: skip
def test_what_the_decoder_has_not_is_refused(changes, message):
    with pytest.raises(UnsupportedModel, match=message):
        decoder_config({**LLAMA, **changes})


def test_a_missing_field_is_named():
    with pytest.raises(UnsupportedModel, match="needs the field 'vocab_size'"):
        decoder_config({k: v for k, v in LLAMA.items() if k != "vocab_size"})


@pytest.mark.parametrize("name", CASES)
def test_document_and_config_say_the_same(name):
    config = golden(name)[0].config
    again = decoder_config(document_of(config), compute_dtype="float32")
    assert dataclasses.replace(again, query_scale=None) == dataclasses.replace(
        config, query_scale=None
    )
    assert (again.query_scale is None) == (config.query_scale is None)


def test_a_decoder_that_no_family_has_is_refused():
    config = DecoderConfig(vocab_size=9, attention_softcap=3.0)
    with pytest.raises(UnsupportedModel, match=r"cannot have attention_softcap=3\.0"):
        document_of(config)


# --- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_saving_gives_the_tensors_that_were_loaded(name, tmp_path):
    loaded = golden(name)[0]
    save_pretrained(tmp_path, loaded.config, loaded.params, document=loaded.document)
    theirs, ours = (
        load_file(GOLDEN / name / "model.safetensors"),
        load_file(tmp_path / "model.safetensors"),
    )
    assert set(ours) == set(theirs)
    for key, value in theirs.items():
        np.testing.assert_array_equal(ours[key].view(np.uint16), value.view(np.uint16), err_msg=key)


def test_several_files_and_their_index(tmp_path):
    loaded, tokens, expected = golden("mixtral")
    save_pretrained(
        tmp_path, loaded.config, loaded.params, max_file_bytes=20_000, dtype=jnp.float32
    )
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 3
    assert not (tmp_path / "model.safetensors").exists()
    assert index["metadata"]["total_size"] == 4 * loaded.config.num_params
    for file in files:
        tensors = load_file(tmp_path / file)
        assert all(index["weight_map"][key] == file for key in tensors)
        assert sum(x.nbytes for x in tensors.values()) <= 20_000 or len(tensors) == 1
    again = load_pretrained(tmp_path, compute_dtype="float32")
    np.testing.assert_allclose(logits_of(again.model(), tokens), expected, atol=1e-4)


def test_loading_into_a_sharding_reads_each_part_once():
    mesh = jax.make_mesh((2, 2, 2), ("layer", "embed", "heads"))
    rules = {"embed": "embed", "heads": "heads", "mlp": "heads", "vocab": "heads", "layer": None,
             "head_dim": None, "kv_heads": "heads", "expert": None}  # fmt: skip

    def shardings(state):
        def place(variable):
            spec = PartitionSpec(*(rules[a] for a in variable.get_metadata()["out_sharding"]))
            return variable.replace(NamedSharding(mesh, spec))

        return jax.tree.map(place, state, is_leaf=lambda x: isinstance(x, nnx.Variable))

    loaded = load_pretrained(GOLDEN / "qwen3_moe", compute_dtype="float32", shardings=shardings)
    flat = dict(nnx.to_flat_state(loaded.params))
    assert flat["layers", "query"].get_value().addressable_shards[0].data.shape == (3, 16, 2, 10)
    assert flat["layers", "down"].get_value().addressable_shards[0].data.shape == (3, 4, 12, 16)
    for path, variable in nnx.to_flat_state(golden("qwen3_moe")[0].params):
        np.testing.assert_array_equal(flat[path].get_value(), variable.get_value(), str(path))


def test_no_more_is_read_than_is_kept_and_no_second_copy_is_held(monkeypatch, tmp_path):
    config = DecoderConfig(
        vocab_size=64, layers=8, embed=128, heads=4, kv_heads=2, head_dim=32, mlp=1024, max_len=8
    )
    params = nnx.state(Decoder(config, rngs=nnx.Rngs(0)))
    save_pretrained(tmp_path, config, params, dtype=jnp.float32, max_file_bytes=4_000_000)
    del params
    mesh, read = jax.make_mesh((8,), ("ways",)), []

    def shardings(state):
        def place(variable):
            wide = [n % 8 == 0 and n > 8 for n in variable.get_value().shape]
            spec = [None] * len(wide)
            spec[wide.index(True)] = "ways"
            return variable.replace(NamedSharding(mesh, PartitionSpec(*spec)))

        return jax.tree.map(place, state, is_leaf=lambda x: isinstance(x, nnx.Variable))

    def counted(*args):
        part = read_part(*args)
        read.append(part.nbytes)
        return part

    monkeypatch.setattr(load_module, "read_part", counted)
    whole = 4 * config.num_params
    # NumPy tells it of its arrays. A CPU may keep the very part that was read as a device's own:
    # that is the first copy of a parameter.
    tracemalloc.start()
    load_pretrained(tmp_path, compute_dtype="float32", shardings=shardings)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(read) == whole
    assert peak < 1.5 * whole


SHAPES = {
    "out_in": (2, 6, 4, 3),
    "in_out": (2, 4, 3, 6),
    "same": (2, 4, 3),
}


@given(data=st.data(), layout=st.sampled_from(sorted(SHAPES)))
def test_any_box_is_read_as_the_whole_is(data, layout):
    shape = SHAPES[layout]
    parameter = Parameter(shape, 1, layout, "layers.{}.w")
    whole = np.arange(np.prod(shape)).reshape(shape)
    theirs = {piece.name: parameter.to_theirs(whole[piece.at]) for piece in parameter.pieces()}
    assert all(x.shape == parameter.piece_shape for x in theirs.values())
    bounds = [sorted(data.draw(st.sets(st.integers(0, n), min_size=2, max_size=2))) for n in shape]
    box = tuple(slice(a, b) for a, b in bounds)
    rows, after = parameter.rows_and_columns(box[1:])
    for piece in parameter.pieces(box):
        got = parameter.to_ours(theirs[piece.name][rows])[after]
        np.testing.assert_array_equal(got, whole[(*piece.at, *box[1:])])


@contextlib.contextmanager
def copied(name: str, tmp_path: Path):
    folder = tmp_path / name
    shutil.copytree(GOLDEN / name, folder)
    tensors = load_file(folder / "model.safetensors")
    yield folder, tensors
    save_file(tensors, folder / "model.safetensors")


def test_missing_and_unknown_and_wrong_tensors_are_named(tmp_path):
    with copied("qwen2", tmp_path) as (folder, tensors):
        del tensors["model.layers.1.self_attn.q_proj.bias"]
        tensors["model.layers.0.self_attn.o_proj.bias"] = np.zeros(32, np.float32)
        tensors["model.norm.weight"] = np.ones(31, np.float32)
    with pytest.raises(CheckpointMismatch) as caught:
        load_pretrained(folder)
    assert "missing: model.layers.1.self_attn.q_proj.bias" in str(caught.value)
    assert "unknown: model.layers.0.self_attn.o_proj.bias" in str(caught.value)
    assert "model.norm.weight is [31] and should be [32]" in str(caught.value)


def test_many_missing_tensors_are_counted(tmp_path):
    with copied("llama2", tmp_path) as (folder, tensors):
        for key in [k for k in tensors if "mlp" in k]:
            del tensors[key]
    with pytest.raises(CheckpointMismatch, match="and 1 more") as caught:
        load_pretrained(folder)
    assert set(caught.value.missing) == {
        f"model.layers.{i}.mlp.{name}_proj.weight"
        for i in range(3)
        for name in ("gate", "up", "down")
    }
    assert caught.value.unknown == caught.value.wrong == ()
    elsewhere = pickle.loads(pickle.dumps(caught.value))
    assert (elsewhere.missing, str(elsewhere)) == (caught.value.missing, str(caught.value))


def test_a_tied_head_that_is_written_a_second_time_is_no_error(tmp_path):
    with copied("qwen3", tmp_path) as (folder, tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    loaded, tokens, expected = (
        load_pretrained(folder, compute_dtype="float32"),
        *golden("qwen3")[1:],
    )
    np.testing.assert_allclose(logits_of(loaded.model(), tokens), expected, atol=1e-4)


def test_the_text_half_of_a_multimodal_checkpoint(tmp_path):
    with copied("gemma3", tmp_path) as (folder, tensors):
        for key in list(tensors):
            tensors[f"language_model.{key}"] = tensors.pop(key)
        tensors["vision_tower.patch.weight"] = np.zeros((3, 3), np.float32)
    document = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({"model_type": "gemma3", "text_config": document})
    )
    loaded, tokens, expected = (
        load_pretrained(folder, compute_dtype="float32"),
        *golden("gemma3")[1:],
    )
    np.testing.assert_allclose(logits_of(loaded.model(), tokens), expected, atol=1e-4)


def test_a_folder_without_model_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        load_pretrained(tmp_path)
    shutil.copy(GOLDEN / "qwen2" / "config.json", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"lacks model\.safetensors"):
        load_pretrained(tmp_path)


# --- adapters -----------------------------------------------------------------------------------

ADAPTERS = GOLDEN.with_name("golden_adapters")


@pytest.mark.parametrize("name", sorted(path.name for path in ADAPTERS.iterdir()))
def test_adapters_give_the_logits_of_peft(name):
    loaded, tokens, without_adapter = golden(name)
    expected = np.load(ADAPTERS / name / "expected.npz")["logits"]
    assert np.abs(expected - without_adapter).max() > 1
    adapted = load_adapter(ADAPTERS / name, loaded)
    np.testing.assert_allclose(logits_of(adapted.model(), tokens), expected, atol=1e-4)


@pytest.mark.parametrize("name", sorted(path.name for path in ADAPTERS.iterdir()))
def test_adapters_are_saved_as_they_were_loaded(name, tmp_path):
    save_adapter(tmp_path, load_adapter(ADAPTERS / name, golden(name)[0]), base_model=name)
    theirs = load_file(ADAPTERS / name / "adapter_model.safetensors")
    ours = load_file(tmp_path / "adapter_model.safetensors")
    assert set(ours) == set(theirs)
    for key, value in theirs.items():
        np.testing.assert_array_equal(ours[key], value, err_msg=key)
    documents = [
        json.loads((folder / "adapter_config.json").read_text())
        for folder in (tmp_path, ADAPTERS / name)
    ]
    for key, value in documents[0].items():
        expected = documents[1][key]
        assert value == (sorted(expected) if key == "target_modules" else expected), key


def test_fresh_adapters_change_nothing():
    loaded, tokens, expected = golden("qwen3")
    adapted = with_adapter(loaded, LoraConfig(rank=3, targets=("query", "gate")))
    np.testing.assert_allclose(logits_of(adapted.model(), tokens), expected, atol=1e-4)
    adapters = nnx.state(adapted.model(), LoraParam)
    assert sum(x.size for x in jax.tree.leaves(adapters)) == 3 * 3 * (32 + 40 + 32 + 40)
    assert adapted.config.num_params == loaded.config.num_params + 3 * 3 * (32 + 40 + 32 + 40)


@pytest.mark.parametrize(("changes", "message"), [
    ({"peft_type": "IA3"}, "peft_type must be LORA"),
    ({"use_dora": True}, "use_dora=True is not supported"),
    ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
    ({"target_modules": ["lm_head"]}, "some of q_proj, .*got lm_head"),
])  # fmt: skip
def test_adapters_of_another_kind_are_refused(changes, message, tmp_path):
    shutil.copytree(ADAPTERS / "llama3", tmp_path, dirs_exist_ok=True)
    document = json.loads((tmp_path / "adapter_config.json").read_text()) | changes
    (tmp_path / "adapter_config.json").write_text(json.dumps(document))
    with pytest.raises(UnsupportedModel, match=message):
        load_adapter(tmp_path, golden("llama3")[0])


def test_an_adapter_of_another_model_is_refused():
    with pytest.raises(CheckpointMismatch, match="wrong: base_model"):
        load_adapter(ADAPTERS / "llama3", golden("llama_multi_query")[0])
    with pytest.raises(ValueError, match="no adapters to save"):
        save_adapter("unused", golden("llama3")[0])


def test_experts_have_no_adapters():
    with pytest.raises(ValueError, match="experts have no adapters"):
        with_adapter(golden("mixtral")[0], LoraConfig(targets=("query", "gate")))
