"""Soak test: train on CPU ranks for an hour with killed ranks and invalid data; check results, hangs and memory.

    python tools/studies/soak.py --minutes 60        writes results/DEVICE-DATE-soak.json; exit code 1 on a violation

The conversations are written once. The reference is one undisturbed run of --iterations on the clean data. Rounds
follow until the time is up. Each round inserts invalid lines at random places (truncated copies, random bytes, missing
characters, wrong types), prepares the file with megatron_dft.data and trains on the result from scratch. Faults hit a
random rank in a cycle of five: SIGKILL during a save, at any time, before training begins, at any time, then SIGSTOP,
which only the timeout detects. torchrun restarts all ranks, and they resume from the last checkpoint. An "attempt" is
the time between two restarts. The checks:

    data       each invalid line is reported with number and reason; kept + rejected = read; the token file equals that
               of the clean lines, row by row; --sft rejects the unprepared file with file and line
    tokens     the reference trains on each token once per epoch
    curves     the TensorBoard scalars of each iteration, repeated ones included, equal those of the reference bit by
               bit (the console is not compared: Megatron prints the second iteration of an attempt as a mean of two)
    no hang    the next iteration comes within --distributed-timeout-minutes (1) plus --allowance seconds
    named      the log contains the process ID of each killed or stopped rank; no other attempt that trained ends
    memory     of a rank and of torchrun: constant over each attempt of --judged seconds, and from attempt to attempt

A killed rank leaves behind Megatron's checkpoint writer process (0.6 GiB), which never exits. These processes are
counted, and killed when the next attempt begins.

Memory growth is measured over the second half of an attempt, after the allocator has settled in the first saves. A leak
of one number per token (128 tokens, 4 bytes) in each iteration is 0.5 KiB; the limit is --leak, 2 KiB per iteration.
Lives that a fault cuts short are compared with each other, 5 to 15 seconds after they begin.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "examples"), str(ROOT / "tools" / "benchmarks")]
import make_chat_data  # noqa: E402
from measure import conditions  # noqa: E402

from megatron_dft.utils import HelpFormatter  # noqa: E402

LENGTH, BATCH, TIMEOUT_MINUTES = 128, 4, 1
FLAGS = f"""
--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length {LENGTH} --max-position-embeddings {LENGTH}
--position-embedding-type rope --normalization RMSNorm --disable-bias-linear --attention-dropout 0 --hidden-dropout 0
--make-vocab-size-divisible-by 64 --lr 1e-3 --lr-decay-style constant --global-batch-size {BATCH} --micro-batch-size 1
--clip-grad 1.0 --eval-iters 0 --eval-interval 1000000 --log-interval 1 --tensorboard-log-interval 1 --num-workers 0
--sft --tokenizer-type SFTTokenizer --sft-tokenizer-prompt-format nemotron-nano-v2
--no-create-attention-mask-in-dataloader --calculate-per-token-loss --loss-type dft
--distributed-timeout-minutes {TIMEOUT_MINUTES} --device cpu
"""
ITERATION = re.compile(rb"iteration +(\d+)/ *\d+ \|")
UNTIMED = re.compile("lm loss|dft/(?!valid_tokens_per)|grad-norm|learning-rate")
TICK_S, SAMPLE_S = 0.05, 2.0
Attempt = tuple[int, ...]  # process IDs of its ranks, in order
Plan = Iterator[tuple[float, str]]  # seconds to wait, and the fault
NEVER, IN_SAVE, AT_START, FREEZE = (math.inf, ""), "kill in a save", "kill at the start", "freeze"
Scalars = dict[tuple[str, int], float]  # by tag and iteration


@dataclass
class Run:
    """Observations of one torchrun, from start to end."""

    agent: int = 0  # process ID of torchrun
    code: int | None = None  # exit code; None: stopped at the deadline
    seconds: float = 0.0
    iterations: list[int] = field(default_factory=list)  # in the order of the log
    attempts: dict[Attempt, list[float]] = field(default_factory=dict)  # times of their iterations
    faults: list[tuple[str, int]] = field(default_factory=list)  # fault and process ID
    memory: dict[int, list[tuple[float, float]]] = field(default_factory=dict)  # by process ID: seconds, MiB
    restarts: int = 0
    orphans: int = 0  # killed ranks that left a checkpoint writer behind
    stall_s: float = 0.0
    hang: str = ""


# --- data


def write_conversations(folder: Path, count: int, seed: int) -> list[bytes]:
    """Return valid lines of conversations; write their tokenizer to the folder."""
    used: dict = {}
    items = list(make_chat_data.conversations(random.Random(seed), count, 0.0, used, set()))
    make_chat_data.make_tokenizer(items, folder / "tokenizer")
    channels = [make_chat_data.CHANNELS[used[item[1]["content"]][0]] for item in items]
    return [json.dumps({"messages": m, "channel": c}).encode() for m, c in zip(items, channels, strict=True)]


def damaged(good: list[bytes], rng: random.Random, count: int) -> dict[int, bytes]:
    """Invalid lines by their line number in the file, between the valid lines."""
    wrong = [b"[1]", b"null", b'"text"', b'{"messages": 3}', b'{"messages": [{"role": "user", "content": null}]}']
    kinds = [
        lambda line: line[: rng.randrange(1, len(line))],
        lambda line: rng.randbytes(rng.randrange(8, 80)).replace(b"\n", b"?") + b"\xff",
        lambda line: line.replace(rng.choice((b"}", b":", b'"')), b"", 1),
        lambda line: rng.choice(wrong),
    ]
    numbers = sorted(rng.sample(range(1, len(good) + count + 1), count))
    return {number: rng.choice(kinds)(rng.choice(good)) for number in numbers}


def merged(good: list[bytes], bad: dict[int, bytes]) -> bytes:
    """The file with valid and invalid lines."""
    rest, numbers = iter(good), range(1, len(good) + len(bad) + 1)
    return b"".join((bad[number] if number in bad else next(rest)) + b"\n" for number in numbers)


def train_file(file: Path) -> Path:
    return file.with_suffix(".arrow")


def prepared(file: Path) -> dict[str, Any]:
    """Tokenize and pack a file of conversations with megatron_dft.data; return its report."""
    command = [sys.executable, "-m", "megatron_dft.data", str(file), "--tokenizer", str(file.parent / "tokenizer")]
    command += ["--seq-length", str(LENGTH), "--out", str(train_file(file))]
    command += ["--max-rejected", "1", "--channel", "soak"]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, timeout=600)
    return json.loads(Path(f"{train_file(file)}.report.json").read_text())


def data_violations(file: Path, bad: dict[int, bytes], good: int, clean: Path, named: Counter[str]) -> Iterator[str]:
    """Lines that megatron_dft.data lost or did not report; counts the reported reasons in `named`."""
    report, out = prepared(file), train_file(file)
    rejected = [json.loads(line) for line in Path(f"{out}.rejected.jsonl").read_text().splitlines()]
    named.update(entry["reason"].partition(":")[0] for entry in rejected)
    if [entry["line"] for entry in rejected] != list(bad):
        yield f"{file}: expected rejected lines {list(bad)}, got {[entry['line'] for entry in rejected]}"
    if (report["sequences"], report["rejected"]) != (good, len(bad)):
        yield f"{file}: expected {good} lines kept and {len(bad)} rejected, got {report}"
    if rows(out) != rows(train_file(clean)):
        yield f"{out}: expected the rows of {train_file(clean)}, got others"


def rows(path: Path) -> list[tuple[bytes, ...]]:
    """The rows of a token file."""
    from megatron_dft.data.token_file import TokenFile

    file = TokenFile(str(path))
    return [tuple(part.tobytes() for part in vars(file[i]).values()) for i in range(len(file))]


# --- one torchrun


def environment(folder: Path) -> dict[str, str]:
    """Environment of torchrun: one thread per rank, own cache, stacks on SIGABRT, a new store for each restart.

    torchrun of torch 2.13 otherwise reuses its store. Restarted ranks then connect to the addresses of killed ranks and
    fail with `connectFullMesh failed`, or hang.
    """
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    more = {"OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "hf"), "PYTHONFAULTHANDLER": "1", "PYTHONPATH": paths}
    return {**os.environ, **more, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def torchrun(folder: Path, data: Path, flags: str, ranks: int, restarts: int) -> list[str]:
    """Command that trains examples/pretrain_gpt.py on CPU ranks through megatron_dft.launch."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += [
        "--max-restarts",
        str(restarts),
        "-m",
        "megatron_dft.launch",
        str(ROOT / "examples" / "pretrain_gpt.py"),
    ]
    paths = {"--tokenizer-model": data.parent / "tokenizer", "--train-data-path": data, "--save": folder / "checkpoint"}
    paths |= {"--load": paths["--save"], "--data-cache-path": folder / "cache", "--tensorboard-dir": folder / "logs"}
    return [*command, *FLAGS.split(), *flags.split(), *(str(part) for pair in paths.items() for part in pair)]


