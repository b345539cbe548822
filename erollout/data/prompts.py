"""From task items to token ids: chat template or bare text, and the limits on length."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING

from jinja2.exceptions import TemplateError

from erollout.config import DataConfig
from erollout.data.items import Message, Source, TaskItem
from erollout.errors import UserError, foreign_code
from erollout.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class PromptLimits:
    max_prompt_tokens: int
    """rollout.max_prompt_tokens"""
    context_tokens: int
    """Longest sequence of the model, prompt and response together."""


class PromptRenderer:
    """Renders a question as the policy's prompt.

    With a chat template: system prompt and messages go through it, up to where the assistant's turn starts. Without one:
    the bare text after the tokenizer's bos token, if it has one.
    """

    def __init__(self, data: DataConfig, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Raises UserError for a system prompt that can't be used."""
        self.tokenizer = tokenizer
        self.uses_chat_template = data.chat_template and bool(tokenizer.chat_template)
        self._system_prompt = data.system_prompt
        self._instruction = data.instruction
        self.date = date.fromisoformat(data.date) if data.date else date.today()
        """Date for chat templates that use one (`strftime_now`), fixed so that an item's text is constant in a run."""
        if data.system_prompt is not None and not self.uses_chat_template:
            why = "the tokenizer has no chat template" if data.chat_template else "data.chat_template = false"
            raise UserError(f"data.system_prompt is set but {why}; write it into data.instruction instead")
        # fails now for a template that rejects the roles, or for several without a default
        self.text(TaskItem("0", None, "", origin="data.chat_template"))

    @property
    def tells_date(self) -> bool:
        """Whether the text of an item depends on the date."""
        return self.uses_chat_template and "strftime_now" in str(self.tokenizer.chat_template)

    def text(self, item: TaskItem) -> str:
        """The prompt as text, with special tokens written out. Raises UserError naming the item."""
        if self.uses_chat_template:
            return self._chat(self._messages(item), item.origin)
        if not isinstance(item.question, str):
            raise UserError(f"{item.origin}: chat messages need a tokenizer with a chat template and data.chat_template = true")
        return (self.tokenizer.bos_token or "") + self._instruct(item.question)

    def encode(self, text: str, origin: str) -> tuple[int, ...]:
        """Token ids of exactly this text. Raises UserError if the tokenizer can't encode a part of it.

        The tokenizers library raises bare `Exception`, so nothing narrower can be caught.
        """

        def refusal(error: Exception) -> UserError:
            return UserError(f"{origin}: the tokenizer can't encode {text[:60]!r}: {' '.join(str(error).split())}")

        with foreign_code(refusal):
            return tuple(self.tokenizer.encode(text, add_special_tokens=False))

    def _instruct(self, question: str) -> str:
        return self._instruction.replace("{prompt}", question)

    def _messages(self, item: TaskItem) -> list[Message]:
        question = item.question
        messages = [{"role": "user", "content": question}] if isinstance(question, str) else list(question)
        last = {**messages[-1], "content": self._instruct(messages[-1]["content"])}
        if self._system_prompt is None:
            return [*messages[:-1], last]
        if messages[0]["role"] == "system":
            raise UserError(f"{item.origin} has a system message of its own; unset data.system_prompt")
        return [{"role": "system", "content": self._system_prompt}, *messages[:-1], last]

    def _chat(self, messages: list[Message], origin: str) -> str:
        """Apply the chat template, which is foreign code and may raise anything."""

        def refusal(error: Exception) -> UserError:
            templates = self.tokenizer.chat_template
            if isinstance(templates, dict) and "default" not in templates:
                return UserError(
                    f"{origin}: the tokenizer has chat templates named {', '.join(templates)} but none named default; name one "
                    "so in its directory, or set data.chat_template = false"
                )
            roles = ", ".join(message["role"] for message in messages)
            kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "  # its text says it all
            why = " ".join(f"{kind}{error}".split())[:300]
            return UserError(f"{origin}: the tokenizer's chat template refuses messages of roles {roles}: {why}")

        with foreign_code(refusal):
            rendered = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, strftime_now=self.date.strftime
            )
        return str(rendered)


class PromptDataset:
    """Tokenized prompts by global index: stateless, the same on every rank and after every restart."""

    def __init__(self, source: Source, renderer: PromptRenderer, limits: PromptLimits) -> None:
        self._source = source
        self._renderer = renderer
        self._limits = limits

    def __len__(self) -> int:
        """Items in one epoch."""
        return len(self._source)

    @property
    def renderer(self) -> PromptRenderer:
        return self._renderer

    def item(self, index: int) -> TaskItem:
        """The item before rendering."""
        return self._source.item(index)

    def prompt(self, index: int) -> Prompt:
        """Raises UserError for a prompt that is too long."""
        item = self._source.item(index)
        text, ids = self._encode(item)
        return Prompt(index=index, prompt_ids=ids, text=text, task=item.task, item=item.record)

    def solution(self, index: int) -> str | None:
        """The written solution of an item; None: there is none."""
        return self._source.item(index).solution

    def unrendered(self) -> Iterator[Prompt]:
        """All items of an epoch with their scorer's data, without text."""
        for index in range(len(self)):
            item = self._source.item(index)
            yield Prompt(index, (), "", item.task, item.record)

    def supervised_example(self, index: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(prompt_ids, response_ids with the end-of-sequence id). Each epoch is read backwards.

        RL reads an epoch forwards, so it repeats items of a supervised warm-up only if the two together exceed the epoch.
        Raises UserError for an item without a written solution and for one that is too long.
        """
        epoch, position = divmod(index, len(self))
        item = self._source.item((epoch + 1) * len(self) - 1 - position)
        eos = self._renderer.tokenizer.eos_token_id
        if item.solution is None:
            raise UserError(f"{item.origin} has no written solution to learn from; supervised training needs one")
        if eos is None:
            raise UserError("the tokenizer has no end-of-sequence token; set eos_token in its tokenizer_config.json")
        prompt_ids = self._encode(item)[1]
        response_ids = (*self._renderer.encode(item.solution, item.origin), eos)
        length = len(prompt_ids) + len(response_ids)
        if length > self._limits.context_tokens:
            raise UserError(
                f"{item.origin}: prompt and solution have {length} tokens, more than the model's context of "
                f"{self._limits.context_tokens}; drop it or raise model.max_position_embeddings"
            )
        return prompt_ids, response_ids

    def check(self, items: Sequence[TaskItem]) -> None:
        """Raise UserError for the first item that is too long.

        Only suspects are tokenized: a text has no more tokens than bytes, but for a few that a tokenizer adds.
        """
        slack = 8
        room = min(self._limits.max_prompt_tokens, self._limits.context_tokens - 1) - slack
        for item in items:
            if len(self._renderer.text(item).encode(errors="surrogatepass")) > room:
                self._encode(item)

    def _encode(self, item: TaskItem) -> tuple[str, tuple[int, ...]]:
        text = self._renderer.text(item)
        ids = self._renderer.encode(text, item.origin)
        limits = self._limits
        if len(ids) > limits.max_prompt_tokens:
            raise UserError(
                f"{item.origin}: prompt has {len(ids)} tokens, more than rollout.max_prompt_tokens = "
                f"{limits.max_prompt_tokens}; raise the limit or drop the item"
            )
        if len(ids) >= limits.context_tokens:
            raise UserError(
                f"{item.origin}: prompt has {len(ids)} tokens, which leaves no room for a response in the model's context of "
                f"{limits.context_tokens}; drop the item or raise model.max_position_embeddings"
            )
        return text, ids
