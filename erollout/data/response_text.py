"""Text of a response, as seen by scorers, stop strings and the samples table."""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SpecialTokens = Literal["content", "all", "none"]


class ResponseText:
    """Decodes token ids to exactly what was sampled, except for omitted special tokens.

    `content` omits those that begin, end or pad a sequence and keeps the rest: `<answer>` and `<think>` are special tokens of
    some tokenizers and are part of what is scored.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        keep: SpecialTokens,
        end_ids: Collection[int] = (),
        stop_ids: Collection[int] = (),
    ) -> None:
        """
        Args:
            end_ids: the model's end-of-sequence ids, besides the tokenizer's.
            stop_ids: ids in `rollout.stop_token_ids`; special ones end a sequence too, others are text.
        """
        self._tokenizer = tokenizer
        added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        ends = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, *end_ids, *(added & {*stop_ids})} - {
            None
        }
        hidden = {"all": set(), "content": ends, "none": ends | added | set(tokenizer.all_special_ids)}
        self._hidden: set[int] = hidden[keep]

    def __call__(self, ids: Sequence[int]) -> str:
        shown = [number for number in ids if number not in self._hidden]
        return str(self._tokenizer.decode(shown, skip_special_tokens=False, clean_up_tokenization_spaces=False))
