"""`python -m erollout` is the `erollout` command."""

from erollout.cli import run

if __name__ == "__main__":
    run()
