"""Scripts and templates for TPU slices: what they would run, what they do when a slice goes, and that they read."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

TPU = Path(__file__).parents[2] / "tools" / "tpu"
SETTINGS = {"PROJECT": "p", "ZONE": "z", "NAME": "tune", "TYPE": "v5e-16", "BUCKET": "b", "POLL": "0"}

# Plays Google Cloud: answers come from a file for each question, the first line each time, the last for ever.
GCLOUD = r"""#!/usr/bin/env bash
next() { head -n 1 "$PLAY/$1"; [[ $(wc -l < "$PLAY/$1") -le 1 ]] || sed -i 1d "$PLAY/$1"; }
words="$*"
case $words in
  *"queued-resources describe rare"*) [[ $(grep -c create "$PLAY/done") -gt 2 ]] && echo ACTIVE || echo FAILED ;;
  *"queued-resources describe"*) echo ACTIVE ;;
  *"queued-resources create forbidden"*) exit 1 ;;
  *"tpu-vm describe"*)
    echo describe >> "$PLAY/asked"
    now=$(next states)
    [[ $now != NOT_FOUND && $now != FLAKY ]] || { echo "ERROR: $now" >&2; exit 1; }
    echo "$now" ;;
  *code=none*) next codes | tr ' ' '\n' | sed 's/^/SSH: code=/' ;;
  *"jaxtune train"*) echo run >> "$PLAY/done" ;;
  *"pip install"*) echo install >> "$PLAY/done" ;;
  *"queued-resources create"*) echo create >> "$PLAY/done" ;;
  *"queued-resources delete"*) echo delete >> "$PLAY/done" ;;
  *"tail -n 5"*) echo "error: data.train: no such file" ;;
esac
"""


def pod(*args, **settings):
    env = {**os.environ, **SETTINGS, **{k: str(v) for k, v in settings.items()}}
    return subprocess.run([TPU / "pod.sh", *args], env=env, check=False, capture_output=True, text=True, timeout=60)


@pytest.fixture
def files(tmp_path):
    (tmp_path / "my config.yaml").write_text("model: demo\n")
    return {"CONFIG": tmp_path / "my config.yaml"}


@pytest.fixture
def play(tmp_path, files):
    """Watch while Google Cloud answers as told. Gives what was done, and how it ended."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gcloud").write_text(GCLOUD)
    (tmp_path / "bin" / "gcloud").chmod(0o755)

    def watch(states, codes, *args, **settings):
        (tmp_path / "done").write_text("")
        (tmp_path / "states").write_text("\n".join(states) + "\n")
        (tmp_path / "codes").write_text("\n".join(codes) + "\n")
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        ended = pod("watch", *args, PATH=path, PLAY=tmp_path, **files, **settings)
        return (tmp_path / "done").read_text().split(), ended

    return watch


@pytest.mark.parametrize("script", sorted(TPU.glob("*.sh")), ids=lambda p: p.name)
def test_shellcheck_finds_nothing(script):
    if not (tool := shutil.which("shellcheck") or shutil.which("shellcheck", path=Path(sys.executable).parent)):
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([tool, script], check=False, capture_output=True, text=True)
    assert done.stdout == ""
    assert done.returncode == 0


def test_a_dry_run_prints_what_it_would_run(files):
    out = pod("watch", "train.steps=3", "data.prompt=it's {x}; touch spilt", DRY_RUN=1, DATA="a.jsonl b.jsonl", **files)
    assert out.returncode == 0, out.stderr
    create, install, make, config, data, run, look = out.stdout.splitlines()
    assert shlex.split(create) == [
        *"gcloud compute tpus queued-resources create tune-queue --node-id=tune".split(),
        *"--accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite --spot".split(),
        *"--project=p --zone=z --quiet".split(),
    ]
    for line in (install, make, config, data, run, look):
        assert "--worker=all" in line
        assert line.endswith("--project=p --zone=z --quiet ")
    assert "mkdir" in make
    assert shlex.split(config)[5] == str(files["CONFIG"])
    assert shlex.split(data)[5:8] == ["a.jsonl", "b.jsonl", "tune:job/"]
    # what the workers' shells make of it: the words arrive as they were given
    script = subprocess.run(
        ["bash", "-c", f'set -- {run}; printf %s "${{@: -4:1}}"'], check=True, capture_output=True, text=True
    ).stdout.removeprefix("--command=")
    assert script.startswith("NAME=tune;")
    home = files["CONFIG"].parent / "home"
    (home / "job").mkdir(parents=True)
    (home / "jaxtune" / "bin").mkdir(parents=True)
    fake = home / "jaxtune" / "bin" / "jaxtune"
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@" > args; exit 75\n')
    fake.chmod(0o755)
    subprocess.run(["bash", "-c", f"{script}; wait"], env={**os.environ, "HOME": str(home)}, check=True)
    args = (home / "job" / "args").read_text().splitlines()
    assert args == [
        "train",
        "run.yaml",
        f"output={home}/runs/tune",
        "train.steps=3",
        "data.prompt=it's {x}; touch spilt",
    ]
    assert (home / "job" / "code").read_text() == "75\n"
    assert not (home / "job" / "spilt").exists()


