"""The prompts of RULER's synthetic tasks (arXiv 2404.06654; wording and parameters as published in NVIDIA/RULER).

What differs, because nothing is downloaded: the essays are the book that ships with the package, or a text of the user's;
words are that book's. Each sample is drawn by itself, from its seed.
"""

from __future__ import annotations

import json
import math
import random
import string
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .haystack import BREAK
from .score import match_all, match_any
from .words import draw_letters, draw_pair, draw_words

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
SHORT = 4096
"""Below so many tokens, common words are repeated less often, and the example is shorter."""
_DEPTHS = [round(100 * i / 39) for i in range(40)]


@dataclass(frozen=True)
class Sample:
    """One question.

    Attributes:
        user: what the user says: the long text with the question.
        lead: how the answer begins; the model is given it.
        answers: strings that have to be in what it goes on with.
        examples: an earlier question with its answer.
    """

    user: str
    lead: str
    answers: tuple[str, ...]
    examples: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Question:
    """A question of a data set in SQuAD's form, with the places of its document and of others of the same article."""

    text: str
    answers: tuple[str, ...]
    document: int
    related: tuple[int, ...]


@dataclass(frozen=True)
class Source:
    """What tasks take their texts from.

    Attributes:
        hay: the words of the essays, in order, from where this sample begins.
        documents, questions: of a data set in SQuAD's form.
        repeat: go on from the beginning where there is no more.
        length: tokens of the prompt and the answer together.
        index: of the sample.
    """

    hay: Sequence[str]
    documents: Sequence[str]
    questions: Sequence[Question]
    repeat: bool
    length: int
    index: int


@dataclass(frozen=True)
class Task:
    """A task of RULER's.

    Attributes:
        new_tokens: room for the answer.
        least: the smallest size that makes sense.
        make: (size, draw, source) to a sample; a size is words, lines or documents.
        most: the largest size that a source has, None: any.
        score: (answer, expected) to 0 to 1.
    """

    name: str
    new_tokens: int
    least: int
    make: Callable[[int, random.Random, Source], Sample]
    most: Callable[[Source], int | None]
    score: Callable[[str, Sequence[str]], float] = match_all


def _any(source: Source) -> int | None:
    return None


def _words_of(source: Source) -> int | None:
    return None if source.repeat else len(source.hay)


def _documents_of(source: Source) -> int | None:
    return None if source.repeat else len(source.documents)


# -- a needle in a haystack ---------------------------------------------------------------------------------------------


def _drawn(what: str, draw: random.Random) -> str:
    if what == "numbers":
        return str(draw.randint(10**6, 10**7 - 1))
    return draw_pair(draw) if what == "words" else str(uuid.UUID(int=draw.getrandbits(128), version=4))


def _niah(hay: str, key: str, value: str, keys: int = 1, values: int = 1, asked: int = 1) -> Callable[..., Sample]:
    def needle(name: str, number: str) -> str:
        return f"One of the special magic {value} for {name} is: {number}."

    def make(size: int, draw: random.Random, source: Source) -> Sample:
        names = [_drawn(key, draw) for _ in range(max(keys, asked))]
        held = {name: [_drawn(value, draw) for _ in range(values)] for name in names}
        needles = [needle(name, number) for name, numbers in held.items() for number in numbers]
        draw.shuffle(needles)
        if hay == "essay":
            context = _between_sentences(size, needles, draw, source)
        else:
            lines = [NOISE] * size if hay == "noise" else []
            if hay == "needle":
                lines = [needle(_drawn(key, draw), _drawn(value, draw)) for _ in range(size)]
            for place, one in zip(
                sorted(draw.sample(range(size + 1), len(needles)), reverse=True), needles, strict=True
            ):
                lines.insert(place, one)
            context = "\n".join(lines)
        queries = draw.sample(names, asked)
        query = ", ".join(queries[:-1]) + f", and {queries[-1]}" if asked > 1 else queries[0]
        single = asked * values == 1
        what = value[:-1] if single else value
        user = (
            f"{'A' if single else 'Some'} special magic {what} {'is' if single else 'are'} hidden within the following text. Make "
            f"sure to memorize it. I will quiz you about the {what} afterwards.\n{context}\n"
            f"What {'is' if single else 'are all'} the special magic {what} for {query} mentioned in the provided text?"
        )
        lead = f" The special magic {what} for {query} mentioned in the provided text {'is' if single else 'are'}"
        return Sample(user, lead, tuple(number for name in queries for number in held[name]))

    return make


