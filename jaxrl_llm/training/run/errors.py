"""What can stop a run, each as one sentence a person can act on."""


class TrainingError(RuntimeError):
    """A run cannot start or go on; the message says why and what to do."""


class StorageError(TrainingError):
    """A file or folder of the run cannot be written or read."""


class ChangedSettingsError(TrainingError):
    """A run was resumed with settings other than those it started with."""


class NonFiniteError(TrainingError):
    """Too many updates in a row had a loss or gradient that is not finite."""
