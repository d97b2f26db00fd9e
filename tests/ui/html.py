"""What every page has to keep, whatever it shows."""

from html.parser import HTMLParser
from urllib.parse import urljoin, urlsplit

_URLS = {"href", "src", "action", "formaction", "hx-get", "hx-post", "data-events"}
_VOID = {"meta", "link", "input", "br", "img"}


class Document(HTMLParser):
    """A page as a browser takes it.

    Attributes:
        urls: All that it names, in their order.
        elements: Each with its attributes.
        text: What is to be read.
        faults: What the Content-Security-Policy forbids, and what is not closed.
    """

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.urls: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.faults: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        self.faults += [f"<{tag}> is not closed" for tag in self._open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        self.elements.append((tag, attributes))
        self.faults += [
            f"<{tag} {name}>" for name in attributes if name == "style" or name.startswith("on")
        ]
        if tag in {"style", "iframe", "object", "base"} or (
            tag == "script" and "src" not in attributes
        ):
            self.faults.append(f"<{tag}>")
        self.urls += [attributes[name] for name in attributes if name in _URLS]
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open.pop() != tag:
            self.faults.append(f"</{tag}> closes nothing")

    def handle_data(self, data: str) -> None:
        if self._open[-1:] == ["script"] and data.strip():
            self.faults.append(f"inline script: {data}")
        self.text += data

    def links(self, page: str) -> list[str]:
        """The links to a page, by the name of the page."""
        named = [a["href"] for tag, a in self.elements if tag == "a" and "href" in a]
        return [url for url in named if urlsplit(url).path.rpartition("/")[2] == page]


def check(html: str, at: str, below: str) -> Document:
    """The page at a URL, none of whose own URLs leads out of the dashboard, `below` a path."""
    document = Document(html)
    assert document.faults == []
    for url in document.urls:
        parts = urlsplit(url)
        assert not parts.scheme, url
        assert not parts.netloc, url
        assert not parts.path.startswith("/"), url
        assert urlsplit(urljoin(at, url)).path.startswith(below), url
    return document
