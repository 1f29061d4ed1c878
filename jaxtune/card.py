"""The model card of a folder: README.md, as people and the Hugging Face hub read it.

Its head is the hub's metadata (https://huggingface.co/docs/hub/model-cards); nothing stands in it that is not known, so
a base that is only a folder here is named in the text alone, and a licence that the base does not state is not guessed.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

FILE, PLOT = "README.md", "loss.png"
_HASHED = 2**33  # bytes of a file of data whose hash is taken; larger ones would keep the export waiting
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_TEXTS = {  # what a licence's text is known by, and its name on the hub
    r"Apache License\s+Version 2\.0": "apache-2.0",
    r"MIT License|Permission is hereby granted, free of charge": "mit",
    r"LLAMA 2 COMMUNITY LICENSE": "llama2",
    r"META LLAMA 3 COMMUNITY LICENSE": "llama3",
    r"LLAMA (3\.\d) COMMUNITY LICENSE": r"llama\1",
}


@dataclass(frozen=True)
class Base:
    """The model that another was made from: as the user names it, and the folder where it lies."""

    name: str
    folder: Path

    @property
    def hub_id(self) -> str | None:
        """Its name on the hub, if it is of there.

        >>> Base("meta-llama/Llama-3.2-1B", Path("/cache")).hub_id
        'meta-llama/Llama-3.2-1B'
        >>> Base("models/llama", Path("/hub/models--a--b/snapshots/c0ffee")).hub_id
        'a/b'
        """
        cached = re.search(r"models--([\w.-]+?)--([\w.-]+)/snapshots/", f"{self.folder}/")
        if cached:
            return f"{cached[1]}/{cached[2]}"
        local = Path(self.name).expanduser().exists() or "://" in self.name
        return self.name if _HUB_ID.fullmatch(self.name) and not local else None

    @property
    def shown(self) -> str:
        """A name without this machine's folders."""
        return self.hub_id or Path(self.name).name

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The head of its own card."""
        file = self.folder / FILE
        return read_metadata(file.read_text(encoding="utf-8", errors="replace")) if file.is_file() else {}

    @property
    def licence(self) -> dict[str, str]:
        """`license` and, where that is "other", `license_name` and `license_link`: by its card, or by its licence's
        text. Empty where neither says."""
        said = {k: str(v) for k, v in self.metadata.items() if k in ("license", "license_name", "license_link")}
        if "license" in said:
            return said
        found = sorted(self.folder.glob("[Ll][Ii][Cc][Ee][Nn][SsCc][Ee]*"))
        text = " ".join(found[0].read_text(encoding="utf-8", errors="replace")[:4000].split()) if found else ""
        for pattern, name in _TEXTS.items():
            if match := re.search(pattern.replace(" ", r"\s+"), text):
                return {"license": match.expand(name)}
        return {"license": "other", "license_name": "as-the-base", "license_link": found[0].name} if found else {}


@dataclass(frozen=True)
class Card:
    """What a card says; `render` writes it."""

    name: str
    summary: str
    base: Base | None = None
    relation: Literal["adapter", "finetune", "quantized", "merge"] | None = None
    library: str = "transformers"  # that opens it
    pipeline: str = "text-generation"
    tags: Sequence[str] = ()
    datasets: Sequence[str] = ()  # of the hub
    scores: Mapping[str, float] = field(default_factory=dict)
    scored_on: str = ""  # a data set's name
    sections: Sequence[tuple[str, str]] = ()  # heading and Markdown
    load: Sequence[str] = ()  # Python, each a way to open it
    plot: bool = False  # whether loss.png lies beside it


LIMITS = (
    "Nothing was measured but what stands above. A language model says wrong things with confidence and has the biases "
    "of its base and of its data; this one was not tested for any use in which an error harms somebody."
)


def render(card: Card) -> str:
    """The text of a card."""
    import yaml

    head = yaml.safe_dump(_metadata(card), sort_keys=False, allow_unicode=True)
    parts = [f"---\n{head}---\n\n# {card.name}\n", card.summary]
    if card.plot:
        parts.append(f"![loss]({PLOT})")
    parts += [f"## {heading}\n\n{text}" for heading, text in card.sections]
    if card.load:
        parts.append("## How to load it\n\n" + "\n\n".join(f"```python\n{code.strip()}\n```" for code in card.load))
    if card.base is not None:
        parts.append(f"## Licence\n\n{_licence(card.base)}")
    parts.append(f"## Limits\n\n{LIMITS}")
    return "\n\n".join(p.rstrip() for p in parts) + "\n"


def derived(
    name: str,
    summary: str,
    base: Base,
    relation: Literal["adapter", "finetune", "quantized", "merge"] | None,
    sections: Sequence[tuple[str, str]] = (),
    source: str = "",
    tags: Sequence[str] = (),
    load: Sequence[str] = (),
    chat: bool = False,
) -> Card:
    """The card of a model that another became without training: merged, converted, pruned, quantised.

    Args:
      name: of the model.
      summary: what was done, in a sentence.
      base: what it was done to; of a tuned model, the base of its tuning.
      relation: as the hub has it.
      sections: heading and Markdown of each part that is to be said.
      source: the text of the card of what it was made from; how that was trained, and on what, is taken over.
      tags: beyond "jaxtune".
      load: Python; the usual ways where not given.
    """
    head, own = read_metadata(source), {heading for heading, _ in sections}
    old = re.split(r"^## (.*)$", source, flags=re.MULTILINE)[1:]
    kept = [(h, t.strip()) for h, t in zip(old[::2], old[1::2], strict=True) if h in CARRIED and h not in own]
    pipeline = head["pipeline_tag"] if head.get("pipeline_tag") in tuple(_AUTO) else "text-generation"
    ours = "jaxtune" in (head.get("tags") or ())
    datasets = head.get("datasets") or () if ours else ()  # of a base's card, what others say of it
    return Card(
        name, summary, base, relation, pipeline=pipeline, tags=tags, datasets=datasets,
        sections=[*sections, *(kept if ours else [])],
        load=load or loading(pipeline, chat),
    )  # fmt: skip


PLACE = 'folder = "."  # where this card lies, or the name of its repository on the hub'
CARRIED = ("Scores", "Data", "Training", "Settings", "Versions")  # headings of a run's card
PIPELINES = {  # by a head's kind
    None: "text-generation",
    "classification": "text-classification",
    "regression": "text-classification",
    "token_classification": "token-classification",
    "span_qa": "question-answering",
}
_AUTO = {
    "text-generation": "CausalLM",
    "text-classification": "SequenceClassification",
    "token-classification": "TokenClassification",
    "question-answering": "QuestionAnswering",
}


def loading(pipeline: str, chat: bool, adapter: bool = False, size: int | None = None) -> list[str]:
    """Python that opens a folder, run in it: by transformers or peft, and by jaxtune.

    Args:
      pipeline: the hub's name of the task.
      chat: whether its tokenizer has a chat template; None where either may be.
      adapter: whether the folder is one.
      size: outputs of the head of an adapter.
    """
    auto = f"Auto{'Peft' if adapter else ''}ModelFor{_AUTO[pipeline]}"
    options = f", num_labels={size}" if adapter and size else ""
    code = [
        *(
            [f"from peft import {auto}", "from transformers import AutoTokenizer"]
            if adapter
            else [f"from transformers import {auto}, AutoTokenizer"]
        ),
        "",
        PLACE,
        f"model = {auto}.from_pretrained(folder{options})",
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
    ]
    if pipeline != "text-generation":
        code += ['print(model(**tokenizer("A text.", return_tensors="pt")))']
        return ["\n".join(code), "# jaxtune predict . rows.jsonl --out answers.jsonl   (in a shell)"]
    if chat:
        code += [
            'chat = [{"role": "user", "content": "Hello!"}]',
            "text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)",
            'tokens = tokenizer(text, add_special_tokens=False, return_tensors="pt")',
        ]
    else:
        code += ['tokens = tokenizer("Once upon a time", return_tensors="pt")']
    code += [
        "answer = model.generate(tokens.input_ids, attention_mask=tokens.attention_mask, max_new_tokens=64)",
        "print(tokenizer.decode(answer[0]))",
    ]
    ours = ["import jaxtune", "", PLACE, 'print(jaxtune.load(folder).answer("Hello!"))']
    return ["\n".join(code), "\n".join(ours)]


def write(folder: Path, card: Card) -> None:
    """Write README.md into a folder; one that is there, such as the base's, is replaced: the card names the base."""
    (folder / FILE).write_text(render(card), encoding="utf-8")


