"""What the inference process does: reads questions, prepares them beside the decoding, decodes model by model."""

import json
import os
import queue
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO, NamedTuple

import jax
import numpy as np

from jaxtune import log
from jaxtune.data.examples import Conversation, Message
from jaxtune.errors import UserError
from jaxtune.serve.inference.answers import Answer
from jaxtune.serve.inference.asks import LINE_BYTES, Ask, Failure, Piece
from jaxtune.serve.inference.batch import Choice, Row
from jaxtune.serve.inference.models import Held, Models

_READERS = 8  # threads that open models, render templates and make tokens


class Prepared(NamedTuple):
    """A question whose model is there, with the tokens of its prompts."""

    id: int
    ask: Ask
    held: Held
    prompts: list[list[int]]
    limits: list[int]


class Question:
    """A question under way."""

    def __init__(self, prepared: Prepared) -> None:
        self.held = prepared.held
        self.answers: list[Answer] = []
        self.left = 0  # answers that are not whole yet


class Process:
    """Questions in, replies out. One thread decodes."""

    def __init__(self, budget: int, out: BinaryIO) -> None:
        self.models = Models(budget)
        self.out, self.writing = out, threading.Lock()
        self.inbox: queue.SimpleQueue = queue.SimpleQueue()
        self.readers = ThreadPoolExecutor(_READERS)
        self.preparing: set[int] = set()
        self.under_way: dict[int, Question] = {}

    def run(self, source: BinaryIO) -> None:
        """Answer until `source` ends."""
        threading.Thread(target=self._listen, args=(source,), daemon=True).start()
        self._say({"ready": True})
        while True:
            self._hear()
            for held in {q.held.key: q.held for q in self.under_way.values()}.values():
                if held.batch.busy:
                    self._step(held)

    def _listen(self, source: BinaryIO) -> None:
        while line := source.readline(LINE_BYTES):
            self.inbox.put(json.loads(line))
        os._exit(0)  # nobody is left to answer to; the template's process ends with its pipe

    def _say(self, reply: dict[str, Any]) -> None:
        data = json.dumps(reply).encode() + b"\n"
        if len(data) > LINE_BYTES:
            failure = Failure(400, "the answer is too long to be sent; ask for less of it, or without logprobs")
            data = json.dumps({"id": reply["id"], "error": failure.told()}).encode() + b"\n"
        line = memoryview(data)
        with self.writing:
            while line:
                line = line[self.out.write(line) :]

    # --- what comes in

    def _hear(self) -> None:
        """Take what has come; wait for it where there is nothing to decode."""
        while True:
            try:
                said = self.inbox.get(block=not self.under_way)
            except queue.Empty:
                return
            if isinstance(said, Prepared):
                self._try(said)
            elif said["op"] == "cancel":
                self.preparing.discard(said["id"])
                if (question := self.under_way.get(said["id"])) is not None:
                    self._end(said["id"], question)
            elif said["op"] == "forget":
                self.models.forget(said["folder"])
            else:
                id, op = said.pop("id"), said.pop("op")
                self.preparing.add(id)
                self.readers.submit(self._prepare, id, op == "count", Ask(**said))

    def _prepare(self, id: int, count: bool, ask: Ask) -> None:
        """Open the model and make tokens; runs in a thread of its own."""
        try:
            held = self.models.acquire(ask.base, ask.adapter)
            try:
                prompts = _prompts(held, ask)
                limits = _limits(held, ask, prompts)
            except BaseException:
                self.models.release(held)
                raise
            if count:
                self.models.release(held)
                self._say({"id": id, "tokens": [len(ids) for ids in prompts]})
                self._say({"id": id, "done": True})
            else:
                self.inbox.put(Prepared(id, ask, held, prompts, limits))
        except Failure as e:
            self._say({"id": id, "error": e.told()})
        except Exception:
            self._fail(id)

    def _try(self, p: Prepared) -> None:
        if p.id not in self.preparing:  # nobody waits any more
            self.models.release(p.held)
            return
        self.preparing.discard(p.id)
        try:
            self._begin(p)
        except Exception:  # a long prompt to be echoed may take too much memory
            self._end(p.id, self.under_way[p.id])
            self._fail(p.id)

    def _begin(self, p: Prepared) -> None:
        question = self.under_way[p.id] = Question(p)
        self._say({"id": p.id, "tokens": [len(ids) for ids in p.prompts]})
        ask, first = p.ask, []
        for i, (ids, limit) in enumerate(zip(p.prompts, p.limits, strict=True)):
            for sample in range(ask.n):
                row = Row(None, ids, limit, _choice(ask, p.held), ask.seed, sample, bool(ask.logprobs))
                row.owner = answer = Answer(p.id, i * ask.n + sample, ask, p.held, row)
                question.answers.append(answer)
                if ask.echo:
                    text = ask.prompts[i] if ask.prompts and isinstance(ask.prompts[i], str) else None
                    with jax.set_mesh(p.held.tuned.mesh):
                        first.append(answer.echo(text))
                if limit:
                    question.left += 1
                    p.held.batch.add(row)
                else:
                    first.append(answer.nothing())
        self._tell(p.id, first)
        if not question.left:
            self._finish(p.id, question)

    # --- what goes out

    def _step(self, held: Held) -> None:
        try:
            with jax.set_mesh(held.tuned.mesh):
                made = held.batch.step()
        except Exception:  # memory ran out, perhaps; the others go on
            held.batch.clear()
            for id, question in [x for x in self.under_way.items() if x[1].held is held]:
                self._end(id, question)
                self._fail(id)
            return
        pieces: dict[int, list[Piece]] = {}
        for row, tokens in made:
            answer: Answer = row.owner
            if (piece := answer.take(tokens)) is None:
                continue
            pieces.setdefault(answer.id, []).append(piece)
            if piece.finish is not None:
                held.batch.drop(row)
                self.under_way[answer.id].left -= 1
        for id, some in pieces.items():
            self._tell(id, some)
            if not (question := self.under_way[id]).left:
                self._finish(id, question)

    def _tell(self, id: int, pieces: list[Piece]) -> None:
        if pieces:
            self._say({"id": id, "pieces": [p.told() for p in pieces]})

    def _finish(self, id: int, question: Question) -> None:
        self._end(id, question)
        self._say({"id": id, "done": True})

    def _end(self, id: int, question: Question) -> None:
        for answer in question.answers:
            question.held.batch.drop(answer.row)
        del self.under_way[id]
        self.models.release(question.held)

    def _fail(self, id: int) -> None:
        log.warn(traceback.format_exc())
        self._say({"id": id, "error": Failure(500, "the answer could not be made; the service's log says why").told()})


