"""An array that need not fit in memory: it grows in a file and is read through a memory map."""

import mmap
import tempfile

import numpy as np


class Growing:
    """One-dimensional, and longer with every ``append``; ``array`` is what it has become.

    The file lies in the directory for temporary files (``TMPDIR``) and has no name: its space is free again when the
    array is forgotten or the process ends, however it ends.
    """

    def __init__(self, dtype: type | np.dtype):
        self.dtype = np.dtype(dtype)
        self._file = tempfile.TemporaryFile(prefix="jaxlm-", buffering=0)  # noqa: SIM115  (open as long as the array)

    def append(self, values: np.ndarray) -> None:
        """Writes values behind those that are there.

        Raises:
          OSError: when the disk is full, saying which one.
        """
        rest = np.ascontiguousarray(values, self.dtype).view(np.uint8).data
        try:
            while rest:  # what is almost full takes a part
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise OSError(
                error.errno,
                f"{error.strerror}: {tempfile.gettempdir()!r} has no room for encoded text, of which {self._size:,} "
                f"bytes lie there; make room, or set the environment variable TMPDIR to a directory on a larger disk",
            ) from error

    @property
    def _size(self) -> int:
        return self._file.seek(0, 2)

    def array(self) -> np.ndarray:
        """Everything, read-only; pages are read from the file when they are looked at."""
        if not self._size:
            return np.empty(0, self.dtype)
        return np.frombuffer(mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ), self.dtype)
