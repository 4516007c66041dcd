// From the pixels of an image to the input of a model, to the bit as runtimes/preprocess.py with Pillow.
//
// A canvas resizes by a filter that the browser chooses, so Pillow's is here: for every output pixel the sum
// of the input pixels under the filter, which is stretched where the image becomes smaller; along rows and along
// columns, with weights in fixed point, and rounded to 8 bits in between.
//
// An image here is {width, height, channels, data}, the channels of a pixel side by side.
//
// Source: timm `transforms_imagenet_eval`; Pillow `Image.convert`, `Image.resize` (libImaging/Resample.c).

const WEIGHT_ONE = 2 ** 22; // of 32 bits, less 8 for the pixel and 2 for a sum beyond its range

const FILTERS = {
  bilinear: { support: 1, at: (x) => Math.max(0, 1 - Math.abs(x)) },
  bicubic: { support: 2, at: cubic },
  lanczos: { support: 3, at: (x) => (Math.abs(x) < 3 ? sinc(x) * sinc(x / 3) : 0) },
};

/** Returns what the model sees of an image of RGBA pixels, in its size and channels. */
export function fit({ width, height, data }, spec) {
  const image = { width, height, channels: spec.channels, data: withoutAlpha(data, spec.channels) };
  return centerCrop(resize(image, ...resizedTo(width, height, spec), spec.interpolation), spec);
}

/** Returns the input [C, H, W] for what `fit` returns; every step is rounded to fp32. */
export function normalise({ width, height, channels, data }, { mean, std }) {
  const input = new Float32Array(data.length);
  const [means, stds] = [Float32Array.from(mean), Float32Array.from(std)];
  data.forEach((value, index) => {
    const channel = index % channels;
    const centred = Math.fround(Math.fround(value / 255) - means[channel]);
    input[channel * width * height + (index - channel) / channels] = centred / stds[channel];
  });
  return input;
}

/** Returns RGBA pixels as RGB, or as grey. */
function withoutAlpha(rgba, channels) {
  const pixels = new Uint8Array((rgba.length / 4) * channels);
  for (let from = 0, to = 0; from < rgba.length; from += 4, to += channels) {
    const [red, green, blue] = [rgba[from], rgba[from + 1], rgba[from + 2]];
    if (channels === 3) {
      pixels[to] = red;
      pixels[to + 1] = green;
      pixels[to + 2] = blue;
    } else {
      pixels[to] = (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16; // ITU-R 601-2 luma
    }
  }
  return pixels;
}

/** Returns the width and height that an image is resized to; for a square input torchvision's rounding. */
function resizedTo(width, height, spec) {
  const [targetWidth, targetHeight] = [spec.width, spec.height].map((n) => Math.floor(n / spec.crop_pct));
  if (targetWidth === targetHeight) {
    const long = Math.trunc((targetWidth * Math.max(width, height)) / Math.min(width, height));
    return width <= height ? [targetWidth, long] : [long, targetWidth];
  }
  const ratio = Math.min(height / targetHeight, width / targetWidth);
  return [roundToEven(width / ratio), roundToEven(height / ratio)];
}

function centerCrop({ width, height, channels, data }, spec) {
  const left = roundToEven((width - spec.width) / 2);
  const top = roundToEven((height - spec.height) / 2);
  const row = spec.width * channels;
  const crop = new Uint8Array(spec.height * row);
  for (let y = 0; y < spec.height; y++) {
    const from = ((top + y) * width + left) * channels;
    crop.set(data.subarray(from, from + row), y * row);
  }
  return { width: spec.width, height: spec.height, channels, data: crop };
}

function resize(image, width, height, interpolation) {
  const taps = (from, to) =>
    interpolation === "nearest" ? nearestTaps(from, to) : filterTaps(from, to, FILTERS[interpolation]);
  const passes = [
    (given) => (given.width === width ? given : alongRows(given, taps(given.width, width))),
    (given) => (given.height === height ? given : alongColumns(given, taps(given.height, height))),
  ];
  const lost = image.height - height;
  if (lost > 0 && lost > 2 * (image.width - width)) passes.reverse(); // since Pillow 13
  return passes.reduce((given, pass) => pass(given), image);
}

function alongRows({ width, height, channels, data }, taps) {
  const resampled = resample(data, taps, { outer: height, from: width, inner: channels });
  return { width: taps.length, height, channels, data: resampled };
}

function alongColumns({ width, height, channels, data }, taps) {
  const resampled = resample(data, taps, { outer: 1, from: height, inner: width * channels });
  return { width, height: taps.length, channels, data: resampled };
}

/** Returns [outer, taps, inner] of [outer, from, inner]: weighted sums of what the taps name. */
function resample(data, taps, { outer, from, inner }) {
  const resampled = new Uint8ClampedArray(outer * taps.length * inner);
  let to = 0;
  for (let block = 0; block < outer; block++) {
    for (const { first, weights } of taps) {
      const start = (block * from + first) * inner;
      for (let offset = 0; offset < inner; offset++) {
        let sum = WEIGHT_ONE / 2;
        for (let k = 0; k < weights.length; k++) sum += weights[k] * data[start + offset + k * inner];
        resampled[to++] = Math.floor(sum / WEIGHT_ONE);
      }
    }
  }
  return resampled;
}

/** Returns for each of `to` pixels the first of the `from` pixels under the filter, and their weights. */
function filterTaps(from, to, { support, at }) {
  const scale = from / to;
  const stretch = Math.max(1, scale);
  return Array.from({ length: to }, (_, index) => {
    const middle = (index + 0.5) * scale;
    const first = Math.max(0, Math.trunc(middle - support * stretch + 0.5));
    const end = Math.min(from, Math.trunc(middle + support * stretch + 0.5));
    const offset = first - middle + 0.5;
    const weights = Array.from({ length: end - first }, (_, k) => at((k + offset) * (1 / stretch)));
    const sum = weights.reduce((a, b) => a + b, 0);
    return { first, weights: weights.map((weight) => roundAway((weight / sum) * WEIGHT_ONE)) };
  });
}

function nearestTaps(from, to) {
  const scale = from / to;
  let middle = scale / 2;
  return Array.from({ length: to }, () => {
    const tap = { first: Math.trunc(middle), weights: [WEIGHT_ONE] };
    middle += scale; // not a product: the rounding of the sum decides which pixel it is
    return tap;
  });
}

/** Keys' cubic convolution with a = -1/2. */
function cubic(x) {
  const a = -0.5;
  const d = Math.abs(x);
  if (d < 1) return ((a + 2) * d - (a + 3)) * d * d + 1;
  return d < 2 ? (((d - 5) * d + 8) * d - 4) * a : 0;
}

function sinc(x) {
  return x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x);
}

function roundAway(x) {
  return Math.sign(x) * Math.floor(Math.abs(x) + 0.5);
}

function roundToEven(x) {
  const down = Math.floor(x);
  return x - down === 0.5 ? down + (down % 2) : Math.round(x);
}
