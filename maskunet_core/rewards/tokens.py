"""Token ids as the rewards were trained on them, from vocabularies on disk: the one shipped here and the host's."""

import html
import logging
import unicodedata
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

BERT_LENGTH, CLIP_LENGTH = 35, 77
_BERT_VOCABULARY = Path(__file__).with_name("bert-base-uncased")


@cache
def _bert_tokenizer():
    from transformers import BertTokenizer

    tokenizer = BertTokenizer.from_pretrained(_BERT_VOCABULARY)
    # BLIP's own marks: ids 30522 and 30523. ImageReward never inserts them.
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_tokens(["[ENC]"], special_tokens=True)
    return tokenizer


@cache
def _clip_tokenizer():
    from transformers import CLIPTokenizer

    # Found, not imported: nothing else of the host is needed here.
    text_encoder = find_spec("comfy.sd1_clip").origin
    return CLIPTokenizer.from_pretrained(Path(text_encoder).with_name("sd1_tokenizer"))


@cache
def _plain_characters() -> dict[int, str]:
    """Curly quotes, ligatures and full-width characters, and what `ftfy` makes of them."""
    compatible = [0x3000, *range(0xFB00, 0xFB07), *range(0xFF01, 0xFFF0)]
    table = {code: unicodedata.normalize("NFKC", chr(code)) for code in compatible}
    table |= dict.fromkeys([0x02BC, *range(0x2018, 0x201C)], "'")
    return table | dict.fromkeys(range(0x201C, 0x2020), '"')


def _repair(text: str) -> str:
    """Text as OpenAI's tokeniser mends it, by the package `ftfy`. Without that package, which the host does not bring,
    only wrongly decoded text ("cafÃ©") stays as it is."""
    try:
        import ftfy
    except ImportError:
        return unicodedata.normalize("NFC", text.translate(_plain_characters()))
    return ftfy.fix_text(text)


def _warn_if_cut(tokenizer, text: str, ids: list[int], length: int) -> None:
    """A line in the log where a prompt is longer than a reward reads. ids: of the text as it was cut to `length`."""
    if len(ids) < length:
        return
    count = len(tokenizer.tokenize(text))
    if count > length - 2:
        last = tokenizer.decode(ids[-6:], skip_special_tokens=True).strip()
        logging.warning(
            f"MaskUNet: this reward reads the first {length - 2} of the prompt's {count} tokens, to '... {last}'. What "
            "comes after that does not count."
        )


def bert_tokens(prompt: str) -> tuple[Tensor, Tensor]:
    """ImageReward's ids and attention mask, `[35]` each: [CLS] ... [SEP], cut and padded with 0."""
    tokenizer = _bert_tokenizer()
    found = tokenizer(prompt, padding="max_length", truncation=True, max_length=BERT_LENGTH)
    if all(found["attention_mask"]):
        _warn_if_cut(tokenizer, prompt, found["input_ids"], BERT_LENGTH)
    return torch.tensor(found["input_ids"]), torch.tensor(found["attention_mask"])


def clip_tokens(prompt: str) -> Tensor:
    """CLIP's ids `[77]`: start ... end, padded with 0; a prompt that is too long is cut and keeps its end token."""
    text = " ".join(html.unescape(html.unescape(_repair(prompt))).split())
    tokenizer = _clip_tokenizer()
    ids = tokenizer(text, truncation=True, max_length=CLIP_LENGTH)["input_ids"]
    _warn_if_cut(tokenizer, text, ids, CLIP_LENGTH)
    return torch.tensor(ids + [0] * (CLIP_LENGTH - len(ids)))
