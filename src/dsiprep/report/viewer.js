// Layers of the viewer: one image, and overlays of equal opacity.
"use strict";
(async () => {
  const layers = JSON.parse(document.getElementById("layers").textContent);
  const byId = (id) => document.getElementById(id);
  const say = (text) => { byId("message").textContent = text; };
  if (typeof niivue === "undefined") return say("NiiVue's script is missing: keep the folder logs beside this subject's folder.");
  const bases = layers.filter((layer) => !layer.overlay);
  const overlays = layers.filter((layer) => layer.overlay);
  const served = location.protocol.startsWith("http");
  const viewer = new niivue.Niivue({ backColor: [0.07, 0.07, 0.07, 1], crosshairWidth: 0.4, crosshairColor: [1, 0.8, 0.2, 0.7], isRadiologicalConvention: false });
  try {
    await viewer.attachToCanvas(byId("gl"));
  } catch (error) {
    return say(`WebGL 2 is not available (${error.message}).`);
  }
  viewer.setSliceType(viewer.sliceTypeMultiplanar);

  const options = (layer, opacity) => ({
    name: `${layer.name}.nii.gz`, colormap: layer.colourmap, colormapNegative: layer.negative, opacity, cal_min: layer.low, cal_max: layer.high, base64: layer.image,
  });
  const small = (layer, opacity) => niivue.NVImage.loadFromBase64(options(layer, opacity));
  const load = async (layer) => {
    if (served && layer.file) {
      try {
        return [await niivue.NVImage.loadFromUrl({ url: layer.file, colormap: layer.colourmap }), "at full resolution"];
      } catch { /* the derivatives are not there: the coarse copy is */ }
    }
    return [await small(layer, 1), "at 3 mm"];
  };
  const show = async () => {
    const layer = bases[byId("base").value];
    say("Loading …");
    const [image, resolution] = await load(layer);
    viewer.volumes.slice().forEach((volume) => viewer.removeVolume(volume));
    viewer.addVolume(image);
    for (const box of document.querySelectorAll("#overlays input:checked"))
      viewer.addVolume(await small(overlays[box.value], byId("opacity").value / 100));
    const frames = image.nFrame4D || 1;
    byId("frame").max = frames - 1;
    byId("frame").value = 0;
    byId("frame").disabled = frames < 2;
    say(`${layer.name} ${resolution}` + (served ? "" : "; for full resolution serve the folder, for example with python -m http.server"));
    document.body.dataset.ready = "true";
  };

  bases.forEach((layer, index) => byId("base").add(new Option(layer.name, index)));
  overlays.forEach((layer, index) => {
    const label = document.createElement("label");
    const box = Object.assign(document.createElement("input"), { type: "checkbox", value: index });
    box.addEventListener("change", show);
    label.append(box, ` ${layer.name} `);
    byId("overlays").append(label);
  });
  byId("base").addEventListener("change", show);
  byId("opacity").addEventListener("input", () =>
    viewer.volumes.forEach((volume, index) => { if (index) viewer.setOpacity(index, byId("opacity").value / 100); }));
  byId("frame").addEventListener("input", () => viewer.setFrame4D(viewer.volumes[0].id, Number(byId("frame").value)));
  await show();
})();
