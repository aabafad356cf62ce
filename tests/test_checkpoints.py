"""Resuming from checkpoints: after a crash, in another layout, with another objective."""

import re
import signal

import pytest
from host_flags import CP2, MODEL, MODELS, PER_TOKEN, PP2, TP2
from host_runs import agree

pytest.importorskip("megatron.training")
pytest.importorskip("tensorboard")
pytestmark = [pytest.mark.host, pytest.mark.slow]

STEPS, SAVED, CRASH = 8, 4, 6  # a checkpoint after every 4 steps; the crash is in the middle of step 6
RAMP = "dft:start=2,ramp=4"
RUN = (
    f"{MODEL} {MODELS['dense']} {PER_TOKEN} --train-iters {STEPS} --save-interval {SAVED} --lr 1e-2 "
    "--global-batch-size 8 --micro-batch-size 2 "
)


@pytest.fixture(scope="module")
def uninterrupted(host):
    """The curves of an uninterrupted run, and the folder of its checkpoints."""
    folder = host.folder / "whole"
    return host.curves(f"{RUN} {TP2} --loss-type {RAMP} --save {folder}", ranks=2), folder


def rest(curves):
    """The steps after the checkpoint, and the evaluation at the end."""
    return {tag: values[SAVED:] if len(values) == STEPS else values for tag, values in curves.items()}


def loaded(folder):
    """Flags that resume a run from its first checkpoint."""
    return f"--load {folder} --ckpt-step {SAVED} "


def test_killed_run_resumes_exactly(host, uninterrupted):
    flags = f"{RUN} {TP2} --loss-type {RAMP} --save {host.folder / 'killed'} "
    killed = host.begin(flags, ranks=2, KILL_IN_ITERATION=str(CRASH))
    assert killed.wait() == -signal.SIGKILL
    steps = [int(step) for step in re.findall(rf"iteration +(\d+)/ +{STEPS}", killed.output())]
    assert steps == list(range(1, CRASH))
    assert host.curves(f"{flags} --load {host.folder / 'killed'}", ranks=2) == rest(uninterrupted[0])


@pytest.mark.parametrize(("layout", "ranks"), [("", 1), (PP2, 2), (TP2 + PP2, 4), (CP2, 2)])
def test_checkpoint_resumes_in_another_layout(host, uninterrupted, layout, ranks):
    curves, folder = uninterrupted
    agree(host.curves(f"{RUN} {layout} --loss-type {RAMP} {loaded(folder)}", ranks=ranks), rest(curves))


@pytest.mark.parametrize(("first", "then"), [("nll", "dft"), ("dft", "nll"), ("ce", "dft"), ("dft", "ce")])
def test_checkpoint_resumes_with_another_objective(host, first, then):
    folder = host.folder / first
    before = host.curves(f"{RUN} --loss-type {first} --save {folder}")
    after = host.curves(f"{RUN} --loss-type {then} {loaded(folder)}")
    assert after["lm loss"][0] == before["lm loss"][SAVED]  # with the same weights
    assert (after["grad-norm"][0] < before["grad-norm"][SAVED]) == (then == "dft")
    if then != "ce":
        counted = sum(before.get("dft/valid_tokens", [])[:SAVED])  # Megatron's own loss counts no tokens
        assert after["dft/valid_tokens_total"][0] == counted + after["dft/valid_tokens"][0]


def test_schedule_starts_with_nll_and_ramps_to_objective(host, uninterrupted):
    curves, _ = uninterrupted
    assert curves["dft/blend"] == [0.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    nll = host.curves(f"{RUN} {TP2} --loss-type nll", ranks=2)
    for tag in ("lm loss", "dft/loss", "dft/gate", "grad-norm"):
        assert curves[tag][:2] == nll[tag][:2]
    assert curves["dft/gate"][5:] == curves["dft/prob"][5:]
    assert 0.0 < curves["dft/gate"][3] < 1.0


def test_skip_train_restores_schedule_from_checkpoint(host, uninterrupted):
    code, output = host.start(f"{RUN} --loss-type {RAMP} {loaded(uninterrupted[1])} --skip-train")
    assert code == 0, output
    assert "dft/blend value: 5.000000E-01" in output


def test_finetune_resets_token_count_and_schedule(host, uninterrupted):
    curves = host.curves(f"{RUN} --loss-type {RAMP} {loaded(uninterrupted[1])} --finetune --exit-interval 3")
    assert curves["dft/valid_tokens_total"][0] == curves["dft/valid_tokens"][0]
    assert curves["dft/blend"] == [0.0, 0.0, 0.25]


def test_log_and_checkpoint_record_objective(host, uninterrupted):
    from megatron.core.dist_checkpointing import load_common_state_dict

    saved = load_common_state_dict(str(uninterrupted[1] / f"iter_{STEPS:07d}"))["args"]
    assert (saved.loss_type, saved.dft_mtp, saved.dft_backend) == (RAMP, "nll", "auto")
    run = next(path for path in host.folder.glob("run*/rank*.txt") if RAMP in path.read_text())
    assert f"objective {RAMP} replaces the cross entropy" in run.read_text()
    assert re.search(rf"loss_type \.+ {RAMP}", run.read_text())
