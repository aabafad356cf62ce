"""The launcher: each script trains with the objective, or fails with a non-zero exit code and the reason."""

import subprocess
import sys

import pytest
from host_flags import CP2, DP, MODEL, MODELS, PER_TOKEN, PP2, TP2, training
from host_runs import ROOT, SCRIPT, agree

pytestmark = [pytest.mark.host, pytest.mark.slow]
pytest.importorskip("megatron.training")
pytest.importorskip("tensorboard")

FLAGS = f"{MODEL} {MODELS['dense']} {training(3, 1e-3, 8)} --micro-batch-size 1 "
DFT = f"{FLAGS} {PER_TOKEN} --loss-type dft "
IMPORT = "from megatron.training import argument_utils, arguments, get_args, pretrain\n"


def variant(host, name, *changes):
    """Write a copy of the training script with text changes. Each old text must occur."""
    text = SCRIPT.read_text()
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    path = host.folder / f"{name}.py"
    path.write_text(text)
    return path


@pytest.mark.smoke
@pytest.mark.parametrize(
    "pretrain",
    ["from megatron.training.training import pretrain", "from megatron.training.training import pretrain as pretrain"],
)
def test_launcher_replaces_pretrain_imported_from_defining_module(host, pretrain):
    script = variant(
        host, "defined", (IMPORT, f"from megatron.training import argument_utils, arguments, get_args\n{pretrain}\n")
    )
    agree(host.curves(DFT, script=script), host.curves(DFT), 0.0)


# Changes of the script that bypass the objective, and the error of the run.
MISSED = {
    "own loop": ("    main()", "    print('trained')", "the script did not call Megatron's pretrain()"),
    "exit": ("    main()", "    import sys; sys.exit(0)", "the script did not call Megatron's pretrain()"),
    "loss in forward_step": (
        'labels=batch["labels"] if needs_labels else None',
        "labels=None",
        "the objective did not compute the loss of this model",
    ),
    "loss discarded": (
        '    return output, partial(loss_func, batch["loss_mask"])',
        "    if last:\n"
        '        logits = model(batch["tokens"], batch["position_ids"], None)\n'
        '        targets = batch["labels"].clamp(min=0)\n'
        "        ce = torch.nn.functional.cross_entropy\n"
        "        output = ce(logits.transpose(1, 2).float(), targets, reduction='none')\n"
        '    return output, partial(loss_func, batch["loss_mask"])',
        "received a gradient in 0; the training step uses another loss",
    ),
    "loss without gradients": (
        "    output = model(",
        "    with torch.no_grad(): output = model(",
        "forward_step called it without labels or without gradients",
    ),
    "loss replaced": (
        "    needs_tokens, needs_labels",
        "    from megatron.core.utils import unwrap_model\n"
        "    inner = unwrap_model(model)\n"
        "    if 'mine' not in globals():\n"
        "        globals()['mine'] = inner.compute_language_model_loss = "
        "lambda labels, logits: logits.float().logsumexp(-1).t()\n"
        "    needs_tokens, needs_labels",
        "the objective did not compute the loss of this model",
    ),
}


MISSED["error caught"] = (
    "    main()",
    "    try:\n        main()\n    except Exception as error:\n        print('ignored', error)",
    "pretrain() ended with an error that the script caught",
)


@pytest.mark.smoke
@pytest.mark.parametrize("name", MISSED)
def test_launcher_fails_if_objective_reaches_no_model(host, name):
    old, new, reason = MISSED[name]
    changes = [(old, new)]
    if name == "error caught":
        changes.append(MISSED["loss in forward_step"][:2])
    if name == "loss without gradients":
        changes.append(MISSED["loss discarded"][:2])
    code, output = host.start(DFT, script=variant(host, name.replace(" ", "_"), *changes))
    assert code != 0 and reason in output, output[-2000:]
    assert "dft/loss" not in output


def test_launcher_fails_on_every_rank_without_pretrain_call(host):
    script = variant(host, "nothing", ("    main()", "    pass"))
    run = host.begin(f"{DFT} {PP2}", script=script, ranks=2)
    run.wait()
    assert [process.exitcode for process in run.processes] == [1, 1]


