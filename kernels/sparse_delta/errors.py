"""What a receiver refuses, and why. Misuse by the caller is a ValueError or TypeError instead."""


class CorruptPayload(Exception):  # named for what is wrong with it
    """A payload that must not be applied; the weights are as they were.

    Attributes:
      bucket: index of the bucket that is bad, where one is to blame.
      tensor: name of the tensor that is bad, where one is to blame.
    """

    def __init__(
        self, message: str, *, bucket: int | None = None, tensor: str | None = None
    ) -> None:
        super().__init__(message)
        self.bucket = bucket
        self.tensor = tensor


class UnknownFormat(CorruptPayload):
    """No payload of this format, or of a version, dtype or mode that this code does not know."""


class Damaged(CorruptPayload):
    """Bytes were lost or changed: a length, a checksum or a field out of its bounds."""


class WrongModel(CorruptPayload):
    """The payload is of a tree with other names, shapes or dtypes than the receiver's."""


class WrongBase(CorruptPayload):
    """The payload was made against other weights: a version twice, out of order, or a stranger."""


class WrongTarget(CorruptPayload):
    """The weights that came out are not those that went in, though every checksum held."""


class Incomplete(CorruptPayload):
    """Not all of a payload: one process's part, to `merge` with others, or bytes not fetched."""
