"""The parser f and the demonstrations."""
import json
import re
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import env
import prompts
from prompts import TASKS, action_start, build_prompt, demonstration, parse_action

CARDS = ["stand", "hit"]
POINTS = env.Points24Env.actions


def parse(text, legal=CARDS):
    return parse_action(text, list(legal), np.random.default_rng(0))


@pytest.mark.parametrize("text", [
    '{"thoughts": "x", "action": "hit"}', '"action": "hit"', '"action":"HIT', "'action': 'hit'", '"action" : hit }', 'action: hit',
    '"Action": " hit "} I am sure.', '{"action": "hit!"}', '"action": “hit”', '"action": "hit", "action": "hit"',
    r'"thoughts": "\"action\": \"stand\"", "action": "hit"', '"thoughts": "the action: stand", "action": "hit"', '"action": "hit me"'])
def test_legal_answers(text):
    assert parse(text) == ("hit", True)


@pytest.mark.parametrize("text", [
    "", "hit", "{}", '"action"', '"action":', '"action": ""', '"action": "jump"', '"action": "hit or stand"', '"action": "white"',
    '"action": "hit", "action": "stand"', 'thoughts: the action: hit is best', '"action": ["hit", "stand"]', '"action": "hits"', '"action": "hit", "action": "jump"'])
def test_illegal_answers_become_a_random_legal_action(text):
    action, was_legal = parse(text)
    assert action in CARDS and not was_legal


@pytest.mark.parametrize("text, expected", [("1", "1"), ("10", "10"), ("(", "("), (" + ", "+"), ("=", "=")])
def test_ten_is_not_one(text, expected):
    assert parse(f'{{"action": "{text}"}}', POINTS) == (expected, True)


@pytest.mark.parametrize("text", ["11", "100", "-1", "3+4", "１", "**", "1.5", "3+", "10=", "8/", "3(", "3+3"])
def test_near_misses_are_illegal(text):
    assert not parse(f'{{"action": "{text}"}}', POINTS)[1]


def test_multi_word_actions_take_the_longest_name():
    legal = ["go to drawer 1", "go to drawer 12", "look"]
    assert parse('"action": "go to drawer 12"', legal) == ("go to drawer 12", True)
    assert parse('"action": "Go to drawer 1."', legal) == ("go to drawer 1", True)


def test_a_demonstration_of_an_action_in_another_alphabet_is_legal(monkeypatch):
    monkeypatch.setitem(prompts.TASKS, "arrows", replace(prompts.TASKS["blackjack"], fields={}, thoughts=lambda info: "höher"))
    text = prompts.demonstration({"env": "arrows"}, "↑")
    assert parse(text, ["↑", "↓"]) == ("↑", True) and "höher" in text


def test_random_replacements_are_uniform_and_seeded():
    rng = np.random.default_rng(0)
    hits = sum(parse_action("?", CARDS, rng)[0] == "hit" for _ in range(2000))
    assert 900 < hits < 1100
    assert parse("?") == parse("?")


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(), st.lists(st.sampled_from(['"action":', '"', "hit", "stand", "{", "}", "\\", "1", " ", "\n", "\x00", "é"])).map("".join)))
def test_any_string_gives_a_legal_action(text):
    action, was_legal = parse(text)
    assert action in CARDS and isinstance(was_legal, bool)
    assert 0 <= action_start(text) <= len(text)


@pytest.mark.parametrize("name", TASKS)
def test_demonstrations_are_json_true_to_the_state_and_parsed_back(name):
    game = gym.make(env.env_id(name))
    for seed in range(20):
        _, info = game.reset(seed=seed)
        action = info["legal_actions"][seed % len(info["legal_actions"])]
        text = demonstration(info, action)
        answer = json.loads(text)
        assert list(answer)[-2:] == ["thoughts", "action"]
        for key, field in TASKS[name].fields.items():
            assert answer[key] == field.truth(info)
        assert parse(text, info["legal_actions"]) == (action, True)
        assert text[action_start(text):].startswith('"action":')


@pytest.mark.parametrize("name", TASKS)
def test_prompts_name_every_legal_action_and_field(name):
    _, info = gym.make(env.env_id(name)).reset(seed=0)
    prompt = build_prompt(info)
    assert ", ".join(info["legal_actions"]) in prompt and all(f'"{field}"' in prompt for field in TASKS[name].fields)
    assert '"thoughts"' in prompt and '"action"' in prompt


def test_a_blank_is_told_and_shown():
    game = env.EZPointsEnv(obs="text")
    _, info = game.reset(seed=0)
    wrong = next(n for n in range(1, 11) if n not in info["numbers"])
    first, second = (str(n) for n in info["numbers"])
    for entry in (first, str(wrong)):
        *_, info = game.step(game.actions.index(entry))
    prompt = build_prompt(info)
    assert f"Formula so far: {first}_\n" in prompt and "leaves a blank _" in prompt
    answer = json.loads(demonstration(info, "+"))
    assert answer["formula"] == f"{first}_" and f" make 12: {env.expert_action(info)}{second}=" in answer["thoughts"]
    game.step(game.actions.index(str(wrong)))
    *_, info = game.step(game.actions.index(str(wrong)))
    assert answer["thoughts"].endswith(f"{second}=, write {env.expert_action(game._info() | {'formula': [first, '_']})}")
    assert json.loads(demonstration(info, "="))["thoughts"].endswith("cannot make 12, write =")


def test_blackjack_thoughts_add_up_the_hand():
    """Each card is named once and in order; every sum is right; what the hand is worth is the game's own total."""
    value, game, sizes, kinds = {"A": 1, "J": 10, "Q": 10, "K": 10}, env.BlackjackEnv(), set(), set()
    for seed in range(150):
        _, info = game.reset(seed=seed)
        while info["player_total"] < 12 + seed % 10:
            *_, info = game.step(game.actions.index("hit"))
        if info["player_total"] > 21:
            continue
        thoughts = json.loads(demonstration(info, "hit"))["thoughts"]
        cards = [value.get(card[:-1]) or int(card[:-1]) for card in info["player"]]
        terms = re.findall(r"(\d*)\+(\d+)=", thoughts)
        assert [int(terms[0][0]), *(int(number) for _, number in terms)] == cards
        assert [int(total) for total in re.findall(r"=(\d+), ", thoughts)] == [sum(cards[:n]) for n in range(2, len(cards))]
        kind, total = re.search(r"=(hard|soft) (\d+), ", thoughts).groups()
        assert int(total) == info["player_total"] == sum(cards) + 10 * (kind == "soft")
        sizes.add(len(cards)), kinds.add(kind)
    assert sizes >= {2, 3, 4} and kinds == {"hard", "soft"}


def test_chatter_varies_from_state_to_state_and_comes_before_the_thought():
    game, openings = gym.make(env.env_id("ezpoints")), set()
    for seed in range(50):
        _, info = game.reset(seed=seed)
        plain, chatty = (json.loads(demonstration(info, "1", style))["thoughts"] for style in ("full", "chatty"))
        assert chatty.endswith(" - " + plain) and demonstration(info, "1", "chatty") == demonstration(dict(info), "1", "chatty")
        openings.add(chatty.removesuffix(plain))
    assert len(openings) > 40
