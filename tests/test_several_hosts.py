"""Training over several hosts matches one machine, also with a slow link and after the loss of a host.

The hosts are network namespaces (namespaces.py). Each starts examples/launch/several_machines.sh. Initial weights and
data are those of the run on one machine, so all logged values must agree.
"""

import subprocess
import time
from pathlib import Path

import pytest
from host_flags import DP, PP2, TP2
from host_runs import Host, agree
from launch_script_runs import LAUNCH, RUN, SAVED, STEPS, curves_in, environment, script_in, steps_in
from namespaces import Network, why_not

pytest.importorskip("megatron.training")
pytest.importorskip("tensorboard")
REASON = why_not()
pytestmark = [
    pytest.mark.host,
    pytest.mark.nightly,
    pytest.mark.skipif(bool(REASON), reason=f"no network namespaces: {REASON}"),
]

TIMEOUT_S = 300  # a run takes a minute on an idle machine
GRADIENTS_MIB = 0.1  # half of the model, which a data-parallel rank sends


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return Host(tmp_path_factory.mktemp("single"))


def start(host, flags: str, folder: Path, **variables: str) -> subprocess.Popen:
    """Start the launch script on a host."""
    argv = [str(script_in(folder)), *flags.split(), "--tensorboard-dir", str(folder / "logs"), "--device", "cpu"]
    command = ["bash", str(LAUNCH / "several_machines.sh"), *argv]
    return host.start(command, folder / f"{host.name}.txt", **environment(GPUS="1", JOB="run", **variables))


def logs(folder: Path) -> str:
    return "\n\n".join(f"{path.name}: {path.read_text(errors='replace')[-3000:]}" for path in folder.glob("host?.txt"))


def wait_for_step(step: int, log: Path, runs: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while step not in steps_in(log):
        assert time.monotonic() < deadline and all(run.poll() is None for run in runs), logs(log.parent)
        time.sleep(0.02)


def test_four_hosts_match_one_machine(tmp_path, single):
    flags = f"{RUN} {PP2} {DP}"
    with Network(4, tmp_path) as network:
        runs = [start(host, flags, tmp_path, NODES="4", HEAD="host4", PREFLIGHT="0") for host in network.hosts]
        assert [run.wait(TIMEOUT_S) for run in runs] == [0, 0, 0, 0], logs(tmp_path)
        assert min(host.sent_mib() for host in network.hosts) > STEPS * GRADIENTS_MIB
    agree(curves_in(tmp_path / "logs"), single.curves(flags, ranks=4))


def test_slow_link_and_lost_host_leave_curves_unchanged(tmp_path, single):
    """The first host, with rank 0, is lost. The second host is the head."""
    flags = f"{RUN} {TP2} --save {tmp_path / 'saved'} --load {tmp_path / 'saved'}"
    with Network(2, tmp_path, names=False) as network:
        first, head = network.hosts
        log = tmp_path / f"{head.name}.txt"

        def boot(host, **more):
            variables = {"NODES": "2", "HEAD": f"{head.address}:29511", "ADDRESS": host.address, "INTERFACE": "eth0"}
            return start(host, flags, tmp_path, **variables, **more)

        runs = [boot(first), boot(head)]
        wait_for_step(1, log, runs)
        mechanism = first.slow_down()
        wait_for_step(SAVED + 1, log, runs)
        lost = first.lost_packets()
        runs[0].kill()
        first.speed_up()
        again = boot(first, PREFLIGHT="0")
        assert [again.wait(TIMEOUT_S), runs[1].wait(TIMEOUT_S)] == [0, 0], logs(tmp_path)
    assert lost > 0, f"{mechanism} has dropped no packets"
    steps = steps_in(log)
    assert steps[:SAVED] == list(range(1, SAVED + 1)) and steps[SAVED - STEPS :] == list(range(SAVED + 1, STEPS + 1))
    assert len(steps) > STEPS
    expected = single.curves(f"{RUN} {TP2}", ranks=2)
    curves = curves_in(tmp_path / "logs")
    for tag in (tag for tag in expected if len(expected[tag]) == STEPS):  # an evaluation has one value
        curves[tag][SAVED : SAVED - STEPS] = []  # trained twice
    agree(curves, expected)
