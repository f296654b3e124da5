"""Read a recipe from a file or a built-in name."""

import json
import os
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, get_origin

from pydantic import ValidationError

from cpo_pipe.data.errors import InputError, Problems
from cpo_pipe.data.text import abridged, listed, nearest
from cpo_pipe.recipe.explain import dotted, explain, follow, shown
from cpo_pipe.recipe.read_yaml import MAX_BYTES, MAX_DEPTH, MAX_VALUES, read_yaml
from cpo_pipe.recipe.recipe import Recipe
from cpo_pipe.recipe.smoke import SMOKE, shrink


def builtin_recipes() -> dict[str, Path]:
    """The packaged recipes, by name."""
    folder = Path(str(files("cpo_pipe.recipe"))) / "builtin"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_recipe(source: str, overrides: list[str] | None = None, scale: str | None = None) -> Recipe:
    """Read a recipe from a path or a built-in name, at one of its scales, with `section.key=value` overrides applied.

    Raises:
        InputError: the file is missing, is not YAML, or breaks a rule; the message is one line.
    """
    builtin = builtin_recipes()
    path = Path(os.path.expanduser(source))
    try:
        if not path.is_file() and source in builtin:
            path = builtin[source]
        if not path.is_file():
            near = f"did you mean {source}.yaml?" if Path(f"{path}.yaml").is_file() else ""
            near = near or nearest(source, builtin, "the built-in ")
            hint = near or f"built-in recipes: {', '.join(builtin)}"
            raise InputError(f"recipe {source}: no such file; {hint}")
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"recipe {source}: has {path.stat().st_size:,} bytes; at most {MAX_BYTES:,} are read")
        content = read_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"recipe {source}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"recipe {source}: not UTF-8 (byte {error.start}); save it as UTF-8") from error
    except ValueError as error:
        raise InputError(f"recipe {source}: {error}") from error
    if not isinstance(content, dict):
        raise InputError(
            f"recipe {source}: is {shown(content)}: must be a mapping with the sections "
            f"{', '.join(Recipe.model_fields)}"
        )
    content = json.loads(json.dumps(content))  # deepcopy would keep shared what a YAML anchor puts in several places
    content.setdefault("name", path.stem)
    if scale is not None:
        _scale(content, scale, source)
    for override in overrides or []:
        _override(content, override)
    return parse_recipe(content, source)


def parse_recipe(content: dict[str, Any], source: str) -> Recipe:
    """Validate a recipe's content; `source` is only named in messages.

    Raises:
        InputError: a rule is broken; the message names the field, its value, the rule and the fix.
    """
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise Problems([f"recipe {source}: {line}" for line in explain(error, content)]) from error


def _scale(content: dict[str, Any], scale: str, source: str) -> None:
    """Put what a scale of the recipe names in its place, and the scale's name behind the recipe's."""
    scales = content.get("scales")
    scales = scales if isinstance(scales, dict) else {}
    if scale == SMOKE and SMOKE not in scales:
        shrink(content)
        content["name"] = f"{content['name']}-{scale}"
        return
    if not isinstance(scales.get(scale), dict):
        hint = nearest(scale, [*scales, SMOKE]) or f"there are {listed(dict.fromkeys([*scales, SMOKE]))}"
        raise InputError(f"--scale {abridged(scale)}: the recipe {source} has no such scale; {hint}")
    written = 0
    for pattern, value in list(scales[scale].items()):
        where = f"recipe {source}: scales.{scale}.{abridged(pattern)}"
        for path in _matching(content, _keys(pattern, where)):
            written += _values(value)
            if written > MAX_VALUES:
                raise InputError(f"{where}: the scale writes more than {MAX_VALUES:,} values; write fewer")
            _put(content, path, value, where)
    content["name"] = f"{content['name']}-{scale}"


def _keys(path: str, where: str) -> list[str]:
    keys = path.split(".")
    if len(keys) > MAX_DEPTH:
        raise InputError(f"{where}: nested more than {MAX_DEPTH} levels deep")
    return keys


def _matching(node: Any, pattern: Sequence[str]) -> list[list[str]]:
    """The paths that a path with * means."""
    if not pattern:
        return [[]]
    first, rest = pattern[0], pattern[1:]
    keys = [first]
    if first == "*":
        keys = list(node) if isinstance(node, dict) else []
    below = {key: node.get(key) if isinstance(node, dict) else None for key in keys}
    return [[key, *path] for key in keys for path in _matching(below[key], rest)]


def _override(content: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    where = f"--set {abridged(override)}"
    if not separator or not path:
        raise InputError(f"{where}: must be section.key=value")
    try:
        value = read_yaml(text)
    except ValueError as error:
        raise InputError(f"{where}: {error}") from error
    where = f"--set {abridged(path)}"  # without the value, which may be a secret that belongs elsewhere
    _put(content, _keys(path, where), value, where)


def _values(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + sum(1 + _values(item) for item in value.values())
    return 1 + sum(map(_values, value)) if isinstance(value, list) else 1


def _put(content: dict[str, Any], path: Sequence[str], value: Any, where: str) -> None:
    """Set a key to a copy of a value; `where` is who asks for it, for messages."""
    *parents, last = path
    node: Any = content
    for depth, key in enumerate(parents):
        if isinstance(node, dict) and node and key not in node and _names_are_free(parents[:depth], content):
            above = dotted(parents[:depth])
            hint = nearest(key, node) or f"there are {listed(node)}"
            raise InputError(f"{where}: {abridged(key)} is not in {above}; {hint}")
        node = node.setdefault(key, {}) if isinstance(node, dict) else None
    if not isinstance(node, dict):
        raise InputError(f"{where}: {dotted(parents)} is not a section")
    node[last] = json.loads(json.dumps(value))  # a * puts it in several places, which later keys change one by one


def _names_are_free(path: Sequence[str], content: dict[str, Any]) -> bool:
    """Whether a path leads to a mapping whose keys are the user's own, such as `train`."""
    return get_origin(follow(path, content)[1]) is dict
