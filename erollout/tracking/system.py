"""CPU, memory, disk, network and GPU metrics of this host, from MLflow's own monitors.

MLflow's own monitoring thread ends for good if its server fails to answer once. Here the same metrics go through the journal
like all others.
"""

import logging
import threading
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)


class SystemMonitor:
    """Calls `log(figures)` every `interval` seconds from its own thread; figures are named `system/...`."""

    def __init__(self, log: Callable[[dict[str, float]], None], interval: float = 10.0) -> None:
        self._log = log
        self._interval = interval
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="system-metrics", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def finish(self) -> None:
        """Log the last figures and end the thread."""
        self._stop.set()
        self._thread.join(5)

    def _run(self) -> None:
        """Broad except: a driver that fails to read a sensor costs these figures, never the run."""
        try:
            monitors = _monitors()
            while True:
                stopping = self._stop.wait(self._interval)
                for monitor in monitors:
                    monitor.collect_metrics()
                figures = {name: value for monitor in monitors for name, value in monitor.aggregate_metrics().items()}
                for monitor in monitors:
                    monitor.clear_metrics()
                self._log({f"system/{name}": float(value) for name, value in figures.items()})
                if stopping:
                    return
        except Exception as error:
            logger.warning("system metrics stop here (%s: %s)", type(error).__name__, error)


def _monitors() -> list[Any]:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    monitors: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    try:
        monitors.append(GPUMonitor())
    except (ImportError, RuntimeError) as error:  # no nvidia-ml-py, or no NVIDIA GPU
        logger.debug("no GPU metrics: %s", error)
    return monitors
