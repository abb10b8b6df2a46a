"""The prepared cache: equal to decoding, made anew if stale, whole even if its build is killed or shared."""

import json
import multiprocessing
import os
import pickle
import random
import re
import signal
import time
from collections import Counter, namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from datasets import get_datasets, load_datasets
from files import cache
from files.cache import PreparedCache
from files.prepared import Record, prepare_record
from helper import UserError
from hps import HPS_VQVAE, TASKS
from loading.batches import Batch, SampleKey
from loading.mammograms import RecordDataset
from preprocessing.grid import intensities
from running.command_line import base_parser
from test_scripts import assert_same, call, load
from trees import breast, own_case_files, write_case_files, write_tcia

SHAPE = (1, 64, 48)
KILLS = 10


def write_records(folder, count, pairs=0, size=(160, 120)):
    """Records of 16-bit PNGs, all different; the first `pairs` have a low-dose image."""

    def write(name, noise):
        rng = np.random.default_rng([count, noise])
        Image.fromarray((breast(*size) * rng.uniform(0.7, 1, size)).astype(np.uint16)).save(folder / name)
        return folder / name

    folder.mkdir(exist_ok=True)
    return [
        Record(write(f"{i}.png", 2 * i), f"{i}.png", str(i), write(f"{i}-low.png", 2 * i + 1) if i < pairs else None)
        for i in range(count)
    ]


def assert_equal(prepared, expected):
    assert torch.equal(prepared.clean, expected.clean) and prepared.clean.dtype == expected.clean.dtype
    assert torch.equal(prepared.mask, expected.mask) and prepared.mask.dtype == expected.mask.dtype
    assert prepared.info == expected.info
    assert (prepared.degraded is None) == (expected.degraded is None)
    assert expected.degraded is None or torch.equal(prepared.degraded, expected.degraded)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*.raw")}


@pytest.fixture
def made(monkeypatch):
    """Keys of the records that were decoded, in order."""
    keys = []

    def counted(record, shape):
        keys.append(record.key)
        return prepare_record(record, shape)

    monkeypatch.setattr(cache, "prepare_record", counted)
    return keys


@pytest.fixture
def records(tmp_path):
    return write_records(tmp_path / "images", 4, pairs=2)


@pytest.fixture
def built(tmp_path, records):
    store = PreparedCache(tmp_path / "cache", SHAPE)
    store.build(records, progress=False)
    return store


# --- what is loaded --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [SHAPE, (1, 131, 77)]
)  # the second has a number of pixels that is not a multiple of 8
@pytest.mark.parametrize("workers", [0, 2])
def test_a_cached_image_is_the_one_decoded_anew(tmp_path, records, shape, workers):
    store = PreparedCache(tmp_path / "cache", shape)
    store.build(records, workers, progress=False)
    for record in records:
        assert_equal(store.load(record), prepare_record(record, shape))
        assert_equal(pickle.loads(pickle.dumps(store)).load(record), store.load(record))
    assert [store.load(record).degraded is None for record in records] == [False, False, True, True]


def test_samples_are_the_same_with_and_without(tmp_path):
    write_records(tmp_path / "images", 6)
    hps = HPS_VQVAE["folder"].updated(image_shape=list(SHAPE), crop_size=32, nb_workers=0, patient_pattern="file")
    splits = ("train", "validation", "test")
    plain = get_datasets("folder", hps, splits, tmp_path / "images")
    cached = get_datasets("folder", hps, splits, tmp_path / "images", cache=tmp_path / "cache", progress=False)
    for a, b in zip(plain, cached, strict=True):
        for i in range(len(a)):
            one, other = a[SampleKey(1, i, i)], b[SampleKey(1, i, i)]
            assert torch.equal(one.clean, other.clean) and torch.equal(one.degraded, other.degraded)
            assert torch.equal(one.mask, other.mask) and one.meta == other.meta
            one.clean.zero_(), other.clean.zero_()  # a sample may be written to
    assert len(contents(tmp_path / "cache")) == 6


