"""The model: sampling and scoring agree, special tokens never appear, batching changes nothing."""
import json
from unittest.mock import Mock

import gymnasium as gym
import numpy as np
import pytest
import torch
from peft.tuners.lora import LoraLayer

import env
import prompts
import policy as policy_module
from policy import VLMPolicy, load_model

torch.set_num_threads(1)


def states(name, n=6):
    pictures, infos = zip(*[gym.make(env.env_id(name)).reset(seed=seed) for seed in range(n)])
    return np.stack(pictures), [prompts.build_prompt(info) for info in infos], list(infos)


def build():
    torch.manual_seed(0)
    policy = VLMPolicy(*load_model("tiny"), temperature=0.7, max_new_tokens=24)
    policy.add_lora(4, 8)
    for name, p in policy.model.named_parameters():  # an adapter that does something
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.05)
    shown = demonstrations(policy, "blackjack", 16)
    policy.standardise([answer.inputs for answer in shown])
    return policy


@pytest.fixture(scope="module")
def policy():
    return build()


def demonstrations(policy, name, n=6):
    pictures, texts, infos = states(name, n)
    return policy.demonstrate(pictures, texts, [prompts.demonstration(i, env.expert_action(i)) for i in infos])


def test_the_tiny_model_is_a_llava_of_about_a_million_parameters():
    model, processor = load_model("tiny")
    assert type(model).__name__ == "LlavaForConditionalGeneration" and 5e5 < sum(p.numel() for p in model.parameters()) < 2e6
    assert processor.chat_template


@pytest.mark.parametrize("name", env.GAMES)
def test_act_and_evaluate_agree(policy, name):
    pictures, texts, _ = states(name)
    answers = policy.act(pictures, texts)
    scores = policy.evaluate(answers)
    for field in ("logp_cot", "logp_action", "value"):
        sampled = torch.tensor([getattr(answer, field) for answer in answers])
        torch.testing.assert_close(getattr(scores, field).detach(), sampled, atol=1e-4, rtol=0)


def test_answers_of_different_lengths_keep_their_scores(policy):
    # An easy end of sequence makes answers of very different lengths.
    policy.forbidden[policy.eos_ids] = 5.0
    try:
        pictures, texts, _ = states("points24", 16)
        answers = policy.act(pictures, texts)
        scores = policy.evaluate(answers)
    finally:
        policy.forbidden[policy.eos_ids] = 0.0
    assert len({len(answer.tokens) for answer in answers}) > 3
    for answer in answers:  # an end of sequence ends an answer, and nothing else
        assert not set(answer.tokens[:-1].tolist()) & set(policy.eos_ids)
        assert len(answer.tokens) == 24 or answer.tokens[-1] in policy.eos_ids
    total = torch.tensor([a.logp_cot + a.logp_action for a in answers])
    torch.testing.assert_close((scores.logp_cot + scores.logp_action).detach(), total, atol=1e-4, rtol=0)


def test_left_padding_and_batching_change_nothing(policy):
    answers = demonstrations(policy, "points24") + demonstrations(policy, "blackjack")
    assert len({a.inputs["input_ids"].shape[1] for a in answers}) > 1
    together = policy.evaluate(answers)
    for i, answer in enumerate(answers):
        alone = policy.evaluate([answer])
        for field in ("logp_cot", "logp_action", "value"):
            assert abs(getattr(together, field)[i] - getattr(alone, field)[0]) < 1e-4


def test_special_tokens_are_never_sampled(policy):
    model = policy.model.get_base_model()
    image = model.config.image_token_id
    with torch.no_grad():
        logp = policy.log_probs(torch.full((1, model.config.text_config.vocab_size), 0.0).index_fill(1, torch.tensor([image]), 1e4))
    assert logp[0, image] == -torch.inf and torch.isfinite(logp[0, policy.eos_ids]).all()
    assert torch.isclose(logp.exp().sum(), torch.tensor(1.0))


def test_an_adapter_switched_off_stays_off(policy):
    answers = demonstrations(policy, "blackjack")
    with torch.no_grad(), policy.model.disable_adapter():
        off = policy.evaluate(answers).logp_cot
    with torch.no_grad():
        assert (policy.evaluate(answers).logp_cot - off).abs().max() > 1e-3
        for module in policy.modules():
            if isinstance(module, LoraLayer):
                module.set_scale("default", 0)
        torch.testing.assert_close(policy.evaluate(answers).logp_cot, off)
        for module in policy.modules():
            if isinstance(module, LoraLayer):
                module.set_scale("default", 1)


@pytest.mark.parametrize("name", env.GAMES)
def test_the_action_begins_where_the_text_says(policy, name):
    for answer in demonstrations(policy, name):
        tail = policy.decode(answer.tokens[answer.num_cot_tokens:].tolist())
        head = policy.decode(answer.tokens[:answer.num_cot_tokens].tolist())
        assert '"action":' not in head and 'action": "' in tail and head + tail == answer.text
        # no token more than the one that the key begins in
        first = answer.tokens[answer.num_cot_tokens: answer.num_cot_tokens + 1]
        assert prompts.action_start(answer.text) - len(head) < len(policy.decode(first.tolist()))


def test_an_answer_without_an_action_is_all_thought(policy):
    pictures, texts, _ = states("blackjack", 1)
    answer, = policy.demonstrate(pictures, texts, ['{"thoughts": "hm"}'])
    assert answer.num_cot_tokens == len(answer.tokens) and policy.evaluate([answer]).logp_action.item() == 0


