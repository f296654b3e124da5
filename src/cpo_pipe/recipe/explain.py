"""One-line explanations of invalid recipes."""

from collections.abc import Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import ValidationError

from cpo_pipe.data.config import Section
from cpo_pipe.data.registry import Registry
from cpo_pipe.data.text import abridged, listed, nearest
from cpo_pipe.recipe.recipe import Recipe

NOT_A_SECTION = ("model_type", "dict_type")


def explain(error: ValidationError, content: Any) -> str:
    """Return the first rule that a recipe's content breaks, as one line."""
    # An unknown key explains what is missing beside it. Else, of a union's branches the one that was followed
    # furthest is the one that was meant.
    details = [one for one in error.errors(include_url=False) if one["type"] != "default_factory_not_called"]
    not_sections = [follow(detail["loc"], content)[0] for detail in details if detail["type"] in NOT_A_SECTION]
    detail = max(
        details,
        key=lambda detail: (
            detail["type"] == "extra_forbidden", len(detail["loc"]), detail["type"] not in NOT_A_SECTION
        ),
    )  # fmt: skip
    path, _, _ = follow(detail["loc"], content)
    where = dotted(path)
    if detail["type"] == "extra_forbidden":
        return f"{where}{_unknown(path[-1], *follow(detail['loc'][:-1], content)[1:])}"
    if detail["type"] == "missing":
        return f"{where} is missing"
    if detail["type"] in NOT_A_SECTION:
        return f"{where} is {shown(detail['input'])}: must be a section, that is keys with values"
    message = abridged(detail["msg"].removeprefix("Value error, "), 1000)
    if detail["type"] == "value_error" and message.startswith("must be a section"):  # of a registry
        return f"{where} is {shown(detail['input'])}: {message}"
    if detail["type"] == "value_error":
        return f"{where}: {message}" if where else message
    other = " or a section" if path in not_sections else ""
    return f"{where} is {shown(detail['input'])}: {message[0].lower()}{message[1:]}{other}"


def _unknown(key: str, section: type[Section], registry: Registry[Any] | None) -> str:
    """Return what to say behind the path of a key that a section does not have."""
    if registry is not None:
        users = [name for name in registry if key in registry[name].model_fields]
        name = next((name for name in registry if registry[name] is section), None)
        if users and name is not None:
            return f': not used by {registry.kind} "{name}" (but by {listed(users)}); remove it'
    known = list(section.model_fields)
    return f" is not a known key; {nearest(key, known) or f'known are {listed(known)}'}"


def shown(value: Any) -> str:
    """Return a value as a message shows it."""
    return "empty" if value is None else abridged(repr(value))


def dotted(path: Sequence[str]) -> str:
    """Return a path of keys as a message shows it."""
    return ".".join(map(abridged, path))


def follow(location: Sequence[int | str], value: Any) -> tuple[list[str], Any, Registry[Any] | None]:
    """Return what a location in pydantic's sense leads to: the path as the user wrote it, the type there, its registry.

    Pydantic puts the branch of a union (a class name, `str`, `literal[...]`) into a location.

    Args:
        location: the location, in a recipe.
        value: the content of the recipe; it says which class of a registry a section is.
    """
    path: list[str] = []
    kind: Any = Recipe
    registry: Registry[Any] | None = None
    for part in map(str, location):
        branches = members(kind)
        if len(branches) > 1:
            kind = next((branch for branch in branches if getattr(branch, "__name__", "") == part), None)
            continue
        if part != "[key]":
            path.append(part)
        if isinstance(value, list):
            value = value[int(part)] if part.isdecimal() and int(part) < len(value) else None
        else:
            value = value.get(part) if isinstance(value, dict) else None
        kind, registries = branches[0], []
        if isinstance(kind, type) and issubclass(kind, Section):
            field = kind.model_fields.get(part)
            kind, registries = (field.annotation, field.metadata) if field else (None, [])
        else:
            kind = next(reversed(get_args(kind)), None)  # of a mapping or a list: what is in it
        if len(inner := members(kind)) == 1:  # of an optional section
            kind = inner[0]
        if get_origin(kind) is Annotated:
            kind, *registries = get_args(kind)
        registry = next((found for found in registries if isinstance(found, Registry)), None)
        if registry is not None:
            kind = registry.class_of(value, part)
    branches = members(kind)
    return path, branches[0] if len(branches) == 1 else kind, registry


def members(kind: Any) -> list[Any]:
    """Return the members of a union without None; of another type, the type alone."""
    if get_origin(kind) in (Union, UnionType):
        return [branch for branch in get_args(kind) if branch is not NoneType]
    return [kind]
