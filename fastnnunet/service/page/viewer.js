// The scan and its labels by NiiVue, which draws in WebGL 2.
const SHOWN = /\.(nii|nii\.gz|nrrd|nhdr|mha|mgz)$/i;

export const canBeDrawn = (file) => SHOWN.test(file.name);

/** A viewer on a canvas; null where the browser has no WebGL 2. */
export async function makeViewer(canvas, tell) {
  if (!document.createElement("canvas").getContext("webgl2")) return null;
  const viewer = new niivue.Niivue({
    dragAndDropEnabled: false, show3Dcrosshair: true, isColorbar: false, loadingText: "", backColor: [0, 0, 0, 1],
    crosshairColor: [1, 1, 1, 0.5], crosshairWidth: 0.25, logLevel: "silent", multiplanarShowRender: niivue.SHOW_RENDER.ALWAYS,
    multiplanarLayout: niivue.MULTIPLANAR_TYPE.GRID, viewModeHotKey: "", clipPlaneHotKey: "", cycleClipPlaneHotKey: "",
  });
  viewer.onLocationChange = (where) => tell(where.string);
  await viewer.attachToCanvas(canvas);
  const steps = {
    ArrowLeft: [-1, 0, 0], ArrowRight: [1, 0, 0], ArrowUp: [0, 1, 0], ArrowDown: [0, -1, 0], PageUp: [0, 0, 1], PageDown: [0, 0, -1],
  };
  canvas.addEventListener("keydown", (event) => {
    if (!steps[event.key] || !viewer.volumes.length) return;
    event.preventDefault();
    viewer.moveCrosshairInVox(...steps[event.key]);
  });
  return new Viewer(viewer);
}

class Viewer {
  constructor(viewer) {
    this.viewer = viewer;
    this.labels = null;
    const { MULTIPLANAR, AXIAL, CORONAL, SAGITTAL, RENDER } = niivue.SLICE_TYPE;
    this.kinds = { "Planes and 3D": MULTIPLANAR, Axial: AXIAL, Coronal: CORONAL, Sagittal: SAGITTAL, "3D": RENDER };
  }

  clear() {
    while (this.viewer.volumes.length) this.viewer.removeVolume(this.viewer.volumes.at(-1));
    this.labels = null;
  }

  async showScan(file) {
    this.clear();
    this.viewer.addVolume(await niivue.NVImage.loadFromFile({ file, name: file.name, colormap: "gray" }));
  }

  /** `structures` have `value`, `colour` and `isShown`. */
  async showLabels(blob, structures, opacity) {
    if (this.labels) this.viewer.removeVolume(this.labels);
    const file = new File([blob], "labels.nii.gz");
    this.labels = await niivue.NVImage.loadFromFile({ file, name: file.name, opacity });
    this.colour(structures);
    this.viewer.addVolume(this.labels);
  }

  colour(structures) {
    const table = { R: [0], G: [0], B: [0], A: [0], I: [0], labels: ["background"] };
    for (const { value, colour, name, isShown } of structures) {
      [1, 3, 5].forEach((at, i) => table["RGB"[i]].push(parseInt(colour.slice(at, at + 2), 16)));
      table.A.push(isShown ? 255 : 0);
      table.I.push(value);
      table.labels.push(name);
    }
    this.labels.setColormapLabel(table);
    this.viewer.updateGLVolume();
  }

  opacity(value) {
    const at = this.viewer.volumes.indexOf(this.labels);
    if (at >= 0) this.viewer.setOpacity(at, value);
  }

  /** Pictures are seen as they are stored, scans with the patient's right on the right. */
  asPicture(isPicture) {
    this.viewer.setRadiologicalConvention(isPicture);
  }

  view(name) {
    this.viewer.setSliceType(this.kinds[name]);
  }
}
