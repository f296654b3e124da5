"""Mutated recipes, `--set` arguments and data files: each gives a result or a one-line InputError within two seconds.

500 inputs in CI, the same in each run; 10,000 new ones in `just soak`.
"""

import copy
import csv
import io
import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cpo_pipe.data.errors import InputError, Problems
from cpo_pipe.data.fingerprint import sha256_file
from cpo_pipe.data.sources.locate import locate_source
from cpo_pipe.eval.annotations import COLUMNS, read_annotations
from cpo_pipe.pipeline.negatives.pool_file import Columns, PoolFile
from cpo_pipe.pipeline.prepare.presets import PRESETS
from cpo_pipe.pipeline.prepare.rows import read_rows
from cpo_pipe.recipe.load import builtin_recipes, load_recipe
from cpo_pipe.recipe.recipe import Recipe
from cpo_pipe.recipe.render import recipe_text

SECONDS = 2.0
"""Of this process: how busy the machine is does not count."""
RECIPES = {name: path.read_text(encoding="utf-8") for name, path in builtin_recipes().items()}
TREES = {name: yaml.safe_load(text) for name, text in RECIPES.items()}


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
    """What it returns, or None after an InputError, each of whose messages is one line."""
    messages = ["one line"]
    with limited():
        try:
            return make()
        except InputError as error:
            messages = error.messages if isinstance(error, Problems) else [str(error)]
    for message in messages:
        assert len(message.splitlines()) == 1, message
        assert len(message) < 3000
    return None


