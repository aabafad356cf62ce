"""Packing: conversations to rows of a fixed number of tokens, with little padding.

Best fit decreasing: the longest conversation first, each into the row with the least room that is enough. Room is a
number of tokens up to the length of a row, so the rooms that exist are bits of one integer, and the least one that is
enough is a shift and its lowest bit: the cost per conversation does not grow with the number of rows.
"""

from __future__ import annotations


def best_fit(sizes: list[int], limit: int) -> list[list[int]]:
    """Rows of indices, each of at most `limit` tokens in sum. No size may be above the limit."""
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(limit + 1)]
    rooms = 0  # bit r: some row has room r
    for index in sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True):
        size = sizes[index]
        enough = rooms >> size
        if enough:
            room = size + (enough & -enough).bit_length() - 1
            row = with_room[room].pop()
            rooms ^= (not with_room[room]) << room
            rows[row].append(index)
        else:
            room, row = limit, len(rows)
            rows.append([index])
        with_room[room - size].append(row)
        rooms |= 1 << (room - size)
    return rows
