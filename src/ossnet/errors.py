"""What can go wrong, as one small tree. The command line turns each of these into one line and exit code 2.

OssnetError
├── InputError      a file, folder or value that was given: says which, why, and what to do
│   ├── VolumeError     an image or label file
│   ├── DatasetError    a data set as a whole
│   ├── ModelError      a model folder or weight file
│   └── SettingsError   a setting or an argument
└── ResourceError   memory or disk ran out; what was finished is kept
"""

from pathlib import Path


class OssnetError(Exception):
    """Base of all errors that a user can act on."""


class InputError(OssnetError, ValueError):
    """An input that cannot be used: where, why, and how to mend it.

    Args:
        where: File, folder, or name of the setting.
        reason: What is wrong, without a full stop.
        fix: What the user can do, without a full stop.
    """

    def __init__(self, where: Path | str, reason: str, fix: str) -> None:
        self.where, self.reason, self.fix = str(where), reason, fix
        super().__init__(self.where, reason, fix)  # the parts, so that the error survives a process boundary

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}. {self.fix}."


class VolumeError(InputError):
    """An image or label file that cannot be trusted."""


class DatasetError(InputError):
    """A data set that is incomplete or contradicts itself."""


class ModelError(InputError):
    """A model folder or weight file that cannot be used."""


class SettingsError(InputError):
    """A setting or argument that has no meaning here."""


class ResourceError(OssnetError):
    """Memory or disk ran out."""


def is_out_of_memory(error: BaseException) -> bool:
    """True for what Python, numpy and torch raise when memory runs out, on CPU (any system) and GPU."""
    if isinstance(error, MemoryError):
        return True
    text = str(error).lower()
    told = ("out of memory", "not enough memory", "allocate memory")
    return isinstance(error, RuntimeError) and any(words in text for words in told)
