import csv
import gzip
import io
import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtune.config import Source
from jaxtune.data.reading import KINDS, Rows, kind_of, places
from jaxtune.errors import UserError

ROWS = [{"text": t, "n": str(i)} for i, t in enumerate(["one", 'two, "2"', "three\n\n3", "四", "", "six " * 50])]


def write(folder, kind, rows=ROWS):
    """The rows in a file of a kind."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = folder / f"rows{kind}"
    plain, codec = (kind.rsplit(".", 1)[0], kind.rsplit(".", 1)[1]) if kind.count(".") == 2 else (kind, None)
    out = io.BytesIO()
    if plain == ".jsonl":
        out.write("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows).encode())
    elif plain == ".json":
        out.write(json.dumps(rows, indent=1).encode())
    elif plain in (".csv", ".tsv"):
        text = io.StringIO()
        w = csv.DictWriter(text, list(rows[0]), delimiter="\t" if plain == ".tsv" else ",")
        w.writeheader()
        w.writerows(rows)
        out.write(text.getvalue().encode())
    elif plain == ".txt":
        out.write("".join(f"line {i}\r\n\r\n" for i in range(len(rows))).encode())
    elif plain == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), out, row_group_size=4)
    elif plain == ".arrow":
        table = pa.Table.from_pylist(rows)
        new = pa.ipc.new_stream if file.parent.name == "stream" else pa.ipc.new_file
        with new(out, table.schema) as w:
            w.write_table(table, max_chunksize=4)
    elif plain == ".xlsx":
        import openpyxl

        book = openpyxl.Workbook()
        book.active.append(list(rows[0]))
        for r in rows:
            book.active.append(list(r.values()))
        book.save(out)
    packed = {
        "gz": lambda b: gzip.compress(b, mtime=0),
        "zst": lambda b: pa.compress(b, "zstd", asbytes=True),
        None: bytes,
    }[codec](out.getvalue())
    file.write_bytes(packed)
    return file


ALL = [".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".json.gz", ".csv", ".csv.zst", ".tsv", ".txt", ".parquet",
       ".arrow", ".xlsx"]  # fmt: skip


def read(path, **options):
    return list(Rows(Source(path=str(path)), **options))


@pytest.mark.parametrize("kind", ALL)
def test_rows_of_every_kind(tmp_path, kind):
    got = read(write(tmp_path, kind))
    want = [{"text": f"line {i}"} for i in range(6)] if kind == ".txt" else ROWS
    assert [r for _, r in got] == want
    assert got[0][0].startswith(str(tmp_path / f"rows{kind}:"))


def test_arrow_streams(tmp_path):
    folder = tmp_path / "stream"
    folder.mkdir()
    assert [r for _, r in read(write(folder, ".arrow"))] == ROWS


def test_origins_are_lines_of_the_file(tmp_path):
    lines = [o.rpartition(":")[2] for o, _ in read(write(tmp_path, ".csv"))]
    assert lines == ["2", "3", "4", "7", "8", "9"]  # the third row stands on three lines
    assert [o.rpartition(":")[2] for o, _ in read(write(tmp_path, ".json"))] == ["1", "2", "3", "4", "5", "6"]
    assert [o.rpartition(":")[2] for o, _ in read(write(tmp_path, ".parquet"))] == ["1", "2", "3", "4", "5", "6"]
    assert [o.rpartition(":")[2] for o, _ in read(write(tmp_path, ".xlsx"))] == ["2", "3", "4", "5", "6", "7"]


@pytest.mark.parametrize("kind", ALL)
def test_goes_on_from_any_row(tmp_path, kind):
    source = Source(path=str(write(tmp_path, kind)))
    whole = list(Rows(source))
    for k in range(len(whole) + 1):
        first = Rows(source)
        begun = [next(first) for _ in range(k)]
        state = json.loads(json.dumps(first.state))
        first.close()
        again = Rows(source)
        again.state = state
        assert begun + list(again) == whole


@pytest.mark.parametrize("kind", [".csv", ".jsonl", ".json", ".parquet"])
@settings(max_examples=15, deadline=None)
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")), min_size=1),
    data=st.data(),
)
def test_any_text_survives_and_resumes(tmp_path_factory, kind, texts, data):
    rows = [{"text": t, "n": str(i)} for i, t in enumerate(texts)]
    file = write(tmp_path_factory.mktemp("any"), kind, rows)
    assert [r for _, r in read(file)] == rows
    k = data.draw(st.integers(0, len(rows)))
    it = Rows(Source(path=str(file)))
    for _ in range(k):
        next(it)
    again = Rows(Source(path=str(file)))
    again.state = it.state
    it.close()
    assert [r for _, r in again] == rows[k:]


def test_resume_of_a_plain_file_reads_only_what_is_left(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": f"{i:09}"}) + "\n" for i in range(1000)))
    it = Rows(Source(path=str(file)))
    it.state = {"file": 0, "at": [22 * 990, 990], "rows": 990}
    assert next(it) == (f"{file}:991", {"text": "000000990"})
    it.close()


def test_folders_patterns_and_several_files(tmp_path):
    for name in ("b.jsonl", "a.jsonl.gz", ".hidden.jsonl", "README.md"):
        text = json.dumps({"text": name}).encode()
        (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.jsonl").write_text('{"text": "c"}')
    assert [r["text"] for _, r in read(tmp_path)] == ["a.jsonl.gz", "b.jsonl"]
    assert [r["text"] for _, r in read(tmp_path / "*.jsonl")] == ["b.jsonl"]
    assert [r["text"] for _, r in read(tmp_path / "**" / "*.jsonl")] == ["b.jsonl", "c"]
    it = Rows(Source(path=str(tmp_path)))
    next(it)
    again = Rows(Source(path=str(tmp_path)))
    again.state = it.state
    it.close()
    assert [r["text"] for _, r in again] == ["b.jsonl"]
    assert len(list(Rows(Source(path=str(tmp_path), max_samples=1)))) == 1


def test_paths_that_hold_nothing_to_read(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match=r"several kinds \(.jsonl, .txt\)"):
        places(str(tmp_path))
    with pytest.raises(UserError, match="no file matches"):
        places(str(tmp_path / "*.csv"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no file that can be read"):
        places(str(tmp_path / "empty"))
    with pytest.raises(UserError, match="no such file; did you mean 'a.jsonl'"):
        places(str(tmp_path / "aa.jsonl"))


def test_object_stores():
    import fsspec

    store = fsspec.filesystem("memory")
    for name in ("b", "a"):
        store.pipe(f"/bucket/{name}.csv.gz", gzip.compress(f"text\n{name}\n".encode()))
    store.pipe("/bucket/_SUCCESS", b"")
    assert [r["text"] for _, r in read("memory://bucket")] == ["a", "b"]
    [(origin, _)] = read("memory://bucket/a*.gz")
    assert origin.endswith("/bucket/a.csv.gz:2")
    assert [r["text"] for _, r in read("memory://bucket/b.csv.gz")] == ["b"]
    with pytest.raises(UserError, match="cannot be read"):
        read("memory://bucket/none.csv")
    with pytest.raises(UserError, match="cannot be read"):
        read("nosuchstore://bucket/none.csv")


def test_json_files_of_every_shape(tmp_path):
    file = tmp_path / "a.json"
    for text in (
        '[{"a": 1}, {"a": 2}]',
        '{"version": "x", "data": [{"a": 1},\n{"a": 2}], "more": {"data": []}}',
        '{"a": 1}\n{"a": 2}\n',
        ' \n[\n{"a": 1}\n,{"a": 2}]\n\n',
    ):
        file.write_text(text)
        assert [r for _, r in read(file)] == [{"a": 1}, {"a": 2}]
    file.write_text('{"a": 1}')
    assert read(file) == [(f"{file}:1", {"a": 1})]
    file.write_text('{"data": [\n{"a": 1},\n{"a": 2}]}')
    assert [o for o, _ in read(file)] == [f"{file}:1", f"{file}:2"]
    for text, words in (
        ('{\n"a": 1\n}', "this is one object"),
        ('[{"a": 1}, {"a"', "a.json:2: a JSON object was expected"),
        ('[{"a": 1},\n{"a": 2}\n', "a.json:3: ',' was expected, and there is 'the end of the file'"),
        ('[{"a": 1}] 7', "a.json:1: what follows the list"),
        ('{"data": [{"a": 1}],\n"data": []}', "stands twice"),
        ('{"da', "a.json:1: not JSON"),
        ("7", "'{' was expected"),
    ):
        file.write_text(text)
        with pytest.raises(UserError) as e:
            read(file)
        assert words in str(e.value)


def test_quotes_in_tsv_are_characters_unless_they_hold_a_field(tmp_path):
    file = tmp_path / "a.tsv"
    lines = [
        ('"Hello\tshe said', ['"Hello', "she said"]),
        ('"so" it is\t5" wide', ['"so" it is', '5" wide']),
        ('x\t"open', ["x", '"open']),
        ('y\tends in"', ["y", 'ends in"']),
        ('"a ""b"""\t"tab\there"', ['a "b"', "tab\there"]),
        ('"two\nlines"\t"and\ntwo"', ["two\nlines", "and\ntwo"]),
        ('z\t"', ["z", '"']),
        ('last\tline', ["last", "line"]),
    ]  # fmt: skip
    file.write_text("p\tq\n" + "\n".join(line for line, _ in lines) + "\n")
    assert [list(r.values()) for _, r in read(file)] == [fields for _, fields in lines]
    for k in range(len(lines)):
        first, again = Rows(Source(path=str(file))), Rows(Source(path=str(file)))
        begun = [next(first) for _ in range(k)]
        again.state = first.state
        assert begun + list(again) == read(file)
    file.write_text('p\tq\n"one\n')
    with pytest.raises(UserError, match="a.tsv:2: not CSV"):
        read(file)


