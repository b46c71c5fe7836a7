"""The two ways in which a run is refused; each message is the one line its user reads."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A mistake that only the user can mend (bad data, an impossible option, a diverged loss).

    The message says what is wrong and what to do, in one line. Trying again would fail again, so a run on
    Modal ends at once instead of being retried.
    """


class TransientError(UserError):
    """Something outside the run failed (a download, a volume): trying again later may well work."""


@contextmanager
def looking_at_what_the_user_named() -> Iterator[None]:
    """Paths that the system will not look at: too long a name, a folder without permission, a loop of links.

    Raises:
        UserError: an OSError arose within.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {(error.strerror or str(error)).lower()}") from error


def one_line(message: str) -> str:
    """The message as one line, whatever names and other libraries' messages it quotes."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in " ".join(message.split()))
