"""Reading an HTML page in tests: tags, texts and cells, and a hostile text to put into one."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = {"meta", "col", "img", "input", "br"}
HOSTILE = (
    "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&\x00\x1b[31m\u202eevil\u2066\ud800"
    "</title></style></details>"
)


class Page(HTMLParser):
    """Tags with attributes in order, texts, and a failure for every unbalanced tag."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.cells: list[tuple[dict[str, str | None], str]] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "td":
            self.cells.append((dict(attrs), ""))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if "td" in self.open:
            attrs, text = self.cells[-1]
            self.cells[-1] = (attrs, text + data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.texts).split())

    def of_class(self, tag: str, name: str) -> list[dict[str, str | None]]:
        return [a for t, a in self.tags if t == tag and name in (a.get("class") or "").split()]

    def row(self, first: str) -> str:
        """The text of the answers' cells that begin with an alpha range, one after another."""
        return " | ".join(text for _, text in self.cells if text.startswith(first))
