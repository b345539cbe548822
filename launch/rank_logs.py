"""Log files of the ranks' stdout and stderr, besides the launcher's own output, which shows both too."""

import os
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import LogsDest, LogsSpecs


class RankLogs(LogsSpecs):
    """`rank_00003.out` and `rank_00003.err` in a directory, by global rank; no files without a directory."""

    def __init__(self, directory: Path | None = None) -> None:
        """Create the directory. Raises OSError."""
        super().__init__(str(directory))
        self._directory = directory
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)

    @property
    def root_log_dir(self) -> str:
        return str(self._directory)

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """`envs`: environment of the ranks by local rank."""
        for env in envs.values():
            env["TORCHELASTIC_ERROR_FILE"] = ""
        no_files = dict.fromkeys(envs, os.devnull)
        if self._directory is None:
            unnamed = dict.fromkeys(envs, "")
            return LogsDest(unnamed, unnamed, {}, {}, no_files)
        names = {local: str(self._directory / f"rank_{int(env['RANK']):05d}") for local, env in envs.items()}
        outputs, errors = ({local: f"{name}.{kind}" for local, name in names.items()} for kind in ("out", "err"))
        return LogsDest(outputs, errors, outputs, errors, no_files)
