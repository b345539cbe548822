"""Generation with a Hugging Face model, alone or under torchrun, with self-speculative decoding."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from erollout.checkpoint.checkpointer import load_policy
from erollout.checkpoint.saved_policy import SavedPolicy
from erollout.config import Config, build_config
from erollout.configuration.yaml_tree import apply_override
from erollout.data.tokenizer import load_tokenizer
from erollout.engine.sampling.random import request_seed
from erollout.errors import UserError
from erollout.parallel.collectives import all_gather
from erollout.parallel.groups import initialize, shut_down
from erollout.policy.families import policy_architecture
from erollout.policy.hf_io import check_weights
from erollout.rollout.decode_replica import DecodeReplica, with_ends
from erollout.speculation.statistics import SpeculationStatistics, merge
from erollout.types import FinishReason, Rollout, RolloutRequest, SamplingParams

Mode = Literal["off", "always", "toggle", "adaptive"]
Tokens = Sequence[int]


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled response."""

    text: str
    token_ids: tuple[int, ...]
    """With the token that ended the response."""
    logprobs: tuple[float, ...]
    """Log-probs of the distribution sampled from, natural logarithms, one per token."""
    raw_logprobs: tuple[float, ...]
    """Log-probs of the model's softmax, before temperature, truncation and penalties."""
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class PromptCompletions:
    """A prompt with its completions."""

    prompt: str | None
    """None: the prompt was given as token ids."""
    prompt_token_ids: tuple[int, ...]
    completions: tuple[Completion, ...]

    @property
    def text(self) -> str:
        """Text of the first completion."""
        return self.completions[0].text


@dataclass(frozen=True, slots=True)
class GenerationResult(Sequence[PromptCompletions]):
    """Completions in the order of the prompts, and what speculation did; equal on all ranks."""

    prompts: tuple[PromptCompletions, ...]
    seconds: float
    """Seconds of the slowest replica."""
    speculation: SpeculationStatistics
    """Draft statistics of all replicas together."""
    why: tuple[str, ...]
    """Why the first replica speculated or not, at its largest and smallest batch."""

    @property
    def tokens_per_second(self) -> float:
        tokens = sum(len(completion.token_ids) for prompt in self.prompts for completion in prompt.completions)
        return tokens / self.seconds if self.seconds else 0.0

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]  # int or slice, as of a tuple
        return self.prompts[index]

    def __iter__(self) -> Iterator[PromptCompletions]:
        return iter(self.prompts)


