"""What can go wrong, in the user's words.

Every error a user can cause is a `StreamlineError`: one message that says what was wrong, what we got and what would
do. The command line prints the message alone and leaves with `exit_code`; a traceback means a defect of ours.
"""


class StreamlineError(Exception):
    """Anything we refuse or cannot do, explained in one message."""

    exit_code = 2


class ConfigError(StreamlineError):
    """A recipe or an option is wrong: unknown key, impossible value, two options that exclude each other."""


class SourceError(StreamlineError):
    """A model cannot be read: not there, corrupt, truncated, pickled, or not a causal language model."""


class ArchitectureError(StreamlineError):
    """The model's architecture cannot be edited soundly; the message gives the reason."""


class TextError(StreamlineError):
    """A text source cannot be read or does not hold enough text."""


class NoDataError(TextError):
    """Not one token reached the place where it was needed."""


class PlanError(StreamlineError):
    """A plan is malformed, or does not fit the model it is applied to."""


class MethodNotFoundError(ConfigError):
    """No method of that name."""


class TaskError(StreamlineError):
    """An evaluation task or a log of one cannot be used."""


class NumericsError(StreamlineError):
    """Not-a-number or infinite values where finite ones are needed; the message names the place."""


class OutOfMemoryError(StreamlineError):
    """There is not memory enough, and nothing left that could be made smaller."""


class OutputError(StreamlineError):
    """A result cannot be written: the folder is not ours, not writable, or the disk is full."""


class MissingExtraError(StreamlineError):
    """An optional package is needed for this; the message names the extra to install."""


class ProofError(StreamlineError):
    """A saved checkpoint does not behave like the model in memory. The run failed; the input was fine."""

    exit_code = 1
