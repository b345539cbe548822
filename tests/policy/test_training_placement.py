"""The training layout as pure metadata: nothing missing, nothing twice."""

from collections import defaultdict
from math import prod

import numpy as np
import pytest

from erollout.errors import UserError
from erollout.parallel.layout import TrainLayout
from erollout.parallel.placement import box_slices, pieces_by_tensor
from erollout.policy.architecture import EMBEDDING, Architecture
from erollout.policy.decoder import LAYER, Layer
from erollout.policy.families.qwen3 import QWEN3
from erollout.policy.training_layout import padded_vocab_size, training_placement

LAYOUTS = [TrainLayout(1, 1, 1), TrainLayout(2, 2, 1), TrainLayout(2, 1, 2), TrainLayout(8, 2, 2), TrainLayout(4, 4, 1)]


def _architecture(**changes) -> Architecture:
    sizes = dict(vocab_size=13, num_layers=4, hidden_size=8, ffn_hidden_size=12, num_attention_heads=8, num_query_groups=4)
    return Architecture(
        **{"family": "qwen2", "kv_channels": 2, "max_position_embeddings": 64, "add_qkv_bias": True, **sizes, **changes}
    )


def _elements(start: tuple[int, ...], shape: tuple[int, ...], whole_shape: tuple[int, ...]) -> list[int]:
    return np.arange(prod(whole_shape)).reshape(whole_shape)[box_slices(start, shape)].ravel().tolist()


@pytest.mark.parametrize("layer", [LAYER, QWEN3.layer], ids=["llama", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_model_replica_holds_every_element_once(layout: TrainLayout, tied: bool, layer: Layer) -> None:
    architecture = _architecture(tie_word_embeddings=tied, layer=layer)
    shapes = architecture.logical_tensors()
    for data in range(layout.data):
        copies: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
        for rank in layout.model_replica(data):
            for _, piece in pieces_by_tensor(training_placement(architecture, layout, rank)):
                for element in _elements(piece.start, piece.shape, shapes[piece.tensor]):
                    copies[piece.tensor][element] += 1
        assert copies.keys() == shapes.keys()
        for name, counts in copies.items():
            times = layout.tensor if "norm" in name else 2 if tied and name == EMBEDDING and layout.pipeline > 1 else 1
            assert counts == {element: times for element in range(prod(shapes[name]))}, name


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_local_tensors_are_covered_but_for_vocabulary_padding(layout: TrainLayout) -> None:
    architecture = _architecture()
    for rank in layout.model_replica(0):
        tensor = layout.coordinates(rank)[0]
        for local in training_placement(architecture, layout, rank):
            covered = [e for piece in local.pieces for e in _elements(piece.local_start, piece.shape, local.shape)]
            assert len(covered) == len(set(covered))
            padding = 0
            if "embedding" in local.name or "output_layer" in local.name:
                rows = padded_vocab_size(architecture, layout.tensor) // layout.tensor
                padding = min(rows, max(0, (tensor + 1) * rows - architecture.vocab_size)) * architecture.hidden_size
            assert prod(local.shape) - len(covered) == padding, local.name


def test_a_rank_may_hold_nothing_but_padding() -> None:
    last = training_placement(_architecture(vocab_size=9), TrainLayout(4, 4, 1), 3)
    assert last[0].shape == (3, 8) and last[0].pieces == ()


def test_fused_qkv_interleaves_by_query_group() -> None:
    layout = TrainLayout(2, 2, 1)
    names = {local.name: local for local in training_placement(_architecture(), layout, 1)}
    qkv = names["decoder.layers.0.self_attention.linear_qkv.weight"]
    order = [(piece.tensor.split(".")[-2], piece.start[0], piece.local_start[0]) for piece in qkv.pieces]
    assert order == [
        ("q_proj", 8, 0),
        ("k_proj", 4, 4),
        ("v_proj", 4, 6),
        ("q_proj", 12, 8),
        ("k_proj", 6, 12),
        ("v_proj", 6, 14),
    ]
    assert names["decoder.layers.0.self_attention.linear_proj.weight"].pieces[0].start == (0, 8)


@pytest.mark.parametrize(
    ("layout", "changes", "message"),
    [
        (TrainLayout(3, 1, 3), {}, "pipeline_model_parallel_size = 3 does not divide the model's 4 layers"),
        (TrainLayout(8, 8, 1), {"ffn_hidden_size": 16}, "key/value heads = 4 can't be split over 8"),
        (TrainLayout(4, 4, 1), {"ffn_hidden_size": 10}, "feed-forward size = 10 can't be split over 4"),
        (TrainLayout(1, 1, 1), {"num_query_groups": 3}, "8 attention heads are not a multiple of its 3"),
    ],
)
def test_layouts_that_do_not_divide_the_model_are_refused(layout: TrainLayout, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        training_placement(_architecture(**changes), layout, 0)
