"""Reports: what is exact is exact, what goes on from few layers is near, what is missing is said."""

import dataclasses
import importlib.util
import json

import jax
import pytest
import yaml

from jaxtune import chips, config, log, planning, steps
from jaxtune.cli import main
from jaxtune.errors import UserError
from jaxtune.layers import Rope
from jaxtune.planning import compiled, estimate, plan, search, subject, topology
from jaxtune.planning.reading import Collective
from tests.tiny import write_tiny

WITHOUT_LIBTPU = importlib.util.find_spec("libtpu") is None


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def no_libtpu(monkeypatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "libtpu" else found(name, *a))
    monkeypatch.setattr(log, "_WARNED", set())


def make(model: object, **train: object) -> config.Config:
    shape = {"batch_size": 4, "compute_dtype": "float32", **train}
    return config.load(None, {"model": str(model), "data": {"max_length": 32}, "train": shape})


def test_names_of_machines() -> None:
    assert topology.parse("v5litepod-16").name == "v5e:4x4"
    assert topology.parse("v5p-8").shape == (2, 2, 1)
    assert topology.parse("v6e:2x4").devices == 8
    assert topology.parse("tpu7x-8").devices == 8  # four chips of two
    for wrong in ("v5e-7", "h100-8", "v5e", "tpu"):
        with pytest.raises(UserError, match="topology"):
            topology.parse(wrong)


def test_a_model_that_is_not_known() -> None:
    with pytest.raises(UserError, match="did you mean 'llama3.1-8b'"):
        subject.model_config("llama3.1-8")


def test_a_plan_of_this_machine_is_the_compilers_and_is_kept(tiny) -> None:
    c = make(tiny)
    first, second = plan(c, ["cpu:1"])[0], plan(c, ["cpu:1"])[0]
    job = subject.imagined(c, jax.devices()[:1])
    m = steps.compile_step(job).memory_analysis()
    knobs = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(job.knobs)))
    assert first.compiled.peak >= m.argument_size_in_bytes
    # beside the state: the step's number, the key, and the knobs, but for single numbers that this step does not turn
    assert -128 <= m.argument_size_in_bytes - first.state.total - knobs <= 64
    assert not first.compiled.cached
    assert second.compiled.cached
    assert dataclasses.replace(second.compiled, cached=False) == first.compiled
    assert first.fits is None  # a CPU is not in the table
    assert "computed" in [name.strip() for name, _ in first.lines()]


def test_few_layers_go_on_as_all_would_on_this_machine(tmp_path) -> None:
    c = make(write_tiny(tmp_path / "deep", layers=6), remat="none")
    full, fast = (plan(c, ["cpu:1"], how)[0] for how in ("full", "fast"))
    assert fast.how == "compiled with 2 and 3 of 6 layers, and on from there"
    assert sum(fast.compiled.reading.flops.values()) == pytest.approx(
        sum(full.compiled.reading.flops.values()), rel=0.03
    )


def few(model: object, **sections: object) -> tuple[int, int] | None:
    c = config.load(None, {"model": str(model), "data": {"max_length": 32}, **sections})
    return subject.few_layers(subject.imagined(c, jax.devices()[:1]))


def test_few_layers_are_of_all_kinds_and_divide_over_stages(tmp_path) -> None:
    folder = write_tiny(tmp_path / "deep", layers=6)
    assert few(folder) == (2, 3)
    assert few(folder, tuning={"method": "freeze", "last": 1}) is None
    assert few("gemma3-1b") == (6, 12)
    job = subject.imagined(make(folder), jax.devices()[:1])
    stages = jax.sharding.AbstractMesh((2,), ("stage",))
    assert subject.few_layers(dataclasses.replace(job, mesh=stages)) == (4, 6)


@pytest.mark.parametrize(
    ("tuning", "why"),
    [({"method": "freeze", "last": 1}, "several groups"), ({"method": "lisa", "layers": 4}, "refused")],
)
def test_where_few_layers_do_not_do_all_are_compiled(tmp_path, tuning, why) -> None:
    folder = write_tiny(tmp_path / "deep", layers=5)
    c = config.load(None, {"model": str(folder), "data": {"max_length": 32}, "tuning": tuning})
    r = plan(c, ["cpu:1"], "fast")[0]
    assert r.how.startswith("compiled, all 5 layers, because")
    assert why in r.how


