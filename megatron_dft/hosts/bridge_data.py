"""Token files (`megatron_dft.data`) as the data set of Megatron-Bridge.

A YAML file for `python -m megatron_dft.launch_bridge` replaces the data set of the recipe by

    dataset:
      _target_: megatron_dft.hosts.bridge_data.TokenFileDataset
      train_path: train.arrow
      valid_path: valid.arrow

Samples have the keys of Bridge's offline packing. `cu_seqlens_q` includes the padding of conversations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy
import torch
from megatron.bridge.data.base import DatasetBuildContext, DatasetProvider
from megatron.bridge.data.packing.config import PackedSequenceSpecs
from torch.utils.data import Dataset

from megatron_dft.config import DFTConfig
from megatron_dft.data.token_file import TokenFile, sample_of
from megatron_dft.hosts.sft import check_channels
from megatron_dft.hosts.token_data import (
    Carried,
    Layout,
    carried,
    channels_of,
    check_layout,
    check_tokenizer,
    check_vocabulary,
    row_number,
    tensors_of,
)


@dataclass(kw_only=True)
class TokenFileDataset(DatasetProvider):
    """The `dataset` section of a run that trains on token files.

    Attributes:
        train_path: the token file for training. Its rows are reshuffled in each epoch with `seed`.
        valid_path: the token file for validation, in order. None: no validation. There is no test data set.
        seed: random seed of the row order.
        dataloader_type: only "single", because this class determines the order of rows.
    """

    train_path: str
    valid_path: str | None = None
    seed: int = 1234
    dataloader_type: Literal["single", "cyclic", "batch", "external"] | None = "single"

    # Bridge reads these attributes. Without annotations they are no dataclass fields, so checkpoints do not have them.
    # The first one sends cu_seqlens to the middle stages of a pipeline.
    enable_offline_packing = True
    pad_to_max_length = True

    def __post_init__(self) -> None:
        self._model: Any = None
        self._carried = Carried()

    @property
    def seq_length(self) -> int:
        """Tokens per row, padding included."""
        return TokenFile(self.train_path).header.seq_length

    @property
    def offline_packing_specs(self) -> PackedSequenceSpecs:
        """The packing, for Bridge's checks."""
        return PackedSequenceSpecs(packed_sequence_size=self.seq_length)

    def check_token_files(self, cfg: Any, config: DFTConfig | None = None) -> None:
        """Check the files against the run, before it starts. `build_datasets` requires this call.

        Args:
            cfg: the ConfigContainer of this object, with every override applied.
            config: the settings of the objective; None: labels carry token ids alone.

        Raises:
            ValueError: if a file does not fit the run.
        """
        paths = [path for path in (self.train_path, self.valid_path) if path is not None]
        if self.dataloader_type != "single":
            raise ValueError(
                f"dataset.dataloader_type={self.dataloader_type}: token files support only single; remove the setting"
            )
        for section, name in (
            (cfg.train, "train.micro_batch_size"),
            (cfg.validation, "validation.eval_micro_batch_size"),
        ):
            size = getattr(section, name.partition(".")[2])
            if size not in (1, None):
                raise ValueError(f"{name}={size}: token files support only 1, one row per micro-batch; set it to 1")
        model = cfg.model
        sizes = {model.context_parallel_size, getattr(cfg.dist, "eval_context_parallel_size", None) or 1}
        if max(sizes) > 1 and (not model.calculate_per_token_loss or cfg.ddp.average_in_collective):
            raise ValueError(
                f"model.context_parallel_size={max(sizes)}: ranks hold different numbers of valid tokens; set "
                "model.calculate_per_token_loss=true and ddp.average_in_collective=false"
            )
        for path in paths:
            header = TokenFile(path).header
            for size in sorted(sizes):
                layout = Layout(model.seq_length, size, model.tensor_model_parallel_size, model.sequence_parallel)
                check_layout(path, header, layout, "model.{}".format)
            if cfg.tokenizer.tokenizer_type == "HuggingFaceTokenizer" and cfg.tokenizer.tokenizer_model:
                check_tokenizer(
                    path,
                    header,
                    cfg.tokenizer.tokenizer_model,
                    "tokenizer.tokenizer_model",
                    trust_remote_code=cfg.tokenizer.trust_remote_code,
                )
        config = config or DFTConfig()
        check_channels(config.metric_spec.channels, channels_of(paths), "dft.channels")
        self._model, self._carried = model, carried(paths, [self.train_path], config)

    def build_datasets(self, context: DatasetBuildContext) -> tuple[Dataset | None, Dataset | None, None]:
        """The data sets for training and validation, with the number of samples that Bridge requests."""
        if self._model is None:
            raise ValueError(
                "dataset: TokenFileDataset.check_token_files(cfg) was not called; use megatron_dft.launch_bridge or "
                "megatron_dft.hosts.bridge.finetune(cfg, ...), or call it before Bridge's finetune(cfg)"
            )
        return (
            self._rows(self.train_path, context.train_samples, self.seed),
            self._rows(self.valid_path, context.valid_samples, None),
            None,
        )

    def _rows(self, path: str | None, samples: int, seed: int | None) -> TokenRows | None:
        if path is None or samples == 0:
            return None
        file = TokenFile(path)
        check_vocabulary(path, file.header, self._model.vocab_size)
        return TokenRows(file, samples, seed, self._carried)


class TokenRows(Dataset):
    """Samples of a token file, one row each. Rows repeat after the last one.

    Args:
        samples: length of the data set.
        seed: random seed of the row order per epoch; None: the order of the file.
        carried: what the labels carry.
    """

    def __init__(self, file: TokenFile, samples: int, seed: int | None, carried: Carried) -> None:
        self.file, self.samples, self.seed, self.carried = file, samples, seed, carried

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        sample = sample_of(self.file[row_number(index, len(self.file), self.seed)], self.file.header)
        cu_seqlens = torch.from_numpy(sample.cu_seqlens)
        max_seqlen = torch.tensor(numpy.diff(sample.cu_seqlens).max())
        return {
            **tensors_of(sample, self.file.header, self.carried),
            "cu_seqlens_q": cu_seqlens,
            "cu_seqlens_kv": cu_seqlens,
            "max_seqlen_q": max_seqlen,
            "max_seqlen_kv": max_seqlen,
        }
