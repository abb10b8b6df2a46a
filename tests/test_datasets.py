"""Reading, geometry, splits, keyed randomness and batches of the data sets."""

import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pydicom
import pytest
import torch
from PIL import Image
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from datasets import get_dataset, get_datasets
from files.images import find_images, read_image
from files.splits import SPLITS, folder_records, split_patients
from helper import ImageError, UserError, seeded_generator
from hps import HPS_DIFFUSION, HPS_VQVAE, apply_overrides
from loading.batches import Batch, KeyedSampler, Meta, PendingNoise, SampleKey, make_loader
from loading.mammograms import one_side
from preprocessing.augment import bordered, calcified, draw_crop, enhanced, oriented, windowed
from preprocessing.breast import breast_mask
from preprocessing.degrade import simulate_low_dose
from preprocessing.grid import Grid
from preprocessing.noise import NoiseModel
from preprocessing.phantom import generate_phantom
from preprocessing.stabilize import stabilize

MINI_MIAS = Path(__file__).resolve().parents[1] / "preprocessing" / "splits" / "mini-mias.csv"
SETTINGS = HPS_VQVAE["phantom"].updated(
    image_shape=[1, 64, 48], crop_size=32, crops_per_image=3, phantom_counts=[3, 2, 2]
)
CONTRASTS, SIGMAS, MOST_GAIN = SETTINGS.calcification_contrast, SETTINGS.enhancement_sigma, SETTINGS.most_gain
FOLDER = HPS_VQVAE["folder-small"].updated(image_shape=[1, 64, 48], crop_size=0)
EACH_FILE = FOLDER.updated(patient_pattern="file")


def half_ellipse(height=300, width=200, left=True, depth=150):
    """A breast of 0.6 that touches one side, over a background of 0.02."""
    y, x = np.mgrid[:height, :width] + 0.5
    inside = ((y - height / 2) / (0.4 * height)) ** 2 + (x / depth) ** 2 < 1
    image = np.where(inside, 0.6, 0.02).astype(np.float32)
    return image if left else np.ascontiguousarray(image[:, ::-1])


def mask_of(image):
    return breast_mask(torch.from_numpy(image)[None])[0].numpy()


def write_pngs(root, names, offset=0):
    """8-bit phantoms of 64 x 48 pixels by name, all different."""
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        image = generate_phantom(8, i + offset, (1, 64, 48)).image[0]
        Image.fromarray((image * 255).byte().numpy()).save(root / name)


# --- batches and order -----------------------------------------------------------------------------------------------


def item(value, mask=True):
    key = SampleKey(0, 0, value)
    image = torch.full((1, 1, 2, 3), float(value))
    return Batch(
        image,
        image + 0.5,
        [Meta(f"{value}", key)],
        torch.tensor([0.1 * value]),
        torch.ones(1, 1, 2, 3, dtype=torch.bool) if mask else None,
    )


def test_batches_are_joined_and_moved_with_all_they_hold():
    batch = Batch.collate([item(1), item(2)])
    assert len(batch) == 2 and [meta.path for meta in batch.meta] == ["1", "2"]
    assert batch.clean[:, 0, 0, 0].tolist() == [1, 2] and batch.degraded[:, 0, 1, 2].tolist() == [1.5, 2.5]
    assert batch.mask.shape == (2, 1, 2, 3) and batch.level.tolist() == pytest.approx([0.1, 0.2])
    assert batch.noise.gain.shape == (2, 1, 1, 1)
    assert batch.noise.gain.flatten().tolist() == pytest.approx([1e-4, 2e-4])
    assert batch.noise.sigma.flatten().tolist() == pytest.approx([0.005, 0.01])
    moved = batch.to(torch.device("meta"))
    assert {v.device.type for v in (moved.clean, moved.degraded, moved.level, moved.mask)} == {"meta"}
    assert moved.meta == batch.meta
    assert Batch.collate([item(1, mask=False)]).to(torch.device("cpu")).mask is None


def test_order_depends_on_seed_and_epoch_alone():
    def order(seed, epoch):
        sampler = KeyedSampler(20, seed, shuffle=True)
        sampler.set_epoch(epoch)
        return list(sampler)

    first = order(0, 0)
    assert [key.position for key in first] == list(range(20)) and {key.epoch for key in first} == {0}
    assert sorted(key.index for key in first) == list(range(20))
    torch.manual_seed(123)
    assert order(0, 0) == first
    indices = [tuple(key.index for key in order(*which)) for which in ((0, 0), (0, 1), (1, 0), (1, 1))]
    assert len(set(indices)) == 4
    assert [key.index for key in KeyedSampler(4)] == [0, 1, 2, 3]


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_leaves_the_global_generator_alone(workers):
    """Else the weights would depend on how often validation and pictures are asked for."""
    loader = make_loader(get_dataset("phantom", SETTINGS, "test"), 1, workers=workers)
    state = torch.get_rng_state()
    assert len(list(loader)) == 2
    assert torch.equal(torch.get_rng_state(), state)


# --- noise and crops -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["validation", "test"])
def test_evaluation_noise_is_the_image_s_own_in_every_run(split):
    first, other_seed = (get_dataset("phantom", SETTINGS, split, seed=seed) for seed in (0, 5))
    backwards = [first[i] for i in (1, 0)][::-1]
    for i in range(2):
        late = other_seed[SampleKey(epoch=7, position=1, index=i)]
        assert torch.equal(backwards[i].degraded, late.degraded) and torch.equal(backwards[i].clean, late.clean)
        assert late.clean.shape == (1, 1, 64, 48) and not torch.equal(late.clean, late.degraded)
    noise = [(batch.degraded - batch.clean)[:, :, 20:40, :8] for batch in backwards]
    assert not torch.equal(*noise)