def table(rows: Sequence[Sequence[Any]]) -> str:
    """A table in Markdown, the first row its head.

    >>> print(table([("file", "rows"), ("a|b", 3)]))
    | file | rows |
    |---|---|
    | a\\|b | 3 |
    """
    lines = ["| " + " | ".join(str(x).replace("|", "\\|").replace("\n", " ") for x in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def read_metadata(text: str) -> dict[str, Any]:
    """The head of a card; nothing where it has none or it cannot be read.

    >>> read_metadata("---\\nlicense: mit\\n---\\n# A model")
    {'license': 'mit'}
    """
    import yaml

    match = re.match(r"\ufeff?---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    try:
        head = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        return {}
    return head if isinstance(head, dict) else {}


def has_chat_template(folder: Path) -> bool:
    """Whether a folder's tokenizer has a chat template."""
    words = folder / "tokenizer_config.json"
    inside = words.is_file() and '"chat_template"' in words.read_text(encoding="utf-8")
    return inside or (folder / "chat_template.jinja").is_file()


def at_home(text: str, name: str, base: str | None) -> str:
    """The text of a card as it stands in the repository `name` of the hub, of a model made from `base` there.

    >>> print(at_home("---\\nlicense: mit\\n---\\n" + PLACE, "me/mine", "you/yours"))
    ---
    license: mit
    base_model: you/yours
    ---
    folder = "me/mine"
    """
    import yaml

    text = text.replace(PLACE, f'folder = "{name}"')
    if base is None:
        return text
    head = read_metadata(text)
    said = yaml.safe_dump({**head, "base_model": base}, sort_keys=False, allow_unicode=True)
    body = text.split("\n---", 1)[1].partition("\n")[2] if head else f"\n{text}"
    return f"---\n{said}---\n{body}"


def digest(file: Path) -> str:
    """The SHA-256 of a file of data, as `sha256sum` prints it; "not taken" of a very large one."""
    stat = file.stat()
    return "not taken" if stat.st_size > _HASHED else _digest(file, stat.st_size, stat.st_mtime_ns)


@lru_cache(4096)
def _digest(file: Path, size: int, modified: int) -> str:
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _metadata(card: Card) -> dict[str, Any]:
    base, out = card.base, dict[str, Any]()
    if base is not None and base.hub_id is not None:
        out["base_model"] = base.hub_id
        if card.relation is not None:
            out["base_model_relation"] = card.relation
    out |= {"library_name": card.library, "pipeline_tag": card.pipeline, "tags": ["jaxtune", *card.tags]}
    if base is not None:
        out |= base.licence
        if language := base.metadata.get("language"):
            out["language"] = language
    if card.datasets:
        out["datasets"] = list(card.datasets)
    if card.scores:
        metrics = [{"type": name, "value": round(value, 6), "name": name} for name, value in card.scores.items()]
        data = {"name": card.scored_on, "type": card.scored_on}
        task = {"type": card.pipeline}
        out["model-index"] = [{"name": card.name, "results": [{"task": task, "dataset": data, "metrics": metrics}]}]
    return out


def _licence(base: Base) -> str:
    said = base.licence
    name = said.get("license_name") or said.get("license")
    if name is None:
        return f"See that of the base, {base.shown}, which the folder does not state."
    files = sorted(f.name for f in base.folder.glob("[Ll][Ii][Cc][Ee][Nn][SsCc][Ee]*"))
    beside = f" ([{files[0]}]({files[0]}))" if files else ""
    return f"`{name}`, that of the base, {base.shown}{beside}."
