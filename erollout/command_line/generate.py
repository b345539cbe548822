"""`erollout generate`: completions of prompts by a model, on the command line."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from erollout.configuration.arguments import Commands, add_overrides, add_step
from erollout.errors import UserError


def add_command(commands: Commands) -> None:
    """Add `generate`."""
    text = "complete prompts with a model, with speculation as asked for"
    parser = commands.add_parser("generate", help=text, description=text)
    policy = parser.add_mutually_exclusive_group(required=True)
    policy.add_argument("--model", metavar="DIR", help="Hugging Face directory")
    policy.add_argument("--run", dest="directory", metavar="DIR", help="train.output_dir of a run: sample from its checkpoint")
    add_step(parser)
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="a prompt; may be given several times")
    parser.add_argument("--prompts", metavar="FILE", help="text file with a prompt per line; - for standard input")
    parser.add_argument("--chat", action="store_true", help="apply the tokenizer's chat template")
    parser.add_argument("-n", type=int, default=1, metavar="N", help="completions per prompt")
    parser.add_argument("--max-tokens", type=int, default=256, metavar="N", help="longest completion in tokens")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help="0: greedy")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="nucleus sampling")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the samples")
    parser.add_argument(
        "--speculation", default="off", choices=("off", "always", "toggle", "adaptive"), help="when to draft (default off)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON line per prompt, with token ids and log-probs")
    add_overrides(parser)
    parser.set_defaults(run=_generate)


def _generate(options: argparse.Namespace, arguments: list[str]) -> int:
    prompts = [*options.prompt, *(_lines(options.prompts) if options.prompts else [])]
    if not prompts:
        raise UserError("no prompt is given; add --prompt TEXT or --prompts FILE")
    if options.model is not None and options.step is not None:
        raise UserError(f"--step = {options.step} is the step of a run's checkpoint; give --run DIR instead of --model")
    from erollout.checkpoint.saved_policy import find_policy

    source = find_policy(options.directory, options.step) if options.model is None else options.model
    from erollout.api.generation import GenerationEngine  # takes seconds, so after the checks
    from erollout.parallel.groups import current_rank
    from erollout.types import SamplingParams

    sampling = SamplingParams(temperature=options.temperature, top_p=options.top_p, max_tokens=options.max_tokens)
    with GenerationEngine.from_pretrained(
        source, options.speculation, seed=options.seed, overrides=options.overrides
    ) as engine:
        result = engine.generate([engine.chat(text) if options.chat else text for text in prompts], sampling, options.n)
    if current_rank():
        return 0
    for asked, found in zip(prompts, result, strict=True):
        if options.json:
            print(
                json.dumps({"prompt": asked, "completions": [asdict(each) for each in found.completions]}, ensure_ascii=False)
            )
            continue
        for completion in found.completions:
            print(f"{asked}{completion.text}" if not options.chat else completion.text)
    drafts = result.speculation
    accepted = f", {drafts.acceptance_length:.2f} tokens per verify pass" if drafts.num_drafts else ""
    print(f"{result.tokens_per_second:.1f} tokens/s{accepted}; speculation {'; '.join(result.why)}", file=sys.stderr)
    return 0


def _lines(name: str) -> list[str]:
    """Prompts of a file. Raises UserError."""
    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"--prompts {name} can't be read: {reason}") from error
    return [line for line in text.splitlines() if line.strip()]
