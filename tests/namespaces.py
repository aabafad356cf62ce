"""Several hosts on one machine, without root: network namespaces, connected by veth pairs to a bridge.

    with Network(hosts=4, folder=tmp_path) as network:
        process = network.hosts[0].start(["hostname"], output=path)

Each host has its own address, interface eth0 and loopback. Traffic between hosts crosses both their veth pairs and is
counted there. The processes of a host run in a PID namespace: killing its first process kills all of them, as a power
failure does. A namespace ends with its last process, so nothing needs to be cleaned up. Hosts have names and share the
file system, as the nodes of a cluster share a folder. SLURM's daemons do not run here, because they require real root.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

SHELL = ["sh", "-c"]
ENTER = ["nsenter", "--preserve-credentials", "--user", "--net", "--target"]
ALONE = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--uts"]
QUIET = "mount --bind /dev/null /etc/resolv.conf"  # no name server is reachable
BOOT = f'hostname "$1" && mount --bind "$2" /etc/hosts && {QUIET} && shift 2 && exec "$@"'
# Classic BPF: a random number above the threshold passes (0), and the 5% below it are dropped (2).
LOSE = f"4,32 0 0 4294963256,37 1 0 {2**32 // 20},6 0 0 2,6 0 0 0"


def why_not() -> str:
    """The error of this machine when it creates hosts; empty if it can."""
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
    """A bridge and its hosts. Both end with the `with` block."""

    def __init__(self, hosts: int, folder: Path, names: bool = True) -> None:
        """`names`: each /etc/hosts lists all hosts; otherwise only its own host, at 127.0.1.1, as on Debian."""
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
    """A network namespace with a veth pair to the bridge."""

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
        """Start a command and append its output to a file. kill() ends it and its children."""
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
        """MiB sent by this host, from the counter of its interface."""
        counters = Path(f"/proc/{self.holder.pid}/net/dev").read_text()
        return int(re.findall(r"eth0:(.*)", counters)[0].split()[8]) / 2**20

    def slow_down(self) -> str:
        """Delay this host's packets and drop some. Returns the mechanism, which depends on the kernel."""
        try:
            _inside(self.holder, "tc qdisc add dev eth0 root netem delay 10ms loss 2%")
            return "netem"
        except subprocess.CalledProcessError:  # without netem: delay by a queue, loss by a filter
            _inside(self.holder, "tc qdisc add dev eth0 root tbf rate 4mbit burst 10kb latency 400ms")
            _inside(self.holder, "tc qdisc add dev eth0 clsact")
            _inside(self.holder, f'tc filter add dev eth0 egress bpf direct-action bytecode "{LOSE}"')
            return "tbf and bpf"

    def lost_packets(self) -> int:
        return sum(map(int, re.findall(r"dropped (\d+)", _inside(self.holder, "tc -s qdisc show dev eth0"))))

    def speed_up(self) -> None:
        _inside(self.holder, "tc qdisc del dev eth0 root; tc qdisc del dev eth0 clsact 2>/dev/null || true")


def _hold(namespace: list[str]) -> subprocess.Popen:
    """A process that holds a namespace until it is killed or its standard input ends."""
    process = subprocess.Popen(
        [*namespace, *SHELL, "echo ready; exec cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    return process


def _inside(holder: subprocess.Popen, command: str) -> str:
    return subprocess.run(
        [*ENTER, str(holder.pid), *SHELL, command], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
