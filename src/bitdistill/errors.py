"""Typed errors. Each says the place, the value and the remedy in one line, and carries its exit code.

Exit codes (documented in docs/cli.md):

====  =====================================================================
0     success
1     a bug in bitdistill (a traceback is printed: please report it)
2     wrong command-line usage
3     the recipe is not valid
4     the data are not usable
5     the model is not usable (unsupported, mismatched, malformed)
6     an artifact or checkpoint is corrupt or belongs to another recipe
7     the file system refused (disk full, no permission)
8     training diverged (NaN, Inf or a spike that could not be skipped)
9     an optional dependency is missing
10    one of several training processes ended too early
130   interrupted by SIGINT after saving a checkpoint
143   interrupted by SIGTERM after saving a checkpoint
====  =====================================================================
"""

from __future__ import annotations


class BitDistillError(Exception):
    """Base of every error a user can cause and mend; printed as one line, without a traceback."""

    exit_code = 1


class UsageError(BitDistillError):
    """Options that contradict each other, or a value that an option does not take."""

    exit_code = 2


class RecipeError(BitDistillError):
    """The recipe is not valid: unknown key, wrong type, values that contradict each other."""

    exit_code = 3


class DataError(BitDistillError):
    """The data cannot be used: missing file, bad row (named by file and line), label out of range."""

    exit_code = 4


class ModelError(BitDistillError):
    """The model cannot be used: unsupported family, tokenizer mismatch, shapes that do not fit."""

    exit_code = 5


class ArtifactError(BitDistillError):
    """A student, ternary base or checkpoint is corrupt or was made by another recipe."""

    exit_code = 6


class StorageError(BitDistillError):
    """The file system refused a read or write: disk full, permission, input/output error."""

    exit_code = 7


class DivergenceError(BitDistillError):
    """Training met NaN, Inf or a spike and was configured to stop."""

    exit_code = 8


class MissingDependencyError(BitDistillError):
    """An optional package is needed; the message holds the pip command."""

    exit_code = 9


class ReplicaError(BitDistillError):
    """One of the processes that train copies of a model ended too early; checkpoints are kept."""

    exit_code = 10


class Interrupted(BitDistillError):
    """A signal asked to stop; a checkpoint was saved. exit_code is 128 + signal number."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number
