"""Uploads, to a hub on this machine: what goes there, what never does, and what is said where it fails."""

import json

import huggingface_hub
import huggingface_hub.constants
import pytest

from jaxtune import card, cli, push_hub
from jaxtune.errors import UserError
from tests.fake_hub import Hub

NAME = "me/mine"
pytestmark = pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning")  # within huggingface_hub


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    with Hub() as hub:
        yield hub


@pytest.fixture
def folder(tmp_path):
    """A run with its export: an adapter of a folder of this machine."""
    run = tmp_path / "run"
    export = run / "export"
    export.mkdir(parents=True)
    (run / "config.yaml").write_text("model: demo\n")
    (export / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 9)
    (export / "adapter_config.json").write_text(json.dumps({"r": 8, "base_model_name_or_path": str(tmp_path)}))
    (export / "README.md").write_text(f"---\nlicense: mit\n---\n\n# run\n\n{card.PLACE}\n")
    (export / ".hidden").write_text("no")
    return run


def sent(folder, hub, **options):
    return push_hub.send(push_hub.gather(folder, NAME, "you/base"), endpoint=hub.url, **options)


def test_what_is_sent_comes_back(folder, hub, tmp_path):
    assert sent(folder, hub, message="first") == f"{hub.url}/{NAME}"
    repo = hub.repos[NAME]
    assert repo["private"]
    assert repo["messages"] == ["first"]
    got = huggingface_hub.snapshot_download(NAME, endpoint=hub.url, local_dir=tmp_path / "got")
    files = {p.name: p.read_bytes() for p in (tmp_path / "got").iterdir() if p.is_file()}
    export = folder / "export"
    assert files.keys() == {"adapter_model.safetensors", "adapter_config.json", "README.md"}
    assert files["adapter_model.safetensors"] == (export / "adapter_model.safetensors").read_bytes()
    assert json.loads(files["adapter_config.json"]) == {"r": 8, "base_model_name_or_path": "you/base"}
    read = huggingface_hub.ModelCard.load(f"{got}/README.md")
    assert (read.data.license, read.data.base_model) == ("mit", "you/base")
    assert read.text.strip() == '# run\n\nfolder = "me/mine"'
    assert str(tmp_path) in (export / "adapter_config.json").read_text()  # here it stays as it was


def test_a_branch_and_the_public(folder, hub):
    assert sent(folder, hub, public=True, revision="v2") == f"{hub.url}/{NAME}/tree/v2"
    assert not hub.repos[NAME]["private"]
    assert set(hub.repos[NAME]["files"]["v2"]) > set(hub.repos[NAME]["files"]["main"])
    with pytest.raises(UserError, match="me/mine: is there and everybody can see it; say --public"):
        sent(folder, hub)


def test_after_a_failure_only_what_is_missing_is_sent(folder, hub):
    hub.answers.append(("POST .*/commit/", 409))
    with pytest.raises(UserError, match="answers 409: somebody else writes there at the same time; run it again"):
        sent(folder, hub)
    assert not hub.repos[NAME]["files"]["main"]
    sent(folder, hub)
    assert len([c for c in hub.calls if c[0] == "PUT"]) == 1
    assert len(hub.repos[NAME]["files"]["main"]) == 3


@pytest.mark.parametrize(
    ("where", "code", "said"),
    [
        ("GET /api/models", 401, "answers 401: the token is not accepted"),
        ("POST /api/repos/create", 403, "answers 403: the token may not write there"),
        ("PUT /lfs", 403, "answers 403: the token may not write there"),
        ("POST .*/commit/", 400, "answers 400: .*as asked.*; later run it again: what is sent stays sent"),
    ],
)
def test_refusals_are_a_line(folder, hub, where, code, said):
    hub.answers += [(where, code)] * 2
    with pytest.raises(UserError, match=said) as e:
        sent(folder, hub)
    assert "hf_right" not in str(e.value)


def test_no_network_and_no_token(folder, hub, monkeypatch):
    upload = push_hub.gather(folder, NAME, "you/base")
    with Hub() as gone:
        pass
    with pytest.raises(UserError, match=f"me/mine: {gone.url} is not reached .*look at the network"):
        push_hub.send(upload, endpoint=gone.url)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(UserError, match="nobody is signed in; `hf auth login`, or set HF_TOKEN"):
        push_hub.send(upload, endpoint=hub.url)
    assert not hub.calls


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("pytorch_model.bin", "pickles"),
        ("sub/weights.PT", "pickles"),
        ("optimizer.safetensors", "state of an optimiser"),
        ("checkpoints/5/data", "checkpoints"),
        (".env", "keys"),
    ],
)
def test_what_is_not_for_others_is_refused(folder, name, why):
    file = folder / "export" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("x")
    with pytest.raises(UserError, match=f"{name.split('/')[0]}.*: {why}.* are not uploaded; remove it"):
        push_hub.gather(folder, NAME, "you/base")


def test_folders_that_are_not_ready(folder, tmp_path):
    export = folder / "export"
    with pytest.raises(UserError, match=r"its base is .*, which others do not have; give --base OWNER/NAME"):
        push_hub.gather(folder, NAME)
    with pytest.raises(UserError, match="'mine' is no name on the hub"):
        push_hub.gather(folder, "mine")
    (export / "link.json").symlink_to(folder / "config.yaml")
    with pytest.raises(UserError, match=r"link.json: is a link out of the folder"):
        push_hub.gather(folder, NAME, "you/base")
    (export / "README.md").unlink()
    with pytest.raises(UserError, match="has no model card"):
        push_hub.gather(folder, NAME)
    with pytest.raises(UserError, match="nothing: no such folder"):
        push_hub.gather(tmp_path / "nothing", NAME)
    export.rename(folder / "other")
    with pytest.raises(UserError, match="the run has no export yet"):
        push_hub.gather(folder, NAME)


def test_the_verb_says_what_it_sends_before_it_does(folder, hub, capsys, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    for option in ("--dry-run", "--private"):
        with pytest.raises(SystemExit) as e:
            cli.main(["push", str(folder), NAME, "--base", "you/base", option])
        assert not e.value.code
        said = capsys.readouterr().out.splitlines()
        assert "  adapter_model.safetensors  2.2 KiB" in said
        assert said[3].startswith("3 files, 2.4 KiB, to me/mine (private)")
        assert bool(hub.repos) == (option == "--private")
        assert said[-1] == ("nothing is sent" if option == "--dry-run" else f"sent: {hub.url}/{NAME}")