@pytest.mark.parametrize("workers", [0, 1])
def test_images_sent_in_16_bits_are_the_same_on_the_device(built, records, workers):
    hps = HPS_VQVAE["folder"].updated(image_shape=list(SHAPE), crop_size=0, batch_size=4)
    plain, sent = (
        RecordDataset(records, hps.updated(degrade_on_device=on), "train", cache=built) for on in (False, True)
    )
    keys = [SampleKey(epoch, i, i) for epoch in range(3) for i in range(4)]
    expected = Batch.collate([plain[key] for key in keys])
    loader = DataLoader(sent, len(keys), sampler=keys, num_workers=workers, collate_fn=Batch.collate)
    (batch,) = loader
    assert batch.clean.dtype == torch.int16 and batch.degraded is None and batch.mask is None
    real = [isinstance(low, torch.Tensor) for low in batch.pending]  # real pairs send their low dose too
    assert real == [True, True, False, False] * 3
    assert {low.dtype for low in batch.pending if isinstance(low, torch.Tensor)} == {torch.int16}
    batch = batch.to(torch.device("cpu"))
    assert torch.equal(batch.clean, expected.clean) and batch.clean.dtype == torch.float32
    assert torch.equal(batch.degrade().degraded[real], expected.degraded[real])
    assert torch.equal(batch.degrade().degraded, expected.degraded)
    assert torch.equal(sent.whole(3, 1).degraded, plain.whole(3, 1).degraded)


@pytest.mark.parametrize(
    "setting",
    [
        {"crop_size": 32},
        {"calcifications": 1.0},
        {"borders": 1.0},
        {"windowing": 1.0},
        {"enhancement": 1.0},
        {"gamma_range": [0.7, 1.4]},
        {"phantoms": 1},
    ],
    ids=str,
)
def test_images_that_the_loader_computes_with_are_sent_as_floats(built, records, setting):
    hps = HPS_VQVAE["folder"].updated(image_shape=list(SHAPE), degrade_on_device=True, **setting)
    data = RecordDataset(records, hps, "train", cache=built)
    first, last = data[SampleKey(0, 0, 0)], data[SampleKey(0, len(data) - 1, len(data) - 1)]
    assert first.clean.dtype == last.clean.dtype == torch.float32
    assert 0 < first.clean.mean() < 1


def test_every_grey_value_reads_as_numpy_divides_it():
    values = np.arange(2**16, dtype=np.uint16)
    images = intensities(torch.from_numpy(values.view(np.int16)))
    assert np.array_equal(images.numpy(), values.astype(np.float32) / np.float32(65535))
    assert intensities(images) is images


def test_a_second_build_decodes_nothing_and_loading_needs_no_sources(built, records, monkeypatch, capsys):
    monkeypatch.setattr("files.prepared.read_mammogram", lambda path: pytest.fail(f"{path} was read"))
    capsys.readouterr()
    again = PreparedCache(built.root, SHAPE)
    again.build(records[::-1], progress=False)
    assert capsys.readouterr() == (f"{built.folder}: all of 4 images prepared\n", "")
    for record in records:
        record.path.unlink()
    assert all(again.load(record).clean.shape == SHAPE for record in records)


def test_subsets_share_their_entries(built, records, made, tmp_path):
    more = [*records[1:], *write_records(tmp_path / "more", 1)]
    PreparedCache(built.root, SHAPE).build(more + more, progress=False)
    assert made == [more[-1].key]


# --- what is made anew -----------------------------------------------------------------------------------------------


def damage_header(path, **changes):
    data = path.read_bytes()
    start = data.rindex(b'{"format"')
    path.write_bytes(data[:start] + json.dumps(json.loads(data[start:]) | changes).encode())


