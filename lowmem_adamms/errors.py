"""The errors a user can mend. The CLI turns each into one line and exit code 2.

Anything else that is raised is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence


class MergeError(Exception):
    """Base of all errors that name something the user can change."""

    @property
    def lines(self) -> tuple[str, ...]:
        """What to show, a line each."""
        return (str(self),)


class FormatError(MergeError):
    """A checkpoint on disk is not what it says it is, or is of a kind that cannot be merged."""


class MappingError(MergeError):
    """The two checkpoints do not belong together: shapes, layers or ancestry differ."""


class RecipeError(MergeError):
    """An option is out of range or does not go with another."""


class DeclarationError(MergeError):
    """A family that the user declares, with --arch, cannot be read or used."""


class ConfigError(RecipeError):
    """A recipe file asks for things that cannot be done; all of them, a line each."""

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__("; ".join(lines))
        self._lines = tuple(lines)

    @property
    def lines(self) -> tuple[str, ...]:
        """Each thing on its own."""
        return self._lines


class OutputError(MergeError):
    """The output cannot be written where it was asked for."""


class HubError(MergeError):
    """A repository of the Hub cannot be read: not there, not allowed, or not what it said."""


class DigestError(HubError):
    """Bytes are not those that the Hub has a digest of."""


class PromptError(MergeError):
    """A prompt set, or a set of recorded answers, cannot be read or used."""


class SearchError(MergeError):
    """A search found nothing to go by."""


class PushError(MergeError):
    """The Hub cannot take the output, or did not; what lies on disk is unharmed."""


class PlacementError(MergeError):
    """The model does not fit into the memory there is."""


def first_line(error: BaseException) -> str:
    """What another library's error says, cut to one line."""
    return (str(error).strip().splitlines() or [repr(error)])[0]
