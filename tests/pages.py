"""Reading an HTML page in tests: tags, texts and cells, and a hostile text to put into one."""

from __future__ import annotations

import base64
import hashlib
from html.parser import HTMLParser

VOID = {"meta", "col", "img", "input", "br"}
HOSTILE = (
    "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&\x00\x1b[31m\u202eevil\u2066\ud800"
    "</title></style></details>"
)
Attributes = dict[str, str]


class Page(HTMLParser):
    """Tags with attributes in order, texts, and a failure for every unbalanced tag."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, Attributes]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self._cells: list[tuple[Attributes, str]] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        self.tags.append((tag, attributes))
        if tag == "td":
            self._cells.append((attributes, ""))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if "td" in self.open:
            attributes, text = self._cells[-1]
            self._cells[-1] = (attributes, text + data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.texts).split())

    @property
    def cells(self) -> list[tuple[Attributes, str]]:
        return [(attributes, text.strip()) for attributes, text in self._cells]

    def of_class(self, tag: str, name: str) -> list[Attributes]:
        return [a for t, a in self.tags if t == tag and name in a.get("class", "").split()]

    def foreign_references(self) -> list[str]:
        """What refers to anything outside the page, or runs code that is not the script's."""
        found = [tag for tag, _ in self.tags if tag in ("link", "iframe", "object", "base", "form")]
        for _, attributes in self.tags:
            for name, value in attributes.items():
                if name in ("srcset", "action", "xlink:href") or name.startswith("on"):
                    found.append(name)
                if name in ("src", "href") and not value.startswith("data:image/jpeg;base64,"):
                    found.append(value)
        return found + [text for text in self.texts if "@import" in text or "url(" in text]

    @staticmethod
    def digest(script: str) -> str:
        """What the page's policy calls a script."""
        return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
