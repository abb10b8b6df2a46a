"""The HTML report: what stands in it, and what Chromium makes of it."""

import base64
import hashlib
import io
import json
import re
import shutil
import subprocess
from dataclasses import asdict, replace
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy import ndimage

from evaluation.metrics import SSIM_NOTE, ErrorSplit, PowerSpectrum, image_metrics
from evaluation.page import (
    DISCLAIMER,
    ERROR_SCALE,
    PageCase,
    Power,
    Report,
    choose_close_ups,
    find_specks,
    read_curves,
    write_report,
)
from evaluation.table import METRICS, Evaluation
from evaluation.uncertainty import Coverage
from helper import UserError
from logger import Logger
from preprocessing.degrade import simulate_low_dose
from preprocessing.phantom import generate_phantom

ODD = "<img src=x onerror=alert(1)> \"'&amp; $title ${x} $_^ \\"
MEAN = "posterior mean"
PANELS = 7  # clean, low dose, BM3D, mean, sample, error, expected error
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome on the path")


class Page(HTMLParser):
    """Start tags with their attributes, and all text outside scripts and styles."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.hidden = [], "", False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.hidden = tag in ("script", "style")

    def handle_endtag(self, tag):
        self.hidden = False

    def handle_data(self, data):
        if not self.hidden:
            self.text += data

    def named(self, tag, of_class=None):
        return [a for t, a in self.tags if t == tag and (of_class is None or of_class in a.get("class", "").split())]


def make_case(index, name, shape=(1, 128, 96)):
    """A case of a phantom, and its rows of an evaluation."""
    phantom = generate_phantom(5, index, shape)
    clean, generator = phantom.image, torch.Generator().manual_seed(index)
    low = simulate_low_dose(clean, 0.2, generator)
    restored = torch.from_numpy(ndimage.gaussian_filter(low.numpy(), (0, 0.7, 0.7)))
    sample = (restored + 0.01 * torch.randn(clean.shape, generator=generator)).clamp(0, 1)
    images = {"low dose": low, "BM3D": 0.5 * (low + restored), MEAN: restored, "posterior sample": sample}
    figures = {name: image_metrics(image, clean, phantom.mask) for name, image in images.items()}
    rows = [{"path": name, "patient": name, "method": key, **asdict(value)} for key, value in figures.items()]
    close_ups = choose_close_ups(clean[0].numpy(), phantom.mask[0].numpy(), phantom.calcifications)
    labels = {key: f"{value.psnr_breast:.2f} dB" for key, value in figures.items()}
    arrays = {key: image[0].numpy() for key, image in images.items()}
    std = 0.002 + 0.01 * clean[0].numpy()
    return PageCase(name, clean[0].numpy(), arrays, MEAN, std, labels, close_ups), rows


@pytest.fixture(scope="module")
def log_csv(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stage one")
    logger = Logger(folder)
    for step in range(1, 5):
        logger.log("train", step, 1, {"loss": 0.1 / step, "learning_rate": 1e-4}, echo=False)
    logger.log("validation", 4, 1, {"score": -42.25, "psnr_continuous": 44.5, "psnr_quantized": 40.0}, echo=False)
    logger.log("train", 5, 2, {"loss": 1 / 3, "learning_rate": 1e-4}, echo=False)
    logger.close()
    return folder / "log.csv"


@pytest.fixture(scope="module")
def report(log_csv):
    cases, rows = zip(*(make_case(i, f"mdb00{i}.png") for i in range(2)), strict=True)
    edges, counts = (0.0, 0.5, 1.0), np.array([10, 20])
    parts = {"low dose": (np.array([0.02, 0.01]), np.array([1e-6, -1e-6])), ODD: (np.array([2e-3, 1e-3]),) * 2}
    return Report(
        title="Restored",
        subtitle="two phantoms",
        provenance={
            "checkpoints": {"diffusion": "runs/a/last.pt"},
            "seed": 17,
            "settings": dict.fromkeys("abcdefgh", 0.5),
        },
        evaluation=Evaluation(pd.DataFrame([row for group in rows for row in group]), {}),
        curves=read_curves(log_csv),
        mnse={name: ErrorSplit(edges, counts, n + b, n, b) for name, (n, b) in parts.items()},
        spectrum={"BM3D": PowerSpectrum(np.arange(1, 9) / 4, np.full(8, 1e-6), np.arange(8))},
        power={
            "BM3D": Power(np.array([0.99, 0.77, 0.34, 0.1]), np.array([0.1, 0.2, 0.4]), np.array([0.9, 0.5, 0.1])),
            ODD: Power(np.array([1.01, np.nan, 0.98, 1.03]), np.array([0.1, 0.2]), np.array([1.0, 1.1])),
        },
        coverage=Coverage(98765, 0.876, [0.5, 0.75], [0.911, 0.842], 0.0123, 0.97, {"8": 0.885, "32": 0.862}),
        coverage_note="16 samples of 4 images",
        cases=cases,
    )


@pytest.fixture(scope="module")
def page_file(report, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_report(path, report)
    return path


@pytest.fixture(scope="module")
def page(page_file):
    return Page(page_file.read_text(encoding="utf-8"))


def bare(report):
    """The report without its optional parts."""
    return replace(report, curves=(), mnse=None, spectrum=None, power=None, coverage=None, cases=(), provenance={})


def pixels(uri):
    head, data = uri.split(",", 1)
    assert head == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


# --- the page --------------------------------------------------------------------------------------------------------


def test_nothing_is_fetched_from_anywhere(page_file, page):
    text = page_file.read_text(encoding="utf-8")
    assert "http://" not in text
    assert "https://" not in text
    assert "@import" not in text
    assert not page.named("link")
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            value = value or ""
            if name in ("src", "srcset", "href", "xlink:href", "data", "action", "poster"):
                assert value.startswith(("data:image/png;base64,", "#")), (tag, name, value[:80])
            assert "url(" not in value.replace("url(#", "")
    assert page_file.stat().st_size < 15e6


def test_the_policy_lets_the_script_of_the_page_run_and_no_other(page_file, page):
    policy = next(a["content"] for a in page.named("meta") if a.get("http-equiv") == "Content-Security-Policy")
    (script,) = re.findall(r"<script>(.*?)</script>", page_file.read_text(encoding="utf-8"), re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.split("script-src ")[1].split(";")[0] == f"'sha256-{digest}'"
    assert "default-src 'none'" in policy


def test_every_reference_within_the_page_has_one_target(page_file, page):
    text = page_file.read_text(encoding="utf-8")
    names = [a["id"] for _, a in page.tags if "id" in a]
    assert len(names) == len(set(names))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', text)) <= set(names)


def test_the_table_holds_every_figure_and_the_inputs_beside_it(page, report):
    for method, row in report.evaluation.summary().items():
        assert method in page.text
        for metric in METRICS:
            if np.isnan(row[metric]):  # too small an image for it
                continue
            digits = 2 if metric.startswith("psnr") else 4
            assert f"{row[metric]:.{digits}f} ({row[f'{metric}_low_dose']:.{digits}f})" in page.text
    assert f"+{report.evaluation.summary()[MEAN]['psnr_breast_gain']:.2f}" in page.text
    for value in report.evaluation.per_image["psnr_breast"]:
        assert f"{value:.2f}" in page.text


def test_the_page_says_what_it_is_good_for_and_where_it_comes_from(page):
    assert "research use only; a restored image is an estimate, not fit for diagnosis" in DISCLAIMER.lower()
    assert page.text.count(DISCLAIMER) == 2
    for text in (
        "runs/a/last.pt",
        "17",
        "87.6 %",
        "0.50 – 0.7584.2 %",
        "all pixels87.6 %",
        "means over 8 × 8 pixels88.5 %",
        "means over 32 × 32 pixels86.2 %",
        "should be 90 %",
        "0.0123",
        "root mean square, is 0.97",
        "98,765 pixels inside the breast, 16 samples of 4 images",
        "BM3D0.990.770.340.10",
        "1.01–0.981.03",
        "0.02 – 0.10.1 – 0.20.2 – 0.30.3 – 0.5",
        "stage one",
        "psnr_quantized",
    ):
        assert text in page.text


def test_images_are_lossless_and_described(page, report):
    images = page.named("img")
    case = report.cases[0]
    assert len(images) == sum(PANELS * (1 + len(case.close_ups)) for case in report.cases)
    assert all(image["alt"] for image in images)
    shown = [np.asarray(pixels(image["src"])) for image in images[:PANELS]]
    for got, wanted in zip(shown, [case.clean, *case.images.values()], strict=False):
        assert np.abs(got / 255 - wanted).max() <= 0.5 / 255 + 1e-6
    error = np.abs(case.images[MEAN] - case.clean)
    for got, wanted in zip(shown[5:], (error, case.std), strict=True):  # on one scale, to be compared
        assert np.abs(got / 255 - wanted.clip(0, ERROR_SCALE) / ERROR_SCALE).max() <= 0.5 / 255 + 1e-6


def test_close_ups_are_windowed_by_the_clean_image_and_enlarged(page, report):
    case = report.cases[0]
    row, column, side = case.close_ups[0]
    window = np.s_[row : row + side, column : column + side]
    low, high = np.quantile(case.clean[window], (0.005, 0.995))
    image = page.named("img")[PANELS + 3]
    assert (image["width"], image["height"]) == (str(6 * side),) * 2
    expected = ((case.images[MEAN][window] - low) / max(high - low, 0.02)).clip(0, 1)
    assert np.abs(np.asarray(pixels(image["src"])) / 255 - expected).max() < 1 / 255


def test_large_close_ups_are_shown_pixel_by_pixel(tmp_path, report):
    clean = np.zeros((300, 256), np.float32)
    case = PageCase("large", clean, {MEAN: clean}, MEAN, close_ups=[(8, 8, 192), (0, 0, 256), (0, 0, 96)])
    write_report(tmp_path / "a.html", replace(bare(report), cases=[case]))
    page = Page((tmp_path / "a.html").read_text(encoding="utf-8"))
    assert [page.named("img")[3 * i]["width"] for i in (1, 2, 3)] == ["192", "256", "192"]
    assert page.text.count("pixel by pixel") == 2
    assert page.text.count("enlarged 2 times") == 1


def test_large_images_are_averaged_down_but_close_ups_are_not(tmp_path, report):
    clean = np.zeros((2060, 40), np.float32)
    clean[::2] = 0.5
    case = PageCase("large", clean, {"restored": clean}, "restored", close_ups=[(2028, 8, 32)])
    write_report(tmp_path / "a.html", replace(bare(report), cases=[case]))
    page = Page((tmp_path / "a.html").read_text(encoding="utf-8"))
    first, close_up = (pixels(page.named("img")[i]["src"]) for i in (0, 3))
    assert first.size == (14, 687)
    assert close_up.size == (32, 32)
    assert "1/3" in page.text


def test_names_are_escaped_everywhere(tmp_path, report):
    case, rows = make_case(0, ODD)
    frame = pd.DataFrame(rows).replace({MEAN: ODD})
    named = {ODD if name == MEAN else name: image for name, image in case.images.items()}
    odd = replace(
        report,
        title=ODD,
        subtitle=ODD,
        provenance={ODD: {ODD: [ODD, None]}},
        evaluation=Evaluation(frame, {}),
        curves=[replace(curve, name=ODD, quantity=ODD) for curve in report.curves],
        cases=[replace(case, name=ODD, images=named, estimate=ODD, labels={ODD: ODD})],
    )
    write_report(tmp_path / "a.html", odd)
    text = (tmp_path / "a.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not [a for _, a in page.tags if "onerror" in a or a.get("src") == "x"]
    assert len(page.named("img")) == PANELS * (1 + len(case.close_ups))
    # title, heading, subtitle, provenance (3), tables (2 + 2), plots and their legends, case, panel and label
    assert page.text.count(ODD) >= 15


def test_a_name_that_is_no_utf_8_is_written(tmp_path, report):
    write_report(tmp_path / "a.html", replace(bare(report), title="scan \udce4.png"))
    assert "scan ?.png" in (tmp_path / "a.html").read_text(encoding="utf-8")


def test_parts_that_are_left_out_leave_no_trace(tmp_path, report):
    write_report(tmp_path / "a.html", bare(report))
    page = Page((tmp_path / "a.html").read_text(encoding="utf-8"))
    assert [a["id"] for a in page.named("section")] == ["results"]
    assert [a["href"] for a in page.named("a")] == ["#results"]
    for tag in ("img", "svg", "figure", "article", "dl"):
        assert not page.named(tag)
    case = replace(report.cases[0], std=None, labels={}, close_ups=())
    write_report(tmp_path / "b.html", replace(bare(report), cases=[case]))
    page = Page((tmp_path / "b.html").read_text(encoding="utf-8"))
    assert len(page.named("img")) == PANELS - 1
    assert "uncertainty" not in page.text.lower()
    assert "expected error" not in page.text.lower()
    assert "close-up" not in page.text.lower()


def test_the_table_counts_the_images_that_are_better_than_bm3d(tmp_path, report):
    frame = report.evaluation.per_image.replace({"method": {"BM3D": "VST-BM3D"}})
    frame = frame[frame["method"] != "posterior sample"]
    frame = pd.concat([frame, frame.assign(path=frame["path"] + "2")])  # four images
    for method, psnr in {
        "low dose": [36, 36, 36, 36],
        "VST-BM3D": [42, 42, 42, 35],
        MEAN: [43, 41, 43, 37],
    }.items():
        frame.loc[frame["method"] == method, "psnr_breast"] = psnr
    write_report(tmp_path / "a.html", replace(bare(report), evaluation=Evaluation(frame, {})))
    text = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert '<td>4 of 4<span class="quiet">3 than VST-BM3D</span></td>' in text  # the mean
    assert f"{SSIM_NOTE}.</p>" in text
    assert "<td>3 of 4</td>" in text  # BM3D itself
    assert text.count("than VST-BM3D") == 1


def test_infinite_and_missing_figures_are_shown_as_such(tmp_path, report):
    frame = report.evaluation.per_image.copy()
    frame[[metric for metric in METRICS if "psnr" in metric]] = np.inf
    frame[[metric for metric in METRICS if "ssim" in metric]] = np.nan
    write_report(tmp_path / "a.html", replace(bare(report), evaluation=Evaluation(frame, {})))
    text = Page((tmp_path / "a.html").read_text(encoding="utf-8")).text
    assert "∞ (∞)" in text
    assert "– (–)" in text
    assert "nan" not in text


def test_a_page_that_cannot_be_written_is_a_sentence(tmp_path, report):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_report(tmp_path / "file" / "a.html", bare(report))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": {}}, "an image of the name 'restored'"),
        ({"estimate": "another"}, "an image of the name 'another'"),
        ({"images": {"restored": np.zeros((4, 5))}}, "restored is"),
        ({"std": np.full((8, 8), np.nan)}, "not finite"),
        ({"close_ups": [(5, 0, 4)]}, "leaves the image"),
        ({"close_ups": [(-1, 0, 4)]}, "leaves the image"),
        ({"close_ups": [(0, 0, 0)]}, "leaves the image"),
    ],
)
def test_cases_that_do_not_hold_together_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        PageCase(
            **{
                "name": "a",
                "clean": np.zeros((8, 8)),
                "images": {"restored": np.zeros((8, 8))},
                "estimate": "restored",
                **change,
            }
        )


# --- logs ------------------------------------------------------------------------------------------------------------


def test_curves_are_the_numbers_of_the_log(log_csv):
    curves = {(curve.split, curve.quantity): curve for curve in read_curves(log_csv)}
    assert set(curves) == {
        ("train", "loss"), ("validation", "score"), ("validation", "psnr_continuous"), ("validation", "psnr_quantized"),
    }  # fmt: skip
    loss = curves["train", "loss"]
    assert loss.name == log_csv.parent.name
    assert loss.steps.tolist() == [1, 2, 3, 4, 5]
    assert loss.values.tolist() == [0.1, 0.1 / 2, 0.1 / 3, 0.1 / 4, 1 / 3]
    score = curves["validation", "score"]
    assert (score.steps.tolist(), score.values.tolist()) == ([4], [-42.25])


def test_a_log_with_holes_gives_what_it_has(tmp_path):
    assert read_curves(tmp_path / "log.csv") == []
    path = tmp_path / "log.csv"
    path.write_text("")
    assert read_curves(path) == []
    path.write_text(
        "step,split,loss\n1,train,0.5\n2,train,\n3,train,x\n,train,1\n4,other,1\n5,train\n6,train,0.25,7,8\n"
    )
    (curve,) = read_curves(path, "mine")
    assert (curve.name, curve.steps.tolist(), curve.values.tolist()) == ("mine", [1, 6], [0.5, 0.25])
    path.write_text("step,epoch\n1,1\n")
    assert read_curves(path) == []
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not a readable training log"):
        read_curves(path)


# --- specks ----------------------------------------------------------------------------------------------------------


def breast_with(points, radius=0.8):
    """A phantom without calcifications, with specks at points in falling strength, and its mask."""
    phantom = next(p for p in (generate_phantom(1, i, (1, 256, 192)) for i in range(20)) if not p.calcifications)
    image, mask = phantom.image[0].numpy().copy(), phantom.mask[0].numpy()
    rows, columns = np.ogrid[: image.shape[0], : image.shape[1]]
    for i, (row, column) in enumerate(points):
        assert mask[row, column]
        image += (0.5 - 0.12 * i) * np.exp(-((rows - row) ** 2 + (columns - column) ** 2) / (2 * radius**2))
    return image, mask, phantom.side


def test_specks_are_found_where_they_were_planted_the_strongest_first():
    points = [(120, 60), (150, 45), (95, 50)]
    if breast_with([])[2] == "RIGHT":
        points = [(row, 191 - column) for row, column in points]
    image, mask, _ = breast_with(points)
    assert find_specks(image, mask, 3, separation=8) == points
    assert find_specks(image, mask, 1) == points[:1]


def test_lines_edges_and_what_lies_outside_are_no_specks():
    mask = np.zeros((96, 96), bool)
    mask[8:88, 8:88] = True
    image = 0.3 * mask.astype(np.float32)
    image[:, 40] += 0.6  # a line
    image[3, 3] = image[10, 60] = 1.0  # outside, and on the skin
    image[60, 70] += 0.3
    assert find_specks(image, mask, 1) == [(60, 70)]
    assert find_specks(np.zeros_like(image), mask, 3) == []


def test_close_ups_are_around_known_calcifications_of_most_contrast():
    phantom = next(p for p in (generate_phantom(2, i) for i in range(20)) if p.calcifications)
    image, mask = phantom.image[0].numpy(), phantom.mask[0].numpy()
    (row, column, side), *_ = choose_close_ups(image, mask, phantom.calcifications)
    best = max(phantom.calcifications, key=lambda c: c.contrast)
    assert row <= best.row < row + side
    assert column <= best.column < column + side
    for row, column, side in choose_close_ups(image, mask, phantom.calcifications, count=9):
        assert 0 <= row <= image.shape[0] - side
        assert 0 <= column <= image.shape[1] - side
    assert choose_close_ups(image[:20, :16], np.ones((20, 16), bool), [replace(best, row=3, column=3)]) == [(0, 0, 16)]


# --- the browser -----------------------------------------------------------------------------------------------------


def chromium(folder, page, *flags):
    flags = [
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-component-update",
        "--disable-background-networking", "--disable-sync", "--hide-scrollbars", "--virtual-time-budget=10000",
        f"--user-data-dir={folder / 'profile'}", *flags,
    ]  # fmt: skip
    result = subprocess.run(
        [CHROMIUM, *flags, page.as_uri()], capture_output=True, text=True, encoding="utf-8", timeout=180, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def body_of(dom):
    return Page(dom).named("body")[0]


@needs_chromium
def test_chromium_runs_the_viewer_without_an_error(tmp_path, page_file, report):
    body = body_of(chromium(tmp_path, page_file, "--dump-dom"))
    assert body["data-ready"] == "1"
    assert body["data-panels"] == str(PANELS * len(report.cases))
    assert json.loads(body["data-errors"]) == []


@needs_chromium
@pytest.mark.parametrize("size", [(1280, 2400), (500, 1600)])
def test_chromium_draws_the_page(tmp_path, page_file, size):
    shot = tmp_path / "shot.png"
    chromium(tmp_path, page_file, f"--screenshot={shot}", f"--window-size={size[0]},{size[1]}")
    with Image.open(shot) as image:
        values = np.asarray(image.convert("L"), np.float64)
    assert values.shape == size[::-1]
    assert values.std() > 20
    # the dark viewer with grey images in it, on a light page
    assert (values < 40).mean() > 0.05
    assert (values > 240).mean() > 0.2


# Timers in place of frames: a browser without a screen on virtual time draws none in between.
FRAMES = "window.requestAnimationFrame = done => setTimeout(done, 5);"
# Turns every knob of the first viewer and notes what came of it.
ACTIONS = """
addEventListener("load", async () => {
  const notes = {}, root = document.querySelector(".viewer"), canvases = [...root.querySelectorAll("canvas")];
  const frame = () => new Promise(done => setTimeout(done, 50)), read = name => root.querySelector(name).value;
  const zoom = async () => { await frame(); return parseInt(read(".zoom")); };
  const click = name => { root.querySelector(`[data-do=${name}]`).click(); return zoom(); };
  const key = name => { root.dispatchEvent(new KeyboardEvent("keydown", { key: name, bubbles: true })); return zoom(); };
  const pictures = () => canvases.map(c => c.getContext("2d").getImageData(0, 0, c.width, c.height).data.join());
  // an event half a CSS pixel off the middle of the second panel
  const point = (kind, name, more = {}, right = 0) => {
    const box = canvases[1].getBoundingClientRect();
    const clientX = box.left + box.width / 2 + 0.5 + right, clientY = box.top + box.height / 2 + 0.5;
    canvases[1].dispatchEvent(new kind(name, { clientX, clientY, bubbles: true, cancelable: true, ...more }));
    return zoom();
  };
  canvases[1].setPointerCapture = () => {};  // takes no pointer that is none
  notes.fit = await zoom();
  notes.one = await click("one");
  notes.in = await click("in");
  notes.plus = await key("+");
  notes.minus = await key("-");
  notes.back = await key("f");
  notes.wheel = await point(WheelEvent, "wheel", { deltaY: -250 });
  await point(PointerEvent, "pointermove");
  notes.values = [...root.querySelectorAll(".panel output")].map(output => output.value);
  notes.place = read(".place");
  const before = pictures(), differs = () => pictures().map((picture, i) => picture !== before[i]);
  const level = root.querySelector(".level");
  level.value = 0.2;
  level.dispatchEvent(new Event("input"));
  await frame();
  notes.windowed = differs();
  await click("reset");
  notes.reset = differs();
  await point(PointerEvent, "pointerdown", { pointerId: 1 });
  await point(PointerEvent, "pointermove", { pointerId: 1 }, 30);
  await point(PointerEvent, "pointerup", { pointerId: 1 }, 30);
  await point(PointerEvent, "pointermove");
  notes.dragged = read(".place");
  notes.moved = differs();
  root.parentElement.querySelector(".show").click();
  await frame();
  await point(PointerEvent, "pointermove");
  notes.shown = read(".place");
  await click("auto");
  notes.auto = read(".range");
  document.body.dataset.notes = JSON.stringify(notes);
});
"""


def place(text):
    """Row and column that the viewer names."""
    return tuple(map(int, re.fullmatch(r"row (\d+), column (\d+)", text).groups()))


@needs_chromium
def test_all_panels_zoom_pan_and_window_together(tmp_path, page_file, report):
    text = page_file.read_text(encoding="utf-8")
    policy = re.search(r'<meta http-equiv="Content-Security-Policy"[^>]*>', text)[0]
    # the page's own policy lets no other script run
    text = text.replace(policy, f"<script>{FRAMES}</script>").replace("</body>", f"<script>{ACTIONS}</script></body>")
    page = tmp_path / "driven.html"
    page.write_text(text, encoding="utf-8")
    body = body_of(chromium(tmp_path, page, "--dump-dom", "--window-size=1280,1400"))
    assert json.loads(body["data-errors"]) == []
    notes = json.loads(body["data-notes"])
    assert notes["fit"] == notes["back"]
    assert notes["one"] == max(100, notes["fit"])
    assert notes["in"] == notes["minus"] == pytest.approx(1.5 * notes["one"], abs=1)
    assert notes["plus"] == pytest.approx(2.25 * notes["one"], abs=2)
    assert notes["wheel"] > notes["fit"]
    case = report.cases[0]
    row, column = place(notes["place"])
    values = [float(value.removeprefix("≥ ")) for value in notes["values"]]
    expected = [image[row, column] for image in (case.clean, *case.images.values())]
    assert values[:5] == pytest.approx(expected, abs=0.5 / 255 + 0.0006)
    error = abs(expected[3] - expected[0])
    assert values[5] == pytest.approx(min(error, ERROR_SCALE), abs=ERROR_SCALE / 510 + 1e-4)
    assert values[6] == pytest.approx(case.std[row, column], abs=1e-4)
    assert notes["windowed"] == [True] * 5 + [False] * 2  # maps keep their colours
    assert notes["reset"] == [False] * PANELS
    assert notes["moved"] == [True] * PANELS
    assert place(notes["dragged"])[1] < column
    # a close-up fills half of the shorter side of a panel, and no panel shows what is beyond the image
    (height, width), (top, left, side) = case.clean.shape, case.close_ups[0]
    reach = side * height / width
    wanted = np.clip(top + side / 2, reach, height - reach), np.clip(left + side / 2, side, width - side)
    assert place(notes["shown"]) == pytest.approx(wanted, abs=1.5)
    assert notes["auto"] != "black 0.00, white 1.00"