def test_each_step_is_scored_under_its_own_prompt(policy):
    one, other = demonstrations(policy, "ezpoints", 2)
    swapped = type(one)(other.inputs, one.tokens, one.num_cot_tokens, one.text)
    assert policy.evaluate([one]).logp_cot != policy.evaluate([swapped]).logp_cot


def test_lora_reaches_vision_tower_projector_and_language_model(policy):
    names = [name for name, p in policy.model.named_parameters() if p.requires_grad]
    assert all("lora_" in name for name in names)
    for part in ("vision_tower", "multi_modal_projector", "language_model"):
        assert any(part in name for name in names)
    (s := policy.evaluate(demonstrations(policy, "blackjack"))).logp_action.sum().backward(retain_graph=True)
    s.value.sum().backward()
    assert all(p.grad is not None for name, p in policy.model.named_parameters() if p.requires_grad)
    policy.zero_grad()


def test_the_value_head_sees_every_component_of_a_state_at_one_scale(policy):
    answers = demonstrations(policy, "blackjack", 16)
    seen = []
    hook = policy.value_head[1].register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    policy.evaluate(answers)
    hook.remove()
    torch.testing.assert_close(seen[0].mean(0), torch.zeros(seen[0].shape[1]), atol=1e-3, rtol=0)
    torch.testing.assert_close(seen[0].std(0, correction=0), torch.ones(seen[0].shape[1]), atol=0.02, rtol=0)


def test_save_and_load(policy, tmp_path):
    policy.save(tmp_path)
    assert not [f for f in tmp_path.rglob("*") if f.suffix in (".bin", ".pt", ".pkl")]
    again = type(policy)(*load_model("tiny"), temperature=0.7)
    again.load(tmp_path)
    answers = demonstrations(policy, "blackjack")
    scores = vars(policy.evaluate(answers)).values()
    for one, other in zip(scores, vars(again.evaluate(answers)).values()):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_the_action_begins_right_where_a_prefix_is_longer_than_the_whole(policy):
    # Half an emoji decodes to more characters than a whole one
    pictures, texts, _ = states("blackjack", 1)
    text = '{"thoughts": "\U0001f0a1\U0001f0a1\U0001f0a1", "action": "hit"}'
    answer = policy.demonstrate(pictures, texts, [text])[0]
    head = policy.decode(answer.tokens[:answer.num_cot_tokens].tolist())
    assert answer.text == text and head.endswith("\U0001f0a1\", ") or head.endswith("\U0001f0a1")
    assert '"action"' not in head


def test_a_line_that_an_answer_repeats_is_no_single_token():
    line = "The lamp on the left wall is bright."
    texts = [f"What do you see in the picture?\n{line}\nAnswer.", f'{{"seen": "{line}", "action": "on"}}'] * 200
    tokenizer = policy_module.build_tokenizer(texts)
    forbidden = policy_module.forbidden_tokens(len(tokenizer), tokenizer, [tokenizer.eos_token_id])
    ids = tokenizer(texts[1], add_special_tokens=False)["input_ids"]
    assert not forbidden[ids].any()
    assert len(tokenizer("What do you see in the picture?", add_special_tokens=False)["input_ids"]) == 1


def test_ids_without_a_token_are_never_sampled():
    tokenizer = Mock(all_special_ids=[], added_tokens_decoder={}, get_vocab=lambda: {"a": 0, "b": 1, "z": 7})
    forbidden = policy_module.forbidden_tokens(9, tokenizer, [1])
    assert (forbidden == 0).nonzero().flatten().tolist() == [0, 1, 7]


def test_a_card_in_a_list_is_a_token_that_no_number_is():
    tokenizer = policy_module.build_tokenizer(prompts.corpus())
    for rank in env.CARD_RANKS:
        ids = tokenizer(json.dumps({"hand": [rank, rank]}), add_special_tokens=False)["input_ids"]
        first, second = (tokenizer.decode([i]) for i in ids if rank in tokenizer.decode([i]))
        assert (first, second) == (f'["{rank}"', f', "{rank}"')
    numbers = tokenizer("10+2=12", add_special_tokens=False)["input_ids"]
    assert [tokenizer.decode([i]) for i in numbers] == ["10", "+", "2", "=", "12"]


def test_a_tokenizer_without_padding_pads_with_the_end_of_sequence():
    model, processor = load_model("tiny")
    processor.tokenizer.pad_token = None
    policy = VLMPolicy(model, processor, max_new_tokens=12)
    assert policy.tokenizer.pad_token_id == policy.tokenizer.eos_token_id

    # Padding never counts: a short answer beside a long one has the scores that it has alone
    pictures, texts, _ = states("blackjack", 2)
    answers = policy.demonstrate(pictures, texts, ['"action": "hit"', '{"thoughts": "none", "action": "hit"}'])
    together = policy.evaluate(answers)
    for i, answer in enumerate(answers):
        alone = policy.evaluate([answer])
        torch.testing.assert_close(together.logp_action[i], alone.logp_action[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(together.logp_cot[i], alone.logp_cot[0], atol=1e-4, rtol=1e-4)
    sampled = policy.act(pictures, texts)
    assert all(answer.tokens.tolist().count(policy.tokenizer.eos_token_id) <= 1 for answer in sampled)
