"""The validation losses of a run."""

from __future__ import annotations

from collections.abc import Callable

from gpt2_fast.data import TokenDataset
from gpt2_fast.evaluate import dataset_loss
from gpt2_fast.model import GPT2LMHeadModel
from gpt2_fast.parallel.group import Group
from gpt2_fast.train.config import TrainConfig
from gpt2_fast.train.finite import check_validation
from gpt2_fast.train.stop import Ending, Stopped


class Validation:
    """Computes the loss of a model on a run's validation data, once a step.

    Args:
        data: the data; its first batches count, as many as --eval-batches says.
        ending: a validation ends where the run does.
        record: logs what is computed.

    Attributes:
        losses: those in the log, by step.
    """

    def __init__(
        self,
        model: GPT2LMHeadModel,
        data: TokenDataset,
        config: TrainConfig,
        group: Group,
        ending: Ending,
        record: Callable[..., None],
        losses: dict[int, float],
    ):
        self.losses = losses
        self._model, self._data, self._config, self._group = model, data, config, group
        self._ending, self._record = ending, record

    def loss(self, step: int) -> float:
        """Of the weights after `step`, logged once.

        Raises Stopped when a signal comes meanwhile, or the data cannot be read, which is the run's fault then.
        """
        if step in self.losses:  # a resumed run has it in its log
            return self.losses[step]
        size, batches = self._config.batch_size, self._config.eval_batches
        options = {"batch_size": size, "limit": batches * size, "between": self._between, "group": self._group}
        try:
            loss = dataset_loss(self._model, self._data, **options)["loss"]
        except (ValueError, OSError) as error:
            self._ending.fault = error
            self._ending.agree()
            raise Stopped from None
        check_validation(loss, step, self._config)
        self._record(step=step, val_loss=loss)
        self.losses[step] = loss
        return loss

    def _between(self) -> None:
        self._ending.agree()
        if self._ending.due:
            raise Stopped
