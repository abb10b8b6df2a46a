"""Hyperparameters: the tables of the specification, and overrides from the shell."""

import pytest

from diffusion import LatentDiffusion, UNet
from hps import (
    ARCHITECTURE_DIFFUSION,
    ARCHITECTURE_VQVAE,
    HPS_DIFFUSION,
    HPS_VQVAE,
    RANGES,
    TASKS,
    HParams,
    apply_overrides,
    check,
)
from vqvae import VQVAE

SPECIFIED_VQVAE = dict(
    image_shape=[1, 1024, 768], in_channels=1, hidden_channels=128, res_channels=32, nb_res_layers=2, nb_levels=5,
    scaling_rates=[4, 2, 2, 2, 2], embed_dim=64, nb_entries=512, codebook_decay=0.99,
    learning_rate=1e-4, batch_size=4, beta=0.25, recon_loss="mse", amp=True, max_epochs=100, noise_level=0.2,
    nb_workers=4,
)  # fmt: skip
SPECIFIED_DIFFUSION = dict(
    image_shape=[1, 1024, 768], timesteps=1000, linear_start=0.0015, linear_end=0.0195,
    in_channels=256, out_channels=128, model_channels=192, channel_mult=[1, 2, 4], num_res_blocks=2,
    attention_levels=[1, 2], num_head_channels=64, dropout=0.0, use_checkpoint=True,
    learning_rate=2e-4, batch_size=4, max_epochs=200, grad_clip_norm=1.0, l_simple_weight=1.0, original_elbo_weight=0.0,
    parameterization="eps", ema_decay=0.9999, ddim_steps=50, ddim_eta=0.0, noise_level=0.2, nb_workers=4,
)  # fmt: skip


@pytest.mark.parametrize("task", ["cbis-ddsm", "folder"])
@pytest.mark.parametrize("table, specified", [(HPS_VQVAE, SPECIFIED_VQVAE), (HPS_DIFFUSION, SPECIFIED_DIFFUSION)])
def test_reference_tasks_have_the_values_of_the_specification(table, specified, task):
    assert {key: table[task][key] for key in specified} == specified
    assert {key: type(table[task][key]) for key in specified} == {key: type(v) for key, v in specified.items()}


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (dict(noise_levels=[0.1]), "noise_levels=[0.1]: must be two numbers"),
        (dict(noise_levels=[0.4, 0.1]), "must be two numbers greater than 0, the lesser first"),
        (dict(noise_levels=[0.0, 0.1]), "must be two numbers greater than 0"),
        (dict(noise_levels=[0.1, 0.4]), "one model serves several levels with stabilize=True alone"),
        (dict(scale_range=[]), "scale_range=[]: must be two numbers"),
        (dict(stabilize=True, noise_level=0.0), "stabilize=True: needs a noise_level greater than 0"),
        (
            dict(noise_level=0.0),
            "noise_level=0.0: leaves nothing unknown to sample; train at a level above 0, or with --hps",
        ),
        (dict(precondition="wiener"), "precondition=wiener: must be one of residual, none"),
        (dict(in_channels=384), "in_channels=384: must be twice out_channels=128"),
        (dict(mean_epochs=-1), "mean_epochs=-1: must not be negative"),
        (dict(fast_steps=0), "fast_steps=0: must be greater than 0"),
        (dict(mean_channels=0), "mean_channels=0: must be greater than 0"),
        (dict(mean_res_blocks=0), "mean_res_blocks=0: must be greater than 0"),
    ],
)
def test_settings_of_the_model_in_the_box_that_clash_are_refused(changes, sentence):
    with pytest.raises(ValueError) as refusal:
        check(HPS_DIFFUSION["cbis-ddsm"].updated(**changes))
    assert sentence in str(refusal.value)


