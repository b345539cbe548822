import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from erollout.data.response_text import ResponseText, SpecialTokens
from erollout.engine.sampling.detokenizer import StopStringDetector
from erollout.errors import UserError

CORPUS = ["the answer is 42. ### the end", "so 3 + 4 = 7 and 7 - 2 = 5", "naïve café über 日本語 😀 ende"] * 4


def byte_level() -> PreTrainedTokenizerBase:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False))
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def sentencepiece_like() -> PreTrainedTokenizerBase:
    """Words begin with a marked space, unknown characters fall back to byte tokens; decoding drops the first space."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + [
        "<unk>",
        "▁",
        "▁the",
        "▁end",
        "▁answer",
        *"abcdefghijklmnopqrstuvwxyz.#",
    ]
    tokenizer = Tokenizer(
        models.Unigram([(piece, -float(i > 255)) for i, piece in enumerate(pieces)], unk_id=256, byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


TOKENIZERS = {"byte level": byte_level(), "sentencepiece": sentencepiece_like()}
tokenizers = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)


def stops_after(tokenizer: PreTrainedTokenizerBase, ids: list[int], stop: list[str]) -> int | None:
    detector = StopStringDetector(ResponseText(tokenizer, "none"), stop)
    return next((count for count, token in enumerate(ids, 1) if detector.feed(token)), None)


def reference(tokenizer: PreTrainedTokenizerBase, ids: list[int], stop: list[str]) -> int | None:
    """Decodes everything anew after every token."""
    for count in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:count], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if any(s in text for s in stop):
            return count
    return None


@tokenizers
@pytest.mark.parametrize("text", [CORPUS[0], "x 日本 the end the", "😀😀 ende"])
@pytest.mark.parametrize("stop", [["###"], [" the end"], ["日本"], ["😀 e"], ["nothing"], ["the", "x"]], ids=str)
def test_equals_decoding_everything(tokenizer: PreTrainedTokenizerBase, text: str, stop: list[str]) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert stops_after(tokenizer, ids, stop) == reference(tokenizer, ids, stop)


def test_a_stop_string_split_over_tokens_is_found_with_its_last_token() -> None:
    tokenizer = byte_level()
    ids = [tokenizer.convert_tokens_to_ids(c) for c in "a#b##"]
    assert stops_after(tokenizer, ids, ["##"]) == 5
    assert stops_after(tokenizer, ids, ["a#b"]) == 3


def test_a_character_split_over_tokens_is_found_with_its_last_byte() -> None:
    tokenizer = sentencepiece_like()
    ids = list("x日y".encode())  # the ids of byte tokens are their bytes
    assert stops_after(tokenizer, ids, ["日"]) == 4


@tokenizers
@settings(max_examples=60)
@given(data=st.data())
def test_any_tokens_and_any_stop_strings(tokenizer: PreTrainedTokenizerBase, data: st.DataObject) -> None:
    texts = st.text(alphabet="the nd#日😀é", max_size=12)
    text = data.draw(texts)
    stop = data.draw(st.lists(st.text(alphabet="the nd#日😀é", min_size=1, max_size=3), min_size=1, max_size=2))
    ids = tokenizer.encode(text, add_special_tokens=False)
    for place in data.draw(st.lists(st.integers(0, 12), max_size=2)):
        ids.insert(place, tokenizer.eos_token_id)
    assert stops_after(tokenizer, ids, stop) == reference(tokenizer, ids, stop)


def test_invalid_bytes_do_not_grow_the_window() -> None:
    tokenizer = sentencepiece_like()
    detector = StopStringDetector(ResponseText(tokenizer, "none"), ["end"])
    assert not any(detector.feed(0xE4) for _ in range(100))
    assert len(detector._window) < 50
    ids = tokenizer.encode("the end", add_special_tokens=False)
    assert [detector.feed(token) for token in ids][-1]


@pytest.mark.parametrize("stop", [[], ["a", ""]], ids=str)
def test_empty_stop_strings_are_refused(stop: list[str]) -> None:
    with pytest.raises(UserError, match=r"rollout\.stop"):
        StopStringDetector(ResponseText(byte_level(), "none"), stop)


def tagged() -> PreTrainedTokenizerBase:
    """Answer tags that are special tokens, as in R1's kind of tokenizer."""
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"eos_token": "<eos>", "pad_token": "<pad>"})
    tokenizer.add_tokens([AddedToken(tag, special=True) for tag in ("<answer>", "</answer>", "<|end|>")], special_tokens=True)
    return tokenizer


@pytest.mark.parametrize(
    ("keep", "text"),
    [
        ("content", "<answer>18 .</answer> \n"),
        ("all", "<answer>18 .</answer><|end|><eos> \n<pad>"),
        ("none", "18 . \n"),
    ],
)
def test_the_text_of_a_response_keeps_the_special_tokens_asked_for(keep: SpecialTokens, text: str) -> None:
    tokenizer = tagged()
    ids = tokenizer.encode("<answer>18 .</answer><|end|><eos> \n<pad>", add_special_tokens=False)
    assert ResponseText(tokenizer, keep, [tokenizer.convert_tokens_to_ids("<|end|>")])(ids) == text


def test_a_special_token_that_stops_is_no_text() -> None:
    tokenizer = tagged()
    end, word = tokenizer.convert_tokens_to_ids("<|end|>"), tokenizer.encode(".", add_special_tokens=False)[0]
    ids = tokenizer.encode("18 .<|end|>", add_special_tokens=False)
    assert ResponseText(tokenizer, "content", stop_ids=[end, word])(ids) == "18 ."
    assert ResponseText(tokenizer, "all", stop_ids=[end, word])(ids) == "18 .<|end|>"


def test_a_stop_string_that_is_a_special_token_is_found() -> None:
    tokenizer = tagged()
    detector = StopStringDetector(ResponseText(tokenizer, "content"), ["</answer>"])
    ids = tokenizer.encode("<answer>18</answer>", add_special_tokens=False)
    assert [detector.feed(number) for number in ids] == [False] * (len(ids) - 1) + [True]
