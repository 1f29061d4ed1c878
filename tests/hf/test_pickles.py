import io
import json
import os
import pickle
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtune.errors import UserError
from jaxtune.hf import files, pickles

torch = pytest.importorskip("torch")


def bits(t):
    return t.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b""


def check(file, tensors):
    got = pickles.read(file)
    assert list(got) == list(tensors)
    for n, t in tensors.items():
        assert got[n].shape == tuple(t.shape)
        a = got[n].open()
        assert a.dtype == got[n].dtype
        assert a.tobytes() == bits(t), n
    return got


DTYPES = {
    "float32": "F32",
    "float64": "F64",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}


def test_every_dtype_comes_back_bit_by_bit(tmp_path):
    torch.manual_seed(0)
    tensors = {n: (torch.randn(3, 5) * 4).to(getattr(torch, n)) for n in DTYPES}
    tensors |= {"scalar": torch.tensor(2.5), "none": torch.zeros(0, 4), "deep": torch.randn(2, 1, 3, 2)}
    torch.save(tensors, tmp_path / "a.pth")
    got = check(tmp_path / "a.pth", tensors)
    assert {n: got[n].dtype for n in DTYPES} == {n: files.DTYPES[d] for n, d in DTYPES.items()}


def test_a_state_dict_with_its_metadata_and_parameters(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5))
    state = model.state_dict()
    assert hasattr(state, "_metadata")
    state["own"] = torch.nn.Parameter(torch.randn(4).bfloat16())
    torch.save(state, tmp_path / "pytorch_model.bin")
    check(tmp_path / "pytorch_model.bin", state)


def test_a_shared_storage_is_read_from_where_it_is(tmp_path):
    whole = torch.arange(24.0).reshape(6, 4)
    tensors = {"whole": whole, "tail": whole[2:], "tied": whole, "one": whole[3, 1:3], "flat": whole[4:5]}
    torch.save(tensors, tmp_path / "a.pth")
    got = check(tmp_path / "a.pth", tensors)
    assert got["tail"].start == got["whole"].start + 2 * 4 * 4
    assert got["tied"] == got["whole"]


@pytest.mark.parametrize("view", [lambda t: t.T, lambda t: t[:, 1:], lambda t: t[:1].expand(4, 3)])
def test_what_is_not_contiguous_is_named(tmp_path, view):
    torch.save({"fine": torch.ones(2), "odd.weight": torch.nn.Parameter(view(torch.randn(4, 3)))}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"a.pth: tensor 'odd.weight' is not contiguous .*contiguous\(\)"):
        pickles.read(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"model": {"w": torch.ones(2)}}, "'model' holds another mapping"),
        ({"w": torch.ones(2), "step": 3}, "'step' holds a value of type int"),
        ({"w": [torch.ones(2)]}, "'w' holds a value of type list"),
        ({3: torch.ones(2)}, "'3' holds a value"),
        (torch.ones(2), "no mapping of names to tensors"),
        ({"w": torch.ones(2, dtype=torch.complex64)}, "'torch.ComplexFloatStorage'"),
        (torch.nn.Linear(2, 2), "'torch.nn.modules.linear.Linear'"),
    ],
)
def test_what_is_no_mapping_of_tensors_is_named(tmp_path, value, words):
    torch.save(value, tmp_path / "a.pth")
    with pytest.raises(UserError, match=words) as e:
        pickles.read(tmp_path / "a.pth")
    assert "\n" not in str(e.value)


def test_files_of_old_torch_and_others(tmp_path):
    file = tmp_path / "a.pth"
    torch.save({"w": torch.ones(2)}, file, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match="since 1.6"):
        pickles.read(file)
    file.write_bytes(b"")
    with pytest.raises(UserError, match="empty"):
        pickles.read(file)
    with zipfile.ZipFile(file, "w") as z:
        z.writestr("a/other", "x")
    with pytest.raises(UserError, match="not of torch.save"):
        pickles.read(file)
    with pytest.raises(UserError, match="no such file"):
        pickles.read(tmp_path / "none.pth")
    with pytest.raises(UserError, match="damaged"):
        pickles.read(tmp_path)