def test_a_stream_without_its_end_is_cut_short(tmp_path):
    folder = tmp_path / "stream"
    folder.mkdir()
    file = write(folder, ".arrow")
    file.write_bytes(file.read_bytes()[:-8])  # just the mark that ends it
    with pytest.raises(UserError, match="rows.arrow:1: .*cut short"):
        read(file)


@pytest.mark.parametrize("kind", [".jsonl.gz", ".jsonl.zst", ".json.zst", ".parquet", ".arrow", ".xlsx"])
@pytest.mark.parametrize("part", [0.4, 0.9, 0.999])
def test_a_file_that_is_cut_short_never_just_ends(tmp_path, kind, part):
    rows = [{"text": os.urandom(40).hex()} for _ in range(200)]
    file = write(tmp_path, kind, rows)
    blob = file.read_bytes()
    file.write_bytes(blob[: int(len(blob) * part)])
    for bad_rows in ("stop", "skip"):
        with pytest.raises(UserError, match=rf"rows{kind}:\d+: "):
            read(file, bad_rows=bad_rows)


def test_csv_quirks(tmp_path):
    file = tmp_path / "a.csv"
    file.write_bytes(b'\xef\xbb\xbfid,text\r\n1,"a\r\nb"\r\n\r\n2,x,y\r\n3,"unclosed\r\n4,fine\r\n5,"q"q\r\n')
    it = Rows(Source(path=str(file)), bad_rows="skip")
    assert list(it) == [(f"{file}:2", {"id": "1", "text": "a\r\nb"}), (f"{file}:7", {"id": "4", "text": "fine"})]
    assert [s.partition(": ")[0] for s in it.skipped] == [f"{file}:5", f"{file}:6", f"{file}:8"]
    with pytest.raises(UserError, match="a.csv:5: 2 columns were expected, as in the header, and there are 3"):
        read(file)
    file.write_text("a,a\n1,2\n")
    with pytest.raises(UserError, match="names column 'a' twice"):
        read(file)


