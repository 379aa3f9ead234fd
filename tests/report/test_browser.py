"""The page in a real browser: it renders, its tables sort, its theme switches, and it asks nobody for anything."""

import shutil

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="needs Chromium")]


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(whole, tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "page.html"
    file.write_text(whole, encoding="utf-8")
    return file.as_uri()


@pytest.fixture
def opened(browser, address):
    """open(**options of a browser context) -> the page, without complaints in its console and without requests."""
    contexts = []

    def open_(**options):
        context = browser.new_context(**options)
        shown = context.new_page()
        problems, requests = [], []
        shown.on("console", lambda message: problems.append(message.text))
        shown.on("pageerror", lambda error: problems.append(str(error)))
        shown.on("request", lambda request: requests.append(request.url))
        shown.goto(address)
        contexts.append((context, problems, requests))
        return shown

    yield open_
    for context, problems, requests in contexts:
        context.close()
        assert problems == []
        assert {url for url in requests if not url.startswith("data:")} == {address}


def background(shown):
    return shown.evaluate("getComputedStyle(document.body).backgroundColor")


@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_the_screen_and_every_plot_is_drawn(opened, width):
    shown = opened(viewport={"width": width, "height": 800})
    assert shown.evaluate("document.documentElement.scrollWidth") <= width
    plots = shown.locator("figure svg")
    boxes = [plots.nth(i).bounding_box() for i in range(plots.count())]
    assert len(boxes) > 8
    assert all(box["width"] > 0.7 * min(width, 500) and box["height"] > 40 for box in boxes)
    assert all(box["x"] >= 0 and box["x"] + box["width"] <= width for box in boxes)


def test_a_click_sorts_a_column_both_ways_by_number(opened):
    shown = opened()
    table = shown.locator("#quality table").first
    column = table.locator("th button").all_inner_texts().index("KL mean")
    head = table.locator("th").nth(column)

    def values():
        return table.evaluate(f"t => [...t.tBodies[0].rows].map(r => Number(r.cells[{column}].dataset.sort))")

    given = values()
    assert given != sorted(given)
    head.locator("button").click()
    assert values() == sorted(given)
    assert head.get_attribute("aria-sort") == "ascending"
    head.locator("button").click()
    assert values() == sorted(given, reverse=True)
    assert head.get_attribute("aria-sort") == "descending"
    names = table.locator("th button").all_inner_texts().index("configuration")
    table.locator("th button").nth(names).click()
    shown_names = table.evaluate(f"t => [...t.tBodies[0].rows].map(r => r.cells[{names}].innerText)")
    assert shown_names == sorted(shown_names)
    assert head.get_attribute("aria-sort") is None


def test_unknown_values_are_last_both_ways(opened):
    shown = opened()
    table = shown.locator("#quality table").first
    column = table.locator("th button").all_inner_texts().index("decode tok/s")
    for _ in range(2):
        table.locator("th button").nth(column).click()
        last = table.evaluate(
            f"t => t.tBodies[0].rows[t.tBodies[0].rows.length - 1].cells[{column}].innerText"
        )
        assert last == "–"


def test_the_theme_follows_the_system_until_it_is_switched(opened):
    light, dark = opened(color_scheme="light"), opened(color_scheme="dark")
    colours = background(light), background(dark)
    assert colours[0] != colours[1]
    drawn = "getComputedStyle(document.querySelector('figure svg text')).fill"
    assert light.evaluate(drawn) != dark.evaluate(drawn)
    switch = light.locator("#theme")
    switch.click()
    assert (switch.inner_text(), background(light)) == ("Theme: light", colours[0])
    switch.click()
    assert (switch.inner_text(), background(light)) == ("Theme: dark", colours[1])
    assert light.evaluate(drawn) == dark.evaluate(drawn)
    light.reload()
    assert (switch.inner_text(), background(light)) == ("Theme: dark", colours[1])
    switch.click()
    assert (switch.inner_text(), background(light)) == ("Theme: auto", colours[0])
