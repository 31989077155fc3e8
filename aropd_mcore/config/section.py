"""Base class of the sections of a configuration, and types of their settings."""

from typing import Annotated, Any, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationInfo,
    WrapValidator,
    field_validator,
)

Positive = Annotated[int, Field(gt=0)]
Ratio = Annotated[float, Field(ge=0, le=1)]
Ratios = Annotated[list[Ratio], Field(min_length=1)]


class ConfigError(ValueError):
    """Error in a run's configuration; the message names the key, the value and the remedy."""


def by_type(kind: Any, its_type: Any, other_type: Any) -> WrapValidator:
    """Validate values of `kind` as `its_type` and others as `other_type`.

    A plain union reports the errors of all its types.
    """

    ours, others = TypeAdapter(its_type), TypeAdapter(other_type)
    return WrapValidator(
        lambda value, _: (ours if isinstance(value, kind) else others).validate_python(value)
    )


class Section(BaseModel):
    """Base class of a configuration's sections; an instance is immutable."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _check_yaml_value(cls, value: Any, info: ValidationInfo) -> Any:
        """Give an empty section its defaults, and keep booleans and numbers apart.

        Pydantic by itself accepts 1, "yes" and "on" as true, and true as 1.
        """
        assert info.field_name is not None
        annotation = cls.model_fields[info.field_name].annotation
        if value is None and isinstance(annotation, type) and issubclass(annotation, Section):
            return {}
        if annotation is bool and not isinstance(value, bool):
            raise ValueError(f"expected true or false, found {value!r}")
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, bool) and _accepts_numbers(annotation):
                raise ValueError(f"expected a number, found {str(item).lower()}")
        return value


def _accepts_numbers(annotation: Any) -> bool:
    parts = get_args(annotation)
    return annotation in (int, float) or any(type(p) is int or _accepts_numbers(p) for p in parts)
