"""
Draws logs.

    python plot.py log.txt                                  # -> log.png
    python plot.py runs/*/log.txt --out compare.png         # several runs in one picture; .pdf and .svg work too
    python plot.py runs/*/log.txt --x hours                 # or tokens, dollars, FLOPs

A log has one record a line, `step stream value key=value ...`. Its first three columns are build-nanogpt's, so that
project's logs can be drawn as well.
"""
import argparse
import json
import os
import sys

COLORS = ["#2a6fbb", "#d1602e", "#3a923a", "#8a5fb0", "#c2385e", "#7a6a53", "#1b9aaa", "#888888"]
STYLE = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
         "axes.titlesize": 9, "grid.color": "#e6e6e6", "axes.edgecolor": "#888888", "legend.frameon": False}


def fail(message):
    sys.exit(f"plot.py: {message}")


def read_log(path):
    """
    -> {stream: {step: (value, {key: number})}}, and the newest header. After a resume a step may appear twice: the last
    line wins. Lines that are cut off, or not records, are skipped.
    """
    streams, header = {"train": {}, "val": {}, "test": {}, "hella": {}}, {}
    try:
        with open(path, encoding="utf-8", errors="replace") as f:
            lines = f.read().split("\n")[:-1]  # a record ends with its newline
    except OSError as e:
        fail(f"cannot read {path}: {e.strerror}")
    for line in lines:
        try:
            if line.startswith("#"):
                header = read_header(line[1:])
                continue
            step, stream, value, *rest = line.split()
            fields = dict(pair.split("=", 1) for pair in rest)
            numbers = {k: float(v) for k, v in fields.items() if v != "n/a"}
            if not 0 <= int(step) < 2**53:
                continue
            streams.setdefault(stream, {})[int(step)] = float(value), numbers
        except ValueError:
            continue
    return streams, header


def read_header(text):
    """-> a run's settings, and scores to compare with, as far as they are what they should be"""
    try:
        header = json.loads(text)
        tokens, price = float(header["config"]["total_batch_size"]), header["config"].get("usd_per_gpu_hour", 0)
        references = {str(k): float(v) for k, v in header.get("references", {}).items()}
        return dict(tokens=tokens, FLOPs=tokens * float(header.get("flops_per_token", 0)), hours=1 / 3600,
                    dollars=float(header.get("world_size", 1)) * float(price) / 3600, references=references)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return {}


def smooth(values, span):
    """Exponential moving average over about `span` values, unbiased at the beginning"""
    smoothed, mean, weight, decay = [], 0.0, 0.0, 1 - 1 / max(1.0, span)
    for value in values:
        if value == value:  # not NaN
            mean, weight = decay * mean + (1 - decay) * value, decay * weight + (1 - decay)
        smoothed.append(mean / weight if weight else value)
    return smoothed


def horizontal(kind, streams, header):
    """-> what turns a step into tokens, hours, ..., or None if the log does not say enough"""
    if kind == "step":
        return lambda step: step
    if not header.get(kind):
        return None
    if kind in ("tokens", "FLOPs"):
        return lambda step: step * header[kind]
    import numpy as np
    steps, seconds = [0], [0.0]
    for step, (_, fields) in sorted(streams["train"].items()):
        seconds.append(seconds[-1] + fields.get("ms", 0) / 1000 * (step + 1 - steps[-1]))
        steps.append(step + 1)
    return lambda step: np.interp(step, steps, seconds) * header[kind]


def series(records, to_x, key=None):
    """-> x and y of a stream's values, or of one of its fields"""
    x, y = [], []
    for step, (value, fields) in sorted(records.items()):
        if key is None or key in fields:
            x.append(to_x(step))
            y.append(value if key is None else fields[key])
    return x, y


def short_names(paths):
    """Each log's folder if that tells them apart, else its path"""
    folders = [os.path.basename(os.path.dirname(os.path.abspath(path))) for path in paths]
    if len(paths) > 1 and len(set(folders)) == len(paths):
        return folders
    return [os.path.splitext(path)[0] for path in paths]


