"""The page in a real browser: it opens, layers open, links lead on, search finds, and nothing complains."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

import radix_compile
from radix_compile.inspection.diff import GraphDiff
from tests.models import build, shared_batch

BROWSER, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
in_a_browser = pytest.mark.skipif(
    BROWSER is None or DRIVER is None, reason="needs chromium and chromedriver (Debian: chromium, chromium-driver)"
)


class Refuses(torch.nn.Module):
    """A graph of its own with something to refuse, behind a model that folds."""

    def __init__(self) -> None:
        super().__init__()
        self.model = build("Qwen3", head_dim=16, num_hidden_layers=3, head="Model")
        self.head = torch.nn.Linear(32, 32)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.model(ids, use_cache=False).last_hidden_state
        return self.head(hidden.flip(1))


@pytest.fixture(scope="module")
def diff() -> GraphDiff:
    return radix_compile.graph_diff(Refuses().eval(), shared_batch(6, 24, 16))


@pytest.fixture(scope="module")
def driver() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER or ""
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,900"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(driver: webdriver.Chrome, diff: GraphDiff, tmp_path: Path) -> Iterator[webdriver.Chrome]:
    diff.html(tmp_path / "diff.html")
    driver.get((tmp_path / "diff.html").as_uri())
    yield driver
    assert driver.get_log("browser") == []


def all_of(page: webdriver.Chrome, selector: str) -> list[WebElement]:
    return [element for element in page.find_elements(By.CSS_SELECTOR, selector) if element.is_displayed()]


def text_of(page: webdriver.Chrome, selector: str) -> str:
    return page.find_element(By.CSS_SELECTOR, selector).text


def click(page: webdriver.Chrome, element: WebElement) -> None:
    """From behind the header, where it may have been scrolled to."""
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    element.click()


def press(page: webdriver.Chrome, keys: str) -> None:
    page.switch_to.active_element.send_keys(keys)


def test_it_needs_nothing_else(diff: GraphDiff) -> None:
    html = diff.html()
    assert not re.search(r"""(src|href)=|url\(|@import|import\(|fetch\(""", html.partition('id="data"')[0])
    assert "{{" not in html.partition('id="data"')[0]
    assert "</script" not in html.partition('id="data">')[2].partition("</script>")[0]
    assert "site-packages" not in html


def test_nothing_in_the_data_ends_the_script(diff: GraphDiff) -> None:
    html = replace(diff, title="</script><b>bold</b>").html()
    assert html.count("</script>") == 2
    assert "<b>" not in html


@in_a_browser
def test_layers_open(page: webdriver.Chrome) -> None:
    assert "96 rows" not in text_of(page, "#heading")
    assert "144 rows" in text_of(page, "#heading")
    equal = next(button for button in all_of(page, ".block > button") if "2 equal layers" in button.text)
    assert all_of(page, ".row") == []
    equal.click()
    rows = len(all_of(page, ".row"))
    assert rows > 40
    assert equal.get_attribute("aria-expanded") == "true"
    all_of(page, ".cell.attention")[0].click()
    assert "model.layers.1.self_attn" in text_of(page, "#details")
    other = all_of(page, ".numbers button")[1]
    click(page, other)  # the same lines, of the other layer
    assert len(all_of(page, ".row")) == rows
    all_of(page, ".cell.attention")[0].click()
    assert "model.layers.2.self_attn" in text_of(page, "#details")
    click(page, equal)
    assert all_of(page, ".row") == []


@in_a_browser
def test_links_lead_to_the_other_side_and_to_what_is_read(page: webdriver.Chrome) -> None:
    press(page, "o")  # opens all
    all_of(page, ".cell.attention")[0].click()
    details = page.find_element(By.ID, "details")
    assert "tree_attention (after)" in details.text
    assert "prefix-determined" in details.text
    assert "sdpa_attention.py" in details.text
    details.find_element(By.CSS_SELECTOR, '[data-link^="before:"]').click()
    assert "scaled_dot_product_attention (before)" in details.text
    assert "analysis/rules/attention.py" in details.text
    (chosen,) = all_of(page, ".cell.chosen")
    assert "scaled_dot_product_attention" in chosen.text
    assert any("tree_attention" in near.text for near in all_of(page, ".cell.near"))
    link = details.find_elements(By.CSS_SELECTOR, '[data-link^="before:"]')[0]
    name = link.text
    link.click()
    assert f"name\n{name}\n" in details.text
    all_of(page, "#details .close")[0].click()
    assert all_of(page, ".cell.chosen") == []


@in_a_browser
def test_search_finds_nodes_in_closed_layers(page: webdriver.Chrome) -> None:
    press(page, "/")
    press(page, "2.mlp.down_proj")
    assert text_of(page, "#found") == "2"
    press(page, Keys.ENTER)
    assert text_of(page, "#found") == "1/2"
    assert "model.layers.2.mlp.down_proj" in text_of(page, "#details")
    (chosen,) = all_of(page, ".cell.chosen")
    assert "linear" in chosen.text
    press(page, Keys.ESCAPE)
    press(page, "n")
    assert text_of(page, "#found") == "2/2"
    assert "linear (after)" in text_of(page, "#details")


@in_a_browser
def test_arrows_and_enter(page: webdriver.Chrome) -> None:
    press(page, "j")
    press(page, "j")
    focused = page.switch_to.active_element
    assert "model.layers.0" in focused.text
    focused.send_keys(Keys.ENTER)
    assert len(all_of(page, ".row")) > 40
    press(page, "j")
    assert "pow.Tensor_Scalar (after)" in text_of(page, "#details")
    press(page, "k")
    assert "model.layers.0" in page.switch_to.active_element.text


@in_a_browser
def test_refusals_and_the_tree(page: webdriver.Chrome) -> None:
    press(page, "2")
    refusal = all_of(page, ".refusal")[0]
    assert "reverses the sequence axis" in refusal.text
    assert "hidden.flip(1)" in refusal.text
    assert "Move it behind the model" in refusal.text
    refusal.find_element(By.TAG_NAME, "button").click()
    assert "flip (before)" in text_of(page, "#details")
    press(page, "3")
    bars = all_of(page, "#tree rect")
    assert len(bars) >= 7  # what all share, and what each has alone
    heights = [float(bar.get_attribute("height") or 0) for bar in bars]
    assert max(heights) == pytest.approx(6 * min(heights))
    assert "6 sequences, 144 rows" in (
        page.find_element(By.CSS_SELECTOR, "#tree svg").get_attribute("aria-label") or ""
    )


@in_a_browser
@pytest.mark.parametrize("width", [1280, 400])
def test_both_themes_can_be_read_and_nothing_is_cut_off(page: webdriver.Chrome, width: int) -> None:
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    press(page, "o")
    for _ in range(2):
        for selector in (".cell.compact b", ".cell.full b", ".cell.removed b", ".cell.attention b", ".block .name"):
            shown = all_of(page, selector)
            assert shown
            assert contrast(page, shown[0]) >= 4.5, selector  # WCAG AA
        assert page.execute_script("return document.documentElement.scrollWidth") <= width
        press(page, "t")
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@in_a_browser
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_paper_has_all_of_it(page: webdriver.Chrome, theme: str) -> None:
    if page.execute_script("return document.documentElement.dataset.theme") != theme:
        press(page, "t")
    press(page, "3")  # another view than the first, with no layer open
    assert page.find_elements(By.CSS_SELECTOR, ".row") == []
    page.execute_script("dispatchEvent(new Event('beforeprint'))")  # as printing does
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 700, "height": 1000, "deviceScaleFactor": 1, "mobile": False},  # about what A4 is wide
    )
    try:
        views = all_of(page, "[role=tabpanel]")
        assert [view.get_attribute("id") for view in views] == ["graph", "refusals", "tree"]
        assert len(all_of(page, ".block > button")) == len(all_of(page, ".lines"))
        both = all_of(page, ".row.both")
        assert len(both) > 40
        assert len(all_of(page, ".row.both > .cell")) == 2 * len(both)
        cut_off = "return arguments[0].filter((one) => one.scrollWidth > one.clientWidth).length"
        assert page.execute_script(cut_off, all_of(page, ".cell b, .cell span")) == 0
        assert page.execute_script("return document.documentElement.scrollWidth") <= 700
        assert "Move it behind the model" in views[1].text
        assert all_of(page, "#tree rect")
        assert all_of(page, "[role=tab], #search, #theme, .refusal button") == []
        paper = page.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert paper == "rgb(255, 255, 255)"
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def contrast(page: webdriver.Chrome, element: WebElement) -> float:
    """By WCAG 2, of an element's text to what is behind it."""
    script = """
        const own = getComputedStyle(arguments[0]).color;
        let behind = arguments[0];
        while (getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
        const paper = getComputedStyle(behind).backgroundColor;
        return [own, paper].map((color) => color.match(/[0-9.]+/g).slice(0, 3).map(Number));
    """
    levels = sorted(map(_luminance, page.execute_script(script, element)))
    return (levels[1] + 0.05) / (levels[0] + 0.05)


def _luminance(color: list[float]) -> float:
    parts = [one / 255 for one in color]
    linear = [one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@in_a_browser
def test_thirty_two_layers_open_in_two_seconds(driver: webdriver.Chrome, tmp_path: Path) -> None:
    model = build("Qwen3", head_dim=16, num_hidden_layers=32)
    radix_compile.graph_diff(model, shared_batch(4, 24, 16), use_cache=False).html(tmp_path / "large.html")
    started = time.perf_counter()
    driver.get((tmp_path / "large.html").as_uri())
    assert all_of(driver, ".block > button")
    took = time.perf_counter() - started
    assert took < 2
    assert "31 equal layers" in text_of(driver, "#blocks")