LIMITS = {  # of a range: values just inside, and values just outside
    "be greater than 0": ([1e-9, 7], [0, -1, float("nan")]),
    "not be negative": ([0, 7], [-1e-9, float("nan")]),
    "lie between 0 and 1": ([0, 1, 0.5], [-0.01, 1.01, float("nan")]),
    "be two numbers greater than 0, the lesser first": (
        [[1, 1], [0.1, 2]],
        [[], [1], [2, 1], [0, 1], [1, float("inf")]],
    ),
    "be two numbers greater than 0, the lesser first, or empty": ([[], [0.1, 2]], [[1], [2, 1], [0, 1]]),
    "be a list of numbers greater than 0": ([[1], [4, 2]], [[], [2, 0]]),
    "be channels, height, width": ([[1, 1, 1]], [[1, 64], [1, 64, 0], [1, 1, 64, 48]]),
    "be three counts: train, validation, test": ([[1, 1, 1]], [[3, 2], [3, 2, 0], [1, 1, 1, 1]]),
}


def test_every_entry_with_a_range_is_held_to_it():
    for table in (HPS_VQVAE, HPS_DIFFUSION):
        hps = table["phantom"]
        for key in set(RANGES) & set(hps):
            words = RANGES[key].words
            inside, outside = LIMITS.get(words) or (words[len("be one of ") :].split(", "), ["", "other"])
            assert all(RANGES[key].holds(value) for value in [*inside, hps[key]])
            for value in outside:
                with pytest.raises(ValueError) as refusal:
                    check(hps.updated(**{key: value}))
                assert str(refusal.value) == f"--hps {key}={value}: must {words}"
    assert len(RANGES) > 60


def test_numbers_without_a_range_must_be_finite():
    assert "l_simple_weight" not in RANGES
    with pytest.raises(ValueError, match="--hps l_simple_weight=inf: must be finite"):
        check(HPS_DIFFUSION["phantom"].updated(l_simple_weight=float("inf")))
    with pytest.raises(ValueError, match="--hps learning_rate=inf: must be finite"):
        check(HPS_DIFFUSION["phantom"].updated(learning_rate=float("inf")))


def test_settings_that_are_no_more_are_passed_over():
    """Checkpoints hold them: they had one legal value."""
    for table, gone in ((HPS_VQVAE, {"residual_type": "rezero"}), (HPS_DIFFUSION, {"beta_schedule": "linear"})):
        hps = HParams(table["phantom"] | gone)
        check(hps)
        assert not set(gone) & set(hps.arguments(VQVAE) | hps.arguments(LatentDiffusion))


def test_a_range_of_noise_levels_is_read_from_the_shell():
    hps, _ = apply_overrides(HPS_DIFFUSION["mammogram"], ["noise_levels=0.1,1"])
    assert hps.noise_levels == [0.1, 1]
    with pytest.raises(ValueError, match="must be a list"):
        apply_overrides(HPS_DIFFUSION["cbis-ddsm"], ["noise_levels=a,b"])


@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_in_both_tables_and_consistent(task):
    assert (
        set(TASKS)
        == set(HPS_VQVAE)
        == set(HPS_DIFFUSION)
        == {"cbis-ddsm", "phantom", "folder", "folder-small", "mammogram"}
    )
    vqvae, diffusion = HPS_VQVAE[task], HPS_DIFFUSION[task]
    check(vqvae)
    check(diffusion)
    assert diffusion.out_channels == vqvae.hidden_channels and diffusion.image_shape == vqvae.image_shape
    assert set(ARCHITECTURE_VQVAE) < set(vqvae) and set(ARCHITECTURE_DIFFUSION) < set(diffusion)