def archive(file, blob, compression=zipfile.ZIP_STORED, byteorder=b"little", data=b"\0" * 16):
    with zipfile.ZipFile(file, "w", compression) as z:
        z.writestr("a/data.pkl", blob)
        z.writestr("a/byteorder", byteorder)
        z.writestr("a/data/0", data)


def entry_of(shape=(2, 2), strides=(2, 1), offset=0, kind="FloatStorage", key="0", count=4, tag="storage"):
    """A pickle of one tensor, of torch's form, with any part changed."""

    class Persistent:
        pass

    class P(pickle.Pickler):
        def persistent_id(self, x):
            return (tag, getattr(torch, kind), key, "cpu", count) if isinstance(x, Persistent) else None

    class Tensor:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (Persistent(), offset, shape, strides, False, OrderedDict())

    out = io.BytesIO()
    P(out, 2).dump({"w": Tensor()})
    return out.getvalue()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"offset": 1}, "leaves its storage"),
        ({"shape": (4, 2)}, "leaves its storage"),
        ({"shape": (-2, -2)}, "shape"),
        ({"shape": (2.0, 2)}, "shape"),
        ({"shape": (2, 2, 1)}, "zip"),
        ({"shape": (1,) * 40, "strides": (1,) * 40}, "leaves"),
        ({"offset": "0"}, "offset"),
        ({"count": 5}, "storage '0' should have 5 elements"),
        ({"kind": "DoubleStorage"}, "storage '0' should have 4 elements"),
        ({"key": "../0"}, "no entry"),
        ({"key": 0}, "no storage"),
        ({"tag": "module"}, "no storage"),
    ],
)
def test_tensors_that_do_not_fit_their_storage(tmp_path, changes, words):
    archive(tmp_path / "a.pth", entry_of())
    np.testing.assert_array_equal(pickles.read(tmp_path / "a.pth")["w"].open(), np.zeros((2, 2)))
    archive(tmp_path / "b.pth", entry_of(**changes))
    with pytest.raises(UserError, match=words):
        pickles.read(tmp_path / "b.pth")


def test_compressed_and_big_endian_archives(tmp_path):
    archive(tmp_path / "a.pth", entry_of(), zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match="compressed"):
        pickles.read(tmp_path / "a.pth")
    archive(tmp_path / "a.pth", entry_of(), byteorder=b"big")
    with pytest.raises(UserError, match="big-endian"):
        pickles.read(tmp_path / "a.pth")


class Reduce:
    def __init__(self, f, *args):
        self.parts = f, args

    def __reduce__(self):
        return self.parts


def g(name):
    module, attribute = name.rsplit(".", 1)
    return f"c{module}\n{attribute}\n".encode()


MALICE = {
    "posix.system": lambda s: Reduce(os.system, f"touch {s}"),
    "builtins.eval": lambda s: Reduce(eval, f"open({str(s)!r}, 'w')"),
    "builtins.exec": lambda s: {"w": [Reduce(exec, f"open({str(s)!r}, 'w')")]},
    "builtins.getattr": lambda s: Reduce(getattr, Reduce(eval, f"open({str(s)!r}, 'w')"), "x"),
    "torch.serialization.load": lambda s: Reduce(torch.load, str(s)),
    "numpy._core.multiarray._reconstruct": lambda s: {"w": np.ones(2)},
    "pathlib.PosixPath": lambda s: s,
}


