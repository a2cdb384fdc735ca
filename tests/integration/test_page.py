"""The page as people use it: a real model behind a real server, in a headless browser."""

from __future__ import annotations

import json
import math
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn

from bigray.bundle import BundleManifest, FactorySpec, Golden, ModelBundle, ModelCard, Origin, OutputSchema, save_bundle
from bigray.data.codes import UNSEEN_NAME
from bigray.data.features import Column, FeatureSchema
from bigray.data.preprocessing import fit_preprocessing
from bigray.serve.protect.keys import create_key
from bigray.serve.sample import write_sample_bundle
from bigray.serve.standalone import standalone_app
from bigray.storage import open_storage

webdriver = pytest.importorskip("selenium.webdriver")
load_digits = pytest.importorskip("sklearn.datasets").load_digits

from selenium.webdriver.common.action_chains import ActionBuilder, ActionChains  # noqa: E402
from selenium.webdriver.common.actions import interaction  # noqa: E402
from selenium.webdriver.common.actions.pointer_input import PointerInput  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1280,1000",
)

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(CHROMIUM is None or DRIVER is None, reason="needs chromium and chromedriver"),
]

Stroke = Sequence[tuple[float, float]]
App = Callable[..., Any]

ZERO: Stroke = [(0.5 + 0.22 * math.sin(i * math.tau / 20), 0.5 - 0.33 * math.cos(i * math.tau / 20)) for i in range(21)]
ONE: Stroke = [(0.5, 0.15), (0.5, 0.5), (0.5, 0.85)]
SEVEN: Stroke = [(0.25, 0.2), (0.45, 0.2), (0.72, 0.2), (0.6, 0.45), (0.45, 0.82)]
SMALL_SEVEN: Stroke = [(0.6 + x / 3, 0.1 + y / 3) for x, y in SEVEN]

HOSTILE = "</script><b>hostile</b>"


# ---- models ----


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A bundle that reads the 8 x 8 digits, trained here in seconds."""
    import safetensors.torch
    import torch

    from bigray.models import build_model

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.images))
    rows, labels = data.images[order].astype(np.float32), data.target[order]
    preprocessing = fit_preprocessing("standard", rows[:1400])
    inputs, targets = torch.from_numpy(preprocessing.apply(rows)), torch.from_numpy(labels)
    spec = FactorySpec(factory="bigray.models:cnn", params={"channels": [16, 32]})
    torch.set_num_threads(1)  # as the endpoint does; more only get in each other's way on models this small
    torch.manual_seed(0)
    module = build_model(spec.factory, spec.params, (8, 8), 10)
    _fit(module, inputs[:1400], targets[:1400])
    with torch.inference_mode():
        outputs = module(inputs).numpy()
    confusion = np.zeros((10, 10), int)
    np.add.at(confusion, (labels[1400:], outputs[1400:].argmax(axis=1)), 1)
    manifest = BundleManifest(
        name="digits",
        origin=_origin({"accuracy": float(confusion.trace() / confusion.sum())}),
        inputs=FeatureSchema(columns=(Column(name="image", shape=(8, 8)),)),
        preprocessing=preprocessing,
        outputs=OutputSchema(task="classification", num_outputs=10, target="digit", class_names=tuple(range(10))),
        factory=spec,
        example={"image": rows[0].tolist()},
        input_range=(0.0, 16.0),
        card=ModelCard(rows={"train": 1400, "validation": 397}, num_parameters=1, confusion=confusion.tolist()),
    )
    weights = safetensors.torch.save({name: tensor.contiguous() for name, tensor in module.state_dict().items()})
    storage = open_storage(str(tmp_path_factory.mktemp("bundles")))
    save_bundle(storage, "digits", manifest, weights, None, Golden(rows[:8], outputs[:8]))
    return storage.child("digits").uri


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A bundle that goes on with a text of a few letters, untrained."""
    import safetensors.torch
    import torch

    from bigray.inference import Predictor
    from bigray.models import build_model

    letters, context = tuple("abc <>/\n"), 8
    spec = FactorySpec(factory="bigray.models:language_model", params={"width": 8, "depth": 1, "heads": 2})
    torch.manual_seed(0)
    module = build_model(spec.factory, spec.params, (context,), len(letters)).eval()
    rows = np.random.default_rng(0).integers(0, len(letters), (4, context)).astype(np.float32)
    column = Column(name="text", shape=(context,), kind="text", categories=letters)
    manifest = BundleManifest(
        name="writer",
        origin=_origin({}),
        inputs=FeatureSchema(columns=(column,)),
        preprocessing=fit_preprocessing("none", rows),
        outputs=OutputSchema(task="language", num_outputs=len(letters), target="next", class_names=letters),
        factory=spec,
        example={"text": rows[0].tolist()},
    )
    storage = open_storage(str(tmp_path_factory.mktemp("bundles")))
    weights = safetensors.torch.save({name: tensor.contiguous() for name, tensor in module.state_dict().items()})
    answers = Predictor(ModelBundle(manifest, weights, None, "0" * 12)).outputs(rows)
    save_bundle(storage, "writer", manifest, weights, None, Golden(rows, answers))
    return storage.child("writer").uri


