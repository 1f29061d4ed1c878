"""Training files looked through: what is wrong where, what is odd, how many tokens."""

import gzip
import json
from pathlib import Path

import pytest

from jaxtune.serve.checks import checking
from jaxtune.serve.checks.validation import Report, inspect
from jaxtune.serve.settings import Limits
from tests.serve.places import questions
from tests.tiny import write_tiny

GOOD = questions(10)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("m") / "tiny", template=True)


@pytest.fixture
def look(model, tmp_path):
    def look(what, role="training_file", other=None, limits=None, max_length=64) -> Report:
        def write(name: str, what) -> Path:
            rows = (r if isinstance(r, bytes) else json.dumps(r).encode() for r in what) if what else ()
            file = tmp_path / name
            file.write_bytes(what if isinstance(what, bytes) else b"".join(r + b"\n" for r in rows))
            return file

        held = None if other is None else write("file-held", other)
        return inspect(write("file-x", what), model, limits or Limits(), max_length, role, held)

    return look


def _lines(rows) -> bytes:
    return b"".join(json.dumps(r).encode() + b"\n" for r in rows)


def test_a_good_file_is_counted(look) -> None:
    r = look([*GOOD, GOOD[0]], other=GOOD[:2])
    assert r.failure() is None
    assert (r.format, r.examples, r.error_count, r.messages.max) == ("chat", 11, 0, 2)
    assert 0 < r.tokens.trained < r.tokens.total
    assert sum(b[2] for b in r.tokens.lengths.bins) == 11
    found = {x.check: (x.count, x.lines) for x in r.remarks}
    assert found["duplicate"] == (1, [11])
    assert found["in_validation"] == (3, [1, 2, 11])
    assert json.loads(json.dumps(r.to_dict()))["tokens"]["counted"] == 11


@pytest.mark.parametrize(
    "blob",
    [
        b"\xef\xbb\xbf" + _lines(GOOD),
        _lines(GOOD).replace(b"\n", b"\r\n"),
        _lines(GOOD) + b"\n  \n",
        _lines(GOOD).rstrip(b"\n"),
    ],
    ids=["byte order mark", "CRLF", "blank last line", "no last line end"],
)
def test_what_editors_do_to_a_file_is_no_error(look, blob) -> None:
    r = look(blob)
    assert r.failure() is None
    assert r.examples == 10


CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


def _chat(*messages, **beside) -> dict:
    return {"messages": list(messages), **beside}


USER, ANSWER = CHAT["messages"]


@pytest.mark.parametrize(
    ("bad", "check", "path", "said"),
    [
        ([1], "data_type", "", "is a list; write an object"),
        (b'{"messages": [], "messages": []}', "not_json", "", "'messages' stands twice"),
        (b'{"messages": NaN}', "not_json", "", "NaN is no JSON"),
        (b'{"prompt": "\\ud800"}', "not_json", "", "surrogate"),
        (b'{"a": "\0"}', "nul", "", "NUL"),
        (b'{"a": "\xff"}', "not_utf8", "", "is not UTF-8 at byte 8"),
        (b'{"a": ' + b"[" * 5000 + b"]" * 5000 + b"}", "not_json", "", "nested"),
        (b'{"a": ' + b"[" * 80 + b"]" * 80 + b"}", "too_deep", "", "more than 64 deep"),
        (b'{"a": "' + b"x" * 3000 + b'"}', "line_too_long", "", "more than 2000 bytes"),
        (_chat(), "missing_messages_list", "messages", "is empty"),
        ({"tools": []}, "missing_messages_list", "messages", "is missing"),
        (_chat(USER, {"content": "b"}), "message_missing_key", "messages[1].role", "is missing"),
        (_chat(USER, {"role": "assistant"}), "message_missing_key", "messages[1].content", "is missing"),
        (_chat(USER, {"role": "asistant", "content": "b"}), "unrecognized_role", "messages[1].role", "'assistant'"),
        (_chat(USER, {"role": "assistant", "content": None}), "missing_content", "messages[1].content", "is null"),
        (_chat(USER, {**ANSWER, "mood": 1}), "message_unrecognized_key", "messages[1].mood", "is no key"),
        (_chat(USER, {**ANSWER, "weight": 2}), "message_weight", "messages[1].weight", "neither 0"),
        (_chat(USER, "b"), "data_type", "messages[1]", "is a text"),
        (_chat(USER), "example_missing_assistant_message", "messages", "nothing to learn"),
        (_chat(USER, ANSWER, mood=1), "unrecognized_key", "mood", "is no key"),
        ({"prompt": "a", "completion": "b"}, "other_format", "", "keep one format"),
        (_chat(USER, {"role": "system", "content": "s"}, ANSWER), "data_type", "", "can only come first"),
    ],
)  # fmt: skip
def test_a_bad_line_is_told_with_its_place(look, bad, check, path, said) -> None:
    r = look([*GOOD, bad], limits=Limits(line_bytes=20_000 if isinstance(bad, bytes) and b"[" in bad else 2000))
    assert [(e.line, e.path, e.check) for e in r.errors] == [(11, path, check)], r.errors
    assert said in r.errors[0].message
    code, message, param = r.failure()
    assert (code, param) == ("invalid_training_file", "training_file")
    assert message.startswith("The job failed due to an invalid training file. Invalid file format. Line 11")


