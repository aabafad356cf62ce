"""best_fit: complete, within the row length, at least 99.5% efficient."""

import itertools
import math
import random

import pytest

from megatron_dft.data.packing import best_fit


def lengths(count, seed=1, mean=300.0, limit=2048):
    """Log-normal lengths, as those of conversations."""
    rng, sigma = random.Random(seed), 0.8
    draw = (round(rng.lognormvariate(math.log(mean) - sigma**2 / 2, sigma)) for _ in itertools.count())
    return list(itertools.islice((x for x in draw if 0 < x <= limit), count))


def reference_free_lengths(sizes, limit):
    """Reference implementation of best fit; returns the free length of each row, sorted."""
    rooms = []
    for size in sorted(sizes, reverse=True):
        enough = [room for room in rooms if room >= size]
        rooms.append(limit)
        if enough:
            rooms.pop()
            rooms.remove(min(enough))
            rooms.append(min(enough))
        rooms[-1] -= size
    return sorted(rooms)


@pytest.mark.parametrize("seed", range(20))
def test_best_fit_matches_reference_implementation(seed):
    rng = random.Random(seed)
    sizes = [rng.randint(1, 20) for _ in range(60)]
    rows = best_fit(sizes, 20)
    assert sorted(itertools.chain(*rows)) == list(range(60))
    assert all(sum(sizes[i] for i in row) <= 20 for row in rows)
    assert sorted(20 - sum(sizes[i] for i in row) for row in rows) == reference_free_lengths(sizes, 20)


def test_packing_efficiency_is_above_99_percent():
    sizes = lengths(20000)
    assert 280 < sum(sizes) / len(sizes) < 310
    assert sum(sizes) / 2048 / len(best_fit(sizes, 2048)) > 0.995
    assert sum(sizes) / 2048 / len(sizes) < 0.15  # one conversation per row


def test_best_fit_accepts_no_items_and_full_rows():
    assert best_fit([], 4) == []
    assert best_fit([4, 4], 4) == [[0], [1]]
