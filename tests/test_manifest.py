import json

import pytest

from jaxtune import manifest


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.bin").write_bytes(bytes(range(256)) * 40)
    (tmp_path / "b.json").write_text("{}")
    manifest.write(tmp_path, {"step": 3})
    return tmp_path


def test_what_is_whole_says_nothing(folder):
    (folder / "stray").write_text("not of the manifest")
    assert manifest.read(folder) == ({"step": 3}, "")
    assert not list(folder.glob(".*"))


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda f: flip(f / "d/a.bin"), "d/a.bin was changed"),
        (lambda f: (f / "d/a.bin").write_bytes(b"x"), "d/a.bin has 1 bytes instead of 10,240"),
        (lambda f: (f / "b.json").unlink(), "b.json is missing"),
        (lambda f: (f / manifest.NAME).write_text('{"about": '), "manifest.json cannot be read: JSONDecodeError"),
        (lambda f: (f / manifest.NAME).write_bytes(b"\xff\xff"), "manifest.json cannot be read: UnicodeDecodeError"),
    ],
)
def test_harm_is_named(folder, harm, said):
    harm(folder)
    assert said in manifest.read(folder)[1]


def test_a_manifest_guards_itself(folder):
    whole = json.loads((folder / manifest.NAME).read_text())
    whole["about"]["step"] = 4
    (folder / manifest.NAME).write_text(json.dumps(whole))
    assert manifest.read(folder) == (None, "manifest.json was changed")


def test_no_manifest(tmp_path):
    with pytest.raises(FileNotFoundError):
        manifest.read(tmp_path)
