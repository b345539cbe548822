"""What the benchmarks know of SmolLM2-135M-Instruct beside erollout/data/smollm2.py."""

import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

QUESTION, ANSWER = (504, 3575, 282, 4649, 314), 7042
"""Token ids of "The capital of France is" and " Paris"."""
OPENVINO_EXPORT = """
import sys
from optimum.intel.openvino import OVModelForCausalLM
model = OVModelForCausalLM.from_pretrained(sys.argv[1], export=True, compile=False, load_in_8bit=False)
model.save_pretrained(sys.argv[2])
"""


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
