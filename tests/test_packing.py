"""Packing: nothing is lost, nothing is too long, little is wasted."""

import itertools
import math
import random

import pytest

from megatron_dft.packing import best_fit, first_fit


def lengths(count, seed=1, mean=300.0, limit=2048):
    """Log-normal, as conversations are."""
    rng, sigma = random.Random(seed), 0.8
    draw = (round(rng.lognormvariate(math.log(mean) - sigma**2 / 2, sigma)) for _ in itertools.count())
    return list(itertools.islice((x for x in draw if 0 < x <= limit), count))


def best_fit_slowly(sizes, limit):
    """The room that is left in each line, sorted."""
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
    lines = best_fit(sizes, 20)
    assert sorted(itertools.chain(*lines)) == list(range(60))
    assert all(sum(sizes[i] for i in line) <= 20 for line in lines)
    assert sorted(20 - sum(sizes[i] for i in line) for line in lines) == best_fit_slowly(sizes, 20)


@pytest.mark.parametrize("seed", range(5))
def test_first_fit_uses_first_line_with_space_and_limits_open_lines(seed):
    rng = random.Random(seed)
    sizes = [rng.randint(1, 20) for _ in range(200)]
    lines = list(first_fit(((size, i) for i, size in enumerate(sizes)), 20, 4))
    assert sorted(itertools.chain(*lines)) == list(range(200))
    assert all(sum(sizes[i] for i in line) <= 20 for line in lines)
    assert [line[0] for line in first_fit(((size, i) for i, size in enumerate([20] * 5)), 20, 4)] == list(range(5))
    # 11 and 12 leave room 9 and 8: 7 goes to the first, 8 to the second.
    assert list(first_fit([(11, "a"), (12, "b"), (7, "c"), (8, "d")], 20, 2)) == [["b", "d"], ["a", "c"]]
    # Of rooms 12 and 7 none takes 13: the fullest line is closed.
    assert list(first_fit([(8, "a"), (13, "b"), (13, "c"), (12, "d")], 20, 2)) == [["b"], ["a", "d"], ["c"]]


def test_first_fit_holds_at_most_open_lines():
    taken = []

    def items():
        for i in itertools.count():
            taken.append(i)
            yield 15, i

    packed = first_fit(items(), 20, 8)
    assert list(itertools.islice(packed, 3)) == [[0], [1], [2]] and len(taken) == 8 + 3


def test_packing_efficiency_is_above_95_percent():
    sizes = lengths(20000)
    assert 280 < sum(sizes) / len(sizes) < 310
    lines = {"best": best_fit(sizes, 2048), "first": list(first_fit(((s, s) for s in sizes), 2048, 64))}
    used = {name: sum(sizes) / 2048 / len(found) for name, found in lines.items()}
    assert used["best"] > 0.995 and used["first"] > 0.95
    assert sum(sizes) / 2048 / len(sizes) < 0.15  # one to a line


def test_packing_accepts_no_items_and_full_lines():
    assert best_fit([], 4) == [] and list(first_fit([], 4, 2)) == []
    assert best_fit([4, 4], 4) == [[0], [1]]
