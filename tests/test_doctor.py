"""megatron-dft doctor: every problem of a run is reported, a valid run has none, and no check hangs."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from chat_runs import CHAT_MOCK, CHAT_MODEL
from host_runs import EXAMPLE
from ranks import FORK, ROOT, Rendezvous

from megatron_dft.doctor import __main__ as doctor
from megatron_dft.doctor import preflight

LO = {"GLOO_SOCKET_IFNAME": "lo"}  # the host name may resolve to an address that is not available


class DoctorRuns:
    """Runs of the doctor on forked ranks, with the environment of a launcher."""

    def __init__(self, folder, argv, ranks=(), size=0, nodes=False, change=None, **environment):
        self.folder = folder
        self.rendezvous = Rendezvous()
        self.processes = {}
        for rank in ranks or (None,):
            own = self.rendezvous.environment | {"WORLD_SIZE": str(size or len(ranks)), **LO}
            local = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"} if nodes else {"LOCAL_RANK": str(rank)}
            own |= {"RANK": str(rank), "LOCAL_WORLD_SIZE": str(len(ranks)), **local}
            args = (rank, folder, argv if ranks == () or isinstance(argv, list) else argv[rank], change)
            self.processes[rank] = FORK.Process(target=_doctor, args=(*args, (own if ranks else {}) | environment))
            self.processes[rank].start()

    def wait(self, seconds=90.0):
        """Exit codes and outputs, in the order of ranks."""
        deadline = time.monotonic() + seconds
        try:
            for process in self.processes.values():
                process.join(max(0.0, deadline - time.monotonic()))
        finally:
            codes = [process.exitcode for process in self.processes.values()]
            for process in self.processes.values():
                if process.is_alive():
                    os.kill(process.pid, signal.SIGKILL)
        assert None not in codes, (codes, self.outputs())
        return codes, self.outputs()

    def outputs(self):
        return [(self.folder / f"{rank}.txt").read_text(errors="replace") for rank in self.processes]


def _doctor(rank, folder, argv, change, environment):
    with (folder / f"{rank}.txt").open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.environ |= environment
    if change is not None:
        change(rank)
    doctor.main(argv)


def opened_by_rank_0(port):
    """Environment in which rank 0 opens the store itself. `port` is a socket that holds the port."""
    return {"MASTER_PORT": str(port.getsockname()[1]), "TORCHELASTIC_USE_AGENT_STORE": "False"}


def problems(output):
    return re.findall(r"^  error    (.*)$", output, re.M)


def run_doctor(folder, flags, *, argv=(), **kwargs):
    """Exit code and output of the doctor for a run of the example, without ranks."""
    pytest.importorskip("megatron.training")
    argv = [*argv, str(EXAMPLE), "--device", "cpu", *flags.split()]
    (code,), (output,) = DoctorRuns(folder, argv, **kwargs).wait()
    return code, output


@pytest.fixture
def launched(monkeypatch):
    """A parser of doctor arguments, in the environment of rank 0 on the first of two nodes."""
    environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", **LO}
    for name, value in {**environment, "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    return lambda *argv: doctor.read([*argv])


@pytest.mark.host
def test_doctor_reports_no_error_and_no_note_for_valid_run(tmp_path):
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "latest_checkpointed_iteration.txt").write_text("3")
    flags = f"{CHAT_MOCK} --loss-type dft --dft-true-vocab-size 120 --calculate-per-token-loss --save-interval 3 "
    flags += f"--tensor-model-parallel-size 2 --sequence-parallel --load {checkpoint} --save {checkpoint}"
    code, output = run_doctor(tmp_path, flags, argv=["--world-size", "4"])
    assert code == 0, output
    assert "layout: world size 4 = tensor 2 x pipeline 1 x context 1 x data 2" in output
    assert "validation: Megatron accepts" in output and "vocabulary: 120 entries, 8 padding columns" in output
    assert "objective: dft" in output and output.endswith("no errors\n")
    assert not re.search("^  (note|error)", output, re.M), output


# World size, flags, and all problems to report.
ARGUMENTS = {
    "sizes": (
        12,
        CHAT_MOCK + "--tensor-model-parallel-size 3 --pipeline-model-parallel-size 4 --context-parallel-size 2 "
        "--calculate-per-token-loss --expert-model-parallel-size 7 --num-experts 5 --sequence-parallel "
        "--group-query-attention --num-query-groups 2 --ffn-hidden-size 64",
        [
            r"layout: expected world size to be a multiple of 24 \(tensor 3 x pipeline 4 x context 2\), got 12",
            r"layout: expected world size to be a multiple of 84 \(expert 7 x expert tensor 3 x pipeline 4\), got 12",
            r"layout: expected --num-experts to be a multiple of 7 .*, got 5",
            r"layout: expected --num-attention-heads to be a multiple of 3 .*, got 4",
            r"layout: expected --num-query-groups to divide 3 .*, or be a multiple of it, got 2",
            r"layout: expected --ffn-hidden-size to be a multiple of 3 .*, got 64",
            r"layout: expected --num-layers to be a multiple of 4 \(pipeline 4\), got 2",
            r"layout: expected --seq-length to be a multiple of 6 .*--sequence-parallel\), got 256",
        ],
    ),
    "batch, heads and virtual stages": (
        8,
        CHAT_MOCK + "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 --num-attention-heads 5 "
        "--expert-model-parallel-size 2",
        [
            r"layout: expected --num-experts with --expert-model-parallel-size 2, got none",
            r"layout: expected --global-batch-size to be a multiple of 4 \(micro-batch 1 x data parallel 4\), got 6",
            r"layout: expected --hidden-size to be a multiple of 5 \(attention heads\), got 32",
            r"layout: expected --num-layers to be a multiple of 4 \(pipeline 2 x .* 2\), got 2",
        ],
    ),
    "context parallelism and vocabulary": (
        4,
        CHAT_MOCK + "--context-parallel-size 4 --seq-length 252 --loss-type dft --dft-true-vocab-size 119",
        [
            r"layout: expected --seq-length to be a multiple of 8 \(2 x context 4\), got 252",
            r"objective: .*with --context-parallel-size 4 requires --calculate-per-token-loss",
            r"vocabulary: expected --dft-true-vocab-size 120, the tokenizer's size, got 119; .*remaining 8 columns",
        ],
    ),
    "chunks of tokens, and a callback": (
        1,
        CHAT_MOCK + "--loss-type dft --dft-linear-fused --dft-token-chunk 64 --dft-callback nowhere:f",
        [
            r"objective: --dft-token-chunk .*requires --calculate-per-token-loss",
            r"objective: --dft-callback: expected module:function of an installed module, got 'nowhere:f'",
        ],
    ),
    "indivisible vocabulary": (
        2,
        CHAT_MOCK + "--tensor-model-parallel-size 2 --padded-vocab-size 119",
        [
            r"layout: expected --padded-vocab-size to be a multiple of 2 .*, got 119",
            r"vocabulary: expected --padded-vocab-size of 120, the tokenizer's size, or more, got 119",
        ],
    ),
    "Megatron's parser": (1, CHAT_MOCK + "--num-layers two", [r"arguments: .*--num-layers: invalid int value: 'two'"]),
    "CUDA kernels on CPU": (
        1,
        CHAT_MOCK + "--fp8-format hybrid",
        [r"arguments: --device cpu: expected a run without CUDA kernels"],
    ),
    "Megatron's arguments, and files": (
        1,
        CHAT_MODEL + "--tokenizer-type SFTTokenizer --tokenizer-model /nowhere/tokenizer --data-path 0.3 {x} 0.7 {x}/b "
        "--save {x}/chat.jsonl/out --load {x} --exit-on-missing-checkpoint",
        [
            r"validation: AssertionError at: assert args.save_interval is not None",
            r"files: expected data at \S+, got no \S+\.bin and no \S+\.idx",
            r"files: expected data at \S+/b, got no \S+/b\.bin and no \S+/b\.idx",
            r"files: expected a tokenizer at /nowhere/tokenizer, got none",
            r"files: expected --load: a checkpoint at \S+, got none",
            r"files: expected --save \S+/out to be a writable folder, got \S+/chat\.jsonl",
        ],
    ),
    "Megatron's model, objective and conversations": (
        1,
        CHAT_MODEL + "--sft --tokenizer-type NullTokenizer --vocab-size 120 --train-data-path {x}/chat.jsonl "
        "--valid-data-path {x}/none.jsonl --recompute-granularity full --loss-type dtf",
        [
            r"validation: .*recompute_method",
            r"files: expected lines with `messages` in \S+/chat\.jsonl, got '\{\"text\": 1\}",
            r"files: expected a JSONL file for --sft at \S+/none\.jsonl, got none",
            r"objective: unknown objective 'dtf': .*did you mean 'dft'",
        ],
    ),
}


@pytest.mark.host
@pytest.mark.parametrize("name", ARGUMENTS)
def test_doctor_reports_every_invalid_argument(name, tmp_path):
    world_size, flags, expected = ARGUMENTS[name]
    (tmp_path / "chat.jsonl").write_text('{"text": 1}\n')
    code, output = run_doctor(tmp_path, flags.format(x=tmp_path), argv=["--world-size", str(world_size)])
    found = problems(output)
    assert code == 1 and len(found) == len(expected), output
    for text, pattern in zip(sorted(found), sorted(expected), strict=True):
        assert re.search(pattern, text), (pattern, output)


# Flags of a run that starts, and the notes to print about it.
NOTES = {
    "": [
        "ranks: checked for 1,",
        r"vocabulary: .*8 padding columns that are part of .* p; --dft-true-vocab-size 120 excludes them",
        "objective: without --calculate-per-token-loss a token weighs more",
        "files: without --save no checkpoint",
    ],
    "--sequence-parallel --tensor-model-paralel-size=4 --loss-type ce --save {x}/a --save-interval 1 --load {x}/none": [
        "layout: --sequence-parallel without tensor parallelism",
        "files: --load: no checkpoint at .*/none: training starts from scratch",
        "files: a restarted run .* begins at iteration 0",
        "arguments: Megatron does not define --tensor-model-paralel-size, did you mean '--tensor-model-parallel-size'",
        "objective: Megatron's own loss",
    ],
    "--tokenizer-type HuggingFaceTokenizer --tokenizer-model Qwen/none --use-checkpoint-args": [
        "files: --tokenizer-model Qwen/none is not a local path: every rank downloads it",
        "vocabulary: not checked: its size requires the tokenizer",
        "layout: --use-checkpoint-args: sizes come from the checkpoint",
    ],
}


@pytest.mark.host
@pytest.mark.parametrize("flags", NOTES)
def test_doctor_prints_notes_on_settings(flags, tmp_path):
    _, output = run_doctor(tmp_path, f"{CHAT_MOCK} --loss-type dft {flags.format(x=tmp_path)}")
    for pattern in NOTES[flags]:
        assert re.search(f"^  note     {pattern}", output, re.M), (pattern, output)


@pytest.mark.host
def test_doctor_reads_yaml_cfg(tmp_path):
    block = "dft: {loss_type: 'tsallis:q=0.5'}\ndisable_msc_deprecated: false\nenable_msc: false\n"
    (tmp_path / "run.yaml").write_text(block + "model_parallel: {tensor_model_parallel_size: 3}\n")
    _, output = run_doctor(tmp_path, f"--yaml-cfg {tmp_path}/run.yaml --tokenizer-type NullTokenizer --vocab-size 8")
    assert "world size to be a multiple of 3" in output and "objective: tsallis:q=0.5" in output


@pytest.mark.host
def test_doctor_reports_differences_between_nodes(tmp_path):
    pytest.importorskip("megatron.training")
    same = [str(EXAMPLE), "--device", "cpu", *CHAT_MOCK.split(), "--loss-type", "dft"]
    codes, outputs = DoctorRuns(tmp_path, same, ranks=(0, 1), nodes=True).wait()
    assert codes == [0, 0], outputs
    assert all("ok       nodes: 2 agree" in output and "ranks" in output for output in outputs)
    other = [*same[:-1], "deft", "--seed", "7"]
    codes, outputs = DoctorRuns(tmp_path, {0: same, 1: other}, ranks=(0, 1), nodes=True).wait()
    assert codes == [1, 1], outputs
    for output in outputs:
        (text,) = problems(output)
        host = socket.gethostname()
        assert re.match(rf"nodes: expected all nodes to equal {host} \(rank 0\), got {host} \(rank 1\) with ", text)
        assert "objective: deft, not dft" in text and "--seed" in text and "--lr" not in text


def test_differences_omit_equal_arguments():
    expected, got = {"torch": "2", "arguments": ["a", "b"]}, {"torch": "3", "arguments": ["a", "c"]}
    assert doctor.differences(expected, got) == "torch: 3, not 2; arguments: c, not b"
    assert doctor.differences(expected, expected) == ""
    swapped = {"arguments": ["b", "a"]}
    assert doctor.differences({"arguments": ["a", "b"]}, swapped) == "arguments: b a, not a b"


@pytest.mark.host
def test_doctor_uses_megatron_checkout_beside_script(tmp_path):
    core = tmp_path / "megatron" / "core"
    core.mkdir(parents=True)
    for path in (core.parent / "__init__.py", core / "__init__.py", tmp_path / "script.py"):
        path.write_text("")
    (core / "package_info.py").write_text("__version__ = '0.99'")
    command = [sys.executable, "-m", "megatron_dft.doctor", str(tmp_path / "script.py")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 1 and "megatron-core 0.99, megatron_dft" in run.stdout and f"from {core}" in run.stdout
    assert "no Megatron with pretrain() is installed" in run.stdout


def test_doctor_checks_and_times_all_reduce(tmp_path):
    codes, (first, second) = DoctorRuns(tmp_path, ["--device", "cpu"], ranks=(0, 1)).wait()
    assert codes == [0, 0], first
    assert "ok       network: 2 ranks are connected" in first
    assert all(line.startswith("[Gloo]") for line in second.splitlines())  # printed by torch 2.8
    assert re.search(r"note     network: gloo all-reduce over 2 ranks: \d+ us for 4 bytes, [\d.]+ ms for 4 MiB", first)


def _wrong_sums(rank):
    if rank == 1:
        full = torch.full
        torch.full = lambda *args, **kwargs: full(*args, **kwargs) + 1.0


def test_doctor_fails_on_every_rank_after_wrong_all_reduce(tmp_path):
    codes, (first, _) = DoctorRuns(tmp_path, ["--device", "cpu"], ranks=(0, 1), change=_wrong_sums).wait()
    assert codes == [1, 1]
    assert "expected sums of 1 from gloo, got 2.0 to 2.0" in first


def _no_such_interface(rank):
    if rank == 1:
        os.environ["NCCL_SOCKET_IFNAME"] = "nowhere"


def test_doctor_fails_on_every_node_after_error_on_one(tmp_path):
    doctors = DoctorRuns(tmp_path, ["--device", "cpu"], ranks=(0, 1), nodes=True, change=_no_such_interface)
    codes, (first, second) = doctors.wait()
    assert codes == [1, 1]
    assert not problems(first) and first.endswith(f"  no errors; errors on {socket.gethostname()}\n")
    assert len(problems(second)) == 1 and second.endswith("  1 error\n")


def test_doctor_names_missing_ranks_within_timeout(tmp_path):
    start = time.monotonic()
    argv = ["--timeout", "2", "--device", "cpu"]
    codes, (first, _) = DoctorRuns(tmp_path, argv, ranks=(0, 2), size=4).wait(30.0)
    assert codes == [1, 1] and time.monotonic() - start < 20.0
    assert "expected all 4 ranks, got no connection from rank 1, 3 within 2 s" in first


def test_doctor_reports_missing_rank_0(tmp_path):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # does not listen
        environment = opened_by_rank_0(silent)
        argv = ["--timeout", "1", "--device", "cpu"]
        codes, (output,) = DoctorRuns(tmp_path, argv, ranks=(1,), size=2, **environment).wait(30.0)
    assert codes == [1] and "expected rank 0 to answer within 1 s at 127.0.0.1:" in output


def test_doctor_reports_port_in_use(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        environment = opened_by_rank_0(taken)
        codes, (output,) = DoctorRuns(tmp_path, ["--device", "cpu"], ranks=(0,), size=2, **environment).wait(30.0)
    assert codes == [1] and "expected a free port for rank 0" in output


def _hangs(rank):
    def all_reduce(run):
        time.sleep(60.0)

    if rank in (None, 1):
        doctor.all_reduce = doctor.gpus = all_reduce


@pytest.mark.parametrize(("ranks", "seconds"), [((), 1), ((0, 1), 2)])
def test_doctor_names_hanging_check_and_exits(ranks, seconds, tmp_path):
    argv = ["--timeout", "1", "--device", "cpu"]
    codes, outputs = DoctorRuns(tmp_path, argv, ranks=ranks, change=_hangs).wait(30.0)
    assert set(codes) == {1}
    assert re.search("error    all_reduce: expected (completion|no error)", outputs[0])
    assert f"error    all_reduce: expected completion within {seconds} s, got a timeout" in outputs[-1]


def test_doctor_continues_after_check_that_raises(launched):
    def broken(run):
        yield preflight.Finding("ok", "first", "fine")
        raise KeyError("second")

    run = launched("--device", "cpu")
    doctor.run_check(run, 5.0, broken, run)
    doctor.run_check(run, 5.0, doctor.gpus, run)
    levels = [(f.level, f.subject) for f in run.findings]
    assert levels == [("ok", "first"), ("error", "broken"), ("ok", "GPUs")]
    assert "this check of the doctor failed: KeyError" in run.findings[1].text


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, ""),
        ({"NCCL_SOCKET_IFNAME": "^docker0,nowhere"}, ""),
        ({"NCCL_SOCKET_IFNAME": "l"}, ""),
        ({"NCCL_SOCKET_IFNAME": "=l"}, "NCCL_SOCKET_IFNAME to be one of .*lo.*, got l;"),
        ({"NCCL_SOCKET_IFNAME": "nowhere"}, "NCCL_SOCKET_IFNAME to be one of .*lo.*, got nowhere;"),
        ({"GLOO_SOCKET_IFNAME": "lo,l"}, "GLOO_SOCKET_IFNAME to be one of .*lo.*, got l;"),
        ({"GLOO_SOCKET_IFNAME": ""}, "the name of this host, localhost, to resolve to .*, got 127.0.0.1; gloo would"),
        ({"MASTER_ADDR": "no host"}, "MASTER_ADDR to be a name or address that resolves, got 'no host'"),
    ],
)
def test_doctor_checks_network_interfaces_and_host_names(launched, environment, expected, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("socket.gethostname", lambda: "localhost")
    found = [finding.text for finding in doctor.names(launched("--device", "cpu"))]
    assert len(found) == bool(expected), found
    assert re.search(expected, "".join(found))


GPU = SimpleNamespace(name="A", total_memory=8 << 30, major=9, minor=0)
FREE = (7 << 30, 7 << 30)


@pytest.mark.parametrize(
    ("gpus", "memory", "argv", "expected"),
    [
        ([], FREE, [], ["error expected 1, one for each rank of this node, got 0; --device cpu"]),
        ([], FREE, ["--world-size", "8"], ["note expected 1, one for each rank"]),
        ([], FREE, ["--device", "cpu"], ["ok not used"]),
        ([GPU, GPU], FREE, [], ["ok 2: A, 7168 MiB, compute capability 9.0"]),
        ([GPU], (1 << 30, 7 << 30), [], ["note GPU 0: 1024 of 7168 MiB are free", "ok 1: A"]),
        (
            [GPU, SimpleNamespace(**{**vars(GPU), "name": "B"})],
            FREE,
            [],
            ["error expected GPUs of one kind .* A, .*; B"],
        ),
    ],
)
def test_doctor_checks_gpu_count_kind_and_free_memory(gpus, memory, argv, expected, monkeypatch):
    """The answers of the driver are faked, so the test also runs without a GPU."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: len(gpus))
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: gpus[index])
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda index: memory)
    found = [f"{f.level} {f.text}" for f in doctor.gpus(doctor.read(argv))]
    for pattern in expected:
        assert any(re.match(pattern, text) for text in found), found