def test_training_samples_are_keyed_by_seed_epoch_and_index():
    def sample(seed=0, epoch=0, index=0, position=0):
        return get_dataset("phantom", SETTINGS, "train", seed=seed)[SampleKey(epoch, position, index)]

    assert torch.equal(sample().degraded, sample(position=4).degraded)
    samples = [sample(), sample(seed=1), sample(epoch=1), sample(index=1)]
    assert len({tuple(s.degraded.flatten().tolist()) for s in samples}) == 4
    whole = SETTINGS.updated(crop_size=0, flip=False)
    draws = [get_dataset("phantom", whole, "train")[SampleKey(epoch, 0, 0)] for epoch in (0, 1)]
    assert torch.equal(draws[0].clean, draws[1].clean) and not torch.equal(draws[0].degraded, draws[1].degraded)


def test_realisations_are_different_draws_of_the_whole_image_and_depend_on_the_seed():
    train, other = (get_dataset("phantom", SETTINGS, "train", seed=seed) for seed in (0, 1))
    draws = [train.whole(1, 0), train.whole(1, 1), other.whole(1, 0)]
    assert all(torch.equal(draw.clean, draws[0].clean) and draw.clean.shape[-2:] == (64, 48) for draw in draws)
    assert len({tuple(draw.degraded.flatten().tolist()) for draw in draws}) == 3
    assert torch.equal(train.whole(1, 0).degraded, draws[0].degraded)


def test_noise_has_the_variance_of_its_level():
    """Poisson-Gaussian: x / 5000 + 0.01 ** 2 at level 0.2."""
    batch = get_dataset("phantom", SETTINGS.updated(image_shape=[1, 256, 192]), "test")[0]
    inside = (batch.clean > 0.3) & (batch.clean < 0.8)
    noise = (batch.degraded - batch.clean)[inside]
    expected = (batch.clean[inside] / 5000 + 1e-4).mean()
    assert noise.square().mean() == pytest.approx(float(expected), rel=0.05) and abs(noise.mean()) < 1e-3