@pytest.mark.parametrize(
    ("kind", "accelerator", "image"),
    [
        ("v5e-8", "v5litepod-8", "v2-alpha-tpuv5-lite"),
        ("v5p-128", "v5p-128", "v2-alpha-tpuv5"),
        ("v6e-8", "v6e-8", "v2-alpha-tpuv6e"),
        ("v4-8", "v4-8", "tpu-ubuntu2204-base"),
    ],
)
def test_each_kind_has_its_image(kind, accelerator, image):
    out = pod("create", TYPE=kind, QUEUE=0, SPOT=0, DRY_RUN=1).stdout
    assert out.split()[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "create", "tune"]
    assert f"--accelerator-type={accelerator} --version={image} " in out
    assert "--spot" not in out


def test_a_token_is_on_no_command_line(tmp_path):
    (tmp_path / "token").write_text("hf_secret")
    given = {"DRY_RUN": 1, "HF_TOKEN": "hf_secret"}
    by_file = pod("install", TOKEN_FILE=tmp_path / "token", **given)
    by_name = pod("install", SECRET="my-token", **given)
    for out in (by_file, by_name):
        assert out.returncode == 0
        assert "hf_secret" not in out.stdout + out.stderr
    assert "tune:.cache/huggingface/token" in by_file.stdout
    assert "secrets versions access latest" in by_name.stdout


def test_a_wheel_is_carried_there(tmp_path):
    (tmp_path / "jaxtune-1-py3-none-any.whl").write_text("")
    out = pod("install", PACKAGE=tmp_path / "jaxtune-1-py3-none-any.whl", DRY_RUN=1).stdout
    assert f"scp {tmp_path}/jaxtune-1-py3-none-any.whl tune: --worker=all" in out
    assert "wheel=jaxtune-1-py3-none-any.whl" in out
    assert "no such wheel" in pod("install", PACKAGE="nowhere.whl", DRY_RUN=1).stderr


def test_a_slice_that_is_taken_away_is_asked_for_again(play):
    done, ended = play(["NOT_FOUND", "READY", "READY", "PREEMPTED", "READY"], ["running", "running", "0 0 0 0"])
    assert done == ["delete", "create", "install", "run", "delete", "create", "install", "run"]
    assert ended.returncode == 0, ended.stderr
    assert "done: gs://b/tune" in ended.stderr


def test_a_run_that_saved_and_left_is_run_again(play):
    done, ended = play(["READY"], ["none none", "running running", "75 75", "0 running", "0 0"])
    assert done == ["install", "run", "install", "run"]
    assert ended.returncode == 0


def test_a_mistake_is_told_and_not_tried_again(play):
    done, ended = play(["READY"], ["none none", "running 2"])
    assert done == ["install", "run"]
    assert ended.returncode == 2
    assert "error: data.train: no such file" in ended.stdout


def test_what_an_earlier_call_left_is_no_result_of_this_one(play):
    done, ended = play(["READY"], ["2 2", "0 0"])
    assert done == ["install", "run"]
    assert ended.returncode == 0


def test_crashes_are_bounded_and_a_dead_run_is_one(play):
    done, ended = play(["READY"], ["none", "dead", "1", "134"], CRASHES=3)
    assert done.count("run") == 3
    assert ended.returncode == 1
    assert "ended with 134, 3 times" in ended.stderr


def test_a_slice_that_nobody_may_have_is_not_asked_for_for_ever(play):
    done, ended = play(["NOT_FOUND"], ["none"], CRASHES=2, NAME="forbidden")
    assert done == ["delete", "delete"]
    assert ended.returncode == 1
    assert "no slice can be asked for, 2 times" in ended.stderr


def test_a_request_that_fails_is_made_again(play):
    done, ended = play(["NOT_FOUND", "NOT_FOUND", "NOT_FOUND", "READY"], ["0"], CRASHES=2, NAME="rare")
    assert done.count("create") == 3
    assert ended.returncode == 0


def test_a_question_that_fails_costs_no_slice(play):
    done, ended = play(["READY", "FLAKY", "FLAKY", "READY"], ["running", "0"])
    assert done == []
    assert ended.returncode == 0


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"NAME": "a b"}, "NAME a b: small letters"),
        ({"ZONE": ""}, "set ZONE"),
        ({"CONFIG": "nowhere.yaml"}, "CONFIG 'nowhere.yaml': no such file"),
        ({"TYPE": "v99-8", "DRY_RUN": "1"}, "its image is not known here; set RUNTIME"),
    ],
)
def test_mistakes_in_settings_are_named(files, settings, error):
    out = pod("create" if "TYPE" in settings else "watch", **{**files, **settings})
    assert out.returncode == 2
    assert error in out.stderr


