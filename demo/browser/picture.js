// A picture of any size as RGB pixels of the size that the model sees, as Pillow resizes it. A canvas would resize
// otherwise in each browser, and skip pixels where a photo becomes small.

// Filters of Pillow by its numbers: how far they reach, and the weight of a pixel at a distance
const FILTERS = {
  2: [1, (x) => Math.max(0, 1 - Math.abs(x))], // bilinear
  3: [2, bicubic],
};
const PRECISION = 2 ** 22; // Pillow's fixed-point weights

function bicubic(x) {
  x = Math.abs(x);
  if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
  return x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0;
}

/**
 * Decodes a picture: upright, on white, and resized.
 * @param {Blob} blob A file that the browser can show.
 * @param {{size: object, resample: number}} rule Of the image processor.
 * @returns {Promise<{data: Uint8ClampedArray, width: number, height: number}>} RGB.
 */
export async function readPicture(blob, { size, resample }) {
  const bitmap = await createImageBitmap(blob, { colorSpaceConversion: "none" });
  const { width, height } = bitmap;
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  context.drawImage(bitmap, 0, 0);
  const pixels = context.getImageData(0, 0, width, height).data;
  const rgb = new Uint8ClampedArray(width * height * 3);
  for (let i = 0, j = 0; i < pixels.length; i += 4) for (let c = 0; c < 3; c++) rgb[j++] = pixels[i + c];
  // As the library: to a size, or the shorter side to a length, after which the middle is cut out
  const short = Math.min(width, height);
  const [newWidth, newHeight] = size.shortest_edge
    ? [width, height].map((side) => Math.floor((size.shortest_edge * side) / short))
    : [size.width, size.height];
  const narrow = resizeRows(rgb, width, height, newWidth, resample); // [newWidth, height], transposed
  return { data: resizeRows(narrow, height, newWidth, newHeight, resample), width: newWidth, height: newHeight };
}

/** Resizes each row, and transposes: twice, it resizes both sides, and the picture is upright again. */
function resizeRows(rgb, width, height, newWidth, resample) {
  const [reach, weigh] = FILTERS[resample];
  const scale = width / newWidth;
  const stretch = Math.max(scale, 1);
  const output = new Uint8ClampedArray(newWidth * height * 3);
  for (let x = 0; x < newWidth; x++) {
    const center = (x + 0.5) * scale;
    const first = Math.max(0, Math.trunc(center - reach * stretch + 0.5));
    const end = Math.min(width, Math.trunc(center + reach * stretch + 0.5));
    let weights = Array.from({ length: end - first }, (_, i) => weigh((first + i - center + 0.5) / stretch));
    const sum = weights.reduce((a, b) => a + b);
    weights = weights.map((weight) => roundAway((weight / sum) * PRECISION));
    for (let y = 0; y < height; y++) {
      for (let c = 0; c < 3; c++) {
        let value = PRECISION / 2;
        for (let i = 0; i < weights.length; i++) value += weights[i] * rgb[(y * width + first + i) * 3 + c];
        output[(x * height + y) * 3 + c] = Math.floor(value / PRECISION);
      }
    }
  }
  return output;
}

const roundAway = (x) => Math.trunc(x + Math.sign(x) / 2);
