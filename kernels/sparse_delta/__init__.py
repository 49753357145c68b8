"""Lossless sparse deltas between two versions of a pytree of arrays."""

from kernels.sparse_delta.decode import apply
from kernels.sparse_delta.delta import Delta, diff
from kernels.sparse_delta.encode import encode
from kernels.sparse_delta.errors import (
    CorruptPayload,
    Damaged,
    Incomplete,
    UnknownFormat,
    WrongBase,
    WrongModel,
    WrongTarget,
)
from kernels.sparse_delta.finish import finish
from kernels.sparse_delta.host import digest_tree as digest
from kernels.sparse_delta.merge import merge
from kernels.sparse_delta.needs import needed
from kernels.sparse_delta.partial import PartialPayload
from kernels.sparse_delta.report import PayloadInfo, TensorInfo, inspect
from kernels.sparse_delta.squash import squash
from kernels.sparse_delta.trees import TreeDigest

__all__ = [
    "CorruptPayload",
    "Damaged",
    "Delta",
    "Incomplete",
    "PartialPayload",
    "PayloadInfo",
    "TensorInfo",
    "TreeDigest",
    "UnknownFormat",
    "WrongBase",
    "WrongModel",
    "WrongTarget",
    "apply",
    "diff",
    "digest",
    "encode",
    "finish",
    "inspect",
    "merge",
    "needed",
    "squash",
]
