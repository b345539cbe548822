"""Which patches apply where, and that a megatron-core they weren't written for is refused."""

import importlib
import inspect
import logging.handlers
import queue
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from ranks import RankPool
from tiny_megatron import Case, build

from erollout.errors import UserError
from erollout.megatron_patches import LocalRMSNorm, apply_all
from erollout.megatron_patches.patch import FunctionEdit, Host, SourcePatch
from erollout.megatron_patches.registry import PATCHES, installed_version, require_tested, select

UPSTREAM = """
from contextlib import contextmanager

class Base:
    def __init__(self, device):
        self.device = device

class Optimizer(Base):
    __registry = "kept"

    def __init__(self, device):
        super().__init__(device)
        assert self.device == "cuda"
        self.registry = self.__registry

    @classmethod
    def build(cls):
        return "cuda", cls.__name__

@contextmanager
def on_device(fail=False):
    yield "cuda"
    if fail:
        raise RuntimeError("in the original file")
"""


@pytest.fixture
def upstream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Installs a source text as a module and imports it."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def install(source: str) -> ModuleType:
        name = f"upstream_{tmp_path.name}"
        (tmp_path / f"{name}.py").write_text(source)
        importlib.invalidate_caches()
        return importlib.import_module(name)

    return install


def cpu_patch(module: ModuleType) -> SourcePatch:
    edits = [
        ("Optimizer.__init__", '"cuda"', '"cpu"'),
        ("Optimizer.build", '"cuda"', '"cpu"'),
        ("on_device", '"cuda"', '"cpu"'),
    ]
    return SourcePatch("tiny", "a test", tuple(FunctionEdit(module.__name__, f, ((old, new),)) for f, old, new in edits))


def test_an_edit_changes_functions_that_were_imported_before(upstream: Callable[[str], ModuleType]) -> None:
    module = upstream(UPSTREAM)
    build, on_device = module.Optimizer.build, module.on_device  # as `from module import ...` keeps them
    patch = cpu_patch(module)
    patch.check("1.0")
    patch.apply()
    assert (module.Optimizer("cpu").device, module.Optimizer("cpu").registry) == ("cpu", "kept")
    assert build() == ("cpu", "Optimizer")
    with on_device() as device:
        assert device == "cpu"
    with pytest.raises(AssertionError):
        module.Optimizer("cuda")


def test_tracebacks_through_an_edit_point_into_the_original_file(upstream: Callable[[str], ModuleType]) -> None:
    module = upstream(UPSTREAM)
    cpu_patch(module).apply()
    with pytest.raises(RuntimeError) as caught, module.on_device(fail=True):
        pass
    frame = traceback.extract_tb(caught.value.__traceback__)[-1]
    raising = next(number for number, line in enumerate(UPSTREAM.splitlines(), start=1) if "raise" in line)
    assert (frame.filename, frame.lineno) == (module.__file__, raising)


def test_applying_an_edit_twice_equals_applying_it_once(upstream: Callable[[str], ModuleType]) -> None:
    module = upstream(UPSTREAM)
    patch = cpu_patch(module)
    patch.apply()
    once = module.Optimizer.__init__.__code__
    patch.check("1.0")
    patch.apply()
    assert module.Optimizer.__init__.__code__ == once


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        (UPSTREAM.replace('return "cuda"', "return device()"), "contains it 0 times"),
        (UPSTREAM.replace('return "cuda"', 'return "cuda" or "cuda"'), "contains it 2 times"),
        (UPSTREAM.replace("def build", "def construct"), "does not exist"),
    ],
    ids=["line gone", "line ambiguous", "function gone"],
)
def test_a_changed_source_is_refused_by_name(upstream: Callable[[str], ModuleType], changed: str, problem: str) -> None:
    module = upstream(changed)
    with pytest.raises(
        UserError, match=r"megatron patch tiny: .*Optimizer.build of the installed megatron-core 1.0 .*"
    ) as caught:
        cpu_patch(module).check("1.0")
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("version", ["0.15.3", "0.16.0", "0.17.0", "0.16.1rc0"])
def test_an_untested_release_is_refused(version: str) -> None:
    with pytest.raises(UserError, match=rf"megatron-core {version} .*pip install 'megatron-core==0.16.1'"):
        require_tested(version)


def test_the_installed_release_is_tested_and_is_what_the_patches_expect() -> None:
    require_tested(installed_version())
    for patch in PATCHES:
        patch.check(installed_version())
        assert patch.why and patch.locations


def test_nothing_is_patched_on_a_gpu_but_upstream_bugs_and_who_gets_in() -> None:
    every_host = ["checkpoint_results_queue", "restricted_unpickling"]
    with_fused_adam = select(PATCHES, Host(cuda_available=True, fused_adam_available=True))
    assert [patch.name for patch in with_fused_adam] == every_host
    bugs = select(PATCHES, Host(cuda_available=True, fused_adam_available=False))
    assert [patch.name for patch in bugs] == ["distributed_optimizer_checkpoint", *every_host]
    assert select(PATCHES, Host(cuda_available=False, fused_adam_available=False)) == PATCHES