EMPTY = (
    "    num_tokens = loss_mask.sum()\n",
    "    num_tokens = loss_mask.sum()\n    if num_tokens == 0:\n        loss = torch.zeros((), requires_grad=True)\n",
)


def test_micro_batch_without_tokens_may_return_own_zero_loss(host):
    agree(host.curves(DFT, script=variant(host, "empty", EMPTY)), host.curves(DFT), 1e-6)


LATER = (
    'return output, partial(loss_func, batch["loss_mask"])',
    'return FORM(output), partial(loss_func, batch["loss_mask"] if get_args().curr_iteration == 0 '
    'else torch.ones_like(batch["loss_mask"]))',
)


@pytest.mark.parametrize("form", ["tensor", "list"])
def test_wrong_loss_mask_in_later_iteration_fails_run(host, form):
    """The run fails at the end of pretrain() at the latest. The first micro-batch is checked at once."""
    changes = [(LATER[0], LATER[1].replace("FORM", "" if form == "tensor" else "(lambda x: [x] if last else x)"))]
    if form == "list":
        changes.append(("output.view(-1).float()", "output[0].view(-1).float()"))
    code, output = host.start(DFT, script=variant(host, f"later_{form}", *changes))
    assert code != 0 and "its loss mask counts tokens that have no loss" in output


def test_channels_fail_run_if_no_label_carries_one(host):
    code, output = host.start(f"{DFT} --dft-channels a,b")
    assert "no label of the first iteration carries a channel" in output
    assert code != 0 and "--dft-channels a,b: no label of this run carried a channel" in output


def test_pretrain_restores_pre_wrap_hooks(host):
    """Otherwise a second pretrain() of the configuration would bind the loss twice."""
    script = variant(
        host,
        "hooks",
        (
            "        pretrain(argument_utils.pretrain_cfg_container_from_args(args, model), datasets, kind, forward_step)",  # noqa: E501
            "        config, before = argument_utils.pretrain_cfg_container_from_args(args, model), "
            "list(model.pre_wrap_hooks)\n"
            "        pretrain(config, datasets, kind, forward_step)\n"
            "        assert model.pre_wrap_hooks == before",
        ),
    )
    host.curves(DFT, script=script)


def test_launcher_keeps_exit_code_of_script(host):
    assert host.start(DFT, script=variant(host, "seven", ("    main()", "    import sys; sys.exit(7)")))[0] == 7


def test_launcher_without_objective_replaces_nothing(tmp_path):
    """Also with --loss-type ce. The script receives no flags of megatron_dft."""
    script = tmp_path / "look.py"
    script.write_text(
        "import sys, megatron.training.training as t, megatron.training.arguments as a\n"
        "from megatron.core.tokenizers.text import libraries as l\n"
        "from megatron.training.datasets.sft_dataset import SFTLowLevelDataset as s\n"
        "print([x.__module__ for x in (t.pretrain, t.train_step, t.evaluate, t.save_checkpoint, l.SFTTokenizer)],\n"
        "      a.add_megatron_arguments.__code__.co_filename, s.__init__.__code__.co_filename, sys.argv[1:])\n"
    )
    command = [sys.executable, "-m", "megatron_dft.launch", str(script), "--lr", "1", "--loss-type", "ce"]
    output = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert "megatron_dft" not in output.replace(str(ROOT), "") and "['--lr', '1']" in output


def test_device_flag_is_accepted_before_and_after_script(host):
    for argv in (["--device", "cpu", "SCRIPT"], ["--device=cpu", "SCRIPT"], ["SCRIPT", "--device", "cpu"]):
        script = host.folder / "device.py"
        script.write_text("import sys, os; print('argv', sys.argv[1:2], os.environ['CUDA_VISIBLE_DEVICES'] == '')\n")
        command = [sys.executable, "-m", "megatron_dft.launch", *[str(script) if x == "SCRIPT" else x for x in argv]]
        output = subprocess.run([*command, "--lr", "1"], capture_output=True, text=True, timeout=120, check=True).stdout
        assert "argv ['--lr'] True" in output


