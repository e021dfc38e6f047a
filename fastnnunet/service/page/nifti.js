// As much of NIfTI-1 as the page needs: the volumes of a label map, and a scan that is made up.
const KINDS = { 2: [Uint8Array, 1], 4: [Int16Array, 2], 8: [Int32Array, 4], 512: [Uint16Array, 2], 768: [Uint32Array, 4] };

async function bytesOf(blob) {
  const head = new Uint8Array(await blob.slice(0, 2).arrayBuffer());
  const isGzip = head[0] === 0x1f && head[1] === 0x8b;
  const stream = isGzip ? blob.stream().pipeThrough(new DecompressionStream("gzip")) : blob.stream();
  return new Response(stream).arrayBuffer();
}

/** Millilitres of each value of a label map: a Map, without background. */
export async function millilitres(blob) {
  const bytes = await bytesOf(blob);
  const view = new DataView(bytes);
  const isLittle = view.getInt32(0, true) === 348;
  const [dims, sizes] = [[1, 2, 3].map((i) => view.getInt16(40 + 2 * i, isLittle)), [1, 2, 3].map((i) => view.getFloat32(76 + 4 * i, isLittle))];
  const kind = KINDS[view.getInt16(70, isLittle)];
  if (!kind || !isLittle) throw new Error("the label map is of a kind that this page cannot count");
  const count = dims.reduce((a, n) => a * Math.max(n, 1), 1);
  const offset = view.getFloat32(108, true);
  const voxels = new kind[0](bytes.slice(offset, offset + count * kind[1]));
  const counts = new Map();
  for (const value of voxels) if (value) counts.set(value, (counts.get(value) ?? 0) + 1);
  const each = Math.abs(sizes[0] * sizes[1] * sizes[2]) / 1000;
  return new Map([...counts].map(([value, n]) => [value, n * each]));
}

/** A file with smooth made-up voxels, no data of anybody; millimetres along x, y, z. */
export function madeUpScan(spacing_xyz, seed) {
  const [nx, ny, nz] = [64, 56, 40];
  const bytes = new ArrayBuffer(352 + 2 * nx * ny * nz);
  const view = new DataView(bytes);
  view.setInt32(0, 348, true);
  [3, nx, ny, nz, 1, 1, 1, 1].forEach((n, i) => view.setInt16(40 + 2 * i, n, true));
  view.setInt16(70, 4, true);  // int16
  view.setInt16(72, 16, true);
  [1, ...spacing_xyz].forEach((size, i) => view.setFloat32(76 + 4 * i, size, true));
  view.setFloat32(108, 352, true);
  view.setFloat32(112, 1, true);
  view.setUint8(123, 2);  // millimetres
  view.setInt16(254, 1, true);  // the rows below place it: x to the right, y to the front, z upwards
  spacing_xyz.forEach((size, row) => {
    view.setFloat32(280 + 16 * row + 4 * row, size, true);
    view.setFloat32(280 + 16 * row + 12, (-size * [nx, ny, nz][row]) / 2, true);
  });
  [0x6e, 0x2b, 0x31, 0].forEach((letter, i) => view.setUint8(344 + i, letter));
  let state = 12345 + 7919 * seed;
  const random = () => (state = (1103515245 * state + 12345) % 2147483648) / 2147483648;
  const balls = Array.from({ length: 9 }, () => [random() * nx, random() * ny, random() * nz, 5 + 9 * random(), 900 * random() - 450]);
  const voxels = new Int16Array(bytes, 352);
  for (let z = 0, at = 0; z < nz; z++) for (let y = 0; y < ny; y++) for (let x = 0; x < nx; x++, at++) {
    let value = 60 * (random() - 0.5);
    for (const [bx, by, bz, radius, height] of balls) {
      value += height * Math.exp(-((x - bx) ** 2 + (y - by) ** 2 + (z - bz) ** 2) / (2 * radius * radius));
    }
    voxels[at] = value;
  }
  return new File([bytes], `example_${String(seed).padStart(4, "0")}.nii`);
}
