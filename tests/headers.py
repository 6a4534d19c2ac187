"""Headers of safetensors files, taken apart and put together for tests of damaged ones."""

import json
import struct
from typing import Any


def header_of(content: bytes) -> tuple[dict[str, Any], bytes]:
    """The header, and the tensors' bytes after it."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(header: dict[str, Any], body: bytes) -> bytes:
    """The file of a header and the tensors' bytes."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def without_checksum(header: dict[str, Any]) -> dict[str, Any]:
    """As it was before there were checksums: all else has to be found out without one."""
    described = header.get("__metadata__", {})
    described.pop("sha256", None)
    if "ekfac_rs" in described:
        metadata = json.loads(described["ekfac_rs"])
        metadata.pop("checksum")
        described["ekfac_rs"] = json.dumps(metadata)
    return header