def test_training_crops_are_parts_of_their_image_and_half_of_them_mirrored():
    train = get_dataset("phantom", SETTINGS, "train")
    mirrored = []
    for epoch in range(8):
        for index in range(len(train)):
            crop = train[SampleKey(epoch, 0, index)]
            assert crop.clean.shape == crop.degraded.shape == crop.mask.shape == (1, 1, 32, 32)
            whole = train.prepared(index // 3)
            windows = whole.clean[0].unfold(0, 32, 1).unfold(1, 32, 1)
            straight, flipped = (
                (windows == part).all(-1).all(-1) for part in (crop.clean[0, 0], crop.clean[0, 0].flip(-1))
            )
            assert straight.any() != flipped.any()
            row, column = (straight | flipped).nonzero()[0].tolist()
            mask = whole.mask[0, row : row + 32, column : column + 32]
            assert torch.equal(crop.mask[0, 0], mask if straight.any() else mask.flip(-1))
            mirrored.append(bool(flipped.any()))
    assert len(mirrored) == 72 and 0.3 < np.mean(mirrored) < 0.7


def test_crops_hold_enough_breast_where_there_is_any():
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[:, :32] = True
    corners = [draw_crop(mask, 16, 4, 0.9, seeded_generator(i)) for i in range(60)]
    assert np.mean([mask[r : r + 16, c : c + 16].float().mean() >= 0.9 for r, c in corners]) > 0.9
    assert len(set(corners)) > 20 and all(r % 4 == c % 4 == 0 and r <= 48 and c <= 48 for r, c in corners)
    free = [draw_crop(mask, 16, 1, 0.0, seeded_generator(i)) for i in range(300)]
    assert {max(v) for v in zip(*free, strict=True)} == {48} and {min(v) for v in zip(*free, strict=True)} == {0}
    assert draw_crop(mask, 64, 1, 0.9, seeded_generator(0)) == (0, 0)


def test_phantoms_of_the_splits_differ():
    images = [get_dataset("phantom", SETTINGS, split).prepared(0).clean for split in SPLITS]
    assert not any(torch.equal(a, b) for a, b in zip(images, images[1:] + images[:1], strict=True))


# --- reading ---------------------------------------------------------------------------------------------------------

VALUES = {8: np.arange(48, dtype=np.uint8).reshape(6, 8) * 5, 16: np.arange(48, dtype=np.uint16).reshape(6, 8) * 1391}


@pytest.mark.parametrize(
    "bits, name", [(8, "a.png"), (16, "a.png"), (8, "a.TIF"), (16, "a.tiff"), (8, "a.pgm"), (16, "a.pgm")]
)
def test_values_of_8_and_16_bit_files_are_exact(tmp_path, bits, name):
    values = VALUES[bits]
    if name.endswith("pgm"):
        header = b"P5\n8 6\n%d\n" % (2**bits - 1)
        (tmp_path / name).write_bytes(header + values.astype(">u2" if bits == 16 else "u1").tobytes())
    else:
        Image.fromarray(values).save(tmp_path / name)
    read = read_image(tmp_path / name)
    assert read.dtype == np.float32 and read.shape == (6, 8)
    np.testing.assert_array_equal(read, values.astype(np.float32) / (2**bits - 1))


def test_jpeg_and_gray_rgb_are_read_and_an_alpha_channel_is_left_out(tmp_path):
    smooth = np.linspace(50, 200, 64 * 64).reshape(64, 64).astype(np.uint8)
    Image.fromarray(smooth).save(tmp_path / "a.jpg", quality=95)
    assert np.abs(read_image(tmp_path / "a.jpg") * 255 - smooth).max() <= 3
    Image.fromarray(np.stack([smooth] * 3, -1)).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), smooth.astype(np.float32) / 255)
    Image.fromarray(np.stack([smooth, smooth // 2], -1), "LA").save(tmp_path / "b.png")
    np.testing.assert_array_equal(read_image(tmp_path / "b.png"), smooth.astype(np.float32) / 255)


@pytest.mark.parametrize("mode", ["1", "F", "CMYK"])
def test_other_pixel_formats_are_refused(tmp_path, mode):
    path = tmp_path / ("a.png" if mode in "P1" else "a.tif")
    Image.new(mode, (8, 8)).save(path)
    with pytest.raises(UserError, match=rf"{path}: pixel format {mode} is not 8- or 16-bit grayscale"):
        read_image(path)


def write_dicom(path, values, *, bits=12, photometric="MONOCHROME2", patient="p1", **tags):
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = meta.MediaStorageSOPInstanceUID = "1.2.3"
    dataset = pydicom.Dataset()
    dataset.file_meta = meta
    dataset.PatientID = patient
    dataset.Rows, dataset.Columns = values.shape[:2]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, photometric
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, bits, bits - 1, 0
    for name, value in tags.items():
        setattr(dataset, name, value)
    dataset.PixelData = values.astype("<i2" if dataset.PixelRepresentation else "<u2").tobytes()
    dataset.save_as(path, enforce_file_format=True)


@pytest.mark.parametrize(
    "tags, expected",
    [
        ({}, lambda v: v / 4095),
        ({"photometric": "MONOCHROME1"}, lambda v: 1 - v / 4095),
        ({"RescaleSlope": 2, "RescaleIntercept": -100}, lambda v: v / 4095),
        ({"RescaleSlope": -1, "RescaleIntercept": 4095}, lambda v: 1 - v / 4095),
        ({"WindowCenter": 500, "WindowWidth": 10}, lambda v: v / 4095),
        ({"bits": 16}, lambda v: v / 65535),
    ],
)
def test_dicom_values_are_scaled_by_what_the_bits_can_hold(tmp_path, tags, expected):
    values = np.arange(48).reshape(6, 8) * 87
    assert values.max() < 4096
    write_dicom(tmp_path / "a.dcm", values, **tags)
    np.testing.assert_allclose(read_image(tmp_path / "a.dcm"), expected(values), atol=1e-6)


def test_signed_dicom_covers_its_range(tmp_path):
    values = np.linspace(-2048, 2047, 48).round().reshape(6, 8)
    write_dicom(tmp_path / "a.dcm", values, PixelRepresentation=1)
    np.testing.assert_allclose(read_image(tmp_path / "a.dcm"), (values + 2048) / 4095, atol=1e-6)


@pytest.mark.parametrize("name", ["a.dcm", "a.png", "a.pgm", "a.tif", "a.jpg"])
@pytest.mark.parametrize("content", [b"", b"text", b"P5\n8 8\n255\n123"])
def test_broken_file_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}: not a readable image \(.+\); remove or replace it") as error:
        read_image(tmp_path / name)
    assert "\n" not in str(error.value)


# --- geometry --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("shape", [(256, 192), (100, 300), (512, 100)])
def test_breast_is_scaled_not_stretched_and_stays_at_its_chest_wall(left, shape):
    image = half_ellipse(left=left)
    y, x = np.mgrid[:300, :200]
    centre = 60 if left else 139
    image[(y - 150) ** 2 + (x - centre) ** 2 < 25**2] = 1.0
    grid = Grid.fit(image, mask_of(image), shape)
    fitted = grid.apply(image)
    assert fitted.shape == shape and fitted.min() >= 0 and fitted.max() <= 1
    disc = fitted > 0.8
    height, width = disc.any(1).sum(), disc.any(0).sum()
    assert abs(int(height) - int(width)) <= 1 and height > 10
    top, box_left, bottom, right = grid.box
    assert grid.size[0] / (bottom - top) == pytest.approx(grid.size[1] / (right - box_left), abs=1 / min(grid.size))
    assert grid.size[0] == shape[0] or grid.size[1] == shape[1]
    wall, far = (0, -1) if left else (-1, 0)
    assert fitted[shape[0] // 2, wall] == pytest.approx(0.6, abs=0.02) and fitted[shape[0] // 2, far] < 0.1
    assert grid.offset[1] == (0 if left else shape[1] - grid.size[1])
    assert (fitted[: grid.offset[0]] == 0).all() and (fitted > 0.3).sum() / (image > 0.3).sum() == pytest.approx(
        grid.size[0] * grid.size[1] / ((bottom - top) * (right - box_left)), rel=0.05
    )


def test_bright_film_border_at_the_chest_wall_is_trimmed():
    image = half_ellipse()
    plain = Grid.fit(image, mask_of(image), (256, 192))
    image[:, :4] = 1.0
    bordered = Grid.fit(image, mask_of(image), (256, 192))
    assert plain.box[1] == 0 and 4 <= bordered.box[1] <= 10
    assert bordered.apply(image).max() < 0.65


def test_grid_keeps_single_precision_values():
    image = np.linspace(0, 1, 64 * 48, dtype=np.float32).reshape(64, 48)
    np.testing.assert_array_equal(Grid((0, 0, 64, 48), (64, 48), (0, 0), (64, 48)).apply(image), image)


def test_16_bit_steps_survive_into_a_sample(tmp_path):
    """A ramp of 200 steps inside one step of 8 bit."""
    values = np.where(half_ellipse() > 0.3, 40000 + np.arange(300)[:, None] % 200, 500).astype(np.uint16)
    for name in "abc":
        Image.fromarray(values).save(tmp_path / f"{name}.png")
    clean = get_dataset("folder", EACH_FILE.updated(image_shape=[1, 512, 384]), "test", tmp_path)[0].clean
    inside = clean[(clean > 40000 / 65535) & (clean < 40200 / 65535)]
    assert len(inside) > 20000 and len(inside.unique()) > 150


# --- folders and splits ----------------------------------------------------------------------------------------------


def test_split_by_patient_is_deterministic_without_overlap_and_never_empty():
    patients = [f"p{i}" for i in range(50)]
    split = split_patients(patients, 0.1, 0.2)
    assert Counter(split.values()) == {"train": 35, "validation": 5, "test": 10}
    assert split_patients(patients[::-1] * 2, 0.1, 0.2) == split
    assert [patient for patient in patients if split[patient] == "validation"] == ["p31", "p34", "p45", "p47", "p49"]
    for fractions in ((0.0, 0.0), (1.0, 1.0), (0.0, 1.0), (0.1, 0.2)):
        assert set(split_patients(["a", "b", "c"], *fractions).values()) == set(SPLITS)
    with pytest.raises(UserError, match="2 patients are too few"):
        split_patients(["a", "b", "a"], 0.1, 0.2)


def test_both_breasts_of_a_patient_fall_into_one_split(tmp_path):
    write_pngs(tmp_path, [f"p{i}/{side}_CC.png" for i in range(4) for side in ("L", "R")])
    write_pngs(tmp_path, [f"q{i}_{side}.png" for i in range(6) for side in ("L", "R")])
    records = folder_records(tmp_path, FOLDER.updated(test_fraction=0.4))
    of_split = {split: {r.patient for r in records[split]} for split in SPLITS}
    assert sum(map(len, records.values())) == 20 and all(of_split.values())
    assert not of_split["train"] & of_split["test"] and not of_split["train"] & of_split["validation"]
    assert all({r.key for r in records[split]} >= {f"{p}_L.png", f"{p}_R.png"} for split in SPLITS
               for p in of_split[split] if p.startswith("q"))  # fmt: skip


def test_images_are_found_at_any_depth_in_a_fixed_order_and_hidden_ones_left_out(tmp_path):
    write_pngs(tmp_path, ["b.png", "a/c.png", ".hidden.png", ".cache/d.png"])
    (tmp_path / "notes.txt").write_text("")
    assert [path.relative_to(tmp_path).as_posix() for path in find_images(tmp_path)] == ["a/c.png", "b.png"]


def test_split_file_decides_by_name_or_stem_and_leaves_the_rest_out(tmp_path, capsys):
    write_pngs(tmp_path, ["a.png", "sub/b.png", "c.png", "d.png"])
    (tmp_path / "split.csv").write_text(
        "file,split,patient\na,train,1\nsub/b.png,validation,2\nc.png,test,\ngone,test,9\n"
    )
    records = folder_records(tmp_path, FOLDER)
    assert {split: [(r.key, r.patient) for r in records[split]] for split in SPLITS} == {
        "train": [("a.png", "1")], "validation": [("sub/b.png", "2")], "test": [("c.png", "c")],
    }  # fmt: skip
    assert "split.csv: leaves out 1 of 4 images" in capsys.readouterr().out
    (tmp_path / "other.csv").write_text("split;file\ntest;d\n")
    records = folder_records(tmp_path, FOLDER.updated(split_csv=str(tmp_path / "other.csv")))
    assert [[r.key for r in records[split]] for split in SPLITS] == [[], [], ["d.png"]]


def test_real_pairs_take_the_place_of_the_simulation(tmp_path):
    names = [f"{name}.png" for name in "abcdef"]
    write_pngs(tmp_path / "full", names)
    write_pngs(tmp_path / "low", names, offset=20)
    for split in SPLITS:
        images = get_dataset("folder", EACH_FILE.updated(flip=False), split, tmp_path)
        for i in range(images.image_count()):
            index = names.index(images.records[i].key)
            full, low = (read_image(tmp_path / half / names[index]) for half in ("full", "low"))
            batch = images.whole(i, 0) if split == "train" else images[i]
            grid = images.prepared(i).info["grid"]
            np.testing.assert_allclose(batch.clean[0, 0], grid.apply(full), rtol=0, atol=0.51 / 65535)
            np.testing.assert_allclose(batch.degraded[0, 0], grid.apply(low), rtol=0, atol=0.51 / 65535)


@pytest.mark.parametrize("extra, missing", [("full/x.png", "low"), ("low/x.png", "full")])
def test_pair_without_its_other_half_is_refused(tmp_path, extra, missing):
    write_pngs(tmp_path, [f"{half}/{name}.png" for half in ("full", "low") for name in "abc"] + [extra])
    with pytest.raises(UserError, match=rf"{extra}: has no {missing}-dose image of the same name"):
        folder_records(tmp_path, FOLDER)


def test_crops_of_a_pair_are_of_the_same_place(tmp_path):
    write_pngs(tmp_path, [f"{half}/{name}.png" for half in ("full", "low") for name in "abc"])
    for path in (tmp_path / "full").iterdir():
        (tmp_path / "low" / path.name).write_bytes(path.read_bytes())
    train = get_dataset("folder", EACH_FILE.updated(crop_size=32, crops_per_image=6), "train", tmp_path)
    crops = [train[i] for i in range(6)]
    assert all(torch.equal(crop.clean, crop.degraded) for crop in crops) and len({c.clean.sum() for c in crops}) > 2


# --- real mammograms -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", [HPS_VQVAE, HPS_DIFFUSION])
def test_real_mammograms_are_split_as_published_and_load_as_breasts(mammogram_dir, table):
    hps = table["folder-small"].updated(split_csv=str(MINI_MIAS))
    sets = {split: get_dataset("folder-small", hps, split, mammogram_dir) for split in SPLITS}
    assert [sets[split].image_count() for split in SPLITS] == [72, 8, 16]
    assert [r.path.stem for r in sets["test"].records] == [f"mdb{i:03d}" for i in range(81, 97)]
    for i in (0, 7, 15):
        batch = sets["test"][i]
        assert batch.clean.shape == batch.degraded.shape == batch.mask.shape == (1, 1, 512, 384)
        assert batch.clean.min() >= 0 and batch.clean.max() <= 1 and batch.degraded.max() <= 1
        assert 0.25 < batch.mask.float().mean() < 0.95
        assert batch.clean[batch.mask].mean() > 2 * batch.clean[~batch.mask].mean()
    crops = [sets["train"][i] for i in range(0, 16, 4)]
    assert all(crop.clean.shape == (1, 1, 128, 128) for crop in crops)
    assert np.mean([crop.mask.float().mean() for crop in crops]) > hps.breast_fraction


def test_half_of_a_pair_of_folders_is_refused(tmp_path):
    (tmp_path / "Full").mkdir()
    with pytest.raises(UserError, match="Full: stands alone"):
        folder_records(tmp_path, HPS_VQVAE["folder"])


def test_a_change_on_the_grid_returns_to_the_image_s_own_pixels():
    image = half_ellipse(height=300, width=200)
    grid = Grid.fit(image, mask_of(image), (128, 96))
    top, left, bottom, right = grid.box
    assert np.array_equal(grid.add(np.zeros((128, 96), np.float32), image), image)
    changed = grid.add(np.full((128, 96), 0.01, np.float32), image)
    inside = np.zeros_like(image, bool)
    inside[top:bottom, left:right] = True
    np.testing.assert_allclose(changed[inside], (image[inside] + 0.01).clip(0, 1), atol=1e-6)
    assert np.array_equal(changed[~inside], image[~inside])
    wave = np.sin(np.arange(128) / 20)[:, None] * np.ones(96) * 0.1
    rows = (np.arange(bottom - top) + 0.5) * grid.size[0] / (bottom - top) - 0.5 + grid.offset[0]
    moved = grid.add(wave.astype(np.float32), np.full_like(image, 0.5))[top:bottom, left + 5]
    np.testing.assert_allclose(moved[8:-8], 0.5 + 0.1 * np.sin(rows[8:-8] / 20), atol=2e-4)


# --- the model in the box --------------------------------------------------------------------------------------------


def test_orientations_are_the_eight_of_a_square():
    image = torch.arange(12.0).reshape(1, 3, 4)
    views = [oriented(image, k) for k in range(8)]
    assert torch.equal(views[0], image)
    assert len({(tuple(v.shape), tuple(v.flatten().tolist())) for v in views}) == 8


def test_native_images_keep_their_pixels_and_training_adds_phantoms(tmp_path):
    write_pngs(tmp_path, ["a.png", "b.png", "c.png"])
    (tmp_path / "split.csv").write_text("file,split\na,train\nb,validation\nc,test\n")
    hps = HPS_DIFFUSION["folder"].updated(
        native=True, stabilize=True, noise_levels=[0.1, 0.4], crop_size=32, dihedral=True, scale_range=[0.5, 2.0],
        phantoms=2, image_shape=[1, 64, 48], crops_per_image=8,
    )  # fmt: skip
    train, test = get_datasets("folder", hps, ["train", "test"], tmp_path)
    assert train.image_count() == 3 and test.image_count() == 1
    assert train.patients() == ["a", "train/0000", "train/0001"]
    whole, source = test[0], read_image(tmp_path / "c.png")
    height, width = whole.clean.shape[-2:]
    windows = np.lib.stride_tricks.sliding_window_view(source, (height, width))
    assert np.abs(windows - whole.clean[0, 0].numpy()).max((2, 3)).min() < 1e-4
    assert whole.level.tolist() == pytest.approx([0.2])
    batches = [train[SampleKey(0, i, i)] for i in range(24)]
    levels = torch.cat([batch.level for batch in batches])
    assert {batch.clean.shape for batch in batches} == {(1, 1, 32, 32)}
    assert 0.1 <= levels.min() < 0.15 and 0.3 < levels.max() <= 0.4
    # the level of a sample is that of its noise
    noise = torch.cat([stabilize(b.degraded, b.noise) - stabilize(b.clean, b.noise) for b in batches])
    bright = torch.cat([b.clean for b in batches]) > 0.2
    assert noise[bright].std().item() == pytest.approx(1, abs=0.03)
    again = train[SampleKey(0, 5, 5)]
    assert torch.equal(again.degraded, batches[5].degraded) and torch.equal(again.level, batches[5].level)


def test_the_native_grid_is_the_breasts_box_and_its_margin_within_the_image():
    mask = np.zeros((200, 100), bool)
    mask[50:150, 0:40] = True
    grid = Grid.native(mask)
    assert grid.box == (48, 0, 152, 42) and grid.size == grid.shape == (104, 42)
    image = np.random.default_rng(0).random((200, 100), np.float32)
    np.testing.assert_array_equal(grid.apply(image), image[48:152, :42])


def test_calcifications_drawn_on_a_crop_are_faint_and_bright_specks_in_the_breast():
    clean, mask = torch.full((1, 96, 96), 0.3), torch.zeros(1, 96, 96, dtype=torch.bool)
    mask[..., :48] = True
    added = [calcified(clean, mask, CONTRASTS, seeded_generator("test", i)) - clean for i in range(200)]
    assert torch.equal(added[0], calcified(clean, mask, CONTRASTS, seeded_generator("test", 0)) - clean)
    assert all(a.min() >= 0 and a[..., 56:].max() == 0 and a.max() <= 0.7 for a in added)
    peaks = torch.stack([a.max() for a in added])
    assert (
        0.3 < (peaks > 0.3).float().mean() < 0.8
        and torch.stack([(a > 0.005).float().mean() for a in added]).max() < 0.06
    )
    assert float(clean.max()) == pytest.approx(0.3)  # what was given stays
    bright = calcified(torch.full((1, 96, 96), 0.95), mask, CONTRASTS, seeded_generator("test", 1))
    assert 0.99 < bright.max() <= 1


def test_borders_drawn_on_a_crop_are_straight_and_leave_most_of_it():
    clean = torch.full((1, 96, 96), 0.5)
    drawn = [bordered(clean, seeded_generator("border", i)) for i in range(300)]
    assert torch.equal(drawn[0], bordered(clean, seeded_generator("border", 0)))
    left = torch.stack(
        [(image == 0.5).float().mean() for image in drawn]
    )  # the line is 0.1 to 0.45 sides from the middle
    assert left.min() > 0.58 and left.max() < 0.96 and left.mean().item() == pytest.approx(0.5 + 0.275, abs=0.02)
    black = [image[0] for image in drawn if image.min() == 0]
    assert len(black) / 300 == pytest.approx(0.6, abs=0.07)  # the others are white or grey beyond it
    white = [image for image in drawn if image.max() == 1]
    assert len(white) / 300 == pytest.approx(0.2, abs=0.06)
    # lines that are tilted lean to either side alike: of those with black above, the tissue's share of the columns
    above = [(image > 0.25).float().mean(0) for image in black if image[0].max() == 0 and image[-1].min() == 0.5]
    leaning = [float(share[-1] - share[0]) for share in above if share[-1] != share[0]]
    assert len(leaning) > 10 and 0.25 < sum(slope > 0 for slope in leaning) / len(leaning) < 0.75
    profiles = [lines for image in black for lines in (image, image.T) if torch.equal(lines, lines[:1].expand(96, 96))]
    assert len(profiles) / len(black) == pytest.approx(0.5, abs=0.1)
    for profile in (lines[0] for lines in profiles):
        assert ((profile > 0) & (profile < 0.5)).sum() <= 1 and (profile.diff() >= 0).all() | (
            profile.diff() <= 0
        ).all()
    # half a pixel of each line is the mean share of the pixels on it
    assert 2 * torch.stack(
        [p[(p > 0) & (p < 0.5)].mean() for p in (q[0] for q in profiles)]
    ).mean().item() == pytest.approx(0.5, abs=0.1)


def test_training_crops_are_raised_to_a_power_half_of_the_time():
    hps = SETTINGS.updated(crop_size=0, flip=False, gamma_range=[2.0, 2.0])
    train, test = get_datasets("phantom", hps, ["train", "test"])
    plain = train.prepared(0).clean
    crops = [train[SampleKey(epoch, 0, 0)].clean[0] for epoch in range(60)]
    squared = [torch.equal(crop, plain**2) for crop in crops]
    assert all(a or torch.equal(crop, plain) for a, crop in zip(squared, crops, strict=True))
    assert 15 < sum(squared) < 45
    assert torch.equal(test[0].clean[0], test.prepared(0).clean)


def test_windows_drawn_on_a_crop_cut_off_either_end_or_dim_all_of_it():
    rows = torch.linspace(0.2, 0.6, 101)
    clean, mask = rows.expand(1, 101, 101).clone(), torch.ones(1, 101, 101, dtype=torch.bool)
    clean[:, :10], mask[:, :10] = 0, False  # the film beside the breast
    drawn = [windowed(clean, mask, MOST_GAIN, seeded_generator("window", i))[0] for i in range(400)]
    assert torch.equal(drawn[0], windowed(clean, mask, MOST_GAIN, seeded_generator("window", 0))[0])
    assert all((image[:10] == 0).all() and (image[10].diff() >= 0).all() and 0 <= image[10, -1] <= 1 for image in drawn)
    inside = torch.stack([image[10] for image in drawn])
    ends = inside[:, -1]
    full = ends > 1 - 1e-6
    assert full.float().mean().item() == pytest.approx(0.75, abs=0.08) and 0.03 <= ends.min() < 0.04
    at_end = inside >= ends[:, None] * (1 - 1e-6)
    assert (at_end.float().mean(1)[~full] < 0.015).all()  # what is dimmed is not cut off
    assert ends[~full].log().mean().item() == pytest.approx(math.log(0.03) / 2, abs=0.25)  # uniform in the logarithm
    for cut in (at_end, inside <= 0):  # pixels at the window's end, and below its beginning
        shares = cut.float().mean(1)
        some = shares[shares > 0.015]  # one row of pixels is the brightest itself, or the darkest
        assert len(some) / 400 == pytest.approx(0.5, abs=0.08)
        assert some.max() <= 0.41 and some.mean().item() == pytest.approx(0.2, abs=0.03)
    # what is left of the intensities lies on a straight line
    inner = (inside > 0) & (inside < ends[:, None])
    slopes = [image[kept].diff().std() / image[kept].diff().mean() for image, kept in zip(inside, inner, strict=True)]
    assert max(slopes) < 1e-3


def test_a_window_raises_no_intensity_by_more_than_its_gain():
    flat, mask = torch.rand(1, 96, 96, generator=seeded_generator("flat")) * 1e-3 + 0.5, torch.ones(1, 96, 96).bool()
    drawn = torch.stack([windowed(flat, mask, MOST_GAIN, seeded_generator("gain", i)) for i in range(40)])
    assert drawn.std((-1, -2)).max() <= 8.001 * flat.std()
    assert windowed(flat, ~mask, MOST_GAIN, seeded_generator("gain", 0)) is flat


def test_enhancing_multiplies_what_is_finer_than_its_mean_and_keeps_what_is_coarser(monkeypatch):
    column = torch.arange(288)
    # at Nyquist, of which no mean of sigma 2 or more keeps anything
    fine = 0.01 * (1 - 2 * (column % 2)).expand(1, 96, 288)
    drawn = [enhanced(0.5 + fine, SIGMAS, MOST_GAIN, seeded_generator("enhance", i)) for i in range(300)]
    gains = torch.stack([(image - 0.5)[0, 48, 144] / fine[0, 48, 144] for image in drawn])
    assert 1 <= gains.min() < 1.05 and 7.6 < gains.max() <= 8.001
    assert gains.log().mean().item() == pytest.approx(math.log(8) / 2, abs=0.1)  # uniform in the logarithm
    for image, gain in zip(drawn[:5], gains, strict=False):
        torch.testing.assert_close(image[..., 96:192], 0.5 + gain * fine[..., 96:192], atol=2e-4, rtol=0)
    flat = torch.full((1, 96, 96), 0.3)
    torch.testing.assert_close(enhanced(flat, SIGMAS, MOST_GAIN, seeded_generator("enhance")), flat)
    # a wave of frequency f keeps exp(-2 (pi sigma f)^2) of itself in the mean, and the rest has the gain
    sigma, gain = 10.0, 4.0
    wave = 0.05 * torch.cos(2 * math.pi * column / 32).expand(1, 96, 288)
    draws = iter([sigma, gain])
    monkeypatch.setattr("preprocessing.augment.log_uniform", lambda low, high, generator: next(draws))
    image = enhanced(0.5 + wave, SIGMAS, MOST_GAIN, seeded_generator("enhance"))
    monkeypatch.undo()
    kept = math.exp(-2 * (math.pi * sigma / 32) ** 2)
    torch.testing.assert_close(
        image[0, 48, 128:160], 0.5 + (gain - (gain - 1) * kept) * wave[0, 48, 128:160], atol=2e-3, rtol=0
    )
    loud = enhanced(
        torch.rand(1, 96, 96, generator=seeded_generator("loud")), SIGMAS, MOST_GAIN, seeded_generator("enhance", 0)
    )
    assert loud.min() >= 0 and loud.max() <= 1


@pytest.mark.parametrize("setting", ["windowing", "enhancement"])
def test_training_crops_are_windowed_and_enhanced_as_often_as_the_setting_says(setting):
    hps = SETTINGS.updated(crop_size=0, flip=False, **{setting: 0.5})
    train, test = get_datasets("phantom", hps, ["train", "test"])
    plain = train.prepared(0).clean
    changed = [not torch.equal(train[SampleKey(epoch, 0, 0)].clean[0], plain) for epoch in range(60)]
    assert 15 < sum(changed) < 45
    assert torch.equal(test[0].clean[0], test.prepared(0).clean)


def test_after_the_altered_epochs_crops_are_as_they_are():
    changes = dict(scale_range=[0.5, 0.5], gamma_range=[2.0, 2.0], windowing=1.0, enhancement=1.0)
    altered, plain = (
        get_datasets("phantom", SETTINGS.updated(**more), ["train"])[0]
        for more in (changes | {"altered_epochs": 2}, {})
    )
    same = [torch.equal(altered[SampleKey(e, 0, 0)].clean, plain[SampleKey(e, 0, 0)].clean) for e in range(4)]
    assert same == [False, False, True, True]


def test_a_crop_at_a_films_border_goes_on_past_it_from_either_side():
    clean = torch.full((1, 1, 96, 96), 0.6)
    clean[..., :30] = 0
    level = torch.tensor([0.2])
    low = simulate_low_dose(clean, 0.2, seeded_generator("test"))
    sample = Batch(clean, low, [], level, clean > 0)
    sides = [one_side(sample, seeded_generator("side", i)) for i in range(40)]
    bright = [side for side in sides if side.clean[..., 24:28].mean() > 0.3]
    assert 5 < len(bright) < 35
    first = bright[0]
    torch.testing.assert_close(first.clean[..., 30:], clean[..., 30:], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(first.degraded[..., 30:], low[..., 30:], atol=1e-6, rtol=1e-4)
    filled = slice(24, 30)  # farther out the dark that is out of reach counts too
    assert (first.clean[..., filled] - 0.6).abs().max() < 0.02
    noise = NoiseModel.from_level(0.2)
    drawn = stabilize(first.degraded[..., filled], noise) - stabilize(first.clean[..., filled], noise)
    assert drawn.std().item() == pytest.approx(1, abs=0.1) and abs(drawn.mean()) < 0.15
    dark = next(side for side in sides if side.clean[..., 24:28].mean() < 0.3)
    assert dark.clean[..., :29].max() < 1e-3 and dark.clean[..., 30:34].max() < 0.3
    plain = Batch(clean[..., 40:], low[..., 40:], [], level, None)
    assert one_side(plain, seeded_generator("side")) is plain


# --- degradation on the device ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [[], [0.05, 0.8]])
def test_a_low_dose_drawn_in_the_step_equals_the_loaders_exactly_and_reads_the_same_in_any_batch(levels):
    settings = SETTINGS.updated(stabilize=bool(levels), noise_levels=levels)
    loaded, left = (
        get_dataset("phantom", settings.updated(degrade_on_device=on_device), "train", 3) for on_device in (False, True)
    )
    keys = [SampleKey(epoch, i, i) for epoch in range(2) for i in range(4)]
    own, pending = (Batch.collate([data[key] for key in keys]) for data in (loaded, left))
    assert pending.degraded is None and len(pending.pending) == len(keys)
    drawn = pending.degrade()
    assert torch.equal(drawn.degraded, own.degraded) and torch.equal(drawn.level, own.level) and not drawn.pending
    assert torch.equal(drawn.clean, own.clean) and drawn.mask is None
    assert (own.degraded - own.clean).abs().max() > 0.01
    assert torch.equal(left[keys[5]].degrade().degraded[0], own.degraded[5])
    assert drawn.degrade() is drawn


def test_only_training_samples_leave_their_low_dose_to_the_step():
    settings = SETTINGS.updated(degrade_on_device=True)
    assert not get_dataset("phantom", settings, "validation")[0].pending
    assert not get_dataset("phantom", settings, "train").whole(0, 0).pending


def test_pending_noise_outlives_a_workers_queue():
    data = get_dataset("phantom", SETTINGS.updated(degrade_on_device=True), "train")
    here, there = (next(iter(make_loader(data, 2, workers=workers, limit=2))).degrade() for workers in (0, 1))
    assert torch.equal(here.degraded, there.degraded)


def test_a_data_set_is_told_to_leave_its_noise_and_to_take_another_seed():
    seeded, told = (get_dataset("phantom", SETTINGS, "train", seed=seed) for seed in (3, 0))
    key = SampleKey(1, 0, 4)
    assert not torch.equal(told[key].degraded, seeded[key].degraded)
    told.reseed(3)
    assert torch.equal(told[key].clean, seeded[key].clean) and torch.equal(told[key].degraded, seeded[key].degraded)
    told.without_noise()
    left = told[key]
    assert left.degraded is None and torch.equal(left.degrade().degraded, seeded[key].degraded)


def test_edges_are_taken_apart_in_the_clean_image_if_its_noise_is_pending():
    clean = torch.full((1, 1, 96, 96), 0.6)
    clean[..., :30] = 0
    pending = [PendingNoise(0.2, seeded_generator("test").get_state().numpy().tobytes())]
    sample = Batch(clean, None, [], torch.tensor([0.2]), None, pending)
    sides = [one_side(sample, seeded_generator("side", i)) for i in range(10)]
    bright = [side for side in sides if (side.clean[..., 24:30] - 0.6).abs().max() < 0.02]
    assert 0 < len(bright) < 10 and all(side.degraded is None and side.pending == pending for side in sides)
    assert (bright[0].degrade().degraded[..., 24:30] - 0.6).abs().max() < 0.2


@pytest.mark.parametrize(
    "more",
    [
        dict(calcifications=1.0, calcification_contrast=[0.3, 0.3]),
        dict(enhancement=1.0, enhancement_sigma=[4.0, 4.0]),
        dict(enhancement=1.0, most_gain=1.5),
        dict(windowing=1.0, most_gain=1.0),
    ],
    ids=str,
)
def test_details_of_the_changes_of_crops_are_settings(more):
    usual = dict(list(more.items())[:1])
    changed, plain = (get_dataset("phantom", SETTINGS.updated(**hps), "train") for hps in (more, usual))
    assert any(not torch.equal(changed[i].clean, plain[i].clean) for i in range(9))


# --- fractions of the dose of real images ----------------------------------------------------------------------------


OWN = NoiseModel(1e-4, 5e-3, 0.02)  # of full-dose images in [0, 1]
OWN_IMAGES = EACH_FILE.updated(native=True, stabilize=True, dose_fraction=0.5, crop_size=128, image_shape=[1, 512, 384])


@pytest.fixture
def full_doses(tmp_path, monkeypatch):
    """Ten 16-bit images with the noise OWN, whose estimate is taken for right."""
    monkeypatch.setattr("loading.mammograms.estimate_noise", lambda image, mask: SimpleNamespace(noise=OWN))
    clean = half_ellipse(400, 300, depth=250)
    for i in range(10):
        drawn = np.random.default_rng(i).standard_normal(clean.shape)
        noisy = clean + np.sqrt(OWN.variance(torch.from_numpy(clean)).numpy()) * drawn
        Image.fromarray((noisy.clip(0, 1) * 65535).round().astype(np.uint16)).save(tmp_path / f"{i}.png")
    return tmp_path


@pytest.mark.parametrize("split", SPLITS)
def test_a_fraction_of_a_real_dose_has_unit_noise_once_it_is_stabilised(full_doses, split):
    sample = get_dataset("folder", OWN_IMAGES, split, data_root=full_doses)[0]
    values = stabilize(sample.degraded, sample.noise)
    breast = sample.clean[0, 0] > 0.5
    assert float(values[0, 0][breast].var()) == pytest.approx(1, abs=0.05)
    added = (sample.degraded - sample.clean)[0, 0][breast]
    assert float(added.mean()) == pytest.approx(0, abs=5e-4)
    signal = 0.6 - 0.02
    assert float(added.var()) == pytest.approx(1e-4 * signal * (2 - 1) + 5e-3**2 * (4 - 1), rel=0.05)


def test_a_batch_of_fractions_carries_the_noise_of_each_image(full_doses):
    data = get_dataset("folder", OWN_IMAGES, "train", data_root=full_doses)
    batch = next(iter(make_loader(data, 3)))
    assert batch.told[:, :3].tolist() == [pytest.approx([2e-4, 1e-2, 0.02])] * 3
    assert batch.kernel.shape[:2] == (3, 1)
    assert float(batch.kernel.sum()) == pytest.approx(3, abs=1e-4)  # white
    assert len({float(batch.degraded[i].mean()) for i in range(3)}) == 3
    again = next(iter(make_loader(data, 3)))
    assert torch.equal(batch.degraded, again.degraded)


def test_an_image_without_noise_gives_no_fraction_of_its_dose(full_doses, monkeypatch):
    none = SimpleNamespace(noise=NoiseModel(0.0, 0.0))
    monkeypatch.setattr("loading.mammograms.estimate_noise", lambda image, mask: none)
    with pytest.raises(ImageError, match="shows no noise"):
        get_dataset("folder", OWN_IMAGES, "validation", data_root=full_doses)[0]


@pytest.mark.parametrize(
    "clash", ["native=False", "stabilize=False", "phantoms=3", "part_edges=True", "degrade_on_device=True"]
)
def test_fractions_of_a_dose_take_images_as_they_are(clash):
    with pytest.raises(ValueError, match="dose_fraction"):
        apply_overrides(OWN_IMAGES, [clash])
