"""An array that need not fit in memory: it is written to a file and read through a memory map."""

import mmap
import tempfile

import numpy as np


class DiskArray:
    """A one-dimensional array that ``append`` extends; ``array`` reads it.

    The file lies in the directory for temporary files (``TMPDIR``) and has no name: its space is freed when the array
    is garbage-collected or the process ends, however it ends.
    """

    def __init__(self, dtype: type | np.dtype):
        self.dtype = np.dtype(dtype)
        self._file = tempfile.TemporaryFile(prefix="jaxlm-", buffering=0)  # noqa: SIM115  (open as long as the array)

    def append(self, values: np.ndarray) -> None:
        """Appends values.

        Raises:
          OSError: when the disk is full; the message names its directory.
        """
        rest = np.ascontiguousarray(values, self.dtype).view(np.uint8).data
        try:
            while rest:  # a disk that is almost full takes a part
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise OSError(
                error.errno,
                f"{error.strerror}: {tempfile.gettempdir()!r} has no room for encoded text, of which it holds "
                f"{self._size:,} bytes; make room, or set the environment variable TMPDIR to another disk",
            ) from error

    @property
    def _size(self) -> int:
        return self._file.seek(0, 2)

    def array(self) -> np.ndarray:
        """All values, read-only; pages are read from the file when they are accessed."""
        if not self._size:
            return np.empty(0, self.dtype)
        return np.frombuffer(mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ), self.dtype)