@pytest.mark.skipif(WITHOUT_LIBTPU, reason="libtpu is not installed")
def test_few_layers_go_on_as_all_would_on_tpus(tmp_path) -> None:
    folder = write_tiny(
        tmp_path / "deep", layers=8, embed=256, heads=4, head=64, mlp=512, ropes=(Rope(64, context=128),)
    )
    c = make(folder, batch_size=8, compute_dtype="bfloat16")
    full, fast = (plan(c, ["v5e:2x2"], how)[0] for how in ("full", "fast"))
    assert full.fits
    done, near = (sum(r.compiled.reading.flops.values()) for r in (full, fast))
    assert near == pytest.approx(done, rel=0.03)
    assert fast.compiled.peak == pytest.approx(full.compiled.peak, rel=0.1)  # small arrays stay on the chip
    assert full.compiled.reading.unknown_loops == []
    assert {k.split("_segmented")[0]: n for k, n in full.compiled.reading.kernels.items()} == {
        "splash_mha_fwd": 16,  # and again, for the backward pass
        "splash_mha_dq": 8,
        "splash_mha_dkv": 8,
    }
    padded = 2 * 4 * 128 * 128 * 64 * 2  # rows, heads, queries, keys, head, and two operations
    share = (32 + 1) / 2 / 32
    assert full.compiled.reading.kernel_flops == pytest.approx(8 * padded * (2 * 2 + 3 + 4) * share)
    assert {axis for c in full.compiled.reading.collectives for axis in c.axes} == {"fsdp"}
    assert full.compiled.reading.saved == 8 * 2 * 32 * 256 * 2  # the input of each layer, two rows a chip


def test_without_libtpu_state_is_exact_and_the_rest_said_to_be_a_rule(tiny, no_libtpu, capsys) -> None:
    r = plan(make(tiny), ["v5e-1"])[0]
    assert "pip install 'jaxtune[plan]'" in capsys.readouterr().err
    assert r.how.startswith("by rule")
    assert r.fits
    job = subject.imagined(make(tiny), jax.devices()[:1])
    assert r.state.frozen == sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(job.state.frozen))
    with pytest.raises(UserError, match="pip install"):
        plan(make(tiny), ["v5e-256"])


def test_an_estimate_is_the_slowest_of_three() -> None:
    t = topology.parse("v5e:2x4")
    c = Collective("all-gather", ("fsdp",), 8, 8e9, 1.0, "")
    assert estimate.bandwidth(t, c) == 2 * 45e9  # two axes, neither of which closes
    assert estimate.bandwidth(topology.parse("v5p:4x4x4"), dataclasses.replace(c, size=64)) == 6 * 90e9
    assert estimate.bandwidth(t, dataclasses.replace(c, kind="collective-permute")) == 45e9
    two = topology.parse("v5e:2x4", slices=2)
    assert estimate.bandwidth(two, c, "fsdp") == 25e9 / 4
    assert estimate.bandwidth(two, c) == 2 * 45e9
    s = estimate.Seconds(1.0, 3.0, 2.0)
    assert (s.overlapped, s.one_by_one, s.bound) == (3.0, 6.0, "memory")


def test_prices_are_found_by_every_name(tiny, no_libtpu) -> None:
    t = topology.parse("v5e-4")
    assert topology.price(t, {"v5e": 1.0, "v5litepod-4": 2.0}) == 2.0
    assert topology.price(t, {"v5e": 1.0, "v5e-8": 2.0}) == 1.0
    assert topology.price(t, {"H100": 3.0}) is None
    with pytest.raises(UserError, match="topology 'v5x' is not known"):
        plan(make(tiny), ["v5e-1"], prices={"v5x": 1.0})


def test_gpus_have_float32_of_their_own_and_three_quarters_of_their_memory(monkeypatch) -> None:
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    h100 = chips.of("NVIDIA H100 80GB HBM3")
    assert estimate._rate(h100, "f32") == 67e12
    assert estimate.usable(h100) == 60e9
    assert estimate._rate(chips.of("TPU v5 lite"), "f32") == 197e12 / 6


def test_a_refusal_of_the_compiler_is_read() -> None:
    found = compiled._refused("RESOURCE_EXHAUSTED: Ran out of memory. Used 17.50G of 15.75G hbm. Exceeded by 1.75G.")
    assert found is not None
    assert (found.peak, found.fits, found.limit) == (17.5 * 2**30, False, 15.75 * 2**30)
    assert compiled._refused("something else") is None


