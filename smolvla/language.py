"""The language model's folder: the sizes that SmolVLA takes from it, and the tokenizer.

lerobot's checkpoints do not hold them, they name the folder: SmolVLM2's, on the hub or on a disk. A policy
from scratch gets a folder of its own, with a tokenizer built from the instructions.

    language = read_language(Path("tests/golden/smolvla/vlm"))
    language.tokenizer.encode("open the drawer\\n").ids

Sources: SmolVLM2's config.json and tokenizer_config.json; transformers 5.5 (the defaults of
SmolVLMVisionConfig and LlamaConfig).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from files import Refused, parse_json, read_json, to_json
from smolvla.config import SmolVLAConfig

SPECIAL_TOKENS = {
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
    "image_token": "<image>",
    "end_of_utterance_token": "<end_of_utterance>",
}
TEXT_FILES = {
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json",
    "merges.txt", "added_tokens.json", "special_tokens_map.json", "chat_template.json", "chat_template.jinja",
    "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json",
}  # fmt: skip
# What transformers takes where a language model's config.json is silent; SmolVLM2's is, on the tower's depth.
VISION_DEFAULTS = {
    "hidden_size": 1152, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 16,
    "image_size": 224, "patch_size": 32, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
}  # fmt: skip
TEXT_DEFAULTS = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": None, "head_dim": None, "vocab_size": 32000, "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
}  # fmt: skip
# Of a language model's config.json: each size of the type that it has by default.
CONFIG = {
    "scale_factor?": int,
    **{
        part: {f"{name}?": (type(value), type(None)) for name, value in defaults.items()}
        for part, defaults in (
            ("text_config", TEXT_DEFAULTS | {"num_key_value_heads": 1, "head_dim": 1, "pad_token_id": 1}),
            ("vision_config", VISION_DEFAULTS),
        )
    },
}


# ---- folder -------------------------------------------------------------------------------------------


@dataclass
class Language:
    """What SmolVLA takes from its language model's folder besides weights: sizes and the tokenizer."""

    config: dict  # its config.json
    files: dict[str, bytes]  # its text files, name -> content: handed on unchanged with a checkpoint
    tokenizer: Tokenizer
    source: str = "the instructions"

    def token(self, name: str) -> str | None:
        """Give the text of a special token as tokenizer_config.json has it, in any of its three ways."""
        settings = parse_json(self.files.get("tokenizer_config.json", b"{}"))
        extra = settings.get("extra_special_tokens")
        found = settings.get(name) or (extra.get(name) if isinstance(extra, dict) else None)
        found = found.get("content") if isinstance(found, dict) else found
        return found if isinstance(found, str) else None

    @property
    def pad_id(self) -> int:
        """The tokenizer's own padding: `pad_token_id` of SmolVLM2's config lies outside its vocabulary."""
        found = self.tokenizer.token_to_id(self.token("pad_token") or "")
        return found if found is not None else self.config["text_config"].get("pad_token_id") or 0

    @property
    def image_special_ids(self) -> tuple[int, int]:
        """The tokens around pictures, before each both and after it the first; Refused without them."""
        names = ("fake_image_token", "global_image_token")
        texts = [self.token(name) or SPECIAL_TOKENS[name] for name in names]
        ids = [self.tokenizer.token_to_id(text) for text in texts]
        if None in ids:
            raise Refused(
                f"the tokenizer of {self.source} lacks {' or '.join(texts)}: config.json asks for "
                "add_image_special_tokens, which needs both"
            )
        return tuple(ids)


def read_language(folder: Path) -> Language:
    """Read a language model's folder: config.json, tokenizer.json and what else it says in text files."""
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise Refused(
                f"{folder / name} is missing: the folder of the language model needs it (--vlm DIR names one)"
            )
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if is_text(path)}
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # tokenizers raises bare Exception on a broken file
        raise Refused(f"{folder / 'tokenizer.json'} cannot be read ({error}): copy it again") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    again = "it is not a language model's with vision, such as SmolVLM2's; copy it again"
    config = read_json(folder / "config.json", CONFIG, again)
    if "tokenizer_config.json" in files:
        read_json(folder / "tokenizer_config.json")
    return Language(config, files, tokenizer, str(folder))


def is_text(path: Path) -> bool:
    """Whether a file of a language model's folder is its config's or tokenizer's: no other is handed on."""
    return path.name in TEXT_FILES


