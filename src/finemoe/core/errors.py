"""The errors a user can cause. Each message names the field, the value and the fix.

The command line prints the message and ends with status 2; `--debug` adds the traceback.
Anything that is not a FinemoeError is a defect of ours.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path


class FinemoeError(Exception):
    """A mistake that the user can mend. The message is one or two plain sentences."""

    everywhere: bool = False
    """All processes of a run met it together: one of them says it."""


class ConfigError(FinemoeError):
    """An unknown key, an impossible value or combination in a recipe, preset or override."""


class DataError(FinemoeError):
    """A corpus, tokenizer or shard that cannot be read, is empty, or is damaged."""


class RunError(FinemoeError):
    """A run directory that cannot be used: foreign, incomplete, unwritable."""


class CheckpointError(RunError):
    """No undamaged checkpoint, or one that does not fit the model."""


class TrainingError(FinemoeError):
    """Training cannot go on: a non-finite loss or gradient. The last good state is kept."""


class OutageError(FinemoeError):
    """Something elsewhere that a run needs does not answer, or no longer as it must. What was trained is saved."""


@contextlib.contextmanager
def named(where: Path | str) -> Iterator[None]:
    """Put `where` before the messages of what knows no paths.

    Raises:
        CheckpointError: as raised inside.
    """
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from error