def _fit(module: Any, inputs: Any, targets: Any) -> None:
    import torch

    optimizer = torch.optim.Adam(module.parameters(), 3e-3)
    for _ in range(10):
        for batch in torch.randperm(len(inputs)).split(64):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(module(inputs[batch]), targets[batch]).backward()
            optimizer.step()
    module.eval()


def _origin(metrics: dict[str, float]) -> Origin:
    facts = {"run": "digits-1", "trial": "0003", "model": "cnn", "step": 220, "epoch": 10, "git": "9f8e7d6c5b4a"}
    return Origin(
        **facts,
        metrics=metrics,
        config={"lr": 3e-3},
        seeds={"job": 0},
        data_fingerprint="a1b2c3",
        versions={"torch": "2"},
    )


def sample(root: Path, columns: Sequence[Column], **settings: Any) -> str:
    return write_sample_bundle(
        str(root), columns=tuple(columns), params={"hidden": [4]}, onnx=False, holdout_rows=0, **settings
    )


# ---- servers ----


@contextmanager
def served(app: App) -> Iterator[str]:
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()


def app_of(bundle: str, **args: Any) -> App:
    return standalone_app(bundle, num_threads=1, allow_factories=("bigray.models:*",), **args)


def below(prefix: str, app: App) -> App:
    async def prefixed(scope: Any, receive: Any, send: Any) -> None:
        assert scope["path"].startswith(prefix), "the page asked beside its prefix"
        await app({**scope, "root_path": prefix}, receive, send)

    return prefixed


@pytest.fixture(scope="module")
def endpoint(digits: str) -> Iterator[str]:
    with served(app_of(digits)) as url:
        yield url


# ---- the browser ----


class Page:
    """The page in a browser, by what a person sees of it."""

    def __init__(self, browser: Any) -> None:
        self.browser = browser

    def open(self, url: str) -> Page:
        self.browser.get(url)
        self.wait(lambda: self.find("status").get_attribute("data-state") != "waiting" or self.is_shown("gate"))
        return self

    def find(self, name: str) -> Any:
        return self.browser.find_element(By.ID, name)

    def text(self, name: str) -> str:
        return str(self.find(name).text)

    def is_shown(self, name: str) -> bool:
        return bool(self.find(name).is_displayed())

    def run(self, script: str, *arguments: Any) -> Any:
        return self.browser.execute_script(script, *arguments)

    def wait(self, condition: Callable[[], Any], seconds: float = 20) -> Any:
        return WebDriverWait(self.browser, seconds, 0.05).until(lambda _: condition())

    def answer(self) -> str:
        """The label or value, once there is one."""
        self.wait(lambda: self.is_shown("verdict") and not self.run("return document.querySelector('.stale')"))
        return self.text("verdict-text")

    def problem(self) -> str:
        self.wait(lambda: self.is_shown("problem"))
        return self.text("problem")

    def draw(self, stroke: Stroke, kind: str = interaction.POINTER_MOUSE) -> None:
        canvas = self.find("canvas")
        self.run("arguments[0].scrollIntoView({block: 'center'})", canvas)
        pointer = PointerInput(kind, kind)
        actions = ActionBuilder(self.browser, mouse=pointer, duration=10)
        width, height = canvas.size["width"], canvas.size["height"]
        places = [(int((x - 0.5) * width), int((y - 0.5) * height)) for x, y in stroke]
        actions.pointer_action.move_to(canvas, *places[0]).pointer_down()
        for place in places[1:]:
            actions.pointer_action.move_to(canvas, *place)
        actions.pointer_action.pointer_up()
        actions.perform()

    def press(self, *keys: str) -> None:
        ActionChains(self.browser).send_keys(*keys).perform()

    def focused(self) -> str:
        return str(self.run("return document.activeElement.id || document.activeElement.className"))

    def tab_to(self, name: str, most: int = 20) -> None:
        for _ in range(most):
            if self.focused() == name:
                return
            self.press(Keys.TAB)
        raise AssertionError(f"{name} is not reached by Tab; the focus is on {self.focused()}")

    def sent(self) -> Any:
        """The record that the page sends, out of its curl command."""
        if not self.find("curl").is_displayed():
            self.browser.find_element(By.CSS_SELECTOR, ".command summary").click()
        command = self.wait(lambda: self.text("curl"))
        (record,) = json.loads(command.split("-d '")[1].removesuffix("'"))["records"]
        return record

    def announced(self) -> str:
        """What a screen reader was given to say of the drawing."""
        return str(self.find("cursor").get_attribute("textContent"))

    def emulate(self, *, scheme: str = "light", width: int = 1280, height: int = 1000) -> None:
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def complaints(self) -> list[str]:
        """What the browser logged, but for refusals of the server, which it calls failures to load."""
        messages = [entry["message"] for entry in self.browser.get_log("browser")]
        return [message for message in messages if "Failed to load resource" not in message]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser: Any) -> Iterator[Page]:
    page = Page(browser)
    page.emulate()
    yield page
    assert page.complaints() == []
    browser.get("about:blank")


