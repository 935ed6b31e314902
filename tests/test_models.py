"""Other model families: small random checkpoints, written to disk and loaded as a user loads them.

Each has its own processor, kind of tokenizer and chat template. Qwen2.5-VL's processor needs torchvision (for videos, which
nobody plays here), so its model is tested behind a processor made of its own parts.
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
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import env
import policy as policies
import prompts
import train
from policy import VLMPolicy, load_model
from ppo import Rollout, ppo_update

torch.set_num_threads(1)
TEXT = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0,
            bos_token_id=1, eos_token_id=2)
VISION = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=56, patch_size=14)


def tokenizer(kind, *special, **named):
    """A tokenizer of one of two kinds, trained on the project's texts, with the family's special tokens."""
    first = ["<pad>", "<s>", "</s>", "<unk>", *special]
    if kind == "byte-level":
        t = Tokenizer(models.BPE())
        t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=first, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    else:  # as SentencePiece
        t = Tokenizer(models.Unigram())
        t.pre_tokenizer, t.decoder = pre_tokenizers.Metaspace(prepend_scheme="never"), decoders.Metaspace(prepend_scheme="never")
        trainer = trainers.UnigramTrainer(vocab_size=400, special_tokens=first, show_progress=False, unk_token="<unk>")
    t.train_from_iterator(prompts.corpus(episodes=30), trainer)
    return tf.PreTrainedTokenizerFast(tokenizer_object=t, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
                                      additional_special_tokens=list(special), extra_special_tokens=named or None)


def template(image):
    return ("{% for m in messages %}{% for part in m['content'] %}{% if part['type'] == 'image' %}" + image + "{% else %}{{ part['text'] }}{% endif %}"
            "{% endfor %}{% endfor %}{% if add_generation_prompt %}\nAnswer: {% endif %}")


def llava_next():
    t, tiles = tokenizer("unigram", "<image>"), [[56, 112], [112, 56], [112, 112]]
    config = tf.LlavaNextConfig(vision_config=tf.CLIPVisionConfig(**VISION), text_config=tf.MistralConfig(**TEXT, vocab_size=len(t)),
                                image_token_id=t.convert_tokens_to_ids("<image>"), image_grid_pinpoints=tiles, vision_feature_layer=-1)
    images = LlavaNextImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, image_grid_pinpoints=tiles)
    return tf.LlavaNextForConditionalGeneration(config), tf.LlavaNextProcessor(
        images, t, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=template("<image>"))


def idefics3():
    t = tokenizer("byte-level", "<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>",
                  *[f"<row_{a}_col_{b}>" for a in range(1, 5) for b in range(1, 5)])
    config = tf.Idefics3Config(text_config=dict(model_type="llama", **TEXT, vocab_size=len(t)), vision_config=VISION, scale_factor=2, pad_token_id=0,
                               image_token_id=t.convert_tokens_to_ids("<image>"))
    images = Idefics3ImageProcessorPil(size={"longest_edge": 112}, max_image_size={"longest_edge": 56})
    return tf.Idefics3ForConditionalGeneration(config), tf.Idefics3Processor(images, t, image_seq_len=4, chat_template=template("<image>"))


def gemma3():
    t = tokenizer("unigram", "<boi>", "<eoi>", "<img>", boi_token="<boi>", eoi_token="<eoi>", image_token="<img>")
    t.add_tokens(["\n\n", "\u2581\u2581", "<table>"])  # as Gemma's
    config = tf.Gemma3Config(
        text_config=dict(**TEXT, head_dim=8, vocab_size=len(t), sliding_window=16, layer_types=["sliding_attention", "full_attention"]),
        vision_config=dict(**VISION, vision_use_head=False), mm_tokens_per_image=4, boi_token_index=t.convert_tokens_to_ids("<boi>"),
        eoi_token_index=t.convert_tokens_to_ids("<eoi>"), image_token_id=t.convert_tokens_to_ids("<img>"))
    images = Gemma3ImageProcessorPil(size={"height": 56, "width": 56})
    model = tf.Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.2)  # zeros at first
    return model, tf.Gemma3Processor(images, t, chat_template=template("<boi>"), image_seq_length=4)


def llava():
    t = tokenizer("unigram", "<image>")
    config = tf.LlavaConfig(vision_config=tf.CLIPVisionConfig(**VISION), text_config=tf.LlamaConfig(**TEXT, vocab_size=len(t)),
                            image_token_id=t.convert_tokens_to_ids("<image>"), vision_feature_layer=-2)
    images = policies.CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    return tf.LlavaForConditionalGeneration(config), tf.LlavaProcessor(
        images, t, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=template("<image>"))


class QwenProcessor:
    """What Qwen's processor does with pictures, without its half for videos."""
    chat_template = "in Python, below"

    def __init__(self, tokenizer):
        self.tokenizer, self.image = tokenizer, "<|image_pad|>"
        self.image_processor = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=56 * 56)

    def apply_chat_template(self, messages, **kwargs):
        return f"<|vision_start|>{self.image}<|vision_end|>{messages[0]['content'][1]['text']}\nAnswer: "

    def __call__(self, images, text, padding, padding_side, add_special_tokens, return_tensors):
        pictures = self.image_processor([image for row in images for image in row], return_tensors="pt")
        text = [t.replace(self.image, self.image * (int(grid.prod()) // 4)) for t, grid in zip(text, pictures["image_grid_thw"])]
        batch = self.tokenizer(text, padding=padding, padding_side=padding_side, return_tensors="pt", return_token_type_ids=False)
        kinds = (batch["input_ids"] == self.tokenizer.convert_tokens_to_ids(self.image)).long()
        return {**batch, **pictures, "mm_token_type_ids": kinds}


def qwen():
    t = tokenizer("byte-level", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    start, end, image, video = map(t.convert_tokens_to_ids, t.additional_special_tokens if hasattr(t, "additional_special_tokens") else
                                   ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"])
    config = tf.Qwen2_5_VLConfig(
        text_config=dict(**TEXT, vocab_size=len(t), rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}),
        vision_config=dict(depth=1, hidden_size=32, intermediate_size=64, num_heads=4, out_hidden_size=32, patch_size=14, fullatt_block_indexes=[0]),
        image_token_id=image, video_token_id=video, vision_start_token_id=start, vision_end_token_id=end)
    return tf.Qwen2_5_VLForConditionalGeneration(config), QwenProcessor(t)


def qwen_whole():
    model, processor = qwen()
    t = processor.tokenizer
    t.image_token, t.video_token = "<|image_pad|>", "<|video_pad|>"
    return model, tf.Qwen2_5_VLProcessor(processor.image_processor, t, tf.Qwen2VLVideoProcessor(),
                                         chat_template=template("<|vision_start|><|image_pad|><|vision_end|>"))


def internvl():
    named = dict(start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>", video_token="<video>")
    t = tokenizer("byte-level", *named.values(), **named)
    config = tf.InternVLConfig(text_config=dict(model_type="qwen2", **TEXT, vocab_size=len(t)), image_token_id=t.convert_tokens_to_ids("<IMG_CONTEXT>"),
                               vision_config=VISION | {"image_size": [56, 56], "patch_size": [14, 14]}, image_seq_length=4)
    images = GotOcr2ImageProcessorPil(size={"height": 56, "width": 56})
    return tf.InternVLForConditionalGeneration(config), tf.InternVLProcessor(
        images, t, tf.InternVLVideoProcessor(), image_seq_length=4, chat_template=template("<IMG_CONTEXT>"))


FAMILIES = {"llava": llava, "llava_next": llava_next, "idefics3": idefics3, "gemma3": gemma3, "qwen": qwen}
if find_spec("torchvision"):  # their processors import it
    FAMILIES |= {"qwen_whole": qwen_whole, "internvl": internvl}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Folders of the families' checkpoints, each made when first asked for."""
    made = {}

    def get(family):
        if family not in made:
            torch.manual_seed(0)
            model, processor = FAMILIES[family]()
            made[family] = tmp_path_factory.mktemp(family)
            model.save_pretrained(made[family])
            processor.save_pretrained(made[family]) if family != "qwen" else processor.tokenizer.save_pretrained(made[family])
        return made[family]
    return get


@pytest.fixture(scope="module", params=FAMILIES)
def policy(request, checkpoints):
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "qwen":
            patch.setattr(policies.AutoProcessor, "from_pretrained", lambda folder, **kwargs: QwenProcessor(tf.AutoTokenizer.from_pretrained(folder)))
        loaded = load_model(str(checkpoints(request.param)), image_tiles="anyres")
    torch.manual_seed(1)
    policy = VLMPolicy(*loaded, temperature=0.7, max_new_tokens=20)
    policy.add_lora(4, 8)
    for name, p in policy.model.named_parameters():  # an adapter that does something
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.05)
    return policy


def states():
    found = [(name, *gym.make(env.env_id(name)).reset(seed=seed)) for name in ("blackjack", "points24") for seed in range(3)]
    texts = [prompts.build_prompt(info) + " again" * i for i, (name, _, info) in enumerate(found)]  # all of different lengths
    return np.stack([image for _, image, _ in found]), texts, found


def sampled(policy):
    """Answers of different lengths, so that rows leave the batch early."""
    policy.forbidden[list(policy.eos)] = 3.0
    torch.manual_seed(0)
    answers = policy.act(*states()[:2])
    assert len({len(answer.tokens) for answer in answers}) > 2
    return answers


def test_sampling_scoring_and_the_update_agree(policy):
    answers = sampled(policy)
    scores = policy.evaluate(answers)
    for field in ("logp_cot", "logp_action", "value"):
        torch.testing.assert_close(getattr(scores, field).detach(), torch.tensor([getattr(a, field) for a in answers]), atol=1e-4, rtol=0)
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters() if p.requires_grad}
    shape, false = (1, len(answers)), torch.zeros(1, len(answers), dtype=torch.bool)
    column = lambda key: torch.tensor([[getattr(a, key) for a in answers]])  # noqa: E731
    rollout = Rollout(answers, column("logp_cot"), column("logp_action"), column("value"), torch.zeros(shape), torch.arange(6.0)[None], ~false, false)
    optimizer = torch.optim.Adam([p for p in policy.parameters() if p.requires_grad], 1e-4)
    stats = ppo_update(policy, optimizer, rollout, cot_scale=0.5, epochs=1, minibatch=6, microbatch=3)
    assert stats["first_ratio_error"] < 1e-4 and stats["skipped"] == 0
    moved = {name for name, p in policy.model.named_parameters() if name in before and not torch.equal(p, before[name])}
    linear = " ".join(name for name, module in policy.model.named_modules() if isinstance(module, torch.nn.Linear))
    for part in ("vision|visual", "projector|connector|merger", "language_model|text_model"):  # Gemma's projector is no linear layer
        assert not any(word in linear for word in part.split("|")) or any(word in name for word in part.split("|") for name in moved)


def test_left_padding_changes_nothing(policy):
    answers = sampled(policy)
    assert len({a.inputs["input_ids"].shape[1] for a in answers}) > 1
    together, alone = policy.evaluate(answers), [policy.evaluate([answer]) for answer in answers]
    for field in ("logp_cot", "logp_action", "value"):
        torch.testing.assert_close(getattr(together, field), torch.cat([getattr(s, field) for s in alone]), atol=1e-4, rtol=0)


def test_demonstrations_split_at_the_text_and_train(policy):
    images, texts, found = states()
    shown = [prompts.demonstration(info, env.expert_action(info)) for name, _, info in found]
    answers = policy.demonstrate(images, texts, shown)
    for answer, text in zip(answers, shown):
        head, tail = (policy.tokenizer.decode(part, skip_special_tokens=True) for part in (answer.tokens[:answer.action_at], answer.tokens[answer.action_at:]))
        assert answer.text == text and '"action":' not in head and prompts.find_keys(tail)
    scores = policy.evaluate(answers)
    (scores.logp_cot + scores.logp_action).mean().neg().backward()
    assert all(torch.isfinite(p.grad).all() for p in policy.model.parameters() if p.grad is not None)
    policy.zero_grad()


def test_no_special_token_but_the_end_can_be_sampled(policy):
    possible = policy.log_probs(torch.zeros(1, len(policy.forbidden)))[0] > -torch.inf
    assert {i for i in policy.tokenizer.all_special_ids if possible[i]} == policy.eos and possible.sum() > 100


@pytest.mark.parametrize("family", ["llava", "gemma3"])  # Gemma's embeddings are its head's weights
def test_in_bfloat16_log_probabilities_are_not_rounded(family, checkpoints):
    policy = VLMPolicy(*load_model(str(checkpoints(family)), dtype=torch.bfloat16), temperature=0.2, max_new_tokens=4)
    policy.add_lora(4, 8)
    head = policy.model.get_output_embeddings().weight
    assert head.dtype == torch.float32 and not head.requires_grad
    assert policy.model.get_input_embeddings().weight.dtype == policy.model.dtype == torch.bfloat16
    answers = policy.act(*states()[:2])
    scores = policy.evaluate(answers[:1])  # hidden: of the prompt's last token and of the answer's
    exact = torch.log_softmax(policy.hidden[0].double() @ head.double().T / 0.2 + policy.forbidden, -1)[:-1]
    torch.testing.assert_close(scores.logps[0].double(), exact[range(4), answers[0].tokens], atol=1e-5, rtol=0)


def test_added_white_space_can_be_sampled_but_nothing_else_that_was_added(checkpoints):
    policy = VLMPolicy(*load_model(str(checkpoints("gemma3"))))
    ids = policy.tokenizer.convert_tokens_to_ids(["\n\n", "\u2581\u2581", "<table>", "<img>"])
    assert policy.forbidden[ids].tolist() == [0, 0, -torch.inf, -torch.inf]


def test_gradient_checkpointing_changes_no_gradient(checkpoints):
    def gradients(checkpointed):
        policy = VLMPolicy(*load_model(str(checkpoints("llava"))))
        if checkpointed:
            policy.checkpoint_gradients()
        torch.manual_seed(0)
        policy.add_lora(4, 8)
        images, texts, found = states()
        scores = policy.evaluate(policy.demonstrate(images, texts, ['{"action": "hit"}'] * 6))
        scores.logp_action.sum().backward()
        return torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None])
    one, other = gradients(True), gradients(False)
    torch.testing.assert_close(one, other)
    assert one.abs().sum() > 0


@pytest.mark.parametrize("family, tokens", [("llava_next", (56 // 14) ** 2), ("idefics3", 4)])
def test_one_tile_is_read_with_the_same_weights(family, tokens, checkpoints):
    tiled, processor = load_model(str(checkpoints(family)), image_tiles="anyres")
    one, _ = loaded = load_model(str(checkpoints(family)))
    weights = dict(tiled.state_dict())
    assert all(torch.equal(value, weights[name]) for name, value in one.state_dict().items())
    images, texts, _ = states()
    inputs = VLMPolicy(*loaded).encode(images, texts)[0]["input_ids"]
    many = VLMPolicy(tiled, processor).encode(images, texts)[0]["input_ids"]
    image = one.config.image_token_id
    assert (inputs == image).sum() == tokens < (many == image).sum()


@pytest.mark.parametrize("family, dtype", [(family, "float32") for family in ("llava_next", "gemma3", "qwen_whole", "internvl") if family in FAMILIES]
                         + [("llava", "bfloat16")])
def test_a_whole_run_with_another_model(family, dtype, checkpoints, tmp_path, capsys):
    out = tmp_path / "run"
    train.main(["--env", "blackjack", "--model", str(checkpoints(family)), "--out", str(out), "--sft-steps", "2", "--sft-batch", "4", "--env-steps", "16",
                "--rollout-steps", "8", "--num-envs", "4", "--minibatch", "4", "--epochs", "1", "--max-new-tokens", "8", "--eval-episodes", "4",
                "--lora-rank", "4", "--kl-coef", "0.1", "--dtype", dtype])
    assert "memory expected" in capsys.readouterr().out
    assert json.loads((out / "config.json").read_text())["preset"] == "paper"
    assert (out / "sft/adapter_model.safetensors").exists() and not (out / "sft/model.safetensors").exists()  # one copy of the base weights on disk
    rl = [row for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if row["stage"] == "rl"]
    assert len(rl) == 2 and all(row["first_ratio_error"] < (1e-4 if dtype == "float32" else 1e-6) for row in rl)
    policy, _ = train.load_run(out)
    answers = policy.demonstrate(*states()[:2], ['{"action": "hit"}'] * 6)
    again, _ = train.load_run(out)
    torch.testing.assert_close(policy.evaluate(answers).logp_action, again.evaluate(answers).logp_action)


@pytest.mark.parametrize("what", ["no weights", "too few weights", "no chat template", "text only", "nothing", "no folder", "no package"])
def test_a_folder_that_holds_no_usable_model_gives_one_line(what, checkpoints, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "model"
    if what == "nothing":
        folder.mkdir()
    elif what == "no folder":
        pass
    elif what == "text only":
        tf.MistralForCausalLM(tf.MistralConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                                         num_key_value_heads=2, vocab_size=50)).save_pretrained(folder)
    elif what == "no package":
        folder.mkdir()
        monkeypatch.setattr(policies.AutoConfig, "from_pretrained", lambda name, **kwargs: None)
        monkeypatch.setattr(policies.AutoProcessor, "from_pretrained", Mock(side_effect=ImportError("\nIts videos want a package.\n")))
    elif what == "too few weights":
        shutil.copytree(checkpoints("llava"), folder)
        file = folder / "model.safetensors"
        save_file({name: x for name, x in load_file(file).items() if "projector" not in name}, file, {"format": "pt"})
    else:
        shutil.copytree(checkpoints("llava"), folder)
        for file in folder.glob("*.safetensors" if what == "no weights" else "chat_template*"):
            file.unlink()
    with pytest.raises(SystemExit) as stop:
        train.main(["--env", "blackjack", "--model", str(folder), "--out", str(tmp_path / "run")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and str(folder) in error and not (tmp_path / "run").exists()


def test_code_that_comes_with_a_model_runs_only_where_it_is_asked_for(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "stranger", "auto_map": {"AutoConfig": "stranger.Config"}}))
    (tmp_path / "stranger.py").write_text("raise ValueError('the stranger ran')")
    with pytest.raises(ValueError, match="custom code"):
        load_model(str(tmp_path))
    with pytest.raises(ValueError, match="the stranger ran"):
        load_model(str(tmp_path), trust_remote_code=True)