STALE = {
    "touched": lambda path, record: os.utime(record.path, ns=(1, 1)),
    "low touched": lambda path, record: os.utime(record.degraded, ns=(1, 1)),
    "replaced": lambda path, record: Image.fromarray(breast()[::-1] // 2).save(record.path),
    "format": lambda path, record: damage_header(path, format=0),
    "shape": lambda path, record: damage_header(path, image_shape=[1, 48, 64]),
    "no grid": lambda path, record: damage_header(path, grid=None),
    "bad grid": lambda path, record: damage_header(path, grid={"box": 1}),
    "cut header": lambda path, record: path.write_bytes(path.read_bytes()[:-1]),
    "cut planes": lambda path, record: path.write_bytes(path.read_bytes()[:5000]),
    "empty": lambda path, record: path.write_bytes(b""),
    "garbage": lambda path, record: path.write_bytes(b"\xff" * path.stat().st_size),
}


@pytest.mark.parametrize("change", STALE)
def test_an_entry_that_does_not_fit_is_made_anew(built, records, made, capsys, change):
    STALE[change](built.path(records[0]), records[0])
    capsys.readouterr()
    built.build(records, progress=False)
    assert made == [records[0].key]
    assert capsys.readouterr().out.startswith(f"{built.folder}: 1 stale entry is made anew\n")
    assert_equal(built.load(records[0]), prepare_record(records[0], SHAPE))


def test_a_source_that_changes_while_it_is_read_is_read_again(tmp_path, records, monkeypatch):
    def overtaken(record, shape):
        image = prepare_record(record, shape)
        os.utime(record.path, ns=(1, 1))
        return image

    store = PreparedCache(tmp_path / "cache", SHAPE)
    with monkeypatch.context() as patch:
        patch.setattr(cache, "prepare_record", overtaken)
        store.build(records[:1], progress=False)
    assert not store.holds(records[0])


def test_settings_and_formats_have_folders_of_their_own(built, records, made, monkeypatch):
    other = PreparedCache(built.root, (1, 96, 64))
    other.build(records, progress=False)
    assert len(made) == 4 and other.load(records[0]).clean.shape == (1, 96, 64)
    monkeypatch.setattr(cache, "CACHE_FORMAT", cache.CACHE_FORMAT + 1)
    newer = PreparedCache(built.root, SHAPE)
    newer.build(records, progress=False)
    assert len(made) == 8 and all(newer.holds(record) for record in records)
    assert sorted(path.name for path in built.root.iterdir()) == ["64x48-v2", "64x48-v3", "96x64-v2"]


@pytest.mark.parametrize("change, reason", [("gone", "No such file"), ("empty", "damaged"), ("cut planes", "damaged")])
def test_an_entry_that_is_lost_during_training_is_named(built, records, change, reason):
    path = built.path(records[0])
    (Path.unlink(path) if change == "gone" else STALE[change](path, records[0]))
    with pytest.raises(UserError, match=rf"{path}: not a readable cache entry \({reason}.*run again"):
        built.load(records[0])


# --- refusals --------------------------------------------------------------------------------------------------------


def test_a_full_disk_is_noticed_before_anything_is_made(tmp_path, records, made, monkeypatch):
    usage = namedtuple("Usage", "free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(30_000))
    store = PreparedCache(tmp_path / "cache", SHAPE)
    with pytest.raises(UserError, match=r"^--cache .*: 0.0 GB are needed and 0.0 GB are free; .*--no-cache"):
        store.build(records, progress=False)
    assert made == []
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(50_000))
    store.build(records, progress=False)


def test_a_disk_that_fills_up_while_it_builds_is_named(tmp_path, records, monkeypatch):
    def full(self, *args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    store = PreparedCache(tmp_path / "cache", SHAPE)
    with pytest.raises(UserError, match=r"\.raw: cannot be written \(No space left .* another --cache"):
        store.build(records, progress=False)
    assert list(store.folder.iterdir()) == []


def test_left_overs_of_killed_builds_go_after_an_hour(built, records):
    old, young = (built.folder / f".{name}.raw.x.part" for name in ("old", "young"))
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 3601,) * 2)
    built.path(records[0]).unlink()
    built.build(records, progress=False)
    assert not old.exists() and young.exists()


# --- processes -------------------------------------------------------------------------------------------------------


def build_apart(folder, records, shape, log=None, workers=0):
    """Build in this process, as a group of its own so that a kill ends its workers too; keys that are made go to `log`."""
    os.setsid()
    torch.set_num_threads(1)  # a forked process has no OpenMP threads

    def logged(record, shape):
        with log.open("a") as file:
            file.write(record.key + "\n")
        return prepare_record(record, shape)

    if log:
        cache.prepare_record = logged
    PreparedCache(folder, shape).build(records, workers, progress=False)


def start(*arguments):
    process = multiprocessing.get_context("fork").Process(target=build_apart, args=arguments)
    process.start()
    return process


def test_two_processes_build_at_once_and_share_the_work(tmp_path):
    shape = (1, 256, 192)
    records = write_records(tmp_path / "images", 24, size=(480, 360))
    processes = [start(tmp_path / "cache", records, shape, tmp_path / "made") for _ in range(2)]
    reader = PreparedCache(tmp_path / "cache", shape)
    whole = set()
    while any(process.is_alive() for process in processes):
        for i, record in enumerate(records):  # an entry that exists is whole at any moment
            if reader.path(record).exists():
                reader.load(record)
                whole.add(i)
    assert [process.exitcode for process in processes] == [0, 0] and whole
    counts = Counter((tmp_path / "made").read_text().split())
    assert set(counts) == {record.key for record in records} and max(counts.values()) <= 2
    assert sum(counts.values()) < 1.75 * len(records)
    assert all(reader.holds(record) for record in records)
    assert list(reader.folder.glob(".*")) == []


