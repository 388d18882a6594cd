"""launch/gke.sh and its manifests: what a cluster would be given, by the published schema, trimmed; no cluster was asked."""

import json
import os
import re
import subprocess

import pytest
from paths import ROOT

yaml = pytest.importorskip("yaml")

SCHEMA = json.loads((ROOT / "tests" / "golden" / "jobset_v1alpha2.json").read_text())
COMMAND = [
    "python",
    "-m",
    "dit_jax.main",
    "--workdir=/gcs/b4",
    "--title=two words",
    "it's",
    "yes",
    "",
    '"q": {x} # $(HOME) $HOME @NAME@',
]
KINDS = {"tpu": ["--accelerator=tpu-v6e-slice", "--topology=4x4"], "gpu": ["--accelerator=nvidia-h200-141gb", "--nodes=3"]}
BASE = ["--name=b4", "--image=registry/dit_jax:abc123", "--bucket=my-bucket"]

KUBECTL = """#!/usr/bin/env bash
printf '%s\\n' "$*" >>"$CLUSTER/calls"
case $1 in
    get) [[ ! -e "$CLUSTER/ended" ]] || cat "$CLUSTER/ended" ;;
    apply) cat >"$CLUSTER/manifest"; [[ ! -e "$CLUSTER/immutable" ]] ;;
esac
exit $?
"""


def call(*words, command=COMMAND, environment=None):
    return subprocess.run(
        [ROOT / "launch" / "gke.sh", *words, "--", *command],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | (environment or {}),
    )


def rendered(kind):
    process = call(*BASE, *KINDS[kind], "--dry-run")
    assert process.returncode == 0, process.stderr
    return yaml.safe_load(process.stdout)


def violations(value, schema, path="$"):
    """What a cluster would refuse: unknown or missing fields, wrong types, values that are not listed."""
    types = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool, "number": (int, float)}
    kind = schema.get("type")
    if schema.get("x-kubernetes-int-or-string"):
        return [] if isinstance(value, (int, str)) and re.match(schema.get("pattern", ""), str(value)) else [f"{path}: {value!r}"]
    if kind and (not isinstance(value, types[kind]) or (kind == "integer" and isinstance(value, bool))):
        return [f"{path}: {value!r} is no {kind}"]
    if "enum" in schema and value not in schema["enum"]:
        return [f"{path}: {value!r} is not one of {schema['enum']}"]
    found = []
    if isinstance(value, dict) and ("properties" in schema or "additionalProperties" in schema):
        found += [f"{path}: {name} is missing" for name in schema.get("required", []) if name not in value]
        for name, field in value.items():
            inner = schema.get("properties", {}).get(name, schema.get("additionalProperties"))
            found += violations(field, inner, f"{path}.{name}") if inner else [f"{path}: unknown field {name}"]
    if isinstance(value, list):
        found += [line for i, item in enumerate(value) for line in violations(item, schema["items"], f"{path}[{i}]")]
    return found


def expanded(command, environment):
    """What Kubernetes makes of a command: $(NAME) from the container's variables, $$ is $."""
    return [re.sub(r"\$\$|\$\((\w+)\)", lambda m: "$" if m[0] == "$$" else environment.get(m[1], m[0]), word) for word in command]


