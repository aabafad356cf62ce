"""Helpers that run examples/pretrain_gpt.py on packed conversations."""

import json
import os
import subprocess
import sys
from pathlib import Path

from demo import read_curves
from host_runs import EXAMPLE, ROOT, UNTIMED, Host

CHAT_STEPS = 3
CHAT_MODEL = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 256 --max-position-embeddings 256 "
    "--position-embedding-type rope --normalization RMSNorm --disable-bias-linear --attention-dropout 0 "
    "--hidden-dropout 0 --make-vocab-size-divisible-by 64 "  # 128 at TP 1 and 2
    f"--train-iters {CHAT_STEPS} --lr 1e-2 --lr-decay-style constant --global-batch-size 6 --micro-batch-size 1 "
    "--clip-grad 1.0 --eval-iters 1 --eval-interval 100 --log-interval 1 --tensorboard-log-interval 1 --num-workers 0 "
)
CHAT_MOCK = CHAT_MODEL + "--mock-data --tokenizer-type NullTokenizer --vocab-size 120 "


class ChatHost(Host):
    """Runs of examples/pretrain_gpt.py on packed conversations."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        make_data = str(ROOT / "examples" / "make_chat_data.py")
        # Lines of 240 tokens leave room for the padding that context parallelism adds to each conversation.
        packed = [sys.executable, make_data, str(folder / "chat"), "--seq-length", "240", "--packed"]
        subprocess.run(packed, check=True)
        chat = folder / "chat"
        self.sft = CHAT_MODEL + (
            "--sft --tokenizer-type SFTTokenizer --sft-tokenizer-prompt-format nemotron-nano-v2 "
            "--no-create-attention-mask-in-dataloader --calculate-per-token-loss "
            f"--tokenizer-model {chat / 'tokenizer'} --train-data-path {chat / 'noisy_train.jsonl'} "
            f"--valid-data-path {chat / 'valid.jsonl'} --data-cache-path {folder / 'cache'} "
        )

    def tokens_of(self, channel: str, lines: int) -> int:
        """Number of trained tokens of a channel in the first lines of the training data."""
        from megatron.core.tokenizers.text.libraries.sft_tokenizer import SFTTokenizer

        chat = self.folder / "chat"
        tokenizer = SFTTokenizer(str(chat / "tokenizer"), "nemotron-nano-v2")
        count = 0
        for line in map(json.loads, (chat / "noisy_train.jsonl").read_text().splitlines()[:lines]):
            for name, conversation in zip(line["channels"], split_at_system(line["messages"]), strict=True):
                _, target = tokenizer.tokenize_conversation(conversation, True, False)
                count += int((target != -100).sum()) * (name == channel)
        return count

    def begin(self, flags, *, script=EXAMPLE, **kwargs):
        return super().begin(flags, script=script, **kwargs)

    def torchrun(self, flags: str, ranks: int, script: Path) -> tuple[dict[str, list[float]], str]:
        """TensorBoard curves and output of a run under torchrun."""
        logs = self.folder / f"torchrun{len(list(self.folder.glob('torchrun*')))}"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command += ["-m", "megatron_dft.launch", str(script), *flags.split(), "--tensorboard-dir", str(logs)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        run = subprocess.run(
            [*command, "--device", "cpu"], capture_output=True, text=True, timeout=240, env=environment, check=False
        )
        assert run.returncode == 0, run.stdout + run.stderr
        return {t: x for t, x in read_curves(logs).items() if UNTIMED.search(t)}, run.stdout + run.stderr


def split_at_system(messages):
    """Split a packed line into its conversations. Each begins with a system message."""
    starts = [i for i, message in enumerate(messages) if message["role"] == "system"]
    return [messages[i:j] for i, j in zip(starts, [*starts[1:], None], strict=True)]