def test_a_build_killed_at_ten_random_moments_is_completed_by_the_next(tmp_path):
    shape = (1, 256, 192)
    records = write_records(tmp_path / "images", 60, size=(480, 360))
    whole, store = (PreparedCache(tmp_path / name, shape) for name in ("whole", "cache"))
    begun = time.perf_counter()
    whole.build(records, progress=False)
    an_image = (time.perf_counter() - begun) / len(records)
    rng, there = random.Random(0), 0
    for kill in range(KILLS):
        process = start(store.root, records, shape, None, kill % 3)
        while os.getpgid(process.pid) != process.pid:  # it has not called setsid yet
            time.sleep(0.001)
        # counted in images, not in seconds: even on a slow machine every kill meets a build with work left
        wanted, delay = there + rng.randrange(4), rng.uniform(0, 2) * an_image
        while process.is_alive() and len(contents(store.root)) < wanted:
            time.sleep(0.001)
        time.sleep(delay)
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        there, parts = len(contents(store.root)), len(list(store.root.rglob(".*.part")))
        print(f"kill {kill + 1}, {kill % 3} workers: {there} of {len(records)} whole, {parts} left-overs")
        assert sum(store.holds(record) for record in records) == there
    assert 0 < there < len(records)
    last = start(store.root, records, shape)
    last.join()
    print(f"next run: {len(contents(store.root))} of {len(records)} whole")
    assert last.exitcode == 0 and contents(store.root) == contents(whole.root)


# --- from the shell --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("tcia")
    write_tcia(root / "CBIS-DDSM", own_case_files(), uid_folders=True)
    write_case_files(root, own_case_files())
    return root


def test_training_does_not_depend_on_the_cache(tree, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train = f"--task cbis-ddsm --data-root {tree} --epochs 1 --num-workers 0 --no-tqdm"
    cold, warm, plain = (
        call("main-vqvae", f"{train} --out {name} {flag}")
        for name, flag in (("cold", ""), ("warm", "--cache cache"), ("plain", "--no-cache"))
    )
    assert [result.code for result in (cold, warm, plain)] == [0, 0, 0], plain.err
    folder = re.escape(str(Path("cache") / "64x48-v2"))
    assert re.search(rf"{folder}: preparing 10 of 10 images, 0\.000 GB; [\d.]+ GB free\n", cold.out)
    assert re.search(rf"{folder}: all of 10 images prepared\n", warm.out) and "prepar" not in plain.out
    for name in ("warm", "plain"):
        assert_same(load(Path(name) / "last.pt"), load(Path("cold") / "last.pt"))


@pytest.mark.parametrize("where", ["file", "below"])
def test_a_cache_folder_that_cannot_be_written_is_one_line(tree, tmp_path, where):
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" if where == "file" else tmp_path / "file" / "below"
    result = call("main-vqvae", f"--task cbis-ddsm --data-root {tree} --no-save --no-tqdm --cache {folder}")
    assert result.code == 2
    assert result.err.startswith(f"error: --cache {folder}: cannot be written (") and result.err.count("\n") == 1


@pytest.mark.parametrize(
    "task, flags, kept",
    [
        ("folder", "", "cache"),
        ("folder", "--cache c", "c"),
        ("folder", "--no-cache", None),
        ("folder", "--no-save", None),
        ("folder", "--no-save --cache c", "c"),
        ("folder-small", "", None),
        ("folder-small", "--cache c", "c"),
        ("phantom", "--cache c", None),
    ],
)
def test_where_the_cache_is_on(tmp_path, monkeypatch, task, flags, kept):
    monkeypatch.chdir(tmp_path)
    write_records(tmp_path / "images", 3)
    root = "" if task == "phantom" else "--data-root images"
    args = base_parser("", TASKS).parse_args(f"--task {task} {root} --no-tqdm {flags}".split())
    hps = HPS_VQVAE[task].updated(image_shape=list(SHAPE), crop_size=0, nb_workers=0, patient_pattern="file")
    load_datasets(args, hps, "train", "test")
    assert {path.name for path in tmp_path.iterdir()} - {"images"} == ({kept} if kept else set())
    assert len(contents(tmp_path)) == (2 if kept else 0)


def test_cache_and_no_cache_exclude_each_other(capsys):
    with pytest.raises(SystemExit) as stop:
        base_parser("", TASKS).parse_args(["--cache", "c", "--no-cache"])
    assert stop.value.code == 2 and "--no-cache" in capsys.readouterr().err
