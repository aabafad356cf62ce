"""Known faults of Megatron that affect the loss (README, "Faults of Megatron itself").

If a test fails because Megatron was fixed, remove the log line of the fault and its row of the table.
"""

import pytest
from host_flags import CP2, MODEL, MODELS, PER_TOKEN, SP, TP2, training
from host_runs import agree

from megatron_dft.hosts import compat

pytestmark = [pytest.mark.host, pytest.mark.slow]
pytest.importorskip("megatron.training")
pytest.importorskip("tensorboard")

COMMON = f"{MODEL} {training(2, 1e-3, 8)} --micro-batch-size 1 {PER_TOKEN} "
MTP = f"{COMMON} {MODELS['mtp']} "


def test_megatron_mtp_loss_depends_on_layout_and_is_logged(host):
    """Issue 7452, number 3, with and without --loss-type. The main loss does not depend on the layout."""
    one, two = host.curves(MTP), host.curves(f"{MTP} {CP2}", ranks=2)
    assert two["lm loss"][0] == pytest.approx(one["lm loss"][0], rel=1e-5)
    assert abs(two["mtp_1 loss"][0] - one["mtp_1 loss"][0]) > 0.05 * one["mtp_1 loss"][0]
    run = host.begin(f"{MTP} {CP2} --loss-type nll", ranks=2)
    assert run.wait() == 0, run.output()[-3000:]
    assert run.output().count("> megatron_dft: multi-token prediction: Megatron divides the loss of its heads by") == 1
    ours = run.curves()
    agree({tag: ours[tag] for tag in two}, two, 1e-5)


def test_megatron_moe_router_scaling_is_logged(host):
    """Issue 7452, number 10."""
    balanced = MODELS["moe"].replace("load-balancing-type none", "load-balancing-type aux_loss")
    run = host.begin(f"{COMMON} {balanced} {TP2} {SP} --loss-type dft", ranks=2)
    assert run.wait() == 0, run.output()[-3000:]
    assert (
        run.output().count("> megatron_dft: mixture of experts: with a padding mask Megatron scales the router's") == 1
    )
    assert "mixture of experts" not in host.start(f"{COMMON} {MODELS['moe']} {TP2} {SP} --loss-type dft", ranks=2)[1]


def test_upstream_faults_is_empty_for_unaffected_settings():
    class Settings:
        calculate_per_token_loss, data_parallel_size, mtp_num_layers, num_experts = True, 8, None, None

    assert not list(compat.upstream_faults(Settings()))
