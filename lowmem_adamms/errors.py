"""The errors a user can mend. The CLI turns each into one line and exit code 2.

Anything else that is raised is a bug of ours and keeps its traceback.
"""

from __future__ import annotations


class MergeError(Exception):
    """Base of all errors that name something the user can change."""


class FormatError(MergeError):
    """A checkpoint on disk is not what it says it is, or is of a kind that cannot be merged."""


class MappingError(MergeError):
    """The two checkpoints do not belong together: shapes, layers or ancestry differ."""


class RecipeError(MergeError):
    """An option is out of range or does not go with another."""


class OutputError(MergeError):
    """The output cannot be written where it was asked for."""


class PromptError(MergeError):
    """A prompt set, or a set of recorded answers, cannot be read or used."""


class PushError(MergeError):
    """The Hub cannot take the output, or did not; what lies on disk is unharmed."""


class PlacementError(MergeError):
    """The model does not fit into the memory there is."""


def first_line(error: BaseException) -> str:
    """What another library's error says, cut to one line."""
    return (str(error).strip().splitlines() or [repr(error)])[0]
