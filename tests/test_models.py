"""Other model families: small random checkpoints, written to disk and loaded as a user loads them.

Each has its own processor, kind of tokenizer and chat template. Qwen2.5-VL's processor needs
torchvision (for videos, which nobody plays here), so its model is tested behind a processor made of
its own parts.
"""
import json
import shutil
from importlib.util import find_spec
from unittest.mock import Mock

import gymnasium as gym
import numpy as np
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import env
import policy as policy_module
import prompts
import train
from docs.projects import smollm
from policy import VLMPolicy, load_model, load_run
from ppo import Rollout, ppo_update

torch.set_num_threads(1)

SUMS = ("logp_cot", "logp_action", "value")  # what `act` writes into an answer and `evaluate` again

# -------------------------------------------------------------------------------------------------
# The families: each function returns (model, processor), with random weights

TEXT = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
VISION = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    image_size=56, patch_size=14)


def tokenizer(kind, *special, **named):
    """A tokenizer that learned from the project's texts, with the family's special tokens.

    kind: "byte-level", or "unigram" as SentencePiece.
    """
    special_tokens = ["<pad>", "<s>", "</s>", "<unk>", *special]

    if kind == "byte-level":
        words = Tokenizer(models.BPE())
        words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        words.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=500, special_tokens=special_tokens, show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    else:
        words = Tokenizer(models.Unigram())
        words.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
        words.decoder = decoders.Metaspace(prepend_scheme="never")
        trainer = trainers.UnigramTrainer(
            vocab_size=400, special_tokens=special_tokens, show_progress=False, unk_token="<unk>")

    words.train_from_iterator(prompts.corpus(episodes=30), trainer)
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        unk_token="<unk>", additional_special_tokens=list(special),
        extra_special_tokens=named or None)


def template(image):
    """A chat template that writes `image` for the picture."""
    return (
        "{% for m in messages %}{% for part in m['content'] %}"
        "{% if part['type'] == 'image' %}" + image + "{% else %}{{ part['text'] }}{% endif %}"
        "{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}\nAnswer: {% endif %}"
    )


def llava():
    words = tokenizer("unigram", "<image>")
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**VISION),
        text_config=tf.LlamaConfig(**TEXT, vocab_size=len(words)),
        image_token_id=words.convert_tokens_to_ids("<image>"), vision_feature_layer=-2)
    images = CLIPImageProcessorPil(
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    processor = tf.LlavaProcessor(
        images, words, patch_size=14, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=template("<image>"))
    return tf.LlavaForConditionalGeneration(config), processor


def llava_next():
    words = tokenizer("unigram", "<image>")
    tiles = [[56, 112], [112, 56], [112, 112]]
    config = tf.LlavaNextConfig(
        vision_config=tf.CLIPVisionConfig(**VISION),
        text_config=tf.MistralConfig(**TEXT, vocab_size=len(words)),
        image_token_id=words.convert_tokens_to_ids("<image>"), image_grid_pinpoints=tiles,
        vision_feature_layer=-1)
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56},
        image_grid_pinpoints=tiles)
    processor = tf.LlavaNextProcessor(
        images, words, patch_size=14, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=template("<image>"))
    return tf.LlavaNextForConditionalGeneration(config), processor


def idefics3():
    places = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
    words = tokenizer(
        "byte-level", "<fake_token_around_image>", "<image>", "<end_of_utterance>",
        "<global-img>", *places)
    config = tf.Idefics3Config(
        text_config=dict(model_type="llama", **TEXT, vocab_size=len(words)), vision_config=VISION,
        scale_factor=2, pad_token_id=0, image_token_id=words.convert_tokens_to_ids("<image>"))
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": 112}, max_image_size={"longest_edge": 56})
    processor = tf.Idefics3Processor(
        images, words, image_seq_len=4, chat_template=template("<image>"))
    return tf.Idefics3ForConditionalGeneration(config), processor


