"""
Draws logs.

    python plot.py log.txt                                  # -> log.png
    python plot.py runs/*/log.txt --out compare.png         # several runs in one picture; .pdf and .svg work too
    python plot.py runs/*/log.txt --x hours                 # or tokens, minutes, dollars, FLOPs
    python plot.py log.txt --term                           # the losses in the terminal, as over ssh

A log has one record a line, `step stream value key=value ...`. Its first three columns are build-nanogpt's, so that
project's logs can be drawn as well.
"""
import argparse
import itertools
import json
import math
import os
import shutil
import signal
import sys

COLORS = ["#2a6fbb", "#d1602e", "#3a923a", "#8a5fb0", "#c2385e", "#7a6a53", "#1b9aaa", "#888888"]
STYLE = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
         "axes.titlesize": 9, "grid.color": "#e6e6e6", "axes.edgecolor": "#888888", "legend.frameon": False,
         "text.parse_math": False}
DARK = {"figure.facecolor": "#161616", "axes.facecolor": "#161616", "grid.color": "#333333", **dict.fromkeys(
    ["text.color", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color"], "#dddddd")}
# What a record's total of seconds or dollars is divided by, for an x axis of this kind
PER_UNIT = {"minutes": ("seconds", 60), "hours": ("seconds", 3600), "dollars": ("usd", 1)}
# To compare with: validation losses of runs on two CPU cores, {(recipe, data, parameters): {tokens: loss}}
TYPICAL = {
    ("tiny", "input.txt", 1_311_872): {
        102_400: 4.465, 204_800: 4.188, 307_200: 4.050, 409_600: 3.961, 512_000: 3.872, 614_400: 3.799, 716_800: 3.745,
        819_200: 3.693, 921_600: 3.634, 1_024_000: 3.605},
    ("shakespeare", "shakespeare", 836_736): {256_000: 1.993, 512_000: 1.878, 768_000: 1.744, 1_024_000: 1.654},
}


def printable(text):
    """Without the control characters of a hostile file's name"""
    return "".join(filter(str.isprintable, text))


def fail(message):
    sys.exit(printable(f"plot.py: {message}"))


def read_log(path):
    """
    -> {stream: {step: (value, {key: number})}}, and the headers, of which each start of the run wrote one. After a
    resume a step may appear twice: the last line wins. Lines that are cut off, or not records, are skipped.
    """
    streams, headers = {"train": {}, "val": {}, "test": {}, "hella": {}}, []
    try:
        with open(path, encoding="utf-8", errors="replace") as f:
            lines = f.read().split("\n")[:-1]  # a record ends with its newline
    except OSError as e:
        fail(f"cannot read {path}: {e.strerror}")
    for line in lines:
        try:
            if line.startswith("#"):
                if header := read_header(line[1:]):
                    start = header["start"]  # what is later was abandoned
                    headers = [*(old for old in headers if old["start"] < start), header]
                    streams = {name: {step: record for step, record in records.items() if step <= start}
                               for name, records in streams.items()}
                continue
            step, stream, value, *rest = line.split()
            fields = dict(pair.split("=", 1) for pair in rest)
            numbers = {k: float(v) for k, v in fields.items() if v != "n/a"}
            is_drawable = not any(1e30 < abs(v) < math.inf for v in (float(value), *numbers.values()))
            if is_drawable and 0 <= int(step) < 2**53:
                streams.setdefault(stream, {})[int(step)] = float(value), numbers
        except ValueError:
            continue
    return streams, headers


def read_header(text):
    """-> how many tokens and FLOPs a step takes, and what to compare the run with; {} if the header is not valid"""
    try:
        header = json.loads(text)
        config = header["config"]
        tokens = float(config["total_batch_size"])
        start = int(header.get("step", 2**53))
        if not (0 < tokens < 2**53 and 0 <= start <= 2**53):
            return {}
        references = {str(k)[:50]: min(1.0, max(0.0, float(v))) for k, v in [*header.get("references", {}).items()][:9]}
        source = (str(header.get("recipe", "")), os.path.basename(str(config.get("data", ""))),
                  int(header.get("parameters", 0)))
        return dict(source=source, start=start, tokens=tokens, references=references,
                    FLOPs=tokens * float(header.get("flops_per_token", 0)))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return {}


def smooth(values, span):
    """Exponential moving average over about `span` values, unbiased at the beginning"""
    smoothed, mean, weight, decay = [], 0.0, 0.0, 1 - 1 / max(1.0, span)
    for value in values:
        if math.isfinite(value):
            mean, weight = decay * mean + (1 - decay) * value, decay * weight + (1 - decay)
            value = mean / weight
        smoothed.append(value)
    return smoothed


def step_converter(kind, streams, headers):
    """-> a function from steps to tokens, hours, ..., or None if the log does not say enough"""
    if kind == "step":
        return lambda step: step
    steps, totals = [0], [0.0]  # after so many steps, so many tokens, hours, ...
    if kind in PER_UNIT:
        key, per_unit = PER_UNIT[kind]
        # A record of training includes its own step; the others come before theirs.
        points = {step + (stream == "train"): fields.get(key, 0) / per_unit for stream, records in streams.items()
                  for step, (_, fields) in records.items() if key in fields or key == "usd"}
        steps += sorted(points)
        totals += [points[step] for step in sorted(points)]
    elif any(header[kind] for header in headers):
        last = max([0, *itertools.chain(*streams.values())])
        ends = [header["start"] for header in headers[1:]]  # a resumed run may have another batch
        for header, end in zip(headers, [*ends, last + 1]):
            totals.append(totals[-1] + header[kind] * (end - steps[-1]))
            steps.append(end)
    if not any(totals):
        return None
    import numpy as np
    return lambda step: np.interp(step, steps, totals)


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
    """-> the finite training and validation losses"""
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
    return [y for y in train_y + val_y if math.isfinite(y)]


def draw_typical(ax, logs, kind):
    """The losses of a typical run, if all logs are of its recipe, text, model size and batch size"""
    last = [headers[-1] if headers else {} for _, headers in logs]
    (source, tokens_per_step), *others = {(header.get("source"), header.get("tokens")) for header in last}
    typical = TYPICAL.get(source)
    if typical and not others and kind in ("step", "tokens"):
        x = [tokens / tokens_per_step if kind == "step" else tokens for tokens in typical]
        y = list(typical.values())
        ax.plot(x, y, color="#999999", linestyle="--", linewidth=1, label=f"validation, a typical run: {y[-1]:.3f}")


def zoom_in(ax, losses):
    """The first steps are far above the rest: show the range where most of the run lies."""
    low, high, top = min(losses), sorted(losses)[int(0.97 * (len(losses) - 1))], max(losses)
    if len(losses) > 20 and top > high > low:
        ax.set_ylim(low - 0.06 * (high - low), high + 0.15 * (high - low))


def read_logs(paths, kind):
    """-> the logs, and for each what turns its steps into tokens, hours, ..."""
    logs = [read_log(path) for path in paths]
    to_xs = [step_converter(kind, *log) for log in logs]
    for path, to_x in zip(paths, to_xs):
        if not to_x:
            fail(f"{path} lacks what --x={kind} needs; leave it out")
    return logs, to_xs


def print_chart(paths, kind="step"):
    """The losses as text, a letter for each run: smoothed training losses or, if there are none, validation losses"""
    width, height = max(40, shutil.get_terminal_size().columns - 10), 20
    curves, ends = [], []
    for (streams, _), to_x in zip(*read_logs(paths, kind)):
        xs, ys = series(streams["train"], to_x)
        xs, ys = (xs, smooth(ys, len(ys) / 50)) if xs else series(streams["val"], to_x)
        curves.append([(x, y) for x, y in zip(xs, ys) if 0 <= x < math.inf and abs(y) < 1e9])
        ends.append(f"{ys[-1]:.3f} at the end" if ys else "nothing logged yet")
    losses = sorted(y for curve in curves for _, y in curve)
    if not losses:
        fail("nothing logged yet")
    low, high = losses[0], losses[int(0.97 * (len(losses) - 1))]  # the first steps are far above the rest
    right, grid = max(x for curve in curves for x, _ in curve) or 1, [[" "] * width for _ in range(height)]
    for letter, curve in zip(itertools.cycle("abcdefghijklmnopqrstuvwxyz"), curves):
        by_column = {round(x_value / right * (width - 1)): y for x_value, y in curve}  # the last of each
        for column, y in by_column.items():
            row = round((high - y) / ((high - low) or 1) * (height - 1))
            grid[max(0, row)][column] = letter
    for i, row in enumerate(grid):
        print(f"{high - (high - low) * i / (height - 1):8.3f} {''.join(row).rstrip()}")
    print(f"{'':9}{0:<{width - 12}}{right:>12,.6g}  {kind}".rstrip())
    for letter, name, end in zip(itertools.cycle("abcdefghijklmnopqrstuvwxyz"), short_names(paths), ends):
        print(printable(f"{letter}: {name}, {end}"))


def plot(paths, out, kind="step", dark=False):
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator
    logs, to_xs = read_logs(paths, kind)
    has_hella = any(streams["hella"] for streams, _ in logs)

    matplotlib.rcParams.update({**STYLE, **DARK} if dark else STYLE)
    fig = Figure(figsize=(11, 6.2), layout="constrained")
    above = "loss loss loss loss hella hella" if has_hella else "loss loss loss loss loss loss"
    axes = fig.subplot_mosaic([above.split(), "lr lr lr speed speed speed".split()], height_ratios=[3, 1])
    loss, hella, lr, speed = map(axes.get, ("loss", "hella", "lr", "speed"))
    losses = []
    for i, ((streams, _), name, to_x) in enumerate(zip(logs, short_names(paths), to_xs)):
        color, prefix = COLORS[i % len(COLORS)], f"{name.lstrip('_')}: " if len(logs) > 1 else ""
        losses += draw_losses(loss, streams, to_x, color, prefix)
        lr.plot(*series(streams["train"], to_x, "lr"), color=color)
        speed.plot(*series(streams["train"], to_x, "tok_s"), color=color)
        if streams["hella"]:
            xs, ys = series(streams["hella"], to_x)
            hella.plot(xs, ys, color=color, marker="o", markersize=3, label=f"{prefix}{ys[-1]:.4f}")
    if has_hella:
        references = logs[0][1][-1]["references"] if logs[0][1] else {}
        for name, score in {**references, "chance": 0.25}.items():
            hella.axhline(score, color="#999999", linestyle="--", linewidth=1)
            hella.annotate(name, (0, score), xycoords=("axes fraction", "data"), xytext=(4, 3),
                           textcoords="offset points", color="#777777", fontsize=8)
        hella.set(title="HellaSwag accuracy")
        hella.legend(loc="lower right")
    if losses:
        draw_typical(loss, logs, kind)
        zoom_in(loss, losses)
        loss.legend()
    else:
        loss.text(0.5, 0.5, "nothing logged yet", transform=loss.transAxes, ha="center", color="#888888")
    loss.set(ylabel="loss, nats per token")
    lr.set(title="learning rate")
    speed.set(title="tokens per second")
    speed.set_ylim(bottom=0)
    for ax in fig.axes:
        ax.set_xlabel(kind)
        ax.xaxis.set_major_locator(MaxNLocator(nbins=5))
        if kind in ("tokens", "FLOPs"):
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
    p.add_argument("--x", choices=("step", "tokens", "minutes", "hours", "dollars", "FLOPs"), default="step",
                   help="the horizontal axis (%(default)s)")
    p.add_argument("--dark", action="store_true", help="light on dark")
    p.add_argument("--term", action="store_true", help="print a chart of the losses instead of writing a picture")
    a = p.parse_args()
    if hasattr(signal, "SIGPIPE"):  # Windows lacks it
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a closed pipe (| head) ends the program in silence
    if a.term:
        if a.out or a.dark:
            fail("--term prints a chart, without --out and --dark")
        print_chart(a.logs, a.x)
        return
    out = a.out or (os.path.splitext(a.logs[0])[0] + ".png" if len(a.logs) == 1 else "logs.png")
    out = os.path.expanduser(out)  # a shell leaves --out=~/x as it is
    if os.path.isdir(out):
        fail(f"--out={out} is a folder; name a file in it")
    out += "" if os.path.splitext(out)[1] else ".png"
    plot(a.logs, out, a.x, a.dark)
    print(out)


if __name__ == "__main__":
    main()
