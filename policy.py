"""The agent: a vision-language model that answers pictures and prompts, and a value head.

    policy = VLMPolicy(*load_model("tiny"))      # or any image-text-to-text model of `transformers`
    policy.add_lora(rank=16, alpha=32)
    answers = policy.act(images, prompts)        # sample v_out, with log-probabilities and values
    scores = policy.evaluate(answers)            # the same quantities again, with gradients

`act` and `evaluate` agree to rounding, so the PPO ratio is 1 before the first gradient step: there is no
dropout in either, both mask the same tokens, and log-probabilities are float32 at the sampling temperature.

`python policy.py` lets the model answer one picture.
"""
import bisect
import sys
import warnings
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.utils.logging import set_verbosity_error as quiet_hub
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import interpolate
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig, AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig, LlavaConfig,
    LlavaForConditionalGeneration, LlavaProcessor)
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from prompts import action_start, corpus

set_verbosity_error()  # what the library notes on loading is no error: an unused weight, an old name
quiet_hub()  # five retries where the hub cannot be reached: the error at the end says it
disable_progress_bar()  # "Loading weights" and "Writing model shards" of a four-megabyte model
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)  # peft's old name


@dataclass
class Answer:
    """One answer v_out = v_tht + v_act, with all that is needed to score it again under its own prompt."""
    inputs: dict            # picture and prompt as the processor made them, unpadded, batch size 1
    tokens: torch.Tensor    # (length,) int64, with the end-of-sequence token if there is one
    action_at: int          # index of the first token of v_act; == length if there is no `"action":`
    text: str
    logp_cot: float = 0.0   # log p(v_tht | o, v_in), summed over tokens
    logp_action: float = 0.0  # log p(v_act | o, v_in, v_tht), summed over tokens
    value: float = 0.0      # V(o, v_in)
    logps: torch.Tensor | None = None  # log p of each token, float64; None if the answer was given, not sampled


@dataclass
class Scores:
    """What `evaluate` returns, each of shape (batch,), float32, with gradients where they are on."""
    logp_cot: torch.Tensor
    logp_action: torch.Tensor
    value: torch.Tensor
    entropy: torch.Tensor  # mean over the answer's tokens, in nats; no gradient
    logps: torch.Tensor | None = None    # (batch, tokens) log p of each token, 0 past an answer's end
    written: torch.Tensor | None = None  # (batch, tokens) bool: not past an answer's end


