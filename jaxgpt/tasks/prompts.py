"""Questions with exact answers, as text: for models that are asked, whatever they were trained on.

    addition-3      "123+456="  579      K-digit numbers; also subtraction-K and multiplication-K
    reversal-5      "reverse abcde: "  edcba
    unscramble-5    "unscramble leppa: "  apple
    mine.jsonl      one JSON object in each line: {"prompt", "answer"} or {"prompt", "choices", "right"}

What a model says ends with the line, or with the document. Of a task's examples the first few (`shots`) may stand
solved before every prompt, one in a line; these are not asked. The same name, count, shots and key give the same
examples everywhere. Of words to unscramble each comes once, so that none that is asked stands solved before another;
there are as many examples at most as common words of K letters.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt.config import BadInput

MADE = 200  # examples of a task that is made, unless it is said how many
VERSION = 3  # raised when the same words come to mean other examples
LETTERS = "abcdefghijklmnopqrstuvwxyz"
# No two are anagrams of one another, and as far as we know each is the only common English word of its letters.
COMMON = (
    "book duck fish frog jump king milk park queen quick chair dance glass house juice knife light money "
    "month mouth music onion piano plant pizza river robot round sheep shirt sugar tiger train truck uncle water "
    "watch white woman world young zebra animal banana bottle bridge butter candle carpet cheese church coffee "
    "cousin doctor dollar family guitar hammer island jacket kitten ladder market monkey mother number office orange "
    "pencil pepper people planet pocket potato purple rabbit rocket school shadow spider summer turtle valley violin "
    "window winter yellow blanket brother cabbage captain chicken diamond dolphin factory feather freedom giraffe "
    "holiday journey library morning mustard notebook octopus pelican penguin picture pumpkin rainbow science soldier "
    "station thunder tractor traffic village volcano weather website airplane birthday building computer dinosaur "
    "elephant football hospital keyboard language medicine mountain mushroom necklace painting question sandwich "
    "scissors shoulder strength sunshine umbrella vacation"
)
WORDS = COMMON.split()


@dataclass(frozen=True)
class Example:
    """A prompt and its right answer; of a multiple choice also the choices, one of which it is."""

    prompt: str
    answer: str
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Asked:
    """A task as it is put to a model. `examples` have their solved ones in front already; `shots` counts these.

    chance: what guessing scores: for choices the mean of 1 / choices, else 0. commonest: what giving the commonest
    answer always would score, of these examples; 0 where none comes twice. definition: 12 hex digits of all of it.
    """

    name: str
    examples: tuple[Example, ...]
    shots: int
    chance: float
    commonest: float
    definition: str

    @property
    def has_choices(self) -> bool:
        """Whether the answer is one of given choices; else it is made."""
        return bool(self.examples[0].choices)


def ask(task: str, count: int | None = None, shots: int = 0, key: int = 0) -> Asked:
    """A task by its name, or a .jsonl file: at most `count` of its examples, behind `shots` solved ones.

    A made task draws different examples until it has enough (null: MADE) or there are no more; a file gives them in its
    order (null: all).
    Raises BadInput for a name that is none, and for a file that cannot be read, by its line.
    """
    if count is not None and count < 1:
        raise BadInput(f"count={count} is not allowed; at least one example must be asked")
    if shots < 0:
        raise BadInput(f"shots={shots} is not allowed; it must be 0 or more")
    if not 0 <= key < 2**32:
        raise BadInput(f"key={key} is not allowed; it must be from 0 to 2^32 - 1")
    from_file = task.endswith(".jsonl")
    name = Path(task).stem if from_file else task
    found = _read(Path(task)) if from_file else _made(task, (count or MADE) + shots, key)
    found = found[: None if count is None else count + shots]
    if len(found) <= shots:
        raise BadInput(f"shots={shots} leaves none of the {len(found)} examples of {task} to be asked")
    solved = "".join(f"{each.prompt}{each.answer}\n" for each in found[:shots])
    examples = tuple(Example(solved + each.prompt, each.answer, each.choices) for each in found[shots:])
    label = name if not shots else f"{name}, {shots} shot{'s' * (shots > 1)}"
    (_, times), *_ = Counter(each.answer for each in examples).most_common(1)
    choices = [len(each.choices) for each in examples]
    content = json.dumps([VERSION, label, [(each.prompt, each.answer, each.choices) for each in examples]])
    return Asked(
        label,
        examples,
        shots,
        chance=float(np.mean([1 / n for n in choices])) if choices[0] else 0.0,
        commonest=times / len(examples) if times > 1 else 0.0,
        definition=hashlib.sha256(content.encode()).hexdigest()[:12],
    )


# --- made from a key -----------------------------------------------------------------------------------------------


def _number(rng: np.random.Generator, digits: int) -> int:
    """Uniform over the numbers of so many digits; of one digit 0 is one."""
    return int(rng.integers(10 ** (digits - 1) if digits > 1 else 0, 10**digits))


def _addition(rng: np.random.Generator, digits: int) -> Example:
    a, b = _number(rng, digits), _number(rng, digits)
    return Example(f"{a}+{b}=", str(a + b))


def _subtraction(rng: np.random.Generator, digits: int) -> Example:
    a, b = _number(rng, digits), _number(rng, digits)
    return Example(f"{a}-{b}=", str(a - b))


def _multiplication(rng: np.random.Generator, digits: int) -> Example:
    a, b = _number(rng, digits), _number(rng, digits)
    return Example(f"{a}*{b}=", str(a * b))


def _reversal(rng: np.random.Generator, length: int) -> Example:
    word = "".join(rng.choice(list(LETTERS), length))
    return Example(f"reverse {word}: ", word[::-1])


def _unscramble(rng: np.random.Generator, length: int) -> Example:
    word = str(rng.choice([word for word in WORDS if len(word) == length]))
    shown = word
    while shown == word:
        shown = "".join(rng.permutation(list(word)))
    return Example(f"unscramble {shown}: ", word)


# The family, and the sizes K that it has.
FAMILIES: dict[str, tuple[Callable[[np.random.Generator, int], Example], range]] = {
    "addition": (_addition, range(1, 19)),  # NumPy draws numbers below 2^63
    "subtraction": (_subtraction, range(1, 19)),
    "multiplication": (_multiplication, range(1, 19)),
    "reversal": (_reversal, range(2, 101)),
    "unscramble": (_unscramble, range(4, 9)),
}
ANSWERED_ONCE = {"unscramble"}  # few answers, which solved examples would give away
TRIES = 50  # draws for each example that is wanted: a small task runs out of new ones


def _made(task: str, count: int, key: int) -> list[Example]:
    """Examples that differ in what is asked, or in the answer of the families `ANSWERED_ONCE`; at most `count`."""
    family, _, size = task.rpartition("-")
    if family not in FAMILIES or not re.fullmatch("[0-9]{1,4}", size) or int(size) not in FAMILIES[family][1]:
        raise BadInput(_unknown(task))
    make, _ = FAMILIES[family]
    rng = np.random.default_rng([key, *family.encode(), int(size)])
    found: dict[str, Example] = {}
    for _ in range(TRIES * count):
        example = make(rng, int(size))
        found.setdefault(example.answer if family in ANSWERED_ONCE else example.prompt, example)
        if len(found) == count:
            break
    return list(found.values())


def _unknown(task: str) -> str:
    family, dash, size = task.rpartition("-")
    if family in FAMILIES:
        sizes = FAMILIES[family][1]
        return f"task={task} is not allowed; the size of {family} must be from {sizes[0]} to {sizes[-1]}"
    near = difflib.get_close_matches(family if dash else task, FAMILIES, n=1)
    size = size if dash and size.isdecimal() else "3" if near != ["unscramble"] else "5"
    hint = f"did you mean {near[0]}-{size}? " if near else ""
    return f"task={task} is not a task; {hint}there are {', '.join(f'{name}-K' for name in FAMILIES)}, or a .jsonl file"


# --- from a file ---------------------------------------------------------------------------------------------------


def _read(path: Path) -> list[Example]:
    """The examples of a JSONL file."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise BadInput(f"task={path} cannot be read: {error.strerror}") from None
    found = list(_examples(path, lines))
    if not found:
        raise BadInput(f"task={path} holds no examples")
    return found