@pytest.mark.parametrize("name", MALICE)
@pytest.mark.parametrize("protocol", [2, 4])
def test_no_code_runs(tmp_path, name, protocol):
    sentinel = tmp_path / "run"
    blob = pickle.dumps({"w": MALICE[name](sentinel)}, protocol)
    if protocol == 2:
        blob = blob.replace(b"__builtin__", b"builtins").replace(b"numpy.core", b"numpy._core")
    archive(tmp_path / "a.pth", blob)
    with pytest.raises(UserError, match=f"a.pth: refuses to load '{name}'.*convert it to safetensors"):
        pickles.read(tmp_path / "a.pth")
    assert not sentinel.exists()


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (b"Vos\nVsystem\n\x93.", "refuses to load 'os.system'"),  # STACK_GLOBAL
        (b"Vcollections\nVOrderedDict.__class__\n\x93.", "refuses to load 'collections.OrderedDict.__class__'"),
        (b"(ios\nsystem\n.", "refuses to load 'os.system'"),  # INST
        (b"ctorch._utils\n_rebuild_tensor_v2.make\n.", "refuses"),
        (g("collections.OrderedDict") + b"}X\x01\0\0\0aI1\nsb.", "TypeError"),  # BUILD on a class
        (g("torch._utils._rebuild_parameter") + b"}X\x01\0\0\0aI1\nsb.", "AttributeError"),
        (g("torch.FloatStorage") + b"N}X\x05\0\0\0dtypeI1\ns\x86b.", "AttributeError"),
        (g("torch.FloatStorage") + b")R.", "TypeError"),
        (g("torch._utils._rebuild_parameter") + g("torch.FloatStorage") + b"R.", "without a tensor"),  # f(*stand-in)
        (b"r\xff\xff\xff\xff.", "damaged"),  # a memo of 4 billion places
        (b"\x8e" + b"\xff" * 7 + b"\x0f.", "damaged"),  # as many bytes
        (b"(" * 100_000 + b".", "no mapping|damaged"),
        (b"\x82\x01.", "damaged"),  # EXT1
        (b"Pos\n.", "damaged"),
    ],
)
def test_tricks_of_single_opcodes(tmp_path, code, words):
    archive(tmp_path / "a.pth", b"\x80\x04" + code)
    with pytest.raises(UserError, match=words):
        pickles.read(tmp_path / "a.pth")
    assert not hasattr(OrderedDict, "a")


def test_a_tensors_path_cannot_be_had_and_changed(tmp_path):
    tensor = entry_of()[:-2]  # without SETITEM and STOP
    tensor = tensor[tensor.index(b"ctorch._utils") :]
    archive(tmp_path / "a.pth", b"\x80\x02" + g("torch._utils._rebuild_parameter") + tensor + b"R.")
    with pytest.raises(UserError, match="without a tensor"):
        pickles.read(tmp_path / "a.pth")


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    file = tmp_path_factory.mktemp("good") / "a.pth"
    torch.save(torch.nn.Linear(3, 2).state_dict(), file)
    return file, file.read_bytes(), pickles.read(file)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_random_damage_is_a_user_error_or_hits_data_only(good, tmp_path_factory, data):
    _, blob, tensors = good
    changed = bytearray(blob)
    if data.draw(st.booleans()):
        del changed[data.draw(st.integers(0, len(blob) - 1)) :]
    for _ in range(data.draw(st.integers(0, 3))):
        if changed:
            changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    file = tmp_path_factory.getbasetemp() / "damaged.pth"
    file.write_bytes(changed)
    try:
        got = pickles.read(file)
    except UserError as e:
        assert "\n" not in str(e)
    else:
        assert {n: t._replace(file=None) for n, t in got.items()} == {
            n: t._replace(file=None) for n, t in tensors.items()
        }
        assert all(t.open().shape == t.shape for t in got.values())


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_a_random_pickle_with_a_right_checksum_too(tmp_path_factory, data):
    blob = bytearray(entry_of())
    for _ in range(data.draw(st.integers(1, 4))):
        blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    file = tmp_path_factory.getbasetemp() / "pickle.pth"
    archive(file, bytes(blob))
    try:
        got = pickles.read(file)
    except UserError as e:
        assert "\n" not in str(e)
    else:
        size = file.stat().st_size
        assert all(0 <= t.start <= size - 16 and t.open().nbytes <= 16 for t in got.values())
        json.dumps({n: t.shape for n, t in got.items()})
