"""Architecture, tokenizer and processor of the reference model: a small LLaVA in the stock Hugging Face format."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from .scenes.catalogue import OBJECTS, WORDS
from .scenes.questions import NUMBERS, training_question
from .scenes.sample import Dice, sample_scene
from .scenes.splits import KINDS

IMAGE_SIZE, PATCH = 336, 14
PATCHES = (IMAGE_SIZE // PATCH) ** 2
MAX_VOCABULARY = 2048
PAD, BOS, EOS, IMAGE = "<pad>", "<s>", "</s>", "<image>"
RESIDUAL = ("o_proj.weight", "out_proj.weight", "down_proj.weight", "fc2.weight")  # write to the residual stream

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %} ASSISTANT: {% else %}USER: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


def corpus(scenes: int = 3000) -> Iterator[str]:
    """Text the tokenizer is trained on: every name and word, and questions and answers of training scenes."""
    for _ in range(20):  # rare words must be frequent enough to become one token each
        for cls in OBJECTS:
            yield f"USER: a {cls.name} ASSISTANT: {cls.plural} " + " ".join(cls.colours)
        for word in (*WORDS, *NUMBERS):
            yield f" {word}"
    for index in range(scenes):
        dice = Dice(f"tokenizer/{index}")
        scene = sample_scene(dice)
        for kind in KINDS:
            qa = training_question(kind, scene, dice)
            if qa is not None:
                yield f"USER: {qa[0]} ASSISTANT: {qa[1]}"


def build_processor() -> LlavaProcessor:
    """The processor; the tokenizer is a byte-level BPE whose training is deterministic."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_VOCABULARY,
        special_tokens=[PAD, BOS, EOS, IMAGE],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    bos = (BOS, tokenizer.token_to_id(BOS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[bos]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        padding_side="left",
        model_max_length=2048,
        extra_special_tokens={"image_token": IMAGE},
    )
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=side),
        tokenizer=fast,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE,
        chat_template=CHAT_TEMPLATE,
    )


def build_config(tokenizer: PreTrainedTokenizerFast) -> LlavaConfig:
    """13.9 M parameters: tower 8 x 192, decoder 12 x 256 with 8 heads.

    The rope base is 1e6 although prompts are short: a question word has to find matching patches hundreds of positions
    away, and with heads of 32 channels the customary 1e4 leaves only a third of them usable at that distance.
    """
    vision = CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=8,
        num_attention_heads=6,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        projection_dim=192,
    )
    text = LlamaConfig(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=PATCHES,
        tie_word_embeddings=True,
    )


def build_model(config: LlavaConfig, seed: int) -> LlavaForConditionalGeneration:
    """A randomly initialised model.

    Queries and keys of the first half of the decoder's heads start as the same near-orthogonal projection, so that a
    token attends to tokens like itself (mimetic initialisation, arXiv 2305.09828): the look-up from a word to the
    patches that match it exists at step 0 and need not be discovered.
    """
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    layers = config.text_config.num_hidden_layers
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and ".layers." in name:
            depth = math.sqrt(2 * layers) if name.endswith(RESIDUAL) else 1.0
            nn.init.normal_(parameter, std=0.8 / math.sqrt(parameter.shape[1]) / depth)
    head_dim = config.text_config.hidden_size // config.text_config.num_attention_heads
    shared = config.text_config.num_attention_heads // 2 * head_dim
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            attention = layer.self_attn
            basis = nn.init.orthogonal_(torch.empty(attention.q_proj.weight.shape[1], shared)).T * 1.2
            for projection in (attention.q_proj, attention.k_proj):
                projection.weight[:shared] = basis
    model.generation_config.pad_token_id = config.text_config.pad_token_id
    model.generation_config.eos_token_id = config.text_config.eos_token_id
    model.generation_config.bos_token_id = config.text_config.bos_token_id
    return model