def many(count: int) -> Any:
    """In CI; a fifth of it in `just test`, and twenty times as many in `just soak`."""
    slow, soak = pytest.mark.slow, pytest.mark.soak
    return pytest.mark.parametrize(
        "count", [count // 5, pytest.param(count, marks=slow), pytest.param(20 * count, marks=soak)]
    )


def run(property_: Callable[[], None], count: int, base: int) -> None:
    whole = settings(
        max_examples=count,
        derandomize=count <= base,  # but for the soak, the same in each run
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
    "x" * 5000, "~/x", "~nobody/x", "../", "/dev/null", "iterations: 100000\n", "name: " + "n" * 260 + "\n",
    LAUGHS,
]  # fmt: skip
SNIPPET_VALUES = [
    "&a [*a]", "&a {<<: *a}", "!!map [1]", "!!set x", "!!omap x", "!!timestamp x", "!!binary \u00e9", "!!int x",
    "!!float x", "!!bool x", "!!null x", "!!str x", "9" * 5000, "0x" + "f" * 5000, "0x_", ".nan", "-.inf", "1.0e+999",
    "1" + ":1" * 999 + ".", "2024-13-45", "2024-01-01", "{1: 2}", "{null: x}", "{? [a]: b}", "{<<: 3}", "1:1:1.", "<<",
    "[" * 400, '"\\ud800"', '"\\0"', "x" * 300, "-1", "1e5", "100000", "''", "[]", "{}", "~", "'*'", "[[a, b], [b, a]]",
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
        how = draw(st.sampled_from(["value", "value", "insert", "delete", "replace", "swap", "lines", "indent"]))
        if how == "value":
            keys = text.split(": ")
            place = draw(st.integers(1, max(1, len(keys) - 1)))
            rest = keys[place].partition("\n")[2] if place < len(keys) else ""
            text = ": ".join([*keys[:place], draw(st.sampled_from(SNIPPET_VALUES)) + "\n" + rest, *keys[place + 1 :]])
        elif how == "insert":
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
    tree = copy.deepcopy(TREES[draw(st.sampled_from(sorted(TREES)))])
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
    return tree


def dotted_paths(tree: Any, above: str = "") -> Iterator[str]:
    for key, value in tree.items() if isinstance(tree, dict) else ():
        yield f"{above}{key}"
        yield from dotted_paths(value, f"{above}{key}.")


KEYS = sorted({path for tree in TREES.values() for path in dotted_paths(tree)})
OVERRIDES = st.tuples(
    st.sampled_from(KEYS) | st.text(max_size=8) | st.builds("{}.{}".format, st.sampled_from(KEYS), st.text(max_size=5))
    | st.sampled_from(["a" + ".a" * 3000, "train.1.learning_rate", "train..learning_rate", "iterations", "note", "name",
                       "x" * 300]),
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


# ── data files ───────────────────────────────────────────────────────────────────────────────────────────────────────

TEXTS = st.sampled_from(
    ["", " ", "a", "tie", "x" * 300, "\u00e9\u65e5", 'quo"te', "a,b", "new\nline", "\0", "\u2028", "p1", "p2"]
)
ODD = st.one_of(
    TEXTS, st.none(), st.integers(), st.floats(), st.booleans(), st.lists(TEXTS, max_size=2), st.just({"role": "user"}),
    st.just([{"role": "user", "content": "p1"}]), st.just([{"role": "assistant", "content": ["x"]}]),
)  # fmt: skip
NAMES = ("prompt", "target", "text", *COLUMNS[1:])
ROWS = st.lists(st.fixed_dictionaries({}, optional=dict.fromkeys(NAMES, ODD)), min_size=1, max_size=6)
PLAIN_ROWS = st.lists(st.fixed_dictionaries(dict.fromkeys(NAMES, TEXTS)), min_size=1, max_size=6)
TYPES = [
    pa.string(), pa.large_string(), pa.binary(), pa.string_view(), pa.list_(pa.string()), pa.large_list(pa.string()),
    pa.dictionary(pa.int32(), pa.string()), pa.struct([("role", pa.string()), ("content", pa.string())]),
    pa.map_(pa.string(), pa.string()), pa.int64(), pa.float16(), pa.timestamp("ms"), pa.timestamp("ns", "Mars/Base"),
    pa.date64(), pa.duration("s"), pa.decimal128(5, 2), pa.time64("ns"), pa.null(), pa.bool_(),
]  # fmt: skip
BYTES = [
    b"\xff", b"\x00", b"\n", b"\r", b'"', b",", b"{", b"}", b"[" * 2000, b"]", b"\\ud800", b"\xed\xa0\x80", b"\xc3",
    b"\xef\xbb\xbf", b"\xff\xfe", b"\x1f\x8b\x08", b"PAR1", b"9" * 5000, b"x" * 200_000, b"NaN", b"=\n = T = \n\n",
]  # fmt: skip


def as_csv(rows: list[dict[str, Any]], delimiter: str) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, NAMES, delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def column(kind: pa.DataType, size: int, content: bytes) -> pa.Array:
    """Any bytes as a column of any type, bad UTF-8 and years out of range included."""
    if pa.types.is_string(kind) or pa.types.is_binary(kind):
        offsets = pa.py_buffer(b"".join((min(n, len(content))).to_bytes(4, "little") for n in range(size + 1)))
        return pa.Array.from_buffers(kind, size, [None, offsets, pa.py_buffer(content)])
    if pa.types.is_list(kind):
        offsets = pa.array(range(size + 1), pa.int32())
        return pa.ListArray.from_arrays(offsets, column(pa.string(), size, content))
    if pa.types.is_dictionary(kind):
        return pa.DictionaryArray.from_arrays(pa.array([0] * size, pa.int32()), column(pa.string(), 1, content))
    if pa.types.is_primitive(kind) and kind.bit_width == 64:
        return pa.Array.from_buffers(kind, size, [None, pa.py_buffer((content * (8 * size))[: 8 * size])])
    return pa.nulls(size, kind)


@st.composite
def data_file(draw: st.DrawFn) -> tuple[str, bytes]:
    suffix = draw(st.sampled_from([".jsonl", ".csv", ".parquet", ".txt", ".json", ".tsv", ".jsonl.gz", ".csv.zst"]))
    rows = draw(ROWS if ".json" in suffix else PLAIN_ROWS)
    if suffix == ".parquet":
        size, names = draw(st.integers(1, 4)), draw(st.lists(st.sampled_from(NAMES), max_size=6)) or list(NAMES)
        kinds = [draw(st.sampled_from(TYPES)) for _ in names]
        columns = [column(kind, size, draw(st.binary(min_size=4, max_size=9))) for kind in kinds]
        settings_ = {"compression": draw(st.sampled_from(["none", "zstd", "snappy"])), "row_group_size": 2}
        pq.write_table(pa.Table.from_arrays(columns, names), sink := io.BytesIO(), **settings_)
        content = sink.getvalue()
    elif suffix in (".csv", ".tsv", ".csv.zst"):
        content = as_csv(rows, "\t" if suffix == ".tsv" else ",")
    elif suffix in (".jsonl", ".jsonl.gz"):
        content = b"".join(json.dumps(row, ensure_ascii=draw(st.booleans())).encode() + b"\n" for row in rows)
    else:
        content = json.dumps(rows).encode() if suffix == ".json" else b" = A = \n\n x\n" * len(rows)
    compression = {".gz": "gzip", ".zst": "zstd"}.get(suffix[-4:].lstrip("l"))
    first = compression and draw(st.booleans())
    if first:
        content = bytes(pa.compress(content, compression))
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(content)))
        how = draw(st.sampled_from(["insert", "truncate", "flip", "replace", "recode"]))
        if how == "insert":
            content = content[:start] + draw(st.sampled_from(BYTES) | st.binary(max_size=4)) + content[start:]
        elif how == "truncate":
            content = content[:start]
        elif how == "recode":
            content = content.decode(errors="replace").encode(draw(st.sampled_from(["utf-16", "utf-8-sig", "utf-32"])))
        else:
            flipped = bytes([content[start] ^ draw(st.integers(1, 255))]) if start < len(content) else b""
            content = (
                content[:start] + (flipped if how == "flip" else draw(st.binary(max_size=9))) + content[start + 1 :]
            )
    if compression and not first:
        content = bytes(pa.compress(content, compression))
    return suffix, content


@many(160)
def test_data_files(tmp_path: Path, count: int) -> None:
    @given(data_file())
    def property_(file: tuple[str, bytes]) -> None:
        suffix, content = file
        (path := tmp_path / f"file{suffix}").write_bytes(content)
        preset = "text" if suffix == ".txt" else "pairs"
        data = PRESETS.parse({"preset": preset, "source": str(path), "tokenizer": "t", "test": 1})
        outcome(lambda: [*read_rows(data, locate_source(str(path)))])
        outcome(lambda: read_annotations(str(path), sha256_file))
        pool = PoolFile(locate_source(str(path)), Columns())
        outcome(lambda: [*pool.continuations(pool.match_column())])

    run(property_, count, 160)
