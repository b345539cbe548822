"""Restricted unpickling of objects from other ranks and of a checkpoint's files."""

from .patch import FunctionEdit, SourcePatch, on_every_host

_OURS = '__import__("erollout.security.unpickling", fromlist=["load"])'

RESTRICTED_UNPICKLING = SourcePatch(
    name="restricted_unpickling",
    why="torch unpickles objects of other ranks and the description of a checkpoint, with whatever code they name",
    edits=(
        FunctionEdit(
            "torch.distributed.distributed_c10d",
            "_tensor_to_object",
            (("_unpickler(io.BytesIO(buf)).load()", f"{_OURS}.load_message(buf)"),),
        ),
        FunctionEdit(
            "torch.distributed.checkpoint.filesystem",
            "FileSystemReader.read_metadata",
            (("pickle.load(metadata_file)", f"{_OURS}.load_metadata(metadata_file)"),),
        ),
        FunctionEdit(
            "torch.distributed.checkpoint.default_planner",
            "DefaultLoadPlanner.load_bytes",
            (
                ("torch.load(value, weights_only=False),", "torch.load(value, weights_only=True),"),
                (
                    "torch.load(\n                value, weights_only=False\n",
                    "torch.load(\n                value, weights_only=True\n",
                ),
            ),
        ),
    ),
    needed_on=on_every_host,
)
