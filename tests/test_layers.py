"""The structure, read from the source: imports go down, libraries stay in their place, one module reads the environment."""

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

FACE = "erollout"
LAYERS = (
    ("errors",),
    (
        "erollout",
        "configuration",
        "environment",
        "resilience.atomic_write",
        "resilience.signals",
        "resilience.unattended",
        "security",
        "tracking.terminal",
    ),
    ("config", "types", "megatron_patches", "schedulers"),
    ("parallel", "tracking", "launch", "kernels", "speculation", "resilience.watchdog", "rollout.partial"),
    ("policy", "rewards", "data", "plots", "resilience"),
    ("resharding", "algorithm", "engine"),
    ("drafter", "coordinator"),
    ("calibration",),
    ("checkpoint", "training.evaluation", "simulation", "rollout.control"),
    ("rollout",),
    ("plots.rollout_figures", "training.preflight", "training.step_metrics"),
    ("training", "doctor", "report"),
    ("training.session", "launch.scorer_files"),
    ("api",),
    ("launch.run_directory", "launch.snapshot"),
    ("launch.plan", "launch.ray_job", "launch.status"),
    ("launch.ray_driver", "launch.slurm"),
    ("launch.ray",),
    ("launch.commands",),
    ("command_line",),
    ("cli",),
    ("__main__",),
)
"""Packages and modules of erollout, lowest first (`erollout` is its __init__). Each may import only from rows below its own.
A module with a row of its own is not of its package's."""

LIBRARIES = {
    "torch": (
        "algorithm",
        "calibration.sweep",
        "checkpoint.checkpointer",
        "rollout.control",
        "coordinator.exchange",
        "doctor.collective",
        "doctor.kernels",
        "drafter",
        "engine",
        "kernels",
        "launch",
        "megatron_patches",
        "parallel.collectives",
        "parallel.groups",
        "policy",
        "resharding",
        "rollout.rollout_worker",
        "rollout.decode_replica",
        "tracking.metrics",
        "tracking.profiler",
    ),
    "megatron": ("checkpoint.checkpointer", "checkpoint.writing", "megatron_patches", "parallel.groups", "policy"),
    "transformers": ("data", "engine", "training.preflight", "rollout.rollout_worker", "rollout.decode_replica"),
    "mlflow": ("tracking",),
    "matplotlib": ("plots",),
    "jinja2": ("data.prompts", "report.page"),
    "modelopt": ("drafter",),
    "triton": ("kernels",),
    "deepspeed": ("policy.optimizer",),
    "ray": ("launch", "schedulers.ray_cluster", "rewards"),
    "reasoning_gym": ("data", "rewards"),
    "math_verify": ("rewards",),
    "pyarrow": ("data", "tracking.table"),
}
"""Who may import a library: a package, or a single module of it. Imports for type checkers alone are free."""

PURE = (
    "configuration.arguments",
    "configuration.bounds",
    "configuration.section",
    "configuration.speculation",
    "calibration.file",
    "calibration.devices",
    "calibration.model_size",
    "calibration.sweep_file",
    "calibration.sweep_log",
    "checkpoint.manifest",
    "checkpoint.resume",
    "cli",
    "command_line.commands",
    "config",
    "configuration.yaml_tree",
    "coordinator.dispatch",
    "coordinator.lengths",
    "coordinator.occupancy",
    "coordinator.migration",
    "coordinator.throughput",
    "coordinator.state_machine",
    "doctor.cpu",
    "doctor.gpus",
    "doctor.judgement",
    "doctor.limits",
    "doctor.network",
    "doctor.reachability",
    "doctor.report",
    "doctor.schedulers",
    "doctor.storage",
    "doctor.versions",
    "drafter.description",
    "drafter.formats",
    "drafter.registry",
    "engine.block_manager",
    "engine.orders",
    "engine.model.decode_layout",
    "engine.proposers.ngram",
    "engine.scheduler",
    "engine.sequence",
    "environment",
    "errors",
    "training.evaluation",
    "configuration.hub",
    "rollout.partial",
    "rollout.summary",
    "launch.commands",
    "launch.gate",
    "launch.meeting",
    "launch.addresses",
    "launch.ray",
    "launch.ray_agent",
    "launch.secret",
    "launch.torchrun",
    "parallel.layout",
    "parallel.placement",
    "policy.architecture",
    "policy.decoder",
    "policy.families",
    "policy.shards",
    "policy.training_layout",
    "schedulers.ray_cluster",
    "resharding.planner",
    "checkpoint.run_lock",
    "speculation.acceptance",
    "speculation.cost.corrections",
    "speculation.cost.cost_model",
    "speculation.ladder",
    "speculation.cost.measured_table",
    "speculation.probes",
    "speculation.cost.roofline",
    "speculation.format_choice",
    "speculation.statistics",
    "speculation.step",
    "speculation.toggle",
    "speculation.trace",
    "tracking.terminal",
    "types",
    "security.unpickling",
    "resilience.atomic_write",
    "resilience.watchdog",
)
"""Modules whose import loads none of FRAMEWORKS, not even through another module of erollout."""

