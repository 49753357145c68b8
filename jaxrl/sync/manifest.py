"""What a version is made of: manifests, each naming the one before, sealed by their hash.

    RUN/index/000000000012.json                     manifest of the 12th publication
    RUN/index/000000000012-from-000000000007.json   a shortcut to it, made for who stayed behind
    RUN/payloads/…                                  what they name, written before them
    RUN/acks/NAME/…                                 where each subscriber is

A manifest is one line with the SHA-256 of the rest, its *id*, and then JSON. It names its
predecessor's id, so that a chain of them cannot be reordered, mixed with another run's, or changed
in the middle. Publications are counted by their sequence number; the version is what the learner
calls the weights. A learner that goes back to a checkpoint publishes an old version number anew,
under a new sequence number.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from jaxrl.sync.errors import DamagedManifest

FORMAT = 1
_LARGEST = 1 << 20  # bytes of a manifest; real ones have less than a thousandth of it
_HEX_ID = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9._-]{1,100}")
_INDEX = re.compile(r"(\d{12})(?:-from-(\d{12}))?\.json")

Kind = Literal["anchor", "delta", "squash"]
Quantisation = Literal["int8", "fp8"]


@dataclass(frozen=True, kw_only=True)
class Payload:
    """One way to the weights of a version.

    Attributes:
      kind: an anchor needs nothing, a delta the weights published before, a squash earlier ones.
      key: of the payload in the store.
      size_bytes: of the payload.
      sha256: of the payload, hexadecimal.
      base: id of the manifest whose weights it applies to; None of an anchor.
    """

    kind: Kind
    key: str
    size_bytes: int
    sha256: str
    base: str | None = None


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """One publication.

    Attributes:
      run: identity of the run.
      sequence: 0, 1, …: publications of the run so far.
      version: what the learner calls the weights.
      previous: id of the manifest before; None of the first.
      digest: root of `kernels.sparse_delta.digest` of the weights, hexadecimal.
      quantise: how matrices are quantised; None where they are not.
      kept: parts of names of leaves that are not, where others are.
      payloads: ways to these weights, at least one.
      id: SHA-256 of the manifest as it was written, hexadecimal; set by `read`.
    """

    run: str
    sequence: int
    version: int
    previous: str | None
    digest: str
    quantise: Quantisation | None
    kept: tuple[str, ...]
    payloads: tuple[Payload, ...]
    id: str = ""


@dataclass(frozen=True, kw_only=True)
class Shortcut:
    """One more way to a version, made after it was published.

    Attributes:
      run: identity of the run.
      target: id of the manifest that it leads to.
      payload: a squash.
    """

    run: str
    target: str
    payload: Payload


def checked_name(what: str, name: str) -> str:
    """A name that can stand in a key.

    Raises:
      ValueError: it cannot.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{what} must be 1 to 100 letters, digits, '.', '_' or '-', and not '.' or '..'; "
            f"got {name!r}"
        )
    return name


def index_key(run: str, sequence: int, base: int | None = None) -> str:
    """Key of a manifest, or of the shortcut to it from the one of sequence number `base`."""
    tail = "" if base is None else f"-from-{base:012d}"
    return f"{run}/index/{sequence:012d}{tail}.json"


def index_entry(key: str) -> tuple[int, int | None] | None:
    """Sequence number, and base of a shortcut, of a key of the index; None of other files.

    >>> index_entry("run/index/000000000012-from-000000000007.json")
    (12, 7)
    """
    match = _INDEX.fullmatch(key.rsplit("/", 1)[-1])
    if match is None:
        return None
    return int(match[1]), None if match[2] is None else int(match[2])


def seal(record: Manifest | Shortcut) -> tuple[str, bytes]:
    """Id and bytes of a manifest or shortcut."""
    fields = asdict(record)
    fields.pop("id", None)
    body = json.dumps({"format": FORMAT} | fields, sort_keys=True).encode()
    digest = hashlib.sha256(body).hexdigest()
    return digest, f"{digest}\n".encode() + body


def entry_of(run: str, sequence: int, kind: Kind, data: bytes, base: str | None) -> Payload:
    """What a manifest says of a payload.

    Args:
      run: identity of the run.
      sequence: of the publication that it leads to.
      kind: of the payload.
      data: the payload.
      base: id of the manifest that it applies to; None of an anchor.
    """
    digest = hashlib.sha256(data).hexdigest()
    # The digest in the name: what is put under a key never changes.
    key = f"{run}/payloads/{sequence:012d}-{kind}-{digest[:16]}.spd"
    return Payload(kind=kind, key=key, size_bytes=len(data), sha256=digest, base=base)


def read(data: bytes) -> Manifest | Shortcut:
    """A manifest or shortcut from its bytes.

    Raises:
      DamagedManifest: they are not what `seal` wrote, or of a format that this code does not know.
    """
    head, _, body = data.partition(b"\n")
    if len(data) > _LARGEST or hashlib.sha256(body).hexdigest().encode() != head:
        raise DamagedManifest(f"{len(data)} bytes that are no manifest, or a damaged one")
    try:
        fields = json.loads(body)
        if fields.pop("format") != FORMAT:
            raise DamagedManifest("a manifest of another format; update this package")
        if "target" in fields:
            return Shortcut(
                run=_text(fields, "run"),
                target=_hex(fields, "target"),
                payload=_payload(fields["payload"]),
            )
        return Manifest(
            run=_text(fields, "run"),
            sequence=_count(fields, "sequence"),
            version=_count(fields, "version"),
            previous=None if fields["previous"] is None else _hex(fields, "previous"),
            digest=_text(fields, "digest"),
            quantise=_one_of(fields, "quantise", (None, "int8", "fp8")),
            kept=tuple(fields["kept"]),
            payloads=tuple(_payload(entry) for entry in fields["payloads"]),
            id=head.decode(),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedManifest(f"a manifest without the fields of one: {error!r}") from error


def read_manifest(data: bytes) -> Manifest:
    """A manifest from its bytes.

    Raises:
      DamagedManifest: they are not what `seal` wrote of a manifest.
    """
    record = read(data)
    if not isinstance(record, Manifest):
        raise DamagedManifest("a shortcut where a manifest should be")
    return record


def _payload(fields: Mapping[str, Any]) -> Payload:
    kind = _one_of(fields, "kind", ("anchor", "delta", "squash"))
    return Payload(
        kind=kind,
        key=_text(fields, "key"),
        size_bytes=_count(fields, "size_bytes"),
        sha256=_hex(fields, "sha256"),
        base=None if kind == "anchor" else _hex(fields, "base"),
    )


def _text(fields: Mapping[str, Any], name: str) -> str:
    value = fields[name]
    if not isinstance(value, str):
        raise ValueError(f"{name} is {value!r}, not text")
    return value


def _hex(fields: Mapping[str, Any], name: str) -> str:
    value = _text(fields, name)
    if not _HEX_ID.fullmatch(value):
        raise ValueError(f"{name} is {value!r}, not 64 hexadecimal digits")
    return value


def _count(fields: Mapping[str, Any], name: str) -> int:
    value = fields[name]
    if type(value) is not int or value < 0:
        raise ValueError(f"{name} is {value!r}, not a count")
    return value


def _one_of(fields: Mapping[str, Any], name: str, allowed: tuple[Any, ...]) -> Any:
    if fields[name] not in allowed:
        raise ValueError(f"{name} is {fields[name]!r}, not one of {allowed}")
    return fields[name]
