"""The one error that is meant for the user: what was needed, what came, what to do."""


class UserError(ValueError):
    """A sentence for the person who called, with the numbers and the remedy.

    The command line prints it as one line and exits with code 2. It is a `ValueError`, so a library caller who knows
    nothing of this project catches it too.
    """