RERUN = (
    "    return loss, num_tokens.to(torch.int)",
    "    from megatron.core.rerun_state_machine import get_rerun_state_machine\n"
    "    get_rerun_state_machine().validate_result(result=loss.detach(), tolerance=0.0, fatal=False, message='spike',\n"
    "        rejection_func=lambda x: get_args().curr_iteration == 1)\n"
    "    return loss, num_tokens.to(torch.int)",
)


@pytest.mark.parametrize(("layout", "ranks"), [("", 1), (PP2, 2)])
def test_rerun_step_is_counted_once(host, layout, ranks):
    """Megatron's rerun state machine, on by default, repeats a step whose loss it rejects."""
    flags = f"{DFT} {layout} --dft-metrics full --dft-channels a,b --save {host.folder / 'rerun'} --save-interval 3 "
    plain = host.curves(flags, ranks=ranks, CHANNELS="3")
    run = host.begin(flags, script=variant(host, "rerun", RERUN), ranks=ranks, CHANNELS="3")
    assert run.wait() == 0, run.output()[-3000:]
    assert "First rerun" in run.output()
    agree(run.curves(), plain, 1e-6)
    total = plain["dft/valid_tokens_total"][-1]
    resumed = host.curves(
        f"{flags} --load {host.folder / 'rerun'} --train-iters 4 --override-opt-param-scheduler",
        ranks=ranks,
        CHANNELS="3",
    )
    assert resumed["dft/valid_tokens_total"][-1] == total + resumed["dft/valid_tokens"][-1]


SFT = "--sft "  # only changes how pretrain() averages validation, as the script has its own data and batches


@pytest.mark.parametrize("sft", ["", SFT])
@pytest.mark.parametrize(("layout", "ranks"), [("", 1), (CP2, 2), (DP, 2), (TP2, 2)])
def test_validation_is_mean_over_tokens(host, sft, layout, ranks):
    """In every micro-batch size and layout. Under --sft, Megatron's own validation is a mean of means."""
    common = f"{DFT} {sft} --no-create-attention-mask-in-dataloader --dft-metrics full --dft-channels a,b,c "
    one = host.curves(f"{common} --micro-batch-size 8", CHANNELS="4")
    many = host.curves(f"{common} --micro-batch-size 1 {layout}", ranks=ranks, CHANNELS="4")
    names = [name for name in one if "validation" in name and "vs samples" not in name]
    assert {"lm loss validation", "dft/prob validation", "dft/channel/b/nll validation"} <= set(names)
    for name in names:
        assert many[name] == pytest.approx(one[name], rel=2e-5), name


def test_valid_tokens_are_summed_over_data_parallel_ranks(host):
    """Megatron's all-reduce of the report sums the counts of all ranks."""
    one = host.curves(DFT)
    four = host.curves(f"{DFT} {DP} --micro-batch-size 2", ranks=4)
    for name in ("dft/valid_tokens", "dft/valid_tokens_total"):
        assert four[name] == one[name]


def test_sft_error_names_attention_mask_flag(host):
    code, output = host.start(f"{DFT} --sft")
    assert code != 0 and "--sft: packed sequences have no attention mask" in output
    assert "--no-create-attention-mask-in-dataloader" in output


def test_legacy_loss_func_is_rejected_only_with_per_token_loss(host):
    """The legacy loss_func returns two values: a mean over the micro-batch and the report."""
    two = variant(
        host,
        "two_values",
        (
            'return loss, num_tokens.to(torch.int), {"lm loss": torch.stack([loss.detach(), num_tokens])}',
            'return loss / num_tokens.clamp(min=1), {"lm loss": torch.stack([loss.detach(), num_tokens])}',
        ),
        ("tuple[torch.Tensor, torch.Tensor, dict]", "tuple"),
    )
    code, output = host.start(DFT, script=two)
    assert code != 0 and "expected (loss, num_tokens, report) under --calculate-per-token-loss" in output
    without = DFT.replace(PER_TOKEN, "")
    ours, theirs = host.curves(without, script=two), host.curves(without)
    agree(ours, theirs, 1e-5)
