"""Sets of words by grammar, on sentences as spaCy's parser annotates them. spaCy itself is not needed."""

import sys
from dataclasses import dataclass, field
from types import ModuleType

import pytest

from maskunet_core.attention import grammar, parsers
from maskunet_core.attention.words import Word

# Each word with its part of speech, its relation, and the place of its head, by en_core_web_sm 3.8.0.
APPLE = "a/DET/det/2 red/ADJ/amod/2 apple/NOUN/ROOT/2 and/CCONJ/cc/2 a/DET/det/6 blue/ADJ/amod/6 car/NOUN/conj/2"
TABLE = "bowl/NOUN/ROOT/0 on/ADP/prep/0 a/DET/det/6 red/ADJ/amod/6 and/CCONJ/cc/3 blue/ADJ/conj/3 table/NOUN/pobj/1"
BENCH = "the/DET/det/1 car/NOUN/nsubj/2 is/AUX/ROOT/2 red/ADJ/acomp/2 and/CCONJ/cc/2 the/DET/det/6 bench/NOUN/nsubj/7"
BENCH += " is/AUX/conj/2 blue/ADJ/acomp/7"
DOG = "a/DET/det/1 dog/NOUN/ROOT/1 that/PRON/nsubj/3 is/AUX/relcl/1 red/ADJ/acomp/3"
DARK = "a/DET/det/4 very/ADV/advmod/2 dark/ADJ/amod/4 red/ADJ/amod/4 car/NOUN/ROOT/4"
FLAG = "a/DET/det/6 red/ADJ/amod/6 ,/PUNCT/punct/1 white/ADJ/conj/1 and/CCONJ/cc/3 blue/ADJ/conj/3 flag/NOUN/ROOT/6"
FRUIT = "a/DET/det/5 red/ADJ/amod/2 apple/NOUN/nmod/5 and/CCONJ/cc/2 yellow/ADJ/conj/2 bananas/NOUN/ROOT/5"
HYDRANT = "a/DET/det/3 blue/ADJ/amod/2 fire/NOUN/compound/3 hydrant/NOUN/ROOT/3"
WHICH = "an/DET/det/1 umbrella/NOUN/ROOT/1 which/PRON/nsubj/3 is/AUX/relcl/1 green/ADJ/acomp/3 ,/PUNCT/punct/1"
WHICH += " and/CCONJ/cc/1 a/DET/det/8 hat/NOUN/conj/1"
BAT = "a/DET/det/2 baseball/NOUN/compound/2 bat/NOUN/ROOT/2"
SENTENCES = {
    APPLE: "red > apple; blue > car",
    TABLE: "bowl; red, blue > table",
    BENCH: "red > car; blue > bench",
    DOG: "red > dog",
    DARK: "very, dark, red > car",
    FLAG: "red, white, blue > flag",
    # A slip of the parser's, which the original shares.
    FRUIT: "red, apple, yellow > bananas",
    HYDRANT: "blue, fire > hydrant",
    WHICH: "green > umbrella; hat",
    BAT: "baseball > bat",
    "a/DET/ROOT/0": "",
}


@dataclass
class Token:
    """What the rules ask of spaCy's tokens."""

    i: int
    pos_: str
    dep_: str
    head: "Token | None" = None
    children: list["Token"] = field(default_factory=list)


def parsed(annotated):
    rows = [word.split("/") for word in annotated.split()]
    tokens = [Token(n, pos, dep) for n, (_, pos, dep, _) in enumerate(rows)]
    for token, (*_, head) in zip(tokens, rows):
        token.head = tokens[int(head)]
        if token.head is not token:
            token.head.children.append(token)
    return [text for text, *_ in rows], tokens


@pytest.fixture
def installed(monkeypatch):
    """A module in spaCy's place, whose one model knows SENTENCES."""
    annotations = {" ".join(texts): tokens for texts, tokens in map(parsed, SENTENCES)}

    class Pipeline:
        vocab = "vocabulary"

        def __call__(self, words):
            return annotations[words]

    spacy, tokens = ModuleType("spacy"), ModuleType("spacy.tokens")
    spacy.load = {"en_small": Pipeline()}.__getitem__
    tokens.Doc = lambda vocab, words: " ".join(words)
    monkeypatch.setitem(sys.modules, "spacy", spacy)
    monkeypatch.setitem(sys.modules, "spacy.tokens", tokens)
    grammar._pipeline.cache_clear()
    yield
    grammar._pipeline.cache_clear()


@pytest.mark.parametrize(("annotated", "expected"), SENTENCES.items(), ids=SENTENCES.values())
def test_a_parser_finds_what_describes_each_noun(installed, annotated, expected):
    texts, _ = parsed(annotated)
    words = [Word(text, (place,)) for place, text in enumerate(texts, 1)]
    found = grammar.sets_by_grammar(words, "en_small")
    assert "; ".join(each.text for each in found) == expected


def test_parsers_are_the_models_that_are_installed(monkeypatch):
    class Entry:
        name = "en_small"

    monkeypatch.setattr(parsers, "entry_points", lambda group: [Entry] if group == "spacy_models" else [])
    for spec, expected in ((None, ()), (object(), ("en_small",))):
        monkeypatch.setattr("importlib.util.find_spec", lambda name, spec=spec: spec)
        assert parsers.parsers.__wrapped__() == expected
