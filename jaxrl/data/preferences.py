"""Real text: labelled pairs of the PKU-SafeRLHF family and the sets that go with them."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxrl.data.dataset import (
    PARTS,
    Compliance,
    ComplianceRow,
    LabelledResponse,
    Pair,
    Preferences,
    PromptRow,
    SafetyData,
)
from jaxrl.data.files import HUB_PREFIX, DataError, Row, read_rows
from jaxrl.rewards import is_refusal

_SHARES = (0.8, 0.1, 0.1)
"""Of the prompts: training, validation, held-out test."""
_COST_SHARE = 0.6
"""Of the training prompts: those whose labels train the cost model; the rest train the judge."""
_FULL = (
    "response_0",
    "response_1",
    "is_response_0_safe",
    "is_response_1_safe",
    "safer_response_id",
)


class JudgedPair(NamedTuple):
    """Two responses to one prompt as their source labels them.

    Attributes:
      unsafe: label of each response.
      safer, better: index of the safer and of the more helpful one; `better` is None where
        the source has no helpfulness labels.
    """

    prompt: str
    responses: tuple[str, str]
    unsafe: tuple[bool, bool]
    safer: int
    better: int | None


@dataclass(frozen=True, kw_only=True)
class Companions:
    """Folders of further sets; each is optional.

    The folder and file names are those of the originals, see `COMPANION_FILES`.
    """

    xstest: Path | None = None
    stanford_alpaca_5k: Path | None = None
    safety_tuned_llamas: Path | None = None
    dove_hh_helpful: Path | None = None
    harmbench: Path | None = None
    saferlhf_gpt4_problems: Path | None = None
    hh_rlhf_harmless_test: Path | None = None

    @classmethod
    def beside(cls, source: str | Path, **given: str | Path | None) -> "Companions":
        """The folders beside the one that holds `source`; `given` ones take precedence."""
        found = {name: None if path is None else Path(path) for name, path in given.items()}
        if not str(source).startswith(HUB_PREFIX):
            root = Path(source).resolve().parent.parent
            for name in COMPANION_FILES:
                if found.get(name) is None and (root / name).is_dir():
                    found[name] = root / name
        return cls(**found)

    def items(self) -> dict[str, Path]:
        """The folders that are there, by name."""
        folders = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: folder for name, folder in folders.items() if folder is not None}


COMPANION_FILES: Mapping[str, str] = {
    "xstest": "xstest_v2_completions_*.csv",
    "stanford_alpaca_5k": "alpaca_5000.json",
    "safety_tuned_llamas": "safety_only_data_Instructions.json",
    "dove_hh_helpful": "val_sft.jsonl",
    "harmbench": "harmbench_behaviors_text_*.csv",
    "saferlhf_gpt4_problems": "problem.json",
    "hh_rlhf_harmless_test": "test.jsonl.gz",
}


def load_preferences(
    source: str | Path,
    *,
    seed: int = 0,
    companions: Companions | None = None,
    needs_reward: bool = True,
) -> SafetyData:
    """A labelled set and its companions as one data set, split by prompt.

    Args:
      source: a file of labelled pairs, or `hub:NAME[:SPLIT]`; `judged_pairs` has the formats.
      seed: of all splits and orders.
      companions: further sets; by default those beside the file.
      needs_reward: raise when nothing here can train a reward model.

    Raises:
      FileNotFoundError, DataError: no such file, or malformed; see `read_rows`.
      ValueError: `needs_reward`, but the set has no helpfulness labels and XSTest is missing.
    """
    companions = Companions.beside(source) if companions is None else companions
    pairs = judged_pairs(read_rows(source))
    parts = split_prompts([pair.prompt for pair in pairs], seed=seed)
    preferences, notes = _preferences(pairs, parts)
    order = list(dict.fromkeys(pair.prompt for pair in pairs))
    train = frozenset(parts["cost_train"] + parts["judge_train"])
    is_helpful = any(pair.better is not None for pair in pairs)
    folders = companions.items()
    if needs_reward and not is_helpful and "xstest" not in folders:
        raise ValueError(
            f"a reward model needs labels: {source} orders answers by safety only, and XSTest, "
            "whose compliance labels stand in, is missing; put the folder `xstest` (with "
            f"{COMPANION_FILES['xstest']}) beside the folder of the data file, give its path, or "
            "use a set with better_response_id such as hub:PKU-Alignment/PKU-SafeRLHF"
        )
    notes += [
        f"{name}: found at {folders[name]}" if name in folders else f"{name}: not found, left out"
        for name in COMPANION_FILES
    ]
    extra, extra_notes = _extra_prompts(folders, seen=set(order))
    sft, ptx, sft_notes = _fine_tuning(preferences, folders, hidden=set(order) - train, seed=seed)
    compliance, tested, safe_prompts = _compliance(folders, seed=seed)
    return SafetyData(
        name=str(source) if str(source).startswith(HUB_PREFIX) else Path(source).stem,
        train=tuple(PromptRow(text=t, id=i) for i, t in enumerate(order) if t in train),
        heldout=tuple(PromptRow(text=t, id=i) for i, t in enumerate(order) if t in parts["test"]),
        sft=sft,
        ptx=ptx,
        is_refusal=is_refusal,
        preferences=preferences,
        compliance_train=compliance,
        compliance_test=tested,
        over_refusal=safe_prompts,
        extra_prompts=extra,
        notes=(*notes, *extra_notes, *sft_notes),
    )


def judged_pairs(rows: Sequence[Row]) -> list[JudgedPair]:
    """Labelled pairs out of rows of either published format.

    Mixed pairs, {prompt, response: [safe, unsafe]}; or the full PKU-SafeRLHF format, {prompt,
    response_0, response_1, is_response_0_safe, is_response_1_safe, safer_response_id} with
    better_response_id where helpfulness was judged.

    Raises:
      DataError: a row of neither format, or with a missing or wrong field.
    """
    return [_mixed(row) if "response" in row.fields else _full(row) for row in rows]


def _mixed(row: Row) -> JudgedPair:
    responses = row.fields["response"]
    is_pair = isinstance(responses, Sequence) and not isinstance(responses, str)
    if not is_pair or len(responses) != 2 or not all(isinstance(r, str) for r in responses):
        raise DataError(
            f"{row.where}: field 'response' must be two texts, the safer first, "
            f"got {responses!r:.80}"
        )
    prompt = row.text("prompt").strip()
    first, second = (response.strip() for response in responses)
    return JudgedPair(prompt, (first, second), (False, True), safer=0, better=None)


def _full(row: Row) -> JudgedPair:
    if not any(name in row.fields for name in _FULL):
        raise DataError(
            f"{row.where}: neither format of labelled pairs; the row has {sorted(row.fields)}, and "
            f"needs 'prompt' with 'response' (two texts, the safer first) or with {_FULL}"
        )
    has_better = row.fields.get("better_response_id") is not None
    return JudgedPair(
        prompt=row.text("prompt").strip(),
        responses=(
            row.text("response_0", may_be_empty=True).strip(),
            row.text("response_1", may_be_empty=True).strip(),
        ),
        unsafe=(not row.flag("is_response_0_safe"), not row.flag("is_response_1_safe")),
        safer=row.choice("safer_response_id", 2),
        better=row.choice("better_response_id", 2) if has_better else None,
    )


def majority_labels(pairs: Iterable[JudgedPair]) -> tuple[dict[tuple[str, str], bool], int]:
    """Is each (prompt, response) unsafe, by majority of its labels.

    Returns:
      the labels in order of appearance, and the number of ties, which are left out.
    """
    votes: Counter[tuple[str, str]] = Counter()
    for pair in pairs:
        for response, unsafe in zip(pair.responses, pair.unsafe, strict=True):
            votes[pair.prompt, response] += 1 if unsafe else -1
    labels = {key: vote > 0 for key, vote in votes.items() if vote != 0}
    return labels, len(votes) - len(labels)


def split_prompts(prompts: Iterable[str], *, seed: int) -> dict[str, list[str]]:
    """Distinct prompts by part of `PARTS`: 48 %, 32 %, 10 %, 10 %.

    Raises:
      ValueError: too few prompts to give every part one.

    >>> {part: len(texts) for part, texts in split_prompts(map(str, range(930)), seed=0).items()}
    {'cost_train': 446, 'judge_train': 298, 'validation': 93, 'test': 93}
    """
    distinct = list(dict.fromkeys(prompts))
    later = [round(share * len(distinct)) for share in _SHARES[1:]]
    train = len(distinct) - sum(later)
    sizes = (round(_COST_SHARE * train), train - round(_COST_SHARE * train), *later)
    if min(sizes) < 1:
        raise ValueError(
            f"the parts {PARTS} need a prompt each: {len(distinct)} distinct prompts are too few; "
            "give at least 10"
        )
    order = np.random.default_rng([seed, 10]).permutation(len(distinct))
    shuffled = [distinct[i] for i in order]
    starts = np.cumsum((0, *sizes))
    return {part: shuffled[starts[i] : starts[i + 1]] for i, part in enumerate(PARTS)}


def _preferences(
    pairs: Sequence[JudgedPair], parts: Mapping[str, Sequence[str]]
) -> tuple[dict[str, Preferences], list[str]]:
    labels, ties = majority_labels(pairs)
    part_of = {prompt: part for part, prompts in parts.items() for prompt in prompts}
    labelled: dict[str, list[LabelledResponse]] = {part: [] for part in parts}
    safety: dict[str, list[Pair]] = {part: [] for part in parts}
    helpful: dict[str, list[Pair]] = {part: [] for part in parts}
    for (prompt, response), unsafe in labels.items():
        row = LabelledResponse(prompt=prompt, response=response, is_unsafe=unsafe)
        labelled[part_of[prompt]].append(row)
    dropped = 0
    for judged in pairs:
        part = part_of[judged.prompt]
        pair = _oriented(judged, judged.safer, labels)
        # A pair with a tied label has no sign; one that contradicts the majority has a wrong one.
        if None in (pair.better_is_unsafe, pair.worse_is_unsafe) or (
            pair.better_is_unsafe and not pair.worse_is_unsafe
        ):
            dropped += 1
        else:
            safety[part].append(pair)
        if judged.better is not None:
            helpful[part].append(_oriented(judged, judged.better, labels))
    unsafe = sum(labels.values())
    notes = [
        f"{len(pairs)} labelled pairs over {len(part_of)} prompts: "
        + ", ".join(f"{len(prompts)} {part}" for part, prompts in parts.items()),
        f"majority labels: {len(labels) - unsafe} safe, {unsafe} unsafe, {ties} ties left out",
        f"{dropped} pairs left out for a tied or contradicted label",
    ]
    found = {
        part: Preferences(
            labels=tuple(labelled[part]),
            safety_pairs=tuple(safety[part]),
            helpful_pairs=tuple(helpful[part]),
        )
        for part in parts
    }
    return found, notes


def _oriented(pair: JudgedPair, first: int, labels: Mapping[tuple[str, str], bool]) -> Pair:
    better, worse = pair.responses[first], pair.responses[1 - first]
    return Pair(
        prompt=pair.prompt,
        better=better,
        worse=worse,
        better_is_unsafe=labels.get((pair.prompt, better)),
        worse_is_unsafe=labels.get((pair.prompt, worse)),
    )


def _files(folder: Path, pattern: str) -> list[Path]:
    found = sorted(folder.glob(pattern))
    if not found:
        raise FileNotFoundError(f"no {pattern} in {folder}; give the folder of the original set")
    return found


def instruction_pairs(path: str | Path) -> list[tuple[str, str]]:
    """(prompt, completion) pairs of instruction files, in json, jsonl or csv.

    The prompt is `instruction`, with a non-empty `input` on a line of its own; the completion
    is `output` or `response`.

    Raises:
      DataError: a row without these fields.
    """
    pairs = []
    for row in read_rows(path):
        context = row.fields.get("input") or ""
        prompt = row.text("instruction").strip() + (f"\n{context}" if context else "")
        name = "response" if "response" in row.fields else "output"
        completion = row.text(name, may_be_empty=True).strip()
        if completion:
            pairs.append((prompt, completion))
    return pairs


def _normal(text: str) -> str:
    """What two prompts share that differ in case and spacing only."""
    return " ".join(text.lower().split())


def _fine_tuning(
    preferences: Mapping[str, Preferences],
    folders: Mapping[str, Path],
    *,
    hidden: set[str],
    seed: int,
) -> tuple[tuple[tuple[str, str], ...], tuple[tuple[str, str], ...], list[str]]:
    """Pairs of SFT and of the pre-training loss, and notes; none of a `hidden` prompt.

    The policy must be able to answer safely and unsafely, so both kinds are in.
    """
    labels = (*preferences["cost_train"].labels, *preferences["judge_train"].labels)
    sft = [(row.prompt, row.response) for row in labels if row.response]
    notes, ptx = [f"SFT: {len(sft)} labelled responses"], []
    kept_out = {_normal(prompt) for prompt in hidden}
    for name in ("safety_tuned_llamas", "stanford_alpaca_5k", "dove_hh_helpful"):
        if name not in folders:
            continue
        (path,) = _files(folders[name], COMPANION_FILES[name])
        pairs = instruction_pairs(path)
        kept = [pair for pair in pairs if _normal(pair[0]) not in kept_out]
        notes.append(f"SFT: {len(kept)} of {name}, {len(pairs) - len(kept)} overlaps left out")
        sft += kept
        ptx += kept if name == "stanford_alpaca_5k" else []
    order = np.random.default_rng([seed, 11]).permutation(len(sft))
    return tuple(sft[i] for i in order), tuple(ptx), notes


_LABELS: Mapping[str, Compliance] = {
    "1_full_compliance": "full",
    "2_full_refusal": "refusal",
    "3_partial_refusal": "partial",
}


def load_xstest(folder: str | Path) -> list[tuple[ComplianceRow, bool]]:
    """Human-labelled completions of all models in the folder, and whether the prompt is safe.

    Raises:
      FileNotFoundError: no completions in `folder`.
      DataError: a row with a missing field or an unknown label.
    """
    rows = []
    for path in _files(Path(folder), COMPANION_FILES["xstest"]):
        for row in read_rows(path):
            label = row.text("final_label")
            if label not in _LABELS:
                raise DataError(
                    f"{row.where}: field 'final_label' must be one of {tuple(_LABELS)}, "
                    f"got {label!r}"
                )
            kind = row.text("type")
            completion = ComplianceRow(
                prompt=row.text("prompt").strip(),
                response=row.text("completion", may_be_empty=True).strip(),
                label=_LABELS[label],
                type=kind,
            )
            rows.append((completion, not kind.startswith("contrast_")))
    return rows


def _family(kind: str) -> str:
    """Types that share their words stay together: a contrast set with its original."""
    kind = kind.removeprefix("contrast_")
    for family in ("discr", "privacy"):
        kind = family if family in kind else kind
    return kind


def _compliance(
    folders: Mapping[str, Path], *, seed: int
) -> tuple[tuple[ComplianceRow, ...], tuple[ComplianceRow, ...], tuple[str, ...]]:
    """XSTest by prompt type: rows that train the reward, rows that test it, safe test prompts."""
    if "xstest" not in folders:
        return (), (), ()
    rows = load_xstest(folders["xstest"])
    families = sorted({_family(row.type) for row, _ in rows})
    order = np.random.default_rng([seed, 12]).permutation(len(families))
    trained = {families[i] for i in order[: len(families) // 2]}
    train = tuple(row for row, _ in rows if _family(row.type) in trained)
    test = tuple(row for row, _ in rows if _family(row.type) not in trained)
    safe = dict.fromkeys(
        row.prompt for row, is_safe in rows if is_safe and _family(row.type) not in trained
    )
    return train, test, tuple(safe)


def _extra_prompts(
    folders: Mapping[str, Path], *, seen: set[str]
) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """Prompts of further evaluation sets, without those of the labelled set itself."""
    loaders = {
        "harmbench": _harmbench,
        "saferlhf_gpt4_problems": _gpt4_problems,
        "hh_rlhf_harmless_test": _single_turns,
    }
    known = {_normal(prompt) for prompt in seen}
    found, notes = {}, []
    for name, load in loaders.items():
        if name not in folders:
            continue
        prompts = list(dict.fromkeys(load(folders[name])))
        kept = tuple(prompt for prompt in prompts if _normal(prompt) not in known)
        found[name] = kept
        notes.append(f"{name}: {len(kept)} prompts, {len(prompts) - len(kept)} overlaps left out")
    return found, notes


def _harmbench(folder: Path) -> list[str]:
    """The standard behaviours; the others need a context or are about copyright."""
    rows = [row for path in _files(folder, COMPANION_FILES["harmbench"]) for row in read_rows(path)]
    return [
        row.text("Behavior").strip() for row in rows if row.text("FunctionalCategory") == "standard"
    ]


def _gpt4_problems(folder: Path) -> list[str]:
    (path,) = _files(folder, COMPANION_FILES["saferlhf_gpt4_problems"])
    return [row.text("prompt").strip() for row in read_rows(path)]


def _single_turns(folder: Path) -> list[str]:
    """First human turns of the dialogues that have no other."""
    (path,) = _files(folder, COMPANION_FILES["hh_rlhf_harmless_test"])
    human, assistant = "\n\nHuman:", "\n\nAssistant:"
    dialogues = [row.text("chosen") for row in read_rows(path)]
    return [
        text.split(human, 1)[1].split(assistant, 1)[0].strip()
        for text in dialogues
        if text.count(human) == 1 and assistant in text
    ]
