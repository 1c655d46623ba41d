"""The model of the demo, a checkpoint or a random Qwen3-VL that needs no download, and its prompt."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vlmfast.benchmarks.published import llama, mrope, qwen_vit
from vlmfast.console import CommandError, one_line
from vlmfast.patches.plan import find_sites

PHOTOGRAPH = Path(__file__).parent / "assets" / "china.jpg"
IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"
SPECIAL_TOKENS = ["<pad>", "<unk>", "<|vision_start|>", IMAGE, "<|vision_end|>", VIDEO]
VOCABULARY = 16384


@dataclass(frozen=True)
class Subject:
    """A model with one prompt to answer."""

    title: str
    model: Any  # a PreTrainedModel: transformers has no types to check
    inputs: Any  # the BatchFeature of one prompt, on the model's device
    image_size: tuple[int, int]
    decode: Callable[[list[int]], str]
    process: Callable[[Any], Any] | None = None  # makes the BatchFeature of another image with the same prompt

    @property
    def visual_tokens(self) -> int | None:
        """Return the number of the prompt's tokens that stand for the image, if the configuration names them."""
        config = self.model.config
        token = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None)
        return None if token is None else int((self.inputs["input_ids"] == token).sum())


def open_image(path: Path) -> Any:
    """Open the image at ``path`` as transformers does: turned as its EXIF orientation says, in RGB.

    Grey of 16 bits is scaled to 8; Pillow, and so transformers, clips nearly all of it to white.
    """
    from PIL import Image, ImageOps
    from transformers.image_utils import load_image

    try:
        image = ImageOps.exif_transpose(Image.open(path))
        if image.mode.startswith("I"):
            image = image.convert("I").point(lambda level: level * (255 / 65535)).convert("L")
        return load_image(image)
    except Exception as error:  # with a broken file, Pillow's readers raise any exception
        raise CommandError(f"--image: cannot read the image {path}: {one_line(error)}") from error


