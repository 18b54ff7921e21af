"""The sizes of a SmolVLA policy: what is fixed before any weight, what cannot be, and three presets.

    python model.py                                  # the presets' parameters
    dataclasses.replace(PRESETS["tiny"], layers=8, expert_layers=8)

Sources: lerobot 0.6.1 (policies/smolvla/configuration_smolvla.py), SmolVLM2's config.json.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from files import Refused, number_from_environment

LARGEST = 1_000_000  # of any size
EMPTY = "observation.images.empty_camera_"  # begins the names that lerobot gives to cameras that nobody has


@dataclass(frozen=True)
class SmolVLAConfig:
    """Sizes and constants of one policy; the defaults are the published base model's.

    Of a checkpoint, everything here is read from its `config.json` and its language model's (checkpoint.py),
    never assumed.
    """

    cameras: tuple[str, ...] = ("observation.images.image", "observation.images.image2")
    state_dim: int = 8
    action_dim: int = 7
    max_state_dim: int = 32
    max_action_dim: int = 32
    chunk_size: int = 50
    n_action_steps: int = 50
    num_steps: int = 10
    prefix_length: int = -1
    tokenizer_max_length: int = 48
    min_period: float = 4e-3
    max_period: float = 4.0
    empty_cameras: int = 0

    vision_width: int = 768
    vision_mlp: int = 3072
    vision_layers: int = 12
    vision_heads: int = 12
    vision_eps: float = 1e-6
    image_size: int = 512  # side that pictures are brought to
    vision_size: int | None = None  # side that the tower's positions are made for, where it is another one
    patch_size: int = 16
    scale_factor: int = 4
    image_special_ids: tuple[int, ...] = ()  # (fake image token, global image token) around pictures, or none

    width: int = 960
    mlp: int = 2560
    layers: int = 16
    heads: int = 15
    kv_heads: int = 5
    head_dim: int = 64
    vocab_size: int = 49280
    eps: float = 1e-5

    expert_layers: int = 16
    expert_width: int = 720
    attention_mode: str = "cross_attn"
    self_attn_every_n_layers: int = 2

    def __post_init__(self) -> None:
        """Raise Refused for what no policy can have; each names the sizes and what would do."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            most = {"layers": 1000, "cameras": 1000}.get(field.name.split("_")[-1], LARGEST)
            if isinstance(value, int | float) and not -1 <= value <= most:
                raise Refused(f"{field.name} {value} cannot be: it must be at most {most}")
        for part, whole, share in (
            ("layers", self.layers, "expert_layers"),
            ("width", self.vision_width, "vision_heads"),
            ("heads", self.heads, "kv_heads"),
            ("head_dim", self.head_dim, 2),
            ("expert_width", self.expert_width, 2),
            ("image_size", self.image_size, "patch_size"),
            ("patches a side", self.image_size // self.patch_size, "scale_factor"),
        ):
            by = share if isinstance(share, int) else getattr(self, share)
            if by < 1 or whole < 1 or whole % by:
                named = share if isinstance(share, int) else f"{share} {by}"
                raise Refused(f"{part} {whole} must be a positive multiple of {named}")
        for name in ("state", "action"):
            width, room = getattr(self, f"{name}_dim"), getattr(self, f"max_{name}_dim")
            if width > room:
                raise Refused(
                    f"{name} is {width} wide and the model takes {room}: start from a checkpoint whose "
                    f"max_{name}_dim is at least {width}, or leave dimensions out"
                )
        if not 0 < self.n_action_steps <= self.chunk_size:
            raise Refused(f"n_action_steps {self.n_action_steps} must lie in 1..{self.chunk_size}, the chunk")
        if not 1 <= self.num_steps <= 1000:
            raise Refused(f"num_steps {self.num_steps} must be 1 to 1000 Euler steps")
        if not self.cameras:
            raise Refused("a policy needs a camera: config.json's input_features name none of type VISUAL")
        experts = range(self.expert_layers)
        if [self.is_self_layer(i) for i in experts] != [self.is_self_layer(i * self.stride) for i in experts]:
            raise Refused(
                f"self_attn_every_n_layers {self.self_attn_every_n_layers} with {self.expert_layers} expert "
                f"layers over {self.layers} text layers: lerobot builds expert layers by their own number "
                "and runs them by the text layer's, and the two differ; 0 (cross attention only) works"
            )

    @property
    def given_cameras(self) -> tuple[str, ...]:
        """Cameras whose pictures data and environment give; for the others a black one stands in."""
        return tuple(name for name in self.cameras if not name.startswith(EMPTY))

    @property
    def image_tokens(self) -> int:
        """Tokens a camera."""
        return (self.image_size // self.patch_size // self.scale_factor) ** 2

    @property
    def expert_mlp(self) -> int:
        """llama's rule: 4 x two thirds of the width, rounded up to a multiple of 256."""
        return -(-int(2 * self.expert_width / 3) * 4 // 256) * 256

    @property
    def stride(self) -> int:
        """Text layers an expert layer: text layer i meets expert layer i // stride where stride divides i."""
        return self.layers // self.expert_layers

    @property
    def trunk_depth(self) -> int:
        """Text layers that run whole; of the next, beside the last expert layer, keys and values are read."""
        return (self.expert_layers - 1) * self.stride

    def is_self_layer(self, text_layer: int) -> bool:
        """Whether actions attend to one another (and the prefix) there; elsewhere they only cross-attend."""
        every = self.self_attn_every_n_layers
        return "cross" not in self.attention_mode or (every > 0 and text_layer % every == 0)


PRESETS: dict[str, SmolVLAConfig] = {
    # Every part of SmolVLA at a size that learns a LIBERO task on two CPU cores in minutes.
    "tiny": SmolVLAConfig(
        chunk_size=16, n_action_steps=8, tokenizer_max_length=32,
        vision_width=96, vision_mlp=288, vision_layers=3, vision_heads=4,
        image_size=128, patch_size=16, scale_factor=2,
        width=128, mlp=384, layers=4, heads=4, kv_heads=2, head_dim=32, vocab_size=512,
        expert_layers=4, expert_width=96,
    ),
    "base": SmolVLAConfig(),
    "libero": SmolVLAConfig(
        n_action_steps=1, layers=32, expert_layers=32, expert_width=480, self_attn_every_n_layers=0,
    ),
}  # fmt: skip

# How a start is trained unless a flag says otherwise. A policy that starts from nothing trains whole, in
# small batches, at a high rate: at one budget E0 solved 33 of 40 starts with batches of 16, 26 with 32, 25
# with 64. Deviations are floored where demonstrations hardly move. What is pretrained is tuned as lerobot
# does it.
PRETRAINED = {
    "freeze": "expert", "total_samples": 100_000, "batch_size": 64, "flow_draws": 1, "lr": 1e-4,
    "world_stride": 4, "state_std_floor": 0.0, "action_std_floor": 0.0, "save_every": 50_000,
}  # fmt: skip
RECIPES: dict[str, dict] = {
    "tiny": {
        "freeze": "none", "batch_size": 16, "flow_draws": 4, "lr": 1e-3,
        "total_samples": number_from_environment("TOTAL_SAMPLES", 40_000), "save_every": 10_000,
        "world_stride": 4, "state_std_floor": 0.01, "action_std_floor": 0.05,
    },
}  # fmt: skip
