"""Mutated recipes, `--set` arguments and data files: each gives a result or a one-line InputError within two seconds.

500 inputs in CI, the same in each run; 10,000 new ones in `just soak`.
"""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.recipe import Recipe, builtin_recipes, load_recipe
from cpo_pipe.data.recipe_text import recipe_text

SECONDS = 2.0
"""Of this process: how busy the machine is does not count."""
RECIPES = {name: path.read_text(encoding="utf-8") for name, path in builtin_recipes().items()}


class TooSlow(BaseException):
    """Not an Exception: no handler of the code under test may take it for one of its own."""


@contextmanager
def limited() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TooSlow

    before, start = signal.signal(signal.SIGPROF, stop), time.process_time()
    signal.setitimer(signal.ITIMER_PROF, 2 * SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    assert time.process_time() - start < SECONDS


def outcome(make: Callable[[], Any]) -> Any:
    """What it returns, or None after an InputError."""
    message = "one line"
    with limited():
        try:
            return make()
        except InputError as error:
            message = str(error)
    assert len(message.splitlines()) == 1, message
    assert len(message) < 3000
    return None


def many(count: int) -> Any:
    """In CI, and in `just soak` twenty times as many."""
    return pytest.mark.parametrize("count", [count, pytest.param(20 * count, marks=pytest.mark.soak)])


def run(property_: Callable[[], None], count: int, base: int) -> None:
    whole = settings(
        max_examples=count,
        derandomize=count == base,  # the gate is the same in each run
        database=None,
        deadline=None,  # the limit is on this process's own time
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    whole(property_)()


# ── recipes ──────────────────────────────────────────────────────────────────────────────────────────────────────────

LAUGHS = "".join(f"{key}: &{key} [{', '.join([f'*{before}'] * 9)}]\n" for before, key in pairwise("abcdefgh"))
LAUGHS = f"a: &a [1, 1]\n{LAUGHS}"
SNIPPETS = [
    *"&*!|>%@`#-:?,[]{}'\"\\\n \t=~<.0", "&a ", "*a", "&a [*a]", "<<: ", "<<: *a\n", "!!map ", "!!set ", "!!omap ",
    "!!timestamp ", "!!binary ", "!!int ", "!!float ", "!!python/name:os.system ", "!x ", "---\n", "...\n",
    "%YAML 9.9\n",
    "\x00", "\\0", '"\\ud800"', '"\\0"', "\ufeff", "\x85", "\u2028", "\U0001f600", "9" * 5000, "0x" + "f" * 5000,
    "0x_", ".inf", "-.Inf", ".nan", "1:2:3", "1:1:1.", "1e999", "1.0e+999", "2024-13-45", "2024-01-01T00:00:00Z",
    "yes", "null",
    "1: 2\n", "null: 1\n", "? [a]\n: b\n", "? {a: b}\n", "[" * 200, "{" * 200, "- " * 200, "a: " * 200, "x" * 300,
    "x" * 5000, "~/x", "~nobody/x", "../", "/dev/null", "rounds: 100000\n", "name: " + "n" * 260 + "\n",
    LAUGHS,
]  # fmt: skip
VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.dates(), st.binary(max_size=5),
        st.sampled_from(["", "x" * 300, "a\0b", "\ud800", "target", "base", "cpo", "cpo@2", "a\nb", "~/x", "{prompt}"]),
        st.sampled_from([-1, 0, 100000, 10**18, 10**30, 10**400]),
    ),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
        st.text(max_size=5) | st.sampled_from(["model", "kind", "x" * 300, "*", "a.b"]) | st.integers() | st.none(),
        inner,
        max_size=4,
    ),
    max_leaves=8,
)  # fmt: skip
PATHS = st.lists(st.integers(0, 10**6), max_size=5)
"""Where in a tree: at each level the place of a child, counted around."""


def positions(text: str) -> st.SearchStrategy[int]:
    return st.integers(0, len(text))


