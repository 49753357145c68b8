"""Named models have the published numbers of parameters."""

import pytest

from jaxrl.models.named import DOCUMENTS, named

# As the safetensors index of each repository on the Hugging Face hub states it.
PUBLISHED = {
    "llama2-7b": 6_738_415_616,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.1-8b": 8_030_261_248,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "qwen3-30b-a3b": 30_532_122_624,
    "mistral-7b": 7_248_023_552,
    "mixtral-8x7b": 46_702_792_704,
    "gemma2-9b": 9_241_705_984,
    "gemma3-1b": 999_885_952,
}


def test_every_model_is_counted():
    assert set(PUBLISHED) == set(DOCUMENTS)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters(name):
    assert named(name).num_params == PUBLISHED[name]


def test_an_unknown_name_lists_those_there_are():
    with pytest.raises(ValueError, match="unknown model 'llama9'; known: llama2-7b, llama3-8b"):
        named("llama9")
