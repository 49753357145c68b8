"""A real model's folder in, the same run, and a folder out that loads again."""

import json
import shutil
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.safety import pretrained
from experiments.safety.__main__ import main
from experiments.safety.config import SafetyConfig
from jaxrl.models.huggingface import load_adapter, load_pretrained
from jaxrl.tokenizers import PLAIN

TOKENS = np.random.default_rng(0).integers(0, 40, (2, 12)).astype(np.int32)
RUN = [
    *("--steps", "2", "--prompt-len", "32", "--completion-len", "6", "--samples-per-step", "8"),
    *("--model.compute-dtype", "float32", "--algorithms", "rloo"),
    *("--critic-free-learning-rate", "0.01", "--evaluation.prompts", "2"),
    *("--evaluation.samples", "2", "--evaluation.batch", "2", "--optimizer.warmup-steps", "0"),
]


@pytest.fixture
def source(pretrained_folder, varied_rewards):
    return pretrained_folder


def logits(found):
    return np.asarray(found.model()(jnp.asarray(TOKENS)))


def loaded(folder):
    return load_pretrained(folder, compute_dtype="float32")


def test_a_model_is_trained_and_saved_as_it_came(tmp_path, source):
    main(["--model", str(source), *RUN, "--out", str(tmp_path / "run")])
    saved = tmp_path / "run" / "models" / "rloo"
    before, after = loaded(source), loaded(saved)
    assert np.abs(logits(after) - logits(before)).max() > 0.01
    config = json.loads((saved / "config.json").read_text())
    kept = json.loads((source / "config.json").read_text())
    for name in ("model_type", "vocab_size", "rope_parameters", "sliding_window", "dtype"):
        assert config[name] == kept[name]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (saved / name).read_bytes() == (source / name).read_bytes()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert set(summary["algorithms"]) == {"sft", "rloo"}
    assert summary["algorithms"]["sft"]["kl"] == pytest.approx(0, abs=1e-5)
    assert summary["algorithms"]["rloo"]["kl"] != pytest.approx(0, abs=1e-4)
    # What was saved is a model like any other: it can be where the next run starts.
    again = ["--model", str(saved), *RUN, "--steps", "1", "--mesh", "fsdp=2,tensor=2"]
    main([*again, "--out", str(tmp_path / "again")])
    assert np.any(logits(loaded(tmp_path / "again" / "models" / "rloo")) != logits(after))


def test_adapters_are_saved_alone_and_added_to_the_weights(tmp_path, source):
    adapters = ["--model.lora-rank", "2"]
    main([f"--model={source}", *adapters, *RUN, "--out", str(tmp_path / "run")])
    models = tmp_path / "run" / "models"
    base, whole = loaded(source), loaded(models / "rloo")
    beside = load_adapter(models / "rloo-adapter", base)
    assert np.abs(logits(beside) - logits(base)).max() > 0.01
    # The whole model is rounded to the bf16 of the source; a weight here is of order 1.
    np.testing.assert_allclose(logits(whole), logits(beside), atol=0.1)
    np.testing.assert_array_equal(whole.model().embedding[...], base.model().embedding[...])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "nowhere"], "there is no folder 'nowhere'"),
        (["--model.lora-rank", "2"], "adapters stand beside the weights of a pretrained model"),
        (["--template", "model"], "template `model` is that of a pretrained model"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, capsys, argv, message):
    with pytest.raises(SystemExit) as stopped:
        main([*argv, "--out", str(tmp_path / "run")])
    assert stopped.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_more_words_than_embeddings_are_refused(source, tmp_path):
    shutil.copytree(source, tmp_path / "model")
    document = json.loads((tmp_path / "model" / "tokenizer.json").read_text())
    document["model"]["vocab"]["one more"] = 40
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(document))
    config = SafetyConfig()
    config = replace(config, model=replace(config.model, pretrained=str(tmp_path / "model")))
    tokenizer = pretrained.Tokenizer.load(tmp_path / "model")
    with pytest.raises(ValueError, match="it has 41, the model 40"):
        pretrained.load(config, tokenizer)


CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ '<|im_end|>' + '\\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def test_the_models_own_chat_template_stands_around_prompts(tmp_path):
    assert pretrained.chat_template(tmp_path) == PLAIN
    pytest.importorskip("jinja2")

    def template(text, **settings):
        record = {"chat_template": text} | settings
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(record))
        return pretrained.chat_template(tmp_path)

    assert template(CHATML).prompt("Why?") == (
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    )
    begin = template("{{ bos_token }}{{ messages[0]['content'] }}:", bos_token={"content": "<s>"})
    assert (begin.prefix, begin.suffix) == ("<s>", ":")
    assert template([{"name": "default", "template": CHATML}]) == template(CHATML)
    with pytest.raises(ValueError, match="must contain the question once"):
        template("{{ messages[0]['content'] | upper }}")
    with pytest.raises(ValueError, match="refuses a question: system first"):
        template("{{ raise_exception('system first') }}")