def draw_losses(ax, streams, to_x, color, prefix):
    """-> all finite losses"""
    train_x, train_y = series(streams["train"], to_x)
    val_x, val_y = series(streams["val"], to_x)
    if train_x:
        ax.plot(train_x, train_y, color=color, alpha=0.22, linewidth=0.8)
        smoothed = smooth(train_y, len(train_y) / 50)
        ax.plot(train_x, smoothed, color=color, alpha=0.75, linewidth=1.3, label=f"{prefix}train")
    if val_x:
        val_color = color if prefix else COLORS[1]
        ax.plot(val_x, val_y, color=val_color, linewidth=2, marker="o", markersize=4,
                label=f"{prefix}validation, {val_y[-1]:.3f} at the end")
    for x, y in zip(*series(streams["test"], to_x)):
        ax.plot(x, y, color=color, marker="*", markersize=11, linestyle="", label=f"{prefix}test, {y:.3f}")
    return [y for y in train_y + val_y if y == y]


def zoom_in(ax, losses):
    """The first steps are far above the rest: show the range where most of the run lies."""
    low, high, top = min(losses), sorted(losses)[int(0.97 * (len(losses) - 1))], max(losses)
    if len(losses) > 20 and top > high > low:
        ax.set_ylim(low - 0.06 * (high - low), high + 0.15 * (high - low))


def plot(paths, out, x="step"):
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator
    logs = [read_log(path) for path in paths]
    axis_of = [horizontal(x, *log) for log in logs]
    for path, to_x in zip(paths, axis_of):
        if not to_x:
            fail(f"{path} does not say how many {x} a step has; plot by steps")
    has_hella = any(streams["hella"] for streams, _ in logs)

    matplotlib.rcParams.update(STYLE)
    fig = Figure(figsize=(11, 6.2), layout="constrained")
    above = "loss loss loss loss hella hella" if has_hella else "loss loss loss loss loss loss"
    axes = fig.subplot_mosaic([above.split(), "lr lr lr speed speed speed".split()], height_ratios=[3, 1])
    loss, hella, lr, speed = map(axes.get, ("loss", "hella", "lr", "speed"))
    losses = []
    for i, ((streams, header), name, to_x) in enumerate(zip(logs, short_names(paths), axis_of)):
        color, prefix = COLORS[i % len(COLORS)], f"{name}: " if len(logs) > 1 else ""
        losses += draw_losses(loss, streams, to_x, color, prefix)
        lr.plot(*series(streams["train"], to_x, "lr"), color=color)
        speed.plot(*series(streams["train"], to_x, "tok_s"), color=color)
        if streams["hella"]:
            xs, ys = series(streams["hella"], to_x)
            hella.plot(xs, ys, color=color, marker="o", markersize=3, label=f"{prefix}{ys[-1]:.4f}")
    if has_hella:
        for name, score in {**logs[0][1].get("references", {}), "chance": 0.25}.items():
            hella.axhline(score, color="#999999", linestyle="--", linewidth=1)
            hella.annotate(name, (0, score), xycoords=("axes fraction", "data"), xytext=(4, 3),
                           textcoords="offset points", color="#777777", fontsize=8)
        hella.set(title="HellaSwag accuracy")
        hella.legend(loc="lower right")
    if losses:
        zoom_in(loss, losses)
        loss.legend()
    else:
        loss.text(0.5, 0.5, "nothing logged yet", transform=loss.transAxes, ha="center", color="#888888")
    loss.set(ylabel="loss, nats per token")
    lr.set(title="learning rate")
    speed.set(title="tokens per second")
    speed.set_ylim(bottom=0)
    for ax in fig.axes:
        ax.set_xlabel(x)
        ax.xaxis.set_major_locator(MaxNLocator(nbins=5))
        if x in ("tokens", "FLOPs"):
            ax.xaxis.set_major_formatter(EngFormatter())
    for ax in (lr, speed):
        ax.ticklabel_format(axis="y", style="sci", scilimits=(-2, 5))
    try:
        fig.savefig(out, dpi=150)
    except (OSError, ValueError) as e:
        fail(f"cannot write {out}: {getattr(e, 'strerror', None) or e}")


def main():
    p = argparse.ArgumentParser(
        prog="plot.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.error = fail
    p.add_argument("logs", nargs="+", help="one or more log.txt")
    p.add_argument("--out", help="the picture: .png, .pdf or .svg (the log's name with .png; logs.png for several)")
    p.add_argument("--x", choices=("step", "tokens", "hours", "dollars", "FLOPs"), default="step",
                   help="the horizontal axis (%(default)s)")
    a = p.parse_args()
    out = a.out or (os.path.splitext(a.logs[0])[0] + ".png" if len(a.logs) == 1 else "logs.png")
    plot(a.logs, out, a.x)
    print(out)


if __name__ == "__main__":
    main()