def watch(command: list[str], folder: Path, limit_s: float, deadline: float, plan: Plan) -> Run:
    """Run torchrun, inject the planned faults, record observations; all processes are killed at the end."""
    run, log = Run(), folder / "log.txt"
    with log.open("wb") as output:
        agent = subprocess.Popen(command, stdout=output, stderr=output, env=environment(folder), start_new_session=True)
    run.agent, read, attempt, hit, since = agent.pid, 0, (), (), 0.0
    start = progress = sampled = time.monotonic()
    wait_s, kind = next(plan, NEVER)
    try:
        while agent.poll() is None and (now := time.monotonic()) < deadline and not run.hang:
            ranks = ranks_of(agent.pid)
            if len(ranks) == int(command[command.index("--nproc-per-node") + 1]) and ranks != attempt:
                run.orphans += kill(attempt)
                attempt = ranks
            fresh, read = new_iterations(log, read)
            if fresh:
                run.stall_s, progress = max(run.stall_s, now - progress), now
                run.iterations += fresh
                run.attempts.setdefault(attempt, []).extend([now - start] * len(fresh))
            if now - progress > limit_s:
                run.hang = f"no iteration for {now - progress:.0f} s\n{stacks(ranks, log)}"
            if now - sampled > SAMPLE_S:
                sampled = now
                sample(run.memory, (agent.pid, *ranks), now - start)
            if attempt and attempt == ranks != hit and (attempt in run.attempts or kind == AT_START):
                since = since or now
                if now - since > wait_s and (kind != IN_SAVE or being_written(folder / "checkpoint")):
                    run.faults.append((kind, strike(kind, attempt)))
                    hit, since, (wait_s, kind) = attempt, 0.0, next(plan, NEVER)
            time.sleep(TICK_S)
        run.code = agent.poll()
    finally:
        kill([agent.pid, *descendants(agent.pid), *attempt])
        agent.wait()
    run.seconds = time.monotonic() - start
    run.stall_s = max(run.stall_s, time.monotonic() - progress)
    run.iterations += new_iterations(log, read)[0]
    run.restarts = log.read_text(errors="replace").count("failed (exitcode: ")
    return run


