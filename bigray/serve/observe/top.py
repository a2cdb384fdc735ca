"""`bigray top`: the live numbers of an endpoint, on a terminal or as lines (driver)."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from bigray.errors import BigrayError

Document = Mapping[str, Any]
"""The answer of `GET /stats`."""
Fetch = Callable[[str], Document]
"""Asks the endpoint at a URL for it; raises OSError, ValueError or a BigrayError where there is none."""

PLAIN_INTERVAL_S = 5.0
"""Least time between two lines where there is no terminal."""
SHOWN_REPLICAS = 24
"""Of more than a screen holds, the busiest."""
SHOWN_RATES = 60
BUSY, FULL = 0.7, 0.9
"""Utilisations from which a bar is yellow, and red."""
LEFT_OUT = ("shed", "uptime", "live", "p50 ms")
"""Columns that go first where the width has no room for them."""
NARROW = 96
"""Below so many characters a version is shown by its first eight."""

_BAR_WIDTHS = (4, 20)
_PERCENT_WIDTH = 5
_SPARKS = "▁▂▃▄▅▆▇█"
_LEFT = frozenset({"replica", "live", "busy"})


def top_view(
    document: Document, earlier: Document | None, width: int, *, url: str = "", rates: Sequence[float] = ()
) -> RenderableType:
    """The endpoint as it stands; `earlier` is the document before, `rates` the total's of late, oldest first."""
    parts: list[RenderableType] = [_header(document, url, width), _replica_table(document, earlier, width)]
    parts += _rollout_lines(document, width)
    if rates:
        parts.append(_spark_line(rates, width))
    return Group(*parts)


def watch(
    url: str, fetch: Fetch, interval_s: float, console: Console, sleep: Callable[[float], None] = time.sleep
) -> None:
    """Show the endpoint until Ctrl-C; one that does not answer is told as such and asked again."""
    watching = _Watching(url)
    try:
        if console.is_terminal:
            _watch_live(watching, fetch, interval_s, console, sleep)
        else:
            _watch_plain(watching, fetch, max(interval_s, PLAIN_INTERVAL_S), console, sleep)
    except KeyboardInterrupt:
        return


def plain_line(document: Document) -> str:
    """How the endpoint stands, in one line."""
    total, versions = document["total"], document["versions"]
    parts = [
        _replicas(total["replicas"]),
        f"live {_plain(versions['live'])}",
        f"{_rate(total['rate'])} requests/s",
        f"p50 {_latency(total['p50_ms'])} ms, p99 {_latency(total['p99_ms'])} ms",
        f"{_count(total['queued'])} queued",
        f"{_count(total['errors'])} errors",
    ]
    if versions.get("candidate"):
        parts.append(_rollout_words(document))
    return ", ".join(parts)


