"""Text to token ids and back: BPE trained here or any Hugging Face `tokenizer.json`."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
from jaxtyping import Bool, Int32
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"

# Names that published tokenizers give their special tokens, the most specific first.
_KNOWN = {
    "eos": (EOS, "<|im_end|>", "<|eot_id|>", "<|end|>", "</s>", "<|endoftext|>", "<|end_of_text|>"),
    "bos": (BOS, "<|begin_of_text|>", "<s>"),
    "pad": (PAD, "<|finetune_right_pad_id|>", "[PAD]", "<|endoftext|>", "<unk>"),
}


class Tokenizer:
    """A `tokenizers.Tokenizer` with its special tokens known.

    Encoding never adds special tokens: `encode_prompts` and `encode_completions` do, so that
    one place decides.

    Attributes:
      pad_id, eos_id: always there; `pad_id` falls back to `eos_id` (masks tell them apart).
      bos_id: None when the tokenizer has no such token.

    Raises:
      ValueError: a special token is not in the vocabulary, or no end token is known.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        eos_token: str,
        bos_token: str | None = None,
        pad_token: str | None = None,
    ) -> None:
        self.backend = backend
        # A file may carry padding or truncation settings of its own; here masks do that work.
        backend.no_padding()
        backend.no_truncation()
        self.eos_id = self._id(eos_token)
        self.bos_id = None if bos_token is None else self._id(bos_token)
        self.pad_id = self.eos_id if pad_token is None else self._id(pad_token)

    def _id(self, token: str) -> int:
        found = self.backend.token_to_id(token)
        if found is None:
            raise ValueError(
                f"a special token must be in the vocabulary: {token!r} is not among the "
                f"{self.backend.get_vocab_size()} tokens; name one that is"
            )
        return found

    @property
    def vocab_size(self) -> int:
        """Number of ids, special and added tokens included; ids are below it."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without special tokens of the tokenizer's own."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Text up to the first end token, special tokens left out."""
        return self.backend.decode(self._until_eos(ids), skip_special_tokens=True)

    def decode_batch(self, rows: Iterable[Iterable[int] | np.ndarray] | np.ndarray) -> list[str]:
        return self.backend.decode_batch(
            [self._until_eos(row) for row in rows], skip_special_tokens=True
        )

    def _until_eos(self, ids: Iterable[int] | np.ndarray) -> list[int]:
        row = (ids if isinstance(ids, np.ndarray) else np.fromiter(ids, np.int64)).tolist()
        return row[: row.index(self.eos_id)] if self.eos_id in row else row

    def save(self, path: str | Path) -> None:
        """Writes a `tokenizer.json` that `load` and other libraries read."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(path))

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        eos_token: str | None = None,
        bos_token: str | None = None,
        pad_token: str | None = None,
    ) -> "Tokenizer":
        """Reads a `tokenizer.json`, or the folder that holds one.

        Special tokens that are not named here come from `tokenizer_config.json` or
        `special_tokens_map.json` beside the file, then from names in common use.

        Raises:
          FileNotFoundError: no such file.
          ValueError: not a tokenizer file, or no end token can be found.
        """
        file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise FileNotFoundError(f"no tokenizer file at {file}; give a tokenizer.json")
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"{file} is not a tokenizer.json: {error}") from error
        stated = _stated_special_tokens(file.parent)
        vocabulary = backend.get_vocab(with_added_tokens=True)
        eos = eos_token or _special("eos", stated, vocabulary)
        if eos is None:
            raise ValueError(
                f"a tokenizer needs an end-of-sequence token: {file} has none of {_KNOWN['eos']}; "
                "name it with `eos_token`"
            )
        bos = bos_token or _special("bos", stated, vocabulary)
        pad = pad_token or _special("pad", stated, vocabulary)
        return cls(backend, eos_token=eos, bos_token=bos, pad_token=pad)


def _stated_special_tokens(folder: Path) -> dict[str, str]:
    """Special tokens that the files beside a tokenizer.json name."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            continue
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        for role in _KNOWN:
            token = content.get(f"{role}_token")
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                found[role] = token
    return found


def _special(role: str, stated: Mapping[str, str], vocabulary: Mapping[str, int]) -> str | None:
    candidates = (stated[role],) if role in stated else _KNOWN[role]
    return next((token for token in candidates if token in vocabulary), None)


