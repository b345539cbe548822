"""What a checkpoint costs a training step, written at once and in the background, and what its checksums cost.

    python -W ignore benchmarks/checkpoint.py [--layers 12] [--hidden 576] [--vocab 32000] [--repetitions 7] [--directory DIR]

One rank trains a model of random weights. The two ways take turns: an update, a save, some more updates, wait for the files.
The stall is what the save itself takes; in the background it costs the updates after it something too.
"""

import argparse
import logging
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch

from erollout.algorithm.supervised import Supervised
from erollout.checkpoint.checkpointer import Checkpointer, RunState
from erollout.checkpoint.manifest import complete_checkpoints, damage, total_bytes
from erollout.config import Config, build_config
from erollout.doctor.cpu import processor
from erollout.parallel.groups import initialize, shut_down
from erollout.policy.actor import Actor
from erollout.policy.architecture import Architecture
from erollout.policy.batch import TrainSample
from erollout.policy.families import policy_architecture

TOKENS = 128
SEQUENCES = 2


def main() -> None:
    options = _options()
    logging.disable(logging.INFO)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        config = _config(options, folder)
        architecture = policy_architecture(config.model)
        context = initialize(config)
        actor = Actor(config, architecture, context, 10**6)
        kinds = {"at once": False, "in the background": True}
        savers = {name: Checkpointer(Path(folder) / name, 1, actor, "supervised", kind) for name, kind in kinds.items()}
        _report(options, architecture, *_measure(actor, savers, options), _checksums(Path(folder) / "at once"))
        shut_down(context)


def _measure(
    actor: Actor, savers: dict[str, Checkpointer], options: argparse.Namespace
) -> tuple[float, dict[str, dict[str, float]]]:
    """Median seconds of an update alone, and of each way: the save, an update after it, save and updates and waiting."""
    update = _updater(actor)
    update()
    plain: list[float] = []
    seconds: dict[str, list[tuple[float, float, float]]] = {name: [] for name in savers}
    for step in range(1, options.repetitions + 1):
        for name in list(savers) if step % 2 else reversed(list(savers)):
            saver = savers[name]
            plain.append(_timed(update))
            began = time.perf_counter()
            saver.save(RunState(step, None))
            stall = time.perf_counter() - began
            after = []
            for _ in range(options.updates):
                after.append(_timed(update))
                saver.advance()
            saver.wait()
            seconds[name].append((stall, median(after), time.perf_counter() - began))
    names = ("save", "update after it", "all")
    medians = {name: dict(zip(names, map(median, zip(*found, strict=True)), strict=True)) for name, found in seconds.items()}
    return median(plain), medians


def _checksums(directory: Path) -> tuple[int, float]:
    """Bytes of a checkpoint, and seconds to check all of them, from the page cache."""
    (checkpoint,) = complete_checkpoints(directory)
    seconds = [_timed(lambda: damage(checkpoint)) for _ in range(3)]
    assert damage(checkpoint) is None
    return total_bytes(checkpoint), median(seconds)


def _updater(actor: Actor) -> Callable[[], object]:
    vocabulary = actor.architecture.vocab_size
    ids = [tuple((7 * i + j) % vocabulary for j in range(TOKENS)) for i in range(SEQUENCES)]
    samples = [TrainSample(row[: TOKENS // 2], row[TOKENS // 2 :]) for row in ids]
    return lambda: actor.update(samples, Supervised().token_weights(samples), Supervised())


def _timed(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def _report(
    options: argparse.Namespace,
    architecture: Architecture,
    plain: float,
    ways: dict[str, dict[str, float]],
    checked: tuple[int, float],
) -> None:
    size, seconds = checked
    print(f"{processor()[1]}, torch {torch.__version__}, megatron-core {version('megatron-core')}")
    print(
        f"{architecture.num_parameters() / 1e6:.0f} M parameters with Adam, one thread, {options.repetitions} rounds, medians"
    )
    print(f"checkpoint of {size / 1e9:.2f} GB; an update alone takes {plain:.2f} s")
    print(f"\n{'written':<20}{'stall, s':>10}{'s/GB':>8}{'update after':>14}{f'{options.updates} updates and all':>22}")
    for name, found in ways.items():
        print(
            f"{name:<20}{found['save']:>10.2f}{found['save'] / size * 1e9:>8.2f}"
            f"{found['update after it']:>14.2f}{found['all']:>22.2f}"
        )
    stalls = {name: found["save"] for name, found in ways.items()}
    print(f"\nthe stall in the background is {stalls['in the background'] / stalls['at once']:.2f} of that at once")
    print(f"checksums: {seconds / size * 1e9:.2f} s/GB on one core; ranks share the files")


def _config(options: argparse.Namespace, folder: str) -> Config:
    architecture = {
        "model_type": "llama",
        "vocab_size": options.vocab,
        "num_hidden_layers": options.layers,
        "hidden_size": options.hidden,
        "intermediate_size": 3 * options.hidden,
        "num_attention_heads": 9 if options.hidden % 9 == 0 else 4,
        "num_key_value_heads": 3 if options.hidden % 9 == 0 else 2,
        "max_position_embeddings": 2 * TOKENS,
        "tie_word_embeddings": True,
    }
    model = {"architecture": architecture, "tokenizer": folder, "dtype": "float32"}
    sections = {"data": {"kind": "chain_sum_cot"}, "parallel": {"world_size": 1}, "train": {"output_dir": folder}}
    return build_config({"model": model, **sections})


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--updates", type=int, default=4)
    parser.add_argument("--directory", help="on the filesystem to measure; default: the temporary one")
    return parser.parse_args()


if __name__ == "__main__":
    main()
