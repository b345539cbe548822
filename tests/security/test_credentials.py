"""Passwords and tokens: refused in a configuration, and in no message, log or file."""

import io
import logging
from pathlib import Path

import pytest
import yaml
from commands import invoke
from fake_slurm import FakeSlurm, fake, folder, submit_tiny
from tiny_runs import tiny_config, write_config

from erollout.config import build_config
from erollout.errors import UserError
from erollout.security.redaction import has_credentials, redact
from erollout.tracking.log import configure_logging
from erollout.tracking.store import MlflowStore

__all__ = ["fake", "folder"]

SECRET = "hunter2"
URIS = [
    "http://user:hunter2@host",
    "http://user:hunter2@127.0.0.1:5000/path?q=1",
    "https://hunter2@host",
    "http://user:a/hunter2@host",
    "http://user:12/hunter2@host",
    "http://user:a@hunter2@host:80",
    "http://user:a@b/hunter2@host:80",
    "http://user:a?hunter2@host",
    "http://user:a#hunter2@host",
    "http://user:a hunter2@host",
    "http://user:a'hunter2@host",
    "http://user:%2Fhunter2%40@host",
    "http://user%3Ahunter2@host",
    "postgresql://user:hunter2@host:5432/db",
    "postgresql://user:a/hunter2@host/db",
    "postgresql://host/db?user=u&password=hunter2",
    "postgresql://host/db?password=a&hunter2&user=u",
    "postgresql+psycopg2://host/db?sslmode=require&sslpassword=hunter2",
    "mysql+pymysql://user:a:hunter2@host/db",
    "mysql://host/db?user=u&passwd=hunter2",
    "mssql+pyodbc:///?odbc_connect=Driver%3Dx%3BUID%3Du%3BPWD%3Dhunter2",
    "http://host/api?access_token=hunter2",
    "http://host/api?X-Signature=hunter2",
    "sqlite:////tmp/x.db?password=hunter2",
]
PLAIN = [
    "http://host:5000",
    "http://[::1]:5000/path",
    "https://host/path@v1?page=2#part",
    "postgresql://user@host:5432/db",
    "postgresql://host/db?options=-c%20x%3D1&email=a@b",
    "sqlite:////tmp/a@b:c/mlflow.db",
    "file:///data/user:x@y",
    "databricks",
    "databricks://profile",
    "relative/directory:x@y",
]


@pytest.mark.parametrize("uri", URIS)
def test_a_password_in_the_configuration_is_refused_by_every_command(uri: str, folder: Path, fake: FakeSlurm) -> None:
    (folder / "config.yaml").write_text(yaml.safe_dump({"tracking": {"uri": uri}}))
    config, before = f"--config={folder}/config.yaml", sorted(folder.rglob("*"))
    for command in (
        ("train", config, "--dry-run"),
        ("launch", "slurm", "--nodes=1", "--ranks-per-node=1", config),
        ("launch", "slurm", "--nodes=1", "--ranks-per-node=1", config, "--dry-run"),
        ("launch", "torchrun", "--nproc-per-node=1", config, "--dry-run"),
        ("launch", "ray", "--nodes=1", "--ranks-per-node=1", config, "--dry-run"),
    ):
        outcome = invoke(*command)
        line = outcome.error()
        assert "tracking.uri = " in line and "MLFLOW_TRACKING_PASSWORD" in line, line
        assert SECRET not in outcome.stdout + outcome.stderr
    assert sorted(folder.rglob("*")) == before


def test_an_override_with_a_password_is_not_repeated(folder: Path) -> None:
    for override in (f"tracking.uri={URIS[0]}", f"tracking.url={URIS[0]}", f"tracking.enabled={URIS[0]}", f"x={URIS[0]}"):
        line = invoke("train", f"--config={folder}/config.yaml", "--dry-run", override).error()
        assert SECRET not in line, line


def test_other_keys(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"data\.args\.url = https://host/x has a password or token in it, which would be copied"
    ):
        build_config({"data": {"kind": "chain_sum_cot", "args": {"url": "https://me:hunter2@host/x"}}})


@pytest.mark.parametrize(
    "text",
    [
        "Docs: http://localhost:8080/docs. Contact: help@lab.org",
        "http://localhost:8080/docs is where they are; write to help@lab.org",
        "see http://host:5000/@user/page",
        "https://x/a?max_token=5",
        "https://x/a?page_token=5&max-new-token=7",
    ],
)
def test_what_is_no_password_in_a_text_is_taken(text: str) -> None:
    tree = {"model": {"path": "m"}, "data": {"kind": "chain_sum_cot", "system_prompt": text}}
    assert build_config(tree).data.system_prompt == text