def test_a_search_gives_yaml_that_fits(no_libtpu) -> None:
    c = config.load(None, {"model": "smollm2-135m", "data": {"max_length": 512}, "train": {"batch_size": 8}})
    found = search.search(c, topology.parse("v5e-1"), how="rule")
    assert found.best is not None
    assert found.best.fits
    assert found.tried > 20
    pasted = yaml.safe_load(found.text().partition("fits:\n")[2].rpartition("\n  estimate")[0])
    assert next(iter(search.settings(c, topology.parse("v5e-1")))) == c
    merged = config.load(None, c.model_dump(mode="json", exclude={"tuning"}), pasted or {})
    assert merged.train == found.best.config.train


def test_a_search_tries_rows_and_keeps_to_what_can_be_had(no_libtpu, monkeypatch) -> None:
    sections = {"train": {"batch_size": 6, "remat": "offload", "matmuls": "int8"}, "tuning": {"method": "lora"}}
    c = config.load(None, {"model": "smollm2-135m", "data": {"max_length": 512}, **sections})
    t = topology.parse("v5e-1")
    tried = list(search.settings(c, t))
    assert {x.train.batch_size for x in tried} == {3, 6, 12, 24}
    assert {x.train.remat for x in tried} == {"none", "dots", "full", "offload"}
    assert {x.tuning.base for x in tried} == {None}  # 8-bit products take weights as they are
    assert len(tried) == len({str(x) for x in tried})
    found = search.search(c, t, how="rule")
    changed = "batch_size" in found.changes().get("train", {})
    assert ("what is learned changes" in found.text()) == changed

    def refuse(*given: object) -> None:
        raise UserError("attention: not here")

    whole = search.report
    monkeypatch.setattr(search, "report", lambda *a: whole(*a) if a[2] == "rule" else refuse())
    with pytest.raises(UserError, match="no setting that was tried is possible; attention: not here"):
        search.search(c, t)


def test_without_libtpu_the_kernel_is_still_the_tpus(tiny, no_libtpu) -> None:
    t = topology.parse("v5e-1")
    assert planning.imagined(make(tiny, attention="splash"), t).blueprint.decoder.attention == "splash"
    prefix = {"model": str(tiny), "data": {"max_length": 32}, "tuning": {"method": "prefix"}}
    assert planning.imagined(config.load(None, prefix), t).blueprint.decoder.attention == "xla"
    with pytest.raises(UserError, match="train.attention=splash: a prefix stands in every layer's past"):
        planning.imagined(config.load(None, prefix, {"train": {"attention": "splash"}}), t)


def test_products_that_are_no_faster_are_named(tiny, monkeypatch, capsys) -> None:
    monkeypatch.setattr(log, "_WARNED", set())
    monkeypatch.setattr(chips, "of", lambda kind: next(c for c in chips.CHIPS if c.name == "v6e"))
    subject.imagined(make(tiny, matmuls="int8"), jax.devices()[:1])
    assert "matmuls" not in capsys.readouterr().err
    subject.imagined(make(tiny, matmuls="fp8"), jax.devices()[:1])
    assert "train.matmuls=fp8: v6e multiplies it no faster than bfloat16" in capsys.readouterr().err


def test_when_nothing_fits_it_says_by_how_much_and_what_to_change(no_libtpu) -> None:
    c = config.load(None, {"model": "llama3.1-8b", "tuning": {"method": "full"}, "train": {"batch_size": 1}})
    text = search.search(c, topology.parse("v5e-1"), how="rule").text()
    assert "nothing fits" in text
    assert "too many" in text
    assert "tuning.method=lora" in text


def test_the_verb_prints_json_and_tables(tiny, capsys) -> None:
    keys = [f"model={tiny}", "data.max_length=32", "train.batch_size=4", "--how", "rule", "--topology", "cpu"]
    with pytest.raises(SystemExit) as e:
        main(["plan", *keys, "--json"])
    assert e.value.code == 0
    (told,) = json.loads(capsys.readouterr().out)
    assert told["memory"]["peak"] > told["memory"]["frozen"] > 0
    assert told["flops_per_token"]["total"] > 0
