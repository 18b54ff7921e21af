"""Between raw observations and the policy: normalisation, tokens and cameras, as lerobot's two processors do.

A checkpoint describes its processing in `policy_preprocessor.json` and `policy_postprocessor.json`, each a
list of steps, with statistics in files that the steps name. `Processor` does what those steps say, and hands
the descriptions on unchanged when a checkpoint is saved. Older checkpoints have neither file, and their
statistics among the weights.

    policy, processor = load_policy("runs/demo/E0-s0/last")        # checkpoint.py
    inputs = processor({"observation.images.image": images, "observation.state": state, "task": tasks})

Shapes: B batch, C actions in a chunk, A action width, S state width, n language tokens. Source: lerobot 0.6.1
(processor/normalize_processor.py, tokenizer_processor.py, policies/smolvla/processor_smolvla.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from files import Refused, plain_name, read_tensors, save_tensors, to_json
from smolvla.config import SmolVLAConfig
from smolvla.language import Language

Statistics = dict[str, dict[str, Tensor]]  # feature -> statistic -> (width,)

STATE, ACTION = "observation.state", "action"
PRE, POST = "policy_preprocessor", "policy_postprocessor"
# What each way of normalising needs: the two values that become 0 and 1, or -1 and 1.
NEEDED = {
    "IDENTITY": (), "MEAN_STD": ("mean", "std"), "MIN_MAX": ("min", "max"), "QUANTILES": ("q01", "q99"),
    "QUANTILE10": ("q10", "q90"),
}  # fmt: skip
# What the two descriptions hold of what is read here.
STEPS = {
    "steps": [
        {
            "registry_name?": str,
            "class?": str,
            "config?": {
                "rename_map?": {str: str}, "max_length?": int, "padding?": str, "norm_map?": {str: str},
                "eps?": int | float, "normalize_observation_keys?": ([str], type(None)),
            },
        }
    ]
}  # fmt: skip
# Steps of the two descriptions that this file does, or that are no more than moving tensors about.
KNOWN_STEPS = (
    "rename_observations_processor",
    "to_batch_processor",
    "smolvla_new_line_processor",
    "tokenizer_processor",
    "device_processor",
    "normalizer_processor",
    "unnormalizer_processor",
)


# ---- statistics ---------------------------------------------------------------------------------------


def sort_statistics(flat: dict[str, Tensor], features: list[str]) -> dict[str, Statistics]:
    """Sort flat names into data set -> feature -> statistic; data set "" where none is named.

    Three ways of naming are about: `action.mean`, `so100.buffer.action.mean` (a checkpoint of several data
    sets, migrated) and, among the weights of older checkpoints, `normalize_inputs.so100_buffer_action.mean`.
    """
    dotted = {feature.replace(".", "_"): feature for feature in features}
    found: dict[str, Statistics] = {}
    for key, value in flat.items():
        old = re.fullmatch(r"\w*normalize_\w+\.(?:([^.]+)_)?buffer_([^.]+)\.(\w+)", key)
        new = re.fullmatch(r"(?:(.+)\.buffer\.)?(.+)\.(\w+)", key)
        if old or new:
            dataset, feature, name = (old or new).groups()
            feature = dotted.get(feature, feature)
            found.setdefault(dataset or "", {}).setdefault(feature, {})[name] = value
    return found


def read_statistics(folder: Path, description: dict, features: list[str]) -> dict[str, Statistics]:
    """Read the statistics that a processor's description names, sorted as `sort_statistics` does."""
    step = find_step(description, "normalizer_processor") or find_step(description, "unnormalizer_processor")
    for each in description["steps"]:
        if "state_file" in each:
            plain_name(each["state_file"], f"{description.get('name')}.json")
    file = step and step.get("state_file")
    return sort_statistics(read_tensors(folder / file), features) if file else {}


def choose_statistics(found: dict[str, Statistics], dataset: str | None) -> Statistics:
    """Take the statistics of no data set in particular, or of the one that was asked for.

    Raises Refused when that one is not there.
    """
    if dataset is not None and dataset not in found:
        named = ", ".join(sorted(name for name in found if name)) or "none by name"
        raise Refused(f"--stats-of {dataset} is not in the checkpoint; it has statistics of {named}")
    return found.get(dataset or "", {})


# ---- the two descriptions -----------------------------------------------------------------------------