def train_bpe(
    texts: Iterable[str], vocab_size: int, *, special_tokens: Sequence[str] = ()
) -> Tokenizer:
    """Byte-level BPE, deterministic in its texts; it can write any UTF-8 text.

    Args:
      texts: what to learn merges from.
      vocab_size: upper bound on the number of ids: 3 special tokens, `special_tokens`,
        256 bytes and the merges that the texts support.
      special_tokens: further tokens, e.g. those of a chat template.

    Raises:
      ValueError: `vocab_size` leaves no room for the bytes, or there is no text.

    >>> tokenizer = train_bpe(["low lower lowest"] * 4, 270)
    >>> tokenizer.decode(tokenizer.encode("lower ☃"))
    'lower ☃'
    """
    specials = [PAD, BOS, EOS, *special_tokens]
    if vocab_size < 256 + len(specials):
        raise ValueError(
            f"vocab_size must hold 256 bytes and {len(specials)} special tokens: {vocab_size=}; "
            f"use at least {256 + len(specials)}"
        )
    corpus = list(texts)
    if not any(corpus):
        raise ValueError("BPE needs text to learn from: every text is empty; give the SFT texts")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in specials],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(corpus, trainer)
    return Tokenizer(backend, eos_token=EOS, bos_token=BOS, pad_token=PAD)


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """What stands around a prompt; a completion follows directly.

    >>> SAFE_RLHF.prompt("Why?")
    'BEGINNING OF CONVERSATION: USER: Why? ASSISTANT:'
    >>> SAFE_RLHF.input("BEGINNING OF CONVERSATION: USER: Why? ASSISTANT:")
    'Why?'

    Attributes:
      name: its key in `TEMPLATES`.
      prefix, suffix: text before and after the prompt.
      special_tokens: parts of prefix and suffix that have to be single tokens; give them to
        `train_bpe`.
    """

    name: str
    prefix: str
    suffix: str
    special_tokens: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.suffix:
            raise ValueError(
                f"a template needs a suffix, or no policy can tell where its answer starts: "
                f"{self.name!r} has none; use at least a newline"
            )

    def prompt(self, text: str) -> str:
        return f"{self.prefix}{text}{self.suffix}"

    def input(self, prompt: str) -> str:
        """Undoes `prompt`."""
        if not (prompt.startswith(self.prefix) and prompt.endswith(self.suffix)):
            raise ValueError(f"not a prompt of template {self.name!r}: {prompt!r}")
        return prompt[len(self.prefix) : len(prompt) - len(self.suffix)]


PLAIN = ChatTemplate(name="plain", prefix="", suffix="\n")
"""For small contexts and the embedded world: one token more than the text."""

# PKU-Alignment/safe-rlhf, safe_rlhf/configs/constants.py, PROMPT_INPUT.
SAFE_RLHF = ChatTemplate(
    name="safe_rlhf", prefix="BEGINNING OF CONVERSATION: USER: ", suffix=" ASSISTANT:"
)
CHATML = ChatTemplate(
    name="chatml",
    prefix="<|im_start|>user\n",
    suffix="<|im_end|>\n<|im_start|>assistant\n",
    special_tokens=("<|im_start|>", "<|im_end|>"),
)
LLAMA3 = ChatTemplate(
    name="llama3",
    prefix="<|start_header_id|>user<|end_header_id|>\n\n",
    suffix="<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    special_tokens=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
)
TEMPLATES: Mapping[str, ChatTemplate] = {
    template.name: template for template in (PLAIN, SAFE_RLHF, CHATML, LLAMA3)
}


def encode_prompts(
    tokenizer: Tokenizer, texts: Sequence[str], *, max_len: int, bos: bool = False
) -> tuple[Int32[np.ndarray, "N P"], Bool[np.ndarray, "N P"]]:
    """Prompts as a block padded on the left.

    Args:
      tokenizer: encodes the texts.
      texts: prompts with their template already around them.
      max_len: P, in tokens; the block has this width whatever the texts, so that every batch
        has one shape.
      bos: put the begin token in front.

    Returns:
      tokens and mask, True on real tokens.

    Raises:
      ValueError: no prompts; a prompt without tokens or longer than `max_len`, with its row.
    """
    if not texts:
        raise ValueError("the prompt set is empty; give at least one prompt")
    if bos and tokenizer.bos_id is None:
        raise ValueError("bos=True needs a begin token: this tokenizer has none; use bos=False")
    tokens = np.full((len(texts), max_len), tokenizer.pad_id, np.int32)
    mask = np.zeros((len(texts), max_len), bool)
    for row, ids in enumerate(tokenizer.encode_batch(texts)):
        ids = [tokenizer.bos_id, *ids] if bos else ids
        if not 0 < len(ids) <= max_len:
            raise ValueError(
                f"a prompt must have 1 to {max_len} tokens: row {row} has {len(ids)} "
                f"({texts[row][:60]!r}); drop it, or raise the prompt length"
            )
        tokens[row, -len(ids) :] = ids
        mask[row, -len(ids) :] = True
    return tokens, mask


def encode_completions(
    tokenizer: Tokenizer, texts: Sequence[str], *, max_len: int
) -> tuple[Int32[np.ndarray, "N T"], Bool[np.ndarray, "N T"]]:
    """Completions, each with its end token, as a block padded on the right.

    A completion that does not fit is cut, and then has no end token: a policy trained on it
    does not learn to stop there.

    Returns:
      tokens and mask, True on real tokens, the end token included.
    """
    tokens = np.full((len(texts), max_len), tokenizer.pad_id, np.int32)
    mask = np.zeros((len(texts), max_len), bool)
    for row, ids in enumerate(tokenizer.encode_batch(texts)):
        ids = [*ids, tokenizer.eos_id][:max_len]
        tokens[row, : len(ids)] = ids
        mask[row, : len(ids)] = True
    return tokens, mask
