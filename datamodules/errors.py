"""Errors of examples and sources, and their texts."""


class ExampleError(ValueError):
    """An example cannot be used. `on_error` of the DataModule decides whether the run ends or leaves it out."""


def reason_of(error: Exception) -> str:
    """The text of any exception in messages about an example. A `ValueError` says what is wrong in words; the messages
    of other exceptions are not clear without their type ("KeyError: 'text'")."""
    text, name = str(error), type(error).__name__
    if isinstance(error, OSError) and error.strerror:  # without the number of the error
        text = error.strerror + (f": {str(error.filename)!r}" if error.filename else "")
    if not text:
        return name
    return text if isinstance(error, ExampleError) or type(error) is ValueError else f"{name}: {text}"


class SourceError(RuntimeError):
    """The run cannot continue: an example that was read when it was measured cannot be read now, or is another one."""
