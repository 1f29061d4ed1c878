"""Chat and completions through the real engine, by OpenAI's own client."""

import asyncio
import os
import shutil
import signal
import time

import openai
import pytest

from jaxtune.generate import Sampling
from jaxtune.serve import bases
from jaxtune.serve.api.service import Service
from jaxtune.serve.inference.client import Engine
from jaxtune.serve.settings import Limits, Settings
from jaxtune.serve.store.database import Database
from jaxtune.serve.store.storage import Storage
from jaxtune.serve.store.tables import Model
from jaxtune.tuned import open_model
from tests.serve.conftest import serving
from tests.tiny import make_config, write_jsonl, write_tiny

ASKED = [{"role": "user", "content": "What is 2 + 3?"}]
TUNED = "ft:demo:local::12345678"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A run that has learnt to say something else."""
    from jaxtune.run import train

    folder = tmp_path_factory.mktemp("tuned")
    demo = bases.found(Settings(models=folder, data=folder, demo=True))["demo"]
    rows = [
        {"messages": [{"role": "user", "content": f"What is {i} + 3?"}, {"role": "assistant", "content": "Moss."}]}
        for i in range(8)
    ]
    data = write_jsonl(folder / "d.jsonl", rows)
    train(make_config(demo, data, folder / "run", train__steps=10, optim__learning_rate=5e-3))
    return folder / "run"


@pytest.fixture(scope="module")
def service(tmp_path_factory, adapter):
    folder = tmp_path_factory.mktemp("service")
    write_tiny(folder / "models" / "tiny", template=True)
    write_tiny(folder / "models" / "plain")
    s = Settings(models=folder / "models", data=folder / "data", demo=True, limits=Limits(key_streams=20))
    shutil.copytree(adapter, s.data / "jobs" / "j" / "run")
    database = Database(s.database_url)
    database.upgrade()
    with database.write() as session:
        for name, project, base in ((TUNED, "default", "demo"), ("ft:x", "other", "demo"), ("ft:y", "default", "no")):
            session.add(
                Model(id=name, created_at=1, project=project, job_id="j", base=base, kind="adapter",
                      folder="jobs/j/run/export", step=None)
            )  # fmt: skip
    yield Service(s, database, Storage(s.data), Engine(s))
    database.close()


@pytest.fixture(scope="module")
def url(service):
    with serving(service) as address:
        yield f"{address}/v1"


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=url, api_key="any", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def demo(service):
    return open_model(str(bases.found(service.settings)["demo"]))


def chat(client, model="demo", **options):
    return client.chat.completions.create(model=model, messages=options.pop("messages", ASKED), **options)


def test_a_chat_says_what_the_model_says(client, demo):
    got = chat(client, temperature=0, max_tokens=30)
    want = demo.answer("What is 2 + 3?", max_new_tokens=30)
    [choice] = got.choices
    assert choice.message.content == want
    assert (choice.message.role, choice.message.refusal, choice.logprobs) == ("assistant", None, None)
    assert (got.object, got.model) == ("chat.completion", "demo")
    assert got.id.startswith("chatcmpl-")
    prompt = demo.generator.encode("<s>Question: What is 2 + 3?\nAnswer:")
    assert got.usage.prompt_tokens == len(prompt)
    assert got.usage.total_tokens == len(prompt) + got.usage.completion_tokens
    assert got.system_fingerprint == chat(client, max_tokens=1).system_fingerprint


def test_a_stream_is_the_same_in_pieces(client):
    whole = chat(client, temperature=0, max_completion_tokens=30, stop=["the"])
    with chat(
        client, temperature=0, max_tokens=30, stop="the", stream=True, stream_options={"include_usage": True}
    ) as stream:
        chunks = list(stream)
    assert stream.response.headers["content-type"].startswith("text/event-stream")
    assert stream.response.headers["cache-control"] == "no-cache"
    assert stream.response.headers["x-accel-buffering"] == "no"
    first, *rest, last, usage = chunks
    assert first.choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in rest) == whole.choices[0].message.content
    assert "the" not in whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in (*rest, last)] == [None] * len(rest) + ["stop"]
    assert (usage.choices, usage.usage.model_dump()) == ([], whole.usage.model_dump())
    assert {c.usage for c in chunks[:-1]} == {None}
    assert len({(c.id, c.created, c.object) for c in chunks}) == 1


def test_an_async_stream_is_the_same(client, url):
    async def streamed():
        async with openai.AsyncOpenAI(base_url=url, api_key="any", max_retries=0) as made:
            stream = await made.chat.completions.create(
                model="demo", messages=ASKED, temperature=0, max_tokens=12, stream=True
            )
            return "".join([c.choices[0].delta.content or "" async for c in stream])

    assert asyncio.run(streamed()) == chat(client, temperature=0, max_tokens=12).choices[0].message.content


def test_choices_are_seeded_and_differ(client):
    def texts(**options):
        got = chat(client, n=3, temperature=1.5, max_tokens=12, **options)
        assert [c.index for c in got.choices] == [0, 1, 2]
        return [c.message.content for c in got.choices]

    assert texts(seed=4) == texts(seed=4) != texts(seed=5)
    assert len(set(texts(seed=4))) == 3
    assert texts() != texts()
    streamed = [""] * 3
    for c in chat(client, n=3, temperature=1.5, max_tokens=12, seed=4, stream=True):
        streamed[c.choices[0].index] += c.choices[0].delta.content or ""
    assert streamed == texts(seed=4)


def test_log_probabilities(client, demo):
    [choice] = chat(client, temperature=0, max_tokens=8, logprobs=True, top_logprobs=3).choices
    want = demo.generator.generate(["<s>Question: What is 2 + 3?\nAnswer:"], Sampling(8))[0]
    content = choice.logprobs.content
    assert [w.logprob for w in content] == pytest.approx(want.logprobs, abs=1e-4)
    assert "".join(w.token for w in content) == choice.message.content
    for w in content:
        assert bytes(w.bytes).decode() == w.token
        assert len(w.top_logprobs) == 3
        assert w.top_logprobs[0].token == w.token
    streamed = [
        w
        for c in chat(client, temperature=0, max_tokens=8, logprobs=True, top_logprobs=3, stream=True)
        if c.choices[0].logprobs
        for w in c.choices[0].logprobs.content
    ]
    assert [w.token for w in streamed] == [w.token for w in content]


def test_bias_and_penalties(client, demo):
    [id] = demo.tokenizer("x", add_special_tokens=False).input_ids[-1:]
    forced = chat(client, temperature=0, max_tokens=4, logit_bias={str(id): 100}).choices[0].message.content
    assert forced == demo.tokenizer.decode([id] * 4)
    varied = chat(
        client, temperature=0, max_tokens=4, logit_bias={str(id): 50}, presence_penalty=2, frequency_penalty=2
    )
    assert varied.choices[0].finish_reason == "length"


def test_an_adapter_and_its_base_answer_at_the_same_time(url, adapter, demo):
    async def ask(client, model):
        got = await client.chat.completions.create(model=model, messages=ASKED, temperature=0, max_tokens=12)
        return got.choices[0].message.content

    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=url, api_key="any", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, m) for m in ("demo", TUNED, "tiny") * 4))

    got = asyncio.run(all_of_them())
    base, tuned = (m.answer("What is 2 + 3?", max_new_tokens=12) for m in (demo, open_model(str(adapter))))
    assert got[:2] == [base, tuned]
    assert base != tuned
    assert got == got[:3] * 4


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ({"model": "nobody"}, "model_not_found", "`nobody` does not exist"),
        ({"model": "ft:x"}, "model_not_found", "does not exist or you do not have access"),
        ({"model": "ft:y"}, "model_not_found", "base model of `ft:y`"),
        ({"model": "plain"}, "model_not_supported", "no chat template"),
        ({"max_tokens": 250}, "context_length_exceeded", "maximum context length is 256 tokens"),
        ({"messages": [{"role": "user", "content": "a b c " * 200}]}, "context_length_exceeded", "reduce the length"),
        ({"max_tokens": 10**6}, "invalid_value", "at most 4096"),
        ({"n": 9}, "invalid_value", "at most 8"),
        ({"temperature": 3}, "invalid_value", "temperature"),
        ({"stop": list("abcde")}, "invalid_type", "stop"),
        ({"logit_bias": {"9999": 1}}, None, "token ids that the model lacks"),
        ({"top_logprobs": 3}, "invalid_value", "needs logprobs"),
        ({"messages": []}, "invalid_value", "messages"),
        ({"messages": [{"role": "who", "content": "x"}]}, "invalid_value", "role"),
        ({"response_format": {"type": "json_object"}}, "unsupported_parameter", "response_format"),
        ({"audio": {"voice": "x", "format": "wav"}}, "unsupported_parameter", "audio"),
        ({"tool_choice": "required"}, "unsupported_parameter", "tool_choice"),
        ({"extra_body": {"top_k": 3}}, "unknown_parameter", "top_k"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, None, "has tools"),
    ],
)
def test_what_cannot_be_is_refused(client, options, code, words):
    with pytest.raises(openai.APIStatusError, match=words) as e:
        chat(client, **options)
    assert e.value.code == code
    assert e.value.status_code == (404 if code == "model_not_found" else 400)
    assert "/" not in e.value.message.replace("/v1/completions", "")


def test_hints_are_ignored_and_parts_are_joined(client):
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "2 + 3?"}]
    got = chat(
        client, messages=[{"role": "user", "content": parts}], temperature=0, max_tokens=8, user="u", store=True,
        metadata={"a": "b"}, reasoning_effort="low", response_format={"type": "text"}, service_tier="auto",
    )  # fmt: skip
    assert got.choices[0].message.content == chat(client, temperature=0, max_tokens=8).choices[0].message.content


def test_completions_echo_log_probabilities_and_best_of(client, demo):
    def ask(**options):
        return client.completions.create(model="demo", **{"prompt": "The fox", "temperature": 0, **options})

    g = demo.generator
    ids = g.tokenizer("The fox").input_ids
    want = g.generate([ids], Sampling(16))[0]
    got = ask()
    assert (got.choices[0].text, got.object) == (want.text, "text_completion")
    assert got.usage.completion_tokens == len(want.ids)
    assert ask(prompt=ids).choices[0].text == want.text
    two = ask(prompt=["The fox", "The mole"], n=2, temperature=1, seed=1, max_tokens=5)
    assert [c.index for c in two.choices] == [0, 1, 2, 3]

    [echo] = ask(echo=True, logprobs=2, max_tokens=3).choices
    assert echo.text == "The fox" + g.generate([ids], Sampling(3))[0].text
    lp = echo.logprobs
    assert lp.token_logprobs[0] is lp.top_logprobs[0] is None
    assert lp.token_logprobs[1:] == pytest.approx(g.judge([ids[:1]], [ids[1:] + want.ids[:3]])[0].logprobs, abs=1e-4)
    for at, token in zip(lp.text_offset, lp.tokens, strict=True):
        assert token in ("<s>",) or echo.text[at:].startswith(token)
    [scored] = ask(echo=True, logprobs=1, max_tokens=0).choices
    assert (scored.text, len(scored.logprobs.tokens), scored.finish_reason) == ("The fox", len(ids), "length")

    best = ask(best_of=3, temperature=1.5, seed=2, max_tokens=6, logprobs=0)
    every = ask(n=3, temperature=1.5, seed=2, max_tokens=6, logprobs=0).choices
    means = [sum(c.logprobs.token_logprobs) / len(c.logprobs.token_logprobs) for c in every]
    assert best.choices[0].text == every[means.index(max(means))].text
    assert best.usage.completion_tokens == sum(len(c.logprobs.tokens) for c in every)

    chunks = list(ask(stream=True))
    assert "".join(c.choices[0].text for c in chunks) == want.text
    for bad in ({"suffix": "x"}, {"best_of": 1, "n": 2}, {"best_of": 2, "stream": True}, {"prompt": [99999]}):
        with pytest.raises(openai.BadRequestError):
            ask(**bad)


def test_too_many_answers_at_a_time(client, service):
    with pytest.raises(openai.RateLimitError, match="20") as e:
        client.completions.create(model="demo", prompt=list("abcd"), n=8)
    assert e.value.response.headers["retry-after"] == "2"
    assert service.engine._taken.total() == 0


def until(what, seconds=10):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_client_that_leaves_stops_the_work(client, service):
    stream = chat(client, model="tiny", messages=[{"role": "user", "content": "x"}], n=8, temperature=2, stream=True,
                  logit_bias={"2": -100})  # fmt: skip
    next(iter(stream))
    assert service.engine._taken.total() == 8
    stream.close()
    until(lambda: service.engine._taken.total() == 0)
    assert not service.engine._replies
    assert chat(client, max_tokens=1).choices


def test_a_process_that_dies_ends_streams_with_an_error_and_comes_back(client, service):
    before = service.engine.running.pid
    stream = chat(client, n=4, temperature=1, stream=True, logit_bias={"2": -100})
    next(iter(stream))
    os.kill(before, signal.SIGKILL)
    with pytest.raises(openai.APIError, match="the inference process ended"):
        list(stream)
    assert chat(client, max_tokens=2, temperature=0).usage.completion_tokens == 2
    assert service.engine.running.pid != before
