"""The one exception that means "the person can mend this".

Whatever raises `UserError` says in one line what is wrong, where, and what to do; the command line prints
that line and exits with code 2, without a traceback. Everything else is a defect and keeps its traceback.
A kernel reports an exception by its name only, so it is raised as it stands, never subclassed.
"""


class UserError(ValueError):
    """A mistake in settings, input files or the environment: one line, exit code 2."""
