"""A page as a browser would take it: every tag closed in its turn, no script, nothing loaded."""

from html.parser import HTMLParser

VOID = {"meta", "br"}


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(text)
        self.close()
        assert not self.open
        assert not {"script", "img", "link", "iframe"} & {t for t, _ in self.tags}
        assert not any(a.startswith("on") or a in ("src", "href") for _, attrs in self.tags for a in attrs)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
