"""How a run ends: what it says, the plot, a sample, and where everything is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpt2_fast.checkpoint.run_folder import NEWEST
from gpt2_fast.parallel.group import Lost
from gpt2_fast.train import folder as folders
from gpt2_fast.train.say import say

if TYPE_CHECKING:
    from gpt2_fast.train.loop import Run


def finished(run: Run) -> bool:
    """Whether a run that is resumed had come to its end, and says so."""
    done = run.checkpoints.saved is not None and run.step >= run.config.steps and run.step in run.validation.losses
    if done:
        reached = f"{run.step} of {run.config.steps} steps are done and nothing is left to do"
        if run.step > run.config.steps:
            reached = f"it is at step {run.step}, past --steps {run.config.steps}"
        run.say(f"{run.out} is finished: {reached}; a larger --steps goes on")
        _show_files(run)
    return done


def fail(run: Run) -> None:
    """Saves the steps that are good, and raises what ended the run, in one line that says where they are."""
    how, fault = "", run.ending.fault
    if run.step:
        unsaved = None
        try:
            run.save_last()
        except OSError as error:  # of the first process, which writes
            unsaved = error
            if fault is None:
                say(error, "stderr")
        # Who ends before the first has written it takes it down.
        if run.group.agree(int(unsaved is not None))[0]:
            how = f"; step {run.step} could not be saved" + (f": {unsaved}" if unsaved else "")
        else:
            how = f"; step {run.step} is saved, go on with --resume {run.out}"
    if fault is None:  # another process has it, and says it: this one waits until it has ended
        run.group.barrier()
        raise Lost("another process has failed")
    raise (ValueError if isinstance(fault, ValueError) else OSError)(f"{fault}{how}") from fault


def conclude(run: Run) -> None:
    """The plot, a sample, and where everything is. For the first process."""
    if run.step:
        _plot(run)
    if run.interrupted:
        again = f"gpt2-fast train --resume {run.out}"
        say(f"{run.ending.asked}: stopped at step {run.step} of {run.config.steps}; continue with: {again}")
    elif not run.config.quiet:
        say(f"sample:\n{run.sample()}\n")
    _show_files(run)


def _plot(run: Run) -> None:
    """The losses as a picture. All that counts is saved by now, so nothing that goes wrong here ends the run."""
    try:
        from gpt2_fast.report.figures import save_loss_plot  # matplotlib, which a run should not wait for

        save_loss_plot(run.out / folders.METRICS, run.out / folders.PLOT)
    except Exception as error:  # matplotlib raises what it likes, as for a backend that is not installed
        say(f"no {folders.PLOT}: {(str(error).splitlines() or [repr(error)])[0]}", "stderr")


def _show_files(run: Run) -> None:
    for path in (run.out / name for name in (folders.METRICS, folders.PLOT, NEWEST)):
        if path.exists() and run.group.first:
            say(path)
