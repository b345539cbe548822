"""Self-speculation: the configured drafters, the engine's own policy in fewer bits, updated with the policy."""

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from erollout.configuration.speculation import SpeculationConfig
from erollout.drafter.activation_statistics import InputStatistics, collect
from erollout.drafter.assignment import LM_HEAD, assign_formats
from erollout.drafter.auto_format import Overrides, select_formats
from erollout.drafter.description import describe_drafters
from erollout.drafter.drafter import Drafter, target_linears
from erollout.drafter.formats import AUTO, FIRST_FORMAT
from erollout.engine.engine import Engine
from erollout.engine.proposers.proposer_set import ProposerSet, RequantizeStats
from erollout.engine.proposers.quantized_policy import ModelProposer
from erollout.parallel.collectives import from_rank_zero
from erollout.parallel.groups import device_name
from erollout.types import Rollout

logger = logging.getLogger(__name__)

_CARRIED = -1
"""Generation of statistics measured again after a resume: different from any policy version."""


class SelfSpeculation(ProposerSet):
    """The drafters of one decode rank."""

    def __init__(self, options: SpeculationConfig, engine: Engine) -> None:
        """Raises UserError for formats that the policy's shards, the device or the kernels do not support."""
        drafter = options.drafter
        super().__init__(options, engine, {})
        self._overrides = [(override.pattern, override.format) for override in drafter.overrides]
        self._undecided = drafter.format == AUTO
        self.has_learned = False
        """Whether there has been a rollout to learn from; equal on all ranks."""
        self._sequences: list[tuple[int, ...]] = []
        """Token sequences on which the statistics are measured."""
        self._chosen: Overrides = []
        """Formats chosen by `auto`, per layer."""
        self._is_resumed = False
        """Whether the statistics must be measured again once there are weights."""
        formats = {described.name: described.format for described in describe_drafters(drafter)}
        self.drafters: dict[str, Drafter] = {
            name: self._build(FIRST_FORMAT if format == AUTO else format, self._overrides, drafter.lm_head)
            for name, format in formats.items()
        }
        """Drafters by their names in Arm.format, the default one first."""
        self.proposers = self.drafters

    @property
    def drafter(self) -> Drafter:
        """The default drafter."""
        return self.drafters[self.formats[0]]

    def tensor_landed(self, name: str) -> None:
        """Requantise for one of the engine's local tensors, which now has the new policy."""
        if self._is_resumed:
            return  # done in `complete`, once all tensors are there for measuring the statistics
        for drafter in self.drafters.values():
            drafter.requantize_(name)

    def complete(self, policy_version: int) -> RequantizeStats:
        """Complete the update to this version. Raises RuntimeError naming layers whose tensors have not arrived."""
        if self._is_resumed:
            self._is_resumed = False
            self._measure(_CARRIED)
            self.all_landed()
        return _total(drafter.complete(policy_version) for drafter in self.drafters.values())

    @property
    def wants_rollouts(self) -> bool:
        """Whether the formats use what `learn_from` measures."""
        return self._undecided or any(drafter.needs_statistics for drafter in self.drafters.values())

    def learns_at(self, step: int) -> bool:
        """Every statistics_interval steps, and in the first rollout of a new or resumed run."""
        return step % self.options.drafter.statistics_interval == 0 or not self.has_learned

    def learn_from(self, rollouts: Sequence[Rollout]) -> None:
        """Measure activations on a rollout's first tokens, if the formats use them, to weight the errors of the following
        requantisations; with `auto`, choose the formats once.

        The engine is awake and idle. Each replica measures its own: drafters may differ in their numbers, samples do not.
        """
        self.has_learned = True
        if not self.wants_rollouts:
            return
        self._sequences = _first_tokens(rollouts, self.options.drafter.statistics_tokens)
        statistics = self._measure(self.engine.policy_version or 0)
        if self._undecided:
            self._choose(statistics)

    def state_dict(self) -> dict[str, Any]:
        """State for requantising later policies, as JSON: the tokens, from which any layout measures the statistics again."""
        return {"tokens": [list(tokens) for tokens in self._sequences], "chosen": self._chosen, "of": self._setting()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load, before the first weights. Collective over the world. A choice of `auto` in another setting is dropped."""
        if not self.wants_rollouts:
            return
        self._sequences = [tuple(tokens) for tokens in state["tokens"]]
        if self._undecided and state["chosen"] and from_rank_zero(state["of"] == self._setting()):
            self._take([(layer, format) for layer, format in state["chosen"]])
        self.has_learned = bool(self._sequences) and not self._undecided
        self._is_resumed = bool(self._sequences) and self.wants_rollouts

    def _setting(self) -> dict[str, Any]:
        """The setting that a choice of formats holds for, as JSON."""
        engine, device = self.engine, self.engine.cache.device
        drafter = json.loads(json.dumps(asdict(self.options.drafter)))  # type: ignore[call-overload]  # see Config
        kind = [engine.kernel, engine.rollout.dtype, engine.rollout.tensor_model_parallel_size, engine.architecture.num_layers]
        return {"drafter": drafter, "device": device_name(device), "engine": kind}

    def _measure(self, generation: int) -> dict[str, InputStatistics]:
        """Measure statistics on the known tokens, for every drafter's next requantisation."""
        rows = max(drafter.sample_rows for drafter in self.drafters.values())
        total = sum(len(tokens) for tokens in self._sequences)
        statistics = collect(self.engine.model, self._sequences, total, rows, generation)
        for drafter in self.drafters.values() if statistics else ():
            drafter.use_statistics(statistics)
        return statistics

    def _choose(self, statistics: dict[str, InputStatistics]) -> None:
        """Replace the drafter by one with the best formats, as chosen by rank 0."""
        options, sequences = self.options.drafter, self._sequences
        choice = None
        if sequences:  # rank 0's replica has some whenever there is any prompt
            choice = select_formats(
                self.engine.model,
                lambda chosen: self._build("none", chosen, lm_head="target"),
                sequences,
                statistics,
                self._configured_layers(),
                lambda: self._build("none", self._overrides, options.lm_head),
            )
        overrides, selection = from_rank_zero(choice)
        logger.info(
            "speculation.drafter.format = auto: acceptance %.3f and a speed-up of %.2f are predicted with "
            "num_speculative_tokens = %d (configured: %d)",
            selection.acceptance,
            selection.speed_up,
            selection.num_speculative_tokens,
            self.options.num_speculative_tokens,
        )
        self._take(overrides)
        self.drafter.use_statistics(statistics)
        self.all_landed()
        self.complete(self.engine.policy_version or 0)

    def _take(self, chosen: Overrides) -> None:
        """Replace the default drafter by one with these formats."""
        options = self.options.drafter
        self._undecided, self._chosen = False, chosen
        speculates = self.engine.arm.speculates
        self.drafters[self.formats[0]] = self._build("none", [*chosen, *self._overrides], options.lm_head)
        self.switch(speculates)

    def _configured_layers(self) -> list[str]:
        """Layers whose format the configuration names."""
        layers, lm_head = target_linears(self.engine.model), self.options.drafter.lm_head
        one, other = (assign_formats(layers, default, self._overrides, lm_head) for default in ("none", FIRST_FORMAT))
        return [layer for layer in layers if one[layer] is other[layer] and (layer != LM_HEAD or one[layer] is not None)]

    def _build(self, format: str, overrides: Overrides, lm_head: str) -> Drafter:
        options = self.options.drafter
        return Drafter(
            self.engine.model,
            lambda model: ModelProposer(model, self.options.verification, self.engine.sampler.kernel),
            self.engine.max_model_len,
            format=format,
            group_size=options.group_size,
            lm_head=lm_head,
            overrides=overrides,
            kernel=self.engine.rollout.kernels,
        )


def _total(parts: Iterable[RequantizeStats]) -> RequantizeStats:
    """Total cost of several drafters, updated one after the other."""
    made = list(parts)
    return RequantizeStats(
        sum(stats.seconds for stats in made),
        max(stats.peak_extra_bytes for stats in made),
        sum(stats.buffer_bytes for stats in made),
    )


def _first_tokens(rollouts: Sequence[Rollout], limit: int) -> list[tuple[int, ...]]:
    """Prompts and responses with `limit` tokens in total."""
    sequences: list[tuple[int, ...]] = []
    for rollout in rollouts:
        if left := limit - sum(len(tokens) for tokens in sequences):
            sequences.append((rollout.prompt_ids + rollout.response_ids)[:left])
    return sequences
