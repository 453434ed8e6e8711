"""What a browser would see of tables."""

import html.parser


class Cells(html.parser.HTMLParser):
    """Text and alignment of every cell, and every tag."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[tuple[str, str]]] = []
        self.tags: list[str] = []
        self.notes: list[str] = []
        self.caption = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append(("", str(dict(attrs)["style"]).removeprefix("text-align:")))
        if tag == "p":
            self.notes.append("")

    def handle_data(self, data: str) -> None:
        inside = [tag for tag in self.tags if tag in ("td", "th", "p", "caption")][-1:]
        if inside == ["p"]:
            self.notes[-1] += data.strip()
        elif inside == ["caption"]:
            self.caption += data.strip()
        elif inside and self.rows[-1]:
            text, side = self.rows[-1][-1]
            self.rows[-1][-1] = (text + data.strip(), side)


def cells_of(text: str) -> Cells:
    parser = Cells()
    parser.feed(text)
    return parser
