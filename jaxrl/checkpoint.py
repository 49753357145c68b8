"""Checkpoints that survive a kill and a damaged disk: Orbax, sealed with checksums.

    FOLDER/00000120/        what Orbax wrote
    FOLDER/00000120.json    the seal, written last: checksums of every file, the names and
                            shapes of the leaves, and the metadata

A checkpoint counts only when its seal matches all of its files, so that a half-written or
damaged one is never loaded.

Under `jax.distributed` every process opens the same folder, on storage that all see, and calls
`save` and `restore_latest` together. Each writes its own shards; the first removes, seals, and says
which checkpoint is the last good one. What n processes wrote m processes read: names, shapes and
values are stored whole, and the template says how they are divided.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from jaxrl import processes

Tree = TypeVar("Tree")

_log = logging.getLogger(__name__)
_SEAL = re.compile(r"(\d{8,})\.json")
_DIGEST = "digest"


class DamagedCheckpoint(Exception):
    """A checkpoint's files do not match its seal; an earlier one is used."""


class Restored(NamedTuple):
    """What `Checkpointer.restore_latest` found.

    Attributes:
      step: step at which it was saved.
      tree: the state, with the structure of the template.
      metadata: what was passed to `save` beside it.
    """

    step: int
    tree: Any
    metadata: dict[str, Any]


