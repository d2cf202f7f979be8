"""The chart's values become the file that `tandem serve --config` reads, and say no to what it would refuse."""

from __future__ import annotations

import json
import re
import runpy
import shlex
from pathlib import Path

import pytest
import yaml

from cluster.cli.parser import build_parser
from cluster.config import build_config, load_config
from cluster.demo import MODEL_DIR
from cluster.errors import ConfigError
from tests.helm.rendering import (
    CASES,
    CHART,
    KUBERNETES,
    ROOT,
    helm,
    of_kind,
    render,
    rendered,
    tandem_configs,
    template,
)


@pytest.mark.parametrize("case", CASES)
def test_tandem_reads_the_rendered_configuration(case: str, tmp_path: Path) -> None:
    objects = rendered(case)
    configs = tandem_configs(objects)
    assert len(configs) == len(of_kind(objects, "RayCluster"))
    for name, text in configs.items():
        (tmp_path / f"{name}.yaml").write_text(text)
        config = load_config(tmp_path / f"{name}.yaml", {"model.path": str(MODEL_DIR)}).resolve()
        assert config.workers.placement == "roles" and config.transfer.transport == "tcp"
        assert config.transfer.port_range is not None
    for deployment in of_kind(objects, "Deployment"):
        (container,) = deployment["spec"]["template"]["spec"]["containers"]
        command = container["command"][container["command"].index("--") + 1 :]
        assert command[:3] == ["python", "-m", "cluster"]
        options = build_parser().parse_args(command[3:])
        assert options.command == "serve" and options.config == "tandem.yaml"


def test_settings_arrive_as_they_were_given(tmp_path: Path) -> None:
    given = {
        "model": {"dtype": "bfloat16", "max_model_len": 32768},
        "language": {"kv_cache_bytes": 268435456, "gpu_memory_fraction": 0.9, "prefix_cache": False},
        "embedding": {"max_pixels": 1003520},
        "transfer": {"peer_timeout_s": 5.0, "pool_tokens": 131072},
        "gateway": {"max_body_bytes": 1073741824, "request_timeout_s": 900.0},
        "workers": {"num_cpus": 0.5, "start_timeout_s": 1200.0},
    }
    (tmp_path / "values.yaml").write_text(yaml.safe_dump({"config": given}))
    (text,) = tandem_configs(render("--values", str(tmp_path / "values.yaml"))).values()
    config = build_config(yaml.safe_load(text))
    for section, settings in given.items():
        for name, value in settings.items():
            assert getattr(getattr(config, section), name) == value, name
    assert config.gateway.port == 8000 and config.workers.embedding == config.workers.language == 1


def test_workers_are_as_many_as_the_groups_have_room_for() -> None:
    def workers(*arguments: str) -> tuple[int, int]:
        (text,) = tandem_configs(render(*arguments)).values()
        config = build_config(yaml.safe_load(text)).workers
        return config.embedding, config.language

    assert workers(*CASES["colocated"]) == (2, 2)
    assert workers(*CASES["autoscaling"]) == (2, 4)
    assert workers("--set", "workerGroups.embedding.offers.embedding=2,workerGroups.embedding.replicas=3") == (6, 1)


def test_prefill_and_decode_groups_take_the_place_of_language_workers() -> None:
    (text,) = tandem_configs(render(*CASES["split"])).values()
    assert build_config(yaml.safe_load(text)).workers.counts == {"embedding": 1, "prefill": 1, "decode": 2}


