"""What can go wrong, as a tree.

    DsiprepError              shown as one sentence, exit code 1
    ├── InputError            a file cannot be used: missing, truncated, wrong shape, NaN
    │   ├── GradientError     b-values or b-vectors missing, mismatched or impossible
    │   └── MetadataError     a BIDS sidecar lacks a field, or contradicts another
    ├── SettingsError         an option, or a combination of options, that cannot work (exit code 2)
    ├── EngineError           a program that was asked for is missing, lacks licence or memory, or failed
    └── OutputError           the output cannot be written: no space, no right, inside the input

Every message says what was found, what was wanted, and what to do.
"""


class DsiprepError(Exception):
    """Base of every error that is shown to people as a sentence, without a traceback."""


class InputError(DsiprepError):
    """An input file cannot be used."""


class GradientError(InputError):
    """The b-values or b-vectors cannot be used."""


class MetadataError(InputError):
    """A BIDS sidecar lacks what is needed."""


class SettingsError(DsiprepError):
    """The options cannot work, or cannot work together."""


class EngineError(DsiprepError):
    """A program that people own (TORTOISE, FreeSurfer, ANTs) cannot do what it was asked for."""


class OutputError(DsiprepError):
    """The results cannot be written where they were asked for."""