# ---- drawing ----


@pytest.mark.parametrize(
    ("stroke", "label"), [(ZERO, "0"), (ONE, "1"), (SEVEN, "7"), (SMALL_SEVEN, "7")], ids=["0", "1", "7", "small 7"]
)
def test_a_drawn_digit_is_read(page: Page, endpoint: str, digits: str, stroke: Stroke, label: str) -> None:
    page.open(endpoint).draw(stroke)
    assert page.answer() == label
    bars = page.find("bars").find_elements(By.TAG_NAME, "li")
    assert len(bars) == 10
    assert bars[0].text.startswith(label)
    assert ModelBundle.load(digits).version in page.text("took")


def test_a_finger_draws_as_well(page: Page, endpoint: str) -> None:
    page.open(endpoint).draw(SEVEN, interaction.POINTER_TOUCH)
    assert page.answer() == "7"


def test_a_second_stroke_belongs_to_the_same_drawing_until_it_is_undone(page: Page, endpoint: str) -> None:
    page.open(endpoint).draw(ONE)
    page.answer()
    alone = page.sent()
    page.draw([(0.2, 0.5), (0.8, 0.5)])
    page.answer()
    assert page.sent() != alone
    page.find("undo").click()
    page.find("predict").click()
    page.answer()
    assert page.sent() == alone


def test_nothing_drawn_is_said_and_not_sent(page: Page, endpoint: str) -> None:
    page.open(endpoint).draw(ONE)
    page.answer()
    page.find("clear").click()
    assert not page.is_shown("verdict")
    page.find("predict").click()
    assert page.problem() == "Nothing is drawn yet."


def test_a_drawing_is_sent_in_the_range_of_the_training_data(page: Page, endpoint: str) -> None:
    page.open(endpoint).draw(ZERO)
    page.answer()
    image = np.array(page.sent()["image"])
    assert image.shape == (8, 8)
    assert image.min() == 0
    assert 14 < image.max() <= 16
    assert image[3:5, 3:5].mean() < 4, "the hole of the zero"


def test_the_example_row_is_sent_as_it_is(page: Page, endpoint: str, digits: str) -> None:
    page.open(endpoint).find("example").click()
    page.answer()
    assert page.sent() == ModelBundle.load(digits).manifest.example


@pytest.mark.parametrize("shape", [(1, 8, 9), (3, 8, 9), (8, 9, 3), (8, 9, 1)])
def test_pictures_of_every_layout_go_out_as_the_model_takes_them(
    page: Page, tmp_path: Path, shape: tuple[int, ...]
) -> None:
    bundle = sample(tmp_path, [Column(name="photo", shape=shape)])
    with served(app_of(bundle)) as url:
        page.open(url).find("example").click()
        page.answer()
        sent = np.array(page.sent()["photo"])
        assert sent.shape == shape
        assert np.allclose(sent, np.array(ModelBundle.load(bundle).manifest.example["photo"]), rtol=1e-3, atol=1e-3)
        page.draw(ONE)
        page.answer()
        assert np.array(page.sent()["photo"]).shape == shape


