"""Sets of words by grammar, with a parser of spaCy's where somebody has installed one. The extension never needs it."""

from collections.abc import Collection, Iterable, Sequence
from functools import cache
from typing import Any

from .words import Word, WordSet, set_of

_NOUNS = ("NOUN", "PROPN")
_VERBS = ("AUX", "VERB")
_DESCRIBES = frozenset({"amod", "nmod", "compound", "npadvmod", "advmod", "acomp"})
_CLAUSE = "relcl"
_FOLLOWED = _DESCRIBES | {"conj", _CLAUSE}
_NO_WORD = "something"
"""What the parser reads for a vector of an embedding: names a place in the sentence, and is no noun."""


def sets_by_grammar(words: Sequence[Word], parser: str) -> tuple[WordSet, ...]:
    """A set for each noun that describes no other, with what describes it. parser: one of `parsers`."""
    sentence = _parsed([word.text or _NO_WORD for word in words], parser)
    return tuple(set_of([words[n] for n in group]) for group in groups_of(sentence))


def _parsed(texts: list[str], parser: str) -> Any:
    """spaCy's Doc of just these words."""
    from spacy.tokens import Doc

    pipeline = _pipeline(parser)
    return pipeline(Doc(pipeline.vocab, words=texts))


@cache
def _pipeline(parser: str) -> Any:
    import spacy

    return spacy.load(parser)


def groups_of(sentence: Iterable[Any]) -> list[list[int]]:
    """Places of the words of each set, the noun last. sentence: tokens of spaCy's.

    SynGen's rules (Rassin et al. 2023), but that a relative clause is looked for at every noun, and that the noun of
    "the apple is red" is the apple.
    """
    groups = []
    for token in sentence:
        if token.pos_ in _NOUNS and token.dep_ not in _DESCRIBES:
            found = _describing(token, _DESCRIBES | {_CLAUSE})
            if token.dep_ == "nsubj" and token.head.pos_ == "AUX":
                found += _describing(token.head, _DESCRIBES)
            groups.append([*sorted(found), token.i])
    return groups


def _describing(token: Any, relations: Collection[str], skipped: Collection[str] = ()) -> list[int]:
    """Places of what hangs on a token by one of the relations, and of what describes that. skipped: kinds of words."""
    found: list[int] = []
    for child in token.children:
        if child.dep_ in relations:
            # Of "a dog that is red" only "red" describes.
            leaves_out = _VERBS if child.dep_ == _CLAUSE else skipped
            found += [child.i] * (child.pos_ not in leaves_out) + _describing(child, _FOLLOWED, leaves_out)
    return found