def describe_processing(raw: dict) -> tuple[dict, dict]:
    """Write lerobot's pre- and postprocessor descriptions for a config.json."""
    norm = {"eps": 1e-8, "norm_map": raw["normalization_mapping"]}
    tokens = {
        "max_length": raw["tokenizer_max_length"], "task_key": "task", "padding_side": "right",
        "padding": raw["pad_language_to"], "truncation": True, "tokenizer_name": raw["vlm_model_name"],
    }  # fmt: skip
    device = {"registry_name": "device_processor", "config": {"device": "cpu", "float_dtype": None}}
    inputs = norm | {"features": raw["input_features"] | raw["output_features"]}
    outputs = norm | {"features": raw["output_features"]}
    before = [
        {"registry_name": "rename_observations_processor", "config": {"rename_map": {}}},
        {"registry_name": "to_batch_processor", "config": {}},
        {"registry_name": "smolvla_new_line_processor", "config": {}},
        {"registry_name": "tokenizer_processor", "config": tokens},
        device,
        {
            "registry_name": "normalizer_processor", "config": inputs,
            "state_file": f"{PRE}_step_5_normalizer_processor.safetensors",
        },
    ]  # fmt: skip
    after = [
        {
            "registry_name": "unnormalizer_processor", "config": outputs,
            "state_file": f"{POST}_step_0_unnormalizer_processor.safetensors",
        },
        device,
    ]  # fmt: skip
    return {"name": PRE, "steps": before}, {"name": POST, "steps": after}


def find_step(description: dict, name: str) -> dict:
    """Give a step of a description by its registry name; empty when there is none."""
    return next((step for step in description.get("steps", ()) if step.get("registry_name") == name), {})


def rename_map(before: dict) -> dict[str, str]:
    """Give the names that a preprocessor's description gives to features: outside -> the policy's."""
    return find_step(before, "rename_observations_processor").get("config", {}).get("rename_map", {})


def with_rename(before: dict, names: dict[str, str]) -> dict:
    """Give a preprocessor's description that renames so, as lerobot's training writes it."""
    if rename_map(before) == names:
        return before
    step = {"registry_name": "rename_observations_processor", "config": {"rename_map": names}}
    others = [s for s in before["steps"] if s.get("registry_name") != step["registry_name"]]
    return before | {"steps": [step, *others]}


def check_steps(description: dict) -> None:
    """Raise Refused when a description asks for steps that nothing here does."""
    names = [step.get("registry_name") or step.get("class", "?") for step in description["steps"]]
    unknown = [name for name in names if name not in KNOWN_STEPS]
    if unknown:
        raise Refused(
            f"{description.get('name')}.json asks for steps that are not done here: {', '.join(unknown)}"
        )


# ---- processor ----------------------------------------------------------------------------------------


