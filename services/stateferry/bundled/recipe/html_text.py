"""Running prose out of an HTML page: headings and paragraphs, nothing else."""

from __future__ import annotations

import re
from html.parser import HTMLParser


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


SKIPPED_TAGS = _words(
    "table pre script style head nav footer form select button svg math dt aside audio video "
    "textarea figure map noscript header sup"
)
# Page furniture is marked by class or id; what each manual calls it was read off the pages.
SKIPPED_CLASSES = re.compile(
    r"sphinxsidebar|related|navheader|navfooter|\btoc|(?<!with)sidebar|footer|highlight|headerlink|"
    r"viewcode|breadcrumb|\bmenu|contents\b|copyright|colophon|langinfo|toplang|"
    r"docblock-short|item-decl|code-header|srclink|\bmath\b|synopsis|programlisting|screen|"
    r"field-list|literal-block|doctest|\bsig\b|anchor|badge|versionmodified",
    re.IGNORECASE,
)
BLOCK_TAGS = _words(
    "p div li ul ol dl dd h1 h2 h3 h4 h5 h6 blockquote section article body main hr br td "
    "center address"
)
VOID_TAGS = _words("br hr img input meta link area base col embed source track wbr")
HEADING = re.compile(r"h[1-4]")


class ProseParser(HTMLParser):
    """Collects `(is_heading, text)` blocks; whitespace inside a block is collapsed."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks: list[tuple[bool, str]] = []
        self._text: list[str] = []
        self._heading = False
        self._skip_tag = ""
        self._skip_depth = 0

    def _flush(self) -> None:
        text = " ".join("".join(self._text).split())
        self._text.clear()
        if text:
            self.blocks.append((self._heading, text))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Skip whole elements by tag or class; only the same tag's nesting needs counting."""
        if self._skip_depth:
            self._skip_depth += tag == self._skip_tag
            return
        furniture = tag in SKIPPED_TAGS or any(
            value and name in ("class", "id", "role") and SKIPPED_CLASSES.search(value)
            for name, value in attrs
        )
        if furniture and tag not in VOID_TAGS and tag not in ("body", "html", "main"):
            if tag in BLOCK_TAGS or tag in ("table", "pre"):
                self._flush()
            self._skip_tag, self._skip_depth = tag, 1
        elif tag in BLOCK_TAGS and tag != "br":
            self._flush()
            self._heading = HEADING.fullmatch(tag) is not None
        elif tag == "br":
            self._text.append(" ")

    def handle_endtag(self, tag: str) -> None:
        """Leave a skipped element, or end a block."""
        if self._skip_depth:
            self._skip_depth -= tag == self._skip_tag
        elif tag in BLOCK_TAGS:
            self._flush()
            self._heading = False

    def handle_data(self, data: str) -> None:
        """Keep the text of elements that are not skipped."""
        if not self._skip_depth:
            self._text.append(data)


def html_blocks(page: str) -> list[tuple[bool, str]]:
    """Return `(is_heading, text)` in page order."""
    parser = ProseParser()
    parser.feed(page)
    parser.close()
    parser._flush()
    return parser.blocks
