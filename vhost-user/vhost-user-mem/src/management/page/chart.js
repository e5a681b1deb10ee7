// Sizes over time, and how fast what is plugged changes.

/** What is kept, in seconds, a sample each second; and what is shown at first. */
const KEPT = 600;
const SHOWN = 60;
/** What a rate is taken over, in milliseconds. */
const WINDOW = 10_000;

class Chart {
  constructor(canvas) {
    this.canvas = canvas;
    this.samples = [];
    new ResizeObserver(() => this.draw()).observe(canvas);
  }

  /** Takes a sample; called once a second. */
  add(device) {
    const { requested_size: requested, plugged_size: plugged, resident_size: resident } = device;
    this.samples.push({ time: Date.now(), requested, plugged, resident });
    while (this.samples[0].time < Date.now() - 1000 * KEPT) this.samples.shift();
    this.draw();
  }

  draw() {
    if (!this.samples.length) return;
    const { width, height } = this.canvas.getBoundingClientRect();
    const ratio = devicePixelRatio;
    if (width * ratio < 1 || height * ratio < 1) return;
    this.canvas.width = Math.round(width * ratio);
    this.canvas.height = Math.round(height * ratio);
    const pen = this.canvas.getContext("2d");
    const colors = colorsOf(this.canvas);
    pen.scale(ratio, ratio);
    pen.font = '12px system-ui, "DejaVu Sans", sans-serif';
    const most = Math.max(...this.samples.flatMap((at) => [at.requested, at.plugged, at.resident ?? 0]), 1);
    const top = 2 ** Math.ceil(Math.log2(most * 1.05));
    const [left, right, upper, lower] = [72, width - 8, 10, height - 22];
    const now = this.samples.at(-1).time;
    // One minute at first, then as much as there is, in whole minutes.
    const age = (now - this.samples[0].time) / 1000;
    const span = Math.min(KEPT, Math.max(1, Math.ceil(age / SHOWN)) * SHOWN);
    const x = (time) => right - ((now - time) / (1000 * span)) * (right - left);
    const y = (bytes) => lower - (bytes / top) * (lower - upper);

    pen.strokeStyle = colors.edge;
    pen.fillStyle = colors.muted;
    pen.textAlign = "right";
    pen.textBaseline = "middle";
    for (const part of [0, 0.5, 1]) {
      line(pen, [[left, y(top * part)], [right, y(top * part)]]);
      pen.fillText(size(top * part), left - 8, y(top * part));
    }
    pen.textBaseline = "top";
    for (const [seconds, align] of [[span, "left"], [span / 2, "center"], [0, "right"]]) {
      pen.textAlign = align;
      pen.fillText(seconds ? `${duration(seconds)} ago` : "now", x(now - 1000 * seconds), lower + 6);
    }

    const path = (name) => steps(this.samples.filter((at) => at[name] !== null).map((at) => [x(at.time), y(at[name])]));
    const plugged = path("plugged");
    pen.fillStyle = colors.plugged;
    pen.beginPath();
    pen.moveTo(plugged[0][0], lower);
    plugged.forEach((point) => pen.lineTo(...point));
    pen.lineTo(plugged.at(-1)[0], lower);
    pen.fill();
    pen.lineWidth = 2;
    for (const [name, dashes] of [["resident", []], ["requested", [6, 4]]]) {
      pen.strokeStyle = colors[name];
      pen.setLineDash(dashes);
      line(pen, path(name));
    }
    const { requested, plugged: has } = this.samples.at(-1);
    this.canvas.setAttribute("aria-label", `Sizes over time; now ${size(has)} of the requested ${size(requested)} are plugged.`);
  }
}

/** A size stays as it is until the next sample. */
function steps(points) {
  return points.flatMap(([x, y], index) => (index ? [[x, points[index - 1][1]], [x, y]] : [[x, y]]));
}

function line(pen, points) {
  pen.beginPath();
  points.forEach((point, index) => (index ? pen.lineTo(...point) : pen.moveTo(...point)));
  pen.stroke();
}

/** How fast what is plugged changes, from the events of the last seconds. */
class Rate {
  constructor() {
    this.changes = [];
    this.last = null;
  }

  add(plugged) {
    const before = this.changes.at(-1);
    if (before && before.plugged !== plugged) this.last = Date.now();
    if (before?.plugged === plugged) return;
    this.changes.push({ time: Date.now(), plugged });
    // However fast the guest is, and however many events that makes.
    if (this.changes.length > 2000) this.changes = this.changes.filter((_, index) => index % 2);
  }

  /** Bytes a second: more is plugged when it is positive. */
  now() {
    const since = Date.now() - WINDOW;
    // The last change before the window tells what there was at its start.
    while (this.changes.length > 1 && this.changes[1].time < since) this.changes.shift();
    if (this.last === null || this.last < since) return 0;
    const first = this.changes[0];
    const seconds = Math.max(1, (Date.now() - Math.max(since, first.time)) / 1000);
    return (this.changes.at(-1).plugged - first.plugged) / seconds;
  }
}
