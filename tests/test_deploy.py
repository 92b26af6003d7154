"""The files under deploy/ say what the program takes, and agree with each other."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from powerinfer.serving.ray import AppOptions
from powerinfer_tools.serving.app import create_app
from powerinfer_tools.serving.service import Service, Settings

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"


def read(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def pod() -> Any:
    return read("kubernetes/deployment.yaml")["spec"]["template"]["spec"]


@pytest.fixture(scope="module")
def container(pod: Any) -> Any:
    (only,) = pod["containers"]
    return only


def taken(arguments: list[str]) -> bool:
    """Whether `powerinfer` understands ``arguments``: beside one that is wrong, no other is complained of."""
    wrong = [*arguments, "--port", "no-number"]
    command = [sys.executable, "-m", "powerinfer_cli", *wrong]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    return ended.returncode == 2 and "Invalid value for '--port'" in ended.stderr


def test_every_argument_exists(container: Any) -> None:
    assert taken(container["args"])
    assert not taken([*container["args"], "--no-such-option"])
    compose = read("compose.yaml")["services"]["powerinfer"]
    assert taken(["model.gguf" if "MODEL" in part else part for part in compose["command"]])


def test_probes_and_drain(pod: Any, container: Any) -> None:
    """What is probed exists, at the port that is named; the end has time for the pause and the drain."""
    paths = {
        getattr(route, "path", "") for route in create_app(Service(Settings(), lambda entry: None)).routes
    }
    (port,) = container["ports"]
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        asked = container[name]["httpGet"]
        assert (asked["path"] in paths, asked["port"]) == (True, port["name"])
    drain = next(int(text.split("=")[1]) for text in container["args"] if text.startswith("--drain"))
    assert (
        pod["terminationGracePeriodSeconds"] > drain + container["lifecycle"]["preStop"]["sleep"]["seconds"]
    )


def test_mounts_have_volumes(pod: Any, container: Any) -> None:
    volumes = {volume["name"] for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert set(mounts.values()) == volumes
    files = [text.split("=")[1] for text in container["args"] if "=/" in text]
    assert len(files) == 2
    assert all(str(Path(file).parent) in mounts for file in files)


def test_everything_selects_the_same_pods() -> None:
    labels = read("kubernetes/deployment.yaml")["spec"]["template"]["metadata"]["labels"]
    assert read("kubernetes/deployment.yaml")["spec"]["selector"]["matchLabels"] == labels
    assert read("kubernetes/service.yaml")["spec"]["selector"] == labels
    assert read("kubernetes/disruption.yaml")["spec"]["selector"]["matchLabels"] == labels
    listed = read("kubernetes/kustomization.yaml")["resources"]
    assert {*listed, "kustomization.yaml"} == {path.name for path in (DEPLOY / "kubernetes").iterdir()}
    target = read("kubernetes/autoscaler.yaml")["spec"]["scaleTargetRef"]
    assert target["name"] == read("kubernetes/deployment.yaml")["metadata"]["name"]


def test_prometheus_asks_the_server() -> None:
    (job,) = read("prometheus.yml")["scrape_configs"]
    (target,) = job["static_configs"][0]["targets"]
    host, _, port = target.partition(":")
    service = read("compose.yaml")["services"][host]
    assert service["ports"] == [f"127.0.0.1:{port}:{port}"]


def test_the_ray_application() -> None:
    (application,) = read("ray.yaml")["applications"]
    assert application["import_path"] == "powerinfer.serving.ray:app"
    assert set(application["args"]) <= set(AppOptions.model_fields)
    assert AppOptions(**application["args"]).max_replicas == 8


def test_the_image_has_all_that_the_wheel_is_built_from() -> None:
    text = (DEPLOY / "Containerfile").read_text(encoding="utf-8")
    copied = {word for line in re.findall(r"^COPY (?!--)(.*)$", text, re.M) for word in line.split()[:-1]}
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    packages = re.search(r"wheel\.packages = \[(.*?)\]", project, re.S)
    assert packages is not None
    assert {path.split("/")[0] for path in re.findall(r'"(.*?)"', packages[1])} <= copied
    ignored = (DEPLOY / "Containerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    assert {line[1:] for line in ignored if line.startswith("!")} == copied
    for line in re.findall(r"^(?:ENTRYPOINT|CMD|    CMD) (.*)$", text, re.M):
        assert json.loads(line)