@pytest.mark.parametrize("kind", KINDS)
def test_a_cluster_would_accept_it(kind):
    """A misspelt or misplaced field, which a cluster refuses or drops."""
    manifest = rendered(kind)
    assert violations(manifest, SCHEMA) == []
    manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["terminationGracePeriod"] = 3
    manifest["spec"]["failurePolicy"]["maxRestarts"] = "3"
    manifest["spec"]["failurePolicy"]["rules"][0]["action"] = "Restart"
    assert len(violations(manifest, SCHEMA)) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_command_and_restarts(kind):
    """A command that a shell, YAML or Kubernetes changes; a preemption that counts as a failure; pods that miss their peers."""
    spec = rendered(kind)["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    (main,) = pod["containers"]
    assert expanded(main["command"], {"HOME": "/root"}) == COMMAND
    assert job["parallelism"] == job["completions"] == {"tpu": 4, "gpu": 3}[kind]
    assert job["backoffLimit"] == 0 and job["completionMode"] == "Indexed" and pod["restartPolicy"] == "Never"
    assert job["podFailurePolicy"]["rules"] == [
        {"action": "FailJob", "onExitCodes": {"containerName": main["name"], "operator": "In", "values": [75]}},
        {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]
    (rule,) = spec["failurePolicy"]["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts" and rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert spec["failurePolicy"]["maxRestarts"] > 0
    mounted = {mount["name"]: mount["mountPath"] for mount in main["volumeMounts"]}
    assert mounted == {"bucket": "/gcs", "shared-memory": "/dev/shm"}
    assert {volume["name"] for volume in pod["volumes"]} == set(mounted)
    assert pod["volumes"][0]["csi"]["volumeAttributes"]["bucketName"] == "my-bucket"
    resource = {"tpu": {"google.com/tpu": 4}, "gpu": {"nvidia.com/gpu": 8}}[kind]
    assert main["resources"] == {"requests": resource, "limits": resource}


def test_gpu_pods_find_process_0():
    """Pods that train alone: JAX detects Kubernetes only with a package that the image does not have."""
    manifest = rendered("gpu")
    job = manifest["spec"]["replicatedJobs"][0]
    main = job["template"]["spec"]["template"]["spec"]["containers"][0]
    (variable,) = main["env"]
    assert variable["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    # <jobset>-<replicated job>-<job index>-<pod index>.<subdomain>, which is the jobset's name if not given
    host = f"{manifest['metadata']['name']}-{job['name']}-0-0.{manifest['metadata']['name']}"
    assert expanded(main["args"], {variable["name"]: "2"}) == [
        f"--coordinator_address={host}:55527",
        "--num_processes=3",
        "--process_id=2",
    ]
    assert manifest["spec"]["network"] == {"enableDNSHostnames": True, "publishNotReadyAddresses": True}


@pytest.fixture
def cluster(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "kubectl").write_text(KUBECTL)
    (tmp_path / "bin" / "kubectl").chmod(0o755)
    return tmp_path, {"CLUSTER": str(tmp_path), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}


def test_apply_and_what_exists(cluster):
    """A finished or different JobSet of that name taken for the new one; a cost that is not mentioned."""
    folder, environment = cluster
    process = call(*BASE, *KINDS["tpu"], environment=environment)
    assert process.returncode == 0 and "BILLED" in process.stderr and "delete jobset b4" in process.stderr
    assert yaml.safe_load((folder / "manifest").read_text()) == rendered("tpu")
    (folder / "immutable").touch()
    assert "cannot be changed" in call(*BASE, *KINDS["tpu"], environment=environment).stderr
    (folder / "ended").write_text("Failed")
    (folder / "manifest").unlink()
    process = call(*BASE, *KINDS["tpu"], environment=environment)
    assert process.returncode == 2 and "b4 is Failed" in process.stderr and not (folder / "manifest").exists()


MISTAKES = {
    "both": ([*BASE, *KINDS["tpu"], "--nodes=2"], COMMAND, "not both"),
    "neither": ([*BASE, "--accelerator=x"], COMMAND, "give --topology"),
    "chips": ([*BASE, *KINDS["tpu"], "--chips-per-host=3"], COMMAND, "does not divide the 16 chips"),
    "latest": (["--name=b4", "--bucket=b1", "--image=r/x:latest", *KINDS["gpu"]], COMMAND, "latest"),
    "untagged": (["--name=b4", "--bucket=b1", "--image=r:5000/x", *KINDS["gpu"]], COMMAND, "must have a tag"),
    "name": (["--name=B4", *BASE[1:], *KINDS["gpu"]], COMMAND, "lower-case"),
    "bucket": ([*BASE[:2], "--bucket=gs://b", *KINDS["gpu"]], COMMAND, "without gs://"),
    "workdir": ([*BASE, *KINDS["gpu"]], ["python", "--workdir=/tmp/x"], "choose a folder under /gcs"),
    "no command": ([*BASE, *KINDS["gpu"]], [], "after --"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(cluster, mistake):
    """A mistake found out by the cluster, or not at all."""
    words, command, text = MISTAKES[mistake]
    process = call(*words, command=command, environment=cluster[1])
    assert process.returncode == 2 and text in process.stderr and not (cluster[0] / "calls").exists()
