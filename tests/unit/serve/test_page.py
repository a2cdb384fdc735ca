from __future__ import annotations

import base64
import hashlib
import json
import re

import pytest

from bigray.bundle import BundleManifest, ClassScores, ModelBundle, ModelCard, OutputSchema
from bigray.data.codes import UNSEEN_NAME
from bigray.data.features import Column, FeatureSchema
from bigray.serve.page.page import content_policy, model_card, page_answer

HOSTILE = "</script><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def document() -> str:
    return page_answer().body.decode()


def with_input(manifest: BundleManifest, shape: tuple[int, ...], value, **changes) -> BundleManifest:
    columns = (Column(name="picture", shape=shape),)
    return manifest.model_copy(
        update={"inputs": FeatureSchema(columns=columns), "example": {"picture": value}, **changes}
    )


def filled(shape: tuple[int, ...], value: float):
    for size in reversed(shape):
        value = [value] * size
    return value


def test_the_page_is_one_document_with_its_style_and_script_inside(document):
    assert document.startswith("<!doctype html>")
    assert document.count("<script") == document.count("</script>") == 1
    assert document.count("<style") == document.count("</style>") == 1
    assert "{{" not in document


def test_the_page_asks_for_nothing_from_elsewhere(document):
    assert not re.search(r"https?://", document)
    assert not re.search(r"(src|href)=[\"']?(?!data:|#)[\w/]", document)
    (style,) = re.findall(r"<style>(.*?)</style>", document, re.DOTALL)
    assert not re.search(r"@import|url\(|@font-face", style)


def test_the_policy_names_exactly_the_style_and_script_of_the_page(document):
    headers = dict(page_answer().headers)
    policy = headers[b"content-security-policy"].decode()
    for tag in ("style", "script"):
        (content,) = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", document, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert "unsafe" not in policy


def test_the_policy_forbids_all_but_the_endpoint_itself():
    parts = content_policy("", "").split("; ")
    assert parts[:3] == ["default-src 'none'", "connect-src 'self'", "img-src 'self' data: blob:"]
    assert parts[-3:] == ["base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"]


def test_the_page_is_html_that_is_neither_sniffed_nor_tells_where_one_came_from():
    answer = page_answer()
    assert answer.status == 200
    assert answer.content_type == b"text/html; charset=utf-8"
    headers = dict(answer.headers)
    assert headers[b"x-content-type-options"] == b"nosniff"
    assert headers[b"referrer-policy"] == b"no-referrer"
    assert headers[b"vary"] == b"accept"


def test_the_page_is_put_together_once():
    assert page_answer() is page_answer()


def test_the_script_never_makes_markup_of_text(document):
    for sink in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function", "srcdoc"):
        assert sink not in document


def test_a_name_that_looks_like_markup_stays_out_of_the_page(bundle: ModelBundle, document):
    card = model_card(bundle.manifest.model_copy(update={"name": HOSTILE}), "abc", {})
    assert json.loads(json.dumps(card))["name"] == HOSTILE
    assert "onerror" not in document
    assert bundle.manifest.name not in document


def test_the_card_tells_what_the_model_is(bundle: ModelBundle):
    card = model_card(bundle.manifest, bundle.version, {"backend": "torch"})
    assert (card["name"], card["version"], card["backend"]) == ("animals", bundle.version, "torch")
    assert (card["task"], card["target"], card["classes"]) == ("classification", "label", ["cat", "dog", "fox"])
    assert card["example"] == bundle.manifest.example
    assert card["lineage"]["run"] == "sample"
    assert "metrics" not in card["lineage"]
    assert (card["explains"], card["generates"]) == (False, False)
    json.dumps(card)


def test_what_the_endpoint_adds_goes_before_what_the_bundle_says(bundle: ModelBundle):
    card = model_card(bundle.manifest, "abc", {"name": "zoo", "explains": True})
    assert (card["name"], card["explains"]) == ("zoo", True)


def test_the_card_of_scalar_columns_has_their_ranges(regression_bundle: ModelBundle):
    manifest = regression_bundle.manifest.model_copy(update={"ranges": {"width": (0.5, 2.0)}})
    card = model_card(manifest, "abc", {})
    ranges = [(column["name"], column["shape"], column["low"], column["high"]) for column in card["inputs"]]
    assert ranges == [("width", [], 0.5, 2.0), ("height", [], None, None)]
    assert card["image"] is None
    assert card["classes"] == []