def _examples(path: Path, lines: list[bytes]) -> Iterator[Example]:
    kind = None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"task={path}, line {number}"
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise BadInput(f"{where}, is not JSON: {getattr(error, 'msg', 'it is not UTF-8')}") from None
        if not isinstance(entry, dict):
            raise BadInput(f"{where}, must be a JSON object")
        example = _example(entry, where)
        if kind is not None and kind != bool(example.choices):
            raise BadInput(f"{where}: choices must stand in all lines or in none")
        kind = bool(example.choices)
        yield example


def _example(entry: dict[str, Any], where: str) -> Example:
    for name in ("prompt", "choices" if "choices" in entry else "answer"):
        if name not in entry:
            raise BadInput(f"{where}, lacks {name}; it has {', '.join(entry) or 'nothing'}")
    prompt = _text(entry["prompt"], f"{where}: prompt")
    if "choices" not in entry:
        return Example(prompt, _answer(entry["answer"], f"{where}: answer"))
    choices, right = entry["choices"], entry.get("right")
    if not isinstance(choices, list) or len(choices) < 2:
        raise BadInput(f"{where}: choices={json.dumps(choices)} is not allowed; it must be a list of at least 2 texts")
    texts = tuple(_answer(choice, f"{where}: choices[{i}]") for i, choice in enumerate(choices))
    if len(set(texts)) < len(texts):
        raise BadInput(f"{where}: choices holds {next(t for t in texts if texts.count(t) > 1)!r} twice")
    if not isinstance(right, int) or isinstance(right, bool) or not 0 <= right < len(texts):
        said = json.dumps(right) if "right" in entry else "absent"
        raise BadInput(f"{where}: right={said} is not allowed; it must be a number from 0 to {len(texts) - 1}")
    return Example(prompt, texts[right], texts)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise BadInput(f"{where}={json.dumps(value)} is not allowed; it must be a text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadInput(f"{where} holds half of a surrogate pair, which is no character") from None
    return value


def _answer(value: Any, where: str) -> str:
    text = _text(value, where)
    if not text.strip() or "\n" in text or "\0" in text:
        what = "is empty" if not text.strip() else "holds a line break" if "\n" in text else "holds a NUL"
        raise BadInput(f"{where} {what}; it must be one line of text")
    return text