def test_sheets(tmp_path):
    import openpyxl

    book = openpyxl.Workbook()
    for row in (["text", "label", None], ["a", 1, None], [None, None, None], ["b", 2.5], ["c", None, "stray"]):
        book.active.append(row)
    book.save(tmp_path / "a.xlsx")
    it = Rows(Source(path=str(tmp_path / "a.xlsx")), bad_rows="skip")
    assert [r for _, r in it] == [{"text": "a", "label": "1"}, {"text": "b", "label": "2.5"}]
    assert "a.xlsx:5: has cells beyond" in it.skipped[0]


def test_a_parquet_row_that_is_no_text(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    bad = pa.array([b"good", b"\xff\xfe", b"also"]).cast(pa.binary())
    table = pa.table({"text": pa.Array.from_buffers(pa.string(), 3, bad.buffers())})
    pq.write_table(table, tmp_path / "a.parquet")
    it = Rows(Source(path=str(tmp_path / "a.parquet")), bad_rows="skip")
    assert [r["text"] for _, r in it] == ["good", "also"]
    assert "a.parquet:2: a value cannot be read" in it.skipped[0]


def test_hub(tmp_path, monkeypatch):
    """`datasets` takes a folder of that name where there is one, so no network is needed."""
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    write(folder, ".jsonl").rename(folder / "test.jsonl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    source = Source(path="hf://owner/name", split="test")
    for streaming in (False, True):
        whole = list(Rows(source, streaming=streaming))
        assert whole[0] == ("hf://owner/name:1", ROWS[0])
        assert [r for _, r in whole] == ROWS
        it = Rows(source, streaming=streaming)
        next(it), next(it)
        again = Rows(source, streaming=streaming)
        again.state = json.loads(json.dumps(it.state))
        assert list(again) == whole[2:]
        it.close()
    with pytest.raises(UserError, match="hf://owner/name:1: not to be had from the hub"):
        list(Rows(Source(path="hf://owner/name", split="nosuch")))
    with pytest.raises(UserError, match="hf://no/where:1: not to be had from the hub"):
        list(Rows(Source(path="hf://no/where")))


def test_endings():
    assert set(KINDS) == {".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".parquet", ".arrow", ".xlsx"}
    for name in ("a", "a.gz", "a.parquet.gz", "a.docx"):
        with pytest.raises(UserError, match="files of type"):
            kind_of(name)