FRAMEWORKS = ("torch", "megatron", "transformers", "mlflow", "modelopt", "deepspeed", "ray", "matplotlib")


@dataclass(frozen=True)
class Import:
    file: str
    line: int
    target: str
    """Dotted name of a module: erollout's where it is one of them, else as written."""
    for_types: bool
    """Under `if TYPE_CHECKING`."""
    at_load: bool
    """Outside functions."""

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Module:
    file: str
    tree: ast.Module
    imports: tuple[Import, ...]


def read_modules(root: Path) -> dict[str, Module]:
    """Every module of the package by its dotted name; launch/ and megatron_patches/ are packages inside it."""
    files = {
        _dotted(path.relative_to(root)): path
        for folder in ("erollout", "launch", "megatron_patches")
        for path in sorted((root / folder).rglob("*.py"))
    }
    modules = {}
    for name, path in files.items():
        tree = ast.parse(path.read_text(), str(path))
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        found = _imports(tree, str(path.relative_to(root)), package, files.keys())
        modules[name] = Module(str(path.relative_to(root)), tree, tuple(found))
    return modules


def _dotted(path: Path) -> str:
    parts = [part for part in path.with_suffix("").parts if part != "__init__"]
    return ".".join(parts if parts[0] == "erollout" else ["erollout", *parts])


def _imports(tree: ast.Module, file: str, package: str, known: object) -> Iterator[Import]:
    for node, for_types, at_load in _walk(tree, False, True):
        for target in _targets(node, package, known):
            yield Import(file, node.lineno, target, for_types, at_load)


def _walk(node: ast.AST, for_types: bool, at_load: bool) -> Iterator[tuple[ast.AST, bool, bool]]:
    """All nodes below, each with whether it is for type checkers only and whether it runs when the module loads."""
    typing_only = isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
    in_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    otherwise = node.orelse if isinstance(node, ast.If) else []
    for child in ast.iter_child_nodes(node):
        flags = (for_types or (typing_only and child not in otherwise), at_load and not in_function)
        yield child, *flags
        yield from _walk(child, *flags)


