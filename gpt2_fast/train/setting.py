"""What the bits of a run and its losses depend on beside its options."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from gpt2_fast.data import TokenDataset
from gpt2_fast.parallel.group import Group
from gpt2_fast.report.machine import environment
from gpt2_fast.train.config import TrainConfig


class Setting(NamedTuple):
    """All processes of a run have the same. A checkpoint has it too, so that a run that goes on knows what has changed.

    environment: the machine and the versions.
    data: the fingerprint of the tokens that it trains on.
    validation: what a validation is computed on: losses are compared where it is the same.
    """

    environment: dict[str, Any]
    data: str
    validation: dict[str, Any]

    @classmethod
    def here(
        cls, config: TrainConfig, context: int, device: torch.device, train_data: TokenDataset, val_data: TokenDataset
    ) -> Setting:
        windows = min(config.eval_batches * config.batch_size, val_data.n_windows)
        validation = {"data": val_data.fingerprint(), "context": context, "windows": windows}
        return cls(environment(device), train_data.fingerprint(), validation)

    def check_same(self, group: Group, config: TrainConfig) -> None:
        """Raises ValueError, one line, where another process has another."""
        where = f"is --data {config.data} the same everywhere?"
        others = "the processes run on other devices, threads or versions; their bits would differ"
        group.same(self.environment, others)
        group.same(self.data, f"the processes read other data; {where}")
        group.same(self.validation, f"the processes read other validation data; {where}")
