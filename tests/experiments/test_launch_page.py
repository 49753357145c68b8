"""docs/launch.md: every script is a script, every command's arguments are understood."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from experiments import harness, launch
from experiments.safety.__main__ import with_model
from experiments.safety.config import PRESETS, SafetyConfig
from jaxrl.actors.__main__ import command_line
from jaxrl.processes import PREEMPTED

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "launch.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
YAML = [yaml.safe_load(text) for language, text in BLOCKS if language == "yaml"]
SCRIPTS = [text for language, text in BLOCKS if language == "bash"]


def statements(script):
    """Words of every simple command of a shell script, quoted scripts within it included."""
    lexer = shlex.shlex(script.replace("\\\n", " "), posix=True, punctuation_chars=";&|\n")
    lexer.whitespace, lexer.whitespace_split = " \t", True
    words = []
    for token in [*lexer, "\n"]:
        if set(token) <= set(";&|\n"):
            yield words
            words = []
        elif "python -m" in token:
            yield from statements(token)
        else:
            words.append(token)


def commands():
    """(module, arguments) of every `python -m` of the page."""
    for language, text in BLOCKS:
        if language not in ("bash", ""):
            continue
        for words in statements(text) if "python -m" in text else ():
            for at in range(len(words) - 2):
                if words[at : at + 2] == ["python", "-m"]:
                    yield words[at + 2], words[at + 3 :]
    for job in YAML[0]["spec"]["replicatedJobs"]:
        (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
        assert container["command"][:2] == ["python", "-m"]
        yield container["command"][2], container["args"]


PARSERS = {
    "experiments.launch": lambda argv: launch.parser().parse_args(argv),
    "jaxrl.actors": lambda argv: command_line().parse_args(argv),
    "experiments.safety": lambda argv: harness.cli(
        SafetyConfig, presets=PRESETS, argv=with_model(argv)
    ),
}


def test_every_command_is_understood(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1234")  # as the page exports it
    numbers = {"N": "2", "K": "1"}
    found = [(module, [numbers.get(arg, arg) for arg in argv]) for module, argv in commands()]
    for module, argv in found:
        PARSERS[module](argv)
    assert {module for module, _ in found} == set(PARSERS)
    assert len(found) >= 12
    auto = [argv for _, argv in found if "auto" in " ".join(argv)]
    assert len(auto) >= 5


@pytest.mark.parametrize("script", SCRIPTS, ids=range(len(SCRIPTS)))
def test_every_script_is_shell(script):
    checked = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


def test_preemption_ends_in_a_restart_wherever_it_comes():
    assert f"status **{PREEMPTED}**" in PAGE
    again = [script for script in SCRIPTS if f"-eq {PREEMPTED}" in script]
    assert len(again) == 3  # ssh, Slurm, Ray
    slurm = next(script for script in SCRIPTS if "#SBATCH" in script)
    for line in ("--signal=TERM@", "--requeue", "scontrol requeue"):
        assert line in slurm


def test_the_slurm_script_requeues_what_was_preempted(tmp_path):
    """Run with an srun that is told to stop: the script waits for it and asks for another turn."""
    script = next(script for script in SCRIPTS if "#SBATCH" in script)
    (tmp_path / "srun").write_text(
        "#!/bin/bash\ntrap 'sleep 0.2; exit 75' TERM\nkill -TERM $PPID\nkill -TERM $$\n"
        "sleep 9 &\nwait\n"
    )
    (tmp_path / "scontrol").write_text('#!/bin/bash\necho "$@" > "$(dirname "$0")/asked"\n')
    for name in ("srun", "scontrol"):
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        ["bash", "-c", script], timeout=250, check=False,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "safety"},
    )  # fmt: skip
    assert done.returncode == PREEMPTED
    assert (tmp_path / "asked").read_text() == "requeue 7\n"


# Fields of JobSet v1alpha2 and batch/v1 that the page uses; anything else is a slip of the pen.
JOB_SET = {
    "apiVersion": str,
    "kind": str,
    "metadata": {"name": str, "annotations": dict},
    "spec": {
        "successPolicy": {"operator": str, "targetReplicatedJobs": [str]},
        "failurePolicy": {
            "maxRestarts": int,
            "rules": [
                {"action": str, "onJobFailureReasons": [str], "targetReplicatedJobs": [str]}
            ],
        },
        "replicatedJobs": [
            {
                "name": str,
                "replicas": int,
                "template": {
                    "spec": {
                        "parallelism": int,
                        "completions": int,
                        "backoffLimit": int,
                        "podFailurePolicy": {
                            "rules": [
                                {
                                    "action": str,
                                    "onExitCodes": {
                                        "containerName": str, "operator": str, "values": [int],
                                    },
                                    "onPodConditions": [{"type": str, "status": str}],
                                }
                            ]
                        },
                        "template": {
                            "spec": {
                                "restartPolicy": str,
                                "terminationGracePeriodSeconds": int,
                                "nodeSelector": dict,
                                "containers": [
                                    {
                                        "name": str, "image": str, "command": [str],
                                        "args": [str], "ports": [{"containerPort": int}],
                                        "env": [{"name": str, "valueFrom": dict}],
                                        "resources": {"limits": dict},
                                        "volumeMounts": [{"name": str, "mountPath": str}],
                                    }
                                ],
                                "volumes": [{"name": str, "persistentVolumeClaim": dict}],
                            }
                        },
                    }
                },
            }
        ],
    },
}  # fmt: skip


def conforms(value, schema, path="jobset"):
    if isinstance(schema, dict):
        assert isinstance(value, dict), path
        assert set(value) <= set(schema), f"{path}: {set(value) - set(schema)}"
        for name, inner in value.items():
            conforms(inner, schema[name], f"{path}.{name}")
    elif isinstance(schema, list):
        assert isinstance(value, list), path
        for number, inner in enumerate(value):
            conforms(inner, schema[0], f"{path}[{number}]")
    else:
        assert type(value) is schema, f"{path}: {value!r}"


def test_the_job_set_is_one():
    job_set = YAML[0]
    conforms(job_set, JOB_SET)
    assert (job_set["apiVersion"], job_set["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    jobs = {job["name"]: job for job in job_set["spec"]["replicatedJobs"]}
    learner = jobs["learner"]["template"]["spec"]
    pod = learner["template"]["spec"]
    # Pod failure policies are for pods that are not restarted in place.
    assert {
        job["template"]["spec"]["template"]["spec"]["restartPolicy"] for job in jobs.values()
    } == {"Never"}
    assert learner["parallelism"] == learner["completions"]
    chips = learner["completions"] * pod["containers"][0]["resources"]["limits"]["google.com/tpu"]
    x, y, z = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert chips == x * y * z
    codes = [
        rule["onExitCodes"]
        for rule in learner["podFailurePolicy"]["rules"]
        if "onExitCodes" in rule
    ]
    assert codes == [{"containerName": "learner", "operator": "In", "values": [PREEMPTED]}]
    (rule,) = job_set["spec"]["failurePolicy"]["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert set(rule["targetReplicatedJobs"]) <= set(jobs)
    mounts = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}
    address = f"{job_set['metadata']['name']}-learner-0-0.{job_set['metadata']['name']}"
    actor = jobs["actor"]["template"]["spec"]["template"]["spec"]["containers"][0]
    assert f"--learner={address}:7777" in actor["args"]
    assert {entry["name"] for entry in YAML[1]["env"]} == {
        "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID",
    }  # fmt: skip
