"""Tasks as text: the answers are right, a key gives the same examples again, and a broken file says where it is."""

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt.config import BadInput
from jaxgpt.tasks.prompts import MADE, WORDS, ask


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(["addition", "subtraction", "multiplication"]), st.integers(1, 18), st.integers(0, 2**32 - 1))
def test_sums_differences_and_products_are_right_and_have_the_digits_that_are_asked(family, digits, key):
    for example in ask(f"{family}-{digits}", 5, key=key).examples:
        assert eval(example.prompt.removesuffix("=")) == int(example.answer)
        assert example.prompt.endswith("=")
        for number in example.prompt[:-1].translate(str.maketrans("+-*", "   ")).split():
            assert len(number) == digits


def test_reversals_and_scrambled_words_have_the_letters_of_their_answers():
    for example in ask("reversal-7", 20).examples:
        word = example.prompt.removeprefix("reverse ").removesuffix(": ")
        assert (word[::-1], len(word)) == (example.answer, 7)
    for example in ask("unscramble-6", 20).examples:
        shown = example.prompt.removeprefix("unscramble ").removesuffix(": ")
        assert sorted(shown) == sorted(example.answer)
        assert shown != example.answer in WORDS


def test_no_two_words_have_the_same_letters_and_every_size_has_some():
    assert max(Counter("".join(sorted(word)) for word in WORDS).values()) == 1
    assert set(map(len, WORDS)) == {4, 5, 6, 7, 8}
    for length in (4, 8):
        assert ask(f"unscramble-{length}", 10).examples


@pytest.mark.parametrize("length", [4, 5, 8])
def test_a_word_to_unscramble_is_asked_once_and_never_after_it_was_shown(length):
    words = [word for word in WORDS if len(word) == length]
    asked = ask(f"unscramble-{length}", shots=3)
    shown = [line.split(": ")[1] for line in asked.examples[0].prompt.splitlines()[:3]]
    assert sorted([*shown, *(each.answer for each in asked.examples)]) == sorted(words)
    assert asked.commonest == 0


def test_a_key_gives_the_same_examples_again_and_another_key_others():
    assert ask("addition-4", key=3) == ask("addition-4", key=3)
    assert len({ask("addition-4", key=key).definition for key in range(4)}) == 4
    assert len({each.prompt for each in ask("addition-4").examples}) == MADE


def test_a_small_task_is_asked_once_each():
    asked = ask("addition-1", 500)
    assert sorted(each.prompt for each in asked.examples) == sorted(f"{a}+{b}=" for a in range(10) for b in range(10))
    assert asked.commonest == 0.1  # ten sums are 9
    assert asked.chance == 0


def test_solved_examples_stand_before_each_prompt_and_are_not_asked():
    plain, shown = ask("addition-2", 12), ask("addition-2", 10, shots=2)
    first = "".join(f"{each.prompt}{each.answer}\n" for each in plain.examples[:2])
    assert [each.prompt for each in shown.examples] == [first + each.prompt for each in plain.examples[2:]]
    assert (plain.name, shown.name, ask("addition-2", 10, shots=1).name) == (
        "addition-2", "addition-2, 2 shots", "addition-2, 1 shot",
    )  # fmt: skip
    assert len({plain.definition, shown.definition}) == 2


def jsonl(path, *entries):
    path.write_text("".join(entry if isinstance(entry, str) else json.dumps(entry) + "\n" for entry in entries))
    return str(path)


def test_a_file_gives_its_examples_in_order_and_chance_is_the_mean_of_one_over_choices(tmp_path):
    made = jsonl(tmp_path / "a.jsonl", {"prompt": "1", "answer": "b", "id": 7}, "\n", {"prompt": "2", "answer": "b"})
    asked = ask(made)
    assert [(each.prompt, each.answer, each.choices) for each in asked.examples] == [("1", "b", ()), ("2", "b", ())]
    assert (asked.name, asked.has_choices, asked.chance, asked.commonest) == ("a", False, 0, 1)
    assert [each.prompt for each in ask(made, 1).examples] == ["1"]
    chosen = ask(jsonl(tmp_path / "b.jsonl", {"prompt": "", "choices": ["x", "y"], "right": 1},
                       {"prompt": "q", "choices": ["x", "y", "z", "w"], "right": 0}))  # fmt: skip
    assert [each.answer for each in chosen.examples] == ["y", "x"]
    assert (chosen.has_choices, chosen.chance, chosen.commonest) == (True, 0.375, 0)


GOOD = {"prompt": "p", "answer": "a"}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"prompt": "p", "answ', "line 2, is not JSON: Unterminated string"),
        ("[1]\n", "line 2, must be a JSON object"),
        ({"prompt": "p", "answr": "a"}, "line 2, lacks answer; it has prompt, answr"),
        ({"answer": "a"}, "line 2, lacks prompt; it has answer"),
        ({"prompt": 3, "answer": "a"}, "line 2: prompt=3 is not allowed; it must be a text"),
        ({"prompt": "p", "answer": " "}, "line 2: answer is empty"),
        ({"prompt": "p", "answer": "a\nb"}, "line 2: answer holds a line break"),
        ({"prompt": "\ud800", "answer": "a"}, "line 2: prompt holds half of a surrogate pair"),
        ({"prompt": "p", "choices": "ab", "right": 0}, 'line 2: choices="ab" is not allowed; it must be a list'),
        ({"prompt": "p", "choices": ["a"], "right": 0}, "it must be a list of at least 2 texts"),
        ({"prompt": "p", "choices": ["a", 2], "right": 0}, "line 2: choices[1]=2 is not allowed"),
        ({"prompt": "p", "choices": ["a", "a"], "right": 0}, "line 2: choices holds 'a' twice"),
        (
            {"prompt": "p", "choices": ["a", "b"], "right": 2},
            "line 2: right=2 is not allowed; it must be a number from",
        ),
        ({"prompt": "p", "choices": ["a", "b"]}, "line 2: right=absent is not allowed"),
        ({"prompt": "p", "choices": ["a", "b"], "right": 0}, "line 2: choices must stand in all lines or in none"),
    ],
    ids=str,
)
def test_a_broken_line_is_named_with_its_field(tmp_path, line, says):
    path = jsonl(tmp_path / "t.jsonl", GOOD, line)
    with pytest.raises(BadInput) as refused:
        ask(path)
    assert str(refused.value).startswith(f"task={path}, line 2")
    assert says in str(refused.value)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        (("additon-3",), "task=additon-3 is not a task; did you mean addition-3? there are addition-K, "),
        (("unscrambel",), "did you mean unscramble-5?"),
        (("addition-19",), "task=addition-19 is not allowed; the size of addition must be from 1 to 18"),
        (("chess",), "task=chess is not a task; there are addition-K"),
        (("none.jsonl",), "task=none.jsonl cannot be read: No such file or directory"),
        (("addition-1", 0), "count=0 is not allowed"),
        (("addition-1", 5, -1), "shots=-1 is not allowed"),
        (("addition-1", 5, 100), "shots=100 leaves none of the 100 examples of addition-1 to be asked"),
        (("addition-1", 5, 0, -1), "key=-1 is not allowed"),
    ],
    ids=str,
)
def test_what_is_no_task_is_refused(how, says):
    with pytest.raises(BadInput) as refused:
        ask(*how)
    assert says in str(refused.value)


def test_an_empty_file_is_refused(tmp_path):
    with pytest.raises(BadInput, match="holds no examples"):
        ask(jsonl(tmp_path / "t.jsonl", "\n"))
