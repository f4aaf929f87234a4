// The live SRU of book/live.md: Eq. (1) to (4) on the features in live_data.js, for one channel and its partner.
// The arithmetic is in 64 bits; tests/test_live.py compares it with the package's layer.

const [CHANNELS, ROWS, COLUMNS] = SRU_CAPTURE.shape;
const PIXELS = ROWS * COLUMNS;
const VIRIDIS = ["#440154", "#3b528b", "#21918c", "#5ec962", "#fde725"];

function decode(base64) {
  return Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
}

// ---- the unit ----

const X = Float64Array.from(new Float32Array(decode(SRU_CAPTURE.x).buffer)); // (C, H, W)

// X less the mean of its group of channels, over the group's deviation: the inner part of Eq. (1).
function normalise(x, groups, eps) {
  const result = new Float64Array(x.length);
  const size = x.length / groups;
  for (let start = 0; start < x.length; start += size) {
    const group = x.subarray(start, start + size);
    const mean = group.reduce((sum, value) => sum + value, 0) / size;
    const variance = group.reduce((sum, value) => sum + (value - mean) ** 2, 0) / size;
    result.set(group.map((value) => (value - mean) / Math.sqrt(variance + eps)), start);
  }
  return result;
}

const X_HAT = normalise(X, SRU_CAPTURE.groups, SRU_CAPTURE.eps); // γ and β do not change it

// One channel: its weight w, Sigmoid(z), the share of informative positions, x, x1 = W1⊗X and x2 = W2⊗X.
function separate(channel, gamma, beta, threshold, gate) {
  const here = [channel * PIXELS, (channel + 1) * PIXELS];
  const x = X.subarray(...here);
  const xOut = X_HAT.subarray(...here).map((value) => gamma[channel] * value + beta[channel]); // (1)
  const w = gamma[channel] / gamma.reduce((sum, value) => sum + value, 0); // (2)
  const z = xOut.map((value) => w * value);
  const sigmoid = z.map((value) => 1 / (1 + Math.exp(-value)));
  const logit = Math.log(threshold / (1 - threshold));
  const informative = z.map((value) => value > logit);
  const [below1, below2] = gate === "soft" ? [sigmoid, sigmoid] : [new Float64Array(PIXELS), new Float64Array(PIXELS).fill(1)];
  const w1 = informative.map((yes, p) => (yes ? 1 : below1[p])); // (3)
  const w2 = informative.map((yes, p) => (yes ? 0 : below2[p]));
  return { w, sigmoid, share: mean(informative), x, x1: w1.map((v, p) => v * x[p]), x2: w2.map((v, p) => v * x[p]) };
}

// Of channel i, X^w is W1⊗X of the channel itself and W2⊗X of the channel C/2 away.
function reconstruct({ channel, gamma, beta, threshold, gate }) {
  const gammas = SRU_CAPTURE.gamma.map((value, c) => (c === channel ? gamma : value)); // the others stay as trained
  const betas = SRU_CAPTURE.beta.map((value, c) => (c === channel ? beta : value));
  const partner = (channel + CHANNELS / 2) % CHANNELS;
  const [own, other] = [channel, partner].map((c) => separate(c, gammas, betas, threshold, gate));
  const maps = { x: own.x, x1: own.x1, x2: own.x2, other: other.x2, xw: own.x1.map((v, p) => v + other.x2[p]) }; // (4)
  const most = Math.max(...own.x, ...other.x); // the colour scale's end, the same at all settings of a channel
  return { partner, own, other, maps, most };
}

function mean(values) {
  return values.reduce((sum, value) => sum + value, 0) / values.length;
}

// ---- the page ----

function element(id) {
  return document.getElementById(`sru-${id}`);
}

// Red, green and blue of a value between 0 and 1; the scale below the maps is the same gradient.
function colour(value) {
  const place = Math.min(Math.max(value, 0), 1) * (VIRIDIS.length - 1);
  const i = Math.min(Math.floor(place), VIRIDIS.length - 2);
  const [from, to] = [VIRIDIS[i], VIRIDIS[i + 1]].map((hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16)));
  return from.map((start, c) => start + (to[c] - start) * (place - i));
}

