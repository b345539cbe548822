"""A configuration as it is written into a run directory, and files of sites."""

from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import yaml
from tiny_runs import ARCHITECTURE, tiny_tree

from erollout.config import LOCATIONS, Config, load_config
from erollout.configuration.bounds import Location
from erollout.errors import UserError
from erollout.launch.run_directory import dump_config, with_absolute_paths
from erollout.launch.sites import load_site

ROOT = Path(__file__).parents[2]
SITES = sorted((ROOT / "slurm" / "sites").glob("*.yaml"))


def test_a_configuration_means_the_same_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tree = tiny_tree(
        tmp_path, train={"output_dir": "runs/x"}, checkpoint={"directory": "c"}, tracking={"uri": "sqlite:///m.db"}
    )
    tree["data"] |= {"train_files": ["a.jsonl", "/b.jsonl"]}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree))
    absolute = with_absolute_paths(load_config("c.yaml"))
    assert absolute.train.output_dir == f"{tmp_path}/runs/x" and absolute.checkpoint.directory == f"{tmp_path}/c"
    assert absolute.data.train_files == (f"{tmp_path}/a.jsonl", "/b.jsonl")
    assert absolute.tracking.uri == f"sqlite:///{tmp_path}/m.db"
    assert absolute.model.path is None and absolute.model.architecture == ARCHITECTURE
    (tmp_path / "again.yaml").write_text(dump_config(absolute))
    monkeypatch.chdir("/")
    assert with_absolute_paths(load_config(tmp_path / "again.yaml")) == absolute


@pytest.mark.parametrize("uri", ["http://h:1/x", "sqlite:////a/b.db", "postgresql://u@h/d", "databricks", "file:///a", "/abs"])
def test_stores_that_are_the_same_everywhere(tmp_path: Path, uri: str) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tiny_tree(tmp_path, tracking={"uri": uri})))
    assert with_absolute_paths(load_config(tmp_path / "c.yaml")).tracking.uri == uri


def test_all_locations_are_known() -> None:
    found = set()
    for section, kind in get_type_hints(Config).items():
        for key, hint in get_type_hints(kind, include_extras=True).items():
            if Location in (hint, *get_args(hint)):
                found.add(f"{section}.{key}")
    assert found and found <= set(LOCATIONS)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configurations_survive_being_written(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("site", "message"),
    [
        ({"partitions": "x"}, "unknown key partitions; there are partition, account"),
        ({"gpus": {"kind": "x"}}, "unknown key gpus.kind; there are how, type"),
        ({"gpus": {"how": "some"}}, "gpus.how = 'some'"),
        ({"container": {"kind": "pyxis"}}, "container.image"),
        ({"cpus_per_task": 0}, "cpus_per_task = 0"),
        ({"options": ["-p x"]}, "options.0 = '-p x'"),
        ({"env": {"a-b": "x"}}, "a-b"),
        ({"env": {"HF_TOKEN": "hf_x"}}, "env.HF_TOKEN looks like a secret"),
        (["x"], "must be a mapping"),
    ],
)
def test_a_wrong_site(tmp_path: Path, site: object, message: str) -> None:
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(site))
    with pytest.raises(UserError) as refused:
        load_site(tmp_path / "site.yaml")
    assert message in str(refused.value) and "hf_x" not in str(refused.value)


def test_a_variable_that_only_looks_like_a_secret(tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text("env: {TOKENIZERS_PARALLELISM: 'false'}")
    assert load_site(tmp_path / "site.yaml").env == {"TOKENIZERS_PARALLELISM": "false"}


@pytest.mark.parametrize("path", SITES, ids=lambda path: path.stem)
def test_sites_that_are_shipped(path: Path) -> None:
    assert len(SITES) >= 3 and load_site(path) is not None
