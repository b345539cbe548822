"""What an engine says about its bits."""

import logging
from pathlib import Path

import pytest
import torch
import yaml
from ranks import RankPool
from tiny_decode import make_engine
from tiny_runs import tiny_tree, train_here
from tiny_speculation import NGramProposer
from torch import Tensor

from erollout.configuration.speculation import NGramConfig
from erollout.engine import self_test
from erollout.engine.model import linear
from erollout.engine.model.linear import TorchLinear
from erollout.errors import UserError
from erollout.kernels import native


class Careless(TorchLinear):
    """Sums up in two halves where there are several rows."""

    def __call__(self, x: Tensor) -> Tensor:
        half = x.shape[1] // 2
        if len(x) < 3:
            return x @ self.weight.t()
        return x[:, :half] @ self.weight[:, :half].t() + x[:, half:] @ self.weight[:, half:].t()


@pytest.fixture(autouse=True)
def forget() -> None:
    self_test._try_out.cache_clear()


class CarelessWithBias(TorchLinear):
    """Adds the bias first where there are several rows."""

    def __call__(self, x: Tensor) -> Tensor:
        if self.bias is None or len(x) < 3:
            return super().__call__(x)
        return self.bias + x.flip(1) @ self.weight.flip(1).t()


@pytest.mark.parametrize(
    ("kernel", "dtype"), [("torch", "float32"), ("prepacked", "float32"), ("torch", "bfloat16"), ("native", "bfloat16")]
)
def test_the_kernels_keep_the_promise(kernel: str, dtype: str, caplog: pytest.LogCaptureFixture) -> None:
    if kernel == "native" and native.why_unavailable():
        pytest.skip(str(native.why_unavailable()))
    caplog.set_level(logging.INFO)
    engine = make_engine("llama", kernels=kernel, dtype=dtype)
    assert not engine.promise.broken
    assert f"{kernel} kernels, {dtype}" in caplog.text and "depend on its own sequence alone" in caplog.text


def test_a_kernel_that_breaks_it_is_named(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(linear.LINEAR_KERNELS, "torch", Careless)
    engine = make_engine("llama", kernels="torch")
    assert "layers of 128 x 64" in engine.promise.broken
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "torch kernels, float32" in warning and "processor with" in warning and "try another rollout.kernels" in warning


def test_coupled_drafts_are_refused_where_they_would_change_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(linear.LINEAR_KERNELS, "torch", Careless)
    engine = make_engine("llama", kernels="torch")
    proposers = {"": NGramProposer(NGramConfig(), engine.cache.device)}
    with pytest.raises(UserError, match=r"verification = coupled .*layers of 128 x 64.* = rejection") as refusal:
        engine.speculate(proposers)
    assert "rollout.kernels" in str(refusal.value) and "\n" not in str(refusal.value)
    engine.speculate(proposers, verification="rejection")
    engine.speculate({})


def test_coupled_drafts_are_not_refused_for_what_a_gpu_never_promised() -> None:
    self_test.Promise("torch on cuda", ("the products of a GPU's libraries",), is_tried=False).require_coupled()


def test_a_layer_with_a_bias_is_tried_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(linear.LINEAR_KERNELS, "torch", CarelessWithBias)
    engine = make_engine("qwen2-tied", kernels="torch")
    assert engine.promise.broken and all(what.endswith(" with a bias") for what in engine.promise.broken)


def test_attention_that_breaks_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.bmm

    def careless(left: Tensor, right: Tensor) -> Tensor:
        return real(left, right) if left.shape[1] > 8 else real(left.double(), right.double()).to(left.dtype)

    engine = make_engine("llama", kernels="torch")  # its tiles are found with the real product
    monkeypatch.setattr(torch, "bmm", careless)
    self_test._try_out.cache_clear()
    promise = self_test.promise_of("torch", engine.model)
    assert promise.broken == ("attention of 2 queries per KV head, head size 16",)


@pytest.mark.distributed
def test_a_run_tracks_what_its_kernels_promise(rank_pool: RankPool, tmp_path: Path) -> None:
    rank_pool.run(1, train_here, tiny_tree(tmp_path, train={"steps": 1}))
    (resolved,) = tmp_path.rglob("resolved.yaml")
    assert "depend on its own sequence alone" in yaml.safe_load(resolved.read_text())["decode_kernels"]
