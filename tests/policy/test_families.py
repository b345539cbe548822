"""Hugging Face configs in and out, against transformers itself."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from erollout.config import ModelConfig
from erollout.errors import UserError
from erollout.policy.architecture import RopeScaling
from erollout.policy.families import hf_config, policy_architecture, published_architecture, read_architecture
from erollout.policy.rotary import inverse_frequencies

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SMALL = {
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LLAMA = {"model_type": "llama", **SMALL}
QWEN2 = {"model_type": "qwen2", **SMALL}
QWEN3 = {"model_type": "qwen3", **SMALL}


def test_defaults_are_those_of_transformers() -> None:
    for config, theirs in ((LLAMA, LlamaConfig(**SMALL)), (QWEN2, Qwen2Config(**SMALL)), (QWEN3, Qwen3Config(**SMALL))):
        architecture = read_architecture(config, "test")
        assert architecture.max_position_embeddings == theirs.max_position_embeddings
        assert architecture.norm_epsilon == theirs.rms_norm_eps
        assert architecture.rotary_base == theirs.rope_parameters["rope_theta"]
        assert architecture.tie_word_embeddings == theirs.tie_word_embeddings
        assert architecture.kv_channels == (128 if config is QWEN3 else 16) == getattr(theirs, "head_dim", 16)
        assert architecture.num_query_groups == 2
        assert architecture.add_qkv_bias == (config is QWEN2) and architecture.has("q_norm") == (config is QWEN3)


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SMALL, rms_norm_eps=1e-5, tie_word_embeddings=True, bos_token_id=3, eos_token_id=[4, 5]),
        LlamaConfig(**SMALL, head_dim=32, max_position_embeddings=512, rope_parameters={"rope_theta": 5e5, **LLAMA3}),
        Qwen2Config(**SMALL, rope_parameters={"rope_theta": 1e6, "rope_type": "default"}, eos_token_id=7),
        Qwen3Config(**SMALL, head_dim=32, tie_word_embeddings=True, eos_token_id=[7, 8]),
    ],
    ids=["llama", "llama3", "qwen2", "qwen3"],
)
def test_a_config_of_transformers_survives_both_ways(config, tmp_path) -> None:
    architecture = read_architecture(json.loads(config.to_json_string(use_diff=False)), "test")
    assert architecture == read_architecture(json.loads(config.to_json_string()), "test")
    written = hf_config(architecture, "bfloat16")
    assert read_architecture(written, "test") == architecture
    (tmp_path / "config.json").write_text(json.dumps(written))
    reloaded = AutoConfig.from_pretrained(tmp_path)
    assert reloaded.dtype == torch.bfloat16 and type(reloaded) is type(config)
    assert reloaded.rope_parameters == {"rope_type": "default", **config.rope_parameters}
    for name in ("hidden_size", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "eos_token_id", "bos_token_id"):
        assert getattr(reloaded, name) == getattr(config, name), name


def test_logical_tensors_are_those_of_transformers() -> None:
    for config, tied in ((LLAMA, False), (LLAMA, True), (QWEN2, True), (QWEN3, False), (QWEN3, True)):
        config = {**config, "tie_word_embeddings": tied}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        assert read_architecture(config, "test").logical_tensors() == shapes


PUBLISHED = {
    "Qwen2.5-0.5B": (
        494_032_768,
        {
            "architectures": ["Qwen2ForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": 151643,
            "eos_token_id": 151643,
            "hidden_act": "silu",
            "hidden_size": 896,
            "initializer_range": 0.02,
            "intermediate_size": 4864,
            "max_position_embeddings": 32768,
            "max_window_layers": 24,
            "model_type": "qwen2",
            "num_attention_heads": 14,
            "num_hidden_layers": 24,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0,
            "sliding_window": 32768,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.40.1",
            "use_cache": True,
            "use_mrope": False,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
    ),
    "Qwen3-0.6B": (
        596_049_920,
        {
            "architectures": ["Qwen3ForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 151643,
            "eos_token_id": 151645,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 1024,
            "initializer_range": 0.02,
            "intermediate_size": 3072,
            "max_position_embeddings": 40960,
            "max_window_layers": 28,
            "model_type": "qwen3",
            "num_attention_heads": 16,
            "num_hidden_layers": 28,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": None,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.51.0",
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
    ),
    "Llama-3.2-1B": (
        1_235_814_400,
        {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 128000,
            "eos_token_id": [128001, 128008, 128009],
            "head_dim": 64,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "initializer_range": 0.02,
            "intermediate_size": 8192,
            "max_position_embeddings": 131072,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": 32,
            "num_hidden_layers": 16,
            "num_key_value_heads": 8,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 32.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.45.0.dev0",
            "use_cache": True,
            "vocab_size": 128256,
        },
    ),
    "SmolLM2-135M": (
        134_515_008,
        {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "hidden_act": "silu",
            "hidden_size": 576,
            "initializer_range": 0.041666666666666664,
            "intermediate_size": 1536,
            "is_llama_config": True,
            "max_position_embeddings": 8192,
            "model_type": "llama",
            "num_attention_heads": 9,
            "num_hidden_layers": 30,
            "num_key_value_heads": 3,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_interleaved": False,
            "rope_scaling": None,
            "rope_theta": 100000,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.40.1",
            "use_cache": True,
            "vocab_size": 49152,
        },
    ),
}
"""Configs as published, with the parameters that their models have."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_accepted(name: str) -> None:
    parameters, config = PUBLISHED[name]
    assert read_architecture(config, name).num_parameters() == parameters


