"""What a pass reads: positions, slots and rows follow from spans alone."""

import torch
from tiny_decode import make_engine, prompts

from erollout.engine.model.attention import QuerySpan
from erollout.engine.model.inputs import slots_of


def test_inputs_follow_from_spans() -> None:
    engine = make_engine("llama", block_size=4, num_kv_blocks=16)
    engine.model.prepare()
    spans = [QuerySpan(6, 7, [3, 9]), QuerySpan(2, 6, [5, 1])]
    inputs = engine.runner.inputs(spans, [40, 11, 12, 13, 14])
    assert inputs.token_ids.tolist() == [40, 11, 12, 13, 14]
    assert inputs.positions.tolist() == [6, 2, 3, 4, 5]
    assert inputs.slots.tolist() == [9 * 4 + 2, 5 * 4 + 2, 5 * 4 + 3, 4, 5]
    assert inputs.logit_rows.tolist() == [0, 1, 2, 3, 4]
    assert engine.runner.inputs(spans, [0] * 5, [4]).logit_rows.tolist() == [4]
    assert slots_of([3, 9], 4, 3, 5) == [15, 36]
    other = inputs.with_tokens(torch.zeros(5, dtype=torch.int64))
    assert other.token_ids.tolist() == [0] * 5 and other.plan is inputs.plan and other.slots is inputs.slots


@torch.inference_mode()
def test_reading_a_sequence_at_once_equals_reading_its_last_token_after_the_others() -> None:
    engine = make_engine("qwen3-tied")
    engine.model.prepare()
    tokens = prompts(50)[0]
    whole = engine.model.forward(engine.runner.reading(tokens))
    assert len(whole) == 50
    last = engine.model.forward(engine.runner.reading(tokens, 49))
    assert torch.equal(last[0], whole[-1])
