"""Packing: many conversations to a line of a fixed number of tokens, so that few are padding.

    best_fit     all sizes are known: the largest first, each into the line where it leaves the least room. Of a usual
                 mix of lengths nothing is left to gain; needs a few numbers per conversation
    first_fit    one pass, a few open lines: each into the first that has room; when none has, the fullest is closed.
                 Keeps the order roughly, and works on a stream

A line's room is a number up to the length of a line, so the rooms that exist are bits of one integer, and the least one
that is enough is a shift and its lowest bit: best fit takes the same few operations whatever the number of lines.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def best_fit(sizes: list[int], limit: int) -> list[list[int]]:
    """Lines of indices, each of at most `limit` in sum. No size may be above the limit."""
    lines: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(limit + 1)]
    rooms = 0  # bit r: some line has room r
    for index in sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True):
        size = sizes[index]
        enough = rooms >> size
        if enough:
            room = size + (enough & -enough).bit_length() - 1
            line = with_room[room].pop()
            rooms ^= (not with_room[room]) << room
            lines[line].append(index)
        else:
            room, line = limit, len(lines)
            lines.append([index])
        with_room[room - size].append(line)
        rooms |= 1 << (room - size)
    return lines


def first_fit(items: Iterable[tuple[int, T]], limit: int, open_lines: int) -> Iterator[list[T]]:
    """Lines of items, of which each brings its size. At most `open_lines` are held at a time."""
    rooms: list[int] = []
    lines: list[list[T]] = []
    for size, item in items:
        at = next((i for i, room in enumerate(rooms) if room >= size), None)
        if at is None:
            if len(lines) == open_lines:
                fullest = rooms.index(min(rooms))
                del rooms[fullest]
                yield lines.pop(fullest)
            at = len(lines)
            rooms.append(limit)
            lines.append([])
        rooms[at] -= size
        lines[at].append(item)
        if rooms[at] == 0:
            del rooms[at]
            yield lines.pop(at)
    yield from lines
