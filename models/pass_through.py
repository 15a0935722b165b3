"""What stands in for a module that was dropped from a model."""

from typing import Any

from torch import nn


class PassThrough(nn.Module):
    """Stands in for a module that was dropped, and returns its input.

    It has the simple attributes of that module, because a decoder may read some of them (a layer's attention type).

    Attributes:
        returned: the number of values that the module returned as a tuple; 0: it returned no tuple.
    """

    def __init__(self, instead_of: nn.Module | None = None, returned: int = 0) -> None:
        super().__init__()
        for name, value in vars(instead_of).items() if instead_of is not None else ():
            if not name.startswith("_") and name != "training" and isinstance(value, str | int | float):
                setattr(self, name, value)
        self.returned = returned

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.as_returned(hidden_of(args, kwargs))

    def as_returned(self, hidden: Any) -> Any:
        """Hidden states in the form in which the module returned them."""
        return (hidden, *[None] * (self.returned - 1)) if self.returned else hidden


def hidden_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The hidden states among the arguments of a layer."""
    return args[0] if args else kwargs["hidden_states"]