@dataclass
class Processor:
    """Raw observations -> policy inputs, and normalised actions -> the robot's.

    Raises Refused for statistics that are missing or of another width (`allow_missing`: features without
    statistics pass unchanged, as lerobot lets them in silence) and for steps that nothing here does.
    """

    config: SmolVLAConfig
    raw: dict  # lerobot's config.json
    language: Language
    stats: Statistics
    before: dict = field(default_factory=dict)  # policy_preprocessor.json
    after: dict = field(default_factory=dict)  # policy_postprocessor.json
    stats_after: Statistics = field(default_factory=dict)  # the postprocessor's own
    allow_missing: bool = False
    pad_to: int = 0  # tokens that instructions are padded to at least, so that batches share one length
    notes: list[str] = field(default_factory=list)  # a line for each thing in which it differs from its files

    def __post_init__(self) -> None:
        self._ids: dict[str, list[int]] = {}
        if not self.before:
            self.before, self.after = describe_processing(self.raw)
        self.stats_after = self.stats_after or self.stats
        for description in (self.before, self.after):
            check_steps(description)
        longest = find_step(self.before, "tokenizer_processor").get("config", {}).get("max_length", 1)
        if not 1 <= longest <= 100_000:
            raise Refused(f"{PRE}.json: max_length {longest} of an instruction must lie in 1..100000 tokens")
        if self.norm_map.get("VISUAL", "IDENTITY") != "IDENTITY":
            raise Refused(
                f"normalization_mapping {self.norm_map['VISUAL']} of pictures: only IDENTITY is done here"
            )
        missing = self.missing()
        if missing and not self.allow_missing:
            raise Refused(
                f"statistics are missing: {'; '.join(missing)} (--allow-missing takes values as they are)"
            )
        for feature, stats in self.tables:
            width = self.config.action_dim if feature == ACTION else self.config.state_dim
            sizes = {len(stats[feature][name]) for name in self.used(feature, stats)} - {width}
            if sizes:
                raise Refused(
                    f"statistics of {feature} are {sizes.pop()} wide, not {width}, and of another robot: in "
                    "training, --statistics data takes the data's"
                )

    @property
    def tables(self) -> tuple[tuple[str, Statistics], ...]:
        """What is normalised, and by which statistics: states, actions, and actions on their way back."""
        return (STATE, self.stats), (ACTION, self.stats), (ACTION, self.stats_after)

    @property
    def normalizer(self) -> dict:
        return find_step(self.before, "normalizer_processor").get("config", {})

    @property
    def norm_map(self) -> dict[str, str]:
        return self.normalizer.get("norm_map", self.raw["normalization_mapping"])

    def mode(self, feature: str) -> str:
        """The way a feature is normalised; ValueError when it is not one of NEEDED."""
        only = self.normalizer.get("normalize_observation_keys")
        if feature != ACTION and only is not None and feature not in only:
            return "IDENTITY"
        mode = self.norm_map.get("ACTION" if feature == ACTION else "STATE", "IDENTITY")
        if mode not in NEEDED:
            raise Refused(
                f"normalization_mapping {mode!r} of {feature} is unknown: {', '.join(NEEDED)} are known"
            )
        return mode

    def used(self, feature: str, stats: Statistics) -> tuple[str, ...]:
        """The statistics that normalise a feature; none where one is missing or, never filled, not finite."""
        names, entry = NEEDED[self.mode(feature)], stats.get(feature, {})
        return names if all(name in entry and entry[name].isfinite().all() for name in names) else ()

    def missing(self) -> list[str]:
        """Name what the normalisation needs and has not, a feature at a time."""
        lacking = [f for f, stats in self.tables if NEEDED[self.mode(f)] and not self.used(f, stats)]
        modes = {feature: self.mode(feature) for feature in lacking}  # each once
        return [f"{', '.join(NEEDED[mode])} of {feature} for {mode}" for feature, mode in modes.items()]

    def normalise(self, feature: str, x: Tensor) -> Tensor:
        """Normalise a state or an action (..., width) with the checkpoint's statistics."""
        names = self.used(feature, self.stats)
        if not names:
            return x
        low, high = (self.stats[feature][name].to(x) for name in names)
        eps = self.normalizer.get("eps", 1e-8)
        if names == ("mean", "std"):
            return (x - low) / (high + eps)
        return 2 * (x - low) / positive(high - low, eps) - 1

    def unnormalise(self, action: Tensor) -> Tensor:
        """Give actions (..., A) in the robot's units."""
        names = self.used(ACTION, self.stats_after)
        if not names:
            return action
        low, high = (self.stats_after[ACTION][name].to(action) for name in names)
        if names == ("mean", "std"):
            return action * high + low
        eps = find_step(self.after, "unnormalizer_processor").get("config", {}).get("eps", 1e-8)
        return (action + 1) / 2 * positive(high - low, eps) + low

    def longest(self, tasks: list[str]) -> int:
        """The number of tokens of the longest of these instructions."""
        return int(self.tokenize(tasks)[1].sum(1).max())

    @property
    def token_settings(self) -> dict:
        return find_step(self.before, "tokenizer_processor").get("config", {})

    @property
    def most_tokens(self) -> int:
        """Tokens after which an instruction is cut."""
        return self.token_settings.get("max_length", self.config.tokenizer_max_length)

    def encode(self, task: str) -> list[int]:
        """Turn an instruction into its token ids, all of them; an empty instruction is an error."""
        if not task or not task.strip():
            raise Refused(f"an instruction is empty ({task!r}): a policy without one cannot know its task")
        if task not in self._ids:
            text = task if task.endswith("\n") else task + "\n"
            self._ids[task] = self.language.tokenizer.encode(text, add_special_tokens=False).ids
        return self._ids[task]

    def cut(self, tasks: Iterable[str]) -> list[str]:
        """Say of each instruction that has too many tokens how many, and what is lost.

        Raises Refused where two of them become the same.
        """
        longest, lines, known = self.most_tokens, [], {}
        for task in sorted(set(tasks), key=lambda task: len(self.encode(task))):
            ids = self.encode(task)
            other = known.setdefault(tuple(ids[:longest]), task)
            if len(ids) <= longest:
                continue
            if other != task:
                raise Refused(
                    f'"{other}" and "{task}" are one and the same in their first {longest} tokens, the '
                    "tokenizer's max_length: shorten them, or leave one out with --task-ids"
                )
            lost = self.language.tokenizer.decode(ids[longest:]).strip()
            lines.append(f'"{task}" has {len(ids)} tokens and is cut to {longest}: "{lost}" is lost')
        return lines

    def tokenize(self, tasks: list[str]) -> tuple[Tensor, Tensor]:
        """Turn instructions into token ids and mask, (B, n) each; an empty instruction is an error."""
        settings, longest = self.token_settings, self.most_tokens
        rows = [self.encode(task)[:longest] for task in tasks]
        fixed = settings.get("padding", self.raw["pad_language_to"]) == "max_length"
        length = longest if fixed else max(min(self.pad_to, longest), max(map(len, rows)))
        tokens = torch.full((len(rows), length), self.language.pad_id)
        mask = torch.zeros(len(rows), length, dtype=torch.bool)
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = True
        return tokens, mask

    def rename(self, batch: dict) -> dict:
        """Give features from outside the names that the checkpoint knows, by the preprocessor's own map."""
        names = rename_map(self.before)
        return {names.get(key, key): value for key, value in batch.items()} if names else batch

    def __call__(self, batch: dict) -> dict:
        """Make the policy's inputs from a batch under the checkpoint's feature names (`rename`).

        Args: batch with camera images (B, 3, h, w) uint8 or float in [0, 1], or a camera's tokens (B, n, W)
        (latents/tower.py), which pass as they are; "observation.state" (B, S), "task" (list of str), and for
        training "action" (B, C, A) and "action_is_pad" (B, C); "<camera>_padding_mask" (B,) where given.
        Images and states may have an axis of observations after the first: the last one counts.
        Raises Refused for cameras that the checkpoint does not know and for other widths than its own.
        """
        state = self.last(batch[STATE], 2).float()
        self.check_width(STATE, state, self.config.state_dim)
        images, masks = self.cameras(batch)
        tokens, token_mask = (x.to(state.device) for x in self.tokenize(batch["task"]))
        inputs = {
            "images": images, "image_masks": masks, "state": self.normalise(STATE, state),
            "tokens": tokens, "token_mask": token_mask,
        }  # fmt: skip
        if ACTION in batch:
            self.check_width(ACTION, batch[ACTION], self.config.action_dim)
            inputs |= {"action": self.normalise(ACTION, batch[ACTION]), "is_pad": batch.get("action_is_pad")}
        return inputs

    def cameras(self, batch: dict) -> tuple[list[Tensor], list[Tensor | None]]:
        """Give the pictures that are there, then black masked ones for up to `empty_cameras` absent ones."""
        known = self.config.cameras
        present = [name for name in known if name in batch]
        strange = [
            n
            for n in batch
            if n.startswith("observation.image") and not n.endswith("_padding_mask") and n not in known
        ]
        absent = len(known) - len(present)
        if not present or (strange and absent > self.config.empty_cameras):
            raise Refused(
                f"the checkpoint's cameras are {', '.join(known)}; the batch has "
                f"{', '.join(present + strange) or 'none'}: rename the batch's"
            )
        images = [self.last(batch[name], 4) for name in present]
        images = [x.float() / 255 if x.dtype == torch.uint8 else x for x in images]
        masks = [batch.get(f"{name}_padding_mask") for name in present]
        for _ in range(min(self.config.empty_cameras, absent)):
            images.append(images[0].new_zeros(1, 3, self.config.image_size, self.config.image_size))
            masks.append(torch.zeros(len(images[0]), dtype=torch.bool, device=images[0].device))
        return images, [None if mask is None else mask.bool() for mask in masks]

    @staticmethod
    def last(x: Tensor, dims: int) -> Tensor:
        """Drop an axis of observations, where there is one, but for its last entry."""
        return x[:, -1] if x.ndim > dims else x

    @staticmethod
    def check_width(feature: str, x: Tensor, width: int) -> None:
        if x.shape[-1] != width:
            raise Refused(
                f"{feature} is {x.shape[-1]} wide, the checkpoint's is {width}: it is of another robot, "
                "or the data set's features need renaming"
            )

    def save(self, folder: Path) -> None:
        """Write the two descriptions, and the statistics that they name."""
        both = ((PRE, self.before, self.stats), (POST, self.after, self.stats_after))
        for name, description, stats in both:
            flat = {f"{f}.{k}": t.clone() for f, entry in stats.items() for k, t in entry.items()}
            steps = []
            for number, step in enumerate(description["steps"]):
                step = {key: value for key, value in step.items() if key != "state_file"}
                if step.get("registry_name") in ("normalizer_processor", "unnormalizer_processor"):
                    # Under a name of ours, as lerobot makes it: what a checkpoint says could lead anywhere.
                    step["state_file"] = f"{name}_step_{number}_{step['registry_name']}.safetensors"
                    save_tensors(flat, folder / step["state_file"])
                steps.append(step)
            (folder / f"{name}.json").write_text(to_json(description | {"steps": steps}))


def positive(span: Tensor, eps: float) -> Tensor:
    """A range, or `eps` where it is zero: a dimension that never moves becomes -1."""
    return torch.where(span == 0, eps, span)
