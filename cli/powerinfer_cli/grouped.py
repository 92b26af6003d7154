"""Options in groups: a command's parameter may be a dataclass whose fields are options.

Commands share groups (``Sampling``, ``Placement`` …) instead of repeating long parameter lists. A field is an
option exactly as a parameter of a typer function is: ``name: Annotated[type, typer.Option(...)] = default``.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, get_type_hints


def flattened(command: Callable[..., Any]) -> Callable[..., Any]:
    """``command`` as typer can read it: each dataclass parameter replaced by its fields, all keyword-only."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)}

    @functools.wraps(command)
    def call(**values: Any) -> Any:
        for name, group in groups.items():
            fields = [field.name for field in dataclasses.fields(group)]
            values[name] = group(**{field: values.pop(field) for field in fields})
        return command(**values)

    parameters = list(_flat_parameters(command, hints))
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # inspect's own hook
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    del call.__wrapped__  # or the original signature would be found first
    return call


def _flat_parameters(command: Callable[..., Any], hints: dict[str, Any]) -> Iterator[inspect.Parameter]:
    """Parameters of ``command`` with groups spread out, in order of declaration."""
    keyword = inspect.Parameter.KEYWORD_ONLY
    for parameter in inspect.signature(command).parameters.values():
        hint = hints[parameter.name]
        if not dataclasses.is_dataclass(hint):
            yield parameter.replace(kind=keyword, annotation=hint)
            continue
        field_hints = get_type_hints(hint, include_extras=True)
        for field in dataclasses.fields(hint):
            missing = field.default is dataclasses.MISSING
            default = inspect.Parameter.empty if missing else field.default
            annotation = field_hints[field.name]
            yield inspect.Parameter(field.name, keyword, default=default, annotation=annotation)