def test_tool_calls_need_no_content_and_empty_keys_of_clients_do_no_harm(look) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    answer = {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None, "annotations": []}
    r = look([*GOOD, _chat(USER, answer)])
    assert [e.check for e in r.errors] in ([], ["template"])  # whether the model's template has a place for them
    assert all("content" not in e.path for e in r.errors)


@pytest.mark.parametrize(
    ("blob", "said"),
    [
        (json.dumps(GOOD, indent=1).encode(), "one JSON value over several lines"),
        (json.dumps(GOOD[0], indent=1).encode(), "one JSON value over several lines"),
        (gzip.compress(_lines(GOOD)), "is gzip; unpack it"),
        ("x".encode("utf-16"), "is UTF-16; save it as UTF-8"),
    ],
)
def test_what_is_no_json_lines_is_told_once(look, blob, said) -> None:
    r = look(blob)
    assert [(e.line, e.check) for e in r.errors] == [(None, "not_jsonl")]
    assert said in r.errors[0].message
    assert r.failure("supervised")[0] == "invalid_training_file"


def test_a_file_needs_ten_examples_and_a_validation_file_one(look) -> None:
    said = "Training file has 3 example(s), but must have at least 10 examples"
    assert look(GOOD[:3]).failure() == ("invalid_n_examples", said, "training_file")
    assert look(b"").failure()[1] == "Training file has 0 example(s), but must have at least 10 examples"
    assert look(GOOD[:1], "validation_file").failure() is None
    assert look(b"", "validation_file").failure()[2] == "validation_file"


def test_an_unknown_format_and_another_methods_are_told_as_the_service_does(look) -> None:
    assert look([{"text": "a"}] * 10).failure()[1].endswith(checking.UNKNOWN)
    pair = {"input": _chat(USER), "preferred_output": [ANSWER], "non_preferred_output": [{**ANSWER, "content": "c"}]}
    r = look([pair] * 10)
    assert (r.format, r.error_count) == ("preference", 0)
    assert r.failure("dpo") is None
    assert r.failure()[1].endswith(
        "Input file file-x is in the fine-tune-preference format, but the specified fine-tuning job is not using 'dpo' "
        "as the training method (provided method=supervised)."
    )
    assert look(GOOD).failure("dpo")[1].endswith("training method (provided method=dpo).")
    assert look([{**pair, "preferred_output": []}] * 10).errors[0].path == "preferred_output"


def test_all_bad_lines_are_counted_and_the_first_listed(look) -> None:
    r = look([*GOOD, *[_chat(USER)] * 30], limits=Limits(errors_listed=7))
    assert (r.error_count, len(r.errors), r.checks) == (30, 7, {"example_missing_assistant_message": 30})
    assert r.failure()[1].endswith("; and 25 more")


def test_what_is_odd_is_remarked(look) -> None:
    odd = [
        _chat(USER, ANSWER, USER),
        _chat({"role": "system", "content": "s"}, ANSWER),
        _chat(USER, {**ANSWER, "content": " "}),
        _chat(USER, {**ANSWER, "weight": 0}),
        _chat(USER, {**ANSWER, "content": "word " * 100}),
    ]
    found = {x.check: x.lines for x in look([*GOOD, *odd]).remarks}
    assert (found["last_not_assistant"], found["missing_user"], found["near_empty"]) == ([11], [12], [13])
    assert (found["too_long"], 14 in found["nothing_trained"]) == ([15], True)


def test_completions_that_are_labels_are_counted(look) -> None:
    rows = [{"prompt": f"{i}", "completion": " odd" if i % 2 else " even"} for i in range(15)]
    r = look(rows)
    assert (r.format, r.labels) == ("completion", {"even": 8, "odd": 7})
    assert r.failure() is None
    assert look(GOOD).labels is None


def test_a_line_of_a_hundred_megabytes_takes_no_memory(look, tmp_path) -> None:
    import tracemalloc

    blob = b'{"prompt": "' + b"x" * 10**8 + b'"}\n' + _lines(GOOD)
    file = tmp_path / "large"
    file.write_bytes(blob)
    del blob
    from jaxtune.serve.checks import lines

    tracemalloc.start()
    with file.open("rb") as f:
        found = list(lines.objects(f, Limits(line_bytes=2**20)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found) == 11
    assert found[0][1].check == "line_too_long"
    assert peak < 2**24


def test_examples_beyond_the_limit_end_the_reading(look) -> None:
    r = look(questions(30), limits=Limits(examples=12))
    assert r.errors[-1].check == "too_many_examples"
    assert r.examples == 13
