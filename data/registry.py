"""Registries: named implementations of one kind of building block, and users' own by import path.

An entry in a registry makes a class known by name; `my_package.module:Thing` in place of a name takes a user's class,
which needs no entry. The first line of a class's docstring describes it. Most blocks are a `Section` whose settings
stand in the recipe beside its name, for example `objective: dpo, beta: 0.1`; their class declares the settings and
implements the block.
"""

import importlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any, Generic, TypeVar

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from cpo_pipe.data.config import Section
from cpo_pipe.data.errors import cause
from cpo_pipe.data.text import abridged, listed, nearest

Base = TypeVar("Base")
Block = TypeVar("Block", bound=Section)


class ClassRegistry(Generic[Base]):
    """Classes by name.

    Args:
        kind: what they are, for messages: `engine`.
        base: the class that all of them, also users' own, derive from.
        entries: the classes of this package, by name.
        others: what other tools call them, with our names.
    """

    def __init__(
        self, kind: str, base: type[Base], entries: Mapping[str, type[Base]], others: Mapping[str, str] | None = None
    ):
        self.kind, self.base, self.entries, self.others = kind, base, dict(entries), dict(others or {})

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def description(self, name: str) -> str:
        """Return the first line of a class's docstring."""
        return (self[name].__doc__ or "").strip().partition("\n")[0]

    def __getitem__(self, name: str) -> type[Base]:
        """Return the class of a name, or the one at an import path `module:Class`.

        Raises:
            ValueError: the name is unknown, the path leads to no subclass of the base, or the class is incomplete; the
                message is one line.
        """
        found = self.entries[name] if name in self.entries else self._imported(name)
        if inspect.isabstract(found):
            missing: frozenset[str] = getattr(found, "__abstractmethods__", frozenset())
            raise ValueError(f"{self.kind} {name} is incomplete; implement {listed(sorted(missing))}")
        if unset := sorted(name for name in getattr(found, "__class_vars__", ()) if not hasattr(found, name)):
            raise ValueError(f"{self.kind} {name} is incomplete; set {listed(unset)}")
        if not (found.__doc__ or "").strip():
            raise ValueError(f"{self.kind} {name} has no docstring; describe it in one line")
        return found

    def _imported(self, name: str) -> type[Base]:
        if ":" not in name:
            hint = f"use {self.others[name]}" if name in self.others else nearest(name, self.entries)
            hint = hint or f"choose from {listed(self.entries)}, or name a class as module:Class"
            raise ValueError(f"unknown {self.kind} {abridged(repr(name))}; {hint}")
        module, _, attribute = name.partition(":")
        try:
            found = getattr(importlib.import_module(module), attribute)
        except Exception as error:  # a user's module may fail in any way
            raise ValueError(f"{self.kind} {name} cannot be imported ({cause(error)})") from error
        if not (isinstance(found, type) and issubclass(found, self.base)):
            raise ValueError(
                f"{self.kind} {name} must be a subclass of {self.base.__module__}.{self.base.__qualname__}"
            )
        return found


class Registry(ClassRegistry[Block]):
    """Sections by the name in one of their keys.

    Args:
        kind: what they are, for messages: `objective`.
        key: the key of a recipe that names one.
        base: the class that all of them, also users' own, derive from.
        entries: the classes of this package, by name.
        default: the name of the class of a mapping that names none; the class must have it as the key's default.
        others: what other tools call them, with our names.
    """

    def __init__(
        self,
        kind: str,
        key: str,
        base: type[Block],
        entries: Mapping[str, type[Block]],
        default: str | None = None,
        others: Mapping[str, str] | None = None,
    ):
        super().__init__(kind, base, entries, others)
        self.key, self.default = key, default

    def parse(self, value: Any, default: str | None = None) -> Block:
        """Return a block of its class from a mapping with its settings.

        Args:
            value: the mapping; or a block, which is returned unchanged.
            default: the block's name where the mapping has none.

        Raises:
            ValueError: the name is missing or unknown.
            pydantic.ValidationError: a setting is invalid.
        """
        if isinstance(value, self.base):
            return value
        if not isinstance(value, dict):
            required = f", one of which is `{self.key}`" if self.default is None else ""
            raise ValueError(f"must be a section, that is keys with values{required}")
        if default is None and self.default is not None and self.key not in value:
            return self.entries[self.default].model_validate(value)
        name = value.get(self.key, default)
        if name is None:
            raise ValueError(f"{self.key} is missing; choose from {listed(self.entries)}")
        if not isinstance(name, str):
            shown = abridged(repr(name))
            raise ValueError(f"{self.key} is {shown}: must be a name; choose from {listed(self.entries)}")
        return self[name].model_validate({self.key: name, **value})

    def class_of(self, value: Any, place: str) -> type[Block]:
        """Return the class that a mapping is for; where it names none, or an unknown one, the base class.

        `place` is the mapping's own key, which names the class of a mapping that is called like one.
        """
        default = self.default or place
        name = value.get(self.key, default) if isinstance(value, dict) else default
        try:
            return self[name] if isinstance(name, str) else self.base
        except ValueError:
            return self.base

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Make `Annotated[Base, registry]` a field that validates by the class named, as a discriminated union does."""
        return core_schema.no_info_plain_validator_function(
            self.parse,
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda block, info: block.model_dump(mode=info.mode, exclude_unset=info.exclude_unset), info_arg=True
            ),
        )

    def __get_pydantic_json_schema__(self, _: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Describe a block as one of the known classes, each with its name; a user's own may have any keys."""
        known = [
            {"allOf": [{"properties": {self.key: {"const": name}}}, handler(entry.__pydantic_core_schema__)]}
            for name, entry in self.entries.items()
        ]
        own = {"type": "object", "properties": {self.key: {"type": "string", "pattern": ":"}}, "required": [self.key]}
        return {"anyOf": [*known, own]}
