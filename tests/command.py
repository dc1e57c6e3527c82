"""Running a command of ours within the test's own process."""

from __future__ import annotations

from lowmem_adamms.cli import main


def run(*words: object) -> int:
    """The exit code of a command, wherever it comes from."""
    try:
        return main([str(word) for word in words])
    except SystemExit as end:
        assert isinstance(end.code, int)
        return end.code
