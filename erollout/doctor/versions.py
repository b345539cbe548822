"""Installed packages against the versions pinned in setup.py, and a fingerprint for comparing nodes. Pure."""

import hashlib
import importlib.metadata
import importlib.util
import platform
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from erollout.doctor.report import FINGERPRINT, Finding

SHOWN = ("torch", "megatron-core", "transformer-engine", "deepspeed", "ray", "nvidia-modelopt", "mlflow")
"""Packages shown. Missing optional ones are reported; all required ones are checked."""
_DEVELOPMENT = {"dev", "benchmark", "openvino"}
_ENGINE_PARTS = ("transformer-engine-cu13", "transformer-engine-cu12")
_SOURCES = ("erollout", "erollout.launch", "erollout.megatron_patches")

Installed = Callable[[str], str | None]
"""Function from a package to its version; None: not installed."""


def installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def declared() -> tuple[tuple[Requirement, ...], str]:
    """The requirements and the Python version of the installed erollout; empty if it is not installed."""
    try:
        metadata = importlib.metadata.metadata("erollout")
    except importlib.metadata.PackageNotFoundError:
        return (), ""
    return tuple(map(Requirement, metadata.get_all("Requires-Dist") or ())), metadata["Requires-Python"] or ""


def check_python(wanted: str, version: str = platform.python_version()) -> Finding:
    if version in SpecifierSet(wanted):
        return Finding("Python", version)
    return Finding("Python", f"{version}, and erollout is for {wanted}", "error", "create the environment with such a Python")


def check_packages(requirements: Iterable[Requirement], installed: Installed = installed_version) -> Iterator[Finding]:
    """One finding for all packages that are as pinned, and one for each that is not."""
    requirements = tuple(requirements)
    if not requirements:
        yield Finding("packages", "erollout is not installed", "error", "pip install -e . in its directory")
        return
    fits = []
    for requirement in requirements:
        extra = extra_of(requirement)
        if extra in _DEVELOPMENT or (extra and requirement.name not in SHOWN):
            continue
        finding = _check(requirement, extra, installed(requirement.name))
        if finding is not None:
            yield finding
        elif requirement.name in SHOWN:
            fits.append(f"{requirement.name} {installed(requirement.name)}")
    yield Finding("packages", f"as pinned: {', '.join(fits) or 'none'}")
    if installed("transformer-engine") and not any(map(installed, _ENGINE_PARTS)):
        yield Finding(
            "transformer-engine",
            "is installed without its CUDA part, so megatron-core can't be imported",
            "error",
            "pip uninstall transformer-engine, or on GPUs pip install -e .[gpu]",
        )


def extra_of(requirement: Requirement) -> str | None:
    """The extra that requires the package; None: always required."""
    markers = str(requirement.marker or "")
    return markers.partition("extra ==")[2].strip().strip("\"'") or None


def _check(requirement: Requirement, extra: str | None, version: str | None) -> Finding | None:
    """Finding on a package; None: it is as pinned."""
    install = f"pip install -e .{f'[{extra}]' if extra else ''}"
    if version is None and extra:
        return Finding(requirement.name, f"not installed, optional: {install}")
    if version is None:
        return Finding(requirement.name, f"not installed; needed is {requirement.specifier or 'any version'}", "error", install)
    if not requirement.specifier.contains(version, prereleases=True):
        return Finding(requirement.name, f"{version}, tested with {requirement.specifier}", "warning", install)
    return None


def check_fingerprint(
    requirements: Iterable[Requirement], config: str | None = None, installed: Installed = installed_version
) -> Finding:
    """Fingerprint of code, Python, packages and, if given, configuration, for comparing nodes."""
    names = sorted({requirement.name for requirement in requirements if extra_of(requirement) not in _DEVELOPMENT})
    versions = "\n".join([platform.python_version(), *(f"{name} {installed(name)}" for name in names)])
    parts = {"code": code_digest(source_folders()), "versions": _digest(versions.encode())}
    if config is not None:
        parts["config"] = _digest(config.encode())
    return Finding(FINGERPRINT, " ".join(f"{name}={value}" for name, value in parts.items()))


def source_folders() -> list[Path]:
    """Directories of erollout's packages; an editable install has some outside the first."""
    specs = (importlib.util.find_spec(name) for name in _SOURCES)
    return [Path(folder) for spec in specs if spec for folder in spec.submodule_search_locations or ()]


def code_digest(folders: Iterable[Path]) -> str:
    """Digest of all Python and C++ sources, by their paths within the folders."""
    contents = hashlib.sha256()
    for folder in folders:
        for path in sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".cpp", ".h")):
            contents.update(f"{path.relative_to(folder)}\n{path.stat().st_size}\n".encode())
            contents.update(path.read_bytes())
    return contents.hexdigest()[:12]


def _digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()[:12]
