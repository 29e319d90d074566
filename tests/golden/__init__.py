"""What no change may move unnoticed, kept in git as files that tests compare.

=================  ========================================================================  ==================
losses.json        losses, gradient norms and hashes of all weights of 20 training steps     golden/losses.py
public_names.txt   the names that documentation imports or refers to, and `__all__`          golden/names.py
options.json       every option of every subcommand: its default, type and choices           golden/options.py
=================  ========================================================================  ==================

`python -m tests.golden` remakes all of them, `python -m tests.golden losses` one. A commit that changes a line of
these files says why.
"""
