"""
Logs in, a picture out.

    python plot.py log.txt                                  # -> log.png
    python plot.py runs/*/log.txt --out compare.png         # several runs, one picture; .pdf and .svg work too

A log has a line a record, `step stream value key=value ...`, the first three columns as build-nanogpt writes them, so its
logs can be drawn too.
"""
import argparse
import json
import os
import sys

# Known HellaSwag scores by average token loss: GPT-2 by build-nanogpt's script, GPT-3 by its paper.
REFERENCES = {"GPT-2 124M": 0.2955, "GPT-3 124M": 0.337}
COLORS = ["#2a6fbb", "#d1602e", "#3a923a", "#8a5fb0", "#c2385e", "#7a6a53", "#1b9aaa", "#888888"]


class UserError(Exception):
    """A mistake its user can mend: it is printed as one line, without a traceback."""


def read_log(path):
    """
    -> {stream: {step: (value, {key: number})}} and the settings in the newest header. After a resume a step may appear
    twice: the last line wins. A line that is torn, or not a record, is passed over.
    """
    streams, config = {"train": {}, "val": {}, "hella": {}}, {}
    try:
        with open(path, encoding="utf-8", errors="replace") as f:
            lines = f.read().split("\n")
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    if lines[-1]:
        lines.pop()  # a record ends with its newline
    for line in lines:
        try:
            if line.startswith("#"):
                config = json.loads(line[1:])["config"]
                continue
            step, stream, value, *rest = line.split()
            fields = dict(pair.split("=", 1) for pair in rest)
            streams.setdefault(stream, {})[int(step)] = float(value), {k: float(v) for k, v in fields.items() if v != "n/a"}
        except (ValueError, KeyError, TypeError):
            continue
    return streams, config


def smooth(values, span):
    """Exponential mean over about `span` values, unbiased at the beginning."""
    out, mean, weight, keep = [], 0.0, 0.0, 1 - 1 / max(1.0, span)
    for v in values:
        if v == v:  # not NaN
            mean, weight = keep * mean + (1 - keep) * v, keep * weight + (1 - keep)
        out.append(mean / weight if weight else v)
    return out


def series(records, scale, key=None):
    """-> xs, ys of a stream's values, or of one of its fields"""
    points = [(s * scale, v if key is None else f[key]) for s, (v, f) in sorted(records.items()) if key is None or key in f]
    return [p[0] for p in points], [p[1] for p in points]


def names(paths):
    """A short name for each log: its folder where that tells them apart, else its path."""
    folders = [os.path.basename(os.path.dirname(os.path.abspath(p))) for p in paths]
    return folders if len(set(folders)) == len(paths) and len(paths) > 1 else [os.path.splitext(p)[0] for p in paths]


def plot(paths, out, by_tokens=False):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    logs = [read_log(p) for p in paths]
    batches = [config.get("total_batch_size") for _, config in logs]
    if by_tokens and not all(batches):
        raise UserError(f"{paths[batches.index(None)]} does not say how many tokens a step has; plot by steps")
    scales = batches if by_tokens else [1] * len(logs)
    has_hella = any(streams["hella"] for streams, _ in logs)

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
                         "grid.color": "#e6e6e6", "axes.edgecolor": "#888888", "legend.frameon": False})
    fig = plt.figure(figsize=(11, 6.2), layout="constrained")
    rows = fig.add_gridspec(2, 6, height_ratios=[3, 1])
    loss = fig.add_subplot(rows[0, :4 if has_hella else 6])
    hella = fig.add_subplot(rows[0, 4:]) if has_hella else None
    lr, speed = fig.add_subplot(rows[1, :3]), fig.add_subplot(rows[1, 3:])

    finite = []
    for i, ((streams, _), name, scale) in enumerate(zip(logs, names(paths), scales)):
        color, tag = COLORS[i % len(COLORS)], f"{name}: " if len(logs) > 1 else ""
        x, y = series(streams["train"], scale)
        if x:
            loss.plot(x, y, color=color, alpha=0.22, linewidth=0.8)
            loss.plot(x, smooth(y, len(y) / 50), color=color, alpha=0.75, linewidth=1.3, label=f"{tag}train")
            finite += [v for v in y if v == v]
        x, y = series(streams["val"], scale)
        if x:
            loss.plot(x, y, color=color if len(logs) > 1 else COLORS[1], linewidth=2, marker="o", markersize=4, label=f"{tag}validation, {y[-1]:.3f} at the end")
            finite += [v for v in y if v == v]
        for x, y in zip(*series(streams.get("test", {}), scale)):
            loss.plot(x, y, color=color, marker="*", markersize=11, linestyle="", label=f"{tag}test, {y:.3f}")
        if has_hella and streams["hella"]:
            x, y = series(streams["hella"], scale)
            hella.plot(x, y, color=color, marker="o", markersize=3, label=f"{tag}{y[-1]:.4f}")
        lr.plot(*series(streams["train"], scale, "lr"), color=color)
        speed.plot(*series(streams["train"], scale, "tok_s"), color=color)

    unit = "tokens" if by_tokens else "step"
    loss.set(xlabel=unit, ylabel="loss, nats a token")
    if finite:
        # The first steps are far above the rest: begin where most of the run lies.
        low, high, first = min(finite), sorted(finite)[int(0.97 * (len(finite) - 1))], max(finite)
        if len(finite) > 20 and first > high > low:
            loss.set_ylim(low - 0.06 * (high - low), high + 0.15 * (high - low))
        loss.legend()
    else:
        loss.text(0.5, 0.5, "nothing logged yet", transform=loss.transAxes, ha="center", color="#888888")
    if has_hella:
        for label, score in REFERENCES.items():
            hella.axhline(score, color="#999999", linestyle="--", linewidth=1)
            hella.annotate(label, (0, score), xycoords=("axes fraction", "data"), xytext=(4, 3), textcoords="offset points", color="#777777", fontsize=8)
        hella.set(xlabel=unit, title="HellaSwag accuracy")
        hella.legend(loc="lower right")
    lr.set(xlabel=unit, title="learning rate")
    speed.set(xlabel=unit, title="tokens a second")
    speed.set_ylim(bottom=0)
    for ax in (lr, speed):
        ax.title.set_fontsize(9)
        ax.ticklabel_format(axis="y", style="sci", scilimits=(-2, 5))
    try:
        fig.savefig(out, dpi=150)
    except (OSError, ValueError) as e:
        raise UserError(f"cannot write {out}: {getattr(e, 'strerror', None) or e}") from None
    finally:
        plt.close(fig)


class Parser(argparse.ArgumentParser):
    """Complains in one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def main():
    p = Parser(prog="plot.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("logs", nargs="+", help="one or several log.txt")
    p.add_argument("--out", help="the picture: .png, .pdf or .svg (the log's name with .png; logs.png for several)")
    p.add_argument("--x", choices=("step", "tokens"), default="step", help="the horizontal axis (%(default)s)")
    a = p.parse_args()
    out = a.out or (os.path.splitext(a.logs[0])[0] + ".png" if len(a.logs) == 1 else "logs.png")
    plot(a.logs, out, a.x == "tokens")
    print(out)


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        sys.exit(f"plot.py: {e}")
