// The calculator of book/live.md: parameters and MACs of an SCConv, part by part, and the package's own conditions.
// tests/test_live.py compares numbers and messages with the package's.

const COST_FIELDS = ["in_channels", "out_channels", "kernel_size", "stride", "side", "alpha", "squeeze_ratio", "gwc_groups"];
const GN_GROUPS = 4; // SCConv's default

// Python's round: a half goes to the even neighbour.
function roundHalfEven(value) {
  const below = Math.floor(value);
  return value - below === 0.5 ? below + (below % 2) : Math.round(value);
}

function isWhole(value) {
  return Number.isInteger(value) && value >= 1;
}

// What the package would raise for these options, or "". The tests are the package's, in its order.
function refusal(o) {
  const whole = "must be a whole number of at least 1";
  const empty = COST_FIELDS.find((name) => Number.isNaN(o[name]));
  if (empty) return `${empty}: must be a number`;
  for (const name of ["in_channels", "out_channels"]) if (!isWhole(o[name])) return `${name}=${o[name]}: ${whole}`;
  if (!isWhole(o.kernel_size)) return `kernel_size=${o.kernel_size}: ${whole}, or a pair of such`;
  if (o.kernel_size % 2 === 0) return `kernel_size=(${o.kernel_size}, ${o.kernel_size}): must be odd, the 1×1 convolutions sit at its centre`;
  if (!isWhole(o.stride)) return `stride=${o.stride}: ${whole}, or a pair of such`;
  if (o.in_channels % 2) return `channels=${o.in_channels}: cross-reconstruction needs an even number`;
  if (o.in_channels % GN_GROUPS) return `channels=${o.in_channels}: must be divisible by gn_groups=${GN_GROUPS}`;
  for (const name of ["squeeze_ratio", "gwc_groups"]) if (!isWhole(o[name])) return `${name}=${o[name]}: ${whole}`;
  if (!(o.alpha > 0 && o.alpha < 1)) return `alpha=${o.alpha}: must lie between 0 and 1, both excluded`;
  const { up, low } = widths(o);
  if (Math.min(up, low) < 1)
    return `in_channels=${o.in_channels}: alpha=${o.alpha} and squeeze_ratio=${o.squeeze_ratio} leave ${up} upper and ${low} lower channels, each must be at least 1`;
  if (up % o.gwc_groups || o.out_channels % o.gwc_groups)
    return `gwc_groups=${o.gwc_groups}: must divide the ${up} squeezed upper channels and out_channels=${o.out_channels}`;
  if (low > o.out_channels)
    return `out_channels=${o.out_channels}: must be at least (1 - alpha)·in_channels/squeeze_ratio = ${low}, the channels that Eq. (6) passes on`;
  if (!isWhole(o.side)) return `input_shape=(1, ${o.in_channels}, ${o.side}, ${o.side}): H=${o.side}: ${whole}`;
  return "";
}

// Channels of the two branches, αC1 and (1-α)C1, and after their squeezes.
function widths({ in_channels, alpha, squeeze_ratio }) {
  const upper = roundHalfEven(alpha * in_channels);
  const lower = in_channels - upper;
  return { upper, lower, up: Math.floor(upper / squeeze_ratio), low: Math.floor(lower / squeeze_ratio) };
}

// {part: {shape, params, macs}} for one image of side × side.
function costs(o) {
  const { upper, lower, up, low } = widths(o);
  const { in_channels: c1, out_channels: c2, kernel_size: k, alpha, squeeze_ratio: r, gwc_groups: g } = o;
  const input = o.side ** 2;
  const output = (Math.floor((o.side - 1) / o.stride) + 1) ** 2; // the default padding keeps the side at stride 1
  const conv = (from, to, params, positions) => ({ shape: `${from} → ${to}`, params, macs: params * positions });
  const parts = {
    gn: { shape: `γ and β of ${c1}`, params: 2 * c1, macs: 0 },
    squeeze_up: conv(upper, up, upper * up, input), // at all positions, the GWC reads their neighbours
    gwc: conv(up, c2, (k * k * up * c2) / g, output),
    pwc_up: conv(up, c2, up * c2, output),
    squeeze_low: conv(lower, low, lower * low, output),
    pwc_low: conv(low, c2 - low, low * (c2 - low), output),
  };
  if (low === c2) parts.pwc_low.shape = "not needed"; // X_low alone fills Y2
  const sum = (of) => Object.values(parts).reduce((total, part) => total + part[of], 0);
  const squeeze = (alpha * c1 * alpha * c1) / r;
  const pwc2 = (((1 - alpha) * c1) / r) * (c2 - ((1 - alpha) * c1) / r);
  const eq11 = squeeze + (k * k * alpha * c1 * c2) / (g * r) + (alpha * c1 * c2) / r + ((1 - alpha) * c1) ** 2 / r + pwc2;
  return {
    ...parts,
    layer: { shape: `${c1} → ${c2}`, params: sum("params"), macs: sum("macs") },
    eq10: conv(c1, c2, k * k * c1 * c2, output),
    eq11: { shape: `${c1} → ${c2}`, params: eq11, macs: output * eq11 + (input - output) * squeeze },
  };
}

// ---- the page ----

function costElement(id) {
  return document.getElementById(`cost-${id}`);
}

function showCosts() {
  const options = Object.fromEntries(COST_FIELDS.map((name) => [name, costElement(name).valueAsNumber]));
  let refused = refusal(options);
  const found = refused ? null : costs(options);
  if (found && !Number.isSafeInteger(found.eq10.macs + found.layer.macs)) refused = "too large: this page counts exactly up to 2^53";
  const number = (value) => value.toLocaleString("en-GB", { maximumFractionDigits: 2 });
  for (const row of costElement("table").querySelectorAll("tbody tr")) {
    const part = refused ? null : found[row.dataset.part];
    const cells = part ? [part.shape, number(part.params), number(part.macs)] : ["", "–", "–"];
    [".live-shape", ".live-params", ".live-macs"].forEach((at, i) => (row.querySelector(at).textContent = cells[i]));
  }
  costElement("kernel").textContent = refused ? "k×k" : `${options.kernel_size}×${options.kernel_size}`;
  costElement("status").classList.toggle("live-refused", Boolean(refused));
  costElement("status").textContent = refused ? `SCConv refuses this. ${refused}` : verdict(found);
}

function verdict({ layer, gn, eq10, eq11 }) {
  const share = (of) => `${((100 * layer[of]) / eq10[of]).toFixed(1)} %`;
  const whole = Math.abs(eq11.params - (layer.params - gn.params)) < 1e-6 * eq11.params;
  return (
    `SCConv has ${share("params")} of the convolution's parameters, and ${share("macs")} of its MACs. ` +
    (whole
      ? "Eq. (11) counts its five convolutions, without the group norm."
      : "Eq. (11) differs here, because αC₁, αC₁/r or (1−α)C₁/r is not whole and the layer rounds it.")
  );
}

for (const name of COST_FIELDS) costElement(name).addEventListener("input", showCosts);
costElement("figure").hidden = false;
showCosts();
