"""Normalisation, tokens and cameras: lerobot's formulas, older files' names, and bad input in one line."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from model import load_policy
from smolvla.checkpoint import fresh_processor
from smolvla.folders import WEIGHTS
from smolvla.language import build_tokenizer, fresh_language, language_config
from smolvla.processor import NEEDED, choose_statistics, sort_statistics

TEXT = "pick up the alphabet soup and place it in the basket"


def statistics(width: int, seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    low, high = torch.randn(width, generator=g), torch.rand(width, generator=g) + 3
    names = {
        name: high if name in ("std", "max", "q99", "q90") else low
        for pair in NEEDED.values()
        for name in pair
    }
    return names


STATS = {"observation.state": statistics(8, 0), "action": statistics(7, 1)}


def processor(stats: dict = STATS, **fields):
    out = fresh_processor(tiny.CONFIG, stats, [TEXT], (3, 32, 32))
    for name, value in fields.items():
        setattr(out, name, value)
    return out


def with_modes(mode: str):
    out = processor()
    out.normalizer["norm_map"] = {"VISUAL": "IDENTITY", "STATE": mode, "ACTION": mode}
    return out


# ---- normalisation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", NEEDED)
def test_every_mode_matches_its_formula_and_inverts(mode):
    action, p = torch.rand(2, 6, 7), with_modes(mode)
    low, high = STATS["action"]["mean"], STATS["action"]["std"]
    want = {"IDENTITY": action, "MEAN_STD": (action - low) / high}.get(
        mode, 2 * (action - low) / (high - low) - 1
    )
    torch.testing.assert_close(p.normalise("action", action), want)
    torch.testing.assert_close(p.unnormalise(p.normalise("action", action)), action)


def test_a_dimension_that_never_moves_becomes_minus_one_and_comes_back():
    p = with_modes("MIN_MAX")
    p.stats = {f: {k: v.clone() for k, v in e.items()} for f, e in STATS.items()}
    p.stats["action"]["max"][3] = p.stats["action"]["min"][3]
    p.stats_after = p.stats
    action = p.stats["action"]["min"].expand(2, 6, 7)
    assert p.normalise("action", action)[..., 3].unique().tolist() == [-1.0]
    torch.testing.assert_close(p.unnormalise(p.normalise("action", action)), action)


def test_an_unknown_mode_and_normalised_pictures_are_refused():
    for norm, message in (
        ({"STATE": "ROBUST", "ACTION": "MEAN_STD"}, "'ROBUST' of observation.state is unknown"),
        ({"STATE": "MEAN_STD", "ACTION": "MEAN_STD", "VISUAL": "MEAN_STD"}, "MEAN_STD of pictures"),
    ):
        raw = processor().raw | {"normalization_mapping": norm}
        with pytest.raises(ValueError, match=message):
            processor().__class__(tiny.CONFIG, raw, processor().language, STATS)


def test_steps_that_nothing_here_does_are_refused():
    p = processor()
    p.before["steps"].append({"registry_name": "delta_actions_processor", "config": {}})
    with pytest.raises(
        ValueError, match=r"policy_preprocessor\.json asks for steps.*delta_actions_processor"
    ):
        p.__post_init__()


# ---- statistics of older checkpoints ------------------------------------------------------------------


def to_buffers(folder, dataset: str = "") -> dict[str, torch.Tensor]:
    """Rewrite a checkpoint as one from before there were processors: statistics among the weights."""
    name = f"{dataset}_" if dataset else ""
    stats = load_file(next(folder.glob("policy_preprocessor_step*.safetensors")))
    old = {}
    for module in ("normalize_inputs", "normalize_targets", "unnormalize_outputs"):
        for key, value in stats.items():
            feature, stat = key.rsplit(".", 1)
            if (feature == "action") == (module != "normalize_inputs"):
                old[f"{module}.{name}buffer_{feature.replace('.', '_')}.{stat}"] = value.clone()
    save_file(load_file(folder / WEIGHTS) | old, folder / WEIGHTS)
    for path in folder.glob("policy_*"):
        path.unlink()
    return old


def same_numbers(a, b) -> bool:
    state, action = torch.randn(2, 6), torch.randn(2, 10, 7)
    pairs = ((p.normalise("observation.state", state), p.unnormalise(action)) for p in (a, b))
    return all(torch.equal(x, y) for x, y in zip(*pairs))


def test_statistics_among_the_weights_are_used_where_there_are_no_processors(folder):
    _, want = load_policy(folder)
    to_buffers(folder)
    policy, got = load_policy(folder)
    assert same_numbers(want, got)
    assert not any("normalize" in name for name in policy.state_dict())


def test_statistics_of_several_data_sets_need_a_choice(folder):
    _, want = load_policy(folder)
    old = to_buffers(folder, "so100-red")
    other = {key.replace("so100-red", "so100"): value + 1 for key, value in old.items()}
    save_file(load_file(folder / WEIGHTS) | other, folder / WEIGHTS)
    with pytest.raises(
        ValueError, match=r"missing.*there are those of so100, so100-red: choose with --stats-of"
    ):
        load_policy(folder)
    assert same_numbers(want, load_policy(folder, stats_of="so100-red")[1])
    assert not same_numbers(want, load_policy(folder, stats_of="so100")[1])
    with pytest.raises(
        ValueError, match=r"--stats-of so101 is not in the checkpoint; it has statistics of so100"
    ):
        load_policy(folder, stats_of="so101")


def test_a_migrated_base_model_says_what_its_files_hold_and_never_passes_values_in_silence(folder):
    for path in folder.glob("policy_*processor_step*.safetensors"):
        actions = {k: v for k, v in load_file(path).items() if k.startswith("action.")}
        save_file({f"so100.buffer.{key}": value for key, value in actions.items()}, path)
    with pytest.raises(ValueError, match=r"mean, std of observation\.state for MEAN_STD; .* --stats-of"):
        load_policy(folder)
    with pytest.raises(ValueError, match=r"missing: mean, std of observation\.state for MEAN_STD \(.*\)$"):
        load_policy(folder, stats_of="so100")
    _, lenient = load_policy(folder, stats_of="so100", allow_missing=True)
    state = torch.randn(2, 6)
    assert lenient.normalise("observation.state", state) is state  # what lerobot does
    assert not torch.equal(lenient.normalise("action", torch.ones(7)), torch.ones(7))


def test_buffers_that_were_never_filled_count_as_missing(folder):
    old = to_buffers(folder)
    save_file(load_file(folder / WEIGHTS) | {k: v * torch.inf for k, v in old.items()}, folder / WEIGHTS)
    with pytest.raises(
        ValueError, match=r"mean, std of observation\.state for MEAN_STD; mean, std of action"
    ):
        load_policy(folder)


def test_actions_statistics_of_another_width_are_refused(folder):
    path = next(folder.glob("policy_preprocessor_step*.safetensors"))
    save_file({k: torch.cat([v, v])[:9] if "action" in k else v for k, v in load_file(path).items()}, path)
    with pytest.raises(ValueError, match=r"statistics of action are 9 wide, not 7.*--statistics data"):
        load_policy(folder)


def test_all_three_ways_of_naming_statistics_are_told_apart():
    one = torch.ones(1)
    flat = {
        "action.mean": one,
        "so100.buffer.action.mean": one,
        "normalize_inputs.so100-red_buffer_observation_state.std": one,
        "unnormalize_outputs.buffer_action.std": one,
    }
    found = sort_statistics(flat, ["observation.state", "action"])
    names = {dataset: {f: sorted(entry) for f, entry in stats.items()} for dataset, stats in found.items()}
    assert names == {
        "": {"action": ["mean", "std"]},
        "so100": {"action": ["mean"]},
        "so100-red": {"observation.state": ["std"]},
    }
    assert choose_statistics(found, None) is found[""]


# ---- tokens -------------------------------------------------------------------------------------------


def test_the_built_tokenizer_is_lossless_and_short_on_its_instructions():
    tokenizer = build_tokenizer([TEXT, "open the drawer"], 300)
    assert len(tokenizer.encode(TEXT).ids) < len(TEXT) / 2
    for other in (TEXT, "wholly unseen wörds, 42!\n"):
        assert tokenizer.decode(tokenizer.encode(other).ids) == other


def test_a_fresh_vocabulary_stays_within_its_size_and_has_the_tokens_around_pictures():
    many = [f"pick up the {a} and put it {b}" for a in ("red cup", "blue box") for b in ("in", "on")]
    language = fresh_language(language_config(tiny.CONFIG), many)
    assert language.tokenizer.get_vocab_size() <= tiny.CONFIG.vocab_size
    assert len(set(language.image_special_ids)) == 2
    assert language.pad_id == 2


def test_instructions_end_in_a_new_line_are_cut_and_an_empty_one_is_an_error():
    p = processor()
    a, b = (p.tokenize([text])[0] for text in ("pick it up", "pick it up\n"))
    assert torch.equal(a, b)
    assert p.tokenize(["x" * 500])[0].shape[1] == tiny.CONFIG.tokenizer_max_length
    for empty in ("", "  "):
        with pytest.raises(ValueError, match="an instruction is empty"):
            p.tokenize([empty])


def test_tokens_of_a_batch_are_padded_as_the_preprocessor_says():
    p = processor()
    tokens, mask = p.tokenize(["go", TEXT])
    assert mask.sum(1).tolist() == [len(p.language.tokenizer.encode(t + "\n").ids) for t in ("go", TEXT)]
    assert tokens[0, mask[0].logical_not()].unique().tolist() == [p.language.pad_id]
    step = next(s for s in p.before["steps"] if s["registry_name"] == "tokenizer_processor")
    step["config"] |= {"padding": "max_length", "max_length": 20}
    assert p.tokenize(["go"])[0].shape == (1, 20)


def test_the_padding_token_is_the_tokenizers_own():
    language = processor().language
    settings = {"pad_token": {"content": "<|im_start|>"}}
    language.files = language.files | {"tokenizer_config.json": json.dumps(settings).encode()}
    language.config = language.config | {"pad_token_id": 128002}
    assert language.pad_id == 1
    language.files = {}
    assert language.pad_id == language.config["text_config"]["pad_token_id"] == 2


# ---- cameras and widths -------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [["front"], ["image", "front"]])
def test_a_wrong_camera_name_is_refused_with_both_sides_names(names):
    batch = {f"observation.images.{name}": torch.zeros(1, 3, 8, 8) for name in names}
    batch |= {"observation.state": torch.zeros(1, 8), "task": ["go"]}
    with pytest.raises(ValueError) as error:
        processor()(batch)
    assert "cameras are observation.images.image, observation.images.image2; the batch has" in str(
        error.value
    )
    assert all(name in str(error.value) for name in batch if "images" in name)


def test_an_absent_camera_is_left_out_and_unknown_features_are_ignored():
    batch = tiny.batch()
    del batch["observation.images.image2"]
    inputs = processor()(batch | {"observation.environment_state": torch.zeros(2, 3), "index": 7})
    assert len(inputs["images"]) == len(inputs["image_masks"]) == 1
    with pytest.raises(ValueError, match=r"the batch has none: rename"):
        del batch["observation.images.image"]
        processor()(batch)


@pytest.mark.parametrize(("feature", "width", "own"), [("observation.state", 9, 8), ("action", 6, 7)])
def test_a_state_or_action_of_another_width_is_refused(feature, width, own):
    batch = tiny.batch()
    batch[feature] = torch.zeros(*batch[feature].shape[:-1], width)
    with pytest.raises(ValueError, match=f"{feature} is {width} wide, the checkpoint's is {own}"):
        processor()(batch)


def test_instructions_are_padded_to_the_length_that_was_asked_for_and_no_further_than_the_models():
    p = processor()
    tasks = ["open the drawer", "put the black bowl on the plate"]
    assert p.longest(tasks) == max(int(p.tokenize([task])[1].sum()) for task in tasks)
    short, _ = p.tokenize(tasks[:1])
    p.pad_to = p.longest(tasks)
    tokens, mask = p.tokenize(tasks[:1])
    assert tokens.shape[1] == p.pad_to > short.shape[1]
    assert torch.equal(tokens[:, : short.shape[1]], short) and not mask[:, short.shape[1] :].any()
    p.pad_to = 10_000
    assert p.tokenize(tasks)[0].shape[1] == p.config.tokenizer_max_length
