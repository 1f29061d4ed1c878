"""Nothing in a file makes a reader crash, hang or lose a row in silence: a line of error with its place, or a count."""

import copy
import gzip
import json
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxtune.config import Source
from jaxtune.data import formats
from jaxtune.data.reading import Rows
from jaxtune.errors import UserError
from tests.data.test_reading import ALL, write

GOOD = '{"text": "fine"}\n'
MB = 1 << 20

# name -> bytes, rows that are read and rows that are skipped; None where the file as a whole is refused
CASES = {
    "empty.jsonl": (b"", 0, 0),
    "blank.jsonl": (b"\n \r\n\t\n", 0, 0),
    "bom.jsonl": (b"\xef\xbb\xbf" + GOOD.encode() * 2, 2, 0),
    "crlf.jsonl": (GOOD.replace("\n", "\r\n").encode() * 3, 3, 0),
    "no_end.jsonl": (GOOD.encode() + b'{"text": "last"}', 2, 0),
    "cut.jsonl": (GOOD.encode() + b'{"text": "la', 1, 1),
    "utf16.jsonl": (GOOD.encode("utf-16"), None, None),
    "utf16be.jsonl": (b"\xfe\xff" + GOOD.encode("utf-16-be"), None, None),
    "utf16_no_mark.jsonl": (GOOD.encode("utf-16-le"), 0, 2),
    "latin1.jsonl": (GOOD.encode() + '{"text": "é"}\n'.encode("latin-1") + GOOD.encode(), 2, 1),
    "mixed.jsonl": ('{"text": "é"}\n'.encode() + '{"text": "é"}\n'.encode("latin-1"), 1, 1),
    "binary.jsonl": (bytes(range(256)) + b"\n" + GOOD.encode(), 1, 2),
    "nul.jsonl": (GOOD.encode() + b'{"text": "a\0b"}\n' + b'{"text": "a\\u0000b"}\n', 2, 1),
    "huge.jsonl": (json.dumps({"text": "x" * (4 * MB)}).encode() + b"\n" + GOOD.encode(), 2, 0),
    "huge_bad.jsonl": (b"{" * (4 * MB) + b"\n" + GOOD.encode(), 1, 1),
    "twice.jsonl": (
        b'{"text": "a", "text": "b"}\n' + GOOD.encode() + b'{"text": "a", "x": [{"y": 1, "y": 2}]}\n',
        1,
        2,
    ),
    "deep.jsonl": (b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n" + GOOD.encode(), 1, 1),
    "deepish.jsonl": (b'{"text": "a", "x": ' + b"[" * 300 + b"]" * 300 + b"}\n" + GOOD.encode(), 1, 1),
    "nan.jsonl": (b'{"text": "a", "x": NaN}\n{"text": "a", "x": -Infinity}\n' + GOOD.encode(), 1, 2),
    "long_number.jsonl": (b'{"text": "a", "x": ' + b"9" * 10_000 + b"}\n" + GOOD.encode(), 1, 1),
    "surrogate.jsonl": (b'{"text": "\\ud800"}\n{"text": "\\ud83d\\ude00"}\n{"\\udfff": 1}\n', 1, 2),
    "types.jsonl": (b'[]\n"x"\n3\nnull\ntrue\n' + GOOD.encode(), 1, 5),
    "cr.jsonl": (GOOD.replace("\n", "\r").encode() * 2, 0, 1),
    "bom_inside.jsonl": (GOOD.encode() + b"\xef\xbb\xbf" + GOOD.encode(), 1, 1),
    "empty.json": (b"", 0, 0),
    "list.json": (b"[]", 0, 0),
    "cut.json": (b'[{"text": "a"}, {"te', None, None),
    "twice.json": (b'[{"text": "a", "text": "b"},\n{"text": "c"}]', 1, 1),
    "nan.json": (b'[{"text": "a", "x": NaN},\n{"text": "c"}]', 1, 1),
    "types.json": (b'[1, [], "x", null, {"text": "c"}, {"text": "\\ud800"}]', 1, 5),
    "deep.json": (b"[" * 100_000, None, None),
    "deep_object.json": (b'{"a":' * 100_000, None, None),
    "deep_value.json": (b'{"a":' + b"[" * 100_000 + b', "data": []}', None, None),
    "deepish.json": (b'[{"text": "a", "x": ' + b"[" * 300 + b"]" * 300 + b'}, {"text": "b"}]', 1, 1),
    "utf16.json": (b'[{"text": "a"}]'.decode().encode("utf-16"), None, None),
    "nul.json": (b'[{"text": "a\0"}]', None, None),
    "latin1.json": (b'[\n{"text": "\xe9"}]', None, None),
    "empty.csv": (b"", 0, 0),
    "header.csv": (b"text,x\n", 0, 0),
    "bom.csv": (b"\xef\xbb\xbftext,x\r\na,b\r\n", 1, 0),
    "quote.csv": (b'text,x\na,"b\nc,d\ne,f\n', 2, 1),
    "quotes.csv": (b'text,x\n"a"b,c\n"",""\n', 1, 1),
    "width.csv": (b"text,x\na\na,b\na,b,c\n", 1, 2),
    "nul.csv": (b"text,x\na\0,b\nc,d\n", 1, 1),
    "latin1.csv": (b"text,x\n\xe9,b\nc,d\n", 1, 1),
    "latin1_header.csv": (b"t\xe9xt,x\nc,d\n", None, None),
    "utf16.csv": ("text,x\na,b\n".encode("utf-16"), None, None),
    "cr.csv": (b"text,x\ra,b\r", None, None),
    "huge.csv": (b"text,x\n" + b"y" * (4 * MB) + b',"' + b"z\n" * 50_000 + b'"\nc,d\n', 2, 0),
    "unclosed.csv": (b'text,x\n"a,b\n' + b"c,d\n" * 20_000, 20_000, 1),
    "twice.csv": (b"text,text\na,b\n", None, None),
    "latin1.txt": (b"a\n\xe9\nb\n", 2, 1),
    "binary.txt": (b"\0\1\2\n\xff\xff\n", 0, 2),
    "utf16.txt": ("a\nb\n".encode("utf-16"), None, None),
    "crlf.txt": (b"a\r\nb", 2, 0),
    "x.parquet": (b"PAR1" + b"\0" * 100 + b"PAR1", None, None),
    "x.arrow": (b"ARROW1\0\0" + b"\xff" * 100, None, None),
    "x.xlsx": (b"PK\3\4" + b"\0" * 100, None, None),
    "empty.parquet": (b"", None, None),
    "empty.arrow": (b"", None, None),
    "empty.xlsx": (b"", None, None),
    "x.jsonl.gz": (gzip.compress(GOOD.encode())[:-4] + b"\0\0\0\0", None, None),
    "x.jsonl.zst": (GOOD.encode(), None, None),
}


@pytest.mark.parametrize("name", CASES)
def test_nasty_files(tmp_path, name):
    blob, good, bad = CASES[name]
    file = tmp_path / name
    file.write_bytes(blob)
    it = Rows(Source(path=str(file)), bad_rows="skip")
    if good is None:
        with pytest.raises(UserError, match=place(file)):
            list(it)
    else:
        assert (len(list(it)), len(it.skipped)) == (good, bad)
        assert all(re.match(place(file), s) for s in it.skipped)
    if good is None or bad:
        with pytest.raises(UserError, match=place(file)) as e:
            list(Rows(Source(path=str(file))))
        assert "\n" not in str(e.value)
        assert len(str(e.value)) < 600


def place(file):
    return rf"{re.escape(str(file))}:\d+\D"


lines = st.one_of(
    st.just(GOOD.strip().encode()),
    st.binary(max_size=30).map(lambda b: b.replace(b"\n", b"")),
    st.text(st.sampled_from('{}[]",:\\ \r\tex1'), max_size=20).map(str.encode),
)


@pytest.mark.parametrize("kind", [".jsonl", ".txt"])
@settings(max_examples=60, deadline=None)
@given(found=st.lists(lines, max_size=6))
def test_every_line_is_read_or_counted(tmp_path_factory, kind, found):
    file = tmp_path_factory.mktemp("lines") / f"a{kind}"
    file.write_bytes(b"\n".join(found))
    it = Rows(Source(path=str(file)), bad_rows="skip")
    try:
        n = len(list(it))
    except UserError as e:
        assert "UTF-16" in str(e)  # by its first two bytes
        return
    found[:1] = [line.removeprefix(b"\xef\xbb\xbf") for line in found[:1]]
    text = [line.decode("utf-8", "surrogateescape") for line in found]
    assert n + len(it.skipped) == sum(bool(line.strip()) for line in text)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A file of each kind; written once, since a sheet knows when that was."""
    folder = tmp_path_factory.mktemp("whole")
    return {kind: write(folder, kind).read_bytes() for kind in ALL}


@pytest.mark.parametrize("kind", ALL)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_damaged_files(tmp_path_factory, whole, kind, data):
    folder = tmp_path_factory.mktemp("damaged")
    file = folder / f"rows{kind}"
    blob = bytearray(whole[kind])
    for _ in range(data.draw(st.integers(1, 4))):
        i = data.draw(st.integers(0, len(blob)))
        j = data.draw(st.integers(i, min(len(blob), i + 20)))
        blob[i:j] = data.draw(st.binary(max_size=20))
    file.write_bytes(blob)
    it = Rows(Source(path=str(file)), bad_rows="skip")
    try:
        rows = list(it)
    except UserError as e:
        assert re.match(place(file), str(e))
    else:
        assert all(isinstance(r, dict) for _, r in rows)


@pytest.mark.parametrize("kind", [*ALL, ".ndjson"])
@settings(max_examples=12, deadline=None)
@given(blob=st.binary(max_size=200))
def test_files_of_noise(tmp_path_factory, kind, blob):
    file = tmp_path_factory.mktemp("noise") / f"a{kind}"
    file.write_bytes(blob)
    try:
        list(Rows(Source(path=str(file)), bad_rows="skip"))
    except UserError as e:
        assert re.match(place(file), str(e))


# --- wrong types in every place of every format ----------------------------------------------------------------------

TALK = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", "weight": 1}]
FUNCTION = {"type": "function", "function": {"name": "f", "arguments": {"a": [1]}}}
ROWS = {
    "messages": {
        "messages": [*TALK, {"role": "assistant", "content": "x", "tool_calls": [FUNCTION]}],
        "tools": [FUNCTION],
    },
    "sharegpt": {
        "conversations": [{"from": "human", "value": "Q"}, {"from": "function_call", "value": '{"name": "f"}'}],
        "system": "S",
        "tools": "[]",
    },
    "prompt_completion": {"prompt": TALK[:1], "completion": TALK[1:]},
    "alpaca": {"instruction": "I", "input": "x", "output": "O", "history": [["a", "b"]], "system": "S"},
    "text": {"text": "T"},
    "segments": {"segments": [{"text": "a", "label": True}]},
    "tokens": {"input_ids": [1, 2], "labels": [-100, 2], "attention_mask": [1, 1]},
    "preference": {"prompt": TALK[:1], "chosen": TALK[1:], "rejected": TALK[1:]},
    "kto": {"messages": TALK, "label": True},
    "classification": {"text": "T", "label": ["a"], "text_pair": "P"},
    "regression": {"text": "T", "label": 1.0},
    "qa": {"context": "C D", "question": "Q", "answers": {"text": ["D"], "answer_start": [2]}, "id": "1"},
    "translation": {"source": "S", "target": "T"},
    "summarisation": {"document": "D", "summary": "S", "summaries": ["S"]},
    "maths": {"question": "Q", "answer": "#### 1"},
    "token_classification": {"text": "a b", "spans": [{"start": 0, "end": 1, "label": "x"}]},
    "choice": {"question": "Q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answer": "A"},
}
MORE = [
    ("preference", {"input": {"messages": TALK[:1], "tools": [FUNCTION]}, "preferred_output": TALK[1:],
                    "non_preferred_output": TALK[1:]}),
    ("preference", {"chosen": TALK, "rejected": [TALK[0], {"role": "assistant", "content": "B"}]}),
    ("token_classification", {"tokens": ["a", "b"], "tags": ["O", "O"]}),
    ("token_classification", {"text": "a b", "slots": [{"entity": "x", "value": "b"}]}),
    ("qa", {"title": "T", "paragraphs": [{"context": "C", "qas": [
        {"question": "Q", "id": "1", "is_impossible": False, "answers": [{"text": "C", "answer_start": 0}]}]}]}),
    ("translation", {"translation": {"source": "S", "target": "T"}}),
]  # fmt: skip
WRONG = [
    None,
    True,
    0,
    -1,
    7,
    1.5,
    10**30,
    "",
    "x",
    "[",
    "{}",
    '["x"]',
    [],
    [None],
    [[]],
    [1],
    ["x"],
    {},
    {"a": None},
    {"text": 1},
]


def spoiled(row):
    """The row with each of its values, at any depth, replaced by each wrong one, or left out."""

    def walk(value, path):
        yield path
        inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for k, v in inner:
            yield from walk(v, (*path, k))

    for path in walk(row, ()):
        if not path:
            continue
        for wrong in [*WRONG, KeyError]:
            new = copy.deepcopy(row)
            at = new
            for k in path[:-1]:
                at = at[k]
            if wrong is KeyError:
                del at[path[-1]]
            else:
                at[path[-1]] = wrong
            yield new


@pytest.mark.parametrize(("kind", "row"), [*ROWS.items(), *MORE])
@pytest.mark.parametrize("answers", [True, False])
def test_wrong_types_in_every_column(tmp_path, kind, row, answers):
    rows = [row, *spoiled(row)]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    skipped = []
    source = Source(path=str(file), format=kind)
    got = formats.read(source, answers=answers, bad_rows="skip", skipped=skipped)
    assert all(re.match(place(file), s) and "\n" not in s for s in skipped)
    seen = {int(re.match(r"\d+", x.removeprefix(f"{file}:"))[0]) for x in (*(e.origin for e in got), *skipped)}
    without = {i for i, r in enumerate(rows, 1) if "paragraphs" in r and not questions(r)}  # an article of no questions
    assert seen | without == set(range(1, len(rows) + 1))
    if "paragraphs" not in row:
        assert len(got) + len(skipped) == len(rows)
    json.dumps(got)  # what was let through is plain data


def questions(row):
    """Whether an article has a question, or something wrong in the place of one."""
    paragraphs = row["paragraphs"]
    return not isinstance(paragraphs, list) or any(not isinstance(p, dict) or p.get("qas") != [] for p in paragraphs)


def test_all_formats_are_spoiled():
    assert set(ROWS) == set(formats.FORMATS)


@settings(max_examples=40, deadline=None)
@given(
    row=st.dictionaries(
        st.sampled_from([c for columns, _ in formats.DETECTED for c in columns.split()]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(max_size=3), lambda x: st.lists(x, max_size=3)
        ),
        max_size=4,
    )
)
def test_any_columns(tmp_path_factory, row):
    file = tmp_path_factory.mktemp("any") / "a.jsonl"
    file.write_text(json.dumps(row))
    try:
        formats.read(Source(path=str(file)))
    except UserError as e:
        assert re.match(place(file) + r"|.*holds no rows", str(e))
