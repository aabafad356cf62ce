"""tools/studies/soak.py: a short run that is killed during a save, and each check of the soak detects its violation."""

import itertools
import json
import math
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("tensorboard")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools" / "studies"))
import soak

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads processes from /proc")

SCRIPT = """
import os, sys, time
for i in range(1, 1000):
    if os.environ["RANK"] == "1":
        print(f" iteration {i}/ 1000 | elapsed time: {time.time()} | lm loss: {1 / i:.6E} |", flush=True)
    time.sleep(0.02 if i < int(sys.argv[1]) else 1000.0)
"""


@pytest.fixture
def argv(tmp_path):
    """Arguments of torchrun on two ranks that count up to a number, then hang."""
    (tmp_path / "counting.py").write_text(SCRIPT)
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return [*run, "--max-restarts", "3", str(tmp_path / "counting.py")]


def all_exited(pids):
    """Whether all processes have exited, after waiting up to 5 s."""
    for _ in range(100):
        states = [Path(f"/proc/{pid}/stat") for pid in pids]
        if not any(path.exists() and path.read_text().split()[2] != "Z" for path in states):
            return True
        time.sleep(0.05)
    return False


def violations(run, folder):
    return "\n".join(soak.run_violations(run, folder, {}, limit_s=60.0))


@pytest.mark.nightly
def test_soak_reports_hang_with_stacks_and_leaves_no_process(argv, tmp_path):
    run = soak.watch([*argv, "20"], tmp_path, 15.0, math.inf, iter(()))
    found = violations(run, tmp_path)
    assert run.hang and "expected an iteration within" in found and 'counting.py", line 6 in <module>' in found
    assert all_exited([run.agent, *itertools.chain(*run.attempts)])


@pytest.mark.nightly
def test_soak_reports_unnamed_kill_and_unexplained_restart(argv, tmp_path):
    end = time.monotonic() + 40.0
    run = soak.watch([*argv, "1000"], tmp_path, 60.0, end, iter([(0.3, "kill")]))
    assert len(run.attempts) == 2 and (len(run.faults), run.restarts) == (1, 1)
    run.iterations.clear()  # then only the log contains them
    assert not violations(run, tmp_path)
    log = tmp_path / "log.txt"
    text = log.read_text()
    log.write_text(text.replace(f"(pid: {run.faults[0][1]})", ""))
    assert "expected the log to name process" in violations(run, tmp_path)
    log.write_text(text)
    run.faults.clear()
    assert "expected at most 1 attempts that train" in violations(run, tmp_path)
    assert all_exited([run.agent, *itertools.chain(*run.attempts)])


def run_with_growth(kib_per_iteration, mib=800.0):
    """A process of 20 minutes: memory grows to its size for 10, then trains at five iterations per second for 10."""
    young = [(t, mib * t / 600) for t in range(0, 600, 2)]
    grown = [(600 + t, mib + kib_per_iteration * 5 * t / 1024 + 0.2 * (t % 3)) for t in range(0, 600, 2)]
    return soak.Run(agent=1, attempts={(7,): [600 + 0.2 * i for i in range(3000)]}, memory={7: young + grown})


@pytest.mark.parametrize(("kib", "leaks"), [(0.0, False), (1.0, False), (3.0, True)])
def test_soak_detects_memory_leak(kib, leaks):
    (row,) = soak.growth(run_with_growth(kib), 500.0)
    assert row["kib_per_iteration"] == pytest.approx(kib, abs=0.05)
    assert row["mib_per_hour"] == pytest.approx(kib * 5 * 3600 / 1024, abs=1.0)
    assert any(soak.memory_violations([row], [], 2.0, 16.0)) == leaks
    assert not list(soak.growth(run_with_growth(kib), 601.0))


@pytest.mark.parametrize(("sizes", "grown"), [([800, 801, 799, 802], 0), ([800, 801, 830, 831], 1), ([800], 0)])
def test_soak_detects_memory_growth_across_restarts(sizes, grown):
    young = soak.sizes_when_young([run_with_growth(0.0, mib) for mib in sizes])
    assert young == pytest.approx(sizes, abs=0.5)
    assert any(soak.memory_violations([], young, 2.0, 16.0)) == grown


@pytest.mark.nightly
def test_soak_detects_lost_or_unreported_data_lines(tmp_path):
    pytest.importorskip("transformers")
    good = soak.write_conversations(tmp_path, 30, 1)
    clean, file = tmp_path / "clean.jsonl", tmp_path / "x.jsonl"
    clean.write_bytes(soak.merged(good, {}))
    soak.prepared(clean)
    bad, named = soak.damaged(good, random.Random(1), 40), Counter()
    file.write_bytes(soak.merged(good, bad))
    assert not list(soak.data_violations(file, bad, len(good), clean, named))
    assert named.total() == 40 and {"not JSON", "no messages"} <= set(named)
    file.write_bytes(soak.merged([*good[:-1], b"{}"], bad))  # one line is missing
    assert len(list(soak.data_violations(file, bad, len(good), clean, named))) >= 2


@pytest.mark.nightly
@pytest.mark.timeout(900)
@pytest.mark.host
def test_soak_run_killed_during_save_matches_reference(tmp_path, capsys):
    pytest.importorskip("megatron.training")
    flags = "--minutes 5 --rounds 1 --faults 1 --fault-every 0.01 --iterations 40 --save-interval 5 --conversations 30"
    folders = ["--folder", str(tmp_path / "soak"), "--out", str(tmp_path / "soak.json")]
    code = soak.main([*flags.split(), "--damage", "15", "--ranks", "2", "--judged", "1000", *folders])
    result = json.loads((tmp_path / "soak.json").read_text())
    assert code == 0 and not result["violations"], capsys.readouterr().out
    assert result["faults"] == {soak.IN_SAVE: 1} and result["attempts"] == 3
    assert result["iterations_of_the_rounds"] >= 45 and result["of_which_done_again"] >= 5
    assert result["compared_to_the_last_bit"] >= 40 and sum(result["damaged_lines_named"].values()) == 15
    folder = tmp_path / "soak" / "round1"
    assert f"exitcode: {-signal.SIGKILL}" in (folder / "log.txt").read_text()
    (scalars,) = soak.scalars_of(folder.with_name("reference"))
    scalars["lm loss", 7] += 1e-6
    assert "('lm loss', 7): expected" in "\n".join(soak.run_violations(soak.Run(), folder, scalars, 60.0))