def _between_sentences(size: int, needles: Sequence[str], draw: random.Random, source: Source) -> str:
    """`size` words of the essays, the needles at some of 40 depths between their sentences."""
    rounds = -(-size // len(source.hay))
    text = " ".join((list(source.hay) * rounds)[:size] if rounds > 1 else source.hay[:size])
    ends = [0, *(found.end() for found in BREAK.finditer(text)), len(text)]
    places = sorted(int((len(ends) - 1) * depth / 100) for depth in draw.sample(_DEPTHS, len(needles)))
    parts, at = [], 0
    for place, one in zip(places, needles, strict=True):
        parts += [text[at : ends[place]].rstrip(), one]
        at = ends[place]
    return " ".join(part for part in (*parts, text[at:]) if part)


# -- variable tracking --------------------------------------------------------------------------------------------------


def _chain(size: int, letters: int, hops: int, value: str, draw: random.Random) -> Sample:
    names = draw_letters(letters, string.ascii_uppercase, hops + 1, draw)
    chain = [f"VAR {names[0]} = {value}"]
    chain += [f"VAR {names[i + 1]} = VAR {names[i]} " for i in range(hops)]
    lines = [NOISE] * size
    for i, place in enumerate(sorted(draw.sample(range(size), len(chain)))):
        lines.insert(place + i, chain[i])
    context = "\n".join(lines).replace(". \n", ".\n")
    user = (
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
        f"{context}\nQuestion: Find all variables that are assigned the value {value} in the text above."
    )
    lead = (
        f" Answer: According to the chain(s) of variable assignment in the text above, {hops + 1} variables are assigned the "
        f"value {value}, they are: "
    )
    return Sample(user, lead, tuple(names))


def _tracking(size: int, draw: random.Random, source: Source) -> Sample:
    """One chain of four hops, after a short example of the same."""
    example = _chain(5, 3, 4, str(draw.randint(10_000, 99_998)), draw)
    real = _chain(size, 5, 4, str(draw.randint(10_000, 99_998)), draw)
    shown = f"{example.user}{example.lead} {' '.join(example.answers)}\n"
    return Sample(f"{shown}\n{real.user}", real.lead, real.answers)


# -- words --------------------------------------------------------------------------------------------------------------


def _common(words: Sequence[str], often: int, seldom: int, draw: random.Random) -> Sample:
    """A list of all words, the first ten `often` times."""
    listed = [*words[:10]] * often + [*words[10:]] * seldom
    draw.shuffle(listed)
    context = " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1))
    user = (
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that appear "
        f"most often.\n{context}\nQuestion: What are the 10 most common words in the above list?"
    )
    lead = " Answer: The top 10 words that appear most often in the list are:"
    return Sample(user, lead, tuple(words[:10]))


def _common_words(size: int, draw: random.Random, source: Source) -> Sample:
    """`size` different words, after a short example of the same."""
    short = source.length < SHORT
    example = _common(draw_words(20 if short else 40, draw), *((3, 1) if short else (10, 3)), draw)
    real = _common(draw_words(size, draw), *((6, 1) if short else (30, 3)), draw)
    said = " ".join(f"{i}. {word}" for i, word in enumerate(example.answers, 1))
    return Sample(real.user, real.lead, real.answers, ((example.user, f"{example.lead} {said}"),))


def _frequent_words(size: int, draw: random.Random, source: Source) -> Sample:
    """`size` words whose frequency falls with the square of their rank; the first is noise, the next three are asked for.
    Zeta distribution with alpha 2."""
    vocabulary = draw_letters(6, string.ascii_lowercase, max(5, (source.length - 50) // 50), draw)
    vocabulary[0] = "..."
    counts = [int(size / (k * k) / (math.pi**2 / 6)) for k in range(1, len(vocabulary) + 1)]
    coded = [word for word, n in zip(vocabulary, counts, strict=True) for _ in range(n)]
    draw.shuffle(coded)
    user = (
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
        f"coded words. {' '.join(coded)}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the "
        "three most frequently appeared words in the above coded text?"
    )
    lead = " Answer: According to the coded text above, the three most frequently appeared words are:"
    return Sample(user, lead, tuple(vocabulary[1:4]))


# -- questions about documents ---------------------------------------------------------------------------------------------


def read_squad(path: str | Path) -> tuple[list[str], list[Question]]:
    """The documents and the questions that have answers, of a JSON file in SQuAD's form (1.1 or 2.0).

    Raises:
        FileNotFoundError: no such file.
        ValueError: another form, or no question with an answer.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"qa: expected a file, got {str(path)!r}")
    try:
        articles = [article["paragraphs"] for article in json.loads(path.read_text(encoding="utf-8"))["data"]]
        documents = sorted({part["context"] for parts in articles for part in parts})
        at = {document: i for i, document in enumerate(documents)}
        questions = []
        for parts in articles:
            own = dict.fromkeys(at[part["context"]] for part in parts)
            for part in parts:
                here = at[part["context"]]
                for one in part["qas"]:
                    answers = tuple(answer["text"] for answer in one["answers"])
                    if answers and not one.get("is_impossible", False):
                        related = tuple(i for i in own if i != here)
                        questions.append(Question(one["question"], answers, here, related))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"qa: expected JSON in SQuAD's form, got {str(path)!r} with {error!r}") from None
    if not questions:
        raise ValueError(f"qa: expected questions with answers, got {str(path)!r} with none")
    return documents, questions


def _questions(size: int, draw: random.Random, source: Source) -> Sample:
    """`size` documents: the question's, others of its article, then any."""
    if source.index >= len(source.questions):
        raise ValueError(f"samples: expected at most {len(source.questions)}, the questions of the file, got more")
    asked = source.questions[source.index]
    places = [asked.document, *draw.sample(asked.related, min(size - 1, len(asked.related)))]
    taken = set(places)
    others = [i for i in range(len(source.documents)) if i not in taken]
    places += draw.sample(others, min(size - len(places), len(others)))
    rounds = -(-size // len(places))
    documents = [source.documents[i] for i in (places * rounds)[:size]]
    draw.shuffle(documents)
    context = "\n\n".join(f"Document {i}:\n{document}" for i, document in enumerate(documents, 1))
    said = (
        "Answer the question based on the given documents. Only give me the answer and do not output any other words."
    )
    user = f"{said}\n\nThe following are given documents.\n\n{context}\n\n{said}\n\nQuestion: {asked.text}"
    return Sample(user, " Answer:", asked.answers)


TASKS = {
    task.name: task
    for task in (
        Task("niah_single_1", 128, 1, _niah("noise", "words", "numbers"), _any),
        Task("niah_single_2", 128, 1, _niah("essay", "words", "numbers"), _words_of),
        Task("niah_single_3", 128, 1, _niah("essay", "words", "uuids"), _words_of),
        Task("niah_multikey_1", 128, 1, _niah("essay", "words", "numbers", keys=4), _words_of),
        Task("niah_multikey_2", 128, 1, _niah("needle", "words", "numbers"), _any),
        Task("niah_multikey_3", 128, 1, _niah("needle", "uuids", "uuids"), _any),
        Task("niah_multivalue", 128, 1, _niah("essay", "words", "numbers", values=4), _words_of),
        Task("niah_multiquery", 128, 1, _niah("essay", "words", "numbers", asked=4), _words_of),
        Task("vt", 30, 5, _tracking, _any),
        Task("cwe", 120, 11, _common_words, _any),
        Task("fwe", 50, 53, _frequent_words, _any),
        Task("qa", 32, 1, _questions, _documents_of, match_any),
    )
}
