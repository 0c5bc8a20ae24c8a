"""containerd's filter language. The cases are those that its own tests decide."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusesnap.errors import InvalidArgument
from fusesnap.services.filters import (
    FieldPath,
    Filter,
    Operator,
    Selector,
    any_matches,
    parse_filter,
)

CORPUS: list[dict[str, str]] = [
    {"name": "foo", "labels.foo": "true"},
    {"name": "bar"},
    {"name": "foo", "labels.foo": "present", "labels.more complex label": "present"},
    {"name": "bar", "labels.bar": "true"},
    {"name": "fooer", 'labels.more complex label with \\ and "': "present"},
    {"name": "fooer", 'labels.more complex label with \\ and ".post': "present"},
    {"name": "baz", "other": "too complex, yo"},
    {"name": "bazo", "other": "abc"},
    {"name": "compound", "labels.foo": "omg_asdf.asdf-qwer"},
]


def matching(text: str) -> list[int]:
    parsed = parse_filter(text)
    return [
        number
        for number, fields in enumerate(CORPUS)
        if parsed.matches(lambda path, fields=fields: fields.get(".".join(path)))  # type: ignore[misc]
    ]


ALL = list(range(9))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ALL),
        ("name", ALL),
        ("labels.foo", [0, 2, 8]),
        ("labels.foo,name", [0, 2, 8]),
        ("labels.foo==true", [0]),
        ("labels.foo==omg_asdf.asdf-qwer", [8]),
        ("name==bar", [1, 3]),
        ("name!=bar", [0, 2, 4, 5, 6, 7, 8]),
        ("labels.bar!=true", [0, 1, 2, 4, 5, 6, 7, 8]),
        ('other!=""', [6, 7]),
        ('other==""', []),
        ("name==bar,labels.bar", [3]),
        ('other=="too complex, yo"', [6]),
        ("other~=[abc]+,name!=foo", [6, 7]),
        ("other~=/[abc]+/,name!=foo", [6, 7]),
        ("other~=|[abc]{1,2}|,name!=foo", [6, 7]),
        ('other~=/[abc]{0,1}"\\//,name!=foo', []),
        ("name==bar,labels.bar==wrong", []),
        ('name==foo,labels."more complex label"', [2]),
        ('labels."more complex label with \\\\ and \\""==present', [4]),
        ('labels."more complex label with \\\\ and \\"".post==present', [5]),
        (" name == bar,  labels.bar", [3]),
        ('name=="b\\x61\\u0072"', [1, 3]),
        ('name=="\\142\\U00000061r"', [1, 3]),
        ("name==b=r", []),
    ],
)
def test_what_matches(text: str, expected: list[int]) -> None:
    assert matching(text) == expected


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("labels.|foo|==x", "expected a field or a quoted string at character 7, got '|'"),
        ("name==/tmp/x", "expected a value or a quoted string at character 6, got '/'"),
        ('labels.?"x"==y', "expected a field or a quoted string at character 7, got '?'"),
        ("name==foo,", "expected a field or a quoted string at character 10, got the end"),
        ("labels.", "expected a field or a quoted string at character 7, got the end"),
        ("image~=,id?=?fbaq", "expected a value or a quoted string at character 7, got ','"),
        ("labels.ns/key==value", "expected an operator, '==', '!=' or '~=' at character 9"),
        ('labels.key=="value', "expected a quoted string, which ends"),
        ("name~=/value", "expected a quoted string, which ends"),
        ('name=="\\q"', "expected a quoted string, which ends and has no illegal escapes"),
        ('name=="\\UFFFFFFFF"', "expected escapes that stand for characters"),
        ("name=foo", "expected an operator"),
        ("name===foo", "expected an operator"),
        ("name==foo bar", "expected ',' or the end at character 9, got ' '"),
        ("name==", "expected a value or a quoted string at character 6, got the end"),
        ("name==a\0", "expected ',' or the end"),
        ("name~=/(/", r"'\(' is not a regular expression"),
        (",", "expected a field"),
        ("x" * 20_000, "expected at most 16640 characters, got 20000"),
    ],
)
def test_what_is_no_filter(text: str, complaint: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_filter(text)
    assert complaint.replace("\\(", "(") in str(caught.value)
    assert text[:20] in str(caught.value) or "\\" in str(caught.value)


def test_one_of_several_is_enough() -> None:
    def fields(path: FieldPath) -> str | None:
        return "foo" if path == ("name",) else None

    assert any_matches([], fields)
    assert any_matches([parse_filter("name==bar"), parse_filter("name==foo")], fields)
    assert not any_matches([parse_filter("name==bar"), parse_filter("labels")], fields)


TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
VALUES = st.one_of(TEXT, st.binary(max_size=8).map(lambda b: b.decode(errors="surrogateescape")))
PATHS = st.lists(TEXT, min_size=1, max_size=3).map(tuple)
SELECTORS = st.one_of(
    st.builds(Selector, PATHS),
    st.builds(Selector, PATHS, st.sampled_from([Operator.EQUAL, Operator.NOT_EQUAL]), VALUES),
    st.builds(Selector, PATHS, st.just(Operator.MATCHES), st.text(string.ascii_letters)),
)


@given(st.lists(SELECTORS, min_size=1, max_size=4).map(tuple).map(Filter))
def test_round_trip(made: Filter) -> None:
    assert parse_filter(str(made)) == made


@given(st.text(st.sampled_from('ab.,=!~"/|\\ x0'), max_size=30))
def test_anything_is_a_filter_or_refused(text: str) -> None:
    try:
        parsed = parse_filter(text)
    except InvalidArgument:
        return
    assert parse_filter(str(parsed)) == parsed
