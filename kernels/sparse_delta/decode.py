"""From a payload and the old tree to the new one: `apply`, all of it or nothing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from kernels.sparse_delta import host, parse
from kernels.sparse_delta.backends import Backend, backend_of
from kernels.sparse_delta.errors import (
    CorruptPayload,
    Damaged,
    Incomplete,
    UnknownFormat,
    WrongBase,
    WrongModel,
    WrongTarget,
)
from kernels.sparse_delta.needs import check_model, limits_of, wanted_buckets
from kernels.sparse_delta.partial import PartialPayload
from kernels.sparse_delta.resident import ResidentLeaf
from kernels.sparse_delta.trees import Leaf, Sums, TreeDigest, add, named_leaves, tree_digest
from kernels.sparse_delta.unpack import Unpacker
from kernels.sparse_delta.wire import ANCHOR, Manifest

_REFUSALS = (
    Damaged, Incomplete, UnknownFormat, WrongBase, WrongModel, WrongTarget, CorruptPayload,
)  # fmt: skip


def apply(
    old: Any,
    payload: Any,
    base_digest: TreeDigest | None = None,
    donate: bool = False,
    threads: int | None = None,
    backend: Backend | None = None,
) -> Any:
    """Rebuilds the new weights from the old ones, bit for bit.

    Everything is checked before anything is returned: each byte of the payload by its checksums,
    `old` by its digest, and the result by the digest of what the sender had. Whatever is raised,
    `old` is as it was.

    Weights on accelerators stay there: the device counts classes, the host decodes the streams by
    the counts, and the device puts the changes in place.

    Where other processes hold some of the arrays, all processes call this together; then either
    all return or all raise.

    Args:
      old: pytree of arrays as they were when the payload was made; the sharding may be another.
        For an anchor only shapes, dtypes and shardings matter, and leaves may be
        `jax.ShapeDtypeStruct`.
      payload: bytes-like, from `encode`, `merge` or `squash`; or a `PartialPayload` of the bytes
        that `needed(old, …)` asks for in this process.
      base_digest: of `old`: `inspect(payload).target_digest` of the payload that made it, or
        `digest(old)`. It is trusted, and saves reading all of `old`.
      donate: gives up `old`: its jax.Arrays that changed are deleted once the new ones stand.
        Accelerators write the changes into their memory, after they found in a rehearsal that the
        result will be right. Beside the weights lie the changes (at 1 % an eighth of bf16 weights)
        and a copy of one tensor at a time.
      threads: how many work at once; as many as there are cores where None.
      backend: whose kernels rebuild the weights where they lie; those of the devices' platform
        where None, and on CPUs none: the host decodes.

    Returns:
      A tree like `old`, each leaf where that of `old` lies. Leaves without a change are the same
      objects.

    Raises:
      CorruptPayload: a subclass says why the payload is refused.
      TypeError: a leaf is no array; names it.
      ValueError: the payload's tiles lie across several processes here.
    """
    leaves, structure = named_leaves(old, role="old")
    threads = host.default_threads() if threads is None else threads
    spread = host.is_spread(leaves)

    def attempt() -> _Decoded:
        parsed = parse.read(payload, limits=limits_of(leaves))
        check_model(parsed.manifest, leaves)
        partial = isinstance(payload, PartialPayload)
        parsed.verify(wanted_buckets(parsed, leaves) if partial else None)
        bases = base_sums(leaves, parsed.manifest, base_digest, spread)
        if not spread:
            _check_base(parsed.manifest, leaves, bases, base_digest)
        unpacker = Unpacker.of(parsed, threads=threads, spread=spread)
        contents, sums = _decode_all(unpacker, leaves, bases, _Residence(backend, donate))
        return _Decoded(parsed.manifest, contents, bases, sums)

    done = together(attempt, len(leaves)) if spread else attempt()
    if spread:
        _check_base(done.manifest, leaves, done.bases, base_digest)
    _check_target(done.manifest, leaves, done.sums)
    arrays = _arrays(leaves, done.contents)
    if donate:
        kept = {id(array) for array in arrays}
        for leaf in leaves:
            if isinstance(leaf.value, jax.Array) and id(leaf.value) not in kept:
                leaf.value.delete()
    by_place = {leaf.place: array for leaf, array in zip(leaves, arrays, strict=True)}
    return jax.tree.unflatten(structure, [by_place[place] for place in range(len(leaves))])


# New bits of every box of a leaf, what rebuilds it where it lies, or None where nothing changes.
_Content = list[np.ndarray] | ResidentLeaf | None


@dataclass(frozen=True)
class _Residence:
    """How weights on devices are rebuilt; see `apply`."""

    backend: Backend | None
    donate: bool


@dataclass(frozen=True)
class _Decoded:
    """What one process decoded: nothing of it is seen until all checks are passed.

    Attributes:
      manifest: of the payload.
      contents: of every leaf.
      bases: digest sums of the old weights; this process's share where there are several.
      sums: those of the new weights, likewise.
    """

    manifest: Manifest
    contents: list[_Content]
    bases: list[Sums]
    sums: list[Sums]


def together(attempt: Callable[[], _Decoded], n_leaves: int) -> _Decoded:
    """Runs an attempt on all processes, adds up their sums, and fails on all if one fails."""
    failure: Exception | None = None
    report = np.zeros((1 + 2 * n_leaves, 2), np.uint32)
    done = None
    try:
        done = attempt()
        report[1:] = np.asarray([*done.bases, *done.sums], np.uint32).reshape(-1, 2)
    except Exception as error:  # whatever it is, the others wait for word of it
        failure = error
        refusals = [kind for kind in _REFUSALS if isinstance(error, kind)]
        report[0, 0] = 1 + _REFUSALS.index(refusals[0]) if refusals else 1 + len(_REFUSALS)
    reports = multihost_utils.process_allgather(report)
    if failure is not None:
        raise failure
    for process, code in enumerate(np.asarray(reports)[:, 0, 0].tolist()):
        if code > len(_REFUSALS):
            raise RuntimeError(f"process {process} failed to apply the payload; see its own error")
        if code:
            raise _REFUSALS[code - 1](f"process {process} refused the payload; see its own error")
    assert done is not None
    totals = np.asarray(reports, np.uint64).sum(0)[1:] % (1 << 32)
    sums = [(int(first), int(second)) for first, second in totals]
    return _Decoded(done.manifest, done.contents, sums[:n_leaves], sums[n_leaves:])


def base_sums(
    leaves: Sequence[Leaf],
    manifest: Manifest,
    base_digest: TreeDigest | None,
    spread: bool = False,
) -> list[Sums]:
    """Digest sums of the receiver's weights; this process's share where they are spread."""
    if manifest.kind == ANCHOR:
        return [(0, 0)] * len(leaves)
    known = base_digest.sums if base_digest else {}
    sums = []
    seen: dict[int, Sums] = {}
    for leaf, tensor in zip(leaves, manifest.tensors, strict=True):
        if leaf.name in known:
            # Known as a whole; the first process answers for it.
            pair = known[leaf.name] if not spread or jax.process_index() == 0 else (0, 0)
        else:
            pair = seen.get(id(leaf.value)) or host.digest_sums(leaf, tensor.grid, spread)
            seen[id(leaf.value)] = pair
        sums.append(pair)
    return sums


def _check_base(
    manifest: Manifest,
    leaves: Sequence[Leaf],
    sums: Sequence[Sums],
    base_digest: TreeDigest | None,
) -> None:
    if manifest.kind == ANCHOR:
        return
    root = tree_digest(leaves, sums).root
    if base_digest is not None and base_digest.root != root:
        raise ValueError("base_digest is not of old: names, shapes, dtypes or weights differ")
    if root != manifest.base_root:
        named = "" if manifest.base_version is None else f" (version {manifest.base_version})"
        raise WrongBase(
            f"the payload was made against weights {manifest.base_root.hex()}{named}, the receiver "
            f"has {root.hex()}; apply the versions in order, or an anchor"
        )


def _decode_all(
    unpacker: Unpacker, leaves: Sequence[Leaf], bases: Sequence[Sums], residence: _Residence
) -> tuple[list[_Content], list[Sums]]:
    """What becomes of every leaf, and the new digest sums."""
    manifest = unpacker.payload.manifest
    contents: list[_Content] = []
    twins: list[int] = []
    done: dict[tuple[int, int], int] = {}
    for index, (leaf, tensor) in enumerate(zip(leaves, manifest.tensors, strict=True)):
        twins.append(done.setdefault((tensor.same, id(leaf.value)), index))
        stored = unpacker.stored.get(tensor.same)
        if manifest.kind == ANCHOR and tensor.grid.n_tiles != (
            0 if stored is None else len(stored)
        ):
            raise Damaged(
                f"{tensor.name}: an anchor has to hold all {tensor.grid.n_tiles} tiles",
                tensor=tensor.name,
            )
    shared = _shared_memory(leaves, twins) if residence.donate else set()
    for index, (leaf, tensor) in enumerate(zip(leaves, manifest.tensors, strict=True)):
        kernels = None
        if manifest.kind != ANCHOR and twins[index] == index and tensor.same in unpacker.stored:
            kernels = backend_of(leaf, tensor.grid, residence.backend)
        contents.append(None)
        if kernels is not None:
            in_place = residence.donate and index not in shared
            contents[index] = ResidentLeaf(
                unpacker, leaf, tensor.grid, tensor.same, kernels, in_place=in_place
            )
    resident = [content for content in contents if isinstance(content, ResidentLeaf)]
    for content in resident:  # the devices count while the host decodes
        content.request()
    sums: list[Sums] = []
    for index, (leaf, tensor) in enumerate(zip(leaves, manifest.tensors, strict=True)):
        twin, content = twins[index], contents[index]
        sums.append(bases[index])
        if isinstance(content, ResidentLeaf):
            content.decode()
            content.rehearse()
        elif twin != index:
            contents[index], sums[index] = contents[twin], sums[twin]
        elif tensor.same in unpacker.stored or manifest.kind == ANCHOR:
            contents[index], change = unpacker.leaf(leaf, tensor.grid, tensor.same)
            sums[index] = add(bases[index], change)
    shares = {id(content): content.share() for content in resident}
    return contents, [shares.get(id(c), pair) for c, pair in zip(contents, sums, strict=True)]


def _shared_memory(leaves: Sequence[Leaf], twins: Sequence[int]) -> set[int]:
    """Leaves whose memory is that of another one too, which is not to become the same."""
    holders: dict[int, set[int]] = {}
    where = [_address(leaf) for leaf in leaves]
    for address, twin in zip(where, twins, strict=True):
        holders.setdefault(address, set()).add(twin)
    return {index for index, address in enumerate(where) if len(holders[address]) > 1}


def _address(leaf: Leaf) -> int:
    value = leaf.value
    if isinstance(value, jax.Array) and value.size:
        return value.addressable_shards[0].data.unsafe_buffer_pointer()
    return id(value)


def _arrays(leaves: Sequence[Leaf], contents: Sequence[_Content]) -> list[Any]:
    """The new leaves: what the host decoded, then what is changed in its own memory."""
    arrays: list[Any] = [leaf.value for leaf in leaves]
    hosted = {index: content for index, content in enumerate(contents) if isinstance(content, list)}
    placed = host.place([leaves[index] for index in hosted], list(hosted.values()))
    for index, array in zip(hosted, placed, strict=True):
        arrays[index] = array
    rebuilt: dict[int, jax.Array] = {}
    for index, content in enumerate(contents):
        if isinstance(content, ResidentLeaf):
            if id(content) not in rebuilt:
                rebuilt[id(content)] = content.array()
            arrays[index] = rebuilt[id(content)]
    return arrays


def _check_target(manifest: Manifest, leaves: Sequence[Leaf], sums: Sequence[Sums]) -> None:
    for tensor, pair in zip(manifest.tensors, sums, strict=True):
        if tensor.target is not None and tensor.target != pair:
            raise WrongTarget(
                f"{tensor.name}: what came out is not what went in: digest {pair}, "
                f"wanted {tensor.target}",
                tensor=tensor.name,
            )
    root = tree_digest(leaves, sums).root
    if root != manifest.target_root:
        raise WrongTarget(
            f"what came out is not what went in: digest {root.hex()}, "
            f"wanted {manifest.target_root.hex()}"
        )
