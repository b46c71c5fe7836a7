"""The two ways in which a run is refused; each message is the one line its user reads."""


class UserError(Exception):
    """A mistake that only the user can mend (bad data, an impossible option, a diverged loss).

    The message says what is wrong and what to do, in one line. Trying again would fail again, so a run on
    Modal ends at once instead of being retried.
    """


class TransientError(UserError):
    """Something outside the run failed (a download, a volume): trying again later may well work."""