def _prompts(held: Held, ask: Ask) -> list[list[int]]:
    """The tokens of each prompt."""
    tokenizer = held.tuned.tokenizer
    if ask.messages is not None:
        if held.tuned.template is None:
            raise Failure(
                400, "this model has no chat template; ask it by /v1/completions", "model_not_supported", "model"
            )
        messages = tuple(
            Message(m["role"], m["content"], extra={k: v for k, v in m.items() if k not in ("role", "content")})
            for m in ask.messages
        )
        try:
            text, last = held.tuned.asked(Conversation(messages, "messages", "messages", tuple(ask.tools)))
        except UserError as e:
            raise Failure(400, f"{e}", param="messages") from e
        return [held.tuned.generator.encode(text + (last or ""))]
    out = []
    for given in ask.prompts or []:
        if isinstance(given, str):
            ids = tokenizer(given).input_ids
            if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and not given.endswith(tokenizer.eos_token or " "):
                ids = ids[:-1]  # some tokenizers end every text
            out.append(ids or [next((i for i in (tokenizer.bos_token_id, *held.tuned.eos) if i is not None), 0)])
        elif all(0 <= i < held.tuned.blueprint.decoder.vocab for i in given):
            out.append(given)
        else:
            raise Failure(
                400, f"prompt has token ids that the model lacks; it has {held.tuned.blueprint.decoder.vocab}",
                param="prompt",
            )  # fmt: skip
    return out


def _limits(held: Held, ask: Ask, prompts: list[list[int]]) -> list[int]:
    """New tokens of each prompt's texts, at most."""
    context, out = held.tuned.generator.context, []
    if any(not 0 <= int(i) < held.tuned.blueprint.decoder.vocab for i in ask.logit_bias):
        raise Failure(
            400, f"logit_bias has token ids that the model lacks; it has {held.tuned.blueprint.decoder.vocab}",
            param="logit_bias",
        )  # fmt: skip
    for ids in prompts:
        wanted = 1 if ask.max_tokens is None else ask.max_tokens
        if len(ids) + wanted > context:
            raise Failure(
                400,
                f"This model's maximum context length is {context} tokens. However, you requested "
                f"{len(ids) + wanted} tokens ({len(ids)} in the prompt, {wanted} in the completion). Please reduce the "
                "length of the prompt or completion.",
                "context_length_exceeded",
                "messages" if ask.messages is not None else "prompt",
            )
        out.append(min(ask.most, context - len(ids)) if ask.max_tokens is None else ask.max_tokens)
    return out


def _choice(ask: Ask, held: Held) -> Choice:
    bias = None
    if ask.logit_bias:
        bias = np.zeros(held.tuned.blueprint.decoder.rows, np.float32)
        for i, value in ask.logit_bias.items():
            bias[int(i)] += value
    one = np.float32
    return Choice(one(ask.temperature), one(ask.top_p), one(ask.presence_penalty), one(ask.frequency_penalty), bias)
