import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from jaxrl.tokenizers import (
    CHATML,
    EOS,
    TEMPLATES,
    ChatTemplate,
    Tokenizer,
    encode_completions,
    encode_prompts,
    train_bpe,
)

CORPUS = ["the tide bell rings", "the fog bell rings low", "a moss lamp glows"] * 3
TOKENIZER = train_bpe(CORPUS, 320, special_tokens=CHATML.special_tokens)


@given(st.text(max_size=60))
@settings(max_examples=150, deadline=None)
def test_any_text_comes_back(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == _without_specials(text)


def _without_specials(text):
    for token in ("<pad>", "<bos>", EOS, *CHATML.special_tokens):
        text = text.replace(token, "")
    return text


@given(st.lists(st.text(max_size=20), max_size=5))
@settings(max_examples=30, deadline=None)
def test_batches_agree_with_single_texts(texts):
    rows = TOKENIZER.encode_batch(texts)
    assert rows == [TOKENIZER.encode(text) for text in texts]
    assert TOKENIZER.decode_batch(rows) == [TOKENIZER.decode(row) for row in rows]


def test_decoding_stops_at_the_first_end_token():
    ids = [*TOKENIZER.encode("moss"), TOKENIZER.eos_id, *TOKENIZER.encode(" lamp")]
    assert TOKENIZER.decode(np.array(ids, np.int32)) == "moss"
    assert TOKENIZER.decode_batch(np.array([ids, ids])) == ["moss", "moss"]
    assert TOKENIZER.decode([TOKENIZER.pad_id, *ids]) == "moss"


def test_training_is_deterministic_and_learns_frequent_words():
    again = train_bpe(CORPUS, 320, special_tokens=CHATML.special_tokens)
    assert again.backend.to_str() == TOKENIZER.backend.to_str()
    assert len(TOKENIZER.encode(" bell")) == 1
    assert TOKENIZER.vocab_size <= 320


def test_a_saved_tokenizer_loads_with_its_special_tokens(tmp_path):
    TOKENIZER.save(tmp_path / "new" / "tokenizer.json")
    for path in (tmp_path / "new", tmp_path / "new" / "tokenizer.json"):
        loaded = Tokenizer.load(path)
        assert loaded.encode("a fog lamp ☃") == TOKENIZER.encode("a fog lamp ☃")
        assert (loaded.pad_id, loaded.bos_id, loaded.eos_id) == (0, 1, 2)
        assert loaded.vocab_size == TOKENIZER.vocab_size


def _foreign(tmp_path, *tokens):
    """A word-level tokenizer.json as another library would write it, with padding switched on."""
    vocabulary = {word: i for i, word in enumerate(["a", "b", "[UNK]", *tokens])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(list(tokens))
    backend.enable_padding(length=9)
    backend.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_a_foreign_tokenizer_loads(tmp_path):
    path = _foreign(tmp_path, "<|im_end|>", "<|endoftext|>")
    loaded = Tokenizer.load(path)
    assert loaded.encode("a b") == [0, 1]
    assert (loaded.eos_id, loaded.bos_id, loaded.pad_id) == (3, None, 4)
    # What the files beside it state counts more than names in common use.
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": {"content": "<|endoftext|>"}, "pad_token": None})
    )
    assert Tokenizer.load(path).eos_id == 4
    assert Tokenizer.load(path, eos_token="b").eos_id == 1


def test_what_is_no_tokenizer_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer file at .*absent"):
        Tokenizer.load(tmp_path / "absent.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match=r"bad\.json is not a tokenizer\.json"):
        Tokenizer.load(tmp_path / "bad.json")
    path = _foreign(tmp_path, "<stop>")
    with pytest.raises(ValueError, match=r"name it with `eos_token`"):
        Tokenizer.load(path)
    assert Tokenizer.load(path, eos_token="<stop>").eos_id == 3
    with pytest.raises(ValueError, match="'<end>' is not among the 4 tokens"):
        Tokenizer.load(path, eos_token="<end>")


def test_bpe_needs_room_and_text():
    with pytest.raises(ValueError, match="use at least 259"):
        train_bpe(CORPUS, 258)
    with pytest.raises(ValueError, match="every text is empty"):
        train_bpe(["", ""], 300)


@given(st.text(max_size=40), st.sampled_from(sorted(TEMPLATES)))
def test_templates_can_be_undone(text, name):
    template = TEMPLATES[name]
    assert template.input(template.prompt(text)) == text


def test_special_tokens_of_a_template_are_single_tokens():
    ids = TOKENIZER.encode(CHATML.prompt("moss"))
    start, end = (TOKENIZER.encode(token) for token in CHATML.special_tokens)
    assert len(start) == len(end) == 1
    assert ids.count(start[0]) == 2
    assert ids.count(end[0]) == 1


def test_safe_rlhf_template_is_the_published_one():
    # PKU-Alignment/safe-rlhf: PROMPT_BEGIN + PROMPT_USER.format(input) + PROMPT_ASSISTANT.
    published = "BEGINNING OF CONVERSATION: " + "USER: Hi " + "ASSISTANT:"
    assert TEMPLATES["safe_rlhf"].prompt("Hi") == published


def test_template_errors():
    with pytest.raises(ValueError, match="needs a suffix"):
        ChatTemplate(name="open", prefix="", suffix="")
    with pytest.raises(ValueError, match="not a prompt of template 'chatml'"):
        CHATML.input("moss")


def test_prompts_are_padded_on_the_left():
    tokens, mask = encode_prompts(TOKENIZER, ["moss", "a moss lamp"], max_len=12, bos=True)
    assert tokens.shape == mask.shape == (2, 12)
    for row, text in enumerate(["moss", "a moss lamp"]):
        assert tokens[row][mask[row]].tolist() == [TOKENIZER.bos_id, *TOKENIZER.encode(text)]
        assert mask[row, -1]
        assert np.all(np.diff(mask[row].astype(int)) >= 0)
        assert np.all(tokens[row][~mask[row]] == TOKENIZER.pad_id)


def test_prompt_errors_name_the_row():
    with pytest.raises(ValueError, match=r"1 to 4 tokens: row 1 has 19 \('zzzz"):
        encode_prompts(TOKENIZER, ["a", "z" * 19], max_len=4)
    with pytest.raises(ValueError, match="row 0 has 0"):
        encode_prompts(TOKENIZER, [""], max_len=4)
    with pytest.raises(ValueError, match="prompt set is empty"):
        encode_prompts(TOKENIZER, [], max_len=4)


def test_completions_end_unless_they_are_cut():
    tokens, mask = encode_completions(TOKENIZER, ["", "zzz", "zzzzz"], max_len=4)
    z, eos, pad = TOKENIZER.encode("z")[0], TOKENIZER.eos_id, TOKENIZER.pad_id
    assert tokens.tolist() == [[eos, pad, pad, pad], [z, z, z, eos], [z, z, z, z]]
    assert mask.sum(axis=1).tolist() == [1, 4, 4]
