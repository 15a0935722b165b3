"""The base class of sources of examples. To train on data of your own, derive from `Source`."""

import hashlib
import pickle
from abc import ABC, abstractmethod

from torch.utils.data import Dataset

from ..example import Example
from ..limits import Limits


class Source(Dataset, ABC):
    """Examples by number. Every rank of a pipeline reads each example, so reading one must not open media files.

    Attributes:
        limits: what its examples may have at most.
    """

    limits = Limits()

    @property
    def name(self) -> str:
        """What errors and logs call it."""
        return type(self).__name__

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Example:
        """The example with a number.

        Raises:
            ExampleError: the data cannot be read as an example.
        """

    def origin(self, index: int) -> int:
        """The number by which errors call an example: that in the whole data, if this source has a part of them."""
        return index

    def fingerprint(self) -> str | None:
        """A text that changes whenever the data does. With it, the measurements of an earlier run are used again.

        ``None`` (the default): examples are measured in every run.
        """
        return None

    def identity(self) -> str:
        """A text that is different for different sources: by default a hash of the class and of all attributes."""
        state = pickle.dumps((type(self).__qualname__, len(self), self.__dict__))
        return hashlib.sha256(state).hexdigest()
