"""The tree of errors.

    DsiprepError              shown as one sentence, exit code 1
    ├── InputError            a file or argument cannot be used: missing, truncated, wrong shape, NaN
    │   ├── GradientError     b-values or b-vectors missing, mismatched or impossible
    │   └── MetadataError     a BIDS sidecar lacks a field, or contradicts another
    ├── SettingsError         an option, or a combination of options, that cannot work (exit code 2)
    ├── EngineError           a third-party program is missing, lacks a licence or memory, or failed
    └── OutputError           the output cannot be written: disk full, no permission, inside the input

Every message states what was found, what is wanted and what to do.
"""


def printable(text: object) -> str:
    """A path or message on one line, with characters that are not UTF-8 or not printable as escapes."""
    decoded = str(text).encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in decoded)


class DsiprepError(Exception):
    """Base of all errors that are shown to the user as one sentence, without a traceback."""

    def __str__(self) -> str:
        return printable(super().__str__())


class InputError(DsiprepError):
    """An input file or argument cannot be used."""


class GradientError(InputError):
    """The b-values or b-vectors cannot be used."""


class MetadataError(InputError):
    """A BIDS sidecar lacks a required field or contradicts another one."""


class SettingsError(DsiprepError):
    """A setting, or a combination of settings, cannot work."""


class EngineError(DsiprepError):
    """A third-party program (TORTOISE, FreeSurfer, ANTs) cannot run or failed."""


class OutputError(DsiprepError):
    """The results cannot be written."""