def new_iterations(log: Path, read: int) -> tuple[list[int], int]:
    """Iterations in the log after its first `read` bytes, and the new number of bytes read."""
    with log.open("rb") as file:
        file.seek(read)
        text, newline, _ = file.read().rpartition(b"\n")
    return [int(number) for number in ITERATION.findall(text)], read + len(text) + len(newline)


# --- processes


def descendants(pid: int) -> list[int]:
    """Process IDs of the children of a process, their children, and so on."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return [process.pid for process in psutil.Process(pid).children(recursive=True)]
    return []


def ranks_of(agent: int) -> Attempt:
    """Process IDs of the ranks that torchrun has started so far, in order of rank."""
    found = {}
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(agent).children():
            with contextlib.suppress(psutil.Error):
                if rank := process.environ().get("RANK"):
                    found[int(rank)] = process.pid
    return tuple(found[rank] for rank in sorted(found))


def sample(memory: dict[int, list[tuple[float, float]]], pids: tuple[int, ...], seconds: float) -> None:
    """Record the resident MiB of processes."""
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            memory.setdefault(pid, []).append((seconds, psutil.Process(pid).memory_info().rss / (1 << 20)))


def kill(pids: Iterable[int]) -> int:
    """Kill processes and their process groups, such as checkpoint writers; return the number of groups killed."""
    groups = 0
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
            groups += 1
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return groups


def stacks(ranks: Attempt, log: Path) -> str:
    """Make each rank write its stacks to the log; return the end of the log."""
    for pid in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGABRT)
            time.sleep(0.5)
    return log.read_text(errors="replace")[-8000:]


# --- faults


def planned(rng: random.Random, mean_s: float, limit: int) -> Plan:
    """Faults, and the seconds to wait after the first iteration of an attempt (at the start: after its start)."""
    for kind in itertools.islice(itertools.cycle((IN_SAVE, "kill", AT_START, "kill", FREEZE)), limit):
        yield min(rng.expovariate(1.0 / mean_s), 5.0 if kind == AT_START else math.inf), kind


def being_written(checkpoint: Path) -> bool:
    """Whether an incomplete checkpoint was modified within the last second."""
    with contextlib.suppress(OSError, ValueError):
        newest = max(checkpoint.glob("iter_*"))
        latest = checkpoint / "latest_checkpointed_iteration.txt"
        complete = int(latest.read_text()) if latest.exists() else 0
        return int(newest.name[5:]) > complete and time.time() - newest.stat().st_mtime < 1.0
    return False


def strike(kind: str, ranks: Attempt) -> int:
    """Kill or stop a random rank; return its process ID."""
    pid = random.choice(ranks)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP if kind == FREEZE else signal.SIGKILL)
    return pid


# --- checks


def run_violations(run: Run, folder: Path, scalars: Scalars, limit_s: float) -> Iterator[str]:
    """Lost iterations, hangs and unreported faults of a run; `scalars` are those of the reference."""
    name, log = folder.name, (folder / "log.txt").read_text(errors="replace")
    if run.hang or run.stall_s > limit_s:
        yield f"{name}: expected an iteration within {limit_s:.0f} s, got none for {run.stall_s:.0f} s {run.hang}"
    if run.code:
        yield f"{name}: expected exit code 0, got {run.code}\n{log[-3000:]}"
    attempts = scalars_of(folder)
    for place, value in itertools.chain(*(attempt.items() for attempt in attempts)):
        if value != scalars.get(place):
            yield f"{name}: {place}: expected {scalars.get(place)!r}, got {value!r}"
    if 2 * compared(attempts) < len(run.iterations):
        yield f"{name}: expected {len(run.iterations)} iterations in {folder}/logs, got {compared(attempts)}"
    cut = run.code is None and run.restarts < len(run.faults)  # the run ended before torchrun's restart
    for kind, pid in run.faults[: len(run.faults) - cut]:
        if not re.search(rf"\(pid: {pid}\)|process {pid} ", log):
            yield f"{name}: {kind}: expected the log to name process {pid}, {folder}/log.txt does not"
    ended = sum(kind != AT_START for kind, _ in run.faults)
    if len(run.attempts) > ended + 1:
        yield f"{name}: expected at most {ended + 1} attempts that train, faults + 1, got {len(run.attempts)}"


def compared(attempts: list[Scalars]) -> int:
    """Number of iterations in TensorBoard; repeated ones count twice."""
    return sum(tag == "lm loss" for attempt in attempts for tag, _ in attempt)


def scalars_of(folder: Path) -> list[Scalars]:
    """TensorBoard scalars of each attempt, without timings; a killed attempt may lack its last iterations."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = []
    for path in sorted((folder / "logs").glob("events*")):
        events = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
        tags = [tag for tag in events.Tags()["scalars"] if UNTIMED.search(tag)]
        found.append({(tag, x.step): x.value for tag in tags for x in events.Scalars(tag)})
    return found


