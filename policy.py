"""The agent: a vision-language model that answers pictures and prompts, and a value head.

    policy = VLMPolicy(*load_model("tiny"))    # or any image-text-to-text model of `transformers`
    policy.add_lora(rank=16, alpha=32)
    answers = policy.act(images, prompts)      # sample v_out, with log-probabilities and values
    scores = policy.evaluate(answers)          # the same quantities again, with gradients

`act` and `evaluate` agree, so the PPO ratio is 1 before the first gradient step. Neither has
dropout, both exclude the same tokens, and log-probabilities are float32 at the sampling
temperature.

Read `Answer`, `Scores` and `VLMPolicy`: first `act` and `evaluate`, then what they call.
Letters in shapes: N samples, L answer tokens, V vocabulary, D width of the hidden states.

`python policy.py` lets the model answer one picture.
"""
import argparse
import copy
import gc
import hashlib
import json
import os
import sys
import warnings
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.nn.functional import interpolate, pad
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    MistralConfig,
    PreTrainedTokenizerFast,
)
from transformers.cache_utils import DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import env
from prompts import CARD_TASKS, action_start, build_prompt, corpus

# Tensors of a processor with one number for each token. (Type ids tell text from picture.) All
# other tensors belong to the picture.
TEXT_KEYS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


@dataclass
class Answer:
    """One answer v_out = v_tht + v_act, with all that is needed to score it again."""

    inputs: dict              # picture and prompt as the model's tensors, unpadded, batch size 1
    tokens: torch.Tensor      # (L,) int64, with the end-of-sequence token if there is one
    num_cot_tokens: int       # the first num_cot_tokens tokens are v_tht, the rest is v_act
    text: str
    logp_cot: float = 0.0     # log p(v_tht | o, v_in), summed over tokens
    logp_action: float = 0.0  # log p(v_act | o, v_in, v_tht), summed over tokens
    value: float = 0.0        # V(o, v_in)
    token_logps: torch.Tensor | None = None  # (L,) log p of each token; None for a demonstration


@dataclass
class Scores:
    """What `evaluate` returns: float32 tensors of N answers, with gradients where they are on."""

    logp_cot: torch.Tensor     # (N,)
    logp_action: torch.Tensor  # (N,)
    value: torch.Tensor        # (N,)
    entropy: torch.Tensor      # (N,) mean over the answer's tokens, in nats; no gradient
    token_logps: torch.Tensor | None = None  # (N, L) log p of each token, 0 after an answer's end
    token_mask: torch.Tensor | None = None   # (N, L) bool: False after an answer's end