class _Watching:
    """What is known of an endpoint while it is watched."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.lost = ""
        """Why the last question had no answer."""
        self.document: Document | None = None
        self._earlier: Document | None = None
        self._rates: deque[float] = deque(maxlen=SHOWN_RATES)

    def ask(self, fetch: Fetch) -> None:
        try:
            document = fetch(self.url)
            rate = float(document["total"]["rate"])
            top_view(document, None, 80), plain_line(document)  # raises for what is no such document
        except (BigrayError, OSError, ValueError) as error:
            self.lost = _plain(str(error).strip() or type(error).__name__)
            return
        except (KeyError, TypeError):
            self.lost = "its answer is not the /stats of a bigray endpoint"
            return
        self._earlier, self.document, self.lost = self.document, document, ""
        self._rates.append(rate)

    def view(self, width: int) -> RenderableType:
        lost = Text(self.lost_line(), style="bold red", no_wrap=True, overflow="ellipsis")
        if self.document is None:
            return lost
        shown = top_view(self.document, self._earlier, width, url=self.url, rates=tuple(self._rates))
        return Group(lost, Text("as it was last:", style="dim"), shown) if self.lost else shown

    def lost_line(self) -> str:
        return f"no answer from {_plain(self.url)}, asking again: {self.lost}"


def _watch_live(
    watching: _Watching, fetch: Fetch, interval_s: float, console: Console, sleep: Callable[[float], None]
) -> None:
    with Live(console=console, auto_refresh=False) as live:
        while True:
            watching.ask(fetch)
            live.update(watching.view(console.width), refresh=True)
            sleep(interval_s)


def _watch_plain(
    watching: _Watching, fetch: Fetch, interval_s: float, console: Console, sleep: Callable[[float], None]
) -> None:
    while True:
        watching.ask(fetch)
        what = watching.lost_line() if watching.lost or watching.document is None else plain_line(watching.document)
        console.print(f"{time.strftime('%H:%M:%S')} {what}", soft_wrap=True, markup=False, highlight=False)
        sleep(interval_s)


def _header(document: Document, url: str, width: int) -> Text:
    total, versions = document["total"], document["versions"]
    live = versions.get("live")
    differing = sum(1 for replica in document["replicas"] if replica["live"] != live)
    parts = [
        *([(_plain(url), "bold")] if url else []),
        (f"live {_plain(live)}", "green"),
        (_replicas(total["replicas"]), ""),
        *([(f"{differing} still on another version", "yellow")] if differing else []),
    ]
    line = Text("  ").join(Text(text, style=style) for text, style in parts)
    line.truncate(width, overflow="ellipsis")
    line.no_wrap = True
    return line


@dataclass(frozen=True)
class _Cell:
    text: str
    style: str = ""


def _replica_table(document: Document, earlier: Document | None, width: int) -> Table:
    replicas = list(document["replicas"])
    shown = replicas
    if len(replicas) > SHOWN_REPLICAS:
        shown = sorted(replicas, key=lambda one: -float(one["utilisation"]))[:SHOWN_REPLICAS]
    before = {one["id"]: one["errors"] for one in earlier["replicas"]} if earlier is not None else {}
    rows = [_cells(one, _short(one["id"]), before.get(one["id"]), 8 if width < NARROW else 12) for one in shown]
    total = document["total"]
    mean = sum(float(one["utilisation"]) for one in replicas) / len(replicas) if replicas else None
    errors_before = earlier["total"]["errors"] if earlier is not None else None
    last = _cells({**total, "live": "", "uptime_s": None, "utilisation": mean}, "total", errors_before)

    names = _columns_that_fit([*rows, last], width)
    bar_width = _bar_width([*rows, last], names, width)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in names:
        table.add_column(name, justify="left" if name in _LEFT else "right", no_wrap=True)
    for one, cells in zip(shown, rows, strict=True):
        table.add_row(*_drawn(cells, names, one["utilisation"], bar_width), end_section=one is shown[-1])
    if len(shown) < len(replicas):
        table.add_row(Text(f"+{len(replicas) - len(shown)} more", style="dim"), end_section=True)
    table.add_row(*_drawn(last, names, mean, bar_width), style="bold")
    return table


def _cells(
    numbers: Mapping[str, Any], name: str, errors_before: int | None, version_length: int = 12
) -> dict[str, _Cell]:
    errors = int(numbers["errors"])
    has_new_errors = errors_before is not None and errors > errors_before
    return {
        "replica": _Cell(name),
        "live": _Cell(_plain(numbers["live"] or "")[:version_length]),
        "req/s": _Cell(_rate(numbers["rate"])),
        "p50 ms": _Cell(_latency(numbers["p50_ms"])),
        "p99 ms": _Cell(_latency(numbers["p99_ms"])),
        "queued": _Cell(_count(numbers["queued"])),
        "busy": _Cell(""),
        "shed": _Cell(_count(numbers.get("shed", 0))),
        "errors": _Cell(_count(errors), "bold red" if has_new_errors else ""),
        "uptime": _Cell(_duration(numbers["uptime_s"])),
    }


def _columns_that_fit(rows: Sequence[Mapping[str, _Cell]], width: int) -> list[str]:
    names = list(rows[0])
    may_go = list(LEFT_OUT)
    while may_go and _width_of(rows, names) + _BAR_WIDTHS[0] > width:
        names.remove(may_go.pop(0))
    return names


def _bar_width(rows: Sequence[Mapping[str, _Cell]], names: Sequence[str], width: int) -> int:
    return min(max(width - _width_of(rows, names), _BAR_WIDTHS[0]), _BAR_WIDTHS[1])


def _width_of(rows: Sequence[Mapping[str, _Cell]], names: Sequence[str]) -> int:
    """Of a table without its bars."""
    texts = {name: [name, *(row[name].text for row in rows)] for name in names if name != "busy"}
    return _PERCENT_WIDTH + sum(max(map(len, column)) for column in texts.values()) + 2 * len(names)


def _drawn(cells: Mapping[str, _Cell], names: Sequence[str], utilisation: float | None, bar_width: int) -> list[Text]:
    return [
        _bar(utilisation, bar_width) if name == "busy" else Text(cells[name].text, style=cells[name].style)
        for name in names
    ]


def _bar(share: float | None, width: int) -> Text:
    if share is None:
        return Text("-")
    style = "red" if share >= FULL else "yellow" if share >= BUSY else "green"
    num_full = round(min(max(share, 0.0), 1.0) * width)
    percent = f"{share:.0%}".rjust(_PERCENT_WIDTH)
    return Text.assemble(("█" * num_full, style), ("░" * (width - num_full), "dim"), percent)


def _rollout_lines(document: Document, width: int) -> list[Text]:
    if not document["versions"].get("candidate"):
        return []
    lines = [Text(_rollout_words(document), style="bold yellow"), *_compared_lines(document)]
    for line in lines:
        line.truncate(width, overflow="ellipsis")
        line.no_wrap = True
    return lines


def _rollout_words(document: Document) -> str:
    """What goes on with the candidate."""
    versions = document["versions"]
    version, kind, share = _plain(versions["candidate"]), versions.get("kind"), float(versions.get("share") or 0.0)
    match kind:
        case "canary":
            return f"canary {version} answers {share:.0%} of the requests"
        case "shadow":
            return f"shadow {version} is asked copies of {share:.0%} of the requests"
        case _:
            return f"candidate {version} is held ready, without traffic"


def _compared_lines(document: Document) -> list[Text]:
    """The candidate beside the live version: by the replicas' comparison where there is one, else by their answers."""
    roles = {one["role"]: one for one in document.get("by_version", ())}
    lines = [_version_line(roles[role]) for role in ("live", "candidate") if roles.get(role, {}).get("requests")]
    if compared := document.get("comparison"):
        num_rows, differing = compared["compared_rows"], compared["disagreeing_rows"]
        share = f" ({differing / num_rows:.2%})" if num_rows else ""
        failed = compared.get("candidate", {}).get("errors", 0)
        lines.append(
            Text(
                f"  compared  {_count(num_rows)} rows, {_count(differing)} differ{share}; "
                f"the candidate failed {_count(failed)} requests"
            )
        )
    return lines


