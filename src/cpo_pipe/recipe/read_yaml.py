"""Read a recipe's YAML in bounded time: plain values, text keys, and limits on size, depth and numbers."""

import math
from typing import Any

import yaml

MAX_BYTES = 256 * 1024
"""Longest text; the YAML parser needs seconds for a megabyte."""
MAX_VALUES = 5_000
"""Most keys and values, each alias counted as all that it repeats."""
MAX_DEPTH = 50
"""Deepest nesting, aliases included."""
MAX_DIGITS = 64
"""Longest number, in characters."""

_STR, _INT, _FLOAT, _MERGE, _DATE, _VALUE = (
    f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "merge", "timestamp", "value")
)


class _Loader(yaml.SafeLoader):
    """Checks each node before anything is constructed from it. Dates are text, and explicit tags are errors."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML declares it without a type
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_DATE, _VALUE)]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str):
        super().__init__(text)
        self._level = 0
        self._values = 0
        self._measured: dict[yaml.Node, tuple[int, int]] = {}
        """Values in each complete node and its depth; an alias repeats both."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "tag", None) is not None:
            raise _refused(event, f"the tag {event.tag} is not read; remove it, and put text in quotes")
        self._level += 1
        if self._level > MAX_DEPTH:  # before the parser's own recursion
            raise _too_deep(event)
        before = self._values
        node = super().compose_node(parent, index)
        assert node is not None
        if isinstance(event, yaml.AliasEvent):
            if node not in self._measured:
                raise _refused(event, f"*{event.anchor} is inside &{event.anchor}; an anchor cannot contain itself")
            values, depth = self._measured[node]
            self._values += values
            if self._level - 1 + depth > MAX_DEPTH:
                raise _too_deep(event)
        else:
            self._values += 1
            depth = 1 + max((self._measured[child][1] for child in _children(node)), default=0)
            self._measured[node] = self._values - before, depth
        if self._values > MAX_VALUES:
            raise _refused(event, f"more than {MAX_VALUES:,} values, each alias counted as all that it repeats")
        self._level -= 1
        return node

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        node: yaml.ScalarNode = super().compose_scalar_node(anchor)
        if any("\ud800" <= character <= "\udfff" for character in node.value):
            raise _refused(node, "half of a surrogate pair is not a character; write the whole character")
        if node.tag in (_INT, _FLOAT):
            self._check_number(node)
        return node

    def _check_number(self, node: yaml.ScalarNode) -> None:
        if len(node.value) > MAX_DIGITS:
            raise _refused(node, f"a number of {len(node.value):,} characters; put it in quotes if it is text")
        try:
            number = self.construct_yaml_int(node) if node.tag == _INT else self.construct_yaml_float(node)
        except ValueError as error:  # such as 0x_
            raise _refused(node, f"{node.value} is not a number; put it in quotes if it is text") from error
        if not math.isfinite(number):
            raise _refused(node, f"{node.value} is not a finite number")
        if node.tag == _INT and not -(1 << 63) <= number < 1 << 63:
            raise _refused(node, f"{node.value} does not fit into 64 bits")

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if key.tag == _MERGE:
                continue
            if key.tag != _STR:
                shown = f"the key {key.value}" if isinstance(key, yaml.ScalarNode) else "a key"
                raise _refused(key, f"{shown} is not text; put it in quotes")
            if key.value in seen:  # PyYAML silently keeps the last one
                raise _refused(key, f"duplicate key {key.value}; remove one")
            seen.add(key.value)
        return node


class _Refused(Exception):
    """Valid YAML that breaks a rule of recipes."""


def read_yaml(text: str) -> Any:
    """Return the content of a YAML text.

    Raises:
        ValueError: it is not YAML, or breaks a rule; the message says where and why, in one line.
    """
    size = len(text.encode(errors="surrogatepass"))
    if size > MAX_BYTES:
        raise ValueError(f"{size:,} bytes are too long; at most {MAX_BYTES:,} are read")
    try:
        return yaml.load(text, _Loader)
    except _Refused as error:
        raise ValueError(str(error)) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ValueError(f"not valid YAML ({_place(mark)}{error.problem or error.context})") from error
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML ({' '.join(str(error).split())})") from error


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


def _too_deep(event: yaml.Event) -> _Refused:
    return _refused(event, f"nested more than {MAX_DEPTH} levels deep")


def _refused(at: yaml.Event | yaml.Node, problem: str) -> _Refused:
    problem = " ".join(problem.split())
    return _Refused(_place(at.start_mark) + (problem if len(problem) <= 300 else f"{problem[:297]}..."))


def _place(mark: Any) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
