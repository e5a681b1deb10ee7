// Numbers as people read them.

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];

/** Bytes with the largest unit that they fill, cut to two decimals. */
function size(bytes) {
  let unit = 0;
  while (bytes >= 1024 && unit < UNITS.length - 1) {
    bytes /= 1024;
    unit += 1;
  }
  return `${Math.floor(bytes * 100) / 100} ${UNITS[unit]}`;
}

function address(bytes) {
  return `0x${BigInt(bytes).toString(16).padStart(10, "0")}`;
}

/** A part of a whole; never 0 % or 100 % unless it is that. */
function percent(part, whole) {
  if (!whole || !part) return "0 %";
  if (part >= whole) return "100 %";
  return `${Math.min(99, Math.max(1, Math.round((100 * part) / whole)))} %`;
}

function duration(seconds) {
  if (seconds < 60) return `${Math.ceil(seconds)} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ${Math.floor(seconds % 60)} s`.replace(" 0 s", "");
  return `${Math.floor(seconds / 3600)} h ${Math.floor((seconds % 3600) / 60)} min`;
}

function clock(time) {
  return time.toLocaleTimeString([], { hour12: false });
}

/** A sentence that begins with a capital letter. */
function sentence(text) {
  return text.charAt(0).toUpperCase() + text.slice(1);
}