def growth(run: Run, min_attempt_s: float) -> Iterator[dict[str, float | str]]:
    """Memory growth over the second half of each attempt of at least `min_attempt_s`, per process."""
    ranks = [(pid, f"rank {n}", times[0]) for attempt, times in run.attempts.items() for n, pid in enumerate(attempt)]
    first = min((start for *_, start in ranks), default=0.0)
    for pid, name, start in [(run.agent, "torchrun", first), *ranks]:
        points = [point for point in run.memory.get(pid, []) if point[0] >= start]  # without imports
        seconds = points[-1][0] - points[0][0] if points else 0.0
        if seconds < min_attempt_s:
            continue
        late = [point for point in points if point[0] > points[0][0] + seconds / 2]
        slope = statistics.linear_regression(*zip(*late, strict=True)).slope
        times = [x for attempt in run.attempts.values() for x in attempt if late[0][0] <= x <= late[-1][0]]
        kib = 1024 * slope * (late[-1][0] - late[0][0]) / max(len(times), 1)
        numbers = {"life_s": round(seconds), "mib": round(late[-1][1], 1), "mib_per_hour": round(3600 * slope, 2)}
        yield {"process": name, **numbers, "kib_per_iteration": round(kib, 3)}


def sizes_when_young(runs: list[Run]) -> list[float]:
    """Mean MiB per rank 5 to 15 seconds after the first iteration, for each attempt."""
    sizes = []
    for run in runs:
        for attempt, times in run.attempts.items():
            points = [m for pid in attempt for t, m in run.memory.get(pid, []) if 5 < t - times[0] < 15]
            sizes += [round(statistics.mean(points), 1)] if times[-1] - times[0] > 15 and points else []
    return sizes


