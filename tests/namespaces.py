"""Hosts of a network, on one machine and without root: network namespaces, joined by cables to a switch.

    with Network(hosts=4, folder=tmp_path) as network:
        process = network.hosts[0].start(["hostname"], output=path)

Each host has an address, an interface eth0 and a loopback of its own, so what one sends to another crosses both their
cables and is counted there. What a host starts lives in a PID namespace: to kill it ends every process in it at once,
as a loss of power does. A namespace goes with the last process in it, so nothing is left behind. Hosts have names, and
share the file system as the nodes of a cluster share a folder. SLURM's daemons do not run here: they ask for real root.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

SHELL = ["sh", "-c"]
ENTER = ["nsenter", "--preserve-credentials", "--user", "--net", "--target"]
ALONE = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--uts"]
QUIET = "mount --bind /dev/null /etc/resolv.conf"  # no name server would answer
BOOT = f'hostname "$1" && mount --bind "$2" /etc/hosts && {QUIET} && shift 2 && exec "$@"'
# Classic BPF: a random number above the threshold passes (0), and the 5% below it are dropped (2).
LOSE = f"4,32 0 0 4294963256,37 1 0 {2**32 // 20},6 0 0 2,6 0 0 0"


def why_not() -> str:
    """What keeps this machine from making hosts, in its own words; empty where it can."""
    slow = "tc qdisc add dev one root netem delay 10ms 2>/dev/null || tc qdisc add dev one clsact"
    trial = f"ip link add one type veth peer two && {{ {slow}; }}"
    try:
        done = subprocess.run(
            ["unshare", "--map-root-user", "--net", *ALONE, *SHELL, trial], capture_output=True, text=True, timeout=20
        )
    except OSError as error:
        return str(error)
    return done.stderr.strip() if done.returncode else ""


class Network:
    """A switch and its hosts, which are gone at the end of the `with`."""

    def __init__(self, hosts: int, folder: Path, names: bool = True) -> None:
        """With `names` each host knows those of all; else its own alone, as a loopback address: so Debian does it."""
        self.switch = _hold(["unshare", "--map-root-user", "--net"])
        _inside(self.switch, "ip link add switch type bridge && ip link set switch up")
        self.hosts = [Host(self.switch, number, folder) for number in range(1, hosts + 1)]
        for host in self.hosts:
            known = [f"{other.address} {other.name}" for other in self.hosts] if names else [f"127.0.1.1 {host.name}"]
            host.names.write_text("\n".join(["127.0.0.1 localhost", *known]))

    def __enter__(self) -> Network:
        return self

    def __exit__(self, *_) -> None:
        for process in [process for host in self.hosts for process in (*host.started, host.holder)] + [self.switch]:
            process.kill()
            process.wait()


class Host:
    """A namespace with a cable to the switch."""

    def __init__(self, switch: subprocess.Popen, number: int, folder: Path) -> None:
        self.name, self.address = f"host{number}", f"10.0.0.{number}"
        self.names = folder / f"{self.name}.names"
        self.started: list[subprocess.Popen] = []
        self.holder = _hold([*ENTER, str(switch.pid), "unshare", "--net"])
        cable = f"cable{number}"
        _inside(switch, f"ip link add {cable} type veth peer name eth0 netns {self.holder.pid}")
        _inside(switch, f"ip link set {cable} master switch up")
        _inside(self.holder, f"ip address add {self.address}/24 dev eth0 && ip link set eth0 up && ip link set lo up")

    def start(self, command: list[str], output: Path, **environment: str) -> subprocess.Popen:
        """Start a command, its output appended to a file; kill() ends it and all it has started."""
        with output.open("a") as file:
            process = subprocess.Popen(
                [*ENTER, str(self.holder.pid), *ALONE, *SHELL, BOOT, "boot", self.name, str(self.names), *command],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
            )
        self.started.append(process)
        return process

    def sent_mib(self) -> float:
        """What has left this host, by the counter of its interface."""
        counters = Path(f"/proc/{self.holder.pid}/net/dev").read_text()
        return int(re.findall(r"eth0:(.*)", counters)[0].split()[8]) / 2**20

    def slow_down(self) -> str:
        """From now on this host's packets are late, and some are lost; by what means depends on the kernel."""
        try:
            _inside(self.holder, "tc qdisc add dev eth0 root netem delay 10ms loss 2%")
            return "netem"
        except subprocess.CalledProcessError:  # late by waiting in a queue, lost by a filter
            _inside(self.holder, "tc qdisc add dev eth0 root tbf rate 4mbit burst 10kb latency 400ms")
            _inside(self.holder, "tc qdisc add dev eth0 clsact")
            _inside(self.holder, f'tc filter add dev eth0 egress bpf direct-action bytecode "{LOSE}"')
            return "tbf and bpf"

    def lost_packets(self) -> int:
        return sum(map(int, re.findall(r"dropped (\d+)", _inside(self.holder, "tc -s qdisc show dev eth0"))))

    def speed_up(self) -> None:
        _inside(self.holder, "tc qdisc del dev eth0 root; tc qdisc del dev eth0 clsact 2>/dev/null || true")


def _hold(namespace: list[str]) -> subprocess.Popen:
    """A process that keeps a namespace, until it is killed or its standard input ends."""
    process = subprocess.Popen(
        [*namespace, *SHELL, "echo ready; exec cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    return process


def _inside(holder: subprocess.Popen, command: str) -> str:
    return subprocess.run(
        [*ENTER, str(holder.pid), *SHELL, command], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
