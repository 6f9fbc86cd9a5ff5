"""Every error that actgraph raises on purpose.

The message is one line that says what is wrong; ``hint`` says how to mend it. The command line prints both and
exits with ``exit_code``; Python users see them as an ordinary exception.
"""

from __future__ import annotations


class ActgraphError(Exception):
    """Base of all errors that a user can cause and mend."""

    exit_code = 2

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class InputError(ActgraphError):
    """A file, argument or option that cannot be used as given."""


class CaptureError(ActgraphError):
    """torch.export could not capture the model; the message names the line of user code."""


class SiteError(ActgraphError):
    """A selector that matches nothing, or a site that a pass has removed."""


class OptionError(InputError):
    """An unknown, missing or ill-typed option of a pass, or pipeline text that does not parse."""


class VerifyError(ActgraphError):
    """A graph that breaks an invariant of its dialect."""


class PassError(ActgraphError):
    """A pass that could not do what was asked, such as one that matched nothing."""


class UnsupportedError(ActgraphError):
    """Something that the dialect, opset or engine at hand cannot express."""


class ParityError(ActgraphError):
    """Two graphs that should agree and do not."""

    exit_code = 1