class VLMPolicy(nn.Module):
    """A vision-language model with a value head.

    model: any `transformers` image-text-to-text model; processor: its processor, with a chat
    template; temperature: of sampling and of all log-probabilities; max_new_tokens: the longest
    answer.
    """

    def __init__(self, model, processor, temperature=1.0, max_new_tokens=96):
        super().__init__()
        self.model = model.eval()    # no dropout, neither in sampling nor in scoring
        self.processor = processor
        self.tokenizer = processor.tokenizer
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.temperature = temperature
        self.max_new_tokens = max_new_tokens

        # The language head, from hidden states to logits, computes in float32. bfloat16 has 8 bits
        # of precision. A low temperature makes the rounding error of a logit larger: it alone could
        # move a ratio out of the clip range.
        self.head = model.get_output_embeddings()
        if self.head.weight.dtype != torch.float32:
            self.head = copy.deepcopy(self.head).float().requires_grad_(False)

        # The value head is an MLP on the last hidden state of the prompt's last token (paper,
        # appendix). Its first layer only subtracts a fixed mean and divides by a fixed deviation,
        # which `standardise` sets.
        width = self.head.in_features
        self.value_head = nn.Sequential(
            nn.BatchNorm1d(width, affine=False),
            nn.Linear(width, 1024), nn.ReLU(),
            nn.Linear(1024, 512), nn.ReLU(),
            nn.Linear(512, 1),
        ).to(model.device).eval()

        self.eos_ids = end_of_sequence_ids(model, self.tokenizer)
        forbidden = forbidden_tokens(self.head.out_features, self.tokenizer, self.eos_ids)  # (V,)
        self.register_buffer("forbidden", forbidden.to(model.device), persistent=False)

        self.checkpointed_layers = []  # filled by `checkpoint_gradients`
        # Only Qwen's models have these; see `next_input`, which can wait
        self.position_counters = [m for m in model.modules() if hasattr(m, "rope_deltas")]

    # -- Sampling ----------------------------------------------------------------------------------

    @torch.no_grad()
    def act(self, images, questions):
        """Sample an answer to each of N pictures and prompts; returns a list of N `Answer`.

        images: (N, height, width, 3) uint8; questions: N strings, the prompts v_in.
        """
        # 1. Turn pictures and prompts into tensors
        inputs = self.encode(images, questions)

        # 2. Write all answers together, token by token
        tokens, token_logps, lengths, values = self.generate(self.collate(inputs))

        # 3. Cut each answer at its end, and sum the log-probabilities of its two parts
        answers = []
        for i in range(len(inputs)):
            answer = self.make_answer(inputs[i], tokens[i, :lengths[i]])
            logps = token_logps[i, :lengths[i]]                                # (L,)
            answer.token_logps = logps
            answer.logp_cot = logps[:answer.num_cot_tokens].sum().item()
            answer.logp_action = logps[answer.num_cot_tokens:].sum().item()
            answer.value = values[i].item()
            answers.append(answer)
        return answers

    def generate(self, batch):
        """Sample answers to N prompts, a batch of `collate`.

        Returns tokens (N, L) int64, their log-probabilities (N, L), the answers' lengths (N,) with
        the end-of-sequence token, and the values (N,) of the states; all on the CPU.
        """
        # Read the prompts. The cache keeps what attention computed for them (keys and values), so
        # each new token needs a pass over itself alone. The prompts are padded on the left, so the
        # last hidden state of a row is that of its prompt's last token. The attention mask hides
        # the padding. Padding moves all tokens of a row to the right, which changes nothing: these
        # models have relative positions (RoPE), so attention sees only how far tokens are apart.
        cache = DynamicCache(config=self.model.config.get_text_config())
        attention_mask = batch["attention_mask"]                               # (N, prompt tokens)
        hidden = self.hidden_states(batch, keep=1, past_key_values=cache)      # (N, 1, D)
        values = self.value_of(hidden[:, 0])                                   # (N,)

        num_answers = len(attention_mask)
        finished = torch.zeros(num_answers, dtype=torch.bool, device=hidden.device)
        lengths = torch.zeros(num_answers, dtype=torch.long, device=hidden.device)
        eos_ids = torch.tensor(self.eos_ids, device=hidden.device)
        tokens = []
        token_logps = []
        while True:
            # Sample the next token of every answer; what follows an answer's end is not used
            logits = self.head(hidden[:, -1])                                  # (N, V)
            log_probs = self.log_probs(logits)                                 # (N, V)
            token = torch.multinomial(log_probs.exp(), 1)                      # (N, 1)
            tokens.append(token)
            token_logps.append(log_probs.gather(1, token))                     # that of the token

            # An answer that has not ended is one token longer; the end-of-sequence token counts
            lengths += ~finished
            finished |= torch.isin(token[:, 0], eos_ids)
            if finished.all() or len(tokens) == self.max_new_tokens:
                break

            # Let the model read this token; all tokens before it are in the cache
            attention_mask = pad(attention_mask, (0, 1), value=1)              # (N, tokens so far)
            batch = self.next_input(token, attention_mask)  # this token and the mask
            hidden = self.hidden_states(batch, keep=1, past_key_values=cache)  # (N, 1, D)

        tokens = torch.cat(tokens, 1).cpu()                                    # (N, L)
        token_logps = torch.cat(token_logps, 1).cpu()                          # (N, L)
        return tokens, token_logps, lengths.cpu(), values.cpu()

    @torch.no_grad()
    def value(self, images, questions):
        """V(o, v_in) of N states, shape (N,)."""
        batch = self.collate(self.encode(images, questions))
        hidden = self.hidden_states(batch, keep=1)                             # (N, 1, D)
        return self.value_of(hidden[:, 0])

    # -- Scoring -----------------------------------------------------------------------------------

    def evaluate(self, answers):
        """Score N answers again, each under its own picture and prompt; returns `Scores`."""
        # 1. Run the model once
        hidden, tokens, token_mask, is_cot = self.read(answers)

        # 2. Hidden state 0 gives the value. Hidden state i gives the log-probabilities of answer
        # token i: up to there the model has read only what stands before that token
        value = self.value_of(hidden[:, 0])                                    # (N,)
        log_probs = self.log_probs(self.head(hidden[:, :-1]))                  # (N, L, V)

        # 3. Sum the log-probabilities of the tokens, thoughts and action apart
        token_logps = log_probs.gather(2, tokens[:, :, None]).squeeze(2)       # (N, L)
        token_logps = token_logps.masked_fill(~token_mask, 0)  # after the end all are 0
        logp_cot = (token_logps * is_cot).sum(1)                               # (N,)
        logp_action = (token_logps * ~is_cot).sum(1)                           # (N,)

        # The entropy is for the report. (Without the clamp a forbidden token gives 0 * -inf = NaN.)
        with torch.no_grad():
            token_entropy = -(log_probs.exp() * log_probs.clamp(min=-1e4)).sum(2)   # (N, L)
            token_entropy = token_entropy.masked_fill(~token_mask, 0)
            entropy = token_entropy.sum(1) / token_mask.sum(1)                      # (N,)
        return Scores(logp_cot, logp_action, value, entropy, token_logps, token_mask)

    def read(self, answers):
        """Let the model read N answers, each behind its own picture and prompt.

        Returns hidden states (N, L + 1, D), tokens (N, L), token_mask (N, L), which is False after
        an answer's end, and is_cot (N, L), True for the tokens of the thoughts. A state stands at
        the token that was read last, and predicts the next one: state 0 stands at the prompt's last
        token, and predicts answer token 0. The last state predicts nothing.

          padding | prompt ... last token | answer token 0 | ... | answer token L - 1
                               state 0      state 1                state L
        """
        # Put every answer behind its prompt
        batch = self.collate([answer.inputs for answer in answers])
        device = batch["input_ids"].device
        token_rows = [answer.tokens for answer in answers]
        tokens = pad_sequence(
            token_rows, batch_first=True, padding_value=self.tokenizer.pad_token_id)
        tokens = tokens.to(device)                                             # (N, L)
        lengths = torch.tensor([len(row) for row in token_rows], device=device)           # (N,)
        num_cot = torch.tensor([answer.num_cot_tokens for answer in answers], device=device)
        position = torch.arange(tokens.shape[1], device=device)                           # (L,)
        token_mask = position < lengths[:, None]                                          # (N, L)
        is_cot = position < num_cot[:, None]                                              # (N, L)
        batch = append_tokens(batch, tokens, token_mask)

        # The states before the prompt's last token are not needed
        hidden = self.hidden_states(batch, keep=tokens.shape[1] + 1)           # (N, L + 1, D)
        return hidden, tokens, token_mask, is_cot

    def demonstrate(self, images, questions, texts):
        """Make `Answer`s from N texts that nobody sampled, such as demonstrations."""
        inputs = self.encode(images, questions)
        rows = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        answers = []
        for sample_inputs, row in zip(inputs, rows):
            tokens = torch.tensor(row + [self.tokenizer.eos_token_id])         # (L,)
            answers.append(self.make_answer(sample_inputs, tokens))
        return answers

    # -- The model in three steps: hidden states, then log-probabilities and the value -------------

    @property
    def backbone(self):
        """The model without its language head.

        PEFT is the library that adds LoRA (the adapter). It puts the adapter into the model's
        layers, and a wrapper around the model. `get_base_model` takes the wrapper off; the adapter
        stays in the layers. Then `base_model`, of transformers, is the part below the head.
        """
        model = self.model
        if isinstance(model, PeftModel):
            model = model.get_base_model()
        return model.base_model

    def hidden_states(self, batch, keep, past_key_values=None):
        """The last hidden states (N, keep, D), float32, of the last `keep` tokens of a batch."""
        self.prepare_checkpoints()  # saves memory, if gradient checkpointing is on
        use_cache = past_key_values is not None
        output = self.backbone(**batch, past_key_values=past_key_values, use_cache=use_cache)
        return output.last_hidden_state[:, -keep:].float()

    def log_probs(self, logits):
        """Log-probabilities of the distribution that is sampled from; logits: (..., V) float32.

        `forbidden` is -infinity for tokens that must not be sampled, else 0.
        """
        return torch.log_softmax(logits / self.temperature + self.forbidden, -1)

    def value_of(self, hidden):
        """V (N,) from the hidden states (N, D) of the prompts' last tokens."""
        return self.value_head(hidden).squeeze(-1)

    @torch.no_grad()
    def standardise(self, inputs, microbatch=64):
        """Set mean and variance in the value head's first layer.

        inputs: many states, a list from `encode`. Most of a hidden state is the same for all
        pictures. Standardised, its differences are large enough for a fresh head to learn from.
        """
        hidden = []
        for i in range(0, len(inputs), microbatch):
            batch = self.collate(inputs[i: i + microbatch])
            hidden.append(self.hidden_states(batch, keep=1)[:, 0])             # (microbatch, D)
        hidden = torch.cat(hidden)                                             # (states, D)
        self.value_head[0].running_mean = hidden.mean(0)
        self.value_head[0].running_var = hidden.var(0, correction=0)

    # -- From pictures and texts to tensors --------------------------------------------------------

    def encode(self, images, questions):
        """`Answer.inputs` for each of N pictures, (N, height, width, 3) uint8, and prompts."""
        texts = [self.chat_text(question) for question in questions]
        bos = self.tokenizer.bos_token  # begin of sequence; some chat templates write it already
        template_has_bos = bool(bos) and texts[0].startswith(bos)
        batch = self.processor(
            images=[[image] for image in images],  # a list of pictures for each text
            text=texts,
            add_special_tokens=not template_has_bos,  # else there would be two of them
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        lengths = batch["attention_mask"].sum(1).tolist()

        # Take the samples apart, because the update puts them into other batches. Text loses its
        # padding. A picture's tensor is cut into N equal parts: pixels (N, 3, height, width) become
        # N times (1, 3, height, width). (The models called Qwen list the patches of all pictures in
        # one tensor. All pictures have the same size, so the parts are equal there, too.)
        inputs = [{} for _ in questions]
        for key, x in batch.items():
            if x.is_floating_point():
                x = x.to(self.model.dtype)
            for i, part in enumerate(x.chunk(len(questions))):
                if key in TEXT_KEYS:
                    part = part[:, -lengths[i]:]                               # (1, prompt tokens)
                inputs[i][key] = part
        return inputs

    def chat_text(self, question):
        """Picture and prompt as the model's chat template writes a user's message."""
        content = [{"type": "image"}, {"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False)

    def collate(self, inputs):
        """Join a list of `Answer.inputs` into one batch, with the text padded on the left."""
        batch = {}
        for key in inputs[0]:
            parts = [sample[key] for sample in inputs]
            if key in TEXT_KEYS:
                padding = self.tokenizer.pad_token_id if key == "input_ids" else 0
                rows = [part[0] for part in parts]
                x = pad_sequence(                                              # (N, prompt tokens)
                    rows, batch_first=True, padding_value=padding, padding_side="left")
            else:
                x = torch.cat(parts)
            batch[key] = x.to(self.model.device)
        return batch

    def make_answer(self, inputs, tokens):
        """An `Answer` of tokens (L,), split where the text of its action begins."""
        ids = tokens.tolist()
        return Answer(inputs, tokens, self.count_cot_tokens(ids), self.decode(ids))

    def count_cot_tokens(self, ids):
        """How many tokens are thoughts: those that end before `"action":` begins.

        One token can hold the end of the thoughts and the beginning of the key. It counts as
        action. If there is no key, all tokens are thoughts.
        """
        start = action_start(self.decode(ids))

        # Take tokens away from the end, until nothing of the action is left
        num_tokens = len(ids)
        while len(self.decode(ids[:num_tokens])) > start:
            num_tokens -= 1
        return num_tokens

    def decode(self, ids):
        return self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    # -- The adapter -------------------------------------------------------------------------------

    def add_lora(self, rank, alpha):
        """Freeze the model; put a fresh LoRA on all its linear layers, vision tower and projector
        included."""
        config = LoraConfig(
            r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules="all-linear")
        self.model = get_peft_model(self.model, config).eval()

    def merge_lora(self):
        """Add the adapter to the weights and drop it."""
        self.model = self.model.merge_and_unload().eval()

    def save(self, directory):
        """Write the adapter and the value head to `directory`, as safetensors."""
        self.model.save_pretrained(directory / "adapter")
        save_file(self.value_head.state_dict(), directory / "value_head.safetensors")

    def load(self, directory):
        """Read what `save` wrote. Raises OSError or ValueError where it is not there."""
        self.model = PeftModel.from_pretrained(
            self.model, str(directory / "adapter"), is_trainable=True,
            torch_device=str(self.model.device)).eval()
        self.value_head.load_state_dict(load_file(directory / "value_head.safetensors"))

    # -- Not needed by the method: memory, bfloat16, Qwen ------------------------------------------

    def checkpoint_gradients(self):
        """Trade time for memory: keep no activations inside the layers, compute them again.

        (This is called gradient checkpointing. It has nothing to do with a run's checkpoints.)
        """
        self.model.activation_checkpointing_enable()
        for module in self.model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                self.checkpointed_layers.append(module)

    def prepare_checkpoints(self):
        """Switch gradient checkpointing on for a pass with gradients, else off.

        The library uses it only in a layer whose attribute `training` is true, and allows no cache
        there. This sets the attribute of the layer alone: `layer.train()` would also switch on the
        dropout inside.
        """
        for layer in self.checkpointed_layers:
            layer.training = torch.is_grad_enabled()

    @torch.no_grad()
    def rescore(self, answers, microbatch):
        """Replace the scores of sampled `Answer`s by those of `evaluate`, as the update will
        compute them.

        Sampling uses a cache and other padding than `evaluate`. In bfloat16 the two round
        differently, and the first ratios would not be 1.
        """
        for i in range(0, len(answers), microbatch):
            piece = answers[i: i + microbatch]
            scores = self.evaluate(piece)
            for j, answer in enumerate(piece):
                answer.logp_cot = scores.logp_cot[j].item()
                answer.logp_action = scores.logp_action[j].item()
                answer.value = scores.value[j].item()
                answer.token_logps = scores.token_logps[j, :len(answer.tokens)].cpu()

    def next_input(self, token, attention_mask):
        """The model's input for one more token (N, 1) of every answer.

        Qwen's models number the tokens of a picture by row and column, so a picture has fewer
        positions than tokens. The model finds the difference (`rope_deltas`) while it reads the
        prompts, but must be told the positions while it writes.
        """
        batch = {"input_ids": token, "attention_mask": attention_mask}
        for module in self.position_counters:
            if module.rope_deltas is not None:
                # How many tokens stand before this one, without padding. Qwen has three positions
                # for a token: time, row and column. For text they are equal.
                place = attention_mask.sum(1, keepdim=True) - 1                # (N, 1)
                position = place + module.rope_deltas                          # (N, 1)
                batch["position_ids"] = position.expand(3, -1, -1)             # (3, N, 1)
        return batch


def append_tokens(batch, tokens, token_mask):
    """Put tokens (N, L) behind the prompts of a batch; token_mask (N, L) is False at padding."""
    longer = dict(batch)
    for key in TEXT_KEYS:
        if key in batch:
            new = torch.zeros_like(tokens)  # type ids: 0 means text
            if key == "input_ids":
                new = tokens
            if key == "attention_mask":
                new = token_mask.long()
            longer[key] = torch.cat([batch[key], new], 1)
    return longer


def end_of_sequence_ids(model, tokenizer):
    """The sorted ids of the tokens that end an answer."""
    ids = model.generation_config.eos_token_id
    if not isinstance(ids, list):
        ids = [ids]
    return sorted({*ids, tokenizer.eos_token_id} - {None})


def forbidden_tokens(vocab_size, tokenizer, eos_ids):
    """A mask (V,) to add to the logits: -infinity for tokens that must not be sampled, else 0.

    In a prompt, placeholder tokens mark the picture's place. A sampled one would crash the next
    forward pass. Three kinds of tokens are never sampled: special tokens, but for the end of
    sequence; tokens that were added to the vocabulary, but for white space (Gemma has such); and
    ids for which the tokenizer has no token.
    """
    forbidden_ids = set(tokenizer.all_special_ids)
    for token_id, token in tokenizer.added_tokens_decoder.items():
        is_white_space = not token.content.replace("\u2581", " ").strip()  # this sign is a space
        if token.special or not is_white_space:
            forbidden_ids.add(token_id)
    forbidden_ids |= set(range(vocab_size)) - set(tokenizer.get_vocab().values())
    forbidden_ids -= set(eos_ids)

    # (A tokenizer may know more tokens than the model has logits)
    forbidden = torch.zeros(vocab_size)
    forbidden[[token_id for token_id in forbidden_ids if token_id < vocab_size]] = -torch.inf
    return forbidden


# -------------------------------------------------------------------------------------------------
# The paper's baseline without language


def shrink(images, height, width):
    """Pictures (N, H, W, 3), uint8, as a tensor (N, 3, height, width), uint8."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)                      # (N, 3, H, W)
    return interpolate(pixels, (height, width), mode="bilinear", antialias=True)


class CNNPolicy(nn.Module):
    """A picture, convolutions, and one head each for action and value; no words, no SFT.

    It has the interface of `VLMPolicy` and answers with an action alone. actions: those of one
    task.
    """

    def __init__(self, actions, temperature=1.0):
        super().__init__()
        self.actions = actions
        self.temperature = temperature
        self.body = nn.Sequential(
            nn.Conv2d(3, 32, 8, 4), nn.ReLU(),                                 # (N, 32, 24, 24)
            nn.Conv2d(32, 64, 4, 2), nn.ReLU(),                                # (N, 64, 11, 11)
            nn.Conv2d(64, 64, 3), nn.ReLU(),                                   # (N, 64, 9, 9)
            nn.Flatten(),
            nn.Linear(64 * 9 * 9, 512), nn.ReLU(),                             # (N, 512)
        )
        self.action_head = nn.Linear(512, len(actions))
        self.value_head = nn.Linear(512, 1)

    def look(self, pixels):
        """Log-probabilities of the actions (N, actions) and values (N,).

        pixels: (N, 3, 100, 100) uint8.
        """
        hidden = self.body(pixels.to(self.value_head.weight.device) / 255)     # (N, 512)
        log_probs = torch.log_softmax(self.action_head(hidden) / self.temperature, -1)
        return log_probs, self.value_head(hidden).squeeze(-1)

    @torch.no_grad()
    def act(self, images, questions):
        """Sample an action for each of N pictures; returns a list of N `Answer`."""
        pixels = shrink(images, 100, 100)
        log_probs, values = self.look(pixels)
        actions = torch.multinomial(log_probs.exp(), 1).cpu()                  # (N, 1)
        logps = log_probs.cpu().gather(1, actions)                             # (N, 1)

        # An answer is one token, the action's number
        answers = []
        for i, number in enumerate(actions[:, 0].tolist()):
            answers.append(Answer(
                inputs={"pixels": pixels[i]},
                tokens=actions[i],
                num_cot_tokens=0,
                text=f'"action": "{self.actions[number]}"',
                logp_action=logps[i].item(),
                value=values[i].item(),
                token_logps=logps[i],
            ))
        return answers

    @torch.no_grad()
    def value(self, images, questions):
        """V of N pictures, shape (N,)."""
        _, values = self.look(shrink(images, 100, 100))
        return values

    def evaluate(self, answers):
        """Score N answers again; returns `Scores`."""
        pixels = torch.stack([answer.inputs["pixels"] for answer in answers])
        log_probs, values = self.look(pixels)
        actions = torch.stack([answer.tokens for answer in answers]).to(log_probs.device)
        logps = log_probs.gather(1, actions)                                   # (N, 1)
        entropy = -(log_probs.exp() * log_probs).sum(1).detach()               # (N,)
        return Scores(
            logp_cot=torch.zeros_like(values),
            logp_action=logps[:, 0],
            value=values,
            entropy=entropy,
            token_logps=logps,
            token_mask=torch.ones_like(logps, dtype=torch.bool),
        )

    def save(self, directory):
        save_file(self.state_dict(), directory / "cnn.safetensors")

    def load(self, directory):
        self.load_state_dict(load_file(directory / "cnn.safetensors"))


# -------------------------------------------------------------------------------------------------
# The built-in model: a LLaVA that is small enough for a laptop

CHAT_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}\nAnswer: {% endif %}"
)


def build_tiny(seed=0, texts=None):
    """(model, processor) of a LLaVA of about 1 M parameters, built here: nothing is downloaded.

    texts: what its tokenizer learns from (default: prompts and answers of the card games); seed: of
    its random weights. A picture is shrunk to 100 x 100 pixels and cut into 25 patches of 20 x 20,
    about one for each card. Everything else is the code that a LLaVA of 7 B parameters runs.
    """
    tokenizer = build_tokenizer(texts or corpus())
    image_processor = CLIPImageProcessorPil(
        size={"height": 100, "width": 100}, do_center_crop=False, resample=2)  # 2: bilinear
    # CLIP puts one additional token before its patches; the strategy "default" leaves it out
    processor = LlavaProcessor(
        image_processor, tokenizer, patch_size=20, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=CHAT_TEMPLATE)

    vision_config = CLIPVisionConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4,
        image_size=100, patch_size=20)
    text_config = MistralConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=1024,
        sliding_window=None, pad_token_id=0)
    config = LlavaConfig(
        vision_config=vision_config, text_config=text_config,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), vision_feature_layer=-1)  # last

    with torch.random.fork_rng(devices=[]):  # the global generator goes on as if nothing happened
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
        # The library's deviation of 0.02 suits a width of 4096. At 128 it makes so quiet a network
        # that it never learns to look at the picture; Xavier's keeps the size of the signal.
        for module in model.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
    return model, processor


def build_tokenizer(texts):
    """A tokenizer that learns from `texts`, by byte-pair encoding (BPE): neighbours that are often
    together become one token. Every line of instructions is one token."""
    # Cut a text into pieces; no token is larger than its piece. Numbers and operators are pieces of
    # their own. Words in a row are one piece, so that they may grow into one token.
    #
    # A card in a list is one piece with the sign before it, such as ["K" and , "10" are. Else the
    # model would mix up the card 10 and the number 10.
    card = r'(?:\[|, )"\w{1,2}"'
    pieces = Regex("|".join([
        card,
        r"\d+",                     # a number
        r"[-+*/()=>]",              # an operator or bracket
        r"[A-Za-z][A-Za-z ]*",      # words, with the spaces between and behind them
        rf"(?:(?!{card})[^-+*/()=>\dA-Za-z])+",    # all else, such as quotes
    ]))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(pieces, "isolated"),  # each match is a piece
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),  # pieces as bytes
    ])
    tokenizer.decoder = decoders.ByteLevel()
    # Neighbours that are together less than `min_frequency` times stay apart. With a minimum of 20,
    # a rare number such as 13 would be two tokens.
    trainer = trainers.BpeTrainer(
        vocab_size=1024, min_frequency=5, special_tokens=["<pad>", "<s>", "</s>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)

    # The instructions never change: a single token for each line of them halves the cost of a step.
    # `corpus` of prompts.py plays 100 episodes a game, and each of their prompts has such a line.
    lines = Counter()
    for text in texts:
        if "\n" in text:  # a prompt; answers have one line
            lines.update(text.split("\n"))
    instructions = [line for line, count in lines.items() if count >= 100 and len(line) > 20]
    # The model never samples these tokens, so no line may become one that an answer has, too
    answers = [text for text in texts if "\n" not in text]
    instructions = [line for line in instructions if not any(line in text for text in answers)]
    tokenizer.add_tokens([AddedToken(line, normalized=False) for line in instructions])

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        additional_special_tokens=["<image>"])


# -------------------------------------------------------------------------------------------------
# Loading: models of `transformers`, and finished runs


def load_model(name, seed=0, texts=None, image_tiles="one", device="cpu", dtype=torch.float32,
               quantize=None, trust_remote_code=False):
    """(model, processor) for `name`: "tiny" (`build_tiny`), a model of the hub, or a folder with
    one.

    image_tiles: LLaVA-1.6 and Idefics3 cut pictures into tiles and read each beside the whole
    ("anyres"); "one" reads the whole alone, as the paper does. quantize: "4bit" for base weights in
    four bits (bitsandbytes, on cuda). Weights are read from safetensors alone. Python code that
    comes with a model is run only with trust_remote_code. Raises OSError or ValueError.
    """
    silence_libraries()
    if name == "tiny":
        model, processor = build_tiny(seed, texts)
        return model.to(device, dtype), processor

    # Read the configuration and the processor
    try:
        config = read_model_config(name, trust_remote_code)
        processor = AutoProcessor.from_pretrained(name, trust_remote_code=trust_remote_code)
    except ImportError as error:  # some processors want a package of their own
        raise ValueError(str(error).strip()) from None
    if not getattr(processor, "chat_template", None):
        raise ValueError("its processor has no chat template")

    # Let it read one tile a picture: Idefics3 has a switch, LLaVA-1.6 needs another class
    model_class = AutoModelForImageTextToText
    if image_tiles == "one":
        if getattr(processor.image_processor, "do_image_splitting", False):
            processor.image_processor.do_image_splitting = False
        if config.model_type == "llava_next":
            config, processor = without_tiles(config, processor)
            model_class = LlavaForConditionalGeneration

    # Read the weights; the library would make up those that are missing
    quantization = None
    if quantize:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    model, report = model_class.from_pretrained(
        name, config=config, dtype=dtype, device_map={"": device}, use_safetensors=True,
        quantization_config=quantization, trust_remote_code=trust_remote_code,
        output_loading_info=True)
    if report["missing_keys"]:
        raise ValueError(f"its weights lack {min(report['missing_keys'])}")
    text_config = model.config.get_text_config()
    for setting in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
        if getattr(text_config, setting, None) not in (None, 1):
            raise ValueError(f"it changes its logits ({setting}), and `VLMPolicy` does not")
    if model.config.model_type == "mllama":
        raise ValueError("its tokens have masks of pictures, which `VLMPolicy` does not know")
    return model, processor


def read_model_config(name, trust_remote_code=False):
    """The library's configuration of a model of the hub or in a folder. Raises as `load_model`."""
    looks_like_a_folder = name[:1] in ("/", ".", "~")
    if looks_like_a_folder and not Path(name).is_dir():  # the hub would complain of a bad name
        raise ValueError("there is no such folder")
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except OSError as error:
        if Path(name).is_dir():
            raise
        # Of a mistyped folder the library would say only that there is no connection
        raise OSError(f"there is no such folder, and the hub gives none: {error}") from error
    except (ValueError, ImportError):
        raise
    except Exception as error:  # a damaged configuration: errors of many kinds
        raise ValueError(f"its config.json cannot be used: {error}") from error


@lru_cache
def count_parameters(name, trust_remote_code=False):
    """The number of parameters of a model of the hub or in a folder; its weights are not read.

    Raises OSError, ValueError or ImportError where it cannot be told.
    """
    silence_libraries()
    config = read_model_config(name, trust_remote_code)
    try:
        with torch.device("meta"):  # tensors there have a shape, but no numbers
            model = AutoModelForImageTextToText.from_config(
                config, trust_remote_code=trust_remote_code)
    except (KeyError, AssertionError, RuntimeError) as error:  # sizes or names that cannot be
        raise ValueError(f"its config.json cannot be used: {error}") from error
    return model.num_parameters()


def model_identity(name, trust_remote_code=False):
    """A short text that differs for models with other weights: a digest, or the hub's revision."""
    folder = Path(name)
    if name == "tiny":
        return name
    if not folder.is_dir():
        return read_model_config(name, trust_remote_code)._commit_hash

    # Of each file of weights: its name, its size, and 64 kB at each of 16 places. The first of them
    # holds the header.
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for place in range(16):
                file.seek(place * size // 16)
                digest.update(file.read(65536))
    return digest.hexdigest()[:16]


def without_tiles(config, processor):
    """(configuration, processor) to read LLaVA-1.6 with LLaVA-1.5's class, which knows no tiles.

    The weights have the same names in both classes, and the tokenizer stays.
    """
    names = (
        "vision_config", "text_config", "image_token_id", "projector_hidden_act",
        "vision_feature_layer", "vision_feature_select_strategy", "multimodal_projector_bias",
    )
    config = LlavaConfig(**{name: getattr(config, name) for name in names})

    # A picture is shrunk to one tile
    tiled = processor.image_processor
    size = config.vision_config.image_size
    image_processor = CLIPImageProcessorPil(
        size={"height": size, "width": size}, do_center_crop=False, resample=tiled.resample,
        image_mean=tiled.image_mean, image_std=tiled.image_std)
    processor = LlavaProcessor(
        image_processor, processor.tokenizer, patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1, chat_template=processor.chat_template)
    return config, processor


def silence_libraries():
    """Switch off progress bars, and notes of the libraries that are no errors."""
    import huggingface_hub.utils.logging
    import transformers.utils.logging

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)


def build_policy(config, weights=None):
    """A fresh policy for `config` (a namespace with the names of train.py's flags).

    weights: a folder with SFT weights, or with an SFT adapter, which is merged.
    Raises OSError or ValueError where a task or the model cannot be made.
    """
    gc.collect()  # a model before this one refers to itself, and would stay in memory
    if config.alfworld == "thor":
        env.use_thor()
    names = config.env.split(",")
    for name in names:
        env.GAMES[name]()  # raises ValueError where its engine or its data is missing

    torch.manual_seed(config.seed)
    if config.policy == "cnn":
        actions = env.GAMES[config.env].actions
        return CNNPolicy(actions, config.temperature).to(config.device)

    # SFT leaves either a whole model, or an adapter for the model that it began with
    has_adapter = weights is not None and (weights / "adapter_config.json").exists()
    source = config.model
    began_with = getattr(config, "base", None)  # `model_identity`, which train.py has written
    if weights is not None and not has_adapter:
        source = str(weights)
    elif began_with is not None:
        if began_with != model_identity(config.model, config.trust_remote_code):
            raise ValueError("its weights are not those that the run began with")

    # The built-in model's tokenizer learns from the tasks that it will play. The card games share
    # one, so that runs can be compared; any other task has its own.
    texts = None
    if source == "tiny":
        if set(names) <= set(CARD_TASKS):
            names = CARD_TASKS
        texts = corpus(names, config.prompt, config.obs)

    device = config.device
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # torchrun gives each process a GPU
    model, processor = load_model(
        source, config.seed, texts, config.image_tiles, device, getattr(torch, config.dtype),
        config.quantize, config.trust_remote_code)

    policy_class = VLMPolicy
    if getattr(config, "project", None):  # a file in docs/projects may have a class of its own
        project = import_module(f"docs.projects.{config.project}")
        policy_class = getattr(project, "Policy", VLMPolicy)
    policy = policy_class(model, processor, config.temperature, config.max_new_tokens)
    if has_adapter:
        policy.model = PeftModel.from_pretrained(policy.model, str(weights), torch_device=device)
        policy.merge_lora()
    if config.gradient_checkpointing:
        policy.checkpoint_gradients()
    return policy


def read_config(directory, trust_remote_code=False):
    """The configuration of the run in `directory`, a namespace.

    Whether to trust a model's code is for the caller to say, not for a file. Raises OSError,
    ValueError or TypeError where there is no configuration that can be read.
    """
    config = json.loads((Path(directory) / "config.json").read_text())
    config["trust_remote_code"] = trust_remote_code
    return argparse.Namespace(**config)


def load_policy(config, directory, which):
    """The policy of a finished run: "rl", "sft" (as it was before PPO) or "untrained".

    config: the run's, from `read_config`. Raises OSError or ValueError where it is not there.
    """
    if which == "sft" and config.policy == "cnn":
        raise ValueError("a CNN has no SFT")
    weights = None
    if which != "untrained" and config.policy == "vlm":
        weights = Path(directory) / "sft"
    policy = build_policy(config, weights)
    if which == "rl":
        policy.load(Path(directory))
    return policy


def load_run(directory, which="rl", trust_remote_code=False):
    """(policy, configuration) of a finished run; see `read_config` and `load_policy`."""
    config = read_config(directory, trust_remote_code)
    return load_policy(config, directory, which), config


# -------------------------------------------------------------------------------------------------
# On its own: one picture, one answer


def main():
    parser = argparse.ArgumentParser(
        description="Let a model answer one picture.",
        usage=argparse.SUPPRESS)  # without a usage text an error is one line
    add = parser.add_argument
    add("--env", choices=env.GAMES, default="blackjack", help="the task [blackjack]")
    add("--model", default="tiny", help="tiny, a model of the hub, or a folder [tiny]")
    add("--seed", type=int, default=0, help="fixes picture and answer [0]")
    args = parser.parse_args()
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed {args.seed} is not from 0 to {2**32 - 1}")

    torch.manual_seed(args.seed)
    try:
        game = env.GAMES[args.env]()
    except ValueError as error:  # ALFWorld is not installed
        parser.error(str(error))
    image, info = game.reset(seed=args.seed)
    try:
        model, processor = load_model(args.model, texts=corpus([args.env]))
    except (OSError, ValueError) as error:
        parser.error(f"cannot load --model {args.model}: {str(error).splitlines()[0]}")
    policy = VLMPolicy(model, processor, temperature=0.5)
    answer = policy.act(image[None], [build_prompt(info)])[0]

    # Show the tokens one by one, each with its log-probability where that is not near 0
    pieces = []
    for token, logp in zip(answer.tokens.tolist(), answer.token_logps.tolist()):
        piece = ascii(policy.tokenizer.decode([token]))[1:-1]  # a line break as \n, no quotes
        if logp < -0.005:
            piece += f" ({logp:.2f})"
        pieces.append(piece)
    show("thoughts", pieces[:answer.num_cot_tokens], color=36)
    show("action", pieces[answer.num_cot_tokens:], color=33)
    print(f"log p(thoughts) {answer.logp_cot:.3f}, log p(action) {answer.logp_action:.3f}, "
          f"value {answer.value:.3f}")


def show(name, pieces, color):
    """Print tokens with bars between them, coloured in a terminal."""
    text = "|".join(pieces)
    if sys.stdout.isatty():
        text = f"\033[{color}m{text}\033[0m"
    print(f"{name}: {text}")


if __name__ == "__main__":
    main()