def _version_line(numbers: Mapping[str, Any]) -> Text:
    return Text(
        f"  {numbers['role']:<9} {_plain(numbers['version'])}  "
        f"{_count(numbers['requests'])} requests, {_count(numbers['errors'])} errors, "
        f"p50 {_latency(numbers['p50_ms'])} ms, p99 {_latency(numbers['p99_ms'])} ms"
    )


def _spark_line(rates: Sequence[float], width: int) -> Text:
    highest = max(rates)
    about = f"  {_rate(rates[-1])} requests/s, at most {_rate(highest)}"
    room = max(min(SHOWN_RATES, width - len(about)), 1)
    drawn = "".join(_spark(rate, highest) for rate in rates[-room:])
    line = Text.assemble((drawn, "cyan"), (about, "dim"))
    line.no_wrap, line.overflow = True, "ellipsis"
    return line


def _spark(rate: float, highest: float) -> str:
    share = rate / highest if highest > 0 else 0.0
    return _SPARKS[min(int(share * len(_SPARKS)), len(_SPARKS) - 1)]


def _short(replica: str) -> str:
    """Serve's ids are `app#deployment#id`; the last part tells replicas apart."""
    return _plain(replica).rsplit("#", 1)[-1][:12]


def _plain(value: Any) -> str:
    """Of another machine's words, only what a terminal takes for text."""
    return "".join(char if char.isprintable() else "?" for char in str(value if value is not None else "-"))


def _replicas(count: int) -> str:
    return f"{count} replica{'' if count == 1 else 's'}"


def _rate(rate: float) -> str:
    return f"{rate:.1f}" if 0 < rate < 10 else f"{rate:,.0f}"


def _latency(milliseconds: float | None) -> str:
    if milliseconds is None:
        return "-"
    return f"{milliseconds:,.{2 if milliseconds < 10 else 1 if milliseconds < 100 else 0}f}"


def _count(number: float) -> str:
    return f"{number:,.0f}" if number < 1e6 else f"{number / 1e6:,.1f}M"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    for limit, unit, size in ((120, "s", 1), (7200, "min", 60), (172_800, "h", 3600)):
        if seconds < limit:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86_400:.0f} d"