def _targets(node: ast.AST, package: str, known) -> list[str]:
    """The modules that a statement imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            parents = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*parents, *([base] if base else [])])
        return [name if (name := f"{base}.{alias.name}") in known else base for alias in node.names]
    if isinstance(node, ast.Call) and ast.unparse(node.func) in ("__import__", "import_module", "importlib.import_module"):
        return [a.value for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    return []


def _unit(module: str) -> str:
    """The row entry that a module of erollout belongs to."""
    own = _inner(module) in [unit for units in LAYERS for unit in units]
    return _inner(module) if own else _inner(module).split(".")[0]


def _inner(module: str) -> str:
    return module.removeprefix("erollout.")


def _within(module: str, names: tuple[str, ...]) -> bool:
    return any(_inner(module) == name or _inner(module).startswith(f"{name}.") for name in names)


def _is_ours(target: str) -> bool:
    return target.split(".")[0] == "erollout"


def upward_imports(modules: dict[str, Module]) -> list[str]:
    level = {unit: row for row, units in enumerate(LAYERS) for unit in units}
    problems = [
        f"{module.file}:1: {_unit(name)} stands in no row of LAYERS in tests/test_layers.py; give it one"
        for name, module in modules.items()
        if _unit(name) not in level
    ]
    for name, module in modules.items():
        for imported in module.imports:
            mine, theirs = _unit(name), _unit(imported.target)
            if not _is_ours(imported.target) or mine == theirs or not {mine, theirs} <= level.keys():
                continue
            if mine == FACE and imported.for_types:  # what it exports is loaded on demand
                continue
            if level[theirs] >= level[mine]:
                relation = "the same layer" if level[theirs] == level[mine] else "a higher layer"
                problems.append(
                    f"{imported.where}: {mine} imports {imported.target}, which is of {relation}; imports only go down"
                )
    return problems


def import_cycles(modules: dict[str, Module]) -> list[str]:
    """Modules that import each other, directly or round a longer way; imports for type checkers alone don't count."""
    edges = {name: {i.target: i for i in m.imports if i.target in modules and not i.for_types} for name, m in modules.items()}
    problems = []
    for name in modules:
        for target, imported in edges[name].items():
            if target == name or name in _reachable(target, lambda module: edges[module].keys()):
                problems.append(f"{imported.where}: {name} imports {target}, which imports it back; modules form no cycles")
    return problems


def two_way_packages(modules: dict[str, Module]) -> list[str]:
    """Packages that import each other, though no two of their modules do."""
    packages = {_inner(name).split(".")[0] for name in modules if "." in _inner(name)}
    arrows: dict[tuple[str, str], str] = {}
    for name, module in modules.items():
        for imported in module.imports:
            mine, theirs = (_inner(module).split(".")[0] for module in (name, imported.target))
            if _is_ours(imported.target) and mine != theirs and {mine, theirs} <= packages:
                arrows.setdefault((mine, theirs), imported.where)
    return [
        f"{where}: {mine} imports {theirs}, which imports it back ({arrows[theirs, mine]}); move what both need below them"
        for (mine, theirs), where in arrows.items()
        if (theirs, mine) in arrows and mine < theirs
    ]


def misplaced_libraries(modules: dict[str, Module]) -> list[str]:
    return [
        f"{imported.where}: {_inner(name)} imports {library}; LIBRARIES allows it in {', '.join(LIBRARIES[library])}"
        for name, module in modules.items()
        for imported in module.imports
        if (library := imported.target.split(".")[0]) in LIBRARIES
        and not imported.for_types
        and not _within(name, LIBRARIES[library])
    ]


def impurities(modules: dict[str, Module], name: str) -> list[str]:
    """Frameworks that importing a module loads, through whatever it imports."""
    loaded = _reachable(name, lambda module: _loads(modules, module))
    return [
        f"{imported.where}: {_inner(name)} is pure but loads {imported.target}"
        + ("" if module == name else f" through {module}")
        for module in sorted(loaded)
        for imported in modules[module].imports
        if imported.at_load and not imported.for_types and imported.target.split(".")[0] in FRAMEWORKS
    ]


def _loads(modules: dict[str, Module], name: str) -> list[str]:
    """Modules of erollout that run when `name` is imported: what it imports, and the packages it lies in."""
    parents = [name.rpartition(".")[0]] if "." in name else []
    targets = [i.target for i in modules[name].imports if i.at_load and not i.for_types]
    return [target for target in [*parents, *targets] if target in modules]


def _reachable(start: str, neighbours: Callable) -> set[str]:
    seen, waiting = {start}, [start]
    while waiting:
        new = set(neighbours(waiting.pop())) - seen
        seen |= new
        waiting += new
    return seen


def environment_reads(modules: dict[str, Module]) -> list[str]:
    names = ("environ", "environb", "getenv", "getenvb", "putenv", "unsetenv")
    problems = []
    for name, module in modules.items():
        if name == "erollout.environment":
            continue
        for node in ast.walk(module.tree):
            attribute = isinstance(node, ast.Attribute) and node.attr in names and ast.unparse(node.value) == "os"
            imported = isinstance(node, ast.ImportFrom) and node.module == "os" and any(a.name in names for a in node.names)
            if attribute or imported:
                problems.append(
                    f"{module.file}:{node.lineno}: {_inner(name)} uses the environment; only erollout/environment.py may"
                )
    return problems


