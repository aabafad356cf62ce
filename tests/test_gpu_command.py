"""tools/benchmarks/gpu.py: every part runs and is reported, even if another one fails or hangs."""

import sys

import pytest
import torch
from ranks import ROOT

sys.path.insert(0, str(ROOT / "tools" / "benchmarks"))
import gpu

psutil = pytest.importorskip("psutil")


HANGING = """
import time
def test_first(): assert False, "a reason"
def test_second(): time.sleep(600)
"""
DEAF = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid)
time.sleep(600)
"""


@pytest.fixture
def parts(monkeypatch, tmp_path):
    hanging = tmp_path / "test_hanging.py"
    hanging.write_text(HANGING)
    known = {
        "works": gpu.Part(["-c", "print('three passed')"], 60),
        "skips": gpu.Part(["-m", "pytest", str(ROOT / "tests" / "test_gpu_host.py")], 120),
        "fails": gpu.Part(["-c", "print('two failed'); raise SystemExit(3)"], 60),
        "hangs": gpu.Part(["-m", "pytest", "-p", "no:cacheprovider", str(hanging)], 25),
        "deaf": gpu.Part(["-c", DEAF], 10),
        "last": gpu.Part(["-c", "print('done')"], 60),
    }
    monkeypatch.setattr(gpu, "parts", lambda out: known)
    monkeypatch.setattr(gpu, "INTERRUPT_SECONDS", 8.0)
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    return known


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="one part requires a machine without a GPU")
def test_gpu_command_runs_every_part_after_failures(parts, tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["works", "ok,"], ["skips", "FAILED"], ["fails", "FAILED"], ["hangs", "FAILED"],
        ["deaf", "FAILED"], ["last", "ok,"]
    ]  # fmt: skip
    assert (
        "three passed" in lines[0]
        and "(nothing was tested)" in lines[1]
        and "(3)" in lines[2]
        and "(stopped after 25 s)" in lines[3]
        and "1 failed" in lines[3]
    )
    assert "AssertionError: a reason" in (tmp_path / "hangs.txt").read_text()
    child = int((tmp_path / "deaf.txt").read_text())  # unbuffered
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE
    assert (tmp_path / "report.txt").read_text().splitlines() == lines


def test_gpu_command_reports_parts_without_time_left(parts, tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path), "--budget", "1", "--only", "works"]) == 1
    assert capsys.readouterr().out.splitlines() == ["works     not run: no time left"]


def test_gpu_command_reports_unavailable_parts_and_passes(parts, tmp_path, capsys):
    parts["last"] = gpu.Part(["-c", "raise SystemExit(3)"], 60, lambda: "no such package")
    for name in ("works.csv", "works-wire.csv", "hangs.csv"):  # of an earlier run
        (tmp_path / name).touch()
    assert gpu.main(["--out", str(tmp_path), "--only", "works", "last"]) == 0
    assert [path.name for path in tmp_path.glob("*.csv")] == ["hangs.csv"]
    assert capsys.readouterr().out.splitlines()[1] == "last      not run: no such package"


def test_checkout_part_names_missing_checkout_or_package(tmp_path, monkeypatch):
    monkeypatch.delenv("MEGATRON_LM", raising=False)
    assert gpu.checkout_unavailable() == "MEGATRON_LM does not name a Megatron-LM checkout"
    (tmp_path / "pretrain_gpt.py").touch()
    monkeypatch.setenv("MEGATRON_LM", str(tmp_path))
    monkeypatch.setattr(gpu, "CHECKOUT_PACKAGES", ["sys", "no_such_package"])
    assert gpu.checkout_unavailable() == "ModuleNotFoundError: No module named 'no_such_package'"
    monkeypatch.setattr(gpu, "CHECKOUT_PACKAGES", ["sys"])
    assert gpu.checkout_unavailable() == ""


def test_gpu_command_rejects_unknown_parts(parts, tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path), "--only", "work"])
    assert "--only: expected some of works, skips, fails, hangs, deaf, last, got work" in capsys.readouterr().err


def test_gpu_command_requires_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path)]) == 1
    assert capsys.readouterr().out == "expected a GPU, got none: torch.cuda.is_available() is False\n"