def memory_violations(grown: list[dict], young: list[float], leak_kib: float, limit_mib: float) -> Iterator[str]:
    for row in grown:
        if row["kib_per_iteration"] > leak_kib:
            yield f"{row['process']}: expected at most {leak_kib} KiB more per iteration, got {row}"
    half = len(young) // 2
    if half and (more := statistics.median(young[-half:]) - statistics.median(young[:half])) > limit_mib:
        yield f"memory of ranks: expected at most {limit_mib} MiB more in late than in early attempts, got {more:.1f}"


# --- soak


def soak(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run the reference, then rounds until the time is up or a check fails; return numbers and violations."""
    end, limit_s = time.monotonic() + 60 * options.minutes, 60 * TIMEOUT_MINUTES + options.allowance
    rng = random.Random(options.seed)
    plan = planned(rng, options.fault_every, options.faults)
    flags = f"{options.layout} --train-iters {options.iterations} --save-interval {options.save_interval}"
    good = write_conversations(folder, options.conversations, options.seed)
    clean = folder / "clean.jsonl"
    clean.write_bytes(merged(good, {}))
    trained = prepared(clean)
    epochs = math.lcm(trained["rows"], BATCH) // trained["rows"]
    whole = epochs * trained["rows"] // BATCH  # iterations of whole epochs
    if options.iterations < whole:
        raise ValueError(f"--iterations: expected {whole} or more, for whole epochs; got {options.iterations}")

    def train(name: str, file: Path, disturbed: bool = False) -> Run:
        (folder / name).mkdir()
        command = torchrun(folder / name, file, flags, options.ranks, restarts=10**6 if disturbed else 0)
        until, faults = (end, plan) if disturbed else (math.inf, iter(()))
        run = watch(command, folder / name, limit_s, until, faults)
        done = f"{len(run.iterations)} iterations, {len(run.faults)} faults, longest stall {run.stall_s:.0f} s"
        print(f"{name}: {run.seconds:.0f} s, {done}", flush=True)
        return run

    runs = [train("reference", train_file(clean))]
    (scalars,) = scalars_of(folder / "reference") or [{}]
    wrong = list(run_violations(runs[0], folder / "reference", scalars, limit_s))
    tokens = [scalars.get(("dft/valid_tokens_total", whole)), epochs * trained["trained_tokens"]]
    if tokens[0] != tokens[1] or len(runs[0].iterations) != options.iterations:
        wrong.append(f"reference: expected {tokens[1]} tokens in {whole} iterations, got {tokens[0]}")
    reasons: Counter[str] = Counter()
    while not wrong and time.monotonic() < end and len(runs) <= options.rounds:
        name, bad = f"round{len(runs)}", damaged(good, rng, options.damage)
        file = folder / f"{name}.jsonl"
        file.write_bytes(merged(good, bad))
        wrong += data_violations(file, bad, len(good), clean, reasons)
        if len(runs) == 1:
            wrong += refusal_violations(train("refused", file), folder / "refused", file, bad)
        runs.append(train(name, train_file(file), disturbed=True))
        wrong += run_violations(runs[-1], folder / name, scalars, limit_s)
        shutil.rmtree(folder / name / "checkpoint", ignore_errors=True)
    grown, young = [row for run in runs for row in growth(run, options.judged)], sizes_when_young(runs)
    wrong += memory_violations(grown, young, options.leak, options.growth)
    return summary(runs, folder, reasons, grown, young) | {"violations": wrong}


def refusal_violations(run: Run, folder: Path, file: Path, bad: dict[int, bytes]) -> Iterator[str]:
    """Check that --sft rejects the unprepared file, names its first invalid line and does not train."""
    first = min(bad)
    if run.iterations or not run.code or f"{file}:{first}: " not in (folder / "log.txt").read_text(errors="replace"):
        yield f"--sft: expected an error for {file}:{first}, got {len(run.iterations)} iterations, {folder}/log.txt"


def summary(runs: list[Run], folder: Path, reasons: Counter[str], grown: list[dict], young: list[float]) -> dict:
    """The numbers for the console and the JSON file."""
    attempts = [attempt for number in range(1, len(runs)) for attempt in scalars_of(folder / f"round{number}")]
    return {
        "seconds": round(sum(run.seconds for run in runs)),
        "rounds": len(runs) - 1,
        "attempts": sum(len(run.attempts) for run in runs),
        "starts_that_failed": sum(max(run.restarts - len(run.faults), 0) for run in runs[1:]),
        "faults": dict(Counter(kind for run in runs for kind, _ in run.faults)),
        "writers_left_behind": sum(run.orphans for run in runs),
        "iterations_of_the_reference": len(runs[0].iterations),
        "iterations_of_the_rounds": sum(len(run.iterations) for run in runs[1:]),
        "of_which_done_again": sum(len(run.iterations) - len(set(run.iterations)) for run in runs[1:]),
        "compared_to_the_last_bit": compared(attempts),
        "damaged_lines_named": dict(reasons),
        "longest_stall_s": round(max(run.stall_s for run in runs), 1),
        "longest_attempt_s": round(max((x[-1] - x[0] for run in runs for x in run.attempts.values()), default=0)),
        "memory": grown,
        "mib_of_young_lives": young,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0, help="total duration")
    parser.add_argument("--iterations", type=int, default=3000, help="iterations of the reference and of each round")
    parser.add_argument("--ranks", type=int, default=4, help="number of CPU ranks")
    parser.add_argument("--layout", default="--tensor-model-parallel-size 2", help="Megatron flags of the layout")
    parser.add_argument("--fault-every", type=float, default=60.0, help="mean seconds of training between faults")
    parser.add_argument("--faults", type=int, default=10**6, help="maximum number of faults")
    parser.add_argument("--rounds", type=int, default=10**6, help="maximum number of rounds")
    parser.add_argument("--save-interval", type=int, default=25, help="iterations between checkpoints")
    parser.add_argument("--conversations", type=int, default=400, help="valid lines of the data")
    parser.add_argument("--damage", type=int, default=80, help="invalid lines inserted in each round")
    parser.add_argument("--allowance", type=float, default=300.0, help="seconds to start all ranks on a busy machine")
    parser.add_argument("--judged", type=float, default=600.0, help="seconds; memory is checked in longer attempts")
    parser.add_argument("--leak", type=float, default=2.0, help="limit of memory growth, KiB per iteration")
    parser.add_argument("--growth", type=float, default=16.0, help="limit of growth from early to late attempts, MiB")
    parser.add_argument("--seed", type=int, default=1, help="random seed of data and faults")
    parser.add_argument("--folder", type=Path, default=Path("runs/soak"), help="logs and data; deleted first")
    parser.add_argument("--out", type=Path, help="JSON file (default: tools/studies/results/DEVICE-DATE-soak.json)")
    options = parser.parse_args(argv)
    facts = conditions(torch.device("cpu"))
    name = f"{str(facts['device']).replace(' ', '-')}-{facts['date']}-soak.json"
    out = options.out or Path(__file__).with_name("results") / name
    random.seed(options.seed)
    folder = options.folder.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    result = soak(options, folder)
    settings = {key: value for key, value in vars(options).items() if key not in ("folder", "out")}
    out.write_text(json.dumps(facts | {"options": settings} | result, indent=2) + "\n")
    for key, value in result.items():
        rows = value if isinstance(value, list) and value and not isinstance(value[0], float) else [value]
        for row in rows:
            print(f"{key.replace('_', ' '):<28} {row}")
    if not result["memory"]:
        print(f"memory within an attempt: not checked, no attempt lasted {options.judged:.0f} s")
    print(out)
    return 1 if result["violations"] else 0


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # unwind, so that all child processes are killed
        signal.signal(number, lambda received, _: sys.exit(128 + received))
    sys.exit(main())
