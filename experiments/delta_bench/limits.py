"""How few bits a change can take: entropies of the very data that is encoded.

All are plug-in entropies of a pair's own statistics in bits per changed element. They assume that
elements are independent given what they are conditioned on, and that the receiver's decoder knows
these statistics for nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from experiments.delta_bench.pairs import Bits, Pair

_EXPONENTS = 256


def order(bits: np.ndarray) -> np.ndarray:
    """bf16 bits as integers in the order of the numbers, so that neighbours differ by 1, int32.

    >>> order(np.array([0x8001, 0x8000, 0x0000, 0x0001], np.uint16))
    array([-2, -1,  0,  1], dtype=int32)
    """
    wide = bits.astype(np.int32)
    return np.where(wide >= 0x8000, 0x7FFF - wide, wide)


def exponent(bits: np.ndarray) -> np.ndarray:
    """The 8 exponent bits of bf16 bits."""
    return (bits >> 7) & 0xFF


def outward_steps(old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Change in units of the last place; positive away from zero, as seen from the old value."""
    steps = order(new) - order(old)
    return np.where(old >= 0x8000, -steps, steps)


def entropy_bits(counts: np.ndarray) -> float:
    """Σ n · log2(n_total / n): bits of a sequence with these counts, coded at its entropy.

    >>> entropy_bits(np.array([4, 4]))
    8.0
    """
    positive = counts[counts > 0].astype(np.float64)
    return float(np.sum(positive * np.log2(positive.sum() / positive)))


def mask_bits(elements: np.ndarray, changed: np.ndarray) -> float:
    """Bits of the mask of changed elements, which is i.i.d. within each class.

    Args:
      elements: of each class.
      changed: of each class.
    """
    pairs = zip(elements.ravel(), changed.ravel(), strict=True)
    return sum(entropy_bits(np.array([k, n - k])) for n, k in pairs)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bits per changed element.

    Attributes:
      iid: H(p)/p + H(step): nothing is known of the old values.
      iid_mask: its first term.
      given_exponent: H(mask | exponent of the old value)/p + H(step | exponent): what the
        receiver knows of each element is its exponent.
      given_exponent_mask: its first term.
      given_tensor: as `given_exponent`, with the mask also conditioned on the tensor.
      new_value: H(p)/p + H(new bits): for codecs that send the new values, at best.
    """

    iid: float
    iid_mask: float
    given_exponent: float
    given_exponent_mask: float
    given_tensor: float
    new_value: float


def limits(pair: Pair) -> Limits:
    """The limits of a pair with at least one change."""
    if not pair.changed:
        raise ValueError(f"bits per change need a change, and {pair.name!r} has none")
    elements, changed = _counts(pair.old, pair.new)
    exponents, steps, values = _changes(pair.old, pair.new)
    by_exponent = sum(entropy_bits(_histogram(steps[exponents == e])) for e in np.unique(exponents))
    bits: Mapping[str, float] = {
        "iid_mask": mask_bits(elements.sum(), changed.sum()),
        "iid_step": entropy_bits(_histogram(steps)),
        "mask": mask_bits(elements.sum(0), changed.sum(0)),
        "tensor_mask": mask_bits(elements, changed),
        "value": entropy_bits(_histogram(values)),
    }
    each = {name: total / pair.changed for name, total in bits.items()}
    step = by_exponent / pair.changed
    return Limits(
        iid=each["iid_mask"] + each["iid_step"],
        iid_mask=each["iid_mask"],
        given_exponent=each["mask"] + step,
        given_exponent_mask=each["mask"],
        given_tensor=each["tensor_mask"] + step,
        new_value=each["iid_mask"] + each["value"],
    )


def _histogram(values: np.ndarray) -> np.ndarray:
    """How often each integer occurs, those between that never do included."""
    return np.bincount(values - values.min())


def _counts(old: Bits, new: Bits) -> tuple[np.ndarray, np.ndarray]:
    """Elements and changed elements by tensor and exponent, int64 [tensors, 256]."""
    found = []
    for name, before in old.items():
        classes = exponent(before)
        touched = classes[before != new[name]]
        found.append([np.bincount(x.ravel(), minlength=_EXPONENTS) for x in (classes, touched)])
    counts = np.asarray(found)
    return counts[:, 0], counts[:, 1]


def _changes(old: Bits, new: Bits) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of all changed elements: exponent of the old value, outward steps, new bits."""
    exponents, steps, values = [], [], []
    for name, before in old.items():
        mask = before != new[name]
        was, is_ = before[mask], new[name][mask]
        exponents.append(exponent(was))
        steps.append(outward_steps(was, is_))
        values.append(is_)
    return np.concatenate(exponents), np.concatenate(steps), np.concatenate(values)
