"""Checks the structure of a page without a browser."""

import html.parser
import re


class Structure(html.parser.HTMLParser):
    """Elements that do not close, ids that come twice, and everything that a browser would fetch."""

    EMPTY = ("meta", "img", "br")

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.uses, self.fetched = [], [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in self.EMPTY:
            self.open.append(tag)
        self.look(tag, dict(attrs))

    def handle_startendtag(self, tag, attrs):
        self.look(tag, dict(attrs))

    def look(self, tag, attrs):
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.uses += [attrs["href"][1:]] if attrs.get("href", "").startswith("#") else []
        self.uses += re.findall(r"url\(#([^)]*)\)", " ".join(value or "" for value in attrs.values()))
        if tag in ("script", "link", "iframe") or (tag == "img" and not attrs["src"].startswith("data:image/")):
            self.fetched.append((tag, attrs))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"