def gemma3():
    words = tokenizer(
        "unigram", "<boi>", "<eoi>", "<img>",
        boi_token="<boi>", eoi_token="<eoi>", image_token="<img>")
    words.add_tokens(["\n\n", "\u2581\u2581", "<table>"])  # as Gemma's
    layer_types = ["sliding_attention", "full_attention"]
    config = tf.Gemma3Config(
        text_config=dict(
            **TEXT, head_dim=8, vocab_size=len(words), sliding_window=16, layer_types=layer_types),
        vision_config=dict(**VISION, vision_use_head=False), mm_tokens_per_image=4,
        boi_token_index=words.convert_tokens_to_ids("<boi>"),
        eoi_token_index=words.convert_tokens_to_ids("<eoi>"),
        image_token_id=words.convert_tokens_to_ids("<img>"))
    model = tf.Gemma3ForConditionalGeneration(config)
    projection = model.model.multi_modal_projector.mm_input_projection_weight
    torch.nn.init.normal_(projection, std=0.2)  # zeros at first
    images = Gemma3ImageProcessorPil(size={"height": 56, "width": 56})
    processor = tf.Gemma3Processor(
        images, words, chat_template=template("<boi>"), image_seq_length=4)
    return model, processor


class QwenProcessor:
    """What Qwen's processor does with pictures, without its half for videos."""

    chat_template = "in Python, below"
    image = "<|image_pad|>"

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.image_processor = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=56 * 56)

    def apply_chat_template(self, messages, **kwargs):
        question = messages[0]["content"][1]["text"]
        return f"<|vision_start|>{self.image}<|vision_end|>{question}\nAnswer: "

    def __call__(self, images, text, padding, padding_side, add_special_tokens, return_tensors):
        pictures = self.image_processor([image for row in images for image in row],
                                        return_tensors="pt")
        longer = []
        for question, grid in zip(text, pictures["image_grid_thw"]):
            num_image_tokens = int(grid.prod()) // 4
            longer.append(question.replace(self.image, self.image * num_image_tokens))
        batch = self.tokenizer(
            longer, padding=padding, padding_side=padding_side, return_tensors="pt",
            return_token_type_ids=False)
        is_image = batch["input_ids"] == self.tokenizer.convert_tokens_to_ids(self.image)
        return {**batch, **pictures, "mm_token_type_ids": is_image.long()}


def qwen():
    special = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    words = tokenizer("byte-level", *special)
    start, end, image, video = words.convert_tokens_to_ids(special)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    config = tf.Qwen2_5_VLConfig(
        text_config=dict(**TEXT, vocab_size=len(words), rope_parameters=rope),
        vision_config=dict(
            depth=1, hidden_size=32, intermediate_size=64, num_heads=4, out_hidden_size=32,
            patch_size=14, fullatt_block_indexes=[0]),
        image_token_id=image, video_token_id=video, vision_start_token_id=start,
        vision_end_token_id=end)
    return tf.Qwen2_5_VLForConditionalGeneration(config), QwenProcessor(words)


def qwen_whole():
    model, processor = qwen()
    words = processor.tokenizer
    words.image_token = "<|image_pad|>"
    words.video_token = "<|video_pad|>"
    whole = tf.Qwen2_5_VLProcessor(
        processor.image_processor, words, tf.Qwen2VLVideoProcessor(),
        chat_template=template("<|vision_start|><|image_pad|><|vision_end|>"))
    return model, whole


def internvl():
    named = dict(
        start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>",
        video_token="<video>")
    words = tokenizer("byte-level", *named.values(), **named)
    config = tf.InternVLConfig(
        text_config=dict(model_type="qwen2", **TEXT, vocab_size=len(words)),
        image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"),
        vision_config=VISION | {"image_size": [56, 56], "patch_size": [14, 14]},
        image_seq_length=4)
    images = GotOcr2ImageProcessorPil(size={"height": 56, "width": 56})
    processor = tf.InternVLProcessor(
        images, words, tf.InternVLVideoProcessor(), image_seq_length=4,
        chat_template=template("<IMG_CONTEXT>"))
    return tf.InternVLForConditionalGeneration(config), processor


def chat_llama():
    """(language model, tokenizer) of the kind that docs/projects/smollm.py builds a LLaVA around."""
    words = tokenizer("byte-level", "<|im_start|>", "<|im_end|>")
    words.eos_token = "<|im_end|>"  # the end of a turn of the chat
    sizes = TEXT | {"eos_token_id": words.eos_token_id}
    config = tf.LlamaConfig(**sizes, vocab_size=len(words), tie_word_embeddings=True)
    return tf.LlamaForCausalLM(config), words


def smollm_llava():
    return smollm.build(*chat_llama())