@pytest.mark.parametrize(
    ("name", "parameters", "context"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", 8_030_261_248, 131072),
        ("models/SmolLM2-135M-Instruct", 134_515_008, 8192),
        ("Qwen2.5-0.5B", 494_032_768, 32768),
        ("Qwen2.5-7B-Instruct", 7_615_616_512, 32768),
        ("Qwen3-0.6B", 596_049_920, 40960),
        ("Qwen3-1.7B-Base", 1_720_574_976, 40960),
        ("Qwen3-4B", 4_022_468_096, 40960),
        ("Qwen/Qwen3-4B-Instruct-2507", 4_022_468_096, 262144),
        ("Qwen3-8B", 8_190_735_360, 40960),
        ("Qwen3-14B", 14_768_307_200, 40960),
        ("Qwen3-32B", 32_762_123_264, 40960),
    ],
)
def test_published_sizes_are_known_by_name(name: str, parameters: int, context: int) -> None:
    architecture = published_architecture(name)
    assert architecture is not None
    assert (architecture.num_parameters(), architecture.max_position_embeddings) == (parameters, context)
    assert published_architecture(name.replace("-", "-not-")) is None


def test_old_and_new_spelling_of_rope_agree() -> None:
    expected = RopeScaling(8.0, 1.0, 4.0, 64)
    old = {**LLAMA, "rope_theta": 500000, "rope_scaling": LLAMA3}
    older = {**old, "rope_scaling": {**{k: v for k, v in LLAMA3.items() if k != "rope_type"}, "type": "llama3"}}
    new = {**LLAMA, "rope_parameters": {"rope_theta": 500000, **LLAMA3}}
    for config in (old, older, new):
        architecture = read_architecture(config, "test")
        assert (architecture.rope_scaling, architecture.rotary_base) == (expected, 500000.0)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default"},
        LLAMA3,
        {**LLAMA3, "factor": 32.0, "low_freq_factor": 1.5, "high_freq_factor": 5.0, "original_max_position_embeddings": 777},
    ],
    ids=["default", "llama3", "llama3-other"],
)
@pytest.mark.parametrize("theta", [10000.0, 500000])
def test_inverse_frequencies_are_bit_equal_to_transformers(rope: dict, theta: float) -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = {"rope_theta": theta, **rope}
    theirs = LlamaRotaryEmbedding(LlamaConfig(**SMALL, head_dim=128, max_position_embeddings=4096, rope_parameters=dict(rope)))
    ours = inverse_frequencies(read_architecture({**LLAMA, "head_dim": 128, "rope_parameters": rope}, "test"))
    assert torch.equal(ours, theirs.inv_freq)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "mistral"}, "model_type = 'mistral'"),
        ({"model_type": None}, "model_type = None"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"attention_dropout": 0.1}, "attention_dropout = 0.1"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"sliding_window": 128}, "sliding_window = 128"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"logit_scale": 0.5}, "logit_scale = 0.5"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_scaling.rope_type = 'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.rope_type = 'linear'"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling.factor is missing"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention"),
        ({"rope_theta": "1e6"}, "rope_theta = '1e6'"),
        ({"num_key_value_heads": 3}, "num_key_value_heads = 3"),
        ({"hidden_size": 66}, "hidden_size = 66"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"head_dim": 15}, "head_dim = 15"),
        ({"vocab_size": 0}, "vocab_size = 0"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings = 'yes'"),
    ],
)
def test_what_would_change_the_result_is_refused_by_name(change: dict, named: str) -> None:
    with pytest.raises(UserError) as error:
        read_architecture({**LLAMA, **change}, "some/config.json")
    assert named in str(error.value) and "some/config.json" in str(error.value) and "\n" not in str(error.value)


