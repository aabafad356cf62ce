"""Packing of sequences into rows of a fixed number of tokens: best-fit decreasing.

The longest sequence comes first. Each goes into the row with the least free space that suffices. The free spaces that
occur are the set bits of one integer; the smallest that suffices is the lowest bit after a shift. The cost per sequence
does not depend on the number of rows.
"""

from __future__ import annotations


def best_fit(sizes: list[int], limit: int) -> list[list[int]]:
    """Rows of indices into `sizes`, each of at most `limit` tokens in sum. No size may exceed the limit."""
    rows: list[list[int]] = []
    by_free: list[list[int]] = [[] for _ in range(limit + 1)]  # rows by free space
    occurring = 0  # bit n: some row has n free tokens
    for index in sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True):
        size = sizes[index]
        sufficient = occurring >> size
        if sufficient:
            free = size + (sufficient & -sufficient).bit_length() - 1
            row = by_free[free].pop()
            occurring ^= (not by_free[free]) << free
            rows[row].append(index)
        else:
            free, row = limit, len(rows)
            rows.append([index])
        by_free[free - size].append(row)
        occurring |= 1 << (free - size)
    return rows
