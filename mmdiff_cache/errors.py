"""The exception tree. A user's fault is one family and prints as one line, never as a traceback.

    MMDiffError(Exception)             base; `exit_code` is what the command line returns
    |-- ConfigError(ValueError)        2  a wrong argument, name, range or combination
    |-- DataError(ValueError)          2  a picture, label, prompt or data-set tree that cannot be used
    |-- BackboneError(RuntimeError)    2  weights missing, or a model that cannot be tapped
    |-- StoreError(RuntimeError)       2  a store that is missing, foreign, newer or of another identity
    |   |-- DamageError                1  bytes that do not match their record
    |   `-- StoreIncomplete            2  samples that were never finished
    |-- StorageError(OSError)          4  the file system failed under way: disk full, input/output error
    |   `-- StorageRefused             2  the chosen place cannot be used: too little room, no permission
    |-- ExtractionError(RuntimeError)  3  partitions that could not be extracted; all others are finished
    |-- ClusterError(RuntimeError)     5  the cluster was lost under way
    |   `-- ClusterRefused             2  a cluster that cannot do the work: no workers, or unfit ones
    |-- CheckpointError(RuntimeError)  2  a checkpoint that does not fit the store, the task or the code
    `-- TrainingError(RuntimeError)    1  a training whose loss is no longer a number

A message names the requirement, the value and the remedy:
`layer single.41 is not a block of flux-dev (single.0..single.37); see 'mmdiff-cache inspect STORE'`.
Arguments equal `args`, so that every error can be pickled and cross a process.
"""


class MMDiffError(Exception):
    """Base of all errors a user can act on."""

    exit_code = 2


class ConfigError(MMDiffError, ValueError):
    """A wrong argument, name, range or combination."""


class DataError(MMDiffError, ValueError):
    """A picture, label, prompt or data-set tree that cannot be used."""


class BackboneError(MMDiffError, RuntimeError):
    """Backbone weights are missing, or the model cannot be tapped."""


class StoreError(MMDiffError, RuntimeError):
    """A store is missing, foreign, newer than this code, or has another identity."""


class DamageError(StoreError):
    """Bytes in a store do not match their record."""

    exit_code = 1


class StoreIncomplete(StoreError):
    """Samples were asked for that were never finished."""


class StorageError(MMDiffError, OSError):
    """The file system failed under way: disk full, input/output error."""

    exit_code = 4


class StorageRefused(StorageError):
    """The chosen place cannot be used: too little room, no permission, a file where a folder must be."""

    exit_code = 2


class ExtractionError(MMDiffError, RuntimeError):
    """Partitions could not be extracted, again and again; all others are finished."""

    exit_code = 3


class ClusterError(MMDiffError, RuntimeError):
    """The cluster was lost under way: its scheduler or all of its workers."""

    exit_code = 5


class ClusterRefused(ClusterError):
    """A cluster cannot do the work: no scheduler, no workers, or workers that do not fit."""

    exit_code = 2


class CheckpointError(MMDiffError, RuntimeError):
    """A checkpoint does not fit the store, the task or this code."""


class TrainingError(MMDiffError, RuntimeError):
    """A training diverged: its loss is no longer a finite number."""

    exit_code = 1
