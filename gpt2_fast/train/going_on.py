"""What a run takes up from the checkpoint that it goes on from."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from gpt2_fast import checkpoint
from gpt2_fast.parallel.group import Lost
from gpt2_fast.train import folder as folders
from gpt2_fast.train.step import restore

if TYPE_CHECKING:
    from gpt2_fast.train.loop import Run


def take_up(run: Run, state: checkpoint.TrainingState) -> None:
    """Puts `state` into a run, and says what is no longer as it was. Raises ValueError, one line."""
    try:
        if run.group.first:
            restore(run.model, run.optimizer, state.model, state.optimizer)
            checkpoint.restore_rng(state.rng)  # of programs that draw from it: a step does not
        else:
            run.optimizer.receive_state()
    except Lost:
        raise
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{state.path} does not fit itself: {reason}; go on from another checkpoint") from None
    run.step = run.saved = state.step
    run.best, run.best_step = state.extra.get("best", math.inf), state.extra.get("best_step")
    then, given = state.extra.get("environment", {}), state.extra.get("train_config", {})
    for name, value in then.items():
        if run.environment.get(name, value) != value:
            here = run.environment[name]
            run.say(f"the run goes on with another {name} ({value} before, {here} now): other bits from here")
    if given.get("dtype", run.config.dtype) != run.config.dtype:
        run.say(f"the run goes on in {run.config.dtype} ({given['dtype']} before), from its float32 weights")
    before, validation = state.extra.get("data"), state.extra.get("validation")
    same = given.get("data") == run.config.data and given.get("context") == run.config.context
    if before not in (None, run.fingerprint):
        if same:
            raise _other_data(run, "tokens")
        run.say("the run goes on with other data")
    if validation is None:  # of an earlier version: its training data and its options say
        options = dataclasses.asdict(run.config)
        moved = any(given.get(name) != options[name] for name in ("eval_batches", "batch_size", "context"))
        other = before not in (None, run.fingerprint) or (moved and bool(given))
    else:
        other = validation != run.validation
    if other:
        if validation is not None and same and validation["data"] != run.validation["data"]:
            raise _other_data(run, "validation tokens")
        run.best, run.best_step, run.best_from = math.inf, None, run.step + 1
        run.say("the run validates on other data than before: its best checkpoint is found anew")
    if moved := folders.moved_order(given, run.config):
        run.say(moved)


def _other_data(run: Run, what: str) -> ValueError:
    return ValueError(
        f"--data {run.config.data or '(none)'} holds other {what} than when the run was saved; put the old data "
        "back, or name the new with --data and another path"
    )
