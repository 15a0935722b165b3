"""Python code that comes with a pretrained model or processor. It runs only if the user asks for it.

This file does not import transformers, whose module is passed to it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class RemoteCodeError(ValueError):
    """Something pretrained cannot be used without code of its own."""


@contextmanager
def without_asking(what: str, remedy: str, library: Any) -> Iterator[None]:
    """A block in which transformers does not ask on the terminal whether to run code, but refuses.

    To pass ``trust_remote_code=False`` to the library is not enough: it loses the argument on some of its ways, and
    then asks on every rank, and waits.

    Args:
        what: what errors call the model or processor.
        remedy: what a user who trusts the code has to do.
        library: the module `transformers.dynamic_module_utils`.

    Raises:
        RemoteCodeError: it needs code of its own, which the call in the block was not told to trust.
    """
    seconds = library.TIME_OUT_REMOTE_CODE
    library.TIME_OUT_REMOTE_CODE = 0  # for how long it waits for an answer; 0: it does not ask
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise RemoteCodeError(
            f"{what} needs Python code of its own (auto_map in its config), which could do anything, and does not run "
            f"by default. If you have read this code and trust it, {remedy}"
        ) from error
    finally:
        library.TIME_OUT_REMOTE_CODE = seconds