def test_apply_all_twice_reports_the_same_on_one_line() -> None:
    report = apply_all()
    assert apply_all() == report
    line = report.describe()
    assert "\n" not in line
    assert report.version in line
    for name in (*(patch.name for patch in report.applied), *report.not_needed):
        assert name in line
    assert {patch.name for patch in PATCHES} == {*(patch.name for patch in report.applied), *report.not_needed}


@pytest.mark.skipif(torch.cuda.is_available(), reason="checks what happens without a GPU")
def test_megatron_sees_the_cpu_and_everyone_else_the_real_torch() -> None:
    apply_all()
    from megatron.core.pipeline_parallel import schedules  # imported before or after: rebound either way

    assert schedules.torch.cuda.current_device() == torch.device("cpu")
    assert schedules.torch.zeros(2, device="cuda", pin_memory=True).device.type == "cpu"
    assert schedules.torch.device("cuda", 0) == torch.device("cpu")
    assert isinstance(torch.device("cpu"), schedules.torch.device)
    assert schedules.torch.Tensor is torch.Tensor

    with pytest.raises((AssertionError, RuntimeError)):
        torch.cuda.current_device()
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(2, device="cuda")
    assert torch.device("cuda").type == "cuda"
    assert inspect.isclass(torch.device)
    assert torch.cuda.synchronize.__module__ == "torch.cuda"
    assert "type" not in vars(torch.Tensor)
    assert torch.zeros(1).type() == "torch.FloatTensor"


def test_modules_imported_after_the_patches_see_the_cpu_too() -> None:
    if not any(patch.name == "device_proxy" for patch in apply_all().applied):
        pytest.skip("the device proxy is not needed here")
    late = importlib.import_module("megatron.core.resharding.copy_services.gloo_copy_service")
    assert late.torch is importlib.import_module("megatron.core.pipeline_parallel.schedules").torch
    assert late.torch is not torch


def test_local_rms_norm() -> None:
    config = SimpleNamespace(
        normalization="RMSNorm", layernorm_zero_centered_gamma=False, params_dtype=torch.float32, sequence_parallel=True
    )
    norm = LocalRMSNorm(config, hidden_size=8, eps=1e-6)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(norm(x), x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))
    assert norm.weight.sequence_parallel
    config.normalization = "LayerNorm"
    with pytest.raises(UserError, match="normalization = 'LayerNorm'"):
        LocalRMSNorm(config, hidden_size=8)


def test_mixed_precision_keeps_fp32_parameters_as_they_are() -> None:
    apply_all()
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

    device = "cuda" if torch.cuda.is_available() else "cpu"
    half, full = (torch.nn.Parameter(torch.ones(2, dtype=dtype, device=device)) for dtype in (torch.bfloat16, torch.float32))
    config = OptimizerConfig(bf16=True, params_dtype=torch.bfloat16)
    optimizer = Float16OptimizerWithFloat16Params(torch.optim.AdamW([half, full]), config, None, None)
    assert [group[0] is full for group in optimizer.fp32_from_fp32_groups] == [True]
    assert [group[0] is half for group in optimizer.float16_groups] == [True]
    assert half.main_param.dtype == torch.float32


def count_main_parameters(case: Case) -> tuple[int, int, int]:
    """Parameters, those marked as having an fp32 copy, those whose copy (or a part of it) lies on this rank."""
    model, _, _ = build(case, None)
    marked = [parameter for parameter in model.parameters() if getattr(parameter, "main_param_sharded", False)]
    return len(list(model.parameters())), len(marked), sum(parameter.main_param is not None for parameter in marked)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a gloo world of CPU tensors")
@pytest.mark.distributed
def test_distributed_optimizer_marks_half_parameters_whose_copy_lies_elsewhere(rank_pool: RankPool) -> None:
    for parameters, marked, here in rank_pool.run(2, count_main_parameters, Case(bf16=True, distributed_optimizer=True)):
        assert marked == parameters > here > 0


def draw() -> tuple[list[list[float]], list[list[float]], int]:
    """Random numbers outside and inside forks of the tensor-parallel state, and the number of warnings about it."""
    apply_all()
    from megatron.core import parallel_state, tensor_parallel

    warnings: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    handler = logging.handlers.QueueHandler(warnings)
    logging.getLogger("megatron.core.tensor_parallel.random").addHandler(handler)
    parallel_state.initialize_model_parallel(2)
    tensor_parallel.model_parallel_cuda_manual_seed(7)
    outside, inside = [], []
    for _ in range(2):
        outside.append(torch.rand(4).tolist())
        with tensor_parallel.get_cuda_rng_tracker().fork():
            inside.append(torch.rand(4).tolist())
    logging.getLogger("megatron.core.tensor_parallel.random").removeHandler(handler)
    return outside, inside, warnings.qsize()


@pytest.mark.skipif(torch.cuda.is_available(), reason="checks what happens without a GPU")
@pytest.mark.distributed
def test_forks_draw_from_a_stream_of_their_own_on_each_tensor_rank(rank_pool: RankPool) -> None:
    (outside, inside, warnings), (other_outside, other_inside, other_warnings) = rank_pool.run(2, draw)
    torch.manual_seed(7)
    assert outside == other_outside == [torch.rand(4).tolist(), torch.rand(4).tolist()]  # as if there were no forks
    streams = [*outside, *inside, *other_inside]
    assert len({tuple(numbers) for numbers in streams}) == len(streams)
    assert warnings == other_warnings == 0
