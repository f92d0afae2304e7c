"""How every program under experiments/ begins: in large memory pages, with its flags read; help is no error."""

import os
import sys
from collections.abc import Callable
from typing import Any

HELP = {"-h", "-help", "--help", "-helpfull", "--helpfull", "-helpshort", "--helpshort", "-helpxml", "--helpxml", "-?"}


def run(main: Callable[[], Any]) -> None:
    """Reads the flags and calls `main`; what is left over on the command line is a usage error.

    absl ends with 1 after it has printed a help page; shells and build tools take that for a failure, so it is 0 here.
    """
    large_pages()
    from absl import app

    def call(arguments: list[str]) -> Any:
        if arguments[1:]:
            raise app.UsageError(f"unexpected {arguments[1:]}; options are written --config.a.b=value")
        return main()

    try:
        app.run(call)
    except SystemExit as end:
        if HELP & set(sys.argv[1:]):
            sys.exit(0)
        raise end


def large_pages() -> None:
    """Starts the program again with large pages for large allocations, where the C library is glibc; once.

    XLA's CPU back end takes the memory of every step anew. In pages of 4 KiB the kernel then spends a quarter of a
    training step on handing it out; in pages of 2 MiB next to nothing. The setting is read when a process starts, hence
    the second start, before anything slow is imported. One that is there already is left as it is.
    """
    if sys.platform != "linux" or "GLIBC_TUNABLES" in os.environ:
        return
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
