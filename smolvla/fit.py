"""A checkpoint on data that are not its own: whose cameras, widths and statistics apply, a line for each.

Weights know neither cameras nor widths: pictures are embedded one by one, states and actions padded. So a
policy starts on another robot's data as it is; what changes are config.json and the two processors. lerobot
changes only half of them (its issue 4517): what it fine-tunes keeps the base's `input_features`, beside the
data's statistics and rename map. `own_fit` takes such a folder at the word of its statistics.

    policy, processor = load_policy("lerobot/smolvla_base", fit=Fit(cameras, 8, 7, rename, statistics))
    print("\\n".join(processor.notes))
    pytest tests/smolvla/test_fit.py

Source: lerobot 0.6.1 (policies/factory.py, scripts/lerobot_train.py).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from smolvla.config import SmolVLAConfig
from smolvla.processor import (
    ACTION,
    STATE,
    Processor,
    Statistics,
    describe_processing,
    find_step,
    rename_map,
    with_rename,
)

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Fit:
    """What a checkpoint is brought to."""

    cameras: dict[str, Shape | None]
    """Those that the policy sees, by its own names, with their pictures' shape; None: as config.json says."""
    state_dim: int
    action_dim: int
    rename: dict[str, str]
    """Names that cameras have outside -> the policy's, where these differ."""
    stats: Statistics | None = None
    """The data's statistics; None: the checkpoint's own stay."""
    source: str = "the data"
    """Whose cameras and widths these are, in words."""


def own_fit(config: SmolVLAConfig, before: dict, stats: Statistics) -> Fit | None:
    """Say what a checkpoint's statistics know better than its config.json; None where the two agree.

    Statistics name the cameras of the data that were trained on; where they name none and the width of the
    state is another one too, the cameras are those that the rename map leads to.
    """
    rename, known = rename_map(before), config.given_cameras
    width = len(next((x for x in stats.get(STATE, {}).values() if x.numel() > 1), range(config.state_dim)))
    seen = {rename.get(feature, feature) for feature in stats}
    if not seen & set(known) and width != config.state_dim:
        seen = set(rename.values())
    cameras = [name for name in known if name in seen] or list(known)
    if width == config.state_dim and len(cameras) == len(known):
        return None
    source = "the checkpoint's own statistics"
    return Fit(dict.fromkeys(cameras), width, config.action_dim, rename, source=source)


def adapt(
    config: SmolVLAConfig, raw: dict, before: dict, after: dict, fit: Fit
) -> tuple[SmolVLAConfig, dict, dict, dict, list[str]]:
    """Bring sizes, config.json and both descriptions to a fit; give also a line for each change.

    Raises Refused for a width that the model has no room for.
    """
    kept = {name for name in config.cameras if name in fit.cameras or name not in config.given_cameras}
    notes = [f"{short(new)} is {short(old)} of {fit.source}" for old, new in fit.rename.items()]
    gone = [short(name) for name in config.cameras if name not in kept]
    if gone:
        notes.append(f"{', '.join(gone)} of the checkpoint: not in {fit.source}, left out")
    for feature, old, new in (
        (STATE, config.state_dim, fit.state_dim), (ACTION, config.action_dim, fit.action_dim),
    ):  # fmt: skip
        if old != new:
            notes.append(f"{feature} is {new} wide in {fit.source}, {old} in the checkpoint's config.json")
    inputs = {
        name: feature | {"shape": list(fit.cameras[name])} if fit.cameras.get(name) else feature
        for name, feature in raw["input_features"].items()
        if name in kept or feature["type"] != "VISUAL"
    }
    inputs[STATE] = inputs[STATE] | {"shape": [fit.state_dim]}
    outputs = raw["output_features"] | {ACTION: raw["output_features"][ACTION] | {"shape": [fit.action_dim]}}
    config = dataclasses.replace(
        config,
        cameras=tuple(name for name in config.cameras if name in kept),
        state_dim=fit.state_dim,
        action_dim=fit.action_dim,
    )
    raw = raw | {"input_features": inputs, "output_features": outputs}
    if not before:
        before, after = describe_processing(raw)
    before = with_features(before, "normalizer_processor", inputs | outputs)
    after = with_features(after, "unnormalizer_processor", outputs)
    return config, raw, with_rename(before, fit.rename), after, notes


def refit(processor: Processor, fit: Fit) -> Processor:
    """Bring a processor to a fit; its notes grow by what changes."""
    names = ("config", "raw", "before", "after", "notes")
    changed = dict(zip(names, adapt(*(getattr(processor, name) for name in names[:4]), fit), strict=True))
    stats = {} if fit.stats is None else {"stats": fit.stats, "stats_after": fit.stats}
    return dataclasses.replace(
        processor, **changed | stats | {"notes": [*processor.notes, *changed["notes"]]}
    )


def with_features(description: dict, step: str, features: dict) -> dict:
    """Give a description whose normalising step knows these features."""
    there = find_step(description, step)
    if not there:
        return description
    changed = there | {"config": there.get("config", {}) | {"features": features}}
    return description | {"steps": [changed if each is there else each for each in description["steps"]]}


def short(name: str) -> str:
    """A camera's name for a person; what a stranger's file makes unprintable is spelt out."""
    name = name.removeprefix("observation.images.")
    return name if name.isprintable() else repr(name)