@pytest.mark.parametrize(
    "uri", ["http://user:hunter2@host:80/x", "https://hunter2@host", "http://host:80/api?hf_token=hunter2"]
)
def test_a_password_in_a_text_is_refused(uri: str) -> None:
    with pytest.raises(UserError, match=r"data\.system_prompt = .* has a password or token"):
        build_config({"data": {"kind": "chain_sum_cot", "system_prompt": f"Read {uri} and http://other/ first"}})


@pytest.mark.parametrize("uri", URIS)
def test_nothing_of_it_is_said(uri: str) -> None:
    assert has_credentials(uri)
    assert SECRET not in redact(uri)
    if " " not in uri:
        for text in (f"no answer from {uri} (twice)", f"{{'uri': '{uri}'}}", f"({uri})"):
            assert SECRET not in redact(text)


@pytest.mark.parametrize(
    "name",
    [
        "auth",
        "authorization",
        "api-key",
        "x-api-key",
        "access_key",
        "AccountKey",
        "shared-key",
        "jwt",
        "bearer",
        "sas",
        "x-sas",
        "pat",
        "passcode",
        "pw",
        "pwd",
    ],
)
@pytest.mark.parametrize("mark", ["?", "&", "#"])
def test_each_name_of_a_secret_is_known(name: str, mark: str) -> None:
    uri = f"https://host/api?a=1{mark}{name}={SECRET}"
    assert has_credentials(uri) and SECRET not in redact(uri) and SECRET not in redact(f"no answer from {uri} (twice)")


def test_options_in_a_parameter_are_searched() -> None:
    uri = f"postgresql://host/db?options=-c%20password%3D{SECRET}"
    assert has_credentials(uri) and SECRET not in redact(uri)


@pytest.mark.parametrize("uri", PLAIN)
def test_what_has_none_is_taken(uri: str, tmp_path: Path) -> None:
    assert not has_credentials(uri)
    assert tiny_config(tmp_path, tracking={"uri": uri}).tracking.uri == uri


@pytest.mark.parametrize("uri", [uri for uri in PLAIN if "user@" not in uri])
def test_what_has_none_is_shown_as_it_is(uri: str) -> None:
    assert redact(f"no answer from {uri}: it is gone") == f"no answer from {uri}: it is gone"


@pytest.mark.parametrize("uri", [uri for uri in URIS if not uri.startswith(("http", "sqlite"))])
def test_a_store_of_the_environment_that_does_not_work(uri: str) -> None:
    with pytest.raises(UserError) as error:
        MlflowStore(uri).check()
    assert SECRET not in str(error.value)


def test_what_libraries_log_has_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    monkeypatch.setattr("sys.stderr", stream)
    try:
        configure_logging(0)
        logging.getLogger("library").warning("retrying %s", URIS[0])
        try:
            raise ValueError(URIS[1])
        except ValueError:
            logging.getLogger("library").exception("failed")
    finally:
        root.handlers[:] = before
        root.setLevel(level)
    assert "retrying http://host" in stream.getvalue() and SECRET not in stream.getvalue()


def test_a_site_with_a_password(folder: Path, fake: FakeSlurm) -> None:
    site = folder / "site.yaml"
    site.write_text(yaml.safe_dump({"env": {"MLFLOW_TRACKING_URI": URIS[0]}}))
    line = submit_tiny(folder, f"--site={site}").error()
    assert "env.MLFLOW_TRACKING_URI has a password in it" in line and SECRET not in line
    assert not (folder / "run").exists()


@pytest.mark.parametrize(
    "place", ["user:hunter2@127.0.0.1:1", "user:a/hunter2@127.0.0.1:1", "127.0.0.1:1/x?access_token=hunter2"]
)
def test_an_address_of_the_environment(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{place}")
    config = write_config(tmp_path, rollout={"dtype": "float32"}, tracking={"enabled": True})
    outcome = invoke("train", f"--config={config}", "--dry-run")
    assert "MLFLOW_TRACKING_URI = http://127.0.0.1:1" in outcome.error()
    assert SECRET not in outcome.stdout + outcome.stderr