OLD_AND_COMPLETE = {
    **{
        key: None
        for key in ("bad_words_ids", "cross_attention_hidden_size", "decoder_start_token_id", "finetuning_task", "prefix")
    },
    **{key: None for key in ("begin_suppress_tokens", "exponential_decay_length_penalty", "forced_bos_token_id")},
    **{key: 0 for key in ("min_length", "encoder_no_repeat_ngram_size", "no_repeat_ngram_size", "chunk_size_feed_forward")},
    **{key: 1 for key in ("num_beams", "num_beam_groups", "num_return_sequences", "pretraining_tp")},
    **{key: False for key in ("add_cross_attention", "is_decoder", "is_encoder_decoder", "tie_encoder_decoder", "torchscript")},
    **{key: False for key in ("output_scores", "remove_invalid_values", "tf_legacy_loss", "use_bfloat16", "early_stopping")},
    **{"diversity_penalty": 0.0, "length_penalty": 1.0, "typical_p": 1.0, "temperature": 1.0, "top_p": 1.0, "top_k": 50},
    **{
        "pruned_heads": {},
        "max_length": 20,
        "max_sequence_length": 512,
        "tokenizer_class": "LlamaTokenizer",
        "sep_token_id": 3,
    },
    **{"return_dict": True, "return_dict_in_generate": False, "id2label": {"0": "LABEL_0"}, "task_specific_params": {}},
}
"""What transformers 4.2x to 4.4x wrote into every config beside the model's own fields."""


def test_old_complete_configs_are_read_past_what_is_harmless() -> None:
    assert read_architecture({**OLD_AND_COMPLETE, **LLAMA}, "test") == read_architecture(LLAMA, "test")
    with pytest.raises(UserError, match=r"pruned_heads = \{'0': \[1\]\}"):
        read_architecture({**LLAMA, "pruned_heads": {"0": [1]}}, "test")


def test_all_problems_of_a_config_are_named_at_once() -> None:
    wrong = {
        "mlp_bias": True,
        "logit_scale": 2,
        "hidden_act": "gelu",
        "vocab_size": None,
        "eos_token_id": "</s>",
        "rope_theta": -1,
    }
    with pytest.raises(UserError) as error:
        read_architecture({**LLAMA, **wrong}, "some/config.json")
    message = str(error.value)
    assert message.count("some/config.json") == 1 and "\n" not in message
    for named in (
        "mlp_bias = True",
        "logit_scale = 2",
        "hidden_act",
        "vocab_size is missing",
        "eos_token_id = '</s>'",
        "rope_theta",
    ):
        assert named in message


@pytest.mark.parametrize("family", [QWEN2, QWEN3], ids=["qwen2", "qwen3"])
def test_a_sliding_window_counts_only_when_it_is_used(family: dict) -> None:
    off = {**family, "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 1}
    assert read_architecture(off, "test") == read_architecture(family, "test")
    for on in ({"use_sliding_window": True}, {"layer_types": ["full_attention", "sliding_attention"]}):
        with pytest.raises(UserError, match=next(iter(on))):
            read_architecture({**off, **on}, "test")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "qwen3_moe"}, "model_type = 'qwen3_moe' is not supported; supported are llama, qwen2, qwen3"),
        ({"model_type": "qwen3", "attention_bias": True}, "attention_bias = True is not supported"),
        ({"model_type": "qwen3", "num_experts": 128}, "num_experts = 128 is unknown for qwen3"),
    ],
)
def test_other_qwen3_are_refused(change: dict, named: str) -> None:
    with pytest.raises(UserError, match=f"^some/config.json: {named}") as error:
        read_architecture({**QWEN3, **change}, "some/config.json")
    assert "\n" not in str(error.value)


def test_policy_architecture_reads_a_directory(tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "eos_token_id": 5}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [6, 5]}))
    assert policy_architecture(ModelConfig(path=str(tmp_path))).eos_token_ids == (5, 6)
    with pytest.raises(UserError, match="max_position_embeddings = 4096"):
        policy_architecture(ModelConfig(path=str(tmp_path), max_position_embeddings=4096))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        policy_architecture(ModelConfig(path=str(tmp_path)))
    with pytest.raises(UserError, match="none is not there"):
        policy_architecture(ModelConfig(path=str(tmp_path / "none")))
    assert policy_architecture(ModelConfig(architecture=LLAMA)) == read_architecture(LLAMA, "test")
