"""Hugging Face tokenizers: loading one for a model, and creating the demo's character tokenizer."""

import string
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from erollout.configuration.hub import fetch_line
from erollout.errors import UserError, foreign_code

CHARACTERS = "\n " + string.digits + string.ascii_lowercase + "+-*/=#().,:;?!<>'\"%^_[]"
"""Characters of the demo's tokenizer; with three special tokens there are 64 tokens."""
PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"


def load_tokenizer(path: str | Path, vocab_size: int) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a local directory. `vocab_size`: the model's.

    Raises UserError for a directory without a readable tokenizer and for a vocabulary that exceeds the model's.
    """
    if not Path(path).is_dir():
        how = fetch_line("model.tokenizer", str(path)) or "set model.tokenizer to one with tokenizer.json"
        raise UserError(f"tokenizer {path} is not a directory; {how}")
    if not any(
        (Path(path) / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    ):
        raise UserError(f"tokenizer directory {path} has no tokenizer.json; set model.tokenizer to one that has")
    # the tokenizers library raises bare Exception for a damaged file
    with foreign_code(lambda error: UserError(f"can't load the tokenizer in {path}: {' '.join(str(error).split())[:300]}")):
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    needed = max(tokenizer.get_vocab().values(), default=-1) + 1
    if needed > vocab_size:
        raise UserError(
            f"tokenizer {path} has {needed} tokens but the model's vocab_size is {vocab_size}; "
            "use the model's own tokenizer or a larger vocab_size"
        )
    return tokenizer


def save_character_tokenizer(directory: str | Path) -> None:
    """Write a tokenizer with one token for each of CHARACTERS, loadable by AutoTokenizer.

    Decoding returns exactly the encoded text; an unknown character is an error and never dropped.
    """
    vocabulary = {token: index for index, token in enumerate([PAD, BOS, EOS, *CHARACTERS])}
    tokenizer = Tokenizer(WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS, clean_up_tokenization_spaces=False
    )
    fast.save_pretrained(str(directory))