def test_the_card_tells_what_a_form_has_to_ask_for(regression_bundle: ModelBundle):
    columns = (
        Column(name="age", nullable=True),
        Column(name="colour", kind="category", categories=("red", "blue")),
        Column(name="level", kind="category", categories=("1",), unknown="refuse", nullable=True),
        Column(name="born", kind="date"),
    )
    manifest = regression_bundle.manifest.model_copy(update={"inputs": FeatureSchema(columns=columns)})
    told = model_card(manifest, "abc", {})["inputs"]
    kinds = [(one["kind"], one["categories"], one["unseen"], one["nullable"]) for one in told]
    assert kinds == [
        ("number", [], None, True),
        ("category", ["red", "blue"], UNSEEN_NAME, False),
        ("category", ["1"], None, True),
        ("date", [], None, False),
    ]


def test_a_column_of_pictures_is_drawn_from_black_to_white_whatever_its_rows_held(bundle: ModelBundle):
    columns = (Column(name="picture", kind="image", shape=(1, 8, 8)),)
    changes = {"inputs": FeatureSchema(columns=columns), "input_range": (3.0, 200.0)}
    image = model_card(bundle.manifest.model_copy(update=changes), "abc", {})["image"]
    assert (image["low"], image["high"]) == (0.0, 255.0)


def test_the_card_has_the_confusion_and_rows_that_the_bundle_knows(bundle: ModelBundle):
    known = ModelCard(
        rows={"train": 90, "validation": 9}, num_parameters=7, confusion=((3, 0, 0), (1, 2, 0), (0, 0, 3))
    )
    card = model_card(bundle.manifest.model_copy(update={"card": known}), "abc", {})
    assert card["confusion"] == [[3, 0, 0], [1, 2, 0], [0, 0, 3]]
    assert card["data"]["rows"] == {"train": 90, "validation": 9}
    assert card["parameters"] == 7


def test_the_card_of_a_bundle_that_knows_none_of_it_leaves_it_out(bundle: ModelBundle):
    card = model_card(bundle.manifest.model_copy(update={"card": None}), "abc", {})
    assert card["confusion"] is None
    assert card["parameters"] is None
    assert card["data"]["rows"] == {}


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((8, 8), (8, 8, 1, "HW")),
        ((1, 28, 20), (28, 20, 1, "CHW")),
        ((3, 32, 32), (32, 32, 3, "CHW")),
        ((32, 24, 3), (32, 24, 3, "HWC")),
        ((32, 24, 1), (32, 24, 1, "HWC")),
        ((64,), None),
        ((784,), None),
        ((2, 3), None),
        ((2, 8, 8), None),
        ((600, 600), None),
        ((1, 3, 8, 8), None),
    ],
)
def test_a_tensor_is_a_picture_by_its_shape(bundle: ModelBundle, shape, expected):
    image = model_card(with_input(bundle.manifest, shape, filled(shape, 0.5)), "abc", {})["image"]
    found = None if image is None else (image["height"], image["width"], image["channels"], image["layout"])
    assert found == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [((0, 0.5), (0, 1)), ((0, 11), (0, 16)), ((3, 200), (0, 255)), ((0, 300), (0, 300)), ((-2.5, 1.5), (-2.5, 1.5))],
)
def test_without_a_known_range_the_example_tells_the_scale(bundle: ModelBundle, values, expected):
    example = [[values[0]] * 8] * 7 + [[values[1]] * 8]
    manifest = with_input(bundle.manifest, (8, 8), example, input_range=None)
    image = model_card(manifest, "abc", {})["image"]
    assert (image["low"], image["high"]) == expected


def test_a_known_range_goes_before_the_example(bundle: ModelBundle):
    manifest = with_input(bundle.manifest, (8, 8), filled((8, 8), 0.5), input_range=(0.0, 16.0))
    card = model_card(manifest, "abc", {})
    assert (card["image"]["low"], card["image"]["high"]) == (0.0, 16.0)
    assert (card["inputs"][0]["low"], card["inputs"][0]["high"]) == (0.0, 16.0)


def test_the_card_has_the_scores_of_the_classes_and_the_threshold_they_are_taken_at(bundle: ModelBundle):
    scores = ClassScores(name="yes", rows=3, precision=1.0, recall=0.5, f1=2 / 3)
    outputs = OutputSchema(task="binary", num_outputs=1, target="y", class_names=("no", "yes"), threshold=0.3)
    known = ModelCard(scores={"accuracy": 0.9}, per_class=(scores,))
    card = model_card(bundle.manifest.model_copy(update={"card": known, "outputs": outputs}), "abc", {})
    assert (card["scores"], card["thresholds"], card["classes"]) == ({"accuracy": 0.9}, [0.3], ["no", "yes"])
    assert card["per_class"][0]["recall"] == 0.5
    json.dumps(card)