def test_help_lists_every_setting():
    out = pod("--help")
    script = (TPU / "pod.sh").read_text()
    for name in re.findall(r'"\$\{([A-Z_]+):=', script):
        assert re.search(rf"\b{name}\b", out.stdout), name
    assert out.returncode == 2


def test_xpk_gets_one_command():
    given = {"CLUSTER": "c", "IMAGE": "i", "DRY_RUN": "1", **SETTINGS}
    done = subprocess.run(
        [TPU / "xpk.sh", "data.prompt=a b"], env={**os.environ, **given}, check=True, capture_output=True, text=True
    )
    words = shlex.split(done.stdout)
    assert words[:3] == ["xpk", "workload", "create"]
    assert {"--tpu-type=v5litepod-16", "--num-slices=1", "--restart-on-exit-codes=75"} <= set(words)
    command = shlex.split(words[-1].removeprefix("--command="))
    assert command[1:] == ["jaxtune", "train", "/bucket/run.yaml", "output=/bucket/runs/tune", "data.prompt=a b"]


def test_the_job_set_restarts_what_is_worth_it():
    jobs = yaml.safe_load((TPU / "jobset.yaml").read_text())
    assert jobs["kind"] == "JobSet"
    assert jobs["spec"]["failurePolicy"]["maxRestarts"] > 0
    (slice_,) = jobs["spec"]["replicatedJobs"]
    job = slice_["template"]["spec"]
    by_code = {
        r["onExitCodes"]["values"][0]: r["action"] for r in job["podFailurePolicy"]["rules"] if "onExitCodes" in r
    }
    assert by_code == {2: "FailJob", 75: "Ignore"}
    pod_ = job["template"]["spec"]
    (container,) = pod_["containers"]
    rows, columns = map(int, pod_["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert (
        job["parallelism"] == job["completions"] == rows * columns // container["resources"]["limits"]["google.com/tpu"]
    )
    assert container["args"][0] == "train"
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod_["volumes"]}
    assert pod_["restartPolicy"] == "Never"  # which a podFailurePolicy wants
    assert "hf_" not in json.dumps(jobs)


def test_the_job_of_skypilot_recovers_and_keeps_its_run_in_the_bucket():
    task = yaml.safe_load((TPU / "skypilot.yaml").read_text())
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    assert task["secrets"] == {"HF_TOKEN": None}
    (mount,) = task["file_mounts"]
    assert f"output={mount}/" in task["run"]
    for part in ("setup", "run"):
        subprocess.run(["bash", "-n", "-c", task[part]], check=True)


def test_the_image_copies_what_there_is():
    for line in (TPU / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY"):
            for source in line.split()[1:-1]:
                assert (TPU.parents[1] / source).exists(), source


def test_a_worker_on_gke_takes_its_queue_from_a_secret_and_its_files_from_the_bucket():
    deployment = yaml.safe_load((TPU / "worker-gke.yaml").read_text())
    assert deployment["kind"] == "Deployment"
    spec = deployment["spec"]
    assert spec["selector"]["matchLabels"].items() <= spec["template"]["metadata"]["labels"].items()
    pod_ = spec["template"]["spec"]
    (container,) = pod_["containers"]
    (mount,) = container["volumeMounts"]
    assert arguments_of(*container["args"][:1], container["args"][1:]) == {
        "models": Path(mount["mountPath"], "models"),
        "data": Path(mount["mountPath"], "data"),
    }
    (queue,) = [e for e in container["env"] if e["name"] == "JAXTUNE_QUEUE"]
    assert "value" not in queue
    assert queue["valueFrom"]["secretKeyRef"]["name"] == "jaxtune-queue"
    assert [v["name"] for v in pod_["volumes"]] == [mount["name"]]
    rows, columns = map(int, pod_["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert container["resources"]["limits"]["google.com/tpu"] == rows * columns  # a slice of one host
    assert pod_["terminationGracePeriodSeconds"] >= 60


def test_a_worker_on_skypilot_takes_its_queue_from_a_secret_and_its_files_from_the_bucket():
    task = yaml.safe_load((TPU / "worker-skypilot.yaml").read_text())
    assert task["secrets"] == {"JAXTUNE_QUEUE": None}
    (mount,) = task["file_mounts"]
    _, words = task["run"].split("jaxtune worker ")
    assert arguments_of("worker", words.split()) == {"models": Path(mount, "models"), "data": Path(mount, "data")}
    assert "postgres" in task["envs"]["PACKAGE"]
    for part in ("setup", "run"):
        subprocess.run(["bash", "-n", "-c", task[part]], check=True)


def arguments_of(verb, words):
    """What our own command line makes of the words of a template; defaults left out."""
    import typer

    from jaxtune.cli.common import app

    command = typer.main.get_command(app)
    given = command.get_command(None, verb).make_context(verb, list(words)).params
    return {k: v for k, v in given.items() if v}
