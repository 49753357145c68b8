"""A real model's folder, small enough to train."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from experiments.safety import task
from jaxrl.data import load

GOLDEN = Path(__file__).resolve().parents[2] / "jaxrl" / "models" / "golden"


@pytest.fixture(scope="session")
def pretrained_folder(tmp_path_factory):
    """A golden model with a tokenizer of as many words as it has embeddings."""
    folder = tmp_path_factory.mktemp("model") / "qwen2"
    shutil.copytree(GOLDEN / "qwen2", folder)
    texts = " ".join(text for pair in load("world", seed=0).sft for text in pair).split()
    names = ["<unk>", "<end>", "<pad>", *sorted(set(texts), key=texts.count)[-37:]]
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<end>", "pad_token": {"content": "<pad>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def varied_rewards(monkeypatch):
    """An untrained policy writes nonsense, of which the world's rewards are all the same."""
    exact = task.exact_evaluators

    def letters(prompts, completions):
        return np.array([len(set(text)) for text in completions], np.float32)

    monkeypatch.setattr(task, "exact_evaluators", lambda data: replace(exact(data), reward=letters))