FAMILIES = {
    "llava": llava, "llava_next": llava_next, "idefics3": idefics3, "gemma3": gemma3, "qwen": qwen,
    "smollm": smollm_llava,
}
if find_spec("torchvision"):  # their processors import it
    FAMILIES |= {"qwen_whole": qwen_whole, "internvl": internvl}


# -------------------------------------------------------------------------------------------------
# Checkpoints on disk, policies, states and answers


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A function from a family to the folder of its checkpoint, which is made when asked for."""
    folders = {}

    def get(family):
        if family not in folders:
            folders[family] = tmp_path_factory.mktemp(family)
            torch.manual_seed(0)
            model, processor = FAMILIES[family]()
            model.save_pretrained(folders[family])
            if family == "qwen":
                processor = processor.tokenizer
            processor.save_pretrained(folders[family])
        return folders[family]

    return get


@pytest.fixture(scope="module", params=FAMILIES)
def policy(request, checkpoints):
    family = request.param
    with pytest.MonkeyPatch.context() as patch:
        if family == "qwen":
            patch.setattr(policy_module.AutoProcessor, "from_pretrained", read_qwen_processor)
        loaded = load_model(str(checkpoints(family)), image_tiles="anyres")
    return with_adapter(loaded)


def read_qwen_processor(folder, **kwargs):
    return QwenProcessor(tf.AutoTokenizer.from_pretrained(folder))


def with_adapter(loaded):
    """A policy with an adapter that does something; the same weights at every call."""
    torch.manual_seed(1)
    policy = VLMPolicy(*loaded, temperature=0.7, max_new_tokens=20)
    policy.add_lora(4, 8)
    for name, p in policy.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.05)
    return policy


def states():
    """Pictures, prompts and infos of six states; no two prompts are equally long."""
    images = []
    questions = []
    infos = []
    for name in ("blackjack", "points24"):
        for seed in range(3):
            image, info = gym.make(env.env_id(name)).reset(seed=seed)
            questions.append(prompts.build_prompt(info) + " again" * len(infos))
            images.append(image)
            infos.append(info)
    return np.stack(images), questions, infos


def sampled(policy):
    """Answers of different lengths, so that some are finished long before the others."""
    policy.forbidden[policy.eos_ids] = 5.0  # makes the end of an answer likely
    torch.manual_seed(0)
    images, questions, _ = states()
    answers = policy.act(images, questions)
    assert len({len(answer.tokens) for answer in answers}) > 2
    return answers


def column(answers, name):
    """One of SUMS of all answers, as a tensor (N,)."""
    return torch.tensor([getattr(answer, name) for answer in answers])


# -------------------------------------------------------------------------------------------------
# Every family


def test_sampling_and_scoring_agree(policy):
    answers = sampled(policy)
    scores = policy.evaluate(answers)
    for name in SUMS:
        torch.testing.assert_close(
            getattr(scores, name).detach(), column(answers, name), atol=1e-4, rtol=0)


def test_the_first_ratio_is_1_and_the_update_reaches_every_part(policy):
    answers = sampled(policy)
    rollout = Rollout(
        answers=answers,
        logp_cot=column(answers, "logp_cot")[None],
        logp_action=column(answers, "logp_action")[None],
        values=column(answers, "value")[None],
        next_values=torch.zeros(1, 6),
        rewards=torch.arange(6.0)[None],
        terminated=torch.ones(1, 6, dtype=torch.bool),
        truncated=torch.zeros(1, 6, dtype=torch.bool),
        legal=torch.tensor([[True, False] * 3]),
        sft_logp_cot=column(answers, "logp_cot")[None],
        sft_logp_action=column(answers, "logp_action")[None],
    )
    config, _ = train.configure(
        ["--env", "blackjack", "--epochs", "1", "--minibatch", "6", "--microbatch", "3"])
    trainable = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trainable, 1e-4)
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    stats = ppo_update(policy, optimizer, rollout, 0.5, config)
    assert stats["first_ratio_error"] < 1e-4
    assert stats["skipped"] == 0

    # Every part that has a linear layer has an adapter that moved (Gemma's projector has none)
    moved = []
    for name, p in policy.model.named_parameters():
        if not torch.equal(p, before[name]):
            assert "lora_" in name
            moved.append(name)
    linear = []
    for name, module in policy.model.named_modules():
        if isinstance(module, torch.nn.Linear):
            linear.append(name)
    parts = [("vision", "visual"), ("projector", "connector", "merger"),
             ("language_model", "text_model")]
    for words in parts:
        if contains(linear, words):
            assert contains(moved, words), words


def contains(names, words):
    """Whether any of the names has any of the words in it."""
    return any(word in name for name in names for word in words)


def test_left_padding_changes_nothing(policy):
    answers = sampled(policy)
    assert len({answer.inputs["input_ids"].shape[1] for answer in answers}) > 1
    together = policy.evaluate(answers)
    alone = [policy.evaluate([answer]) for answer in answers]
    for name in SUMS:
        one_by_one = torch.cat([getattr(scores, name) for scores in alone])
        torch.testing.assert_close(getattr(together, name), one_by_one, atol=1e-4, rtol=0)


def test_demonstrations_split_at_the_text_and_train(policy):
    images, questions, infos = states()
    texts = [prompts.demonstration(info, env.expert_action(info)) for info in infos]
    answers = policy.demonstrate(images, questions, texts)
    for answer, text in zip(answers, texts):
        thoughts = answer.tokens[:answer.num_cot_tokens]
        action = answer.tokens[answer.num_cot_tokens:]
        assert answer.text == text
        assert '"action":' not in policy.tokenizer.decode(thoughts, skip_special_tokens=True)
        assert prompts.find_keys(policy.tokenizer.decode(action, skip_special_tokens=True))

    scores = policy.evaluate(answers)
    (scores.logp_cot + scores.logp_action).mean().neg().backward()
    gradients = [p.grad for p in policy.model.parameters() if p.grad is not None]
    assert gradients
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    policy.zero_grad()


def test_no_special_token_but_the_end_can_be_sampled(policy):
    logits = torch.zeros(1, len(policy.forbidden))
    possible = policy.log_probs(logits)[0] > -torch.inf                        # (V,)
    possible_special = {i for i in policy.tokenizer.all_special_ids if possible[i]}
    assert possible_special == set(policy.eos_ids)
    assert possible.sum() > 100


# -------------------------------------------------------------------------------------------------
# Number formats, tokens, checkpoints of gradients, tiles


@pytest.mark.parametrize("family", ["llava", "gemma3"])  # Gemma's embeddings are its head's weights
def test_in_bfloat16_log_probabilities_are_not_rounded(family, checkpoints):
    loaded = load_model(str(checkpoints(family)), dtype=torch.bfloat16)
    policy = VLMPolicy(*loaded, temperature=0.2, max_new_tokens=4)
    policy.add_lora(4, 8)
    assert policy.head.weight.dtype == torch.float32
    assert not policy.head.weight.requires_grad
    embeddings = policy.model.get_input_embeddings().weight
    assert embeddings.dtype == policy.model.dtype == torch.bfloat16

    images, questions, _ = states()
    answer = policy.act(images, questions)[0]
    hidden = recorded_hidden_states(policy)
    scores = policy.evaluate([answer])
    assert len(hidden) == 1
    logits = hidden[0][0, :-1].double() @ policy.head.weight.double().T        # (L, V)
    exact = torch.log_softmax(logits / 0.2 + policy.forbidden, -1)
    expected = exact.gather(1, answer.tokens[:, None])[:, 0]                   # (L,)
    torch.testing.assert_close(scores.token_logps[0].double(), expected, atol=1e-5, rtol=0)


def recorded_hidden_states(policy):
    """A list to which each call of `policy.hidden_states` adds its result."""
    results = []
    original = policy.hidden_states

    def hidden_states(*args, **kwargs):
        results.append(original(*args, **kwargs))
        return results[-1]

    policy.hidden_states = hidden_states
    return results


def test_added_white_space_can_be_sampled_but_nothing_else_that_was_added(checkpoints):
    policy = VLMPolicy(*load_model(str(checkpoints("gemma3"))))
    ids = policy.tokenizer.convert_tokens_to_ids(["\n\n", "\u2581\u2581", "<table>", "<img>"])
    assert policy.forbidden[ids].tolist() == [0, 0, -torch.inf, -torch.inf]


def test_gradient_checkpointing_changes_no_gradient(checkpoints):
    images, questions, _ = states()
    gradients = []
    for is_checkpointed in (True, False):
        policy = VLMPolicy(*load_model(str(checkpoints("llava"))))
        if is_checkpointed:
            policy.checkpoint_gradients()
            assert policy.checkpointed_layers
        torch.manual_seed(0)
        policy.add_lora(4, 8)
        answers = policy.demonstrate(images, questions, ['{"action": "hit"}'] * 6)
        policy.evaluate(answers).logp_action.sum().backward()
        parts = [p.grad.flatten() for p in policy.model.parameters() if p.grad is not None]
        gradients.append(torch.cat(parts))
    torch.testing.assert_close(gradients[0], gradients[1])
    assert gradients[0].abs().sum() > 0


@pytest.mark.parametrize("family, tokens", [("llava_next", (56 // 14) ** 2), ("idefics3", 4)])
def test_one_tile_is_read_with_the_same_weights(family, tokens, checkpoints):
    tiled = load_model(str(checkpoints(family)), image_tiles="anyres")
    one = load_model(str(checkpoints(family)))
    weights = tiled[0].state_dict()
    for name, x in one[0].state_dict().items():
        assert torch.equal(x, weights[name]), name

    image_token = one[0].config.image_token_id
    images, questions, _ = states()
    num_image_tokens = []
    for loaded in (one, tiled):
        inputs = VLMPolicy(*loaded).encode(images, questions)
        num_image_tokens.append((inputs[0]["input_ids"] == image_token).sum().item())
    assert num_image_tokens[0] == tokens < num_image_tokens[1]


# -------------------------------------------------------------------------------------------------
# Whole runs, and folders without a model

WHOLE_RUNS = [("llava_next", "float32"), ("gemma3", "float32"), ("llava", "bfloat16")]
if find_spec("torchvision"):
    WHOLE_RUNS += [("qwen_whole", "float32"), ("internvl", "float32")]
SMALL = (
    "--env blackjack --sft-steps 2 --sft-batch 4 --env-steps 16 --rollout-steps 8 --num-envs 4 "
    "--minibatch 4 --epochs 1 --max-new-tokens 8 --eval-episodes 4 --lora-rank 4 --drift-coef 0.1"
)


@pytest.mark.parametrize("family, dtype", WHOLE_RUNS)
def test_a_whole_run_with_another_model(family, dtype, checkpoints, tmp_path, capsys):
    out = tmp_path / "run"
    model = str(checkpoints(family))
    train.main([*SMALL.split(), "--model", model, "--dtype", dtype, "--out", str(out)])
    assert "memory expected" in capsys.readouterr().out
    assert json.loads((out / "config.json").read_text())["preset"] == "small"

    # The base weights are on disk once, in the model's own folder
    assert (out / "sft/adapter_model.safetensors").exists()
    assert not (out / "sft/model.safetensors").exists()

    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    ratio_errors = [row["first_ratio_error"] for row in rows if row["stage"] == "rl"]
    assert len(ratio_errors) == 2
    assert max(ratio_errors) < (1e-4 if dtype == "float32" else 1e-6)

    policy, _ = load_run(out)
    again, _ = load_run(out)
    images, questions, _ = states()
    answers = policy.demonstrate(images, questions, ['{"action": "hit"}'] * 6)
    torch.testing.assert_close(
        policy.evaluate(answers).logp_action, again.evaluate(answers).logp_action)


def test_the_line_of_a_run_goes_on_with_a_folder_named_as_it_was(checkpoints, tmp_path, monkeypatch):
    model = checkpoints("llava")
    monkeypatch.chdir(model.parent)
    line = [*SMALL.split(), "--model", model.name, "--out", str(tmp_path / "run")]
    config, out = train.configure(line)
    assert config.model == str(model)
    out.mkdir()
    (out / "config.json").write_text(json.dumps(vars(config)))
    kept, _ = train.configure([*line[:-2], "--resume", str(out)])
    assert vars(kept) == vars(config)


def test_a_mistyped_folder_is_called_missing(monkeypatch):
    monkeypatch.setattr(
        policy_module.AutoConfig, "from_pretrained", Mock(side_effect=OSError("no connection")))
    with pytest.raises(OSError, match="there is no such folder, .* no connection"):
        policy_module.read_model_config("models/typo")


@pytest.mark.parametrize("error", [ValueError("custom code"), ImportError("a package")])
def test_what_else_the_hub_says_of_a_model_stays_as_it_is(error, monkeypatch):
    monkeypatch.setattr(policy_module.AutoConfig, "from_pretrained", Mock(side_effect=error))
    with pytest.raises(type(error)) as raised:
        policy_module.read_model_config("owner/model")
    assert raised.value is error


@pytest.mark.parametrize("name, value", [
    ("final_logit_softcapping", 30.0), ("logits_scaling", 4.0), ("logit_scale", 0.06)])
def test_a_model_that_changes_its_logits_is_refused(name, value, checkpoints, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(checkpoints("llava"), folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"][name] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=name):
        load_model(str(folder))


UNUSABLE = ["no weights", "too few weights", "no chat template", "text only", "nothing",
            "no folder", "no package", "a size that is a word", "an unknown activation",
            "padding outside of the vocabulary"]


@pytest.mark.parametrize("what", UNUSABLE)
def test_a_folder_that_holds_no_usable_model_gives_one_line(
        what, checkpoints, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "model"
    make_unusable(what, folder, checkpoints("llava"), monkeypatch)
    capsys.readouterr()  # what the library wrote while it saved the checkpoint
    with pytest.raises(SystemExit) as stop:
        train.main(["--env", "blackjack", "--model", str(folder), "--out", str(tmp_path / "run")])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.count("\n") == 1
    assert str(folder) in error
    assert ("there is no such folder" in error) == (what == "no folder")
    assert not (tmp_path / "run").exists()


def make_unusable(what, folder, checkpoint, monkeypatch):
    """Fill `folder` with a model in which something is wrong."""
    if what == "no folder":
        return

    if what == "nothing":
        folder.mkdir()
        return

    if what == "no package":
        folder.mkdir()
        missing = Mock(side_effect=ImportError("\nIts videos want a package.\n"))
        monkeypatch.setattr(train, "count_parameters", Mock(return_value=1))
        monkeypatch.setattr(policy_module.AutoConfig, "from_pretrained", Mock())
        monkeypatch.setattr(policy_module.AutoProcessor, "from_pretrained", missing)
        return

    if what == "text only":
        config = tf.MistralConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, vocab_size=50)
        tf.MistralForCausalLM(config).save_pretrained(folder)
        return

    # The others are a whole checkpoint that lost something
    shutil.copytree(checkpoint, folder)
    damages = {
        "a size that is a word": {"hidden_size": "many"},
        "an unknown activation": {"hidden_act": "foo"},
        "padding outside of the vocabulary": {"pad_token_id": 10**6},
    }
    if what in damages:
        file = folder / "config.json"
        config = json.loads(file.read_text())
        config["text_config"] |= damages[what]
        file.write_text(json.dumps(config))
        return

    if what == "too few weights":
        file = folder / "model.safetensors"
        weights = load_file(file)
        weights = {name: x for name, x in weights.items() if "projector" not in name}
        save_file(weights, file, {"format": "pt"})
    else:
        pattern = {"no weights": "*.safetensors", "no chat template": "chat_template*"}[what]
        for file in folder.glob(pattern):
            file.unlink()


def test_code_that_comes_with_a_model_runs_only_where_it_is_asked_for(tmp_path):
    config = {"model_type": "stranger", "auto_map": {"AutoConfig": "stranger.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "stranger.py").write_text("raise ValueError('the stranger ran')")
    with pytest.raises(ValueError, match="custom code"):
        load_model(str(tmp_path))
    with pytest.raises(ValueError, match="the stranger ran"):
        load_model(str(tmp_path), trust_remote_code=True)


@pytest.mark.parametrize("family", ["llava", "llava_next", "gemma3"])
def test_parameters_are_counted_without_the_weights(family, checkpoints, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(checkpoints(family), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    model, _ = load_model(str(checkpoints(family)), image_tiles="anyres")
    assert policy_module.count_parameters(str(folder)) == model.num_parameters()


def test_a_model_is_known_by_its_weights(checkpoints, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(checkpoints("llava"), folder)
    before = policy_module.model_identity(str(folder))
    assert before == policy_module.model_identity(str(checkpoints("llava")))

    # The same names, shapes and sizes with other numbers are another model
    file = folder / "model.safetensors"
    weights = {name: x + 1 for name, x in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})
    assert policy_module.model_identity(str(folder)) != before


def test_a_folder_is_found_from_any_directory(checkpoints, tmp_path, monkeypatch):
    folder = checkpoints("llava")
    monkeypatch.chdir(folder.parent)
    config, _ = train.configure(["--env", "blackjack", "--model", folder.name])
    assert config.model == str(folder.resolve())