@st.composite
def mutated_text(draw: st.DrawFn) -> str:
    text = RECIPES[draw(st.sampled_from(sorted(RECIPES)))]
    for _ in range(draw(st.integers(1, 4))):
        start = draw(positions(text))
        how = draw(st.sampled_from(["insert", "delete", "replace", "swap", "lines", "indent"]))
        if how == "insert":
            text = text[:start] + draw(st.sampled_from(SNIPPETS) | st.text(max_size=5)) + text[start:]
        elif how == "delete":
            text = text[:start] + text[start + draw(st.integers(1, 30)) :]
        elif how == "replace":
            text = text[:start] + draw(st.sampled_from(SNIPPETS) | st.text(max_size=5)) + text[start + 1 :]
        elif how == "indent":
            text = text.replace("\n", "\n ", draw(st.integers(1, 20)))
        else:
            parts = text.splitlines(keepends=True) if how == "lines" else text.split(" ")
            if len(parts) > 1:
                one, other = (draw(st.integers(0, len(parts) - 1)) for _ in range(2))
                parts[one], parts[other] = parts[other], parts[one]
                text = ("" if how == "lines" else " ").join(parts)
    return text


def changed(tree: Any, path: list[int], change: Callable[[Any, Any], None]) -> None:
    """Apply `change` to the container and the key that a path leads to."""
    container, key = None, None
    node = tree
    for number in path:
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else []
        if not keys:
            break
        container, key = node, keys[number % len(keys)]
        node = container[key]
    if container is not None:
        change(container, key)


@st.composite
def mutated_tree(draw: st.DrawFn) -> dict[str, Any]:
    tree = yaml.safe_load(RECIPES[draw(st.sampled_from(sorted(RECIPES)))])
    for _ in range(draw(st.integers(1, 3))):
        path, value = draw(PATHS), draw(VALUES)
        how = draw(st.sampled_from(["replace", "remove", "add", "grow"]))

        def change(node: Any, key: Any, how: str = how, value: Any = value) -> None:
            if how == "replace":
                node[key] = value
            elif how == "remove":
                del node[key]
            elif how == "add" and isinstance(node, dict):
                node[value if isinstance(value, str | int) else "new"] = value
            elif isinstance(node, list):
                node.extend([node[key]] * 500)

        changed(tree, path, change)
    return tree  # type: ignore[no-any-return]


def dotted_paths(tree: Any, above: str = "") -> Iterator[str]:
    for key, value in tree.items() if isinstance(tree, dict) else ():
        yield f"{above}{key}"
        yield from dotted_paths(value, f"{above}{key}.")


KEYS = sorted({path for text in RECIPES.values() for path in dotted_paths(yaml.safe_load(text))})
OVERRIDES = st.tuples(
    st.sampled_from(KEYS) | st.text(max_size=8) | st.builds("{}.{}".format, st.sampled_from(KEYS), st.text(max_size=5))
    | st.sampled_from(["a" + ".a" * 3000, "train.1.lr", "train..lr", "rounds", "note", "name", "x" * 300]),
    st.sampled_from(["=", "=", "=", "", "=="]),
    st.sampled_from([*SNIPPETS, "{1: 2}", "[[1]]", "[[a, b], [b, a]]"]) | st.text(max_size=10) | VALUES.map(repr),
).map("".join)  # fmt: skip


def check_recipe(path: Path, overrides: list[str], scale: str | None) -> None:
    recipe = outcome(lambda: load_recipe(str(path), overrides, scale))
    if recipe is not None:  # what a run writes beside its report, after all work
        assert isinstance(recipe, Recipe)
        path.write_text(recipe_text(recipe), encoding="utf-8")
        assert load_recipe(str(path)) == recipe


@many(120)
def test_mutated_text_of_a_recipe(tmp_path: Path, count: int) -> None:
    path = tmp_path / "r.yaml"

    @given(mutated_text(), st.sampled_from([None, "smoke", "small"]))
    def property_(text: str, scale: str | None) -> None:
        path.write_bytes(text.encode(errors="surrogatepass"))
        check_recipe(path, [], scale)

    run(property_, count, 120)


@many(120)
def test_mutated_values_of_a_recipe(tmp_path: Path, count: int) -> None:
    path = tmp_path / "r.yaml"

    @given(mutated_tree(), st.sampled_from([None, "smoke", "small"]))
    def property_(tree: dict[str, Any], scale: str | None) -> None:
        path.write_text(yaml.dump(tree, allow_unicode=False), encoding="utf-8")
        check_recipe(path, [], scale)

    run(property_, count, 120)


@many(100)
def test_set_arguments(tmp_path: Path, count: int) -> None:
    @given(st.sampled_from(sorted(RECIPES)), st.lists(OVERRIDES, min_size=1, max_size=2))
    def property_(name: str, overrides: list[str]) -> None:
        (path := tmp_path / "r.yaml").write_text(RECIPES[name], encoding="utf-8")
        check_recipe(path, overrides, None)

    run(property_, count, 100)