function paint(canvas, colourOf) {
  const image = new ImageData(COLUMNS, ROWS);
  for (let p = 0; p < PIXELS; p++) image.data.set([...colourOf(p), 255], 4 * p);
  canvas.getContext("2d").putImageData(image, 0, 0);
}

function trained(channel) {
  return { channel, gamma: SRU_CAPTURE.gamma[channel], beta: SRU_CAPTURE.beta[channel] };
}

let settings = { ...trained(3), threshold: SRU_CAPTURE.threshold, gate: SRU_CAPTURE.gate };
let shown; // what the page shows at these settings

function draw() {
  shown = reconstruct(settings);
  const { channel, threshold, gamma, beta } = settings;
  const { partner, own, other, maps, most } = shown;
  const titles = {
    x: `X, channel ${channel}`,
    x1: `W₁⊗X, channel ${channel}`,
    x2: `W₂⊗X, channel ${channel}`,
    other: `W₂⊗X, channel ${partner}`,
    xw: `Xʷ, channel ${channel}`,
  };
  for (const [name, map] of Object.entries(maps)) {
    const average = `mean ${mean(map).toFixed(3)}`;
    paint(element(name), (p) => colour(map[p] / most));
    element(name).setAttribute("aria-label", `${titles[name]}: ${average}`);
    element(`${name}-title`).textContent = titles[name];
    element(`${name}-mean`).textContent = average;
  }
  const texts = { threshold: threshold.toFixed(4), gamma: gamma.toFixed(3), beta: beta.toFixed(3) };
  for (const [name, text] of Object.entries(texts)) {
    element(name).setAttribute("aria-valuetext", text);
    element(`${name}-shown`).textContent = text;
  }
  element("middle").textContent = (most / 2).toFixed(2);
  element("most").textContent = `${most.toFixed(2)} or more`; // a sum in Xʷ may exceed it
  const percent = (share) => `${(100 * share).toFixed(1)} %`;
  const [low, high] = [Math.min(...own.sigmoid), Math.max(...own.sigmoid)].map((value) => value.toFixed(4));
  element("status").textContent =
    `Informative: ${percent(own.share)} of channel ${channel}, ${percent(other.share)} of channel ${partner}. ` +
    `In channel ${channel}, w is ${own.w.toFixed(4)}, and Sigmoid(z) runs from ${low} to ${high}.`;
}

// After a change that did not come from the sliders. They move in steps, and a trained value may lie between two.
function place() {
  for (const name of ["threshold", "gamma", "beta"]) element(name).value = settings[name];
  element("channel").value = settings.channel;
  element(settings.gate).checked = true;
  draw();
}

function start() {
  for (let c = 0; c < CHANNELS; c++) element("channel").add(new Option(c, c));
  for (const name of ["threshold", "gamma", "beta"]) {
    element(name).addEventListener("input", (event) => {
      settings[name] = event.target.valueAsNumber;
      draw();
    });
  }
  for (const gate of ["soft", "hard"]) {
    element(gate).addEventListener("change", () => {
      settings.gate = gate;
      draw();
    });
  }
  element("channel").addEventListener("change", (event) => {
    settings = { ...settings, ...trained(Number(event.target.value)) };
    place();
  });
  element("trained").addEventListener("click", () => {
    settings = { ...trained(settings.channel), threshold: SRU_CAPTURE.threshold, gate: SRU_CAPTURE.gate };
    place();
  });
  const photograph = decode(SRU_CAPTURE.photograph);
  for (const canvas of element("figure").querySelectorAll("canvas")) [canvas.width, canvas.height] = [COLUMNS, ROWS];
  paint(element("photograph"), (p) => photograph.subarray(3 * p, 3 * p + 3));
  element("scale").style.background = `linear-gradient(to right, ${VIRIDIS.join()})`;
  element("figure").hidden = false;
  place();
}

start();
