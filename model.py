"""SmolVLA in plain PyTorch: SigLIP tower, llama trunk, flow-matching action expert, room for memory.

The prefix (images, language, state) runs once a decision and leaves keys and values; the expert then turns
noise into a chunk of actions, attending to them in every layer. Nothing in the prefix can see the actions,
so training and cached inference are one code path: `prefix(...)`, then `velocity(...)`. Images and language
cannot see the state either: where nothing in them learns, training runs them without gradients, and goes back
through one token alone. Memory of imagined futures enters through `fusion.py`.

    python model.py                                  # sizes of the presets
    python model.py runs/demo/E0-n40000-s0/last      # what a checkpoint is, before a run is spent on it
    python tests/golden.py tests/golden/smolvla      # every intermediate tensor against lerobot's

Shapes: B batch, P prefix tokens, C actions in a chunk, A action width, W hidden width, H query heads, G
key/value heads, d head width. Sources: lerobot 0.6.1 (policies/smolvla), SmolVLA (arXiv 2506.01844), SigLIP,
SmolVLM2.
"""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch import Tensor

from files import Refused, told, type_in
from fusion import Fusion, Memory, MemoryCache, WorldTokens, repeat, with_bias
from smolvla.checkpoint import (
    VLM_PARTS,
    Shapes,
    describe_checkpoint,
    draw,
    lerobot_config,
    lerobot_key,
    load_processor,
    open_checkpoint,
    place,
    read_language_weights,
    read_weights,
)
from smolvla.config import PRESETS, SmolVLAConfig
from smolvla.fit import Fit
from smolvla.folders import find_folder
from smolvla.language import language_sizes, read_language
from smolvla.layers import (
    Connector,
    Expert,
    Mask,
    TextModel,
    VisionTower,
    WorldMask,
    join,
    lay_out,
    remake,
    resize_with_pad,
    rope_table,
)
from smolvla.processor import Processor, Statistics


class Prefix(NamedTuple):
    """What a decision keeps of its prefix: computed once, read at every denoising step."""

    # Per expert layer keys and values, (B, G, P, d) each, projected where the layer cross-attends.
    kv: list[tuple[Tensor, Tensor]]
    masks: tuple[Mask, Mask]  # what actions see in self layers and in cross layers, laid out
    # The actions' positions (`rope_table`): on from the unpadded tokens in self layers, from 0 in cross.
    ropes: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]

    def repeat(self, times: int) -> Prefix:
        """Repeat each sample `times` times in a row: several flow draws then share one prefix pass."""
        if times == 1:
            return self
        kv = [(repeat(k, times), repeat(v, times)) for k, v in self.kv]
        masks = tuple(remake(mask, lambda x: repeat(x, times)) for mask in self.masks)
        own, shared = self.ropes
        return Prefix(kv, masks, (tuple(repeat(x, times) for x in own), shared))


def action_masks(mask: Tensor, chunk: int, world: WorldTokens | None) -> tuple[Mask, Mask]:
    """Say what actions see beside a prefix (B, P): (B, 1, C, P + C) in self layers, (B, 1, C, P) in cross.

    World tokens, where there are any, are the last of the prefix, and count among its P here.
    """
    own = torch.arange(chunk, device=mask.device)
    causal = (own[None, :] <= own[:, None]).expand(len(mask), -1, -1)

    def over(keys: Tensor) -> tuple[Tensor, Tensor]:
        cross = keys[:, None, :].expand(-1, chunk, -1)  # (B, P) -> (B, C, P)
        return torch.cat([cross, causal], dim=2)[:, None], cross[:, None]

    if world is None:
        return over(mask)
    hidden = over(F.pad(mask, (0, world.x.shape[1])))  # (B, P) -> (B, P + m)
    shown = over(torch.cat([mask, world.finite], dim=1))
    if world.bias is not None:
        bias = F.pad(world.bias, (mask.shape[1], 0))  # (B, m) -> (B, P + m)
        shown = tuple(with_bias(x, F.pad(bias, (0, x.shape[3] - bias.shape[1]))) for x in shown)
    return tuple(WorldMask(a, b, world.strength) for a, b in zip(hidden, shown, strict=True))


