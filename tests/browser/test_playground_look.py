"""How the playground looks: narrow and wide, light and dark, and by keyboard."""

from __future__ import annotations

from urllib.parse import urlsplit

import pytest
import support
from playground import ask, finished_answer
from playwright.sync_api import expect

SCHEMES = ["light", "dark"]

# What sticks out of the window on the right.
OUTSIDE = """() => [...document.querySelectorAll("header *, article, form *, .facts *")]
  .filter((node) => !node.closest(".quiet") && node.checkVisibility())
  .filter((node) => node.getBoundingClientRect().right > innerWidth + 1)
  .map((node) => node.outerHTML.slice(0, 80))"""

SCROLLS_SIDEWAYS = """[document.documentElement, document.querySelector("#chat")]
  .some((element) => element.scrollWidth > element.clientWidth)"""

# WCAG 2 contrast of each visible element with text of its own, against the first opaque background behind it.
CONTRAST = """() => {
  const rgb = (color) => color.match(/[\\d.]+/g).map(Number);
  const linear = (value) => (value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
  const luminance = (color) => {
    const [r, g, b] = rgb(color).map((value) => linear(value / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (node) => {
    const color = getComputedStyle(node).backgroundColor;
    return rgb(color)[3] === 0 ? behind(node.parentElement) : color;
  };
  const hasText = (node) => [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
  return [...document.body.querySelectorAll("*")]
    .filter((node) => node.checkVisibility() && !node.closest("script, dialog") && hasText(node))
    .map((node) => {
      const pair = [luminance(getComputedStyle(node).color), luminance(behind(node))].sort((a, b) => b - a);
      return [node.textContent.slice(0, 30), (pair[0] + 0.05) / (pair[1] + 0.05)];
    });
}"""

FOCUS_IS_SHOWN = """document.activeElement === document.body
  || getComputedStyle(document.activeElement).outlineStyle === "solid" """


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", [320, 360, 820, 1280])
def test_playground_never_scrolls_sideways(open_page, width, scheme):
    wide = "x" * 300 + "\n```\n" + "y" * 300 + "\n```"
    with support.serving(model_name="an-organisation/" + "very-long-model-name-" * 6) as served:
        page = open_page(served.url, viewport={"width": width, "height": 640}, color_scheme=scheme)
        ask(page, wide)
        finished_answer(page)
        if width < 800:
            page.get_by_role("button", name="Settings").click()
        assert page.evaluate(OUTSIDE) == []
        assert not page.evaluate(SCROLLS_SIDEWAYS)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_playground_text_has_contrast_in_both_schemes(open_page, scheme):
    with support.serving() as served:
        page = open_page(served.url, color_scheme=scheme)
        ask(page, "hello\n```\ncode\n```")
        finished_answer(page)
        ratios = page.evaluate(CONTRAST)
        assert len(ratios) > 15
        assert {text: ratio for text, ratio in ratios if ratio < 4.5} == {}
        color = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
        assert (max(color) < 60) == (scheme == "dark")


def test_playground_links_to_the_documentation_of_the_api(open_page):
    with support.serving() as served:
        page = open_page(served.url)
        href = page.get_by_role("link", name="API docs").evaluate("link => link.href")
        assert urlsplit(href).path == "/docs"


def test_playground_can_be_used_by_keyboard_alone(open_page):
    with support.serving() as served:
        page = open_page(served.url)
        expect(page.get_by_label("Message")).to_be_focused()
        seen: set[str] = set()
        while True:
            page.keyboard.press("Tab")
            here = page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()")
            if here in seen or here == "message":
                break
            seen.add(here)
            assert page.evaluate(FOCUS_IS_SHOWN), f"{here} has no visible focus"
        assert {"API docs", "new", "curl", "send", "system", "temperature", "max-tokens", "key"} <= seen
