"""What of YAML a recipe may be made of; that every text is read or refused in bounded time is in test_fuzz.py."""

import pytest

from cpo_pipe.recipe.read_yaml import MAX_BYTES, MAX_DEPTH, MAX_VALUES, read_yaml

LAUGHS = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 8)
)
"""10⁸ leaves in 400 characters."""
MERGING_LAUGHS = LAUGHS.replace("[x,x,x,x,x,x,x,x,x,x]", "{x: 1}").replace("[*", "{<<: [*").replace("]\n", "]}\n")
CHAIN = "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 60))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &x [*x]", "line 1, column 8: *x is inside &x; an anchor cannot contain itself"),
        ("a: &x {<<: *x}", "line 1, column 12: *x is inside &x; an anchor cannot contain itself"),
        (LAUGHS, "line 4, column 22: more than 5,000 values, each alias counted as all that it repeats"),
        (MERGING_LAUGHS, "more than 5,000 values"),
        (f"a: [{'1,' * MAX_VALUES}]", "more than 5,000 values"),
        ("[" * (MAX_DEPTH + 1), "line 1, column 51: nested more than 50 levels deep"),
        ("- " * 1000, "line 1, column 101: nested more than 50 levels deep"),
        (f"a0: &a0 x\n{CHAIN}", "nested more than 50 levels deep"),
        ("x" * (MAX_BYTES + 1), "262,145 bytes are too long; at most 262,144 are read"),
        ("a: !!map [1]", "line 1, column 4: the tag tag:yaml.org,2002:map is not read; remove it, and put"),
        ("!!set x", "the tag tag:yaml.org,2002:set is not read"),
        ("a: !!timestamp x", "the tag tag:yaml.org,2002:timestamp is not read"),
        ("a: !!binary é", "the tag tag:yaml.org,2002:binary is not read"),
        ("a: !x y", "the tag !x is not read"),
        ("a: " + "9" * 5000, "line 1, column 4: a number of 5,000 characters; put it in quotes if it is text"),
        ("a: 1" + ":1" * 5000, "a number of 10,001 characters"),
        ("a: 0x" + "f" * 17, f"0x{'f' * 17} does not fit into 64 bits"),
        ("a: 0x_", "0x_ is not a number; put it in quotes if it is text"),
        ("a: .inf", "line 1, column 4: .inf is not a finite number"),
        ("a: 1.0e+999", "1.0e+999 is not a finite number"),
        ("b: 1\n1: 2", "line 2, column 1: the key 1 is not text; put it in quotes"),
        ("yes: 2", "the key yes is not text; put it in quotes"),
        ("? [a]\n: b", "line 1, column 3: a key is not text; put it in quotes"),
        ("{<<: {1: 2}}", "the key 1 is not text"),
        ("a: 1\na: 2", "line 2, column 1: duplicate key a; remove one"),
        ('a: "\\ud800"', "line 1, column 4: half of a surrogate pair is not a character; write the whole character"),
        ("a: b\0", "not valid YAML (unacceptable character #x0000: special characters are not allowed in"),
        ("<<: 3", "not valid YAML (line 1, column 5: expected a mapping or list of mappings for"),
        ("a: *x", "not valid YAML (line 1, column 4: found undefined alias 'x')"),
        ("a\n---\nb", "not valid YAML (line 2, column 1: but found another document)"),
        ("a:\n\tb: 1", "not valid YAML (line 2, column 1: found character '\\t' that cannot start any token)"),
    ],
)  # fmt: skip
def test_what_is_refused_is_named_with_its_place(text: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - compared as a whole below
        read_yaml(text)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_plain_values() -> None:
    text = "\ufeffa: 1\nb: [1.5, -1e-3, true, null, 'x', \"\\0\"]\nc: &c {d: 0x10}\ne: {<<: *c, f: *c}"
    expected = {"a": 1, "b": [1.5, "-1e-3", True, None, "x", "\0"], "c": {"d": 16}, "e": {"d": 16, "f": {"d": 16}}}
    assert read_yaml(text) == expected


def test_dates_are_text() -> None:
    """`revision: 2026-11-29` names a version; YAML 1.1 would make a date of it, and an error of 2026-13-45."""
    text = "a: 2026-11-29\nb: 2026-13-45\nc: 2026-11-29T10:00:00Z\nd: ="
    assert read_yaml(text) == {"a": "2026-11-29", "b": "2026-13-45", "c": "2026-11-29T10:00:00Z", "d": "="}
