"""`erollout export`: a run's checkpoint as a Hugging Face directory."""

import argparse
import sys

from erollout.configuration.arguments import Commands, add_overrides, add_step


def add_command(commands: Commands) -> None:
    """Add `export`."""
    text = "write a run's checkpoint as a Hugging Face directory"
    parser = commands.add_parser("export", help=text, description=text)
    parser.add_argument("--run", required=True, dest="directory", metavar="DIR", help="train.output_dir of the run")
    add_step(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="directory to write; not there yet, or empty")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="of the weights (default: the run's model.dtype)")
    add_overrides(parser)
    parser.set_defaults(run=_export)


def _export(options: argparse.Namespace, arguments: list[str]) -> int:
    from erollout.checkpoint.saved_policy import find_policy

    find_policy(options.directory, options.step, options.overrides)  # the next import takes seconds
    from erollout.api.export import export

    print("Loading the checkpoint ...", file=sys.stderr, flush=True)
    saved = export(options.directory, options.out, options.step, options.dtype, options.overrides)
    print(f"{options.out}: the policy after {saved.step} steps, of {saved.path}")
    return 0