def fresh_language(config: dict, instructions: list[str]) -> Language:
    """Make the folder of a policy from scratch: its sizes, and a tokenizer built from the instructions."""
    tokenizer = build_tokenizer(instructions, config["text_config"]["vocab_size"])
    settings = {
        "tokenizer_class": "TokenizersBackend", "processor_class": "SmolVLMProcessor",
        "unk_token": "<|endoftext|>", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
    } | SPECIAL_TOKENS  # fmt: skip
    side = config["vision_config"]["image_size"]
    pictures = {
        "size": {"longest_edge": side}, "max_image_size": {"longest_edge": side}, "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }  # fmt: skip
    images = {
        "processor_class": "SmolVLMProcessor",
        "image_processor": {"image_processor_type": "SmolVLMImageProcessor"} | pictures,
        # lerobot never shows it a video, but transformers makes no processor without.
        "video_processor": {"video_processor_type": "SmolVLMVideoProcessor"} | pictures,
    }
    contents = {"config.json": config, "tokenizer_config.json": settings, "processor_config.json": images}
    files = {name: to_json(content).encode() for name, content in contents.items()}
    return Language(config, files | {"tokenizer.json": tokenizer.to_str().encode()}, tokenizer)


def build_tokenizer(instructions: list[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE on the instructions: lossless for any text, short for those."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],  # ids 0, 1, 2, as SmolVLM's
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sorted({text + "\n" for text in instructions}), trainer)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS.values()))
    return tokenizer


# ---- sizes --------------------------------------------------------------------------------------------


def language_sizes(vlm: dict, raw: dict) -> dict:
    """Take the language model's share of SmolVLAConfig; `raw`, the policy's config.json, says how much."""
    text, vision = TEXT_DEFAULTS | vlm["text_config"], VISION_DEFAULTS | vlm["vision_config"]
    for part, known in ((text, "silu"), (vision, "gelu_pytorch_tanh")):
        if part["hidden_act"] != known:
            raise Refused(f"the language model has activation {part['hidden_act']}: SmolVLA's is {known}")
    size = raw["resize_imgs_with_padding"]
    if not size or size[0] != size[1]:
        raise Refused(f"resize_imgs_with_padding {size}: pictures must be brought to one square size")
    layers, heads = text["num_hidden_layers"], text["num_attention_heads"]
    return {
        "vision_width": vision["hidden_size"],
        "vision_mlp": vision["intermediate_size"],
        "vision_layers": vision["num_hidden_layers"],
        "vision_heads": vision["num_attention_heads"],
        "vision_eps": vision["layer_norm_eps"],
        "image_size": size[0],
        "vision_size": None if vision["image_size"] == size[0] else vision["image_size"],
        "patch_size": vision["patch_size"],
        "scale_factor": vlm.get("scale_factor", 2),
        "width": text["hidden_size"],
        "mlp": text["intermediate_size"],
        "layers": min(raw["num_vlm_layers"], layers) if raw["num_vlm_layers"] > 0 else layers,
        "heads": heads,
        "kv_heads": text["num_key_value_heads"] or heads,
        "head_dim": text["head_dim"] or text["hidden_size"] // heads,
        "vocab_size": text["vocab_size"],
        "eps": text["rms_norm_eps"],
    }


def language_config(config: SmolVLAConfig) -> dict:
    """Write the language model's config.json for a fresh policy, in SmolVLM's layout."""
    return {
        "architectures": ["SmolVLMForConditionalGeneration"],
        "model_type": "smolvlm",
        "scale_factor": config.scale_factor,
        "tie_word_embeddings": False,
        "pad_token_id": 2,
        "text_config": {
            "model_type": "llama",
            "hidden_size": config.width,
            "intermediate_size": config.mlp,
            "num_hidden_layers": config.layers,
            "num_attention_heads": config.heads,
            "num_key_value_heads": config.kv_heads,
            "head_dim": config.head_dim,
            "vocab_size": config.vocab_size,
            "rms_norm_eps": config.eps,
            "pad_token_id": 2,
        },
        "vision_config": {
            "model_type": "smolvlm_vision",
            "hidden_size": config.vision_width,
            "intermediate_size": config.vision_mlp,
            "num_hidden_layers": config.vision_layers,
            "num_attention_heads": config.vision_heads,
            "image_size": config.vision_size or config.image_size,
            "patch_size": config.patch_size,
            "layer_norm_eps": config.vision_eps,
        },
    }