def test_doctor_reports_outdated_packages(monkeypatch):
    monkeypatch.setattr(doctor, "OLDEST", {"torch": (99, 1)})
    (text,) = (f.text for f in doctor.versions(doctor.read([])) if f.level == "error")
    assert text.startswith(f"expected torch 99.1 or newer, got {torch.__version__}")


def test_doctor_without_megatron_checks_machine_and_rejects_script(tmp_path):
    code = "import sys; sys.modules['megatron'] = None\n"
    code += "from megatron_dft.doctor import __main__ as doctor; doctor.main(sys.argv[1:])"
    for script, status, expected in (
        ([], 0, "; no Megatron"),
        ([str(EXAMPLE)], 1, "no Megatron with pretrain() is installed"),
    ):
        command = [sys.executable, "-c", code, "--device", "cpu", *script]
        run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert run.returncode == status and expected in run.stdout, run.stderr


def test_doctor_runs_under_torchrun(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "megatron_dft.doctor", "--timeout", "20", "--device", "cpu"]
    with (tmp_path / "out").open("w") as out:
        environment = {**os.environ, **LO, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, stdout=out, stderr=out, timeout=180, env=environment, cwd=ROOT, check=False)
    output = (tmp_path / "out").read_text()
    assert done.returncode == 0, output
    assert output.count("megatron_dft.doctor: ") == 1 and "ranks 0 to 1 of 2" in output and "no errors" in output


def test_exit_rank_prints_buffered_output_and_runs_no_exit_handlers():
    code = "import atexit; from megatron_dft.utils import exit_rank; atexit.register(print, 'handler'); print('report')"
    run = subprocess.run([sys.executable, "-c", f"{code}; exit_rank(3)"], capture_output=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (3, b"report\n", b"")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["nowhere.py"], "no script at 'nowhere.py'"),
        (["--world-size", "8"], "--world-size: expected it without ranks"),
    ],
)
def test_doctor_rejects_invalid_arguments(argv, expected, launched):
    with pytest.raises(SystemExit, match=f"megatron_dft.doctor: {expected}"):
        doctor.main(argv)


def test_doctor_help_prints_usage(capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        doctor.main(["--help"])
    assert "--timeout SECONDS" in capsys.readouterr().out


def test_doctor_digest_covers_whole_package(monkeypatch):
    seen = []
    monkeypatch.setattr(doctor, "_digest", lambda *paths: seen.extend(paths) or "0")
    list(doctor.versions(doctor.read([])))
    assert {"vocab_parallel.py", "binding.py", "preflight.py", "launch.py"} <= {path.name for path in seen}