REFUSED: dict[str, tuple[str, str]] = {
    "an unknown value": ("gatway.port=9000", "gatway"),
    "an unknown setting": ("config.language.page_sise=16", "page_sise"),
    "an unknown section": ("config.langage.page_size=16", "langage"),
    "blocks without rows": ("config.transfer.block_size=0", "block_size"),
    "a cache of negative size": ("config.language.kv_cache_tokens=-1", "kv_cache_tokens"),
    "no time to answer": ("config.gateway.request_timeout_s=0", "request_timeout_s"),
    "an unknown setting of a group": ("workerGroups.language.replcas=2", "replcas"),
    "an unknown role": ("workerGroups.language.offers.langage=1", "langage"),
    "a group with a reserved name": ("workerGroups.head.replicas=1", "workerGroups"),
    "an unknown value of a track": ("blueGreen.blue.overrides.imag.tag=1", "imag"),
    "a word for a number": ("workerGroups.language.replicas=two", "replicas"),
    "a number for a word": ("image.repository=7", "repository"),
    "an unknown source": ("model.source=ftp", "source"),
    "a port beyond all ports": ("gateway.port=70000", "port"),
    "an unknown way to upgrade": ("ray.upgradeStrategy=Rolling", "upgradeStrategy"),
    "root": ("security.runAsUser=0", "runAsUser"),
    "no room for a role": ("workerGroups.language=null", "no worker group offers room"),
    "half a split": ("workerGroups.language.offers.language=null,workerGroups.language.offers.prefill=1", "needs both"),
    "a split beside language workers": ("workerGroups.embedding.offers.prefill=1", "take their place"),
    "no room to look at images": ("workerGroups.embedding=null", "model.vision"),
    "a track that does not run": ("blueGreen.enabled=true,blueGreen.active=green", "nobody would answer"),
    "replicas out of range": ("workerGroups.language.maxReplicas=0", "not between minReplicas"),
    "what the chart sets itself": ("config.gateway.port=9000", "set by the chart"),
    "a volume without a claim": ("model.source=pvc", "model.pvc.claimName"),
    "a store without a bucket": ("model.source=s3", "model.s3.bucket"),
    "an ingress without hosts": ("ingress.enabled=true", "ingress.hosts"),
    "a route without gateways": ("gatewayRoute.enabled=true", "gatewayRoute.parentRefs"),
    "Redis without an address": ("gcsFaultTolerance.enabled=true", "redisAddress"),
    "Redis without a port": ("gcsFaultTolerance.enabled=true,gcsFaultTolerance.redisAddress=redis.svc", "redisAddress"),
    "a name that no object may have": ("fullnameOverride=My_Cluster", "fullnameOverride"),
    "half a digest": ("image.digest=sha256:12", "digest"),
    "a folder without a beginning": ("model.path=models/qwen", "model.path"),
    "a folder outside the claim": ("model.source=pvc,model.pvc.claimName=m,model.path=/data/qwen", "below it"),
    "a folder of the copy": ("model.source=s3,model.s3.bucket=b,model.path=/models/b", "leave it out"),
    "ports from high to low": ("transfer.firstPort=30000", "beyond the last"),
    "a port that Ray takes": ("gateway.port=8080", "gateway.port and ray.ports.metrics both take port 8080"),
    "ranges of ports that meet": ("ray.ports.lastWorker=20000", "both take port 20000"),
    "too few ports for a pod": (
        "transfer.lastPort=20001,workerGroups.language.offers.language=2",
        "room for 1 processes",
    ),
    "too few CPUs for a pod": ("workerGroups.language.offers.language=3", "ask for 3 CPUs and Ray counts 2"),
    "GPUs that a pod has not": ("config.workers.num_gpus=1", "ask for 1 GPUs and it has 0"),
    "an encoder on CPUs that asks for a GPU": ("workerGroups.language.gpus=1", "workerGroups.embedding: the workers"),
    "a limit that Ray counts by": ("workerGroups.language.resources.limits.cpu=null", "language.resources.limits.cpu"),
    "a new group without limits": ("workerGroups.more.offers.language=1", "workerGroups.more.resources.limits.cpu"),
    "an object store without room": ("ray.objectStoreBytes=536870912", "sharedMemory only 512Mi"),
    "a volume's name that is taken": ("gateway.extraVolumes[0].name=scratch", 'has a volume "scratch" already'),
    "a mount without its volume": ("head.extraVolumeMounts[0].name=x", "head.extraVolumeMounts: there is no volume"),
    "a place that is taken": (
        "head.extraVolumeMounts[0].name=scratch,head.extraVolumeMounts[0].mountPath=/tmp",
        "mounted at /tmp already",
    ),
    "a label that objects find each other by": ("commonLabels.app\\.kubernetes\\.io/name=x", "choose another name"),
    "a label that none can be": ("commonLabels.team=two words", "commonLabels.team"),
    "a secret that none can be": ("auth.ray.existingSecret=Our_Token", "existingSecret"),
    "a key that no secret may have": ("auth.api.key=our keys", "auth.api.key"),
    "no image": ("image.repository=", "image.repository"),
    "half a quantity": ("head.scratch=1.2.3Gi", "scratch"),
    "names from everywhere": ("networkPolicy.dns=null", "networkPolicy.dns"),
    "every port of the Kubernetes API's host": (
        "autoscaling.enabled=true,autoscaling.apiServerPorts=null",
        "autoscaling.apiServerPorts",
    ),
    "what both tracks share": ("blueGreen.blue.overrides.fullnameOverride=x", "fullnameOverride"),
    "a time without a unit": ("metrics.serviceMonitor.interval=15", "interval"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_work_is_refused_with_its_name(what: str) -> None:
    setting, word = REFUSED[what]
    done = template("--set", setting)
    assert done.returncode != 0, f"{what} was accepted"
    assert word in done.stderr, done.stderr


def test_a_release_whose_name_begins_with_a_digit_is_told_what_to_do() -> None:
    done = helm("template", "7b", str(CHART), "--kube-version", KUBERNETES)
    assert done.returncode != 0 and "set fullnameOverride" in done.stderr
    assert helm("template", "7b", str(CHART), "--set", "fullnameOverride=vision").returncode == 0


def test_an_encoder_on_cpus_beside_language_workers_on_gpus_is_accepted() -> None:
    render("--set", "workerGroups.language.gpus=1,config.embedding.device=cpu")
    render("--set", "workerGroups.language.gpus=1,config.workers.num_gpus=0")


def test_the_schema_and_tandem_agree_on_what_is_unknown() -> None:
    """So that the schema is no looser than the program."""
    with pytest.raises(ConfigError, match="page_sise"):
        build_config({"language": {"page_sise": 16}})


def test_the_schema_refuses_no_number_that_tandem_takes() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    num_bounds = 0
    for section, of_section in schema["properties"]["config"]["properties"].items():
        for name, of_setting in of_section["properties"].items():
            if "minimum" in of_setting or "exclusiveMinimum" in of_setting:
                refused = (
                    of_setting["exclusiveMinimum"] if "exclusiveMinimum" in of_setting else of_setting["minimum"] - 1
                )
                with pytest.raises(ConfigError, match=name):
                    build_config({section: {name: refused}})
                num_bounds += 1
    assert num_bounds > 50


def test_generated_files_are_up_to_date() -> None:
    files = runpy.run_path(str(CHART / "generate.py"))["files"]()
    for name, content in files.items():
        assert (CHART / name).read_text(encoding="utf-8") == content, f"run `python helm/generate.py`: {name} is old"


def test_every_value_is_explained() -> None:
    rows = list(runpy.run_path(str(CHART / "generate.py"))["rows"]((CHART / "values.yaml").read_text()))
    explained = {row.name for row in rows}
    values = yaml.safe_load((CHART / "values.yaml").read_text())

    def leaves(prefix: str, tree: object) -> set[str]:
        if prefix in explained or not isinstance(tree, dict):
            return {prefix}
        return set().union(*(leaves(f"{prefix}.{name}".lstrip("."), part) for name, part in tree.items()))

    assert leaves("", values) - explained == set()
    assert all(row.text for row in rows) and len(rows) > 100


def test_the_readme_names_every_example() -> None:
    text = (CHART / "README.md.tpl").read_text()
    named = set(re.findall(r"`([a-z0-9-]+\.yaml)`", text))
    assert {path.name for path in (CHART / "examples").glob("*.yaml")} <= named


def test_commands_of_the_pages_render() -> None:
    pages = [CHART / "README.md.tpl", ROOT / "README.md"]
    lines = [line for page in pages for line in page.read_text().splitlines()]
    shown = [found[1] for line in lines if (found := re.match(r"\$ helm (?:install|upgrade) tandem helm/ (.*)", line))]
    assert len(shown) >= 5
    for arguments in shown:
        words = shlex.split(arguments.split("  #")[0].split("&&")[0])
        done = template(*(str(ROOT / word) if word.startswith("helm/") else word for word in words))
        assert done.returncode == 0, f"{arguments}\n{done.stderr}"
