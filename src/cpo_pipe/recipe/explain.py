"""One-line explanations of invalid recipes."""

from collections.abc import Collection, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import ValidationError

from cpo_pipe.data.config import Section
from cpo_pipe.data.registry import Registry
from cpo_pipe.data.text import abridged, listed, nearest
from cpo_pipe.recipe.other_names import OTHER_NAMES
from cpo_pipe.recipe.recipe import Recipe

NOT_A_SECTION = ("model_type", "dict_type")


def explain(error: ValidationError, content: Any) -> list[str]:
    """Return the rules that a recipe's content breaks, each as one line."""
    details = [one for one in error.errors(include_url=False) if one["type"] != "default_factory_not_called"]
    paths = [tuple(follow(detail["loc"], content)[0]) for detail in details]
    not_sections = [path for path, one in zip(paths, details, strict=True) if one["type"] in NOT_A_SECTION]
    lines: dict[str, None] = {}
    for path, detail in zip(paths, details, strict=True):
        if not any(_explained(path, detail, *other) for other in zip(paths, details, strict=True)):
            lines[_explain(path, detail, content, path in not_sections)] = None
    return [*lines]


def _explained(path: tuple[str, ...], detail: Any, other_path: tuple[str, ...], other: Any) -> bool:
    """Return whether another broken rule explains this one.

    An unknown key explains what is missing beside it. Of a union's branches the one that was followed furthest is the
    one that was meant.
    """
    if detail is other:
        return False
    if detail["type"] == "missing" and other["type"] == "extra_forbidden":
        return path[:-1] == other_path[:-1]
    if path == other_path:
        return detail["type"] in NOT_A_SECTION and other["type"] not in NOT_A_SECTION
    return path == other_path[: len(path)]


def _explain(path: Sequence[str], detail: Any, content: Any, or_section: bool) -> str:
    """Return a broken rule as one line; `or_section`: a section can also stand there."""
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
    other = " or a section" if or_section else ""
    return f"{where} is {shown(detail['input'])}: {message[0].lower()}{message[1:]}{other}"


def _unknown(key: str, section: type[Section], registry: Registry[Any] | None) -> str:
    """Return what to say behind the path of a key that a section does not have."""
    if registry is not None:
        users = [name for name in registry if key in registry[name].model_fields]
        name = next((name for name in registry if registry[name] is section), None)
        if users and name is not None:
            return f': not used by {registry.kind} "{name}" (but by {listed(users)}); remove it'
    known = list(section.model_fields)
    below = [f"{name}.{key}" for name in known if key in _keys_of(section.model_fields[name].annotation)]
    hint = f"use {OTHER_NAMES[key]}" if key in OTHER_NAMES else f"use {below[0]}" if below else nearest(key, known)
    return f" is not a known key; {hint or f'known are {listed(known)}'}"


def _keys_of(kind: Any) -> Collection[str]:
    """Return the keys of the section that a field takes; none of a field that takes none."""
    sections = [one for one in members(kind) if isinstance(one, type) and issubclass(one, Section)]
    return sections[0].model_fields if sections else ()


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
