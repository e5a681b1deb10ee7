// The map of the region: sums over a fixed number of parts, drawn as cells.

/** Parts that are summed up, at most, however many blocks there are. */
const PARTS = 4096;
/** The smallest cell, in pixels of the page, and rows at most. */
const CELL = 10;
const ROWS = 32;

/** What is plugged and resident in each part of a region, bytes. */
class Sums {
  constructor(device) {
    const blocks = Math.ceil(device.region_size / device.block_size);
    this.part = device.block_size;
    // Powers of two, so that cells and rows start at round addresses.
    while (Math.ceil(device.region_size / this.part) > PARTS) this.part *= 2;
    this.count = blocks ? Math.ceil(device.region_size / this.part) : 0;
    this.plugged = new Float64Array(this.count);
    this.resident = new Float64Array(this.count);
  }

  add(list, { offset, size }) {
    const sums = list === "plugged" ? this.plugged : list === "resident" ? this.resident : null;
    if (!sums) return;
    const end = offset + size;
    for (let index = Math.floor(offset / this.part); index < this.count; index += 1) {
      const from = index * this.part;
      if (from >= end) return;
      sums[index] += Math.min(end, from + this.part) - Math.max(offset, from);
    }
  }
}

class RegionMap {
  constructor(canvas, readout, scale, table) {
    Object.assign(this, { canvas, readout, scale, table });
    this.device = null;
    this.sums = null;
    this.cursor = null;
    new ResizeObserver(() => this.draw()).observe(canvas);
    canvas.addEventListener("pointermove", (event) => this.point(this.cellAt(event)));
    canvas.addEventListener("pointerleave", () => this.point(null));
    canvas.addEventListener("blur", () => this.point(null));
    canvas.addEventListener("keydown", (event) => this.key(event));
    this.rows = Array.from({ length: 16 }, () => {
      const row = table.insertRow();
      return Array.from({ length: 4 }, () => row.insertCell());
    });
  }

  show(device, sums) {
    this.device = device;
    this.sums = sums;
    this.draw();
    this.tell();
  }

  /** How the cells lie for the width that there is. */
  layout() {
    const { width, height } = this.canvas.getBoundingClientRect();
    const fit = Math.max(1, Math.floor(width / CELL));
    const columns = Math.min(128, 2 ** Math.floor(Math.log2(fit)));
    let group = 1;
    while (Math.ceil(this.sums.count / group) > columns * ROWS) group *= 2;
    const cells = Math.ceil(this.sums.count / group);
    const rows = Math.max(1, Math.ceil(cells / columns));
    return { width, height, columns, rows, cells, group, across: width / columns, down: height / rows };
  }

  /** What a cell stands for, bytes of the region. */
  cell(index, group) {
    const cell = { from: index * group * this.sums.part, plugged: 0, resident: 0 };
    const end = Math.min(this.device.region_size, cell.from + group * this.sums.part);
    cell.size = end - cell.from;
    for (let part = index * group; part < Math.min(this.sums.count, (index + 1) * group); part += 1) {
      cell.plugged += this.sums.plugged[part];
      cell.resident += this.sums.resident[part];
    }
    return cell;
  }

  draw() {
    if (!this.sums) return;
    const layout = this.layout();
    const ratio = devicePixelRatio;
    // A window that is just being changed may have none.
    if (layout.width * ratio < 1 || layout.height * ratio < 1) return;
    this.canvas.width = Math.round(layout.width * ratio);
    this.canvas.height = Math.round(layout.height * ratio);
    const pen = this.canvas.getContext("2d");
    const colors = colorsOf(this.canvas);
    const unusable = hatched(pen, colors, ratio);
    const gap = layout.across > 6 ? ratio : 0;
    for (let index = 0; index < layout.cells; index += 1) {
      const cell = this.cell(index, layout.group);
      const column = index % layout.columns;
      const row = Math.floor(index / layout.columns);
      const x = Math.round(column * layout.across * ratio);
      const y = Math.round(row * layout.down * ratio);
      const width = Math.round((column + 1) * layout.across * ratio) - x - gap;
      const height = Math.round((row + 1) * layout.down * ratio) - y - gap;
      const fill = (color, part) => {
        if (!part) return;
        // What there is of something is seen, however little.
        const high = Math.max(2 * ratio, Math.round(height * Math.min(1, part)));
        pen.fillStyle = color;
        pen.fillRect(x, y + height - high, width, high);
      };
      fill(cell.from >= this.device.usable_region_size ? unusable : colors.discarded, 1);
      fill(colors.plugged, cell.plugged / cell.size);
      fill(cell.plugged ? colors.resident : colors.stray, cell.resident / cell.size);
      if (index === this.cursor) {
        pen.strokeStyle = colors.text;
        pen.lineWidth = 2 * ratio;
        pen.strokeRect(x, y, width, height);
      }
    }
    const what = size(layout.group * this.sums.part);
    const across = size(layout.columns * layout.group * this.sums.part);
    this.scale.textContent = `Each cell is ${what}, filled by proportion; each row is ${across}.`;
  }

