"""Zstandard frames of a known size, which nobody vouches for when they are read."""

import zstandard

# What RFC 8878 recommends decoders to support; the memory that a frame may ask for.
_MAX_WINDOW_BYTES = 8 << 20


class BadFrame(ValueError):
    """A frame that is broken, of another size, or wants too much memory."""


def pack(raw: bytes | memoryview, level: int) -> bytes:
    """One frame without a dictionary, checksum or content size."""
    return zstandard.ZstdCompressor(level=level, write_content_size=False).compress(raw)


def unpack(frame: bytes | memoryview, size: int) -> bytes:
    """The content of a frame, which has `size` bytes.

    Raises:
      BadFrame: it has not.
    """
    try:
        # A frame may name a size of its own, which the library would allocate whatever its limit.
        parameters = zstandard.get_frame_parameters(frame)
        if parameters.content_size not in (size, zstandard.CONTENTSIZE_UNKNOWN):
            raise BadFrame(f"would be {parameters.content_size} bytes by their frame, not {size}")
        if parameters.window_size > _MAX_WINDOW_BYTES:
            raise BadFrame(f"want a window of {parameters.window_size} bytes")
        decompressor = zstandard.ZstdDecompressor()
        raw = decompressor.decompress(frame, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise BadFrame(f"cannot be decompressed: {error}") from error
    if len(raw) != size:
        raise BadFrame(f"are {len(raw)} bytes, not {size}")
    return raw
