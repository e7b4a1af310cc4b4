"""A PDF written anew with its small objects in compressed object streams (PDF 1.5): nothing lost, a third smaller.

Typst writes each of the tens of thousands of elements that a tagged book has as text. Here they are packed, and a
cross-reference stream takes the place of the table. ISO 32000-1, sections 7.5.7 and 7.5.8.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator

GROUP = 200  # objects in one stream
_ENTRY = re.compile(rb"(\d{10}) (\d{5}) ([nf])\s+")


def pack_pdf(data: bytes) -> bytes:
    """The same document with object streams.

    Raises ``ValueError`` for a file without a classic cross-reference table, or one that is encrypted.
    """
    offsets, trailer = _table(data)
    bodies = dict(_objects(data, offsets))
    packed = [number for number, body in bodies.items() if not body.endswith(b"endstream")]
    out = bytearray(b"%PDF-1.7\n%\x80\x80\x80\x80\n")
    places: dict[int, tuple[int, int, int]] = {0: (0, 0, 65535)}  # type, offset or stream, generation or index
    for number, body in bodies.items():
        if body.endswith(b"endstream"):
            places[number] = (1, len(out), 0)
            out += b"%d 0 obj\n%b\nendobj\n" % (number, body)
    following = max(bodies) + 1
    for start in range(0, len(packed), GROUP):
        group = packed[start:start + GROUP]
        places[following] = (1, len(out), 0)
        places.update({number: (2, following, index) for index, number in enumerate(group)})
        out += _object_stream(following, [(number, bodies[number]) for number in group])
        following += 1
    places[following] = (1, len(out), 0)
    start = len(out)
    out += _cross_references(following, places, trailer)
    return bytes(out + b"startxref\n%d\n%%%%EOF\n" % start)


def _table(data: bytes) -> tuple[dict[int, int], bytes]:
    """Offsets by object number, and what the trailer says besides the size."""
    start = int(data[data.rindex(b"startxref") + 9:].split()[0])
    head = re.compile(rb"xref\s+0 (\d+)\s+").match(data, start)
    if head is None:
        raise ValueError(f"At byte {start} there is no cross-reference table from object 0; pack Typst's PDF.")
    offsets, at = {}, head.end()
    for number in range(int(head[1])):
        entry = _ENTRY.match(data, at)
        if entry[3] == b"n":
            offsets[number] = int(entry[1])
        at = entry.end()
    trailer = re.search(rb"trailer\s*<<(.*?)>>\s*startxref", data[at:], re.S)[1]
    if b"/Encrypt" in trailer:
        raise ValueError("The PDF is encrypted; pack it before that.")
    return offsets, re.sub(rb"/Size \d+", b"", trailer)


def _objects(data: bytes, offsets: dict[int, int]) -> Iterator[tuple[int, bytes]]:
    """Each object's number and body, without ``obj`` and ``endobj``, in the order of the file."""
    order = sorted(offsets, key=offsets.get)
    ends = [offsets[number] for number in order[1:]] + [data.rindex(b"xref", 0, data.rindex(b"startxref"))]
    for number, end in zip(order, ends, strict=True):
        begin = data.index(b"obj", offsets[number]) + 3
        yield number, data[begin:data.rindex(b"endobj", begin, end)].strip()


def _object_stream(number: int, objects: list[tuple[int, bytes]]) -> bytes:
    """One stream of objects: a list of numbers and offsets, then the bodies."""
    index, at = [], 0
    for held, body in objects:
        index.append(b"%d %d" % (held, at))
        at += len(body) + 1
    head = b" ".join(index) + b"\n"
    body = zlib.compress(head + b"\n".join(body for _, body in objects) + b"\n", 9)
    return _stream(number, b"/Type/ObjStm/N %d/First %d" % (len(objects), len(head)), body)


def _cross_references(number: int, places: dict[int, tuple[int, int, int]], trailer: bytes) -> bytes:
    """The stream that says where everything is: type, four bytes of place, two of index."""
    free = (0, 0, 0)
    rows = b"".join(kind.to_bytes(1, "big") + place.to_bytes(4, "big") + index.to_bytes(2, "big")
                    for kind, place, index in (places.get(i, free) for i in range(number + 1)))
    body = zlib.compress(rows, 9)
    return _stream(number, b"/Type/XRef/Size %d/W[1 4 2]%b" % (number + 1, trailer), body)


def _stream(number: int, says: bytes, body: bytes) -> bytes:
    return (b"%d 0 obj\n<<%b/Filter/FlateDecode/Length %d>>\nstream\n%b\nendstream\nendobj\n"
            % (number, says, len(body), body))
