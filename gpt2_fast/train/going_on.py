"""What a run takes up from the checkpoint that it goes on from."""

from __future__ import annotations

import dataclasses

from gpt2_fast import checkpoint
from gpt2_fast.model import GPT2LMHeadModel
from gpt2_fast.optim import AdamW
from gpt2_fast.parallel.group import Group, Lost
from gpt2_fast.train import folder as folders
from gpt2_fast.train.checkpoints import Best
from gpt2_fast.train.config import TrainConfig
from gpt2_fast.train.progress import Voice
from gpt2_fast.train.setting import Setting
from gpt2_fast.train.step import restore


def take_up(state: checkpoint.TrainingState, model: GPT2LMHeadModel, optimizer: AdamW, group: Group) -> None:
    """Puts `state` into model and optimizer. Its tensors are in the first process, which sends the others their part.

    Raises ValueError, one line.
    """
    try:
        if group.first:
            restore(model, optimizer, state.model, state.optimizer)
            checkpoint.restore_rng(state.rng)  # of programs that draw from it: a step does not
        else:
            optimizer.receive_state()
    except Lost:
        raise
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{state.path} does not fit itself: {reason}; go on from another checkpoint") from None


def compare(state: checkpoint.TrainingState, config: TrainConfig, setting: Setting, say: Voice) -> Best:
    """Says what is no longer as it was when `state` was saved. Returns the best of the run so far.

    Raises ValueError, one line, where the data under its name is other data.
    """
    then, given = state.extra.get("environment", {}), state.extra.get("train_config", {})
    for name, value in then.items():
        if setting.environment.get(name, value) != value:
            here = setting.environment[name]
            say(f"the run goes on with another {name} ({value} before, {here} now): other bits from here")
    if given.get("dtype", config.dtype) != config.dtype:
        say(f"the run goes on in {config.dtype} ({given['dtype']} before), from its float32 weights")
    before, validation = state.extra.get("data"), state.extra.get("validation")
    same = given.get("data") == config.data and given.get("context") == config.context
    if before not in (None, setting.data):
        if same:
            raise _other_data(config, "tokens")
        say("the run goes on with other data")
    if validation is None:  # of an earlier version: its training data and its options say
        options = dataclasses.asdict(config)
        moved = any(given.get(name) != options[name] for name in ("eval_batches", "batch_size", "context"))
        other = before not in (None, setting.data) or (moved and bool(given))
    else:
        other = validation != setting.validation
    best = Best.of(state)
    if other:
        if validation is not None and same and validation["data"] != setting.validation["data"]:
            raise _other_data(config, "validation tokens")
        best = Best(since=state.step + 1)
        say("the run validates on other data than before: its best checkpoint is found anew")
    if moved := folders.moved_order(given, config):
        say(moved)
    return best


def _other_data(config: TrainConfig, what: str) -> ValueError:
    return ValueError(
        f"--data {config.data or '(none)'} holds other {what} than when the run was saved; put the old data "
        "back, or name the new with --data and another path"
    )