class SmolVLA(nn.Module):
    """The policy, on what `checkpoint.Processor` makes: images in [0, 1], normalised states, tokens."""

    def __init__(self, config: SmolVLAConfig) -> None:
        super().__init__()
        self.config = config
        width, expert_width = config.width, config.expert_width
        self.vision = VisionTower(config)
        self.connector = Connector(config)
        self.text = TextModel(config)
        self.lm_head = nn.Linear(
            width, config.vocab_size, bias=False
        )  # never used; kept to hand the checkpoint back
        self.expert = Expert(config)
        self.state_proj = nn.Linear(config.max_state_dim, width)
        self.action_in_proj = nn.Linear(config.max_action_dim, expert_width)
        self.action_time_mlp_in = nn.Linear(2 * expert_width, expert_width)
        self.action_time_mlp_out = nn.Linear(expert_width, expert_width)
        self.action_out_proj = nn.Linear(expert_width, config.max_action_dim)
        self.fusion: Fusion | None = None  # where memory enters; attached by arm.py
        self.dtype = torch.float32  # of tower, trunk and expert; see `set_dtype`
        self.split = True  # images and language without gradients where none can reach them

    def initialise(self) -> SmolVLA:
        """Draw fresh weights to train from scratch: torch's own linear layers, unit-scale embeddings."""
        nn.init.normal_(
            self.text.embed_tokens.weight, std=self.config.width**-0.5
        )  # tokens are scaled by sqrt(W)
        nn.init.normal_(self.vision.position_embedding.weight, std=0.02)
        return self

    def freeze(self, what: str, train_state_proj: bool = True) -> None:
        """Freeze as lerobot does: `expert` trains expert and projections, `vision` the trunk too, `none` all.

        The language head, the trunk's final norm and its last layer (the last two where expert layers are
        fewer) stay frozen always, as lerobot has it; so does all that no loss can reach, since distributed
        training waits for every gradient that is asked for.
        """
        if what not in ("expert", "vision", "none"):
            raise Refused(f"--freeze {what!r} is unknown: choose expert, vision or none")
        self.requires_grad_(True)
        self.lm_head.requires_grad_(False)
        self.text.norm.requires_grad_(False)
        depth = self.config.trunk_depth
        read = self.text.layers[depth]  # for its keys and values only
        unread = (read.self_attn.q_proj, read.self_attn.o_proj, read.post_attention_layernorm, read.mlp)
        last = self.text.layers[-1 if self.config.stride == 1 else -2 :]
        for module in (*unread, *self.text.layers[depth + 1 :], *last):
            module.requires_grad_(False)
        if what in ("expert", "vision"):
            self.vision.requires_grad_(False)
        if what == "expert":
            self.connector.requires_grad_(False)
            self.text.requires_grad_(False)
        self.state_proj.requires_grad_(train_state_proj)

    # ---- precision and speed --------------------------------------------------------------------------

    def set_dtype(self, dtype: torch.dtype) -> SmolVLA:
        """Compute tower, trunk and expert in `dtype`; projections, fusion and action head stay in float32.

        What is frozen is held in it; what trains stays float32 and is cast as it is used.
        """
        self.dtype = dtype
        for part in (self.vision, self.connector, self.text, self.lm_head, self.expert):
            if not any(p.requires_grad for p in part.parameters()):
                part.to(dtype)
        return self

    def computing(self, part: nn.Module) -> AbstractContextManager:
        """Cast a part's weights as they are used, where they are held in another type than computed in."""
        weight = next(part.parameters())
        if weight.dtype == self.dtype or self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(weight.device.type, self.dtype)

    def compile_blocks(self, **options: object) -> None:
        """Compile tower, trunk and expert block by block: one graph serves all blocks of a kind."""
        # A kind meets several lengths, with and without gradients; past the limit torch silently runs eager.
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        for block in (*self.vision.layers, *self.text.layers, *self.expert.layers):
            block.compile(dynamic=False, **options)

    def compile_denoise(self, **options: object) -> None:
        """Compile the denoising loop as one graph, all steps and layers."""
        self.denoise = torch.compile(self.denoise, fullgraph=True, dynamic=False, **options)

    # ---- prefix ---------------------------------------------------------------------------------------

    def prepare_image(self, image: Tensor) -> Tensor:
        """Resize and pad (B, 3, h, w) in [0, 1] to (B, 3, S, S) in [-1, 1]."""
        image = resize_with_pad(image, self.config.image_size)
        image = torch.add(image.new_tensor(-1.0), image, alpha=2)  # 2 x - 1 in one pass
        return image.to(self.vision.post_layernorm.weight.dtype)

    def embed_images(self, images: list[Tensor]) -> list[Tensor]:
        """Embed each camera's images to (b, n, W), all in one pass of the tower.

        Those of 3 dimensions are tokens already, this method's own from an earlier call (latents/tower.py).
        """
        dtype = self.connector.proj.weight.dtype
        found = [x.to(dtype) if x.ndim == 3 else None for x in images]
        pictures = [self.prepare_image(x) for x in images if x.ndim == 4]  # (b, 3, h, w) -> (b, 3, S, S)
        if pictures:
            with self.computing(self.vision):
                patches = self.vision(torch.cat(pictures))
            with self.computing(self.connector):
                tokens = self.connector(patches) * self.config.width**0.5
            parts = iter(tokens.split([len(x) for x in pictures]))
            found = [next(parts) if x is None else x for x in found]
        return found

    def embed_special(self, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Embed what stands before and after each picture, (B, 2, W) and (B, 1, W) or nothing; not scaled."""
        ids = torch.tensor(self.config.image_special_ids, dtype=torch.long, device=device)
        around = self.text.embed_tokens(ids).expand(batch, -1, -1)
        return around, around[:, :1]

    def embed_language(self, tokens: Tensor) -> Tensor:
        return self.text.embed_tokens(tokens) * self.config.width**0.5  # (B, n) -> (B, n, W)

    def embed_state(self, state: Tensor) -> Tensor:
        padded = F.pad(state, (0, self.config.max_state_dim - state.shape[-1]))
        return self.state_proj(padded)[:, None]  # (B, S) -> (B, 1, W)

    def embed_prefix(
        self,
        images: list[Tensor],
        image_masks: list[Tensor | None],
        tokens: Tensor,
        token_mask: Tensor,
        state: Tensor,
    ) -> tuple[Tensor, Tensor, int]:
        """Concatenate image, language and state tokens.

        Args: images per camera (B or 1, 3, h, w) float in [0, 1] (a batch of one is shared by all samples),
        or its tokens (B, n, W) as `embed_images` gives them; masks (B,) bool per camera, None for present in
        all; tokens and token_mask (B, n); state (B, S) normalised.
        Returns: embeddings (B, P, W), mask (B, P) bool, and how many of the P are images and language: these
        come first, and cannot see the state.
        """
        batch, device = len(tokens), tokens.device
        present = torch.ones(batch, 1, dtype=torch.bool, device=device)
        before, after = self.embed_special(batch, device)
        parts, masks = [], []
        for x, mask in zip(self.embed_images(images), image_masks, strict=True):
            parts += [before, x.expand(batch, -1, -1), after]
            seen = present if mask is None else mask[:, None]
            masks += [present.expand(-1, before.shape[1]), seen.expand(-1, x.shape[1])]
            masks += [present.expand(-1, after.shape[1])]  # special tokens stay when their picture is masked
        parts += [self.embed_language(tokens), self.embed_state(state)]
        masks += [token_mask, present]
        embs, mask = torch.cat(parts, dim=1), torch.cat(masks, dim=1)
        early = embs.shape[1] - 1
        short = max(0, self.config.prefix_length - embs.shape[1])
        return F.pad(embs, (0, 0, 0, short)), F.pad(mask, (0, short)), early

    def trunk(
        self,
        embs: Tensor,
        mask: Tensor,
        early: int,
        depth: int,
        world: WorldTokens | None = None,
        split: bool = False,
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Run the first `depth` text layers over (B, P, W), with world tokens (B, m, W) behind them.

        With `split`, the `early` tokens, images and language, run by themselves and without gradients: the
        same values, since they see none of the others, and one token to go back through instead of P.
        Returns: the hidden states after them, and the keys and values of each and of the layer that comes
        next.
        """
        position = mask.cumsum(1) - 1  # padded tokens do not advance it
        late = torch.arange(embs.shape[1], device=embs.device) >= early
        # Padded queries attend like any other: a row masked whole has no softmax, and nobody reads theirs.
        allowed = ((late[None, :] <= late[:, None]) & mask[:, None, :])[:, None]  # (B, 1, P, P)
        if world is not None:
            embs = torch.cat([embs, world.x.to(embs.dtype)], dim=1)  # (B, P, W) -> (B, P + m, W)
            position, allowed = self.place_world(position, allowed, late, mask, world)
        x, rope = embs.to(self.text.norm.weight.dtype), rope_table(position, self.config.head_dim)
        if not split:
            return self.run_layers(x, rope, allowed, depth)
        rope_early, rope_late = (
            tuple(r[:, :, part] for r in rope) for part in (slice(early), slice(early, None))
        )
        alone = allowed.hidden if isinstance(allowed, WorldMask) else allowed
        # Laid out anew: strided views would make compiled blocks compile twice.
        first, rest = x[:, :early].contiguous(), x[:, early:].contiguous()
        with torch.no_grad():
            first, past = self.run_layers(first.detach(), rope_early, alone[:, :, :early, :early], depth)
        rest, kv = self.run_layers(rest, rope_late, remake(allowed, lambda x: x[:, :, early:]), depth, past)
        return torch.cat([first, rest], dim=1), kv

    def run_layers(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        allowed: Mask,
        depth: int,
        past: list[tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Run text layers over tokens (B, L, W), after those whose keys and values are `past`."""
        past, kv, allowed = past or [None] * (depth + 1), [], remake(allowed, self.lay_out)
        with self.computing(self.text):
            for layer, before in zip(self.text.layers[:depth], past, strict=False):
                x, pair = layer(x, rope, allowed, before)
                kv.append(pair)
            for layer in self.text.layers[depth : depth + 1]:
                kv.append(join(past[depth], layer.keys_values(x, rope)))
        return x, kv

    def place_world(
        self, position: Tensor, allowed: Tensor, late: Tensor, mask: Tensor, world: WorldTokens
    ) -> tuple[Tensor, WorldMask]:
        """Extend positions (B, P) and what may be seen (B, 1, P, P) by m world tokens, stored last.

        Each hypothesis' positions go on from the unpadded images and language, whose number the state's is
        too: nothing else moves. They see images, language and one another. Who sees them: every token, or,
        where they are not for the early ones, only the state (and actions, in `velocity`).
        """
        count = world.x.shape[1]
        early = mask & ~late  # (B, P), images and language
        # Hypotheses share their positions: those that differ by chance alone may then change places.
        step = torch.arange(count, device=mask.device) % world.each
        own = early.sum(1, keepdim=True) + step
        rows = early[:, None, None, :].expand(-1, -1, count, -1)  # (B, 1, m, P)
        hidden = F.pad(torch.cat([allowed, rows], dim=2), (0, count))  # (B, 1, P + m, P + m)
        sees = torch.ones_like(late) if world.early else late
        sees = F.pad(sees, (0, count), value=True)  # (P + m,)
        shows = sees[None, :, None] & world.finite[:, None, :]  # (B, P + m, m)
        shown = torch.cat([hidden[..., : len(late)], shows[:, None]], dim=3)
        if world.bias is not None:
            shown = with_bias(shown, F.pad(world.bias, (len(late), 0)))
        return torch.cat([position, own], dim=1), WorldMask(hidden, shown, world.strength)

    def prefix(self, embs: Tensor, mask: Tensor, early: int, memory: MemoryCache | None = None) -> Prefix:
        """Run the trunk over (B, P, W) and keep each expert layer's keys and values.

        The trunk stops where the last expert layer reads: of that text layer only keys and values are needed.
        """
        world = None
        if self.fusion is not None:
            embs, world = self.fusion("prefix", embs, memory), self.fusion.world_tokens(memory)
        split = self.split and self.is_static(memory)
        _, kv = self.trunk(embs, mask, early, self.config.trunk_depth, world, split)
        pairs = zip(self.expert.layers, kv[:: self.config.stride], strict=True)
        with self.computing(self.expert):
            kv = [layer.project(*pair) if layer.cross else pair for layer, pair in pairs]
        masks = action_masks(mask, self.config.chunk_size, world)
        own = torch.arange(self.config.chunk_size, device=mask.device)
        positions = (mask.sum(1, keepdim=True) + own, own[None])
        ropes = tuple(rope_table(x, self.config.head_dim) for x in positions)
        return Prefix(kv, tuple(remake(x, self.lay_out) for x in masks), ropes)

    def lay_out(self, mask: Tensor) -> Tensor:
        """Make a mask what all layers of one pass add to their logits."""
        return lay_out(mask, self.config.heads // self.config.kv_heads, self.dtype)

    def is_static(self, memory: MemoryCache | None) -> bool:
        """Whether a gradient is recorded, and none of it can reach images and language.

        It can where tower, connector or trunk train, and where memory enters these tokens or is seen by them.
        """
        if not torch.is_grad_enabled():
            return False
        reached = memory is not None and self.fusion.reaches_prefix(memory)
        parts = (self.vision, self.connector, self.text)
        live = any(p.requires_grad for part in parts for p in part.parameters())
        return not reached and not live

    # ---- suffix ---------------------------------------------------------------------------------------

    def embed_time(self, time: Tensor) -> Tensor:
        """Encode flow times (B,) as sines and cosines (B, We), in float64: float32 moves actions by 3e-5."""
        steps = torch.linspace(0, 1, self.config.expert_width // 2, dtype=torch.float64, device=time.device)
        period = self.config.min_period * (self.config.max_period / self.config.min_period) ** steps
        angle = 2 * torch.pi * time.double()[:, None] / period
        return torch.cat([angle.sin(), angle.cos()], dim=-1)

    def embed_suffix(self, x_t: Tensor, time: Tensor) -> Tensor:
        """Embed noisy actions (B, C, A_max) at flow times (B,) -> (B, C, We)."""
        action = self.action_in_proj(x_t)
        clock = self.embed_time(time).to(action.dtype)[:, None].expand_as(action)
        return self.action_time_mlp_out(F.silu(self.action_time_mlp_in(torch.cat([action, clock], dim=-1))))

    def velocity(
        self, x_t: Tensor, time: Tensor, prefix: Prefix, memory: MemoryCache | None = None
    ) -> Tensor:
        """Predict the flow's velocity (B, C, A_max) at noisy actions x_t (B, C, A_max) and times (B,)."""
        h = self.embed_suffix(x_t, time)
        if self.fusion is not None:
            h = self.fusion("actions_in", h, memory)
        h = h.to(self.expert.norm.weight.dtype)
        with self.computing(self.expert):
            for i, (layer, past) in enumerate(zip(self.expert.layers, prefix.kv, strict=True)):
                h, _ = layer(h, prefix.ropes[layer.cross], prefix.masks[layer.cross], past)
                if self.fusion is not None:
                    h = self.fusion("layer", h, memory, i)
            h = self.expert.norm(h).float()
        if self.fusion is not None:
            h = self.fusion("actions_out", h, memory)
        return self.action_out_proj(h)

    # ---- training and inference -----------------------------------------------------------------------

    def forward(
        self, inputs: dict, noise: Tensor, time: Tensor, memory: Memory | Tensor | None = None
    ) -> Tensor:
        """Compute the flow-matching losses (B, R, C, A), real action dimensions only, before any reduction.

        Args: inputs as `embed_prefix` takes them, with "action" (B, C, A) normalised; noise (B, R, C, A_max)
        and time (B, R): R draws a sample share one prefix pass; memory, or its rows (B, M, D) alone.
        """
        batch, draws = time.shape
        cache = None if self.fusion is None else self.fusion.prepare(memory)
        prefix = self.prefix(*self.embed_prefix(*prefix_inputs(inputs)), cache).repeat(draws)
        x_t, target = flow_target(inputs["action"], noise, time)
        cache = None if cache is None else self.fusion.repeat(cache, draws)
        v = self.velocity(x_t.flatten(0, 1), time.flatten(), prefix, cache)  # (B*R, C, A_max)
        loss = (target - v.unflatten(0, (batch, draws))) ** 2
        return loss[..., : self.config.action_dim]

    @torch.no_grad()
    def denoise(
        self, noise: Tensor, prefix: Prefix, memory: MemoryCache | None = None, trace: list | None = None
    ) -> Tensor:
        """Integrate the flow from noise (B, C, A_max) at t=1 to actions at t=0 in `num_steps` Euler steps."""
        x, steps = noise, self.config.num_steps
        for k in range(steps):
            time = torch.full((len(x),), 1.0 - k / steps, dtype=x.dtype, device=x.device)
            v = self.velocity(x, time, prefix, memory)
            x = x - v / steps
            if trace is not None:
                trace.append((x, v))
        return x

    @torch.no_grad()
    def predict_chunk(self, inputs: dict, noise: Tensor, memory: Memory | Tensor | None = None) -> Tensor:
        """Predict chunks of normalised actions (B, C, A) from observations and noise (B, C, A_max)."""
        cache = None if self.fusion is None else self.fusion.prepare(memory)
        prefix = self.prefix(*self.embed_prefix(*prefix_inputs(inputs)), cache)
        return self.denoise(noise, prefix, cache)[..., : self.config.action_dim]


def prefix_inputs(inputs: dict) -> tuple:
    """Pick `embed_prefix`'s arguments out of a dictionary of inputs."""
    return tuple(inputs[key] for key in ("images", "image_masks", "tokens", "token_mask", "state"))


def flow_target(action: Tensor, noise: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    """Mix actions (B, C, A) with noise (B, R, C, A_max) at times (B, R): x_t and the true velocity."""
    padded = F.pad(action, (0, noise.shape[-1] - action.shape[-1]))[:, None]  # (B, C, A) -> (B, 1, C, A_max)
    t = time[..., None, None]
    return t * noise + (1 - t) * padded, noise - padded


def masked_mean(loss: Tensor, is_pad: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sum losses (B, R, C, A) over unpadded steps; give the sum and its number of terms."""
    if is_pad is None:
        return loss.sum(), torch.tensor(loss.numel(), device=loss.device)
    keep = ~is_pad[:, None, :, None]  # (B, C) -> (B, 1, C, 1)
    return torch.where(keep, loss, 0).sum(), keep.sum() * loss.shape[1] * loss.shape[-1]


def sample_means(loss: Tensor, is_pad: Tensor | None) -> Tensor:
    """Average losses (B, R, C, A) over each sample's own unpadded steps, (B,); 0 where all are padded."""
    if is_pad is None:
        return loss.flatten(1).mean(1)
    keep = ~is_pad[:, None, :, None]  # (B, C) -> (B, 1, C, 1)
    terms = keep.flatten(1).sum(1) * loss.shape[1] * loss.shape[-1]
    return torch.where(keep, loss, 0).flatten(1).sum(1) / terms.clamp(min=1)


# ---- checkpoints --------------------------------------------------------------------------------------


def load_policy(
    name: str | Path,
    revision: str | None = None,
    vlm: str | None = None,
    stats_of: str | None = None,
    allow_missing: bool = False,
    dtype: torch.dtype = torch.float32,
    fit: Fit | None = None,
) -> tuple[SmolVLA, Processor]:
    """Load a policy and its processor: a folder in lerobot's layout, or a hub id at a revision.

    Args: vlm names the language model's folder or hub id in the checkpoint's stead; stats_of chooses among
    the statistics of several data sets; allow_missing goes on without tensors or statistics that are missing;
    dtype is that of tower, trunk and expert, while the projections stay in float32; fit, what it is brought
    to, where it is to see another robot's data.
    Raises Refused, one line, for missing or broken files, tensors that do not fit and missing statistics.
    """
    folder, raw, language, config = open_checkpoint(str(name), revision, vlm)
    policy, among_weights = load_weights(config, folder, dtype, allow_missing)
    processor = load_processor(folder, config, raw, language, among_weights, stats_of, allow_missing, fit)
    policy.config = processor.config  # weights know neither cameras nor widths
    return policy, processor


def load_weights(
    config: SmolVLAConfig, folder: Path, dtype: torch.dtype = torch.float32, allow_missing: bool = False
) -> tuple[SmolVLA, dict[str, Tensor]]:
    """Build a policy on a folder's weights; give also the statistics that older checkpoints keep among them.

    Nothing is built when anything does not fit. Tensors of the wanted dtype stay memory-mapped: pages are
    read when they are used, and copied when changed.
    """
    tensors, statistics = read_weights(folder)
    with torch.device("meta"):  # no memory and no random draws for weights that are about to be replaced
        policy = SmolVLA(config)
    place(policy, tensors, folder, dtype, allow_missing)
    return policy, statistics


def start_from_vlm(
    preset: SmolVLAConfig, vlm: str, stats: Statistics, shapes: Shapes
) -> tuple[SmolVLA, Processor]:
    """Start from a language model's own folder or hub id, with a fresh expert beside it.

    The preset says what the folder does not: layers kept, the expert's share of the width, the chunk. Draws
    from torch's global generator; expert layers as lerobot does, with deviation 0.02.
    """
    folder = find_folder(vlm)
    language = read_language(folder)
    raw = lerobot_config(preset, vlm, shapes)
    sizes = language_sizes(language.config, raw)
    width = int(sizes["width"] * preset.expert_width / preset.width)
    config = dataclasses.replace(preset, **sizes, expert_width=width)
    with torch.device("meta"):
        policy = SmolVLA(config)
    tensors = read_language_weights(folder, config.layers)
    fresh = {n: p for n, p in policy.state_dict().items() if not n.startswith(VLM_PARTS)}
    draw(policy, set(fresh))
    for layer in policy.expert.layers:
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear) and not (layer.cross and name.endswith(("k_proj", "v_proj"))):
                nn.init.normal_(module.weight, std=0.02)
    drawn = {lerobot_key(name): p for name, p in policy.state_dict().items() if name in fresh}
    place(policy, tensors | drawn, folder)
    return policy, Processor(config, raw, language, stats)


# ---- command line -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DescribeConfig:
    """Say what a checkpoint is; without one, what the presets are."""

    checkpoint: Annotated[str | None, tyro.conf.Positional] = None
    """Checkpoint folder or hub id."""

    revision: str | None = None
    """Revision of the hub id, to pin it."""

    vlm: str | None = None
    """Folder or hub id of the language model; default: what the checkpoint names."""

    stats_of: str | None = None
    """Data set whose statistics to use, where a checkpoint holds those of several."""

    allow_missing: bool = False
    """Go on when tensors are missing or unexpected; missing statistics are shown in any case."""


def main(config: DescribeConfig) -> None:
    """Print one checkpoint, or the presets' sizes."""
    if config.checkpoint is not None:
        folder, raw, language, sizes = open_checkpoint(config.checkpoint, config.revision, config.vlm)
        policy, among = load_weights(sizes, folder, allow_missing=config.allow_missing)
        processor = load_processor(folder, sizes, raw, language, among, config.stats_of, allow_missing=True)
        policy.config = processor.config
        print(describe_checkpoint(folder, policy, processor))
        return
    for name, preset in PRESETS.items():
        with torch.device("meta"):
            policy = SmolVLA(preset)
        policy.freeze("expert")
        total = sum(p.numel() for p in policy.parameters())
        live = sum(p.numel() for p in policy.parameters() if p.requires_grad)
        print(f"{name:8s} {total:>13,} parameters, {live:>11,} trained with --freeze expert")


if __name__ == "__main__":
    with told():
        main(type_in(DescribeConfig, __doc__, ("checkpoint", "revision"), "model.py"))