  /** The map in words, for screen readers, and as a table. */
  tell() {
    const { addr, region_size: region, plugged_size: plugged, resident_size: resident } = this.device;
    const held = resident === null ? "guest memory is not mapped" : `${size(resident)} resident`;
    this.canvas.setAttribute("aria-label", `Map of the region of ${size(region)}: ${size(plugged)} plugged, ${held}.`);
    const group = Math.max(1, Math.ceil(this.sums.count / this.rows.length));
    this.rows.forEach((cells, index) => {
      cells[0].parentElement.hidden = index * group >= this.sums.count;
      if (cells[0].parentElement.hidden) return;
      const cell = this.cell(index, group);
      cells[0].textContent = address(addr + cell.from);
      cells[1].textContent = size(cell.size);
      cells[2].textContent = `${size(cell.plugged)} (${percent(cell.plugged, cell.size)})`;
      cells[3].textContent = resident === null ? "unknown" : `${size(cell.resident)} (${percent(cell.resident, cell.size)})`;
    });
  }

  cellAt(event) {
    if (!this.sums) return null;
    const layout = this.layout();
    const column = Math.min(layout.columns - 1, Math.floor(event.offsetX / layout.across));
    const index = Math.floor(event.offsetY / layout.down) * layout.columns + column;
    return index >= 0 && index < layout.cells ? index : null;
  }

  key(event) {
    if (!this.sums) return;
    const { columns, cells } = this.layout();
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns, Home: -cells, End: cells };
    const step = steps[event.key];
    if (step === undefined) return;
    event.preventDefault();
    const next = this.cursor === null ? 0 : this.cursor + step;
    this.point(Math.max(0, Math.min(cells - 1, next)));
  }

  point(index) {
    if (this.cursor === index) return;
    this.cursor = index;
    this.draw();
    if (index === null) return;
    const cell = this.cell(index, this.layout().group);
    const first = address(this.device.addr + cell.from);
    const usable = cell.from >= this.device.usable_region_size ? ", not usable yet" : "";
    const held = this.device.resident_size === null ? "" : `, ${size(cell.resident)} resident`;
    this.readout.textContent = `${first}, ${size(cell.size)}: ${size(cell.plugged)} plugged${held}${usable}`;
  }
}

/** The colours that the style sheet has now. */
function colorsOf(element) {
  const style = getComputedStyle(element);
  const names = ["text", "muted", "edge", "discarded", "unusable", "hatch", "plugged", "resident", "stray", "requested"];
  return Object.fromEntries(names.map((name) => [name, style.getPropertyValue(`--${name}`)]));
}

function hatched(pen, colors, ratio) {
  const side = Math.max(2, Math.round(6 * ratio));
  const tile = new OffscreenCanvas(side, side);
  const ink = tile.getContext("2d");
  ink.fillStyle = colors.unusable;
  ink.fillRect(0, 0, side, side);
  ink.strokeStyle = colors.hatch;
  ink.lineWidth = ratio;
  ink.beginPath();
  for (const shift of [-side, 0, side]) {
    ink.moveTo(shift - 1, side + 1);
    ink.lineTo(shift + side + 1, -1);
  }
  ink.stroke();
  return pen.createPattern(tile, "repeat");
}