class Checkpointer:
    """Saves a pytree in the background and restores the last good one; a context manager."""

    def __init__(self, folder: Path | str, *, keep: int = 2, timeout_s: float = 600.0) -> None:
        """Opens a folder of checkpoints.

        Args:
          folder: of one pytree's checkpoints only; made where missing.
          keep: checkpoints to keep; at least 2, so that one can be damaged.
          timeout_s: the longest that a save may take.

        Raises:
          ValueError: `keep` below 1 or `timeout_s` not above 0.
        """
        if keep < 1 or timeout_s <= 0:
            raise ValueError(f"keep ≥ 1 and timeout_s > 0 are needed: {keep=}, {timeout_s=}")
        self.folder = Path(folder).absolute()  # Orbax refuses relative paths
        self.folder.mkdir(parents=True, exist_ok=True)
        self._keep, self._timeout_s = keep, timeout_s
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._orbax: Any = None

    def save(self, step: int, tree: Any, *, metadata: Mapping[str, Any] | None = None) -> None:
        """Begins to save; returns once the state is copied, so that it may be donated.

        Waits for the save before it. An error of that one is raised here.

        Args:
          step: updates made so far; names the checkpoint. A checkpoint of the same step is
            replaced.
          tree: arrays, PRNG keys and Python numbers.
          metadata: JSON values: data position, names, whatever is no array.

        Raises:
          TypeError: a leaf is neither an array nor a number; names it.
          TimeoutError: the save before took longer than `timeout_s`.
        """
        self.wait()
        leaves = {name: _to_host(name, leaf) for name, leaf in _named_leaves(tree)}
        record = {
            "step": int(step),
            "metadata": dict(metadata or {}),
            "leaves": {
                n: {"shape": list(x.shape), "dtype": str(x.dtype)} for n, x in leaves.items()
            },
        }
        json.dumps(record)  # raises here, not in the background, where metadata is no JSON
        target = self.folder / f"{int(step):08d}"
        if processes.leads():
            self._remove(target)
        if jax.process_count() > 1:
            # Else a process that is ahead could find, or lose, files of a save before this one.
            multihost_utils.sync_global_devices(f"removed {target}")
        import orbax.checkpoint as ocp  # slow to import: only who saves pays

        # Orbax has no empty arrays; the seal knows their shapes.
        stored = {f"leaf_{i:05d}": x for i, x in enumerate(leaves.values()) if x.size}
        if stored:
            self._async_checkpointer().save(target, args=ocp.args.PyTreeSave(stored))
        elif processes.leads():
            target.mkdir()
        self._pending = self._pool.submit(self._finish, target, record)

    def _async_checkpointer(self) -> Any:
        if self._orbax is None:
            import orbax.checkpoint as ocp

            handler = ocp.PyTreeCheckpointHandler()
            self._orbax = ocp.AsyncCheckpointer(handler, timeout_secs=int(self._timeout_s) + 1)
        return self._orbax

    def _finish(self, target: Path, record: dict[str, Any]) -> None:
        """In the background: waits for Orbax, seals, and removes what is no longer needed."""
        if self._orbax is not None:
            self._orbax.wait_until_finished()
        if processes.leads():
            seal = record | {"files": _checksums(target)}
            _write_atomically(target.with_suffix(".json"), _sealed(seal))
            self._prune(record["step"])

    def _prune(self, step: int) -> None:
        """Keeps the newest `keep` up to `step`; what is later was damaged or rewound."""
        kept = {f"{s:08d}" for s in [s for s in self.steps() if s <= step][-self._keep :]}
        names = {path.name.split(".")[0] for path in self.folder.iterdir()}
        for name in names:
            if name.isdigit() and name not in kept:
                self._remove(self.folder / name)

    def _remove(self, target: Path) -> None:
        # The seal goes first: a crash in between leaves a folder that counts for nothing.
        target.with_suffix(".json").unlink(missing_ok=True)
        for leftover in self.folder.glob(f"{target.name}.*"):  # of a save that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        if target.exists():
            shutil.rmtree(target)

    def wait(self, timeout_s: float | None = None) -> None:
        """Waits until the last save is on disk, and raises its error if it failed.

        Raises:
          TimeoutError: it is not done after `timeout_s` (by default that of the class).
        """
        if self._pending is None:
            return
        limit = self._timeout_s if timeout_s is None else timeout_s
        wait([self._pending], timeout=limit)
        if not self._pending.done():
            raise TimeoutError(
                f"saving a checkpoint to {self.folder} is not done after {limit} s; "
                "is the disk full or slow?"
            )
        # Reported once: a caller may go on, and the next save is tried.
        done, self._pending = self._pending, None
        done.result()

    def steps(self) -> list[int]:
        """Steps of the sealed checkpoints, in order; they may still prove damaged."""
        found = (_SEAL.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def restore_latest(self, template: Any) -> Restored | None:
        """The last good checkpoint, or None where there is none.

        A damaged one is passed over with a warning that says what is wrong with it.

        Args:
          template: a pytree with the structure, shapes, dtypes and shardings wanted; its
            values do not matter, and leaves may be `jax.ShapeDtypeStruct`. Or a function that
            makes it of the metadata, where shapes depend on what was saved (a replay).

        Raises:
          ValueError: the checkpoint holds other leaves than the template.
        """
        self.wait()
        passed_over = None  # steps from here on are damaged
        while True:
            found = processes.from_leader(lambda before=passed_over: self._last_good(before))
            if found is None:
                return None
            step, seal = found
            wanted = template(seal["metadata"]) if callable(template) else template
            damage, tree = None, None
            try:
                tree = _load(self.folder / f"{step:08d}", seal, wanted)
            except DamagedCheckpoint as error:
                damage = error
            if not processes.anywhere(damage is not None):
                return Restored(step, tree, seal["metadata"])
            self._warn(step, damage or "another process cannot read it")
            passed_over = step

    def _last_good(self, before: int | None) -> tuple[int, dict[str, Any]] | None:
        """Step and seal of the last checkpoint whose files are as they were written."""
        for step in reversed([s for s in self.steps() if before is None or s < before]):
            try:
                return step, _verified(self.folder / f"{step:08d}")
            except DamagedCheckpoint as damage:
                self._warn(step, damage)
        return None

    def _warn(self, step: int, damage: object) -> None:
        target = self.folder / f"{step:08d}"
        _log.warning("checkpoint %s is damaged (%s); trying an earlier one", target, damage)

    def close(self) -> None:
        """Waits for the last save and ends the background thread."""
        try:
            self.wait()
        finally:
            self._pool.shutdown(wait=False)
            if self._orbax is not None:
                self._orbax.close()
                self._orbax = None

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _named_leaves(tree: Any) -> list[tuple[str, Any]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in leaves]


def _is_key(leaf: Any) -> bool:
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


def _to_host(name: str, leaf: Any) -> Any:
    """A copy that neither donation nor an in-place update can change while it is written."""
    if _is_key(leaf):
        leaf = jax.random.key_data(leaf)
    if isinstance(leaf, jax.Array):
        # Arrays that span processes stay as they are: each process writes its own shards.
        return np.array(leaf) if leaf.is_fully_addressable else jnp.copy(leaf)
    if isinstance(leaf, np.ndarray | np.generic | bool | int | float):
        return np.array(leaf)
    raise TypeError(f"leaf {name} is {type(leaf).__name__}: no array; pass it as `metadata`")


def _load(target: Path, seal: Mapping[str, Any], template: Any) -> Any:
    wanted = _named_leaves(template)
    _check_leaves(target, seal["leaves"], wanted)
    arrays = _read(target, wanted)
    leaves = [_like(arrays.get(f"leaf_{i:05d}"), leaf) for i, (_, leaf) in enumerate(wanted)]
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def _check_leaves(target: Path, saved: Mapping[str, Any], wanted: list[tuple[str, Any]]) -> None:
    expected = {
        name: {"shape": list(s), "dtype": str(d)} for name, (s, d) in _shapes(wanted).items()
    }
    problems = [f"{name} is missing" for name in expected if name not in saved]
    problems += [f"{name} is not expected" for name in saved if name not in expected]
    problems += [
        f"{name} is {saved[name]}, expected {expected[name]}"
        for name in expected
        if name in saved and saved[name] != expected[name]
    ]
    if problems:
        raise ValueError(
            f"checkpoint {target} is of another state: {'; '.join(problems[:5])}; "
            "give the model and algorithm it was saved with, or another folder"
        )


def _shapes(wanted: list[tuple[str, Any]]) -> dict[str, tuple[tuple[int, ...], Any]]:
    found = {}
    for name, leaf in wanted:
        if _is_key(leaf):
            data = jax.eval_shape(jax.random.key_data, leaf)
            found[name] = (data.shape, data.dtype)
        elif hasattr(leaf, "dtype"):
            found[name] = (leaf.shape, leaf.dtype)
        else:
            found[name] = ((), np.array(leaf).dtype)
    return found


def _read(target: Path, wanted: list[tuple[str, Any]]) -> dict[str, Any]:
    import orbax.checkpoint as ocp

    shapes = _shapes(wanted)
    args = {
        f"leaf_{i:05d}": _restore_args(leaf)
        for i, (name, leaf) in enumerate(wanted)
        if np.prod(shapes[name][0])
    }
    if not args:
        return {}
    item = dict.fromkeys(args, 0)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        try:
            return reader.restore(target, args=ocp.args.PyTreeRestore(item, restore_args=args))
        except Exception as error:  # the checksums hold, but this version cannot read it
            raise DamagedCheckpoint(f"Orbax cannot read it: {error}") from error


def _restore_args(leaf: Any) -> Any:
    import orbax.checkpoint as ocp

    sharding = getattr(leaf, "sharding", None)
    if sharding is None or _is_key(leaf) or not getattr(leaf, "committed", True):
        return ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.ArrayRestoreArgs(sharding=sharding)


def _like(array: Any, leaf: Any) -> Any:
    """The restored array as the kind of leaf that the template holds."""
    if array is None:  # without elements
        return (
            leaf
            if not isinstance(leaf, jax.ShapeDtypeStruct)
            else jnp.zeros(leaf.shape, leaf.dtype)
        )
    if _is_key(leaf):
        impl = jax.random.key_impl(leaf) if isinstance(leaf, jax.Array) else None
        return jax.random.wrap_key_data(jnp.asarray(array), impl=impl)
    if isinstance(leaf, bool | int | float):
        return type(leaf)(array.item())
    if isinstance(leaf, np.ndarray | np.generic):
        return np.asarray(array) if isinstance(leaf, np.ndarray) else array[()]
    return array if isinstance(array, jax.Array) else jnp.asarray(array)


def _checksums(target: Path) -> dict[str, str]:
    files = sorted(path for path in target.rglob("*") if path.is_file())
    return {str(path.relative_to(target)): _sha256(path) for path in files}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sealed(seal: Mapping[str, Any]) -> str:
    """The seal as text, with a digest over itself: its metadata can be damaged too."""
    body = json.dumps(seal, sort_keys=True)
    return json.dumps(
        dict(seal) | {_DIGEST: hashlib.sha256(body.encode()).hexdigest()}, sort_keys=True
    )


def _verified(target: Path) -> dict[str, Any]:
    """The seal of a checkpoint whose every file is as it was written."""
    try:
        seal = json.loads(target.with_suffix(".json").read_text(encoding="utf-8"))
        digest = seal.pop(_DIGEST)
        body = json.dumps(seal, sort_keys=True)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise DamagedCheckpoint(f"its seal is unreadable: {error}") from error
    if hashlib.sha256(body.encode()).hexdigest() != digest:
        raise DamagedCheckpoint("its seal was changed")
    for name, expected in seal["files"].items():
        path = target / name
        if not path.is_file():
            raise DamagedCheckpoint(f"file {name} is missing")
        if _sha256(path) != expected:
            raise DamagedCheckpoint(f"file {name} was changed")
    return seal


def _write_atomically(path: Path, text: str) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".seal", suffix=".tmp")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(name, path)
