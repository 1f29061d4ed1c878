"""Bodies of requests: strict, and with a hint at what was meant."""

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

from jaxtune.errors import nearest

UNKNOWN = "unknown_parameter"  # the kind of error that a key brings which does not exist


class Body(BaseModel):
    """What a client sends as JSON. A key that does not exist is refused, and the nearest one that does is named.

    >>> class Point(Body):
    ...     x: int
    >>> Point.model_validate({"x": 1}).x
    1
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known(cls, given: Any) -> Any:
        if isinstance(given, dict):
            for key in given:
                if key not in cls.model_fields:
                    hint = nearest(str(key), sorted(cls.model_fields))
                    raise PydanticCustomError(UNKNOWN, "{key}{hint}", {"key": str(key), "hint": hint})
        return given


def _storable(text: str) -> str:
    """What a database takes, and what an answer can say again."""
    if "\x00" in text:
        raise PydanticCustomError("string_nul", "must not hold NUL characters")
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise PydanticCustomError("string_unicode", "must be Unicode, without halves of surrogate pairs")
    return text


Text = Annotated[str, AfterValidator(_storable)]
