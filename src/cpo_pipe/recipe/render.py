"""A recipe as commented YAML: every key with its meaning, those left at their default commented out."""

import textwrap
from collections.abc import Iterator
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from cpo_pipe.data.config import Section
from cpo_pipe.data.registry import Registry
from cpo_pipe.eval.judges.registry import JUDGES
from cpo_pipe.pipeline.negatives.registry import STRATEGIES
from cpo_pipe.pipeline.prepare.presets import PRESETS
from cpo_pipe.pipeline.scorers import FILTERS, SCORERS
from cpo_pipe.recipe.recipe import Recipe
from cpo_pipe.trainer.objectives import OBJECTIVES

WIDTH = 110
REGISTRIES: tuple[Registry[Any], ...] = (PRESETS, OBJECTIVES, STRATEGIES, SCORERS, FILTERS, JUDGES)
_WHOLE_WORDS: Any = {"break_on_hyphens": False, "break_long_words": False}


class _Dumper(yaml.SafeDumper):
    """Writes a text with line breaks between double quotes: of all styles only that keeps it on one line."""


def _represent(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = '"' if set(text) & set("\n\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _represent)


def recipe_text(recipe: Recipe, *, named: bool = True, full: bool = True) -> str:
    """Return YAML that `load_recipe` reads back as the same recipe.

    Args:
        recipe: the recipe.
        named: write its name; without, it is called as the file that it is in.
        full: write every key with its meaning, those left at their default commented out; else only the keys that the
            recipe sets, each on one line where it fits, with the first words of its meaning.
    """
    if not named:
        recipe = Recipe.model_construct(recipe.model_fields_set - {"name"}, **dict(recipe))
    return "\n".join(_section(recipe, 0) if full else _short_section(recipe, 0)) + "\n"


def _short_section(section: Section, depth: int) -> Iterator[str]:
    """Yield the keys that a section sets."""
    for name, field in type(section).model_fields.items():
        if name in section.model_fields_set:
            meaning = (field.description or "").partition("; ")[0].partition(" (")[0]
            comment = "" if meaning.startswith("`") else f"  # {meaning}"  # that would be the first of several choices
            yield from _short_entry(name, getattr(section, name), depth, comment)


def _short_entry(name: str, value: Any, depth: int, comment: str = "") -> Iterator[str]:
    """Yield a key with its value: on one line where it fits, unless it is a top-level section."""
    pad = "  " * depth
    line = f"{pad}{name}: {inline(value)}"
    if len(line) <= WIDTH and not (depth == 0 and isinstance(value, Section | dict) and _plain(value)):
        yield line + comment if len(line + comment) <= WIDTH else line
    elif isinstance(value, str):
        yield from _entry(name, value, depth, with_defaults=False)
    else:
        yield f"{pad}{name}:{comment}"
        if isinstance(value, Section):
            yield from _short_section(value, depth + 1)
        elif isinstance(value, dict):
            for key, item in value.items():
                yield from _short_entry(inline(key), item, depth + 1)
        else:
            yield from (f"{pad}  - {inline(item)}" for item in value)


def _section(section: Section, depth: int, with_defaults: bool = True) -> Iterator[str]:
    pad = "  " * depth
    for name, field in type(section).model_fields.items():
        value, given = getattr(section, name), name in section.model_fields_set
        if not given and not with_defaults:
            continue
        if not depth:
            yield ""
        yield from textwrap.wrap(_comment(field), WIDTH, initial_indent=f"{pad}# ", subsequent_indent=f"{pad}# ")
        if with_defaults:
            yield from (f"{pad}#   {choice}" for choice in _choices(section, name))
        if given:
            yield from _entry(name, value, depth, with_defaults)
        else:
            nested = [*_unset(field.annotation)]
            yield f"{pad}# {name}: {inline(value)}{'  # or a section:' * bool(nested)}"
            yield from (f"{pad}# {line}" for line in nested)


def _unset(annotation: Any) -> Iterator[str]:
    """Yield the keys of the section that a key without a value may have, as an example that is indented by a level."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        for name, field in annotation.model_fields.items():
            yield from textwrap.wrap(_comment(field), WIDTH, initial_indent="  # ", subsequent_indent="  # ")
            default = field.get_default(call_default_factory=True, validated_data={})
            yield f"  {name}:" if default is PydanticUndefined else f"  {name}: {inline(default)}"
            yield from (f"  {line}" for line in _unset(field.annotation))
    elif get_origin(annotation) is dict:
        if nested := [*_unset(get_args(annotation)[1])]:
            yield "  NAME:"
            yield from (f"  {line}" for line in nested)
    elif get_origin(annotation) in (Annotated, Union, UnionType):
        yield from next(filter(None, ([*_unset(part)] for part in get_args(annotation))), [])


def _entry(name: str, value: Any, depth: int, with_defaults: bool) -> Iterator[str]:
    pad = "  " * depth
    if isinstance(value, Section) and value.model_fields_set:
        yield f"{pad}{name}:"
        yield from _section(value, depth + 1, with_defaults)
    elif isinstance(value, dict) and any(isinstance(item, Section) for item in value.values()):
        yield f"{pad}{name}:"
        described: set[type] = set()
        for key, item in value.items():
            # The settings left at their default are listed once for each class of sections.
            yield from _entry(inline(key), item, depth + 1, with_defaults and type(item) not in described)
            described.add(type(item))
    elif isinstance(value, dict) and len(f"{pad}{name}: {inline(value)}") > WIDTH:
        yield f"{pad}{name}:"
        for key, item in value.items():
            yield from _entry(inline(key), item, depth + 1, with_defaults=False)
    elif isinstance(value, str) and len(value) > WIDTH and _is_prose(value):
        yield f"{pad}{name}: >-"
        yield from textwrap.wrap(value, WIDTH, initial_indent=f"{pad}  ", subsequent_indent=f"{pad}  ", **_WHOLE_WORDS)
    else:
        yield f"{pad}{name}: {inline(value)}"


def _choices(section: Section, key: str) -> Iterator[str]:
    """Yield the names that a registry's key may have, with what they mean."""
    for registry in REGISTRIES:
        if registry.key == key and isinstance(section, registry.base):
            yield from (f"{name}: {registry.description(name)}" for name in registry)


def _is_prose(text: str) -> bool:
    """Whether YAML's folded style keeps it unchanged."""
    return text.isprintable() and " ".join(text.split()) == text


def _comment(field: FieldInfo) -> str:
    required = field.default is PydanticUndefined and field.default_factory is None
    return f"{field.description}{' (required)' if required else ''}"


def inline(value: Any) -> str:
    """Return a value as YAML on one line, without line breaks in texts; JSON's 1e-05 would be read back as text."""
    value = _plain(value)
    dumped = yaml.dump(value, None, _Dumper, default_flow_style=True, width=10_000, allow_unicode=True, sort_keys=False)
    return dumped.removesuffix("\n").removesuffix("\n...")


def _plain(value: Any) -> Any:
    """What YAML knows, of sections what was given."""
    if isinstance(value, Section):
        return value.model_dump(mode="json", exclude_unset=True)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value