def shrink(images, height, width):
    """Pictures (N, H, W, 3), uint8, as a tensor of another size."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    return interpolate(pixels, (height, width), mode="bilinear", antialias=True).permute(0, 2, 3, 1)


def sample(logp):
    """Draw one index a row from log-probabilities (N, vocabulary); returns (N, 1)."""
    if logp.device.type != "cpu":
        return torch.multinomial(logp.exp(), 1)
    # `multinomial` takes a random number a word; one a row does, by the inverse of the distribution function.
    above = logp.exp().double().cumsum(-1)
    return torch.searchsorted(above, torch.rand_like(above[:, :1]) * above[:, -1:], right=True)


class RoomyLayer(DynamicLayer):
    """The keys and values of one layer, with room for those to come: the library copies all of them at every token."""

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.room = torch.empty(2, 0, 0, 0, 0)
        n, m = self.get_seq_length(), key_states.shape[2]
        if self.room.shape[1] != len(key_states) or self.room.shape[3] < n + m:
            self.room = key_states.new_empty(2, *key_states.shape[:2], n + m + 32, key_states.shape[3])
            if n:
                self.room[:, :, :, :n] = torch.stack([self.keys, self.values])
        self.room[0, :, :, n: n + m], self.room[1, :, :, n: n + m] = key_states, value_states
        self.keys, self.values = self.room[:, :, :, :n + m]
        return self.keys, self.values


class LoRAProduct(torch.autograd.Function):
    """x (W + s B A)^T + bias, given the sum: for the frozen W no gradient, for A and B what two thin products give."""

    @staticmethod
    def forward(ctx, total, bias, a, b, scale, x):
        ctx.save_for_backward(total, a, b, x)
        ctx.scale = scale
        return nn.functional.linear(x, total, bias)

    @staticmethod
    def backward(ctx, grad):
        total, a, b, x = ctx.saved_tensors
        rows, x = grad.flatten(0, -2), x.flatten(0, -2)
        grad_a, grad_b = (rows @ b).T @ x * ctx.scale, rows.T @ (x @ a.T) * ctx.scale
        return None, None, grad_a, grad_b, None, grad @ total if ctx.needs_input_grad[5] else None


class VLMPolicy(nn.Module):
    """A vision-language model with a value head.

    model: any `transformers` image-text-to-text model; processor: its processor, with a chat template;
    temperature: of sampling and of all log-probabilities; max_new_tokens: longest answer.
    """

    def __init__(self, model, processor, temperature=1.0, max_new_tokens=96):
        super().__init__()
        self.model, self.processor, self.tokenizer = model.eval(), processor, processor.tokenizer
        self.temperature, self.max_new_tokens = temperature, max_new_tokens
        width = model.get_output_embeddings().in_features
        # MLP D -> 1024 -> 512 -> 1 on the last hidden state of the prompt's last token (paper, appendix), standardised:
        # most of a hidden state is the same for all pictures, and what differs is too faint for the head to find.
        self.value_head = nn.Sequential(nn.BatchNorm1d(width, affine=False), nn.Linear(width, 1024), nn.ReLU(),
                                        nn.Linear(1024, 512), nn.ReLU(), nn.Linear(512, 1)).to(model.device).eval()
        # In bfloat16 a logit has 8 bits, and at a low temperature their rounding alone takes ratios past the clip:
        # the head, which no adapter changes, is float32 (a new tensor: the old one may be the embeddings' as well).
        head = model.get_output_embeddings()
        if head.weight.dtype != torch.float32:
            head.weight = nn.Parameter(head.weight.float(), requires_grad=False)
            if head.bias is not None:
                head.bias.data = head.bias.float()
            model.config.tie_word_embeddings = False
        # Its input is the last hidden state, whatever the model family calls it.
        head.register_forward_pre_hook(self._keep_hidden)
        eos = model.generation_config.eos_token_id
        self.eos = {*(eos if isinstance(eos, list) else [eos]), self.tokenizer.eos_token_id} - {None}
        # A sampled image placeholder would crash the next forward pass: no special token but the end may be sampled,
        # nor an added one (but Gemma's white space), nor any row of the vocabulary that the tokenizer does not know.
        forbidden, added = torch.zeros(head.out_features), self.tokenizer.added_tokens_decoder
        added = {i for i, token in added.items() if token.special or token.content.replace("\u2581", " ").strip()}
        forbidden[list(set(self.tokenizer.all_special_ids) | added)] = -torch.inf
        forbidden[len(self.tokenizer):] = -torch.inf
        forbidden[list(self.eos)] = 0
        self.register_buffer("forbidden", forbidden.to(model.device), persistent=False)
        self.shifting = [m for m in model.modules() if hasattr(m, "rope_deltas")]
        self.keep, layers = None, getattr(model.get_decoder(), "layers", [None])
        if hasattr(mlp := getattr(layers[-1], "mlp", None), "down_proj"):  # not a mixture of experts
            mlp.forward = partial(self._only_what_is_read, mlp.forward)
        self.read = {}  # prompt -> its part of `Answer.inputs`, where pictures do not change it
        self.checkpointed = []  # layers whose activations are computed again in the backward pass

    def checkpoint_gradients(self):
        """Trade time for memory: keep no activations inside the layers. (`forward` puts them into training mode.)"""
        self.model.activation_checkpointing_enable()
        self.checkpointed = [m for m in self.model.modules() if isinstance(m, GradientCheckpointingLayer)]

    def _keep_hidden(self, module, args):
        self.hidden = args[0].float()
        return self.hidden

    def _only_what_is_read(self, mlp, x):
        """The last layer's MLP, for the places that `forward` keeps: nothing reads it at the others."""
        keep = self.keep or x.shape[1]
        return nn.functional.pad(mlp(x[:, -keep:]), (0, 0, max(x.shape[1] - keep, 0), 0))

    def forward(self, batch, keep, **kwargs):
        """Run the model on a batch that `collate` made; the output's `logits` (N, keep, vocabulary) are of the end."""
        for layer in self.checkpointed:
            layer.training = torch.is_grad_enabled()
        self.keep = None if self.checkpointed else keep  # what is computed again in the backward pass comes later
        output, self.keep = self.model(**batch, logits_to_keep=keep, **kwargs), None
        return output

    def add_lora(self, rank, alpha):
        """Freeze the model and put a fresh LoRA on all linear layers of vision tower, projector and language model."""
        self.model = get_peft_model(self.model, LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0,
                                                           target_modules="all-linear")).eval()

    @contextmanager
    def merged(self):
        """For a while, let every layer make one product with W + s B A instead of three (`LoRAProduct`).

        In float32 only, where that differs by rounding: in bfloat16 the policy that sampled would not be the one that
        is scored. Not where activations are computed again in the backward pass, which comes later.
        """
        exact = self.model.dtype == torch.float32 and not (self.checkpointed and torch.is_grad_enabled())
        layers = [m for m in self.model.modules() if exact and isinstance(m, LoraLinear) and not m.disable_adapters
                  and type(m.base_layer) is nn.Linear]  # not packed in four bits
        try:
            for layer in layers:
                weight, bias, (name,) = layer.base_layer.weight, layer.base_layer.bias, layer.active_adapters
                a, b, scale = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
                total = torch.addmm(weight.detach(), b.detach(), a.detach(), alpha=scale)
                # A function in the object's dictionary hides the method of its class.
                vars(layer)["forward"] = partial(LoRAProduct.apply, total, bias, a, b, scale)
            yield
        finally:
            for layer in layers:
                vars(layer).pop("forward", None)

    def save(self, directory):
        """Write the adapter and the value head to `directory`, as safetensors."""
        self.model.save_pretrained(directory / "adapter")
        save_file(self.value_head.state_dict(), directory / "value_head.safetensors")

    def load(self, directory):
        """Read what `save` wrote. Raises OSError or ValueError where it is not there."""
        self.model = PeftModel.from_pretrained(self.model, str(directory / "adapter"), is_trainable=True,
                                               torch_device=str(self.model.device)).eval()
        self.value_head.load_state_dict(load_file(directory / "value_head.safetensors"))

    # -- from pictures and texts to tensors -----------------------------------------------------------

    def encode(self, images, prompts):
        """Process N pictures (uint8, H x W x 3, one size) and prompts; returns a list of N `Answer.inputs`."""
        how = self.processor.image_processor
        if not ("height" in how.size and how.size["height"] < images.shape[1] and how.do_rescale and how.do_normalize):
            return self._process(images, prompts)
        # Pictures that are shrunk and normalised, nothing else, are so all at once, and each prompt is read once,
        # beside a blank one: the processor takes both one by one, which is as much work as drawing them.
        size = how.size["height"], how.size["width"]
        if len(self.read) > 10_000:
            self.read.clear()
        if new := [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.read]:
            self.read.update(zip(new, self._process(np.zeros((len(new), *size, 3), np.uint8), new)))
        mean, std = torch.tensor([how.image_mean, how.image_std])[..., None, None]
        pixels = (shrink(images, *size).permute(0, 3, 1, 2) * (how.rescale_factor / std)).sub_(mean / std)
        return [self.read[prompt] | {"pixel_values": pixels[i: i + 1]} for i, prompt in enumerate(prompts)]

    def _process(self, images, prompts):
        texts = [self.processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}],
            add_generation_prompt=True, tokenize=False) for prompt in prompts]
        bos = self.tokenizer.bos_token
        batch = self.processor(images=[[image] for image in images], text=texts, padding=True, padding_side="left",
                               add_special_tokens=not (bos and texts[0].startswith(bos)), return_tensors="pt")
        batch = {key: x.to(self.model.dtype) if x.is_floating_point() else x for key, x in batch.items()}
        lengths = batch["attention_mask"].sum(1).tolist()
        # Text tensors lose their padding; of all others (pixels, patch grids, ...) each sample owns an equal part.
        return [{key: x[i: i + 1, -lengths[i]:] if x.shape == batch["input_ids"].shape
                 else x[i * len(x) // len(texts): (i + 1) * len(x) // len(texts)] for key, x in batch.items()}
                for i in range(len(texts))]

    def collate(self, inputs):
        """Join a list of `Answer.inputs` into one batch, text tensors padded on the left."""
        batch = {}
        for key, first in inputs[0].items():
            rows, fill = [x[key] for x in inputs], self.tokenizer.pad_token_id if key == "input_ids" else 0
            joined = (pad_sequence([row[0] for row in rows], True, fill, "left")
                      if first.shape == inputs[0]["input_ids"].shape else torch.cat(rows))
            batch[key] = joined.to(self.model.device, self.model.dtype if joined.is_floating_point() else None)
        return batch

    def demonstrate(self, images, prompts, texts):
        """Given answers instead of sampled ones, as a list of `Answer` for `evaluate`."""
        rows = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return [self._answer(inputs, torch.tensor(row + [self.tokenizer.eos_token_id]))
                for inputs, row in zip(self.encode(images, prompts), rows)]

    def _answer(self, inputs, tokens):
        decode = partial(self.tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        ids = tokens.tolist()
        text = decode(ids)
        # The first token whose text reaches past the start of `"action":`, by bisection over prefixes.
        start = action_start(text)
        at = bisect.bisect_right(range(len(ids)), start, key=lambda k: len(decode(ids[:k + 1])))
        return Answer(inputs, tokens, at if start < len(text) else len(ids), text)

    # -- sampling and scoring -------------------------------------------------------------------------

    def log_probs(self, logits):
        """Log-probabilities, float32, of the distribution that is sampled from; logits: (..., vocabulary)."""
        return torch.log_softmax(logits.float() / self.temperature + self.forbidden, -1)

    def value_of_last_token(self):
        return self.value_head(self.hidden[:, 0]).squeeze(-1)

    def standardise(self, answers, microbatch=64):
        """Let the value head see the states of these `Answer`s with mean 0 and variance 1 in every component."""
        hidden, norm = [self.hidden[:, 0].clone() for _ in self.score(answers, microbatch)], self.value_head[0]
        norm.running_var, norm.running_mean = torch.var_mean(torch.cat(hidden), 0, correction=0)

    @torch.no_grad()
    def value(self, images, prompts):
        """V(o, v_in) of N states, shape (N,)."""
        self(self.collate(self.encode(images, prompts)), 1, use_cache=False)
        return self.value_of_last_token()

    @torch.no_grad()
    def act(self, images, prompts):
        """Sample an answer to each of N pictures and prompts; returns a list of N `Answer`."""
        inputs = self.encode(images, prompts)
        with self.merged():
            tokens, logps, lengths, values = self._generate(self.collate(inputs))
        answers = [self._answer(x, row[:length].clone()) for x, row, length in zip(inputs, tokens, lengths)]
        for answer, logp, value in zip(answers, logps.double(), values):
            answer.value, answer.logps = value, logp[:len(answer.tokens)]
            answer.logp_cot = logp[:answer.action_at].sum().item()
            answer.logp_action = logp[answer.action_at:len(answer.tokens)].sum().item()
        return answers

    def _generate(self, batch):
        """Sample token by token: tokens and their log-probabilities (N, max_new_tokens), lengths (N,), N values."""
        n, mask = len(batch["input_ids"]), batch["attention_mask"]
        cache = DynamicCache(config=self.model.config.get_text_config())
        cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
        output = self(batch, 1, past_key_values=cache, use_cache=True)
        values = self.value_of_last_token().tolist()
        # Where a picture takes fewer positions than tokens (Qwen), the model knows by how many and forgets to use it.
        shift = next((m.rope_deltas for m in self.shifting if m.rope_deltas is not None), None)
        tokens = torch.zeros(n, self.max_new_tokens, dtype=torch.long)
        logps = torch.zeros(n, self.max_new_tokens)
        lengths = torch.full((n,), self.max_new_tokens)
        rows = torch.arange(n)  # rows of the batch that are still writing
        eos = torch.tensor(sorted(self.eos))
        for t in range(self.max_new_tokens):
            logp = self.log_probs(output.logits[:, -1])
            token = sample(logp)
            tokens[rows, t], logps[rows, t] = token[:, 0].cpu(), logp.gather(1, token)[:, 0].cpu()
            done = torch.isin(tokens[rows, t], eos) & (lengths[rows] > t)
            lengths[rows[done]] = t + 1
            writing = lengths[rows] > t + 1
            if not writing.any():
                break
            if writing.sum() < 0.75 * len(rows):  # finished answers leave the batch, several at a time
                keep = writing.nonzero()[:, 0]
                rows, token, mask = rows[keep], token[keep.to(token.device)], mask[keep.to(mask.device)]
                cache.batch_select_indices(keep.to(token.device))
                shift = shift if shift is None else shift[keep.to(shift.device)]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            batch = {"input_ids": token, "attention_mask": mask}
            if shift is not None:  # three coordinates a token, the same for text
                batch["position_ids"] = (mask.sum(1, keepdim=True) - 1 + shift).expand(3, -1, -1)
            output = self(batch, 1, past_key_values=cache, use_cache=True)
        return tokens, logps, lengths, values

    @torch.no_grad()
    def score(self, answers, microbatch):
        """`evaluate` without gradients, piece by piece: yields some of the `answers` and their `Scores`."""
        for i in range(0, len(answers), microbatch):
            yield (batch := answers[i: i + microbatch]), self.evaluate(batch)

    def rescore(self, answers, microbatch):
        """Give `Answer`s the scores of `evaluate`: bfloat16 rounds otherwise with a cache, or other padding."""
        for batch, scores in self.score(answers, microbatch):
            numbers = torch.stack([scores.logp_cot, scores.logp_action, scores.value], 1).tolist()
            for answer, row, logps in zip(batch, numbers, scores.logps.cpu()):
                answer.logp_cot, answer.logp_action, answer.value = row
                answer.logps = logps[:len(answer.tokens)].double()

    def evaluate(self, answers):
        """Score a list of `Answer` again, each under its own picture and prompt; returns `Scores`."""
        batch, device = self.collate([answer.inputs for answer in answers]), self.model.device
        tokens = pad_sequence([answer.tokens for answer in answers], True, self.tokenizer.pad_token_id).to(device)
        place = torch.arange(tokens.shape[1], device=device)
        length = torch.tensor([len(answer.tokens) for answer in answers], device=device)[:, None]
        action_at = torch.tensor([answer.action_at for answer in answers], device=device)[:, None]
        extra = {"input_ids": tokens, "attention_mask": (place < length).long()}
        batch = {key: torch.cat([x, extra.get(key, torch.zeros_like(tokens))], 1) if x.shape == batch["input_ids"].shape
                 else x for key, x in batch.items()}
        # Logits for the answer only; the first kept place is the prompt's last token, which the value head reads.
        with self.merged():
            logits = self(batch, tokens.shape[1] + 1, use_cache=False).logits[:, :-1]
        logp_all = self.log_probs(logits)
        logp = logp_all.gather(2, tokens[..., None])[..., 0].masked_fill(place >= length, 0)
        with torch.no_grad():
            entropy = -(logp_all.exp() * logp_all.clamp(min=-1e4)).sum(-1).masked_fill(place >= length, 0)
        return Scores(logp_cot=(logp * (place < action_at)).sum(1), logp_action=(logp * (place >= action_at)).sum(1),
                      value=self.value_of_last_token(), entropy=entropy.sum(1) / length[:, 0], logps=logp,
                      written=place < length)


class CNNPolicy(nn.Module):
    """The paper's baseline without language: a picture, convolutions, and a head each for action and value.

    It has the interface of `VLMPolicy`, and answers with an action and no thoughts. actions: of one task, always legal.
    """

    def __init__(self, actions, temperature=1.0):
        super().__init__()
        self.actions, self.temperature = actions, temperature
        self.body = nn.Sequential(nn.Conv2d(3, 32, 8, 4), nn.ReLU(), nn.Conv2d(32, 64, 4, 2), nn.ReLU(),
                                  nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 9 * 9, 512), nn.ReLU())
        self.action_head, self.value_head = nn.Linear(512, len(actions)), nn.Linear(512, 1)

    def save(self, directory):
        save_file(self.state_dict(), directory / "cnn.safetensors")

    def load(self, directory):
        self.load_state_dict(load_file(directory / "cnn.safetensors"))

    def see(self, images):
        """(log-probabilities of the actions, values) of N pictures, uint8."""
        hidden = self.body(shrink(images, 100, 100).to(self.value_head.weight.device).permute(0, 3, 1, 2) / 255)
        return torch.log_softmax(self.action_head(hidden) / self.temperature, -1), self.value_head(hidden)[:, 0]

    @torch.no_grad()
    def value(self, images, prompts):
        return self.see(images)[1]

    @torch.no_grad()
    def act(self, images, prompts):
        images = shrink(images, 100, 100).numpy()
        logp, values = self.see(images)
        tokens = sample(logp).cpu()
        return [Answer({"image": image}, token, 0, f'"action": "{self.actions[token]}"', 0.0, row[token].item(),
                       value.item(), row[token].double())
                for image, token, row, value in zip(images, tokens, logp.cpu(), values)]

    def evaluate(self, answers):
        logp, values = self.see(np.stack([answer.inputs["image"] for answer in answers]))
        logps = logp.gather(1, torch.stack([answer.tokens for answer in answers]).to(logp.device))
        return Scores(torch.zeros_like(values), logps[:, 0], values, -(logp.exp() * logp).sum(1).detach(), logps,
                      torch.ones_like(logps).bool())


# ---------------------------------------------------------------------------------------------------
# Models


def load_model(name, seed=0, texts=None, image_tiles="one", device="cpu", dtype=torch.float32, quantize=None,
               trust_remote_code=False):
    """(model, processor) for `name`: "tiny" (see `build_tiny`), a model of the Hugging Face hub, or a folder with one.

    image_tiles: LLaVA-1.6 and Idefics3 cut pictures into tiles and read each beside the whole ("anyres"); "one" reads
    the whole alone, as the paper does: in LLaVA-1.6 576 tokens instead of up to 2,880. quantize: "4bit" for base
    weights in four bits (bitsandbytes, on cuda). Weights are read from safetensors alone; Python code that comes with
    a model is run only with trust_remote_code. Raises OSError or ValueError.
    """
    if name == "tiny":
        model, processor = build_tiny(seed, texts)
        return model.to(device, dtype), processor
    if name[:1] in ("/", ".", "~") and not Path(name).is_dir():  # the hub would complain of a name
        raise ValueError("there is no such folder")
    try:
        config, processor = (part.from_pretrained(name, trust_remote_code=trust_remote_code)
                             for part in (AutoConfig, AutoProcessor))
    except ImportError as error:  # some processors want a package of their own
        raise ValueError(str(error).strip()) from None
    if not getattr(processor, "chat_template", None):
        raise ValueError("its processor has no chat template")
    if image_tiles == "one" and getattr(processor.image_processor, "do_image_splitting", False):
        processor.image_processor.do_image_splitting = False
    kind = AutoModelForImageTextToText
    packed = quantize and BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    if config.model_type == "llava_next" and image_tiles == "one":
        # The same weights and words in LLaVA-1.5's class, which knows no tiles. The games' pictures are square already.
        keys = ("vision_config", "text_config", "image_token_id", "projector_hidden_act", "vision_feature_layer",
                "vision_feature_select_strategy", "multimodal_projector_bias")
        config = LlavaConfig(**{key: getattr(config, key) for key in keys})
        size, images = config.vision_config.image_size, processor.image_processor
        processor = LlavaProcessor(
            CLIPImageProcessorPil(size={"height": size, "width": size}, do_center_crop=False, resample=images.resample,
                                  image_mean=images.image_mean, image_std=images.image_std),
            processor.tokenizer, patch_size=config.vision_config.patch_size, chat_template=processor.chat_template,
            vision_feature_select_strategy=config.vision_feature_select_strategy, num_additional_image_tokens=1)
        kind = LlavaForConditionalGeneration
    model, report = kind.from_pretrained(
        name, config=config, dtype=dtype, use_safetensors=True, device_map={"": device}, quantization_config=packed,
        trust_remote_code=trust_remote_code, output_loading_info=True)
    if report["missing_keys"]:  # the library would make them up
        raise ValueError(f"its weights lack {min(report['missing_keys'])}")
    return model, processor


CHAT_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}\nAnswer: {% endif %}")


def build_tiny(seed=0, texts=None):
    """A LLaVA of about 1 M parameters with processor, tokenizer and chat template, built here: no download.

    texts: what its tokenizer learns from (default: the card games' prompts and answers); seed: of its random weights.
    A picture is 100 x 100 pixels, 25 patches of 20: about a patch a card. Everything else is the code that
    a LLaVA of 7 B parameters runs.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import CLIPVisionConfig, MistralConfig, PreTrainedTokenizerFast

    texts = texts or corpus()
    tokenizer = Tokenizer(models.BPE())
    # Numbers and operators stay whole and alone; a phrase between them may grow into one token.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\d+|[-+*/()=>]|[A-Za-z][A-Za-z ]*|[^-+*/()=>\dA-Za-z]+"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=1024, min_frequency=20, special_tokens=["<pad>", "<s>", "</s>", "<image>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    # The instructions never change: each line that prompts repeat is one token, which halves the cost of a step.
    lines = Counter(line for text in texts if "\n" in text for line in text.split("\n"))
    tokenizer.add_tokens([AddedToken(line, normalized=False)
                          for line, n in lines.items() if n >= 100 and len(line) > 20])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>",
                                        eos_token="</s>", additional_special_tokens=["<image>"])
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"height": 100, "width": 100}, do_center_crop=False, resample=2), tokenizer,
        patch_size=20, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(hidden_size=128, intermediate_size=256, num_hidden_layers=1,
                                       num_attention_heads=4, image_size=100, patch_size=20),
        text_config=MistralConfig(vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384,
                                  num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
                                  max_position_embeddings=1024, sliding_window=None, pad_token_id=0),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), vision_feature_layer=-1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
        # The library's std of 0.02 suits a width of 4096. At 128 it makes so quiet a network that it never
        # learns to look at the picture; Xavier's scale keeps the signal's size from layer to layer.
        for module in model.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
    return model, processor


def main():
    import gymnasium as gym

    import env
    from prompts import build_prompt

    parser = env.Parser(description="Let a model answer one picture.")
    parser.add_argument("--env", choices=env.GAMES, default="blackjack", help="the task")
    parser.add_argument("--model", default="tiny", help="tiny, a model of the hub, or a folder (such as a run's sft/)")
    parser.add_argument("--seed", type=env.natural_int, default=0, help="fixes picture and answer")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    image, info = gym.make(env.env_id(args.env)).reset(seed=args.seed)
    try:
        policy = VLMPolicy(*load_model(args.model, texts=corpus([args.env])), temperature=0.5)
    except (OSError, ValueError) as error:
        parser.error(f"cannot load --model {args.model}: {str(error).splitlines()[0]}")
    answer, = policy.act(image[None], [build_prompt(info)])
    # Escaped, so that no control character of an answer reaches the terminal; with its log p where that is not near 0.
    pieces = [ascii(policy.tokenizer.decode([token]))[1:-1] + (f" ({logp:.2f})" if logp < -0.005 else "")
              for token, logp in zip(answer.tokens.tolist(), answer.logps.tolist())]
    for name, color, part in (("thoughts", 36, pieces[:answer.action_at]), ("action", 33, pieces[answer.action_at:])):
        print(f"{name}:", f"\033[{color}m{'|'.join(part)}\033[0m" if sys.stdout.isatty() else "|".join(part))
    print(f"log p(thoughts) {answer.logp_cot:.3f}, log p(action) {answer.logp_action:.3f}, value {answer.value:.3f}")


if __name__ == "__main__":
    main()
