"""Settings of a cluster: one YAML file, the same for all runs there. `slurm/sites` has examples."""

import re
from dataclasses import field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from erollout.errors import UserError
from erollout.security.redaction import keys_with_credentials

_section = dataclass(frozen=True, config=ConfigDict(extra="forbid", coerce_numbers_to_str=True))

_Name = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
_SECRET = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS|(?<!\bP)KEY|\bPAT)\b")
"""Endings of names of variables that must not be in a file. A PKEY is InfiniBand's."""


@_section
class Gpus:
    how: Literal["gpus-per-node", "gres", "none"] = "gpus-per-node"
    """sbatch option that requests GPUs; `none`: no option, for clusters that allocate whole nodes."""
    type: str | None = None
    """Slurm's name of the GPU type: `h100`."""

    def option(self, count: int) -> str | None:
        """The sbatch option for `count` GPUs per node."""
        kind = f"{self.type}:" if self.type else ""
        options = {"gpus-per-node": f"--gpus-per-node={kind}{count}", "gres": f"--gres=gpu:{kind}{count}"}
        return options.get(self.how) if count else None


@_section
class Container:
    kind: Literal["pyxis", "apptainer"]
    image: str
    mounts: tuple[str, ...] = ()
    """Mounts `/outside:/inside`, besides the run directory, which is always mounted at its own path."""


@_section
class Site:
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    reservation: str | None = None
    gpus: Gpus = field(default_factory=Gpus)
    cpus_per_task: Annotated[int, Field(ge=1)] | None = None
    """CPUs per node for all its ranks; default: the partition's with GPUs, which may be one in all, else one per rank."""
    mem: str | None = None
    """Memory per node: `900G`; `0`: all of it."""
    exclusive: bool = False
    requeue: bool = True
    """Whether jobs may be requeued; false: `--chain` submits the following jobs in advance."""
    interface: str | None = None
    """Network interface of the ranks; default: the one on the route to the first node."""
    container: Container | None = None
    setup: str | None = None
    """Shell lines that every node runs before Python: `module load ...`."""
    env: dict[_Name, str] = field(default_factory=dict)
    """Variables of the job. Secrets must come from the submitting shell."""
    options: tuple[Annotated[str, Field(pattern="^--")], ...] = ()
    """Further options of sbatch, one each: `--switches=1`."""

    def sbatch_options(self) -> list[str]:
        """The sbatch options that depend only on the site."""
        names = ("partition", "account", "qos", "constraint", "reservation", "mem")
        values = {name: getattr(self, name) for name in names}
        named = [f"--{name}={value}" for name, value in values.items() if value is not None]
        return [*named, *(["--exclusive"] if self.exclusive else []), *self.options]


_ADAPTER = TypeAdapter(Site)


def load_site(path: str | Path) -> Site:
    """Load a site file. Raises UserError, naming the key."""
    try:
        tree = yaml.safe_load(Path(path).read_text()) or {}
        site = _ADAPTER.validate_python(tree)
    except OSError as error:
        raise UserError(f"--site = {path} can't be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--site = {path} is not valid YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        raise UserError(f"site {path}: {_describe(error)}") from None
    for name in site.env:
        if _SECRET.search(name.upper().replace("_", " ")):
            raise UserError(f"site {path}: env.{name} looks like a secret; remove it and export it where you submit")
    for key, _ in keys_with_credentials({"env": site.env, "options": site.options, "setup": site.setup}):
        raise UserError(f"site {path}: {key} has a password in it; remove it and export it where you submit")
    return site


def _describe(error: ValidationError) -> str:
    first: Any = next((p for p in error.errors() if p["type"] == "unexpected_keyword_argument"), error.errors()[0])
    key = ".".join(map(str, first["loc"]))
    if first["type"] == "unexpected_keyword_argument":
        return f"unknown key {key}; there are {', '.join(_known(first['loc'][:-1]))}"
    return f"{key} = {first['input']!r}: {first['msg']}" if key else f"it must be a mapping, not {first['input']!r}"


def _known(section: tuple[str, ...]) -> list[str]:
    owner: Any = {"gpus": Gpus, "container": Container}.get(section[0] if section else "", Site)
    return [key.name for key in fields(owner)]