@pytest.fixture(scope="module")
def modules() -> dict[str, Module]:
    return read_modules(ROOT)


def _assert_none(problems: list[str]) -> None:
    assert not problems, "\n" + "\n".join(problems)


def test_the_source_is_found(modules: dict[str, Module]) -> None:
    assert {
        "erollout",
        "erollout.config",
        "erollout.parallel",
        "erollout.launch.local",
        "erollout.megatron_patches",
    } <= modules.keys()


def test_imports_only_go_down(modules: dict[str, Module]) -> None:
    _assert_none(upward_imports(modules))


def test_modules_form_no_cycles(modules: dict[str, Module]) -> None:
    _assert_none(import_cycles(modules))


def test_packages_import_each_other_one_way(modules: dict[str, Module]) -> None:
    _assert_none(two_way_packages(modules))


def test_libraries_are_imported_where_they_belong(modules: dict[str, Module]) -> None:
    _assert_none(misplaced_libraries(modules))


@pytest.mark.parametrize("name", PURE)
def test_pure_modules_load_no_framework(modules: dict[str, Module], name: str) -> None:
    if f"erollout.{name}" not in modules:
        pytest.skip(f"{name} is not built")
    _assert_none(impurities(modules, f"erollout.{name}"))


def test_the_environment_is_read_in_one_module(modules: dict[str, Module]) -> None:
    _assert_none(environment_reads(modules))


SOURCES = {
    "erollout/__init__.py": "",
    "erollout/config.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\nelse:\n    import ray\n",
    "erollout/types.py": "def f():\n    import torch.nn\n    from erollout.training import trainer\n",
    "erollout/training/trainer.py": "import os\nfrom erollout.config import Config\nprint(os.environ['A'])\n",
    "erollout/engine/__init__.py": "",
    "erollout/engine/scheduler.py": "from .cache import Cache\nfrom os import getenv\n",
    "erollout/engine/cache.py": "import torch\nfrom erollout.engine import scheduler\nimport erollout.algorithm.x\n",
    "erollout/algorithm/x.py": "import importlib\nimportlib.import_module('mlflow.tracking')\nimport erollout.engine\n",
    "erollout/strange.py": "",
    "launch/ray.py": "import ray\n",
    "megatron_patches/__init__.py": "",
}


@pytest.fixture
def wrong(tmp_path: Path) -> dict[str, Module]:
    """A tree that breaks every rule."""
    for name, source in SOURCES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source)
    return read_modules(tmp_path)


def _places(problems: list[str]) -> list[str]:
    return sorted(problem.partition(": ")[0] for problem in problems)


def test_each_rule_finds_what_breaks_it(wrong: dict[str, Module]) -> None:
    assert _places(upward_imports(wrong)) == [
        "erollout/algorithm/x.py:3",
        "erollout/engine/cache.py:3",
        "erollout/strange.py:1",
        "erollout/types.py:3",
    ]
    assert _places(import_cycles(wrong)) == ["erollout/engine/cache.py:2", "erollout/engine/scheduler.py:1"]
    assert _places(two_way_packages(wrong)) == ["erollout/algorithm/x.py:3"]
    assert _places(misplaced_libraries(wrong)) == ["erollout/algorithm/x.py:2", "erollout/config.py:5", "erollout/types.py:2"]
    assert _places(environment_reads(wrong)) == ["erollout/engine/scheduler.py:2", "erollout/training/trainer.py:3"]
    assert _places(impurities(wrong, "erollout.engine.scheduler")) == [
        "erollout/algorithm/x.py:2",
        "erollout/engine/cache.py:1",
    ]
    assert _places(impurities(wrong, "erollout.config")) == ["erollout/config.py:5"]
    assert impurities(wrong, "erollout.types") == []  # inside a function: not loaded with the module
