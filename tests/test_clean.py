"""megatron-dft clean: the tokens with the largest decrease of the NLL stay, everything else of the file is kept."""

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("pyarrow")

from megatron_dft.data import clean
from megatron_dft.data.token_file import COLUMNS, Header, Row, TokenFile, write

LENGTHS = ((5, 3), (8,), (2, 4, 2))
CHANNELS = ((0, 1), (1,), (0, 0, 1))


def header(model, rows):
    trained = sum(int((row.loss_weights > 0).sum()) for row in rows)
    channels = {name: {"trained_tokens": 0} for name in ("maths", "code")}
    return Header(
        seq_length=10,
        multiple=1,
        context_parallel_size=1,
        tensor_model_parallel_size=1,
        sequence_parallel=False,
        pad_id=0,
        max_id=50,
        channels=["maths", "code"],
        fingerprint={},
        statistics={"trained_tokens": trained, "sequences": 6, "channels": channels, "weights": {}},
        reference=None if model is None else {"model": model, "weights": model, "dtype": "float32"},
    )


def make(seed):
    """Rows without a reference, and two sets of NLLs."""
    random = np.random.default_rng(seed)
    rows, nlls = [], ([], [])
    for lengths, channels in zip(LENGTHS, CHANNELS, strict=True):
        size = sum(lengths)
        weights = random.choice([0.0, 0.5, 1.0], size).astype(np.float16)
        weights[np.cumsum([0, *lengths[:-1]])] = 0
        ids = random.integers(1, 50, size, dtype=np.int32)
        rows.append(Row(ids, weights, np.array(lengths, np.int32), np.array(channels, np.int32)))
        for nll in nlls:
            nll.append(np.where(weights > 0, random.exponential(2.0, size), 1.0).astype(np.float16))
    return rows, nlls


@pytest.fixture
def files(tmp_path):
    rows, nlls = make(0)
    for name, model, nll in (("base", "one", nlls[0]), ("better", "two", nlls[1]), ("plain", None, None)):
        stored = rows if nll is None else [replace(row, reference_nll=x) for row, x in zip(rows, nll, strict=True)]
        write(tmp_path / f"{name}.arrow", header(model, rows), stored)
    return tmp_path


def run(files, *argv, base="base", reference="better"):
    arguments = [str(files / f"{base}.arrow"), str(files / f"{reference}.arrow")]
    clean.main([*arguments, "--out", str(files / "out" / "clean.arrow"), *(x.format(folder=files) for x in argv)])
    return TokenFile(str(files / "out" / "clean.arrow"))


@pytest.mark.parametrize("keep", [0.1, 0.6, 1.0])
def test_tokens_with_largest_decrease_stay(files, keep, capsys):
    before = TokenFile(str(files / "base.arrow"))
    after = run(files, "--keep", str(keep))
    better = TokenFile(str(files / "better.arrow"))
    stays, goes, channels = [], [], np.zeros(2, int)
    for i in range(len(before)):
        old, new = before[i], after[i]
        for name in set(COLUMNS) - {"loss_weights"} | {"reference_nll"}:
            assert np.array_equal(getattr(new, name), getattr(old, name))
        trained, kept = old.loss_weights > 0, new.loss_weights > 0
        assert np.array_equal(new.loss_weights[kept], old.loss_weights[kept]) and not (kept & ~trained).any()
        score = old.reference_nll.astype(float) - better[i].reference_nll
        stays += score[kept].tolist()
        goes += score[trained & ~kept].tolist()
        np.add.at(channels, np.repeat(old.channels, old.lengths)[kept], 1)
    assert len(stays) == round(keep * (len(stays) + len(goes))) and min(stays) > max(goes, default=-np.inf)
    statistics = after.header.statistics
    assert statistics["trained_tokens"] == len(stays) and after.header.reference == before.header.reference
    assert [statistics["channels"][name]["trained_tokens"] for name in ("maths", "code")] == channels.tolist()
    assert statistics["cleaned"]["models"] == ["one (one, float32)", "two (two, float32)"]
    kept = np.concatenate([after[i].loss_weights for i in range(len(after))])
    assert statistics["weights"] == {
        "min": kept[kept > 0].min(),
        "max": kept.max(),
        "mean": pytest.approx(kept.sum(dtype=float) / (kept > 0).sum()),
    }
    assert f"{len(stays)} of {len(stays) + len(goes)} trained tokens stay in the loss" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "names", "message"),
    [
        (("--keep", "0"), {}, "--keep 0: expected a share above 0 and up to 1"),
        (("--keep", "nan"), {}, "--keep nan: expected a share"),
        ((), {"reference": "plain"}, "plain.arrow: has no log-probabilities; write it with megatron-dft reference"),
        ((), {"reference": "bf16"}, r"one \(one, float32\) and copy \(one, bfloat16\) have the same weights; use two"),
        ((), {"reference": "longer"}, "expected the same data with two models, got different data"),
        ((), {"reference": "other"}, "row 0 differs; expected the same data with two models"),
        ((), {"base": "missing"}, "missing.arrow: no such file"),
        (("--out", "{folder}"), {}, "this is not a regular file; choose another name"),
    ],
)
def test_files_that_do_not_fit_are_rejected(files, argv, names, message):
    rows, nlls = make(1)
    stored = [replace(row, reference_nll=x) for row, x in zip(rows, nlls[0], strict=True)]
    old = TokenFile(str(files / "better.arrow")).header
    write(files / "other.arrow", old, stored)
    write(files / "longer.arrow", replace(old, seq_length=20), stored)
    same = replace(old, reference={"model": "copy", "weights": "one", "dtype": "bfloat16"})
    write(files / "bf16.arrow", same, stored)
    with pytest.raises(SystemExit, match=f"megatron_dft.clean: .*{message}"):
        run(files, *argv, **names)
    assert not (files / "out" / "clean.arrow").exists()


def test_output_is_no_input(files):
    with pytest.raises(SystemExit, match=r"base\.arrow: this is an input file"):
        clean.main([*(str(files / f"{x}.arrow") for x in ("base", "better")), "--out", str(files / "base.arrow")])