def test_a_picture_from_a_file_is_sent_as_it_is(page: Page, endpoint: str, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    values = load_digits().images[1]
    image.fromarray((values * 255 / 16).astype(np.uint8)).resize((80, 80), 0).save(tmp_path / "one.png")
    page.open(endpoint).find("file").send_keys(str(tmp_path / "one.png"))
    assert page.answer() == "1"
    page.browser.find_element(By.CSS_SELECTOR, ".command summary").click()
    assert "--data-binary '@one.png'" in page.text("curl")


def test_a_file_that_is_no_picture_is_refused_by_name(page: Page, endpoint: str, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    page.open(endpoint).find("file").send_keys(str(tmp_path / "broken.png"))
    assert page.problem() == "broken.png: the browser cannot read this picture."


# ---- keyboard ----


def test_a_digit_is_painted_and_read_by_keyboard_alone(page: Page, endpoint: str) -> None:
    page.open(endpoint).tab_to("canvas")
    page.press(*[Keys.ARROW_UP] * 8, Keys.ARROW_LEFT)
    assert page.announced() == "Row 1, column 4, empty"
    for keys in ([Keys.ARROW_DOWN] * 7, [Keys.ARROW_UP] * 7):
        page.press(Keys.SPACE)
        ActionChains(page.browser).key_down(Keys.SHIFT).send_keys(*keys).key_up(Keys.SHIFT).perform()
        page.press(Keys.ARROW_RIGHT)
    page.press(Keys.ARROW_LEFT)
    assert page.announced() == "Row 1, column 5, painted"
    page.press(Keys.ENTER)
    assert page.answer() == "1"
    assert np.count_nonzero(page.sent()["image"]) == 16


def test_space_paints_and_takes_away(page: Page, endpoint: str) -> None:
    page.open(endpoint).tab_to("canvas")
    page.press(Keys.SPACE)
    assert page.announced().endswith("painted")
    page.press(Keys.SPACE)
    assert page.announced().endswith("empty")


def test_the_first_tab_stop_leads_past_the_head_of_the_page(page: Page, endpoint: str) -> None:
    page.open(endpoint).press(Keys.TAB)
    assert page.focused() == "skip"
    page.press(Keys.ENTER)
    page.wait(lambda: page.focused() == "try")


def test_every_stop_shows_that_it_has_the_focus(page: Page, endpoint: str) -> None:
    page.open(endpoint)
    stops = set()
    page.press(Keys.TAB)
    while not page.run("return document.activeElement === document.body"):
        stops.add(page.focused())
        outline = page.run(
            "const e = document.activeElement; const shown = e.matches('.unseen') ? e.nextElementSibling : e;"
            "return getComputedStyle(shown).outlineStyle"
        )
        assert outline == "solid", page.focused()
        page.press(Keys.TAB)
    assert {"canvas", "predict", "example", "file"} <= stops


def test_every_field_has_a_name(page: Page, endpoint: str) -> None:
    page.open(endpoint)
    nameless = page.run(
        "return [...document.querySelectorAll('input, textarea, canvas, button, summary, [role]')].filter((e) => "
        "!(e.labels?.length || e.getAttribute('aria-label') || e.textContent.trim() || "
        "['alert', 'status'].includes(e.getAttribute('role')))).map((e) => e.id)"
    )
    assert nameless == []


# ---- numbers and JSON ----


def test_scalar_columns_are_fields_filled_with_the_example(page: Page, tmp_path: Path) -> None:
    bundle = sample(tmp_path, [Column(name="width"), Column(name="height")], name="area", class_names=())
    with served(app_of(bundle)) as url:
        page.open(url)
        example = ModelBundle.load(bundle).manifest.example
        field = page.browser.find_element(By.CSS_SELECTOR, "#grid input")
        assert np.float32(field.get_attribute("value")) == np.float32(example["width"])
        field.clear()
        field.send_keys("0.25", Keys.ENTER)
        assert float(page.answer()) == pytest.approx(_predict(bundle, {**example, "width": 0.25}), rel=1e-3)
        assert page.sent() == pytest.approx({**example, "width": 0.25})
        assert not page.is_shown("bars")


def _predict(bundle: str, record: dict[str, float]) -> float:
    from bigray.inference import Predictor

    loaded = ModelBundle.load(bundle)
    values = Predictor(loaded).run(loaded.manifest.inputs.from_records([record])).values
    assert values is not None
    return float(values[0])


def test_an_empty_field_is_named_and_takes_the_focus(page: Page, tmp_path: Path) -> None:
    with served(app_of(sample(tmp_path, [Column(name="width"), Column(name="height")]))) as url:
        page.open(url)
        page.browser.find_elements(By.CSS_SELECTOR, "#grid input")[1].clear()
        page.find("predict").click()
        assert page.problem() == "Enter a number for 'height'."
        assert page.focused() == "field-1"


def test_categories_dates_and_missing_values_have_entries_of_their_own(page: Page, tmp_path: Path) -> None:
    columns = [
        Column(name="age", nullable=True),
        Column(name="colour", kind="category", categories=("red", "blue"), nullable=True),
        Column(name="born", kind="date"),
    ]
    bundle = sample(tmp_path, columns, name="people")
    example = ModelBundle.load(bundle).manifest.example
    with served(app_of(bundle)) as url:
        page.open(url).find("predict").click()
        page.answer()
        assert page.sent() == example | {"age": pytest.approx(example["age"])}
        age, born = page.browser.find_elements(By.CSS_SELECTOR, "#grid input")
        colour = page.browser.find_element(By.CSS_SELECTOR, "#grid select")
        age.clear()
        page.run("arguments[0].value = '2024-05-31T12:30'", born)
        for keys, sent in (("bl", "blue"), ("an", UNSEEN_NAME), ("mi", None)):
            colour.send_keys(keys)
            page.find("predict").click()
            page.answer()
            page.wait(lambda sent=sent: page.sent()["colour"] == sent)
            assert page.sent() == {"age": None, "colour": sent, "born": "2024-05-31T12:30"}
        page.run("arguments[0].value = ''", born)
        page.find("predict").click()
        assert page.problem() == "Enter a date and time for 'born'."
        assert page.focused() == "field-2"


def test_many_columns_scroll_in_a_box_and_can_be_searched(page: Page, tmp_path: Path) -> None:
    columns = [Column(name=f"sensor {number:03}") for number in range(200)]
    with served(app_of(sample(tmp_path, columns))) as url:
        page.open(url)
        assert page.find("grid").size["height"] < 500
        page.find("find").send_keys("sensor 19")
        shown = [box for box in page.browser.find_elements(By.CSS_SELECTOR, ".field") if box.is_displayed()]
        assert len(shown) == 10
        page.find("predict").click()
        page.answer()
        assert len(page.sent()) == 200


def test_what_the_server_refuses_is_shown_as_text(page: Page, tmp_path: Path) -> None:
    bundle = sample(tmp_path, [Column(name="signal", shape=(2, 3))], class_names=(HOSTILE, "other"), name="signals")
    with served(app_of(bundle)) as url:
        page.open(url)
        assert (
            json.loads(page.find("json").get_attribute("value")) == ModelBundle.load(bundle).manifest.example["signal"]
        )
        for text, problem in (("[[1, 2], [3, 4]]", "wrong shape"), ('[["<b>bold</b>"]]', "<b>bold</b>")):
            page.run("arguments[0].value = arguments[1]", page.find("json"), text)
            page.find("predict").click()
            page.wait(lambda problem=problem: problem in page.text("problem"))
            assert page.problem().startswith("400: ")
        assert page.browser.find_elements(By.CSS_SELECTOR, "#problem b") == []


def test_names_that_look_like_markup_are_shown_as_text(page: Page, tmp_path: Path) -> None:
    columns = [Column(name=HOSTILE), Column(name="other")]
    with served(app_of(sample(tmp_path, columns, class_names=(HOSTILE, "b")))) as url:
        page.open(url).find("predict").click()
        page.answer()
        assert HOSTILE in page.text("bars")
        assert HOSTILE in page.text("grid")
        assert page.browser.find_elements(By.CSS_SELECTOR, "main b") == []


def test_what_is_no_json_is_told_without_asking_the_server(page: Page, tmp_path: Path) -> None:
    with served(app_of(sample(tmp_path, [Column(name="signal", shape=(6,))]))) as url:
        page.open(url)
        page.run("arguments[0].value = '[1, 2'", page.find("json"))
        page.find("predict").click()
        assert page.problem().startswith("The value is not JSON: ")


# ---- why ----


def parts_of(page: Page) -> list[list[str]]:
    """Name, value and share of each column that is told, in order."""
    items = page.wait(lambda: page.browser.find_elements(By.CSS_SELECTOR, "#explanation-body .parts li"))
    return [[one.text for one in item.find_elements(By.CSS_SELECTOR, ".name, .given, .share")] for item in items]


def test_each_column_is_told_with_its_value_and_what_it_adds(page: Page, tmp_path: Path) -> None:
    pytest.importorskip("captum")
    from bigray.explanation.integrated_gradients import explain_rows

    columns = [Column(name="age", nullable=True), Column(name=HOSTILE), Column(name="born", kind="date")]
    bundle = ModelBundle.load(location := sample(tmp_path, columns, name="people at home"))
    with served(app_of(location)) as url:
        page.open(url).find("example").click()
        page.answer()
        page.find("explain").click()
        parts = parts_of(page)
        example = bundle.manifest.example
        (expected,) = explain_rows(bundle, bundle.manifest.inputs.from_records([example])).attributions
        by_name = dict(zip(bundle.manifest.inputs.columns, expected.tolist(), strict=True))
        order = sorted(by_name.items(), key=lambda one: -abs(one[1]))
        assert [name for name, *_ in parts] == [column.name for column, _ in order]
        for (name, given, share), (_, value) in zip(parts, order, strict=True):
            assert float(share) == pytest.approx(value, rel=1e-2, abs=1e-3)
            assert share.startswith("+" if value > 0 else "-") or share == "0"
            assert given == example[name] if name == "born" else float(given) == pytest.approx(example[name], rel=1e-3)
        assert "from" in page.text("explanation-note").lower()
        assert page.browser.find_elements(By.CSS_SELECTOR, "main b") == []
        page.find("predict").click()
        page.wait(lambda: not page.browser.find_elements(By.CSS_SELECTOR, ".parts"))


def test_over_a_picture_its_pixels_are_red_and_blue(page: Page, endpoint: str, tmp_path: Path) -> None:
    pytest.importorskip("captum")
    image = pytest.importorskip("PIL.Image")
    page.open(endpoint).draw(SEVEN)
    page.answer()
    page.tab_to("explain")
    page.press(Keys.ENTER)
    canvas = page.wait(lambda: page.browser.find_element(By.CSS_SELECTOR, ".heat-map canvas"))
    assert "speak for \u20187\u2019" in canvas.get_attribute("aria-label")
    read = "const c = arguments[0]; return [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]"
    pixels = np.array(page.run(read, canvas)).reshape(8, 8, 4)[..., :3].astype(int)
    assert (pixels[..., 0] - pixels[..., 2]).max() > 50
    assert (pixels[..., 2] - pixels[..., 0]).max() > 50
    image.fromarray((load_digits().images[1] * 255 / 16).astype(np.uint8)).save(tmp_path / "one.png")
    page.find("file").send_keys(str(tmp_path / "one.png"))
    page.wait(lambda: page.text("verdict-text") == "1" and not page.run("return document.querySelector('.stale')"))
    page.find("explain").click()
    page.wait(lambda: "\u20181\u2019" in page.text("explanation-body"))


def test_an_explanation_that_is_refused_leaves_the_answer_in_sight(page: Page, digits: str, tmp_path: Path) -> None:
    pytest.importorskip("captum")
    place = tmp_path / "bundle"
    shutil.copytree(digits.removeprefix("file://"), place)
    with served(app_of(str(place))) as url:
        page.open(url).find("example").click()
        label = page.answer()
        shutil.rmtree(place)
        page.find("explain").click()
        page.wait(lambda: page.is_shown("explanation-problem"))
        assert page.text("explanation-problem").startswith("503: explain: the bundle of this version cannot be read")
        assert page.answer() == label


# ---- text ----


def test_a_text_goes_on_where_the_prompt_ends(page: Page, writer: str) -> None:
    with served(app_of(writer)) as url:
        page.open(url)
        assert (page.text("predict"), page.is_shown("example"), page.is_shown("raw")) == ("Write", False, False)
        page.find("predict").click()
        assert page.problem() == "Enter a prompt."
        assert page.focused() == "prompt"
        page.find("prompt").send_keys("abc <b>")
        page.run("arguments[0].value = '25'", page.find("max-tokens"))
        page.run("arguments[0].value = '0'", page.find("temperature"))
        ActionChains(page.browser).key_down(Keys.CONTROL).send_keys(Keys.ENTER).key_up(Keys.CONTROL).perform()
        page.wait(lambda: page.text("written-status").startswith("25 tokens in "))
        first = page.find("written-text").get_attribute("textContent")
        assert len(first) == 25
        assert page.find("written-prompt").get_attribute("textContent") == "abc <b>"
        assert page.browser.find_elements(By.CSS_SELECTOR, "#written b") == []
        assert not page.is_shown("stop")
        page.browser.find_element(By.CSS_SELECTOR, ".command summary").click()
        assert page.text("curl").startswith(f"curl -N -X POST '{url}/generate'")
        page.find("predict").click()
        page.wait(lambda: page.text("written-status").startswith("25 tokens in "))
        assert page.find("written-text").get_attribute("textContent") == first


def test_a_text_is_stopped_and_what_the_model_does_not_know_is_told(page: Page, writer: str) -> None:
    app = app_of(writer)
    with served(app) as url:
        page.open(url).find("prompt").send_keys("abc")
        page.run("arguments[0].value = '10000'", page.find("max-tokens"))
        page.find("predict").click()
        page.wait(lambda: page.find("written-text").get_attribute("textContent"))
        page.find("stop").click()
        page.wait(lambda: page.text("written-status") == "Stopped")
        assert 0 < len(page.find("written-text").get_attribute("textContent")) < 10_000
        assert not page.is_shown("stop")
        page.find("prompt").send_keys("!")
        page.find("predict").click()
        assert page.problem().startswith("400: prompt: '!' is not one of the 8 characters")


# ---- what surrounds the form ----


def test_the_card_tells_of_the_model(page: Page, endpoint: str, digits: str) -> None:
    page.open(endpoint)
    manifest = ModelBundle.load(digits).manifest
    assert page.text("name") == "digits"
    assert page.text("version") == ModelBundle.load(digits).version
    assert page.text("purpose") == "Predicts digit, one of 10 classes, from image (8 \u00d7 8)."
    assert "accuracy" in page.text("metrics")
    rows = page.browser.find_elements(By.CSS_SELECTOR, "#confusion tbody tr")
    assert manifest.card is not None
    assert [[int(cell.text) for cell in row.find_elements(By.TAG_NAME, "td")] for row in rows] == [
        list(row) for row in manifest.card.confusion
    ]
    page.browser.find_element(By.CSS_SELECTOR, "#card summary").click()
    assert "digits-1" in page.text("lineage")
    assert not page.is_shown("explanation")


def test_live_numbers_come_and_go_on(page: Page, endpoint: str) -> None:
    page.open(endpoint).wait(lambda: page.text("replicas") == "1")
    page.find("example").click()
    page.answer()
    page.wait(lambda: "ms" in page.text("p50"))


@pytest.mark.parametrize("path", ["/second", "/second/"])
def test_it_works_below_a_prefix_with_and_without_a_slash(page: Page, digits: str, path: str) -> None:
    with served(below("/second", app_of(digits))) as url:
        page.open(url + path).draw(SEVEN)
        assert page.answer() == "7"
        assert page.find("link-openapi").get_attribute("href") == f"{url}/second/openapi.json"


def test_a_key_is_asked_for_kept_in_the_tab_and_never_in_the_command(page: Page, digits: str, tmp_path: Path) -> None:
    secret = create_key(str(tmp_path / "keys.json"), "someone")
    with served(app_of(digits, keys=str(tmp_path / "keys.json"))) as url:
        page.open(url).wait(lambda: page.is_shown("gate"))
        assert not page.is_shown("try")
        page.find("key").send_keys("bgr_wrong", Keys.ENTER)
        page.wait(lambda: page.text("gate-problem").startswith("401: "))
        page.find("key").send_keys(secret, Keys.ENTER)
        page.wait(lambda: page.is_shown("try"))
        page.draw(SEVEN)
        assert page.answer() == "7"
        assert secret not in page.run("return document.documentElement.outerHTML")
        assert page.run("return localStorage.length + document.cookie.length") == 0
        page.browser.refresh()
        page.wait(lambda: page.is_shown("try"))
        page.find("forget").click()
        page.wait(lambda: page.is_shown("gate"))
        assert page.run("return sessionStorage.length") == 0


def test_the_command_does_what_the_page_did(page: Page, endpoint: str) -> None:
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    page.open(endpoint).draw(SEVEN)
    page.answer()
    page.sent()
    done = subprocess.run(["sh", "-c", page.text("curl")], capture_output=True, check=True, timeout=30)
    assert json.loads(done.stdout)["predictions"][0]["label"] == 7


def test_a_new_version_is_shown_without_a_reload(page: Page, digits: str, tmp_path: Path) -> None:
    storage = open_storage(digits)
    other = sample(tmp_path, [Column(name="image", shape=(8, 8))], name="digits")
    apps = [app_of(digits)]

    async def replaceable(scope: Any, receive: Any, send: Any) -> None:
        await apps[-1](scope, receive, send)

    with served(replaceable) as url:
        page.open(url)
        assert page.text("version") == ModelBundle.load(storage).version
        apps.append(app_of(other))
        page.wait(lambda: page.text("version") == ModelBundle.load(other).version)
        assert page.text("name") == "digits"


def test_an_endpoint_that_went_away_is_said_to_be_away(page: Page, digits: str) -> None:
    with served(app_of(digits)) as url:
        page.open(url)
    page.wait(lambda: page.text("status-text") == "Not answering")
    page.find("example").click()
    assert page.problem() == "The endpoint cannot be reached."


def test_no_script_but_its_own_runs(page: Page, endpoint: str) -> None:
    page.open(endpoint)
    page.run(
        "const s = document.createElement('script'); s.textContent = 'window.foreign = 1'; document.body.append(s)"
    )
    assert page.run("return window.foreign") is None
    (complaint,) = page.complaints()
    assert "Content Security Policy" in complaint


# ---- how it looks ----

CONTRASTS = """
const sheet = Object.assign(document.createElement('canvas'), {width: 1, height: 1});
const pixel = sheet.getContext('2d', {willReadFrequently: true});
function rgba(color) {
  pixel.clearRect(0, 0, 1, 1);
  pixel.fillStyle = color;
  pixel.fillRect(0, 0, 1, 1);
  return [...pixel.getImageData(0, 0, 1, 1).data];
}
function ground(element) {
  for (let e = element; e; e = e.parentElement) {
    const color = rgba(getComputedStyle(e).backgroundColor);
    if (color[3] === 255) return color;
  }
  return [255, 255, 255, 255];
}
function light(color) {
  const [r, g, b] = color.map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
const faint = [];
for (const e of document.body.querySelectorAll('*')) {
  const text = [...e.childNodes].filter((n) => n.nodeType === 3 && n.data.trim()).map((n) => n.data.trim()).join(' ');
  if (!text || !e.checkVisibility() || e.matches(':disabled, .unseen, script, style')) continue;
  const style = getComputedStyle(e);
  const [a, b] = [light(rgba(style.color)), light(ground(e))].sort((x, y) => y - x);
  const size = parseFloat(style.fontSize);
  const needed = size >= 24 || (size >= 18.66 && style.fontWeight >= 700) ? 3 : 4.5;
  const ratio = (a + 0.05) / (b + 0.05);
  if (ratio < needed) faint.push(`${e.tagName} ${e.className} '${text.slice(0, 20)}' ${ratio.toFixed(2)}`);
}
return faint;
"""


def whole_page(page: Page, endpoint: str) -> None:
    """Everything in sight: an answer, the command, the lineage."""
    page.open(endpoint).draw(SEVEN)
    page.answer()
    if page.is_shown("explanation"):
        page.find("explain").click()
        page.wait(lambda: page.browser.find_elements(By.CSS_SELECTOR, ".heat-map"))
    page.run("document.querySelectorAll('details').forEach((one) => (one.open = true))")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(page: Page, endpoint: str, scheme: str) -> None:
    page.emulate(scheme=scheme)
    whole_page(page, endpoint)
    assert page.run(CONTRASTS) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_shade_of_the_matrix_leaves_its_count_readable(page: Page, endpoint: str, scheme: str) -> None:
    page.emulate(scheme=scheme)
    page.open(endpoint)
    page.run(
        "for (const kind of ['hit', 'miss']) for (let i = 1; i <= 20; i++) {"
        "const cell = document.createElement('td'); const share = i / 20; cell.textContent = i;"
        "cell.className = `some ${kind} ${share > 0.55 ? 'deep' : ''}`;"
        "cell.style.setProperty('--share', share > 0.55 ? Math.max(share, 0.8) : Math.min(share, 0.25));"
        "document.querySelector('.heat tbody tr').append(cell) }"
    )
    assert page.run(CONTRASTS) == []


def test_dark_looks_dark(page: Page, endpoint: str) -> None:
    grounds, pictures = [], []
    for scheme in ("light", "dark"):
        page.emulate(scheme=scheme)
        page.open(endpoint)
        grounds.append(page.run("return getComputedStyle(document.body).backgroundColor"))
        pictures.append(page.browser.get_screenshot_as_png())
    assert pictures[0] != pictures[1]
    light, dark = (sum(map(int, ground.removeprefix("rgb(").removesuffix(")").split(","))) for ground in grounds)
    assert light > 600 > 150 > dark


@pytest.mark.parametrize("width", [360, 768])
def test_nothing_scrolls_sideways(page: Page, endpoint: str, width: int) -> None:
    page.emulate(width=width, height=740)
    whole_page(page, endpoint)
    assert page.run("return document.documentElement.scrollWidth") <= width
    assert page.find("canvas").size["width"] >= 250


def test_long_names_do_not_widen_a_phone(page: Page, tmp_path: Path) -> None:
    page.emulate(width=360, height=740)
    name = "a_rather_long_name_of_a_column_without_any_space_in_it"
    columns = [Column(name=f"{name}_{number}") for number in range(40)]
    with served(app_of(sample(tmp_path, columns, class_names=(name, name[::-1]), name=name))) as url:
        page.open(url).find("predict").click()
        page.answer()
        assert page.run("return document.documentElement.scrollWidth") <= 360


def test_nothing_moves_for_those_who_asked_for_that(page: Page, endpoint: str) -> None:
    features = [{"name": "prefers-reduced-motion", "value": "reduce"}]
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    whole_page(page, endpoint)
    moving = page.run(
        "return [...document.querySelectorAll('*')].filter((e) => getComputedStyle(e).transitionDuration !== '0s' ||"
        " getComputedStyle(e).animationName !== 'none').length"
    )
    assert moving == 0