class GenerationEngine:
    """`erollout.Engine`: generates with a model. A context manager; `generate` and `close` are collective over the world.

        with Engine.from_pretrained("models/Qwen2.5-0.5B-Instruct", speculation="adaptive") as engine:
            print(engine.generate("1 + 1 =", SamplingParams(max_tokens=16))[0].text)

    Under torchrun each group of `tensor_parallel_size` ranks is a replica, prompts are dispatched to them, and every rank gets
    all results.
    """

    def __init__(self, config: Config, saved: SavedPolicy | None = None) -> None:
        """From a configuration, of which the sections model, rollout, speculation, coordinator and parallel are used.

        saved: a checkpoint's weights instead of those of the configured model.

        Raises UserError for what this machine or model can't have.
        """
        self.config = config
        warnings.filterwarnings("ignore", module=r"megatron\.")  # it warns of missing GPU libraries when it is imported
        architecture = policy_architecture(config.model)
        self.tokenizer = load_tokenizer(config.tokenizer_path, architecture.vocab_size)
        if config.model.path is not None:
            check_weights(config.model.path, architecture)
        with ExitStack() as opened:
            context = initialize(config)
            opened.callback(shut_down, context)
            self._replica = DecodeReplica(config, architecture, context, self.tokenizer)
            if saved is None:
                self._replica.load_weights(config.model, config.train.seed)
            else:
                self._replica.refit(*load_policy(saved, config, context))
            self._opened = opened.pop_all()
        self._ends = (*architecture.eos_token_ids, self.tokenizer.eos_token_id)
        self._calls = 0

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path | SavedPolicy,
        speculation: Mode = "off",
        *,
        num_speculative_tokens: int = 3,
        drafter: str = "w4a16_clip",
        verification: Literal["coupled", "rejection"] = "coupled",
        dtype: Literal["bfloat16", "float32"] = "bfloat16",
        tensor_parallel_size: int = 1,
        max_model_len: int | None = None,
        max_num_seqs: int = 64,
        kv_cache_gib: float = 0.5,
        seed: int = 0,
        overrides: Sequence[str] = (),
    ) -> Self:
        """An engine with a model of a local Hugging Face directory, or of a run's checkpoint. Raises UserError.

        Args:
            source: directory with config.json, safetensors and tokenizer; or what `find_policy` found.
            speculation: as `speculation.mode`.
            drafter: as `speculation.drafter.format`.
            verification: `coupled`: the samples are those without speculation (`erollout config keys verification`).
            dtype: of weights and KV cache while decoding.
            tensor_parallel_size: ranks per replica; the world's size must be a multiple.
            max_model_len: longest sequence in tokens, prompt included; default: the model's.
            max_num_seqs: sequences that decode at once on a replica.
            kv_cache_gib: memory of a rank's KV cache, in GiB.
            seed: seed of the samples, which are functions of it, of the call and of the prompt's position.
            overrides: further keys as on the command line, `rollout.kernels=torch`; they win.
        """
        tree: dict[str, Any] = {
            "model": _model(source, max_model_len),
            "rollout": {
                "dtype": dtype,
                "tensor_model_parallel_size": tensor_parallel_size,
                "max_num_seqs": max_num_seqs,
                "kv_cache_gib": kv_cache_gib,
            },
            "speculation": {
                "mode": speculation,
                "num_speculative_tokens": num_speculative_tokens,
                "verification": verification,
                "drafter": {"format": drafter},
            },
            "parallel": {"tensor_model_parallel_size": tensor_parallel_size if isinstance(source, SavedPolicy) else 1},
            "train": {"seed": seed},
            "data": {"kind": "chain_sum_cot"},  # not used, but a configuration has one
        }
        for override in overrides:
            apply_override(tree, override, Config)
        config = build_config(tree, "Engine.from_pretrained")
        return cls(config, source if isinstance(source, SavedPolicy) else None)

    def generate(
        self, prompts: str | Tokens | Sequence[str | Tokens], sampling: SamplingParams | None = None, n: int = 1
    ) -> GenerationResult:
        """Sample each prompt `n` times.

        Args:
            prompts: texts, or lists of token ids; text is tokenized as it stands, without a chat template.
            sampling: default: temperature 1, up to 256 tokens. The model's end-of-sequence ids end a response too.

        Raises UserError for an impossible prompt or parameter.
        """
        texts, ids = self._tokenized(prompts)
        sampling = sampling or SamplingParams()
        sampling = replace(sampling, stop_token_ids=with_ends(sampling.stop_token_ids, self._ends))
        seed, self._calls = (self.config.train.seed, self._calls), self._calls + 1
        requests = [RolloutRequest(i, tokens, n, sampling, request_seed(*seed, i)) for i, tokens in enumerate(ids)]
        replica = self._replica
        replica.engine.wake_up()
        mine, summary = replica.sample(requests, learns=True)
        self._learn(mine)
        replica.engine.sleep()
        leads, stats = replica.context.is_decode_leader, replica.engine.stats
        parts = [part for part in all_gather((mine, stats.seconds, stats.speculation, summary.why) if leads else None) if part]
        found = {(rollout.prompt_index, rollout.sample_index): rollout for part in parts for rollout in part[0]}
        return GenerationResult(
            tuple(
                PromptCompletions(text, tokens, tuple(self._completion(found[index, sample]) for sample in range(n)))
                for index, (text, tokens) in enumerate(zip(texts, ids, strict=True))
            ),
            max(part[1] for part in parts),
            merge(part[2] for part in parts),
            parts[0][3],
        )

    def chat(self, message: str) -> tuple[int, ...]:
        """Token ids of a user's message in the tokenizer's chat template, up to where the answer begins. Raises UserError."""
        if not self.tokenizer.chat_template:
            raise UserError(f"the tokenizer in {self.config.tokenizer_path} has no chat template; give the text as it stands")
        messages = [{"role": "user", "content": message}]
        return tuple(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))

    def close(self) -> None:
        """Free the memory and leave the process groups that the engine has made."""
        self._replica.engine.sleep()
        self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _tokenized(self, prompts: str | Tokens | Sequence[str | Tokens]) -> tuple[list[str | None], list[tuple[int, ...]]]:
        """Texts (None: given as ids) and token ids of one prompt or of several."""
        single = isinstance(prompts, str) or (bool(prompts) and isinstance(prompts[0], int))
        several: Sequence[Any] = [prompts] if single else prompts
        if not several:
            raise UserError("no prompts to generate from; give at least one")
        texts: list[str | None] = []
        ids: list[tuple[int, ...]] = []
        for number, prompt in enumerate(several):
            tokens = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
            if not tokens or not all(isinstance(token, int) for token in tokens):
                raise UserError(f"prompt {number} = {prompt!r} must be text or token ids, and not be empty")
            texts.append(prompt if isinstance(prompt, str) else None)
            ids.append(tuple(tokens))
        return texts, ids

    def _learn(self, rollouts: Sequence[Rollout]) -> None:
        """Weight the drafter's requantisation by the activations of the first call, as training does."""
        speculation = self._replica.speculation
        if speculation is not None and self._calls == 1 and speculation.wants_rollouts:
            speculation.learn_from(rollouts)
            speculation.all_landed()
            self._replica.weights_updated(0)

    def _completion(self, rollout: Rollout) -> Completion:
        text = self._replica.engine.response_text(rollout.response_ids)
        return Completion(text, rollout.response_ids, rollout.rollout_logprobs, rollout.raw_logprobs, rollout.finish_reason)


def _model(source: str | Path | SavedPolicy, max_model_len: int | None) -> dict[str, Any]:
    """The section `model` of an engine's configuration."""
    if not isinstance(source, SavedPolicy):
        return {"path": str(source), "max_position_embeddings": max_model_len}
    longest = {} if max_model_len is None else {"max_position_embeddings": max_model_len}
    return source.config.to_dict()["model"] | longest