@pytest.mark.parametrize(
    "override, value",
    [
        ("learning_rate=1e-3", 1e-3),
        ("learning_rate=1", 1.0),
        ("batch_size=8", 8),
        (" batch_size = 8 ", 8),
        ("amp=false", False),
        ("amp=1", True),
        ("recon_loss=l1", "l1"),
        ("split_csv=a=b.csv", "a=b.csv"),
        ("image_shape=1,64,48", [1, 64, 48]),
        ("image_shape=[1, 64, 48]", [1, 64, 48]),
    ],
)
def test_override_is_read_with_the_type_of_its_entry(override, value):
    hps, names = apply_overrides(HPS_VQVAE["cbis-ddsm"], [override])
    key = override.split("=")[0].strip()
    assert names == {key} and hps[key] == value and type(hps[key]) is type(value)
    assert hps | {key: HPS_VQVAE["cbis-ddsm"][key]} == HPS_VQVAE["cbis-ddsm"]


def test_empty_list_override_and_the_last_of_several_hold():
    assert apply_overrides(HPS_DIFFUSION["phantom"], ["attention_levels="])[0].attention_levels == []
    assert apply_overrides(HPS_VQVAE["phantom"], ["beta=1", "beta=2"])[0].beta == 2.0


@pytest.mark.parametrize(
    "override, sentence",
    [
        ("hiden_channels=3", "--hps hiden_channels: no such hyperparameter; did you mean hidden_channels?"),
        ("zzz=3", "--hps zzz: no such hyperparameter; hps.py lists them all"),
        ("batch_size=4.5", "--hps batch_size=4.5: the value must be of type int"),
        ("image_shape=1,64,true", "--hps image_shape=1,64,true: the value must be a list such as [1, 1024, 768]"),
        ("image_shape=1,64,4.5", "--hps image_shape=1,64,4.5: the value must be a list such as [1, 1024, 768]"),
        ("phantom_counts=1,0,1", "--hps phantom_counts=[1, 0, 1]: must be three counts: train, validation, test"),
        ("beta=-0.1", "--hps beta=-0.1: must not be negative"),
        ("codebook_decay=1.01", "--hps codebook_decay=1.01: must lie between 0 and 1"),
        ("quantize_probability=nan", "--hps quantize_probability=nan: must lie between 0 and 1"),
        ("split=all", "--hps split=all: must be one of patient, official"),
    ],
)
def test_wrong_override_is_refused_with_one_sentence(override, sentence):
    with pytest.raises(ValueError) as error:
        apply_overrides(HPS_VQVAE["cbis-ddsm"], [override])
    assert str(error.value) == sentence


def test_entries_read_and_write_as_attributes():
    hps = HParams(rate=1)
    hps.rate = 2
    assert hps.rate == hps["rate"] == 2
    with pytest.raises(AttributeError, match="no hyperparameter named 'speed'"):
        _ = hps.speed


def test_updated_is_a_deep_copy_and_refuses_new_names():
    hps = HParams(rates=[1, 2], rate=1)
    changed = hps.updated(rate=3)
    changed.rates.append(3)
    assert hps == {"rates": [1, 2], "rate": 1} and changed == {"rates": [1, 2, 3], "rate": 3}
    with pytest.raises(KeyError, match="speed"):
        hps.updated(speed=1)


def test_tasks_do_not_share_lists():
    lists = [id(value) for table in (HPS_VQVAE, HPS_DIFFUSION) for hps in table.values() for value in hps.values()
             if isinstance(value, list)]  # fmt: skip
    assert len(lists) == len(set(lists)) > 20


def test_arguments_are_the_entries_that_a_function_takes():
    hps = HParams(a=1, b=2, c=3)
    assert hps.arguments(lambda a, c, d=0: None) == {"a": 1, "c": 3}
    taken = HPS_DIFFUSION["cbis-ddsm"].arguments(UNet) | HPS_DIFFUSION["cbis-ddsm"].arguments(LatentDiffusion)
    assert set(ARCHITECTURE_DIFFUSION) - {"mean_channels", "mean_res_blocks"} <= set(taken)
    assert set(ARCHITECTURE_VQVAE) <= set(HPS_VQVAE["cbis-ddsm"].arguments(VQVAE))