def checkpoint(name: str, image: Any, prompt: str, device: torch.device, dtype: torch.dtype | None) -> Subject:
    """Load a local directory or a repository of the Hugging Face hub."""
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    if name.startswith((".", "/")) and not Path(name).is_dir():
        raise CommandError(f"--model: there is no directory {name}")
    try:
        config = AutoConfig.from_pretrained(name)
        with torch.device("meta"):  # to fail before the weights are downloaded
            if all(site.body is None for site in find_sites(AutoModelForImageTextToText.from_config(config))):
                raise CommandError(f"--model: vlmfast knows no method of {name}, which is of type {config.model_type}")
        processor = AutoProcessor.from_pretrained(name)
        model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype or "auto").to(device).eval()
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise CommandError(f"--model: cannot load {name}: {one_line(error)}") from error
    marks = [getattr(processor, f"{kind}_token", None) for kind in ("image", "video")]
    _check_prompt(prompt, *marks)

    def process(picture: Any) -> Any:
        if getattr(processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": prompt}]
            text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        else:
            text = f"{marks[0] or '<image>'}\n{prompt}"
        return processor(text=[text], images=[picture], return_tensors="pt")

    inputs = _processed(process, image).to(device, model.dtype)
    decode = functools.partial(processor.decode, skip_special_tokens=True)
    return Subject(name, model, inputs, image.size, decode, process)


def _check_prompt(prompt: str, *placeholders: str | None) -> None:
    """Refuse a prompt that is not text, or that has a placeholder, which the demo puts in front itself."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise CommandError(f"--prompt: must be text, got {prompt!r}") from error
    if found := [mark for mark in placeholders if mark is not None and mark in prompt]:
        raise CommandError(f"--prompt: must be without {found[0]}: the demo shows one image, in front of the prompt")


def _processed(process: Callable[[Any], Any], image: Any) -> Any:
    try:
        return process(image)
    except Exception as error:  # other libraries raise any exception
        raise CommandError(f"the processor refuses the image or the prompt: {one_line(error)}") from error


def random_qwen3_vl(image: Any, prompt: str, device: torch.device, dtype: torch.dtype, layers: int) -> Subject:
    """Build a Qwen3-VL with random weights.

    It is as narrow as the smallest vision-language models (SmolVLM-256M has this width and depth), with a vision tower
    as wide as ViT-S; image processing, DeepStack and generation are those of every Qwen3-VL.
    """
    import transformers
    from transformers import AutoModelForImageTextToText, Qwen3VLConfig

    # a class that needs no torchvision: in transformers 5 a separate one
    processor_class = getattr(transformers, "Qwen2VLImageProcessorPil", None) or transformers.Qwen2VLImageProcessor
    image_processor = processor_class(patch_size=16, merge_size=2, temporal_patch_size=2)
    _check_prompt(prompt, IMAGE, VIDEO)
    inputs = _processed(lambda picture: image_processor(images=[picture], return_tensors="pt"), image)
    tokenizer = _tokenizer(prompt)
    pad, _, start, image_token, end, video_token = tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS)
    # no end of text, so that it generates as many tokens as requested
    ends = {"pad_token_id": pad, "bos_token_id": None, "eos_token_id": None}
    text = llama(576, layers, 9, 3, 1536, head_dim=64, vocab_size=VOCABULARY, tie_word_embeddings=False, **ends)
    sizes = {"out_hidden_size": 576, "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2}
    config = Qwen3VLConfig(
        text_config=text | mrope([12, 10, 10], mrope_interleaved=True) | {"rope_theta": 5e6},
        vision_config=qwen_vit(384, 6, 6, 1536, deepstack_visual_indexes=[1, 3, 5], **sizes),
        image_token_id=image_token,
        video_token_id=video_token,
        vision_start_token_id=start,
        vision_end_token_id=end,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype).eval()
        _initialise(model)
    model.generation_config.pad_token_id = pad
    visual = int(inputs["image_grid_thw"].prod()) // image_processor.merge_size**2
    ids = [start, *[image_token] * visual, end, *tokenizer(prompt)["input_ids"]]
    inputs["input_ids"] = torch.tensor([ids])
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == image_token).int()
    title = f"Qwen3-VL with RANDOM weights, {layers} layers of 576 channels"
    return Subject(title, model.to(device), inputs.to(device, dtype), image.size, tokenizer.decode)


def _initialise(model: Any) -> None:
    """Set random weights, the same in every transformers, whose answer varies and does not depend on rounding.

    With the usual initialisation the answer repeats one or two tokens, because the last token hardly changes the hidden
    state: large embeddings change that. And logits are nearly equal, unlike a trained model's: output rows of different
    lengths change that.
    """
    torch.manual_seed(5)  # of 24 seeds the one whose tokens win by the widest margin: 6% of the logit or more
    embedding, output = model.get_input_embeddings().weight, model.lm_head.weight
    for _, parameter in sorted(model.named_parameters()):
        if parameter.dim() > 1:
            parameter.normal_(0.0, 1.0 if parameter is embedding else 0.02)
    output.mul_(torch.empty(len(output), 1).log_normal_(0.0, 0.5))


def _tokenizer(prompt: str) -> Any:
    """Make a tokenizer of whole words: those of the prompt, and pseudo-words that do not look like an answer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    syllables = ["".join(pair) for pair in itertools.product("bdfghklmnprstvz", "aeiou")]
    pseudo_words = ("".join(parts) for parts in itertools.product(syllables, repeat=3))
    words = dict.fromkeys([*SPECIAL_TOKENS, *prompt.split()[: VOCABULARY // 2]])
    spread = itertools.islice(pseudo_words, 0, None, 23)  # not only those that begin with "ba"
    words |= dict.fromkeys(itertools.islice(spread, VOCABULARY - len(words)))
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
