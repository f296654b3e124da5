"""Registries: named classes, classes by import path, and what is refused before it is used."""

import sys
from abc import abstractmethod
from pathlib import Path
from typing import Annotated, ClassVar

import pytest
from pydantic import Field, ValidationError

from cpo_pipe.data.config import Section
from cpo_pipe.data.registry import Registry


class Animal(Section):
    """An animal."""

    sound: ClassVar[str]
    kind: str = "dog"
    legs: int = Field(4, ge=0)

    @abstractmethod
    def speak(self) -> str:
        """Return what it says."""


class Dog(Animal):
    """A dog.

    More about dogs.
    """

    sound = "woof"
    bark: float = 1.0

    def speak(self) -> str:
        return self.sound


REGISTRY: Registry[Animal] = Registry("animal", "kind", Animal, {"dog": Dog})

USERS = """
from {module} import Animal, Dog

class Cat(Dog):
    "A cat."
    whiskers: int = 6

class Mute(Animal):
    "It says nothing."
    sound = ""

class Soundless(Animal):
    "It has no sound."
    def speak(self): return "?"

class Undescribed(Dog):
    pass

class Other:
    "No animal."
"""


class Zoo(Section):
    animals: dict[str, Annotated[Animal, REGISTRY]]


@pytest.fixture
def users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of a user's own, `my_animals`."""
    monkeypatch.setitem(sys.modules, "the_animals", sys.modules[__name__])
    (tmp_path / "my_animals.py").write_text(USERS.format(module="the_animals"))
    (tmp_path / "broken.py").write_text("raise RuntimeError('no luck\\nat all')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_animals", raising=False)


def test_a_name_and_an_import_path_give_blocks_of_their_classes(users: None) -> None:
    zoo = Zoo.model_validate({"animals": {"a": {"kind": "dog", "bark": 2}, "b": {"kind": "my_animals:Cat", "legs": 3}}})
    first, second = zoo.animals.values()
    assert first == Dog(kind="dog", bark=2.0)
    assert (type(second).__name__, second.legs, second.speak()) == ("Cat", 3, "woof")
    assert zoo.model_dump(exclude_unset=True) == {
        "animals": {"a": {"kind": "dog", "bark": 2.0}, "b": {"kind": "my_animals:Cat", "legs": 3}}
    }
    assert REGISTRY.description("dog") == "A dog."


@pytest.mark.parametrize(
    ("block", "location", "message"),
    [
        ({"kind": "dog", "bark": "x"}, ("bark",), "valid number"),
        ({"kind": "dog", "brk": 1}, ("brk",), "Extra inputs"),
        ({"kind": "dgo"}, (), "unknown animal 'dgo'; did you mean dog?"),
        ({"kind": 3}, (), "kind is 3: must be a name; choose from dog"),
        ({}, (), "kind is missing; choose from dog"),
        (3, (), "must be a section, that is keys with values, one of which is `kind`"),
        ({"kind": "my_animals:Mute"}, (), "animal my_animals:Mute is incomplete; implement speak"),
        ({"kind": "my_animals:Soundless"}, (), "animal my_animals:Soundless is incomplete; set sound"),
        ({"kind": "my_animals:Undescribed"}, (), "animal my_animals:Undescribed has no docstring; describe it"),
        ({"kind": "my_animals:Other"}, (), "animal my_animals:Other must be a subclass of"),
        ({"kind": "my_animals:None"}, (), "animal my_animals:None cannot be imported (module 'my_animals' has no"),
        ({"kind": "broken:Thing"}, (), "animal broken:Thing cannot be imported (no luck)"),
        ({"kind": "nowhere.at.all:Thing"}, (), "cannot be imported (No module named 'nowhere')"),
    ],
)
def test_what_does_not_fit_is_refused_where_it_is(
    users: None, block: object, location: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValidationError) as refused:
        Zoo.model_validate({"animals": {"a": block}})
    (detail,) = refused.value.errors()
    assert detail["loc"] == ("animals", "a", *location)
    assert message in detail["msg"]
